"""Bridges to other libraries. Each module needs its own extra and is imported on its own, never by ``import bsfa``."""

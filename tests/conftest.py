"""Reproducible runs: a fixed seed per test, hypothesis without a clock, every dense fallback warned about anew."""

from __future__ import annotations

import pytest
import torch
from bsfa import errors
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(20)
    errors._warned.clear()

"""The exceptions and warnings that bsfa raises beside ``ValueError`` and ``TypeError``."""

from __future__ import annotations

import warnings

import torch


class UnsupportedError(RuntimeError):
    """A valid request that this build, device or version cannot run. The message says what to do instead."""


class ThresholdMismatchError(ValueError):
    """A threshold file that was made for another model, policy version or block size."""


class DenseFallbackWarning(UserWarning):
    """A call with a sparse policy ran dense attention; the message names the reason. Issued once per reason."""


_warned: set[str] = set()


def warn_dense(reason: str) -> None:
    """Warn once per ``reason`` (never while torch.compile traces, where Python side effects are lost)."""
    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(f"bsfa ran dense attention: {reason}", DenseFallbackWarning, stacklevel=3)

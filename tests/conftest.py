"""Reproducible runs: a fixed seed per test, hypothesis without a clock, every dense fallback warned about anew."""

from __future__ import annotations

import os

# The matrices here are small: threads of the oracle's matrix library, and waiting threads that spin, only cost time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from bsfa import errors

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(20)
    errors._warned.clear()

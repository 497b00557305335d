"""Every policy form on CUDA against the published rules, on random and on structured inputs (rules.py)."""

from __future__ import annotations

import pytest
import torch

from rules import CUDA, FORMS, Form, check_many

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_masks_are_the_oracles(form: Form) -> None:
    check_many(form, CUDA, random=100, structures=20)

"""Every policy form against the published rules, on random and on structured inputs (rules.py, oracle_rules.py)."""

from __future__ import annotations

import pytest

from rules import CPU, FORMS, Form, check_many


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_masks_are_the_oracles(form: Form) -> None:
    check_many(form, CPU, random=100, structures=20)

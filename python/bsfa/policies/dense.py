"""Dense: every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.policies.base import Policy, Selection


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense(Policy):
    """Exact attention over every block; the same as no policy."""

    name: ClassVar[str] = "dense"

    def select(self, selection: Selection) -> None:
        """No mask."""
        return None

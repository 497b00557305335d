"""From which length on a policy is worth its selection: one default for all integrations. Needs nothing but Python."""

from __future__ import annotations

#: Keys (tokens) from which on an integration applies a policy; below, attention is dense. Not below what
#: benchmarks/results/h200.json measures as ``crossover.relmax.tokens``: the length from which on choosing blocks and
#: attending to them is faster than dense attention.
DEFAULT_MIN_SEQLEN = 8192

#: Why a call below the minimum is dense.
SHORT_REASON = "fewer keys than min_seqlen"


def check_min_seqlen(value: int) -> int:
    """``value`` if it is a number of tokens (0: no minimum). Raises ``TypeError`` or ``ValueError``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"min_seqlen must be an int (tokens), got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"min_seqlen must be at least 0, got {value}")
    return value

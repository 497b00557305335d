"""Policies: which KV blocks to keep. Small frozen dataclasses, each with the parameters of what it follows.

Adding a scored policy is one dataclass deriving from :class:`ScoredPolicy` and one scoring rule (``ScoreRule`` in
csrc/include/bsfa/params.h); everything else (chunking, paging, calibration, threshold files) follows from its class
variables.
"""

from __future__ import annotations

from bsfa.policies.antidiagonal import Antidiagonal
from bsfa.policies.base import Policy, ScoredPolicy, Selection, ThresholdPolicy
from bsfa.policies.composed import Composed, Intersection, PerLayer, Union
from bsfa.policies.cumulative_mass import CumulativeMass
from bsfa.policies.dense import Dense
from bsfa.policies.exact_skip import ExactSkip
from bsfa.policies.fixed import Fixed
from bsfa.policies.flex_prefill import FlexPrefill
from bsfa.policies.relative_max import RelativeMax
from bsfa.policies.static_pattern import StaticPattern
from bsfa.policies.token_topk import TokenTopK

SCORED: dict[str, type[ScoredPolicy]] = {p.name: p for p in (RelativeMax, CumulativeMass, Antidiagonal)}

#: Policies that calibration, threshold files and the command line know by name.
CALIBRATED: dict[str, type[ThresholdPolicy]] = {**SCORED, ExactSkip.name: ExactSkip}

__all__ = [
    "CALIBRATED",
    "SCORED",
    "Antidiagonal",
    "Composed",
    "CumulativeMass",
    "Dense",
    "ExactSkip",
    "Fixed",
    "FlexPrefill",
    "Intersection",
    "PerLayer",
    "Policy",
    "RelativeMax",
    "ScoredPolicy",
    "Selection",
    "StaticPattern",
    "ThresholdPolicy",
    "TokenTopK",
    "Union",
]

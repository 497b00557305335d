"""Calibration: measure a model's attention on prompts, choose thresholds that keep a target share of its mass.

    curves = collect(model, tokenizer, prompts, bsfa.policies.RelativeMax())
    choose(curves, 0.95).save("thresholds.safetensors")

docs/calibration.md says what is promised and what is not.
"""

from __future__ import annotations

from bsfa.calibration.budget import spend
from bsfa.calibration.choose import Promise, choose, split_prompts
from bsfa.calibration.collect import CalibrationCurves, Progress, collect
from bsfa.calibration.curves import BlockCurves, block_curves, threshold_grid
from bsfa.calibration.exact_skip import SkipCurves, calibrate_kth, choose_skip, collect_skip
from bsfa.calibration.risk import (
    CalibrationWarning,
    confident_bound,
    least_prompts,
    least_prompts_confident,
    loosest,
    loosest_confident,
    loosest_mean,
    p_value,
    risk_bound,
)

__all__ = [
    "BlockCurves",
    "CalibrationCurves",
    "CalibrationWarning",
    "Progress",
    "Promise",
    "SkipCurves",
    "block_curves",
    "calibrate_kth",
    "choose",
    "choose_skip",
    "collect",
    "collect_skip",
    "confident_bound",
    "least_prompts",
    "least_prompts_confident",
    "loosest",
    "loosest_confident",
    "loosest_mean",
    "p_value",
    "risk_bound",
    "spend",
    "split_prompts",
    "threshold_grid",
]

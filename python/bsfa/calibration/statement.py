"""What a threshold file claims, in lines for people: target, confidence, what held-out prompts say, and doubts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bsfa.calibration.choose import Promise
from bsfa.prompts import length_name
from bsfa.thresholds import CALIBRATED, ThresholdTable


def promise_of(table: ThresholdTable) -> Promise | None:
    """The promise that the thresholds were chosen by; None where there was no target recall."""
    target = table.calibration.get("target_recall")
    if target is None:
        return None
    confidence = table.calibration.get("confidence")  # files before it have none: in expectation
    return Promise(float(target), None if confidence is None else float(confidence))


def doubts(table: ThresholdTable) -> list[str]:
    """Why the claim does not hold water: one sentence each."""
    promise, n = promise_of(table), table.calibration.get("calibration_prompts")
    if promise is None or not isinstance(n, int) or n < 1:
        return []
    found = [promise.too_few(n, len(table.calibration.get("reference_prompts", ())))]
    return [text for text in found if text is not None]


def _of(pairs: int, all_pairs: int) -> str:
    return f"{pairs} of {all_pairs} ({pairs / all_pairs:.1%})" if all_pairs else "none"


def _calibrated(table: ThresholdTable, values: Tensor) -> Tensor:
    """[layers, heads] -> the heads of calibrated layers."""
    return values[[kind == CALIBRATED for kind in table.layers]].flatten()


def _held_out(table: ThresholdTable, target: float | None) -> dict[str, Any]:
    """``calibration["held_out"]``; for files without it, what the tensors tell."""
    stored = table.calibration.get("held_out")
    if stored:
        return dict(stored)
    recall, tail = _calibrated(table, table.recall).double(), _calibrated(table, table.tail_recall).double()
    if not recall.numel() or bool(recall.isnan().any()):
        return {}
    sparse = ~_calibrated(table, table.dense_heads())
    result: dict[str, Any] = {
        "recall": {
            "mean": float(recall.mean()),
            "sd": float(_calibrated(table, table.recall_spread).mean()),
            "worst": float(_calibrated(table, table.recall_worst).min()),
        },
        "tail_recall": {"mean": float(tail.mean())},
        "pairs": recall.numel(),
        "sparse_pairs": int(sparse.sum()),
    }
    if target is not None:
        met = {"recall": recall >= target, "tail_recall": tail >= target}
        result["pairs_that_meet_target"] = {name: int(m.sum()) for name, m in met.items()}
        result["sparse_pairs_that_meet_target"] = {name: int((m & sparse).sum()) for name, m in met.items()}
    return result


def _numbers(row: dict[str, float]) -> str:
    names = {"mean": "mean", "sd": "sd", "worst": "worst prompt"}
    return ", ".join(f"{words} {row[name]:.4f}" for name, words in names.items() if name in row)


def _spent(table: ThresholdTable) -> list[tuple[str, str]]:
    """Of thresholds of :func:`bsfa.calibration.spend`: the error that was estimated, and that on held-out prompts."""
    facts, held_out = table.calibration, table.calibration["held_out"]
    unit = "nats per token" if facts["cost"] == "loss" else "of the layers' attention outputs"
    length = length_name(facts["length"])
    by_length = ", ".join(f"{error:.4g} at {length_name(int(n))}" for n, error in held_out["error_by_length"].items())
    return [
        ("cost", str(facts["cost"])),
        (
            "estimated",
            f"density {facts['estimated_density']:.4f} at {length}, error {facts['estimated_error']:.4g} {unit}",
        ),
        ("held out, error", f"{held_out['error']:.4g} {unit}; {by_length}"),
        ("promise", str(facts["promise"])),
    ]


def statement(table: ThresholdTable) -> list[tuple[str, str]]:
    """(what, value) lines: target, confidence, prompts, recall on held-out prompts, and how many heads meet the target.

    Spread is over the held-out prompts, each with its mean over the heads of calibrated layers; in files of older
    versions the deviation is the mean of the heads' own, and the worst that of the worst head.
    """
    facts, promise = table.calibration, promise_of(table)
    tokens = facts.get("tokens") or [0]
    lines: list[tuple[str, str]] = []
    if promise is None:
        lines.append(("goal", f"{table.goal} ({facts.get('method')})"))
    else:
        lines.append(("target recall", f"{promise.target_recall:g} ({facts.get('method')})"))
        lines.append(
            ("confidence", "in expectation" if promise.confidence is None else f"{promise.confidence:g} for each head")
        )
    if facts.get("cost") is not None:
        lines += _spent(table)
    if promise is not None and facts.get("tail") is not None:
        lines.append(("about", f"the worst {facts['tail']:.0%} of a prompt's query tiles"))
    prompts = f"{facts.get('calibration_prompts')} chose, {facts.get('held_out_prompts')} checked"
    if not table.measured:
        lines.append(("quality", "not measured: recall and density are unknown, see bsfa eval"))
        lines += [("not carried over", str(text)) for text in facts.get("not_mapped", ())]
        return lines
    spent = len(facts.get("reference_prompts", ()))
    if spent:
        prompts = f"{spent} chose the references, {prompts}"
    lines.append(("prompts", f"{prompts}; {min(tokens)} .. {max(tokens)} tokens; seed {facts.get('seed')}"))
    if facts.get("reference") is not None:
        lines.append(("reference", str(facts["reference"])))
    if promise is not None:
        lines.append(("prompts needed", f"{promise.least_prompts} that choose, for this target and confidence"))
    held_out = _held_out(table, None if promise is None else promise.target_recall)
    for key, title in (("tail_recall", "worst tiles"), ("recall", "all tiles")):
        if key in held_out:
            lines.append((f"held out, {title}", f"recall {_numbers(held_out[key])}"))
    if "pairs_that_meet_target" in held_out:
        for name, pairs in (("", "pairs"), ("sparse ", "sparse_pairs")):
            met = held_out[f"{pairs}_that_meet_target"]
            lines.append(
                (
                    f"{name}heads on target",
                    f"{_of(met['tail_recall'], held_out[pairs])} (layer, head) pairs in the worst tiles, "
                    f"{_of(met['recall'], held_out[pairs])} over all tiles",
                )
            )
    lines.append(("prompts' sha256", str(facts.get("prompts_sha256"))))
    return lines

"""Inputs with blocks worth skipping, cuts that no rounding can turn, and results held against oracle_skip."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import bsfa
import oracle
import oracle_skip
from bsfa.attending import mask_ahead, skip_cuts
from bsfa.policies import ExactSkip
from bsfa.stages import resolve_layout
from cases import F32, ROUNDING, Case, Inputs, assert_within, check_attention, poison

#: What a key is multiplied by, per KV block and head: some blocks are all quiet.
LOUDNESS = (0.05, 0.2, 1.0, 2.5)


def make(case: Case) -> Inputs:
    """The inputs of a case, with blocks of different loudness."""
    inputs = case.make()
    rng = np.random.default_rng((case.seed, 77))
    for keys in inputs.keys:
        blocks = oracle.num_blocks(len(keys), case.block_n)
        factors = torch.from_numpy(rng.choice(LOUDNESS, size=(blocks, case.hkv, 1))).to(torch.float32)
        keys.copy_(keys.float() * factors.repeat_interleave(case.block_n, dim=0)[: len(keys)])
    inputs.lay_out()
    return inputs


def masks_of(inputs: Inputs) -> list[np.ndarray] | None:
    return None if inputs.case.mask == "none" else [inputs.draw_mask(b) for b in range(len(inputs))]


def columns(inputs: Inputs) -> int:
    """Query tiles up to the last position of the longest sequence."""
    return max(-(-max(inputs.max_q, inputs.max_k) // inputs.case.block_m), 1)


def run_oracle(
    inputs: Inputs, b: int, policy: ExactSkip, thresholds: np.ndarray, mask: np.ndarray | None
) -> oracle_skip.Skipped:
    """oracle_skip of one sequence; the output is that of [v, |v|]."""
    case = inputs.case
    q, k, v = inputs.arrays(b)
    return oracle_skip.attention(
        q,
        k,
        np.concatenate([v, np.abs(v)], axis=-1),
        **inputs.oracle_maths,
        thresholds=thresholds,
        form=policy.form,
        mask=mask,
        block_m=case.block_m,
        block_n=case.block_n,
        sink_blocks=policy.sink_blocks,
        window_blocks=policy.window_blocks,
        counted=policy.counted,
    )


def first_pass(
    inputs: Inputs, policy: ExactSkip, masks: list[np.ndarray] | None = None
) -> tuple[list[np.ndarray], np.ndarray, float]:
    """What oracle_skip.two_passes finds: the mask of each sequence, the counts of all, the least margin."""
    case = inputs.case
    thresholds = policy.cuts(case.hq, columns(inputs), torch.device("cpu")).double().numpy()
    words, counts, margin = [], np.zeros((case.hq, 2), dtype=np.int64), np.inf
    for b in range(len(inputs)):
        q, k, _ = inputs.arrays(b)
        found = oracle_skip.two_passes(
            q,
            k,
            **inputs.oracle_maths,
            thresholds=thresholds,
            form=policy.form,
            mask=None if masks is None else masks[b],
            block_m=case.block_m,
            block_n=case.block_n,
            sink_blocks=policy.sink_blocks,
            window_blocks=policy.window_blocks,
        )
        words.append(found[0])
        counts += found[1]
        margin = min(margin, found[2])
    return words, counts, margin


def first_masks(
    inputs: Inputs,
    policy: ExactSkip,
    masks: list[np.ndarray] | None = None,
    operator: str = "skip_mask",
) -> tuple[bsfa.BlockMask, Tensor]:
    """The mask between the two passes over ``inputs`` (``operator``: or that of bounds), and the counts."""
    case, names = inputs.case, ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    where = {name: inputs.layout.get(name) for name in (*names, "block_table", "seqlens_k")}
    layout = resolve_layout(inputs.q, inputs.k, None, case.causal, **where)
    within = None if masks is None else inputs.block_mask(masks)
    cuts = skip_cuts(inputs.q, layout, policy)
    op = getattr(torch.ops.bsfa, operator)
    return mask_ahead(op, inputs.q, inputs.k, within, layout, case.softmax_scale, case.softcap, policy, cuts)


def check_two_passes(
    inputs: Inputs,
    there: Inputs,
    policy: ExactSkip,
    masks: list[np.ndarray] | None = None,
    *,
    lse_constant: float = 2e-6,
    margin: float = 1e-5,
) -> np.ndarray:
    """Hold the mask between the passes, counts, output and LSE against the oracle, and return the counts [Hq, 2].

    there: the inputs on the device that is to run them. margin: see :func:`check_skipping`.
    """
    words, counts, least = first_pass(inputs, policy, masks)
    assert least > margin, "a bad case: rounding may turn a decision"
    moved = policy.to(there.q.device)
    mask, skips = first_masks(there, moved, masks)
    kept = mask.to_rows().cpu()
    for b, want in enumerate(words):
        got = inputs.rows_of_sequence(kept, b)
        assert np.array_equal(got[:, :, : want.shape[2]], want), f"sequence {b}: other blocks than the rule keeps"
        assert not got[:, :, want.shape[2] :].any(), f"sequence {b}: blocks beyond the end"
    assert not inputs.unused_rows(kept).any()
    assert torch.equal(mask.counts.cpu(), kept.sum(-1, dtype=torch.int32))
    assert skips.dtype == torch.int64 and np.array_equal(skips.cpu().numpy(), counts)
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=inputs.case.dtype, device=there.q.device.type)
    options = {"skip": moved, "return_skips": True, **there.maths, **there.layout}
    within = None if masks is None else there.block_mask(masks)
    out, lse, again = bsfa.block_sparse_attention(there.q, there.k, there.v, within, **options)
    assert torch.equal(again, skips)
    check_attention(inputs, out, lse, words, lse_constant)
    return counts


def compared_values(inputs: Inputs, policy: ExactSkip, masks: list[np.ndarray] | None) -> list[np.ndarray]:
    """Per query head, what the rule compares with its threshold as long as nothing is skipped: sorted, finite."""
    found: list[list[float]] = [[] for _ in range(inputs.case.hq)]
    nothing = np.full((inputs.case.hq, 1), -np.inf)
    for b in range(len(inputs)):
        for d in run_oracle(inputs, b, policy, nothing, None if masks is None else masks[b]).decisions:
            found[d.head].append(d.value)
    values = [np.array(x) for x in found]
    return [np.sort(x[np.isfinite(x)]) for x in values]


def pick_cuts(values: list[np.ndarray], most: float) -> Tensor:
    """One cut in nats per head, in the widest gap between values of which it leaves some below; at most ``most``.
    Below all of them if they lie too close.
    """
    cuts = []
    for x in values:
        x = x[x < most]
        if np.isfinite(most) or len(x) == 0:
            x = np.append(x, min(most, 0.0))
        middle = x[len(x) // 5 : len(x) - len(x) // 10]
        gaps = np.diff(middle)
        at = int(gaps.argmax()) if len(gaps) else -1
        wide = at >= 0 and gaps[at] > 0.03 + 0.01 * np.abs(x).max()
        cuts.append((middle[at] + middle[at + 1]) / 2 if wide else x[0] - 1.0)
    return torch.tensor(cuts, dtype=F32)


def policy_for(inputs: Inputs, masks: list[np.ndarray] | None, form: str, **options: object) -> ExactSkip:
    """ExactSkip with cuts per head that skip something where there is something to skip."""
    sizes = {"block_m": inputs.case.block_m, "block_n": inputs.case.block_n}
    base = ExactSkip(form=form, **sizes, **options)  # type: ignore[arg-type]
    # At most 0 in the relative form: what is skipped then leaves the running maxima as they are.
    cuts = pick_cuts(compared_values(inputs, base, masks), 0.0 if form == "relative" else np.inf)
    if form == "relative":
        return base.with_threshold(cuts.exp())
    return ExactSkip.absolute(cuts, **sizes, **options)  # type: ignore[arg-type]


def same_maths(
    q: Tensor, k: Tensor, v: Tensor, entered: np.ndarray, valued: np.ndarray, scale: float, softcap: float
) -> tuple[np.ndarray, np.ndarray]:
    """The yardstick: the same by torch operations in the inputs' dtype (lse: float32)."""
    group = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(group, dim=1)
    inside, used = torch.from_numpy(entered), torch.from_numpy(valued)

    def logits(dtype: torch.dtype) -> Tensor:
        s = torch.matmul(q.to(dtype).transpose(0, 1), keys.to(dtype).permute(1, 2, 0)) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        return s.masked_fill(~inside, float("-inf"))

    p = torch.softmax(logits(q.dtype), dim=-1).masked_fill(~used, 0.0)
    out = torch.matmul(p, v.repeat_interleave(group, dim=1).transpose(0, 1)).transpose(0, 1)
    return out.double().numpy(), torch.logsumexp(logits(F32), dim=-1).double().numpy()


def check_skipping(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    skips: Tensor | None,
    policy: ExactSkip,
    masks: list[np.ndarray] | None = None,
    *,
    lse_constant: float = 2e-6,
    margin: float = 1e-5,
) -> np.ndarray:
    """Hold a result against the oracle, sequence by sequence, and return its counts [Hq, 2].

    margin: relative distance to the threshold that no decision of the case may fall below.
    """
    case = inputs.case
    thresholds = policy.cuts(case.hq, columns(inputs), torch.device("cpu")).double().numpy()
    assert out.dtype == case.dtype and lse.dtype == F32
    assert tuple(out.shape) == (*inputs.q.shape[:-1], inputs.v.shape[-1])
    out, lse = out.cpu(), lse.cpu()
    counts = np.zeros((case.hq, 2), dtype=np.int64)
    for b in range(len(inputs)):
        want = run_oracle(inputs, b, policy, thresholds, None if masks is None else masks[b])
        assert want.margin > margin, "a bad case: rounding may turn a decision"
        counts += want.counts
        want_out, magnitude = np.split(want.out, 2, axis=-1)
        tensors = (inputs.queries[b], inputs.keys[b], inputs.values[b])
        low, low_lse = same_maths(*tensors, want.entered, want.valued, case.softmax_scale, case.softcap)
        got = inputs.lse_of_sequence(lse, b).double().numpy()
        assert_within(got, want.lse, low_lse, lse_constant, f"lse of sequence {b}")
        got = inputs.of_sequence(out, b).double().numpy()
        assert_within(got, want_out, np.nan_to_num(low), 2e-6 if case.dtype == F32 else 1e-3, f"out of sequence {b}")
        assert (got[np.isneginf(want.lse).T] == 0).all(), f"out of sequence {b}: not 0 where nothing is seen"
        if case.dtype != F32:
            unit = ROUNDING[case.dtype]
            excess = np.abs(got - want_out) - unit * np.abs(want_out) - (unit + 1e-4) * magnitude
            assert excess.max(initial=0.0) <= 1e-6, f"out of sequence {b}: more than rounding explains"
    if skips is not None:
        assert skips.dtype == torch.int64
        assert np.array_equal(skips.cpu().numpy(), counts), f"counts {skips.tolist()}, expected {counts.tolist()}"
    return counts

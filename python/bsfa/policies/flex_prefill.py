"""FlexPrefill: per head and prompt, either vertical and slash lines or pooled scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bsfa._library import require_kernel
from bsfa.block_mask import BlockMask, MaskGeometry, pack_bits
from bsfa.layout import Layout
from bsfa.limits import check_limits, check_tma
from bsfa.policies.base import Policy, ScoredPolicy, Scoring, Selection, Threshold, check_count

#: Unit of probability mass where sums decide: integers, so that no order of addition changes them.
MASS_UNITS = 2.0**40


@dataclass(frozen=True, eq=False, kw_only=True)
class _QueryAware(ScoredPolicy):
    """The pooled scores of the query-aware heads."""

    gamma: Threshold = 0.9
    threshold_name: ClassVar[str] = "gamma"
    keeps_at_least: ClassVar[bool] = False

    @property
    def scoring(self) -> Scoring:
        return Scoring("pooled")


_QueryAware.__name__ = "FlexPrefill"  # which its errors name


@dataclass(frozen=True, eq=False, kw_only=True)
class FlexPrefill(Policy):
    """Choose per query head and sequence between query-aware and vertical-slash blocks (FlexPrefill).

    Follows FlexPrefill (arXiv 2502.20766). The probe, the last ``block_m`` queries of each sequence of the call, gets
    exact attention A over all keys; v_j = mean over probe rows of A at key j ("vertical"), s_d = the same at d tokens
    before the row ("slash"). With p = v summed per KV block, and q = softmax over blocks of
    ``softmax_scale * mean(probe queries) . mean key``, the head is query-aware iff
    ``sqrt(JS(p, q)) < tau`` (natural logarithms, 0 ln 0 = 0; at most sqrt(ln 2) = 0.833).

    Vertical-slash heads: c tokens, in descending order of v, are needed to exceed ``gamma`` of its sum; the
    ``c // block_n + 1`` blocks of the largest v are kept for every query tile. Likewise the groups of ``block_n``
    distances of the largest s: the blocks that a tile reaches at these distances. Both numbers are clamped to
    ``min_budget`` .. ``max_budget`` tokens (rounded up to blocks; None: no limit). The first vertical block and the
    first slash group, the diagonal, are always among them. Gamma thus says how many blocks; as in the original, whether
    those hold gamma of the mass is not asked: a few sharp lines, scattered over blocks, live by ``min_budget``.
    Query-aware heads: per query tile the best blocks until their pooled mass reaches ``gamma`` (as
    :class:`CumulativeMass` with mean pooling), and ``min_budget`` tokens of vertical blocks and of slash groups;
    ``max_budget`` does not bound them.

    gamma: 0 .. 1, a number or one per query head; 1 keeps every visible block unless ``max_budget`` forbids it. tau: a
    number; 0 makes no head query-aware. Budgets are tokens, block sizes too; sink and window count KV blocks.
    Published values: tau 0.1, min_budget 1024, gamma 0.95 (Llama-3.1-8B, GLM-4-9B) or 0.9 (Yi-9B, Qwen2-7B).

    Without causality there are no slashes: heads that are not query-aware keep vertical blocks, sink and window.
    Patterns are found per call: with chunked prefill each chunk has those of its own last queries.

    Differs from the original: query-aware mass is per query tile, not one budget for the head, so no tile goes short;
    a slash group keeps every block diagonal that its distances touch, not the first alone, and groups begin at distance
    0 whatever the length; no NaN where a probability is 0; budgets are rounded to ``block_n``, not to 128;
    softmax_scale and softcap are honoured in the probe; batches, packed and paged keys, chunks and cached prefixes,
    lengths per sequence; nothing waits for the device, and memory is linear in tokens.
    """

    gamma: Threshold = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    sink_blocks: int = 1
    window_blocks: int = 1
    name: ClassVar[str] = "flex-prefill"

    @property
    def needs_summary(self) -> bool:
        """Mean keys, for the query-aware heads."""
        return True

    @property
    def needs_keys(self) -> bool:
        """The keys, for the probe."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("FlexPrefill", "min_budget", self.min_budget)
        if self.max_budget is not None:
            check_count("FlexPrefill", "max_budget", self.max_budget, 1)
            if self.max_budget < self.min_budget:
                raise ValueError(f"FlexPrefill.max_budget = {self.max_budget} is less than min_budget")
        if not isinstance(self.tau, int | float) or isinstance(self.tau, bool):
            raise TypeError(f"FlexPrefill.tau must be a number, got {type(self.tau).__name__}")
        if not (math.isfinite(self.tau) and self.tau >= 0.0):
            raise ValueError(f"FlexPrefill.tau must be 0 or more, got {self.tau}")
        scored = _QueryAware(
            block_m=self.block_m,
            block_n=self.block_n,
            gamma=self.gamma,
            sink_blocks=self.sink_blocks,
            window_blocks=self.window_blocks,
        )
        object.__setattr__(self, "_query_aware", scored)

    def to(self, device: torch.device) -> FlexPrefill:
        """The same policy with ``gamma`` on ``device``."""
        if not isinstance(self.gamma, Tensor) or self.gamma.device == device:
            return self
        return replace(self, gamma=self.gamma.to(device))

    def select(self, selection: Selection) -> BlockMask:
        """Probe, choose, and make the mask; torch operations between three kernels, without a host sync."""
        q, k, layout, summary = selection.q, selection.k, selection.layout, selection.summary
        if k is None or summary is None:
            raise ValueError("FlexPrefill needs the keys and their means: pass k and the result of bsfa.pool_blocks")
        scored: _QueryAware = self._query_aware  # type: ignore[attr-defined]
        thresholds = scored.thresholds_for(q.shape[-2], q.device)
        check_limits("probe_attention", q.device, q.dtype, q.shape[-1], (self.block_m, self.block_n))
        require_kernel("pattern_mask", q.device)
        if q.device.type != "cpu":
            check_tma("probe_attention", q=q, k=k)
        base = scored.select(selection)
        geometry = MaskGeometry.of(layout, self.block_m, self.block_n, q.device)
        if layout.batch == 0 or geometry.num_blocks == 0:
            return base  # no keys: nothing to keep
        vertical, slash = torch.ops.bsfa.probe_attention(
            q,
            k,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.block_table,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            self.block_m,
            layout.causal,
            selection.softmax_scale,
            selection.softcap,
        )
        blocks = _ceil_div(geometry.seqlens_k, self.block_n)  # of each sequence
        vertical_mass = _block_sums(vertical, self.block_n)
        query_aware = self._is_query_aware(selection, vertical_mass, blocks)
        if layout.causal:
            slash_groups = self._best(slash, _block_sums(slash, self.block_n), thresholds, query_aware, blocks)
            slash_blocks = _touched(slash_groups, reach(self.block_m, self.block_n))
        else:
            slash_blocks = torch.zeros_like(vertical_mass, dtype=torch.bool)
        vertical_blocks = self._best(vertical, vertical_mass, thresholds, query_aware, blocks)
        words, counts = torch.ops.bsfa.pattern_mask(
            base.words,
            query_aware.to(torch.int32),
            pack_bits(vertical_blocks),
            pack_bits(slash_blocks),
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            self.block_m,
            self.block_n,
            layout.causal,
            self.sink_blocks,
            self.window_blocks,
        )
        return BlockMask(words, counts, geometry)

    def _is_query_aware(self, selection: Selection, vertical_mass: Tensor, blocks: Tensor) -> Tensor:
        """bool [B, Hq]: whether pooled scores tell the true distribution of the probe, in float64."""
        summary = selection.summary
        assert summary is not None
        batch, count, kv_heads, _ = summary.shape
        queries = probe_mean(selection.q, selection.layout, self.block_m)  # [B, Hq, D]
        grouped = queries.unflatten(1, (kv_heads, -1)).unsqueeze(-1)  # [B, Hkv, group, D, 1]
        means = summary.permute(0, 2, 3, 1).float().unsqueeze(2)  # [B, Hkv, 1, D, blocks]
        # Not a matmul, whose precision and order depend on settings of the process.
        logits = (grouped * means).sum(3).reshape(batch, -1, count) * selection.softmax_scale
        if selection.softcap > 0:
            logits = selection.softcap * torch.tanh(logits / selection.softcap)
        exists = torch.arange(count, device=logits.device) < blocks.view(-1, 1, 1)
        estimated = torch.softmax(logits.double().masked_fill(~exists, -math.inf), -1)
        true = vertical_mass.double()
        true = true / true.sum(-1, keepdim=True)  # NaN where the probe sees nothing: not less than tau
        return js_distance(true, torch.where(exists, estimated, 0.0)) < self.tau

    def _best(self, tokens: Tensor, mass: Tensor, gammas: Tensor, query_aware: Tensor, blocks: Tensor) -> Tensor:
        """bool [B, Hq, blocks]: the blocks of most ``mass``, as many as the ``tokens`` and the budgets say."""
        units = (tokens.sort(-1, descending=True).values * MASS_UNITS).to(torch.int64)
        reached = units.cumsum(-1)
        limit = gammas.double().view(1, -1, 1) * reached[..., -1:]
        needed = ((reached <= limit).sum(-1) + 1) // self.block_n + 1
        at_most = blocks.unsqueeze(-1)
        at_least = at_most.new_full((), -(-self.min_budget // self.block_n))
        chosen = torch.where(query_aware, at_least, torch.maximum(needed, at_least))
        if self.max_budget is not None:
            chosen = chosen.clamp(max=-(-self.max_budget // self.block_n))
        chosen = torch.minimum(chosen, at_most)
        # The first block before all others; ties: the lower block first.
        first = torch.arange(mass.shape[-1], device=mass.device) == 0
        order = torch.sort(mass.masked_fill(first, math.inf), dim=-1, descending=True, stable=True).indices
        return order.argsort(-1) < chosen.unsqueeze(-1)


def _ceil_div(a: Tensor, b: int) -> Tensor:
    return torch.div(a + b - 1, b, rounding_mode="floor")


def _block_sums(tokens: Tensor, block: int) -> Tensor:
    """[..., N] -> [..., ceil(N / block)]."""
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def reach(block_m: int, block_n: int) -> int:
    """Further block diagonals that a group of ``block_n`` distances touches beyond its own, 1 for equal sizes.

    Distances s * block_n .. (s + 1) * block_n - 1 lead from a tile's last block to those s and, unless it is one token
    long, s + 1 before it, and from its first row, some blocks earlier, to earlier ones. Tiles begin at multiples of
    block_m; the most that any can reach.
    """
    step = math.gcd(block_m, block_n)  # where in a block tiles begin: at multiples of it
    starts = (block_n - step, max(block_n - 2 * step, 0))
    return max((r + block_m - 1) // block_n + 1 - (r + 1) // block_n for r in starts)


def _touched(groups: Tensor, further: int) -> Tensor:
    """Block diagonals, counted from a tile's last block, that distances of these groups touch."""
    result = groups
    for shift in range(1, min(further, groups.shape[-1] - 1) + 1):
        result = result | torch.nn.functional.pad(groups[..., :-shift], (shift, 0))
    return result


def probe_mean(q: Tensor, layout: Layout, block_m: int) -> Tensor:
    """Mean of the last ``block_m`` queries of each sequence (or of all, if they are fewer): float32 [B, Hq, D]."""
    if layout.cu_seqlens_q is None:
        return q[:, max(q.shape[1] - block_m, 0) :].float().sum(1) / max(min(q.shape[1], block_m), 1)
    begin, end = layout.cu_seqlens_q[:-1, None].long(), layout.cu_seqlens_q[1:, None].long()
    rows = end - 1 - torch.arange(block_m, device=q.device)
    valid = (rows >= begin)[..., None, None]
    picked = (
        torch.where(valid, q[rows.clamp(min=0)].float(), 0.0)
        if q.shape[0]
        else q.new_zeros((layout.batch, 1, *q.shape[1:]), dtype=torch.float32)
    )
    return picked.sum(1) / valid.sum(1).clamp(min=1)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence along the last dimension, in nats; 0 ln 0 = 0."""
    middle = (p + q) / 2

    def part(a: Tensor) -> Tensor:
        return torch.xlogy(a, a) - torch.xlogy(a, middle)

    return ((part(p) + part(q)).sum(-1) / 2).clamp(min=0).sqrt()

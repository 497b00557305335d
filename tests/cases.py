"""A case: what a call is made of. Its inputs in any token layout, and the yardsticks that results are held against.

The same sequences can lie batched, packed, paged, or paged with packed queries. Whatever a kernel must not read holds
NaN (page tails, pages of no sequence, the gaps between strided rows) or garbage page numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bsfa
import oracle

NAN = float("nan")
GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 10**9)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BATCHED, PACKED, PAGED, PAGED_PACKED = "batched", "packed", "paged", "paged+packed"


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, int], ...] = ((130, 130),)  #: (seqlen_q, seqlen_k) per sequence
    layout: str = BATCHED
    page_size: int = 16
    strides: str = "plain"  #: or "interleaved" [.., 2D], "head-major" [B, H, S, D], "gaps", "wide-gaps" (16 bytes)
    hq: int = 2
    hkv: int = 1
    dim: int = 32
    dim_v: int | None = None
    dtype: torch.dtype = F32
    causal: bool = True
    softcap: float = 0.0
    scale: float | None = None
    window_left: int | None = None
    block_m: int = 64
    block_n: int = 64
    mask: str = "none"  #: or "random", "sparse" (rows may be empty), "all", "diagonal", "empty", "mixed" (of those)
    mask_heads: str = "q"  #: or "kv", "one"
    seed: int = 0

    def __str__(self) -> str:
        """The fields that differ from the defaults: the id of a test."""
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "lengths":
                words.append(",".join(f"{a}x{b}" for a, b in value))
            elif value != f.default:
                words.append(f"{f.name}={str(value).removeprefix('torch.')}")
        return "-".join(words)

    @property
    def softmax_scale(self) -> float:
        return 1.0 / math.sqrt(self.dim) if self.scale is None else self.scale

    def make(self) -> Inputs:
        return Inputs(self)


def table(base: Case, **columns: Iterable[Any]) -> list[Case]:
    """The product of ``columns`` over ``base``."""
    cases = [base]
    for name, values in columns.items():
        cases = [replace(case, **{name: value}) for case in cases for value in values]
    return cases


def square(*lengths: int) -> list[tuple[tuple[int, int], ...]]:
    """Lengths of single prompts without a prefix."""
    return [((n, n),) for n in lengths]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def empty_rows(
    count: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, strides: str
) -> tuple[Tensor, Tensor]:
    """Two [count, tokens, heads, dim] views (K and V if they are one buffer) over NaN, with the strides asked for."""
    if strides == "interleaved":
        both = torch.full((count, tokens, heads, 2 * dim), NAN, dtype=dtype)
        return both[..., :dim], both[..., dim:]
    if strides == "head-major":
        made = [torch.full((count, heads, tokens, dim), NAN, dtype=dtype).transpose(1, 2) for _ in range(2)]
    elif strides == "gaps":
        made = [torch.full((count, tokens + 1, heads + 2, dim + 3), NAN, dtype=dtype) for _ in range(2)]
        made = [t[:, 1:, 1 : heads + 1, 2 : dim + 2] for t in made]
    elif strides == "wide-gaps":
        made = [torch.full((count, tokens + 2, heads + 1, dim + 24), NAN, dtype=dtype) for _ in range(2)]
        made = [t[:, 1:-1, 1:, 16 : dim + 16] for t in made]
    else:
        made = [torch.full((count, tokens, heads, dim), NAN, dtype=dtype) for _ in range(2)]
    return made[0], made[1]


def rows_like(tokens: Tensor, strides: str) -> Tensor:
    """``tokens`` [n, heads, dim] copied to rows with other strides."""
    place = empty_rows(1, len(tokens), *tokens.shape[1:], tokens.dtype, strides)[0][0]
    place.copy_(tokens)
    return place


class Inputs:
    """The tensors of a case. ``q``, ``k``, ``v`` and ``layout`` are what the stage functions take."""

    def __init__(self, case: Case) -> None:
        self.case = case
        g = self.generator = torch.Generator().manual_seed(case.seed)
        dim_v = case.dim if case.dim_v is None else case.dim_v

        def rand(n: int, heads: int, dim: int) -> Tensor:
            return torch.randn(n, heads, dim, generator=g).to(case.dtype)

        self.queries = [rand(n, case.hq, case.dim) for n, _ in case.lengths]
        self.keys = [rand(n, case.hkv, case.dim) for _, n in case.lengths]
        self.values = [rand(n, case.hkv, dim_v) for _, n in case.lengths]
        self.lay_out()

    def lay_out(self) -> None:
        """Lay ``queries``, ``keys`` and ``values`` out anew (after a test has changed them)."""
        case = self.case
        lengths_q, lengths_k = zip(*case.lengths, strict=True)
        packed_q = case.layout in (PACKED, PAGED_PACKED)
        self.cu_q = int32([0, *accumulate(lengths_q)]) if packed_q else None
        self.cu_k = int32([0, *accumulate(lengths_k)]) if case.layout == PACKED else None
        self.max_q, self.max_k = max(lengths_q), max(lengths_k)
        self.block_table = self.seqlens_k = None
        self.q = self._tokens(self.queries, packed_q)
        if case.layout in (PAGED, PAGED_PACKED):
            self._page()
        elif self.case.strides == "interleaved" and case.dim == self.values[0].shape[-1]:
            both = [torch.cat([k, v], dim=-1) for k, v in zip(self.keys, self.values, strict=True)]
            kv = torch.cat(both) if case.layout == PACKED else torch.stack(both)
            self.k, self.v = kv[..., : case.dim], kv[..., case.dim :]
        else:
            self.k = self._tokens(self.keys, case.layout == PACKED)
            self.v = self._tokens(self.values, case.layout == PACKED)

    def _tokens(self, sequences: list[Tensor], packed: bool) -> Tensor:
        if packed:
            return rows_like(torch.cat(sequences), self.case.strides)
        rows = torch.stack(sequences)
        place = empty_rows(*rows.shape, rows.dtype, self.case.strides)[0]
        place.copy_(rows)
        return place

    def _page(self) -> None:
        case, page = self.case, self.case.page_size
        pages = [-(-n // page) for _, n in case.lengths]
        max_pages = max(*pages, 1) + 2
        pool = sum(pages) + 3
        self.k, self.v = empty_rows(pool, page, case.hkv, case.dim, case.dtype, case.strides)
        if self.values[0].shape[-1] != case.dim:
            self.v = empty_rows(pool, page, *self.values[0].shape[1:], case.dtype, "wide-gaps")[0]
        order = torch.randperm(pool, generator=self.generator).tolist()
        garbage = torch.tensor(GARBAGE_PAGES).repeat(len(pages), max_pages)[:, : max_pages + 3].to(torch.int32)
        self.block_table = garbage[:, :max_pages]
        for b, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for i in range(pages[b]):
                self.block_table[b, i] = here = order.pop()
                count = len(keys[i * page : (i + 1) * page])
                self.k[here, :count] = keys[i * page : (i + 1) * page]
                self.v[here, :count] = values[i * page : (i + 1) * page]
        self.seqlens_k = int32([n for _, n in case.lengths])

    def take(self, other: Inputs) -> None:
        """Overwrite these tensors, paged and of packed queries, by those of a case that needs no more room."""
        for name in ("q", "k", "v", "cu_q", "seqlens_k"):
            getattr(self, name).copy_(getattr(other, name))
        self.block_table.fill_(GARBAGE_PAGES[0])
        self.block_table[:, : other.block_table.shape[1]] = other.block_table.to(self.q.device)

    def to(self, device: str | torch.device) -> Inputs:
        """The same tensors on a device, over the same memory: strides, gaps and what they hold are kept."""
        other = copy(self)
        other.__dict__.pop("geometry", None)
        moved: dict[int, Tensor] = {}

        def move(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            storage = t.untyped_storage()
            if storage._cdata not in moved:
                count = storage.nbytes() // t.element_size()
                moved[storage._cdata] = torch.empty(0, dtype=t.dtype).set_(storage, 0, (count,)).to(device, copy=True)
            return moved[storage._cdata].as_strided(t.shape, t.stride(), t.storage_offset())

        for name in ("q", "k", "v", "cu_q", "cu_k", "block_table", "seqlens_k"):
            setattr(other, name, move(getattr(self, name)))
        return other

    # ---- arguments ----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> dict[str, Any]:
        """How attention and block_mass are told where the tokens lie."""
        kwargs: dict[str, Any] = {}
        if self.cu_q is not None:
            kwargs |= {"cu_seqlens_q": self.cu_q, "max_seqlen_q": self.max_q}
        if self.cu_k is not None:
            kwargs |= {"cu_seqlens_k": self.cu_k, "max_seqlen_k": self.max_k}
        if self.block_table is not None:
            kwargs |= {"block_table": self.block_table, "seqlens_k": self.seqlens_k, "max_seqlen_k": self.max_k}
        return kwargs

    @property
    def layout_k(self) -> dict[str, Any]:
        """How pool_blocks is told."""
        return {k: v for k, v in self.layout.items() if k not in ("cu_seqlens_q", "max_seqlen_q")}

    @property
    def layout_select(self) -> dict[str, Any]:
        """How select_blocks is told."""
        kwargs = {k: v for k, v in self.layout.items() if k != "block_table"}
        return kwargs if self.cu_k is not None or self.seqlens_k is not None else {"seqlen_k": self.max_k}

    @property
    def maths(self) -> dict[str, Any]:
        """causal, softcap and softmax_scale, as every bsfa function takes them."""
        return {"causal": self.case.causal, "softcap": self.case.softcap, "softmax_scale": self.case.scale}

    @property
    def oracle_maths(self) -> dict[str, Any]:
        """The same, as the oracle takes them."""
        return {"causal": self.case.causal, "softcap": self.case.softcap, "scale": self.case.softmax_scale}

    @cached_property
    def geometry(self) -> bsfa.MaskGeometry:
        pattern = bsfa.policies.StaticPattern(block_m=self.case.block_m, block_n=self.case.block_n)
        mask = bsfa.select_blocks(self.q, None, pattern, causal=self.case.causal, **self.layout_select)
        return mask.geometry

    def attend(self, mask: bsfa.BlockMask | None, means: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        options = {"window_left": self.case.window_left, **self.maths, **self.layout}
        if means is not None:
            options |= {"k_means": means[0], "v_means": means[1]}
        return bsfa.block_sparse_attention(self.q, self.k, self.v, mask, **options)

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of keys and values, for the mean correction."""
        k, v = (bsfa.pool_blocks(t, block_n=self.case.block_n, **self.layout_k) for t in (self.k, self.v))
        return k, v

    def run(self, policy: bsfa.policies.Policy | None, **options: Any) -> Any:
        """The attention function that this layout has."""
        options = {"policy": policy, "window_left": self.case.window_left, **self.maths, **options}
        if self.case.layout == BATCHED:
            return bsfa.attention(self.q, self.k, self.v, **options)
        if self.case.layout == PACKED:
            lengths = (self.cu_q, self.cu_k, self.max_q, self.max_k)
            return bsfa.attention_varlen(self.q, self.k, self.v, *lengths, **options)
        options |= {k: v for k, v in self.layout.items() if k not in ("block_table", "seqlens_k")}
        return bsfa.attention_paged(self.q, self.k, self.v, self.block_table, self.seqlens_k, **options)

    # ---- sequences ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.case.lengths)

    def arrays(self, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of one sequence in float64."""
        return tuple(t[b].double().numpy() for t in (self.queries, self.keys, self.values))  # type: ignore[return-value]

    def tiles(self, b: int) -> list[oracle.Tile]:
        case = self.case
        return oracle.tiles(*case.lengths[b], case.block_m, case.block_n, case.causal)

    def _queries_of(self, b: int) -> slice:
        first = sum(n for n, _ in self.case.lengths[:b])
        return slice(first, first + self.case.lengths[b][0])

    def of_sequence(self, tokens: Tensor, b: int) -> Tensor:
        """Rows of one sequence from [B, Sq, ...] or [total_q, ...]."""
        return tokens[b] if self.cu_q is None else tokens[self._queries_of(b)]

    def lse_of_sequence(self, lse: Tensor, b: int) -> Tensor:
        return lse[b] if self.cu_q is None else lse[:, self._queries_of(b)]

    def first_row(self, b: int) -> int:
        return sum(len(self.tiles(i)) for i in range(b))

    def rows_of_sequence(self, rows: Tensor, b: int) -> np.ndarray:
        """[tiles, heads, blocks of the longest sequence] of one sequence, from mask rows, scores or mass."""
        first = self.first_row(b)
        return rows[first : first + len(self.tiles(b))].numpy()

    def unused_rows(self, rows: Tensor) -> Tensor:
        """Allocated rows that belong to no tile."""
        return rows[self.first_row(len(self)) :]

    # ---- masks --------------------------------------------------------------------------------------------------

    @property
    def mask_heads(self) -> int:
        return {"q": self.case.hq, "kv": self.case.hkv, "one": 1}[self.case.mask_heads]

    def draw_mask(self, b: int) -> np.ndarray:
        """bool [tiles, mask heads, blocks] of one sequence, of the kind that the case names; visible blocks only."""
        case = self.case
        found = self.tiles(b)
        blocks = oracle.num_blocks(case.lengths[b][1], case.block_n)
        rng = np.random.default_rng((case.seed, b))
        mask = np.zeros((len(found), self.mask_heads, blocks), dtype=bool)
        for t, tile in enumerate(found):
            if case.mask == "diagonal":
                mask[t, :, max(tile.visible - 1, 0) : tile.visible] = True
            elif case.mask == "all":
                mask[t, :, : tile.visible] = True
            elif case.mask == "mixed":
                for h in range(self.mask_heads):
                    mask[t, h, : tile.visible] = rng.random(tile.visible) < rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
            elif case.mask != "empty":
                density = 0.5 if case.mask == "random" else 0.15
                mask[t, :, : tile.visible] = rng.random((self.mask_heads, tile.visible)) < density
        return mask

    def block_mask(self, masks: list[np.ndarray]) -> bsfa.BlockMask:
        """The BlockMask of per-sequence masks."""
        g = self.geometry
        rows = torch.zeros((g.num_rows, self.mask_heads, g.num_blocks), dtype=torch.bool)
        for b, mask in enumerate(masks):
            first = self.first_row(b)
            rows[first : first + len(mask), :, : mask.shape[2]] = torch.from_numpy(mask)
        return bsfa.BlockMask.from_rows(rows.to(self.q.device), g)


# --- yardsticks -------------------------------------------------------------------------------------------------------


def poison(*shapes: tuple[int, ...], dtype: torch.dtype = F32, device: str = "cpu") -> None:
    """Leave NaN in memory that the allocator is likely to give to the next tensors of these sizes."""
    blocks = [torch.full(shape, NAN, dtype=dtype, device=device) for shape in shapes for _ in range(2)]
    del blocks


def same_maths(
    q: Tensor, k: Tensor, v: Tensor, seen: np.ndarray, scale: float, softcap: float, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one sequence with torch operations in the dtype of the inputs: (out, lse in float32 maths).

    ``bias``: one number per key, added to its logits.
    """
    group = q.shape[1] // k.shape[1]
    visible = torch.from_numpy(np.broadcast_to(seen, (q.shape[1], *seen.shape[1:])).copy())
    empty = ~visible.any(-1, keepdim=True)

    def masked_logits(dtype: torch.dtype) -> Tensor:
        keys = k.repeat_interleave(group, dim=1).to(dtype)
        s = torch.matmul(q.to(dtype).transpose(0, 1), keys.permute(1, 2, 0)) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + torch.from_numpy(bias).to(dtype)
        return s.masked_fill(~visible, float("-inf"))

    s = masked_logits(q.dtype)
    p = torch.softmax(s, dim=-1).masked_fill(empty, 0.0)
    out = torch.matmul(p, v.repeat_interleave(group, dim=1).transpose(0, 1)).transpose(0, 1)
    lse = torch.logsumexp(masked_logits(torch.float32), dim=-1)
    return out.double().numpy(), lse.double().numpy()


def assert_within(got: np.ndarray, want: np.ndarray, yardstick: np.ndarray | None, constant: float, what: str) -> None:
    """The error rule: at most twice the error of the yardstick, plus a small constant (scaled by the magnitude)."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    infinite = np.isneginf(want)
    assert np.array_equal(np.isneginf(got), infinite), f"{what}: -inf in other places than expected"
    got, want = np.where(infinite, 0.0, got), np.where(infinite, 0.0, want)
    assert np.isfinite(got).all(), f"{what}: not written, or something was read that must not be"
    allowed = constant * max(1.0, np.abs(want).max())
    if yardstick is not None:
        allowed += 2 * np.abs(np.where(infinite, 0.0, yardstick) - want).max()
    error = np.abs(got - want).max()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


#: Half a unit in the last place, relative: what rounding to the dtype may change.
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11}


def check_attention(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    masks: list[np.ndarray] | None = None,
    lse_constant: float = 2e-6,
    means: tuple[Tensor, Tensor] | None = None,
    tokens: list[np.ndarray] | None = None,
) -> None:
    """Hold ``out`` and ``lse`` against the oracle, sequence by sequence.

    ``means``: those that the masked attention was corrected with. ``tokens``: bool [Sq, Sk] of each sequence, the keys
    that its rows may see.
    In 16 bits also element by element: rounding the result moves it by half a unit in its last place at most, and
    rounding the probabilities by as much of their average of ``|v|``.
    """
    case = inputs.case
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    assert tuple(out.shape) == (*inputs.q.shape[:-1], inputs.v.shape[-1])
    out, lse = out.cpu(), lse.cpu()
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        mask = None if masks is None else masks[b]
        q, k, v = inputs.arrays(b)
        blocks = oracle.num_blocks(seqlen_k, case.block_n)
        k_means, v_means = (None, None) if means is None else (t[b, :blocks].cpu() for t in means)
        both = None
        if k_means is not None and v_means is not None:
            mean_values = v_means.double().numpy()
            both = (k_means.double().numpy(), np.concatenate([mean_values, np.abs(mean_values)], axis=-1))
        want, want_lse = oracle.attention(
            q,
            k,
            np.concatenate([v, np.abs(v)], axis=-1),
            **inputs.oracle_maths,
            window_left=case.window_left,
            mask=mask,
            block_m=case.block_m,
            block_n=case.block_n,
            means=both,
            tokens=None if tokens is None else tokens[b],
        )
        want_out, magnitude = np.split(want, 2, axis=-1)
        seen = oracle.visible_tokens(seqlen_q, seqlen_k, case.causal, case.window_left)[None]
        if mask is not None:
            kept = oracle.kept_tokens(mask, seqlen_q, seqlen_k, case.block_m, case.block_n, case.causal)
            seen = seen & np.repeat(kept, case.hq // kept.shape[0], axis=0)
        if tokens is not None:
            seen = seen & tokens[b][None]
        keys, values, bias = inputs.keys[b], inputs.values[b], None
        if mask is not None and k_means is not None and v_means is not None:
            keys, values = torch.cat([keys, k_means]), torch.cat([values, v_means])
            bias = np.concatenate([np.zeros(seqlen_k), np.log(oracle.block_lengths(seqlen_k, case.block_n))])
            added = oracle.added_means(mask, seqlen_q, seqlen_k, case.block_m, case.block_n, case.causal)
            seen = np.concatenate([seen, np.repeat(added, case.hq // added.shape[0], axis=0)], axis=-1)
        low_out, low_lse = same_maths(inputs.queries[b], keys, values, seen, case.softmax_scale, case.softcap, bias)
        got = inputs.lse_of_sequence(lse, b).double().numpy()
        assert_within(got, want_lse, low_lse, lse_constant, f"lse of sequence {b}")
        got = inputs.of_sequence(out, b).double().numpy()
        assert_within(got, want_out, low_out, 2e-6 if case.dtype == F32 else 1e-3, f"out of sequence {b}")
        assert (got[np.isneginf(want_lse).T] == 0).all(), f"out of sequence {b}: not 0 where nothing is seen"
        if case.dtype != F32:
            unit = ROUNDING[case.dtype]
            excess = np.abs(got - want_out) - unit * np.abs(want_out) - (unit + 1e-4) * magnitude
            assert excess.max(initial=0.0) <= 1e-6, (
                f"out of sequence {b}: {excess.max():.3e} more than rounding explains"
            )


def check_rows(
    inputs: Inputs, rows: Tensor, want: Callable[[int], np.ndarray], fill: float, what: str, constant: float
) -> None:
    """Hold rows [R, Hq, blocks] against ``want(b)`` [tiles, Hq, blocks of b]; everything else must be ``fill``."""
    assert rows.shape == (inputs.geometry.num_rows, inputs.case.hq, inputs.geometry.num_blocks)
    for b in range(len(inputs)):
        expected = want(b)
        got = inputs.rows_of_sequence(rows, b)
        blocks = expected.shape[2]
        assert_within(got[:, :, :blocks].astype(np.float64), expected, None, constant, f"{what} of sequence {b}")
        assert (got[:, :, blocks:] == fill).all(), f"{what}: blocks past the end of sequence {b}"
    assert (inputs.unused_rows(rows) == fill).all(), f"{what}: rows of no tile"

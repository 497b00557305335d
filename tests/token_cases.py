"""Cases of token masks: sets of keys for each query as an indexer gives them, and what they mean, in plain numpy.

Indices are int32 [seqlen_q, topk] of each sequence: positions in the sequence, -1 padded, unsorted, with duplicates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import bsfa
import oracle
from cases import BATCHED, BF16, F16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, square, table

#: How keys are chosen: anywhere, near the query and at the start, all, none, anywhere with rows of none.
KINDS = ("random", "local", "all", "none", "holes")

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 257), (100, 30), (0, 0))
CHUNKS = ((150, 387), (150, 256), (150, 150), (150, 20))  # one query length, so that queries can be batched
EDGES = (1, 31, 32, 33, 127, 128, 129, 255, 257, 300)
PREFIXES = ((1, 1), (1, 300), (5, 133), (63, 129), (100, 237), (128, 256), (130, 1), (300, 129), (70, 0), (0, 70))

BASE = Case(hq=4, hkv=2, dim=64, block_m=128, block_n=128)

#: What masks are built for, and attended with, on any device.
LENGTHS = [
    *table(BASE, lengths=square(*EDGES), causal=[True, False]),
    *table(BASE, lengths=[(pair,) for pair in PREFIXES], causal=[True, False]),
]
LAYOUTS = [
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False]),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[1, 16, 48, 64, 128, 256]),
    replace(BASE, lengths=((141, 300),) * 2, layout=BATCHED),
]


def dims(case: Case) -> list[Case]:
    """The case with the head dims that masks are for: un-absorbed MLA, and the usual ones."""
    return [replace(case, dim=d, dim_v=v) for d, v in ((192, 128), (128, None), (64, None))]


def kind_of(case: Case) -> str:
    """One of the kinds, by the case."""
    return KINDS[sum(map(sum, case.lengths)) % len(KINDS)]


def draw_indices(inputs: Inputs, topk: int, kind: str) -> list[np.ndarray]:
    """Indices of each sequence, int32 [seqlen_q, topk]."""
    found = []
    for b, (seqlen_q, seqlen_k) in enumerate(inputs.case.lengths):
        rng = np.random.default_rng((inputs.case.seed, b, topk))
        indices = np.full((seqlen_q, topk), -1, dtype=np.int32)
        for i, position in enumerate(oracle.positions(seqlen_q, seqlen_k, inputs.case.causal)):
            if seqlen_k == 0 or kind == "none" or (kind == "holes" and i % 3 == 0):
                continue
            if kind == "all":
                drawn = rng.permutation(seqlen_k)[:topk]
            elif kind == "local":
                drawn = np.concatenate([np.arange(4), np.arange(position - 20, position + 1)])[:topk]
                drawn = np.where((drawn >= 0) & (drawn < seqlen_k), drawn, -1)
            else:  # keys that causality hides among them
                drawn = rng.integers(0, seqlen_k, rng.integers(0, topk + 1))
            indices[i, rng.permutation(topk)[: len(drawn)]] = drawn
        found.append(indices)
    return found


def key_sets(inputs: Inputs, indices: list[np.ndarray]) -> list[np.ndarray]:
    """bool [seqlen_q, seqlen_k] of each sequence: the keys that its rows name."""
    found = []
    for (seqlen_q, seqlen_k), rows in zip(inputs.case.lengths, indices, strict=True):
        named = np.zeros((seqlen_q, seqlen_k), dtype=bool)
        valid = (rows >= 0) & (rows < seqlen_k)
        named[np.nonzero(valid)[0], rows[valid]] = True
        found.append(named)
    return found


def visible_sets(inputs: Inputs, indices: list[np.ndarray]) -> list[np.ndarray]:
    """:func:`key_sets` without what causality hides."""
    return [
        named & oracle.visible_tokens(*lengths, inputs.case.causal)
        for named, lengths in zip(key_sets(inputs, indices), inputs.case.lengths, strict=True)
    ]


def rows_of(inputs: Inputs, indices: list[np.ndarray]) -> Tensor:
    """The indices as one tensor with rows where q has them."""
    tensors = [torch.from_numpy(x) for x in indices]
    rows = torch.cat(tensors) if inputs.cu_q is not None else torch.stack(tensors)
    return rows.to(inputs.q.device)


def token_mask(inputs: Inputs, indices: list[np.ndarray], check: bool | None = None) -> bsfa.TokenMask:
    lengths = inputs.layout_select
    return bsfa.TokenMask.from_indices(rows_of(inputs, indices), causal=inputs.case.causal, check=check, **lengths)


def attend(inputs: Inputs, tokens: bsfa.TokenMask, mask: bsfa.BlockMask | None = None) -> tuple[Tensor, ...]:
    """(out, lse) of the stage function."""
    return bsfa.block_sparse_attention(
        inputs.q, inputs.k, inputs.v, mask, tokens=tokens, **inputs.maths, **inputs.layout
    )


def check_mask(inputs: Inputs, mask: bsfa.TokenMask, sets: list[np.ndarray]) -> None:
    """Hold every word, count and block of ``mask`` against the visible sets."""
    case, rows = inputs.case, mask.to_bool().cpu()
    assert mask.words.shape[-1] == -(-max(k for _, k in case.lengths) // 128) * 4
    assert mask.words.is_contiguous() and mask.words.dtype == torch.int32
    assert mask.seqlen_k == max(k for _, k in case.lengths)
    everything = np.unpackbits(mask.words.cpu().numpy().view(np.uint8), axis=-1, bitorder="little")
    want_blocks = []
    for b, named in enumerate(sets):
        seqlen_k = named.shape[1]
        bits = inputs.of_sequence(torch.from_numpy(everything), b).numpy()
        assert np.array_equal(bits[:, :seqlen_k], named), f"bits of sequence {b}"
        assert not bits[:, seqlen_k:].any(), f"bits past the end of sequence {b}"
        assert np.array_equal(inputs.of_sequence(rows, b).numpy()[:, :seqlen_k], named)
        assert np.array_equal(inputs.of_sequence(mask.counts.cpu(), b).numpy(), named.sum(axis=1))
        want_blocks.append(block_sets(inputs, b, named, 128, 128))
    check_blocks(inputs, mask.blocks, want_blocks)
    assert mask.status.tolist() == [0, -1] and int(mask.invalid) == 0
    assert mask.check() is mask


def block_sets(inputs: Inputs, b: int, named: np.ndarray, block_m: int, block_n: int) -> np.ndarray:
    """bool [tiles, blocks]: which hold a key of one of the tile's rows."""
    seqlen_q, seqlen_k = named.shape
    found = oracle.tiles(seqlen_q, seqlen_k, block_m, block_n, inputs.case.causal)
    blocks = np.zeros((len(found), oracle.num_blocks(seqlen_k, block_n)), dtype=bool)
    for t, tile in enumerate(found):
        for j in range(blocks.shape[1]):
            blocks[t, j] = named[tile.rows, j * block_n : (j + 1) * block_n].any()
    return blocks


def check_blocks(inputs: Inputs, mask: bsfa.BlockMask, want: list[np.ndarray]) -> None:
    """Hold a block mask of one head against [tiles, blocks] of each sequence; its other rows are empty."""
    got, first = mask.to_rows().cpu().numpy(), 0
    assert got.shape[1] == 1
    for b, blocks in enumerate(want):
        mine = got[first : first + len(blocks), 0]
        assert np.array_equal(mine[:, : blocks.shape[1]], blocks), f"blocks of sequence {b}"
        assert not mine[:, blocks.shape[1] :].any()
        assert np.array_equal(mask.counts.cpu().numpy()[first : first + len(blocks), 0], blocks.sum(axis=1))
        first += len(blocks)
    assert not got[first:].any() and not mask.counts[first:].any()


ATTENDED = [
    *(c for case in table(BASE, lengths=square(127, 257), dtype=[F32, BF16, F16]) for c in dims(case)),
    *table(replace(BASE, dim=192, dim_v=128), lengths=[(pair,) for pair in PREFIXES], causal=[True, False]),
    *(
        c
        for case in table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], dtype=[F32, BF16])
        for c in dims(case)
    ),
    *table(
        replace(BASE, lengths=CHUNKS, layout=PAGED, dim=192, dim_v=128), page_size=[1, 16, 48, 128], dtype=[F32, F16]
    ),
    *table(replace(BASE, lengths=((150, 300),), dim=192, dim_v=128), softcap=[0.0, 5.0], scale=[None, 1.0, -0.3]),
    *table(replace(BASE, lengths=((90, 200),), dim=128), hq=[1, 6], hkv=[1], dtype=[F32, BF16]),
    replace(BASE, lengths=((200, 4300),), dim=64),  # two words of blocks a row
]

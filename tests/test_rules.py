"""Every policy form against the published rules, on random and on structured inputs (rules.py, oracle_rules.py)."""

from __future__ import annotations

import pytest
import torch

import bsfa
from bsfa.policies import Antidiagonal, CumulativeMass, RelativeMax, ScoredPolicy
from cases import Case
from rules import CPU, FORMS, Form, check_many, run


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_masks_are_the_oracles(form: Form) -> None:
    check_many(form, CPU, random=100, structures=20)


KEYED = [  # rules that look at the keys, and masks that heads share
    RelativeMax(alpha=0.5, shared=True, block_m=64, block_n=64, sink_blocks=1, window_blocks=2, last_tiles=0),
    CumulativeMass(mass=0.5, pooling="flat64", block_m=64, block_n=64),
    CumulativeMass(mass=0.5, pooling="maxabs", shared=True, block_m=64, block_n=64),
    Antidiagonal(mass=0.5, block_m=64, block_n=64, window_blocks=2),
]


@pytest.mark.parametrize("policy", KEYED, ids=lambda p: p.name)
def test_same_bits_again_and_with_other_threads(policy: ScoredPolicy) -> None:
    inputs = Case(lengths=((300, 700), (300, 700)), hq=6, hkv=2).make()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(policy, inputs, "cpu")[:3])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("policy", KEYED, ids=lambda p: p.name)
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_keeps_its_block_and_harms_its_own_tile_and_heads_only(policy: ScoredPolicy, where: str) -> None:
    inputs = Case(lengths=((256, 512),), hq=4, hkv=2).make()
    clean = run(policy, inputs, "cpu")[0]
    per_mask = 4 // clean.shape[1]
    harmed = torch.zeros(4, 4, dtype=torch.bool)
    if where == "query":
        inputs.q[0, 100, 1, 2] = float("nan")
        harmed[1, 1] = True
    else:
        inputs.k[0, 370, 0, 2] = float("nan")  # block 5, KV head 0: tiles from position 320 on
        harmed[1:, :2] = True
    harmed = harmed.unflatten(1, (-1, per_mask)).any(-1)
    rows = run(policy, inputs, "cpu")[0]
    assert torch.equal(rows[~harmed], clean[~harmed])
    for t in range(4):
        assert rows[t, :, [0, t + 3, t + 4]].all() and not rows[t, :, t + 5 :].any()
        if where == "key" and t >= 1:
            assert rows[t, harmed[t], 5].all()  # dropping it would hide the NaN


def test_a_union_keeps_what_any_of_its_heads_keeps() -> None:
    inputs = Case(lengths=((300, 700),), hq=6, hkv=2, block_m=64, block_n=64).make()
    mass = [0.2, 0.9, 0.5, 0.3, 0.4, 0.6]
    options = {"pooling": "flat64", "mass": mass, "block_m": 64, "block_n": 64}
    alone = run(CumulativeMass(**options), inputs, "cpu")[0]
    together = run(CumulativeMass(**options, shared=True), inputs, "cpu")[0]
    assert torch.equal(together, alone.unflatten(1, (2, 3)).any(2))


def test_one_query_head_per_key_head_shares_nothing() -> None:
    inputs = Case(lengths=((300, 700),), hq=2, hkv=2, block_m=64, block_n=64).make()
    for kind, options in ((RelativeMax, {"alpha": 0.8}), (CumulativeMass, {"mass": 0.5, "pooling": "maxabs"})):
        masks = [run(kind(**options, shared=s, block_m=64, block_n=64), inputs, "cpu")[0] for s in (False, True)]
        assert torch.equal(*masks)


@pytest.mark.parametrize("group", [5, 8, 40])
def test_groups_of_more_heads_than_one_work_item_takes(group: int) -> None:
    """Energies of a group are merged over work items; a group of equal heads scores as one head does."""
    one = Case(lengths=((300, 700),), hq=1, hkv=1, block_m=128, block_n=64).make()
    many = Case(lengths=((300, 700),), hq=group, hkv=1, block_m=128, block_n=64).make()
    many.queries = [one.queries[0].repeat_interleave(group, dim=1)]
    many.keys = one.keys
    many.lay_out()
    options = {"alpha": 0.8, "block_m": 128, "block_n": 64}
    want = run(RelativeMax(**options), one, "cpu")
    got = run(RelativeMax(**options, shared=True), many, "cpu")
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seqlen_k", [1, 63, 64, 65, 200])
def test_maxabs_and_center_of_known_keys(seqlen_k: int) -> None:
    k = torch.zeros(1, seqlen_k, 1, 3)
    k[0, :, 0, 0] = torch.arange(seqlen_k) % 64
    k[0, :, 0, 1] = -2.0
    k[0, ::2, 0, 1] = 2.0  # equal magnitudes: the first token of the block
    k[0, 0, 0, 2] = float("nan")
    largest = bsfa.pool_blocks(k, block_n=64, pooling="maxabs")[0, :, 0]
    middle = bsfa.pool_blocks(k, block_n=64, pooling="center")[0, :, 0]
    for j, size in enumerate(min(64, seqlen_k - 64 * j) for j in range(-(-seqlen_k // 64))):
        assert largest[j, :2].tolist() == [size - 1, 2.0]
        assert float(middle[j, 0]) == size // 2
    assert largest[0, 2].isnan() and not largest[1:, 2].isnan().any()


def test_min_blocks_and_ratio_take_the_larger() -> None:
    inputs = Case(lengths=((64, 1280),), hq=2, hkv=1, block_m=64, block_n=64).make()
    bare = {"mass": 0.0, "sink_blocks": 0, "window_blocks": 1, "block_m": 64, "block_n": 64, "pooling": "maxabs"}
    for least, ratio, want in ((3, 0.0, 3), (3, 0.1, 3), (3, 0.35, 7), (0, 0.99, 19), (0, 1.0, 20)):
        rows = run(CumulativeMass(**bare, min_blocks=least, keep_ratio=ratio), inputs, "cpu")[0]
        for head in rows[0]:
            assert int(head[:-1].sum()) in (want - 1, want)  # the diagonal is kept besides, or among them

"""The mask between the two passes of ExactSkip on CUDA, against the oracle and the CPU kernel.

What results in one pass and in two have in common is in test_exact_skip_cuda.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bsfa
from bsfa.policies import ExactSkip
from cases import BATCHED, NAN, PACKED, PAGED
from skip_cases import first_masks, make, masks_of, policy_for
from skip_grid import BASE, RAGGED, TWINS, WITH_FORMS, check, random_case

#: "cpu" runs all but the tests of CUDA itself on the CPU kernel, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda":
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device", allow_module_level=True)
    if "skip_mask" not in bsfa._library.KERNELS["cuda"]:
        pytest.skip("this build has no skip_mask on CUDA", allow_module_level=True)


@pytest.mark.parametrize("seed", range(150))
def test_random_cases(seed: int) -> None:
    """Against the oracle; the same bits again; the CPU kernel's mask; the counts of one pass."""
    case, form, options = random_case(seed, longest=900)
    inputs = make(case)
    masks = masks_of(inputs)
    policy = policy_for(inputs, masks, form, passes=2, **options)
    check(inputs, policy, masks, DEVICE)
    there, moved = inputs.to(DEVICE), policy.to(torch.device(DEVICE))
    (one, skips), (again, _) = (first_masks(there, moved, masks) for _ in range(2))
    on_cpu, cpu_skips = first_masks(inputs, policy, masks)
    assert torch.equal(one.words, again.words) and torch.equal(one.words.cpu(), on_cpu.words)
    assert torch.equal(skips.cpu(), cpu_skips)
    within = None if masks is None else there.block_mask(masks)
    arguments = {"skip": replace(moved, passes=1), "return_skips": True, **there.maths, **there.layout}
    single = bsfa.block_sparse_attention(there.q, there.k, there.v, within, **arguments)[2]
    assert torch.equal(single[:, 0], skips[:, 0]) and bool((single[:, 1] >= skips[:, 1]).all())


def test_a_nan_logit_keeps_its_block() -> None:
    inputs = make(replace(BASE, lengths=((128, 1024),), hkv=4, dim=128))
    inputs.keys[0][300, 1] = NAN  # block 2 of head 1
    inputs.lay_out()
    policy = ExactSkip.absolute(1e4, passes=2).to(torch.device(DEVICE))
    mask, skips = first_masks(inputs.to(DEVICE), policy)
    assert mask.to_rows()[0, 1].nonzero().flatten().tolist() == [0, 2, 7]
    assert (skips[0] - skips[1]).tolist() == [0, 2]


@pytest.mark.parametrize("threshold", [-torch.inf, NAN, -1e30])
@WITH_FORMS
def test_skipping_nothing_keeps_all(threshold: float, form: str) -> None:
    inputs = make(replace(BASE, lengths=TWINS, dim=128)).to(DEVICE)
    cuts = torch.full((4, 1), threshold, device=DEVICE)
    rows = inputs.geometry.num_rows
    sizes = (inputs.max_q, inputs.max_k, rows, None, 128, 128, True, 0.125, 0.0)
    words, counts, skips = torch.ops.bsfa.skip_mask(
        inputs.q, inputs.k, None, None, None, None, *sizes, cuts, form, 1, 1
    )
    visible = inputs.geometry.visible_blocks()
    assert torch.equal(counts, visible[:, None].expand(-1, 4)) and not skips[:, 1].any()
    assert torch.equal(words, ((1 << visible.long()) - 1).int()[:, None, None].expand_as(words))


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_opcheck(layout: str) -> None:
    inputs = make(replace(BASE, lengths=RAGGED if layout == PACKED else TWINS, layout=layout, mask="random"))
    there = inputs.to(DEVICE)
    for name in ("q", "k"):  # opcheck compares inputs with copies of themselves
        getattr(there, name).nan_to_num_()
    words = there.block_mask(masks_of(inputs)).words  # type: ignore[arg-type]
    where = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k, len(words))
    cuts = torch.full((4, 3), 0.5, device=DEVICE)
    for within in (None, words):
        arguments = (there.q, there.k, *where, within, 128, 128, True, 0.125, 0.0, cuts, "relative", 1, 1)
        torch.library.opcheck(torch.ops.bsfa.skip_mask.default, arguments)

"""What the server plug-ins share: the configuration file, one rank's heads, and mixed batches over a paged cache."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa import _library, limits
from bsfa.errors import ThresholdMismatchError
from bsfa.identity import config_fields
from bsfa.integrations import serving as shared
from bsfa.integrations.min_seqlen import DEFAULT_MIN_SEQLEN
from bsfa.integrations.serving import ServingConfig, plan_prefill, prefill_attention, run_prefill, slice_heads
from bsfa.policies import CumulativeMass, Dense, ExactSkip, Fixed, FlexPrefill, Policy, RelativeMax, StaticPattern
from cases import F32, GARBAGE_PAGES, NAN
from test_thresholds import make_table
from tiny_model import make_model

HQ, HKV, D = 4, 2, 16
SMALL: dict[str, Any] = {"block_m": 32, "block_n": 32, "sink_blocks": 1, "window_blocks": 1}
SPARSE = RelativeMax(alpha=0.6, last_tiles=0, **SMALL)

# ---- one batch ------------------------------------------------------------------------------------------------------


def make_views(layout: str, num_pages: int, page_size: int) -> tuple[Tensor, Tensor]:
    """``[pages, page_size, Hkv, D]`` views of keys and values as servers lay them out, full of NaN."""
    if layout == "apart":  # SGLang: a buffer for each
        return tuple(torch.full((num_pages, page_size, HKV, D), NAN) for _ in "kv")  # type: ignore[return-value]
    if layout == "pairs":  # vLLM 0.19: K and V of all pages, one after the other
        both = torch.full((2, num_pages, page_size, HKV, D), NAN)
        return both[0], both[1]
    if layout == "packed":  # newer vLLM: K and V of one token beside each other, tokens before heads
        packed = torch.full((num_pages, page_size, HKV, 2 * D), NAN)
        return packed[..., :D], packed[..., D:]
    assert layout == "packed heads first"
    packed = torch.full((num_pages, HKV, page_size, 2 * D), NAN).transpose(1, 2)
    return packed[..., :D], packed[..., D:]


class Batch:
    """Requests ``(query tokens, KV tokens)`` over one cache; request i may share a whole-page prefix with another."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        layout: str = "apart",
        page_size: int = 16,
        shares: tuple[int, int, int] = (),
    ) -> None:
        rng = torch.Generator().manual_seed(7)
        self.requests = requests
        num_pages = sum(-(-k // page_size) for _, k in requests) + 3
        self.k, self.v = make_views(layout, num_pages, page_size)
        free = torch.randperm(num_pages, generator=rng).tolist()
        width = max(-(-k // page_size) for _, k in requests) + 1
        rows = []
        for i, (_, length) in enumerate(requests):
            pages = rows[shares[1]][: shares[2] // page_size] if shares and shares[0] == i else []
            pages = pages + [free.pop() for _ in range(-(-length // page_size) - len(pages))]
            rows.append((pages + [*GARBAGE_PAGES] * width)[:width])
            for t in range(shares[2] if shares and shares[0] == i else 0, length):
                for cache in (self.k, self.v):
                    cache[pages[t // page_size], t % page_size] = torch.randn(HKV, D, generator=rng)
        self.table = torch.tensor(rows, dtype=torch.int32)
        starts = [0]
        for n, _ in requests:
            starts.append(starts[-1] + n)
        self.starts, self.lengths = starts, [k for _, k in requests]
        self.q = torch.randn(starts[-1] + 5, HQ, D, generator=rng)  # servers pad their batches

    def run(self, policy: Policy | None, min_seqlen: int, **options: Any) -> Tensor:
        out = torch.full((len(self.q), HQ, D), NAN)
        got = prefill_attention(
            self.q,
            self.k,
            self.v,
            self.table,
            torch.tensor(self.starts, dtype=torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32),
            cu_seqlens_q_host=self.starts,
            seqlens_k_host=self.lengths,
            policy=policy,
            min_seqlen=min_seqlen,
            out=out,
            **options,
        )
        assert got is out and bool(out[self.starts[-1] :].isnan().all())
        return out[: self.starts[-1]]

    def alone(self, i: int, policy: Policy | None, **options: Any) -> Tensor:
        """Request i by itself, through the public call."""
        n, length = self.requests[i]
        rows = slice(self.starts[i], self.starts[i] + n)
        where = (self.table[i : i + 1], torch.tensor([length], dtype=torch.int32))
        out = bsfa.attention_paged(self.q[rows].unsqueeze(0), self.k, self.v, *where, policy=policy, **options)
        assert isinstance(out, Tensor)
        return out[0]


# decode steps, prefills, chunks over a prefix, short ones, an empty one, a chunk of one token; groups interleaved
MIXED = [(1, 300), (1, 40), (200, 200), (70, 90), (130, 330), (0, 10), (40, 40), (256, 256), (1, 257)]
LAYOUTS = ("apart", "pairs", "packed", "packed heads first")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize(
    "policy",
    [SPARSE, CumulativeMass(mass=0.5, **SMALL), FlexPrefill(gamma=0.5, min_budget=32, **SMALL), ExactSkip(ratio=0.3)],
    ids=lambda p: p.name,
)
def test_a_mixed_batch_is_each_request_alone(policy: Policy, layout: str, page_size: int) -> None:
    batch = Batch(MIXED, layout, page_size, shares=(4, 2, 128))
    out = batch.run(policy, min_seqlen=100)
    dense = batch.run(None, min_seqlen=100)
    differ = []
    for i, (n, length) in enumerate(MIXED):
        rows = slice(batch.starts[i], batch.starts[i] + n)
        uses_policy = n > 1 and length >= 100
        assert torch.equal(out[rows], batch.alone(i, policy if uses_policy else None)), f"request {i}"
        assert torch.equal(dense[rows], batch.alone(i, None)), f"request {i}"
        if not torch.equal(out[rows], dense[rows]):
            differ.append(i)
    assert differ == [2, 4, 7]  # the policy did something, and only where it may


def test_options_reach_the_kernels() -> None:
    batch = Batch([(64, 96), (32, 32)])
    options = {"softmax_scale": 0.7, "softcap": 3.0, "causal": False}
    out = batch.run(SPARSE, 40, **options)
    assert torch.equal(out[:64], batch.alone(0, SPARSE, **options))
    assert torch.equal(out[64:], batch.alone(1, None, **options))


@pytest.mark.parametrize(
    ("requests", "kinds"),
    [
        ([(1, 500), (1, 20)], (None, "all")),
        ([(128, 128), (90, 400)], ("all", None)),
        ([(1, 500), (30, 30), (128, 128), (90, 400)], (slice(31, 249), slice(0, 31))),
        ([(128, 128), (0, 7), (90, 400), (30, 30)], (slice(0, 218), slice(218, 248))),
        ([(128, 128), (3, 3), (90, 400)], ("gathered", slice(128, 131))),
        ([(3, 3), (90, 400), (4, 4)], (slice(3, 93), "gathered")),
        ([], (None, None)),
        ([(0, 400)], (None, None)),
    ],
)
def test_groups_that_lie_together_are_views(requests: list[tuple[int, int]], kinds: tuple[Any, Any]) -> None:
    starts = [sum(n for n, _ in requests[:i]) for i in range(len(requests) + 1)]
    lengths = [k for _, k in requests]
    table = torch.zeros((len(requests), 32), dtype=torch.int32)
    plan = plan_prefill(
        table, torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), starts, lengths, 100
    )
    for group, kind in zip((plan.sparse, plan.dense), kinds, strict=True):
        if kind is None:
            assert group is None
        elif kind == "all":
            assert group is plan.everything
        elif kind == "gathered":
            assert group is not None and isinstance(group.rows, Tensor)
        else:
            assert group is not None and group.rows == kind


def test_at_most_two_calls_and_none_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Policy | None] = []
    real = shared.attention_paged

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["policy"])
        return real(*args, **kwargs)

    monkeypatch.setattr(shared, "attention_paged", counting)
    Batch(MIXED).run(SPARSE, 100)
    assert calls == [SPARSE, None]
    calls.clear()
    Batch(MIXED).run(Dense(), 100)
    assert calls == [None]
    calls.clear()
    empty = torch.zeros(1, dtype=torch.int32)
    plan = plan_prefill(torch.zeros((0, 4), dtype=torch.int32), empty, empty[:0], [0], [], 100)
    q, cache = torch.zeros(0, HQ, D), torch.zeros(2, 16, HKV, D)
    for policy in (SPARSE, None):
        assert run_prefill(plan, q, cache, cache, policy=policy, out=torch.empty_like(q)).shape == q.shape
    assert calls == []


def test_contradicting_lengths_are_refused() -> None:
    table, three, two = torch.zeros((2, 4), dtype=torch.int32), torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match="a batch of 1 requests needs 2 entries"):
        plan_prefill(table, three, two, [0, 1, 2], [4])
    with pytest.raises(ValueError, match="2 requests has 3 prompt lengths"):
        plan_prefill(table, three, two, [0, 1, 2], [4, 4], prompt_lens=three)
    with pytest.raises(ValueError, match="never decrease"):
        plan_prefill(table, three, two, [0, 3, 2], [4, 4])
    plan = plan_prefill(table, three, two, [0, 3, 5], [4, 4])
    cache = torch.zeros(4, 4, HKV, D)
    with pytest.raises(ValueError, match="q has 4 rows, the batch has 5"):
        run_prefill(plan, torch.zeros(4, HQ, D), cache, cache, policy=None, out=torch.zeros(4, HQ, D))


LAST = RelativeMax(alpha=0.95, last_tiles=1, **SMALL)


@pytest.mark.parametrize("shorts", [False, True])
def test_last_tiles_are_at_the_end_of_the_prompt(shorts: bool) -> None:
    """Of a chunk before the end no tile is a last one, in groups that are views and in those that are gathered."""
    requests, prompts = [(256, 256), (40, 40), (128, 300), (64, 64), (96, 192)], [700, 40, 300, 64, 200]
    if not shorts:
        requests, prompts = requests[::2], prompts[::2]
    batch = Batch(requests)
    lens = torch.tensor(prompts, dtype=torch.int32)
    told, untold = batch.run(LAST, 100, prompt_lens=lens), batch.run(LAST, 100)
    assert torch.equal(batch.run(None, 100, prompt_lens=lens), batch.run(None, 100))
    inside = replace(LAST, last_tiles=0)
    for i, (n, length) in enumerate(requests):
        rows, last = slice(batch.starts[i], batch.starts[i] + n), slice(batch.starts[i], batch.starts[i] + n - 32)
        if length < 100:
            assert torch.equal(told[rows], batch.alone(i, None))
        elif prompts[i] == 300:  # which ends with this chunk
            assert torch.equal(told[rows], untold[rows]) and not torch.equal(told[rows], batch.alone(i, inside))
        elif prompts[i] == 200:  # the next chunk has 8 tokens, and they are all of the last tile
            assert torch.equal(told[rows], batch.alone(i, inside)) and not torch.equal(told[rows], untold[rows])
        else:
            assert torch.equal(told[rows], batch.alone(i, inside)) and torch.equal(told[last], untold[last])
            assert not torch.equal(told[rows], untold[rows])


def test_padding_requests_are_left_out() -> None:
    """Servers pad a batch with requests of no tokens, whose pages and lengths are left over from another."""
    requests = [(64, 128), (40, 40), (128, 128)]
    batch = Batch(requests)
    starts = [*batch.starts, batch.starts[-1], batch.starts[-1]]
    lengths = [*batch.lengths, 10**6, 10**6]
    table = torch.cat([batch.table, torch.full((2, batch.table.shape[1]), -1, dtype=torch.int32)])
    where = (table, torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), starts, lengths)
    for policy in (SPARSE, None):
        out = torch.full((len(batch.q), HQ, D), NAN)
        plan = plan_prefill(*where, 100)
        assert plan.everything.max_seqlen_k == 128
        run_prefill(plan, batch.q, batch.k, batch.v, policy=policy, out=out)
        assert torch.equal(out[: starts[-1]], batch.run(policy, 100))


def test_requests_of_a_few_tokens_may_be_decode_steps() -> None:
    """Those that verify drafts."""
    batch = Batch([(4, 300), (5, 300)])
    where = (batch.table, torch.tensor(batch.starts, dtype=torch.int32), torch.tensor(batch.lengths, dtype=torch.int32))
    plan = plan_prefill(*where, batch.starts, batch.lengths, 100, 4)
    assert plan.dense is not None and plan.dense.rows == slice(0, 4)
    assert plan.sparse is not None and plan.sparse.rows == slice(4, 9)


def test_a_policy_begins_at_the_minimum_length() -> None:
    for length, sparse in ((DEFAULT_MIN_SEQLEN - 1, False), (DEFAULT_MIN_SEQLEN, True)):
        lengths = torch.tensor([length], dtype=torch.int32)
        cu = torch.tensor([0, 2], dtype=torch.int32)
        plan = plan_prefill(torch.zeros((1, 1), dtype=torch.int32), cu, lengths, [0, 2], [length])
        assert (plan.sparse is not None) is sparse and (plan.dense is None) is sparse


# ---- heads of one rank ----------------------------------------------------------------------------------------------


def per_head(policy: Any) -> list[float]:
    value = policy.gamma if isinstance(policy, FlexPrefill) else policy.threshold
    return [round(float(x), 3) for x in value]


@pytest.mark.parametrize(
    ("policy", "size", "want"),
    [
        (RelativeMax(alpha=[0.1, 0.2, 0.3, 0.4]), 2, [[0.1, 0.2], [0.3, 0.4]]),
        (RelativeMax(alpha=torch.tensor([0.1, 0.2, 0.3, 0.4])), 4, [[0.1], [0.2], [0.3], [0.4]]),
        (RelativeMax(alpha=[0.1, 0.2], shared=True), 2, [[0.1], [0.2]]),
        (RelativeMax(alpha=[0.1, 0.2], shared=True), 4, [[0.1], [0.1], [0.2], [0.2]]),  # KV heads are copied
        (FlexPrefill(gamma=[0.1, 0.2]), 2, [[0.1], [0.2]]),
        (ExactSkip(ratio=[0.1, 0.2]), 2, [[0.1], [0.2]]),
    ],
)
def test_a_rank_has_the_values_of_its_heads(policy: Policy, size: int, want: list[list[float]]) -> None:
    assert [per_head(slice_heads(policy, rank, size)) for rank in range(size)] == want
    assert slice_heads(policy, 0, 1) is policy


def test_composed_policies_are_sliced_too() -> None:
    members = (RelativeMax(alpha=[0.1, 0.2]), None, StaticPattern())
    union = slice_heads(bsfa.policies.Union(*members), 1, 2)
    assert isinstance(union, bsfa.policies.Union) and per_head(union.policies[0]) == [0.2]
    reference = torch.tensor([[1.0], [2.0]])
    skip = ExactSkip(ratio=0.5, reference=reference, positions=(0,), within=members[0])
    one = slice_heads(skip, 1, 2)
    assert isinstance(one, ExactSkip) and one.reference is not None and one.reference.tolist() == [[2.0]]
    assert per_head(one.within) == [0.2]
    for_all = slice_heads(ExactSkip.absolute(-3.0), 1, 2)
    assert isinstance(for_all, ExactSkip) and for_all.reference is not None and for_all.reference.shape == (1, 1)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RelativeMax.alpha has values for 4 query heads, which 3 .* cannot divide"):
        slice_heads(RelativeMax(alpha=[0.1] * 4), 0, 3)
    with pytest.raises(ValueError, match="values for 2 KV heads, which 3"):
        slice_heads(RelativeMax(alpha=[0.1] * 2, shared=True), 0, 3)
    with pytest.raises(ValueError, match="values for 2 query heads, which 4"):
        slice_heads(RelativeMax(alpha=[0.1] * 2), 0, 4)
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="tp_rank must be"):
            slice_heads(None, rank, size)
    mask = bsfa.select_blocks(torch.zeros(1, 8, 1, 8), None, StaticPattern(), seqlen_k=8)
    assert isinstance(mask, bsfa.BlockMask)
    with pytest.raises(ValueError, match="Fixed is a mask of one call"):
        slice_heads(Fixed(mask=mask), 0, 2)


def test_sliced_heads_compute_what_the_whole_layer_does() -> None:
    table = make_table(RelativeMax(block_m=32, block_n=32, last_tiles=0))
    config = ServingConfig(thresholds=table, min_seqlen=64)
    batch = Batch([(200, 200)])
    whole = batch.run(config.layer_policy(1), 64)
    for rank in range(2):
        part = Batch([(200, 200)])
        part.q = batch.q[:, 2 * rank : 2 * rank + 2].contiguous()
        part.k, part.v = (t[:, :, rank : rank + 1] for t in (batch.k, batch.v))
        out = part.alone(0, config.layer_policy(1, rank, 2))
        assert torch.equal(out, whole[:, 2 * rank : 2 * rank + 2])


# ---- configuration --------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path = path / "bsfa.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    text = 'min_seqlen = 100\ndense_layers = [0, 3]\n[policy]\nname = "RelativeMax"\nalpha = 0.25\nlast_tiles = 0\n'
    config = ServingConfig.load(write(tmp_path, text))
    assert isinstance(config.policy, RelativeMax) and (config.policy.alpha, config.policy.last_tiles) == (0.25, 0)
    assert config.min_seqlen == 100 and config.thresholds is None and not config.dense
    assert config.layer_policy(0) is None and config.layer_policy(3) is None and config.layer_policy(1) is config.policy
    assert "alpha=0.25" in str(config) and "[0, 3]" in str(config) and "bsfa.toml" in str(config)


def test_nested_and_per_head_values_from_a_file(tmp_path: Path) -> None:
    text = (
        '[policy]\nname = "ExactSkip"\nratio = [0.1, 0.2]\n[policy.within]\nname = "StaticPattern"\nsink_blocks = 3\n'
    )
    policy = ServingConfig.load(write(tmp_path, text)).layer_policy(5, 1, 2)
    assert isinstance(policy, ExactSkip) and isinstance(policy.within, StaticPattern)
    assert per_head(policy) == [0.2] and policy.within.sink_blocks == 3


def test_an_empty_file_is_dense_with_the_default_length(tmp_path: Path) -> None:
    config = ServingConfig.load(write(tmp_path, ""))
    assert config.dense and config.layer_policy(0) is None and config.min_seqlen == DEFAULT_MIN_SEQLEN
    assert ServingConfig.load(write(tmp_path, '[policy]\nname = "Dense"')).dense


def test_thresholds_from_a_file(tmp_path: Path) -> None:
    table = make_table()
    (tmp_path / "sub").mkdir()
    table.save(tmp_path / "sub" / "t.safetensors")
    config = ServingConfig.load(write(tmp_path, 'thresholds = "sub/t.safetensors"\ndense_layers = [0]'))
    policy = config.layer_policy(1, tp_rank=1, tp_size=2)
    assert isinstance(policy, RelativeMax) and torch.equal(torch.as_tensor(policy.alpha), table.thresholds[1, 2:])
    assert config.layer_policy(0) is None
    with pytest.raises(ValueError, match=r"has layers 0 .. 1, not 2"):
        config.layer_policy(2)
    config.check_heads(1, 4, 2)
    with pytest.raises(ValueError, match="has 4 values for this rank, the layer has 8 query heads"):
        config.check_heads(1, 8, 2)


GOOD = '[policy]\nname = "RelativeMax"\n'
BAD = {
    "unknown key": ("alpha = 0.1", "unknown key 'alpha'"),
    "not toml": ("policy = ", "not a TOML file"),
    "both": ('thresholds = "T"\n' + GOOD, r"give \[policy\] or thresholds, not both"),
    "policy is no table": ('policy = "RelativeMax"', r"policy must be a table"),
    "no name": ("[policy]\nalpha = 0.1", r"policy.name must be one of Dense, .*got None"),
    "unknown policy": ('[policy]\nname = "relmax"', r"policy.name must be one of .*'relmax'"),
    "unknown parameter": (GOOD + "beta = 1", r"policy.beta is no parameter of RelativeMax \(it has "),
    "wrong type": (GOOD + 'alpha = "high"', r"policy: RelativeMax.alpha must be a number"),
    "wrong type of a count": (GOOD + "sink_blocks = 1.5", r"policy: RelativeMax.sink_blocks must be an int"),
    "out of range": (GOOD + "alpha = 2.0", r"policy: RelativeMax.alpha must be 0 .. 1"),
    "tensor": ('[policy]\nname = "ExactSkip"\nreference = [[1.0]]', r"policy.reference is no parameter"),
    "nested": ('[policy]\nname = "ExactSkip"\n[policy.within]\nname = "x"', r"policy.within.name must be one of"),
    "min_seqlen is text": ('min_seqlen = "4K"', "min_seqlen must be an int"),
    "min_seqlen is negative": ("min_seqlen = -1", "min_seqlen must be at least 0"),
    "layers are a number": ("dense_layers = 2", "dense_layers must be a list of layer indices"),
    "layers are negative": ("dense_layers = [-1]", "dense_layers must be a list of layer indices"),
    "layers are text": ('dense_layers = ["a"]', "dense_layers must be a list of layer indices"),
    "layers beyond the table": ('thresholds = "T"\ndense_layers = [2]', "dense_layers names layer 2"),
    "thresholds are no text": ("thresholds = 1", "thresholds must be a file name"),
    "no such thresholds": ('thresholds = "gone"', "thresholds: .*gone: No such file"),
    "unsound thresholds": ('thresholds = "bsfa.toml"', "thresholds: .*not a sound safetensors file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_file_and_key(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    make_table().save(tmp_path / "T")
    with pytest.raises(ValueError, match=r"bsfa\.toml: " + message):
        ServingConfig.load(write(tmp_path, text))


def test_the_environment_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "_config", None)
    monkeypatch.setattr(shared, "_logged", set())
    monkeypatch.delenv("BSFA_CONFIG", raising=False)
    with caplog.at_level(logging.WARNING):
        assert shared.serving_config().dense and shared.serving_config() is shared.serving_config()
    assert [r.getMessage() for r in caplog.records] == ["bsfa: BSFA_CONFIG is not set: attention is dense everywhere"]
    monkeypatch.setenv("BSFA_CONFIG", str(write(tmp_path, GOOD)))
    assert isinstance(shared.serving_config().policy, RelativeMax)
    monkeypatch.setenv("BSFA_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(ValueError, match=r"BSFA_CONFIG=.*gone\.toml: No such file"):
        shared.serving_config()


def test_another_model_is_refused() -> None:
    model = make_model()
    config: Any = model.config
    good = ServingConfig(thresholds=make_table(model=model))
    good.check_model(config)
    other = SimpleNamespace(**{**config_fields(config), "vocab_size": 7, "rope_parameters": config.rope_parameters})
    with pytest.raises(ThresholdMismatchError, match=r"vocab_size is .* in the file but 7 in the model"):
        good.check_model(other)
    with pytest.raises(ValueError, match="dense_layers names layer 99"):
        ServingConfig(policy=SPARSE, dense_layers=frozenset({99})).check_model(config)


def test_what_kernels_cannot_run_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for policy in (
        None,
        Dense(),
        SPARSE,
        FlexPrefill(),
        ExactSkip(within=RelativeMax()),
        bsfa.policies.Union(SPARSE, Dense()),
    ):
        assert shared.unsupported_reason(policy, cpu, F32, 80) is None
    asked: list[tuple[Any, ...]] = []

    def refuse(op: str, *args: Any, **options: Any) -> None:
        asked.append((op, *args))
        if op == "select_blocks":
            raise bsfa.UnsupportedError("no kernel")

    monkeypatch.setattr(shared, "check_limits", refuse)
    within = ExactSkip(within=SPARSE, block_m=32, block_n=32)
    assert shared.unsupported_reason(within, cpu, F32, 80, 1000) == "no kernel"
    assert (
        asked[0][0] == "skip_attention" and asked[-1][-1] == 32 and asked[-1][-4:-1] == ("relative_max", None, "none")
    )
    assert shared.unsupported_reason(StaticPattern(), cpu, F32, 80) is None


@pytest.mark.parametrize(
    ("policy", "dims", "why"),
    [
        (None, (192, 128), None),
        (Dense(), (192, 128), None),
        (StaticPattern(), (192, 128), None),
        (CumulativeMass(), (192, 128), None),
        (RelativeMax(), (128, None), None),
        (RelativeMax(), (128, 128), None),
        (RelativeMax(), (192, 128), "'select_blocks' .*head_dim 192"),
        (StaticPattern(), (192, None), "'attention' .*head_dim 192: .*192 .v: 128"),
        (StaticPattern(), (128, 64), "'attention' .*head_dim 128 of q and k and 64 of v"),
        (ExactSkip(ratio=0.1), (192, 128), "'skip_attention' .*192 of q and k and 128 of v"),
        (ExactSkip(ratio=0.1, passes=2), (192, 128), "'skip_mask' .*head_dim 192"),
        (ExactSkip(ratio=0.1, bounds=True), (64, None), None),
        (ExactSkip(ratio=0.1, bounds=True), (128, None), "bounds=True.: .*'bound_mask' .*take 64. .*leave bounds off"),
        (ExactSkip(ratio=0.1, passes=2), (128, 64), "'attention' .*128 of q and k and 64 of v"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Policy) else str(x),
)
def test_the_head_dim_of_values_counts(
    policy: Any, dims: tuple[int, int | None], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel table alone, as the operators: what it says here is asked of a GPU that is not there."""
    row = {"device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16", "head_dim": "64, 128", "blocks": "128x128"}
    rows = [{**row, "op": op} for op in ("skip_attention", "skip_mask")]
    rows.append({**row, "op": "bound_mask", "head_dim": "64"})
    rows.append({**row, "op": "attention", "head_dim": "64, 128, 192/128"})
    rows.append({**row, "op": "pool_blocks", "head_dim": "any", "blocks": "any"})
    rows.append({**row, "op": "select_blocks", "rule": "relative_max"})
    rows.append({**row, "op": "select_blocks", "rule": "pooled", "head_dim": "1..256"})
    monkeypatch.setitem(_library.KERNELS, "cuda", frozenset(row["op"] for row in rows))
    monkeypatch.setattr(limits, "LIMITS", limits.parse(rows))
    monkeypatch.setattr(limits, "_capability_of", {0: 90})
    reason = shared.unsupported_reason(policy, torch.device("cuda", 0), torch.bfloat16, dims[0], 1000, dims[1])
    assert reason is None if why is None else reason is not None and re.search(why, reason), reason


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("serve_*/*.toml")), ids=str)
def test_the_examples_files_are_good(path: Path) -> None:
    assert not ServingConfig.load(path).dense


def test_the_documented_file_is_good(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/integrations.md").read_text()
    config = ServingConfig.load(write(tmp_path, page.split("```toml\n")[1].split("```")[0]))
    assert (config.min_seqlen, config.dense_layers) == (8192, {0, 1})
    for name in shared._KEYS:
        assert f"`{name}`" in page or f"`[{name}]`" in page
    for name in shared._POLICIES:
        assert f"`{name}`" in page

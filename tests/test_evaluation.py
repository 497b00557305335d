"""Prompt files, token positions, and the dense-against-sparse report checked against the model itself."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bsfa
from bsfa import evaluation
from bsfa.calibration import choose, collect
from bsfa.evaluation import evaluate
from bsfa.integrations.transformers import _observers, observe, set_policy
from bsfa.policies import PerLayer, RelativeMax, StaticPattern
from bsfa.prompts import Prompt, length_bucket, length_name, load_prompts, parse_prompt, tokenize
from tiny_model import make_model, make_prompts, make_rows, make_tokenizer, write_rows

POLICY = RelativeMax(block_m=32, block_n=32, sink_blocks=1, window_blocks=1, last_tiles=1)


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return make_model(), make_tokenizer()


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path) -> None:
    rows = make_rows(3)
    plain = write_rows(tmp_path / "a.jsonl", rows)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes() + b"\n\n"))
    assert load_prompts(plain) == load_prompts(zipped) == [parse_prompt(r) for r in rows]
    assert len(load_prompts(zipped, limit=2)) == 2
    only_text = write_rows(tmp_path / "b.jsonl", [{"text": "x", "tokens": 3}])
    assert load_prompts(only_text) == [Prompt("x", "line-1")]


GOOD = b'{"text": "some text"}\n'
BAD: dict[str, tuple[bytes, str]] = {
    "json": (b'{"text": \n', "b.jsonl:2: not JSON"),
    "list": (b"[1]\n", "b.jsonl:2: expected a JSON object"),
    "no text": (b"{}\n", "b.jsonl:2: 'text'"),
    "empty text": (b'{"text": ""}\n', "b.jsonl:2: 'text'"),
    "id": (b'{"text": "a", "id": 3}\n', "b.jsonl:2: 'id'"),
    "task": (b'{"text": "a", "answers": [{"start": 0, "end": 1}]}\n', r"b.jsonl:2: answers\[0\] must be an object"),
    "no end": (b'{"text": "a", "answers": [{"task": "t", "start": 0}]}\n', r"answers\[0\] must be two integers"),
    "range": (b'{"text": "a", "answers": [{"task": "t", "start": 0, "end": 9}]}\n', r"end <= 1 \(length"),
    "prose": (b'{"text": "a", "prose": [[1, 0]]}\n', r"b.jsonl:2: prose\[0\]"),
    "prose type": (b'{"text": "a", "prose": [["0", 1]]}\n', "two integers"),
    "utf-8": (b'{"text": "\xff"}\n', "b.jsonl:2: not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(case: str, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(GOOD + BAD[case][0])
    with pytest.raises(ValueError, match=BAD[case][1]):
        load_prompts(path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no prompts"):
        load_prompts(empty)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(GOOD * 500)[:-12])
    with pytest.raises(ValueError, match="damaged gzip"):
        load_prompts(cut)


def test_positions(lm: tuple[Any, Any]) -> None:
    _, tokenizer = lm
    text = "amber river is cold and the code is castle."
    start, end = text.index("castle"), text.index("castle") + 6
    prompt = parse_prompt({"text": text, "answers": [{"task": "t", "start": start, "end": end}], "prose": [[0, 11]]})
    t = tokenize(prompt, tokenizer)
    ((task, positions),) = t.answers
    assert task == "t" and tokenizer.decode(t.ids[positions]).strip() == "castle"
    assert tokenizer.decode(t.ids[t.prose]) == "amber river" and int(t.ids[0]) == 0 and 0 not in t.prose
    everything = tokenize(
        parse_prompt({"text": text, "answers": [{"task": "t", "start": start, "end": end}]}), tokenizer
    )
    assert sorted([*everything.prose.tolist(), *positions.tolist()]) == list(range(1, len(t)))
    cut = tokenize(prompt, tokenizer, max_length=int(positions[-1]))
    assert len(cut) == int(positions[-1]) and cut.answers == ()
    with pytest.raises(ValueError, match="fast tokenizer"):
        tokenize(prompt, object())


def test_lengths() -> None:
    assert [length_bucket(n) for n in (1, 1000, 5700, 8192, 8300, 11000, 12000)] == [
        1,
        1024,
        4096,
        8192,
        8192,
        8192,
        16384,
    ]
    assert [length_name(n) for n in (512, 1024, 16384)] == ["512", "1K", "16K"]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_report_against_the_model(lm: tuple[Any, Any]) -> None:
    """Loss, answers and density of a policy equal those of plain forward passes; recall that of the masks."""
    model, tokenizer = lm
    prompts = make_prompts(4, words=200)
    policy = POLICY.with_threshold(0.9)
    report = evaluate(model, tokenizer, prompts, {"sparse": policy, "none": None, "static": StaticPattern(**BLOCKS)})
    dense, sparse = report.runs["dense"], report.runs["sparse"]
    nll, count, right = 0.0, 0, {"single": 0, "multi": 0}
    density, recall = torch.zeros(2, 4), torch.zeros(2, 4)

    def look(call: Any) -> None:
        p = torch.softmax(
            (
                torch.einsum("qhd,khd->hqk", call.q[0], call.k[0].repeat_interleave(2, 1)) * call.softmax_scale
            ).masked_fill(torch.ones(call.q.shape[1], call.q.shape[1]).triu(1).bool(), -torch.inf),
            -1,
        )
        mask = bsfa.select_blocks(call.q, bsfa.pool_blocks(call.k, block_n=32), policy, seqlen_k=call.q.shape[1])
        token = torch.arange(call.q.shape[1]) // 32
        kept = mask.to_bool()[0][:, token][:, :, token]  # type: ignore[union-attr]
        recall[call.layer] += (p * kept).sum(-1).mean(-1) / len(prompts)
        density[call.layer] += mask.density(per_head=True) / len(prompts)  # type: ignore[union-attr]

    with torch.no_grad(), observe(model, look):
        for prompt in prompts:
            t = tokenize(prompt, tokenizer)
            logits = model(t.ids[None]).logits[0].double()
            nll += float(-logits.log_softmax(-1)[t.prose - 1, t.ids[t.prose]].sum())
            count += len(t.prose)
            for task, positions in t.answers:
                right[task] += bool((logits[positions - 1].argmax(-1) == t.ids[positions]).all())
    assert dense.prose_tokens == count and dense.prose_loss == pytest.approx(nll / count, rel=1e-5)
    assert set(dense.prose_loss_by_length) == set(report.prompts_by_length)
    assert min(dense.prose_loss_by_length.values()) <= dense.prose_loss <= max(dense.prose_loss_by_length.values())
    assert {t: a.right for t, a in dense.accuracy_by_task.items()} == right
    assert dense.accuracy.asked == 4 == sum(a.asked for a in dense.accuracy_by_length.values())
    torch.testing.assert_close(torch.tensor(sparse.layer_recall), recall, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(sparse.layer_density)[0], density[0], rtol=0, atol=1e-6)
    assert sparse.density < 0.9 and sparse.recall < 1.0
    assert report.runs["none"].prose_loss == dense.prose_loss != sparse.prose_loss
    assert dense.density == dense.recall == report.runs["none"].recall == 1.0
    assert report.runs["static"].density < 1.0
    assert all(run.seconds > 0 for run in report.runs.values())
    assert set(report.prompts_by_length) == set(dense.seconds_by_length)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["runs"]["sparse"]["policy"] == "relative-max"


BLOCKS = {"block_m": 32, "block_n": 32}


def test_tables_and_their_promise(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    curves = collect(model, tokenizer, make_prompts(40, words=60), POLICY)
    table, strict = choose(curves, 0.9), choose(curves, 0.95)
    report = evaluate(model, tokenizer, make_prompts(6, words=60, seed=9), {"0.9": table, "0.95": strict})
    assert 0.9 <= report.runs["0.9"].recall <= report.runs["0.95"].recall <= 1.0
    assert report.runs["0.9"].density <= report.runs["0.95"].density
    assert "0.9" in report.runs["0.9"].policy
    with pytest.raises(bsfa.ThresholdMismatchError, match="weights"):
        evaluate(make_model(seed=3), tokenizer, make_prompts(2), {"t": table})


def test_subsampling_is_even_and_the_same_for_all(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = lm
    monkeypatch.setattr("bsfa.evaluation.PROSE_TOKENS", 10)
    report = evaluate(model, tokenizer, make_prompts(2), {"same": None})
    assert report.runs["dense"].prose_tokens == 20
    assert report.runs["dense"].prose_loss == report.runs["same"].prose_loss


def test_mean_correction(lm: tuple[Any, Any]) -> None:
    """The first layer keeps the same blocks, and its output is another."""
    model, tokenizer = lm
    policy = StaticPattern(**BLOCKS, sink_blocks=0, window_blocks=1)
    entries = {"plain": policy, "corrected": policy}
    runs = evaluate(model, tokenizer, make_prompts(3), entries, corrected=("corrected",)).runs
    assert runs["plain"].layer_density[0] == runs["corrected"].layer_density[0]
    assert runs["plain"].prose_loss != runs["corrected"].prose_loss
    with pytest.raises(TypeError, match="mean_correction"):
        set_policy(model, policy, mean_correction="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 31, 64, 200])
@pytest.mark.parametrize(("causal", "softcap"), [(True, 0.0), (False, 0.0), (True, 2.0)])
def test_mass_without_a_kernel(tokens: int, causal: bool, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What evaluation falls back to on a device without block_mass is the operation's own definition."""
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, heads, 16) * 3 for heads in (4, 2, 2))
    options: dict[str, Any] = {"causal": causal, "softmax_scale": 0.2, "softcap": softcap}
    _, lse = bsfa.block_sparse_attention(q, k, v, None, **options)
    blocks = {"block_m": 32, "block_n": 16}
    monkeypatch.setattr("bsfa.evaluation.PROBABILITIES", 2 * 4 * 32 * tokens)  # two tiles at a time
    wanted = bsfa.block_mass(q, k, lse, **blocks, **options)
    torch.testing.assert_close(evaluation.attention_mass(q, k, lse, **blocks, **options), wanted, rtol=0, atol=0)
    monkeypatch.setattr("bsfa.evaluation.KERNELS", {})
    torch.testing.assert_close(evaluation.attention_mass(q, k, lse, **blocks, **options), wanted, rtol=1e-4, atol=1e-5)


def test_gpus_are_timed_unobserved(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a prompt runs twice with each entry: observed, and then, warm and at its own length, for the clock."""
    model, tokenizer = lm
    prompts, entries = make_prompts(3), {"sparse": POLICY.with_threshold(0.9)}
    plain = evaluate(model, tokenizer, prompts, entries)
    runs: list[tuple[int, bool]] = []
    logits_at = evaluation.logits_at

    def watched(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        runs.append((len(ids), bool(_observers)))
        return logits_at(model, ids, positions)

    waits: list[int] = []
    monkeypatch.setattr("bsfa.evaluation.logits_at", watched)
    monkeypatch.setattr("bsfa.evaluation.synchronize", lambda *devices: waits.append(len(devices)))
    monkeypatch.setattr("bsfa.evaluation.model_devices", lambda _: [torch.device("cuda", i) for i in range(2)])
    monkeypatch.setattr("bsfa.evaluation.prefill", lambda *_: pytest.fail("no warm-up at another length"))
    report = evaluate(model, tokenizer, prompts, entries)
    lengths = [len(tokenize(p, tokenizer)) for p in prompts]
    assert runs == [(n, observed) for n in lengths for _ in range(2) for observed in (True, False)]
    assert set(waits) == {2} and len(waits) == 2 * len(runs)  # all devices, before and after the clock
    for name, run in report.runs.items():
        assert run.prose_loss == plain.runs[name].prose_loss and run.density == plain.runs[name].density
        assert run.speedup == pytest.approx(report.runs["dense"].seconds / run.seconds)


def test_a_kernel_that_does_not_take_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch operations stand in where the device's kernel refuses sizes or dtype."""
    q, k = torch.randn(1, 70, 4, 16), torch.randn(1, 70, 2, 16)
    _, lse = bsfa.attention(q, k, k, return_lse=True)  # type: ignore[misc]
    wanted = evaluation.attention_mass(q, k, lse, block_m=32, block_n=32)

    def refuse(*_: Any, **__: Any) -> None:
        raise bsfa.UnsupportedError("head_dim 16")

    monkeypatch.setattr("bsfa.evaluation.block_mass", refuse)
    got = evaluation.attention_mass(q, k, lse, block_m=32, block_n=32)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_refusals(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    with pytest.raises(ValueError, match="reference run"):
        evaluate(model, tokenizer, make_prompts(1), {"dense": None})
    with pytest.raises(ValueError, match="no prompts"):
        evaluate(model, tokenizer, [], {})
    with pytest.raises(ValueError, match="neither prose nor answers"):
        evaluate(model, tokenizer, [Prompt("amber river", prose=())], {})
    with pytest.raises(TypeError, match="ThresholdTable"):
        evaluate(model, tokenizer, make_prompts(1), {"x": 0.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="do not exist: y"):
        evaluate(model, tokenizer, make_prompts(1), {"x": POLICY}, corrected=("y",))
    report = evaluate(model, tokenizer, [Prompt("amber river castle")], {})
    assert math.isnan(report.runs["dense"].accuracy.share)


def test_policies_per_layer(lm: tuple[Any, Any]) -> None:
    """A list by hand is run and measured like a table; a layer without a policy is dense."""
    model, tokenizer = lm
    prompts = make_prompts(2)
    strict = RelativeMax(alpha=1.0, sink_blocks=0, window_blocks=1, last_tiles=0, block_m=16, block_n=16)
    entries = {"both": PerLayer([None, strict]), "all": PerLayer([strict, strict]), "same": strict}
    runs = evaluate(model, tokenizer, prompts, entries).runs
    assert runs["both"].policy == "per layer: dense, relative-max"
    first, second = runs["both"].layer_density
    assert first == [1.0] * 4 and max(second) < 1.0 and runs["both"].layer_recall[0] == [1.0] * 4
    assert runs["both"].layer_recall[1] == runs["same"].layer_recall[1]
    for name in ("layer_density", "layer_recall", "prose_loss"):
        assert getattr(runs["all"], name) == getattr(runs["same"], name)
    with pytest.raises(ValueError, match="2 layers, but 3"):
        evaluate(model, tokenizer, prompts, {"x": PerLayer([strict] * 3)})

"""The shipped tiny model and its prompts: they load, fit and agree, and the model answers a question."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1] / "examples" / "tiny_lm"
MODEL = ROOT / "model"
TASKS = {"single", "multi_key", "multi_value", "variable", "common_word"}
COUNTS = {
    "calibration": {2048: 64, 4096: 36, 8192: 20, 16384: 8},
    "evaluation": {8192: 10, 16384: 10},
}


def prompts(kind: str) -> list[dict[str, Any]]:
    with gzip.open(ROOT / "prompts" / f"{kind}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_sizes() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 16_000_000
    assert sum(p.stat().st_size for p in (ROOT / "prompts").glob("*.gz")) <= 900_000


def test_architecture() -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL)
    assert config.model_type == "llama" and config.head_dim == 64 and config.num_hidden_layers >= 6
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.max_position_embeddings >= 16384 and config.tie_word_embeddings


@pytest.mark.parametrize("kind", list(COUNTS))
def test_prompts(kind: str, tokenizer: Any) -> None:
    rows = prompts(kind)
    lengths = [int(row["id"].split("-")[1]) for row in rows]
    assert {n: lengths.count(n) for n in set(lengths)} == COUNTS[kind]
    assert len({row["id"] for row in rows}) == len(rows)
    for row, length in zip(rows, lengths, strict=True):
        assert 0.9 * length <= row["tokens"] <= length
        assert {a["task"] for a in row["answers"]} <= TASKS
        assert len(row["answers"]) >= (14 if length >= 8192 else 8)
    for row in rows[:6] + [r for r, n in zip(rows, lengths, strict=True) if n == 16384][:1]:
        encoding = tokenizer(row["text"], return_offsets_mapping=True)
        assert len(encoding["input_ids"]) == row["tokens"]
        starts = {a for a, _ in encoding["offset_mapping"][1:]}
        ends = {b for _, b in encoding["offset_mapping"][1:]}
        for start, end in [(a["start"], a["end"]) for a in row["answers"]] + row["prose"]:
            assert start < end and start in starts and end in ends


def test_sets_are_disjoint() -> None:
    headers = {}
    long_lines = {}
    for kind in COUNTS:
        texts = [row["text"] for row in prompts(kind)]
        lines = {line for text in texts for line in text.split("\n")}
        headers[kind] = {x for x in lines if x.startswith("=== ") and x.endswith(" ===")}
        long_lines[kind] = {x for x in lines if x.startswith("Answer: ")}
    assert headers["calibration"] and headers["evaluation"]
    assert not headers["calibration"] & headers["evaluation"]
    assert not {x for x in long_lines["calibration"] & long_lines["evaluation"] if any(c.isdigit() for c in x)}


def test_answers_a_needle(tokenizer: Any) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    row = next(r for r in prompts("calibration") if r["id"].startswith("calibration-2048-"))
    filler = row["text"][row["prose"][0][0] : row["prose"][0][1]][:1500]
    filler = filler[: filler.rindex("\n") + 1]
    lead = "The locker number of amber heron is"
    text = f"{filler}{lead} 730415.\n{filler}Question: what is the locker number of amber heron?\nAnswer: {lead} 730415"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        predicted = model(ids).logits[0, :-1].argmax(-1)
    assert torch.equal(predicted[-3:], ids[0, -3:])

"""Recomputes what the shipped model can do, with plain transformers and dense sdpa attention.

    python check.py                                    # the evaluation prompts, on the GPU if there is one
    python check.py --cache /tmp/tiny_lm --report model/report.json   # what the report holds; needs the encoded corpus

A question is right when, in one teacher-forced prefill, the argmax prediction equals the text's token at every token of
the answer. Losses are nats per token.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from prompts import QUESTIONS, make_prompt, read_jsonl
from tasks import NEEDLE_TASKS, Stream, encode_groups, encoded_size, make_groups

HERE = Path(__file__).parent
BUCKETS = (0, 512, 1024, 2048, 4096, 8192, 12288, 16384)
START, END = "<!-- report -->", "<!-- end of report -->"


def window_mask(length: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """[1, 1, L, L], true where a query sees a key: the last `window` tokens and the first `sinks`."""
    row = torch.arange(length, device=device)
    distance = row[:, None] - row[None, :]
    return ((distance >= 0) & ((distance < window) | (row[None, :] < sinks)))[None, None]


@torch.inference_mode()
def predictions(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(right, nll) [L] of ids [L]; entry i is about token i, entry 0 says nothing (False, 0)."""
    logits = model(ids[None], attention_mask=mask, use_cache=False).logits[0, :-1].float()
    right = logits.argmax(-1) == ids[1:]
    nll = F.cross_entropy(logits, ids[1:], reduction="none")
    return np.append(False, right.cpu().numpy()), np.append(0.0, nll.cpu().numpy())


def token_span(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The tokens [first, last) whose characters are exactly text[start:end]; offsets [L, 2], BOS at index 0."""
    first = 1 + int(np.searchsorted(offsets[1:, 0], start))
    last = 1 + int(np.searchsorted(offsets[1:, 1], end)) + 1
    if offsets[first, 0] != start or offsets[last - 1, 1] != end:
        raise ValueError(f"characters {start}:{end} are not whole tokens")
    return first, last


class Score:
    """Questions right by task, and loss of the prose by position."""

    def __init__(self) -> None:
        self.prompts = 0
        self.right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.loss: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])

    def prose(self, nll: np.ndarray, position: np.ndarray) -> None:
        which = np.searchsorted(BUCKETS, position, "right") - 1
        for bucket in np.unique(which):
            self.loss[BUCKETS[bucket]][0] += float(nll[which == bucket].sum())
            self.loss[BUCKETS[bucket]][1] += int((which == bucket).sum())

    def table(self) -> dict[str, Any]:
        right = dict(sorted(self.right.items()))
        needles = [sum(right[t][i] for t in right if t in NEEDLE_TASKS) for i in (0, 1)]
        every = [sum(v[i] for v in right.values()) for i in (0, 1)]
        total = [sum(v[i] for v in self.loss.values()) for i in (0, 1)]
        return {
            "prompts": self.prompts,
            "needle_accuracy": round(needles[0] / max(1, needles[1]), 4),
            "accuracy": round(every[0] / max(1, every[1]), 4),
            "tasks": {t: {"right": a, "asked": b} for t, (a, b) in right.items()},
            "prose_loss": round(total[0] / max(1, total[1]), 4),
            "prose_loss_by_position": by_position(self.loss),
        }


def by_position(loss: dict[int, list[float]]) -> dict[str, float]:
    ends = dict(pairwise(BUCKETS))
    return {f"{b}-{ends.get(b, 'end')}": round(loss[b][0] / loss[b][1], 4) for b in sorted(loss)}


def score(
    model: LlamaForCausalLM, tokenizer: Any, rows: list[dict[str, Any]], window: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Scores prompts; with `window` = (window, sinks), every layer sees only those tokens."""
    result = Score()
    for row in rows:
        encoding = tokenizer(row["text"], return_offsets_mapping=True)
        ids = torch.tensor(encoding["input_ids"], device=model.device)
        offsets = np.array(encoding["offset_mapping"])
        mask = window_mask(len(ids), *window, model.device) if window else None
        right, nll = predictions(model, ids, mask)
        for answer in row["answers"]:
            first, last = token_span(offsets, answer["start"], answer["end"])
            tally = result.right[answer["task"]]
            tally[0] += bool(right[first:last].all())
            tally[1] += 1
        spans = [np.arange(*token_span(offsets, start, end)) for start, end in row["prose"]]
        prose = np.concatenate(spans)
        result.prose(nll[prose], prose)
        result.prompts += 1
    return result.table()


def by_length(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    lengths: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        lengths[int(row["id"].split("-")[1])].append(row)
    return dict(sorted(lengths.items()))


def draw(tokenizer: Tokenizer, stream: Stream, length: int, count: int) -> list[dict[str, Any]]:
    """Fresh prompts over the validation files, with the questions of the nearest shipped length."""
    rng, rows = np.random.default_rng((303, length)), []
    for i in range(count):
        groups = make_groups(rng, QUESTIONS[min(length, 16384)])
        encoded = encode_groups(tokenizer, groups)
        extra = encoded_size(encoded)
        start = int(rng.integers(0, len(stream.tokens) - length - 200))
        text, cuts = stream.lines(start, length - 1 - extra)
        rows.append(make_prompt(rng, tokenizer, text, cuts, groups, encoded, f"validation-{length}-{i}"))
    return rows


def held_out_text(model: LlamaForCausalLM, stream: Stream, length: int = 16384) -> dict[str, Any]:
    """Loss by position over windows of the validation files, and of the same 1024 tokens given shorter contexts."""
    contexts: dict[int, list[float]] = defaultdict(list)
    count = (len(stream.tokens) - 1) // length
    tally = Score()
    for i in range(count):
        tokens = np.append(0, stream.tokens[i * length : (i + 1) * length - 1].astype(np.int64))
        ids = torch.from_numpy(tokens).to(model.device)
        _, nll = predictions(model, ids)
        tally.prose(nll[1:], np.arange(1, length))
        contexts[length].append(float(nll[-1024:].mean()))
        for context in (c for c in (2048, 4096, 8192) if c < length):
            part = torch.cat((ids[:1], ids[1 - context :]))
            contexts[context].append(float(predictions(model, part)[1][-1024:].mean()))
    return {
        "windows": count,
        "loss_by_position": by_position(tally.loss),
        "loss_of_last_1024_by_context": {str(c): round(float(np.mean(v)), 4) for c, v in sorted(contexts.items())},
    }


def table(report: dict[str, Any]) -> str:
    """The README's tables."""
    tasks = ("single", "multi_key", "multi_value", "variable", "common_word")
    out = ["| prompts | length | needle tasks | " + " | ".join(tasks) + " | prose loss |", "|---|---|---|" + "---|" * 6]
    for name, part in report["needles"].items():
        for length, row in part.items():
            counts = [row["tasks"].get(t, {"right": 0, "asked": 0}) for t in tasks]
            cells = [f"{c['right']}/{c['asked']}" for c in counts]
            head = f"| {name} ({row['prompts']}) | {length} | {row['needle_accuracy']:.3f} | "
            out.append(head + " | ".join(cells) + f" | {row['prose_loss']:.3f} |")
    text = report.get("held_out_text")
    if text:
        out += ["", f"Text loss by position ({text['windows']} held-out windows of 16384 tokens, nats per token):", ""]
        for key, label in (("loss_by_position", "position"), ("loss_of_last_1024_by_context", "context")):
            rows = text[key]
            out += [f"| {label} | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
            out += ["| loss | " + " | ".join(f"{v:.3f}" for v in rows.values()) + " |", ""]
            if key == "loss_by_position":
                out += ["Loss of the last 1024 tokens of the same windows, given only so much context:", ""]
    return "\n".join(out).rstrip()


def write_readme(path: Path, report: dict[str, Any]) -> None:
    before, rest = path.read_text().split(START)
    path.write_text(before + START + "\n" + table(report) + "\n" + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts")
    parser.add_argument("--sets", nargs="*", default=["evaluation"], help="evaluation, calibration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--limit", type=int, help="prompts a length")
    parser.add_argument("--max-length", type=int, default=1 << 20)
    parser.add_argument("--window", type=int, nargs=2, metavar=("TOKENS", "SINKS"), help="a window instead of dense")
    parser.add_argument("--cache", type=Path, help="the encoded corpus: adds fresh prompts, text loss, the window")
    parser.add_argument("--fresh", type=int, default=40, help="fresh prompts a length")
    parser.add_argument("--report", type=Path, help="writes the numbers here")
    parser.add_argument("--readme", type=Path, help="rewrites the tables of this README from --report, runs nothing")
    args = parser.parse_args()
    if args.readme:
        write_readme(args.readme, json.loads(args.report.read_text()))
        return

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).to(args.device)
    model.eval()
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    report: dict[str, Any] = {
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": (args.model / "model.safetensors").stat().st_size,
        },
        "measured_with": {"torch": torch.__version__, "device": where, "dtype": args.dtype, "attention": "sdpa"},
        "needles": {},
    }

    def add(name: str, lengths: dict[int, list[dict[str, Any]]], window: tuple[int, int] | None = None) -> None:
        part = report["needles"].setdefault(name, {})
        for length, rows in lengths.items():
            if length <= args.max_length:
                part[str(length)] = score(model, tokenizer, rows[: args.limit], window)
                print(name, length, json.dumps(part[str(length)]), flush=True)

    window = tuple(args.window) if args.window else None
    for kind in args.sets:
        add(kind, by_length(read_jsonl(args.prompts / f"{kind}.jsonl.gz")), window)
    if args.cache:
        raw = Tokenizer.from_file(str(args.model / "tokenizer.json"))
        stream = Stream.load(args.cache, "validation", raw)
        lengths = [n for n in (2048, 4096, 8192, 16384, 32768) if n <= args.max_length]
        fresh = {n: draw(raw, stream, n, args.fresh) for n in lengths}
        add("fresh", fresh)
        add("fresh, window 1024 + 64", {n: r[:20] for n, r in fresh.items() if n in (8192, 16384)}, (1024, 64))
        report["held_out_text"] = held_out_text(model, stream, min(16384, args.max_length))
        print(json.dumps(report["held_out_text"]), flush=True)
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Trains the tiny long-context model on one GPU in about ten minutes.

    python train.py --out model --cache /tmp/tiny_lm

The context length follows the time that has passed (see PHASES), so a slower GPU sees fewer tokens, not shorter ones.
Batch i is drawn with seed (seed, i); worker processes put the sequences together ahead of the GPU. A dry run without a
GPU: `--tiny --seconds 20 --byte-limit 400000`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import queue
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from corpus import prepare, save_tokenizer
from net import Net, make_config
from tasks import ANSWER, COPY, LOSS_WEIGHTS, NEEDLE_TASKS, TASKS, TEXT, Stream, training_sequence

# (share of the time at which the phase ends, {context length: part of the steps})
PHASES: list[tuple[float, dict[int, float]]] = [
    (0.25, {2048: 1.0}),
    (0.52, {2048: 0.2, 8192: 0.8}),
    (1.01, {2048: 0.1, 8192: 0.3, 16384: 0.4, 32768: 0.2}),
]
TOKENS_PER_STEP = {2048: 65536, 8192: 65536, 16384: 131072, 32768: 131072}


def worker(cache: str, requests: Any, results: Any, split: str) -> None:
    """Answers (seed, batch, length) with (length, ids, kinds), both [batch, length + 1]."""
    tokenizer = Tokenizer.from_file(str(Path(cache) / "tokenizer.json"))
    stream = Stream.load(Path(cache), split, tokenizer)
    while (request := requests.get()) is not None:
        seed, batch, length = request
        rng = np.random.default_rng(seed)
        rows = [training_sequence(rng, tokenizer, stream, length) for _ in range(batch)]
        results.put((length, np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])))


class Batches:
    """Worker processes that stay `ahead` batches in front of the training loop."""

    def __init__(self, cache: Path, workers: int, seed: int, ahead: int, scale: int):
        context = multiprocessing.get_context("spawn")
        self.requests: Any = context.Queue()
        self.results: Any = context.Queue()
        self.seed, self.count, self.scale = seed, 0, scale
        self.waited = 0.0
        self.random = random.Random(seed)
        arguments = (str(cache), self.requests, self.results, "train")
        self.workers = [context.Process(target=worker, args=arguments, daemon=True) for _ in range(workers)]
        for process in self.workers:
            process.start()
        for _ in range(ahead):
            self.ask(0.0)

    def ask(self, fraction: float) -> None:
        mix = next(m for end, m in PHASES if fraction < end)
        length = self.random.choices(list(mix), list(mix.values()))[0]
        self.requests.put(((self.seed, self.count), max(1, TOKENS_PER_STEP[length] // length // self.scale), length))
        self.count += 1

    def next(self, fraction: float) -> tuple[int, np.ndarray, np.ndarray]:
        self.ask(fraction)
        start = time.perf_counter()
        while True:
            try:
                result: tuple[int, np.ndarray, np.ndarray] = self.results.get(timeout=5)
                break
            except queue.Empty:
                if not any(p.is_alive() for p in self.workers):
                    raise RuntimeError("every data worker has ended") from None
        self.waited += time.perf_counter() - start
        return result

    def close(self) -> None:
        for process in self.workers:
            process.terminate()


def learning_rate(peak: float, step: int, fraction: float) -> float:
    """Warm-up over 150 steps, constant, then linear decay over the last 40 % of the time."""
    return peak * min(1.0, (step + 1) / 150) * min(1.0, max(0.02, (1.0 - fraction) / 0.4))


class Probe:
    """A fixed set of validation sequences a length, graded now and then for the log."""

    def __init__(self, cache: Path, net: Net, lengths: list[int], tokens: int):
        tokenizer = Tokenizer.from_file(str(cache / "tokenizer.json"))
        stream = Stream.load(cache, "validation", tokenizer)
        self.net = net
        self.sets: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for length in lengths:
            rng = np.random.default_rng((7, length))
            batch = max(1, tokens // length)
            rows = [training_sequence(rng, tokenizer, stream, length, task_share=1.0) for _ in range(batch)]
            self.sets[length] = (np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]))

    def __call__(self, lengths: list[int]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for length in lengths:
            ids, kinds = self.sets[length]
            data = torch.from_numpy(ids.astype(np.int64)).to(self.net.device)
            graded = self.net.grade(data[:, :-1].contiguous(), data[:, 1:].contiguous())
            right, nll = (t.view(len(ids), length).cpu().numpy() for t in graded)
            target = kinds[:, 1:]
            answer = target == ANSWER
            first = answer & (np.diff(kinds == ANSWER, axis=1, prepend=False)[:, 1:])
            runs = np.cumsum(first.ravel())[answer.ravel()] - 1
            wrong = np.zeros(int(first.sum()), bool)
            np.logical_or.at(wrong, runs, ~right[answer])
            out[str(length)] = {
                "answers": round(float(1 - wrong.mean()), 4),
                "answer_tokens": round(float(right[answer].mean()), 4),
                "text_loss": round(float(nll[target == TEXT].mean()), 4),
            }
        return out


def optimizer_of(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=torch.cuda.is_available())


def train(args: argparse.Namespace, started: float) -> None:
    """Prepares the corpus, trains for args.seconds (counted from the first step), saves."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    if not (args.cache / "corpus.json").exists():
        prepare(args.cache, args.tokenizer, args.workers, args.byte_limit)
        print(f"corpus ready after {time.time() - started:.1f} s", flush=True)
    corpus = json.loads((args.cache / "corpus.json").read_text())
    print(json.dumps(corpus["splits"]), flush=True)
    tokenizer = Tokenizer.from_file(str(args.cache / "tokenizer.json"))
    args.out.mkdir(parents=True, exist_ok=True)
    config = make_config(args.tiny)
    save_tokenizer(tokenizer, args.out, config.max_position_embeddings)
    (args.out / "corpus.json").write_text((args.cache / "corpus.json").read_text())

    scale = 16 if device.type == "cpu" else 1
    batches = Batches(args.cache, args.workers, args.seed, ahead=4 if scale > 1 else 40, scale=scale)
    model = LlamaForCausalLM.from_pretrained(args.init) if args.init else LlamaForCausalLM(config)
    model = model.to(device, torch.float32)
    net = Net(model, device, compiled=device.type == "cuda")
    lengths = sorted(TOKENS_PER_STEP) if device.type == "cuda" else [2048]
    probe = Probe(args.cache, net, [2048] if scale > 1 else [2048, 8192, 16384], 4096 if scale > 1 else 262144)
    optimizer = optimizer_of(model, args.lr)
    weights = torch.tensor(LOSS_WEIGHTS, device=device)
    for length in lengths if device.type == "cuda" else []:  # compile every shape before the clock starts
        batch = TOKENS_PER_STEP[length] // length
        net.pick_backend(batch, length)
        zeros = torch.zeros(batch, length, dtype=torch.int64, device=device)
        net.loss(zeros, zeros, zeros.float() + 1)[0].backward()
        model.zero_grad(set_to_none=True)
    print(f"first step after {time.time() - started:.1f} s", flush=True)

    log = (args.out / "train_log.jsonl").open("w")

    def note(record: dict[str, Any]) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    facts = {"parameters": sum(p.numel() for p in model.parameters()), "lr": args.lr, "seed": args.seed}
    note({"start": facts, "device": torch.cuda.get_device_name() if scale == 1 else "cpu"})
    begin = time.perf_counter()
    seconds = min(args.seconds, args.deadline - (time.time() - started))
    step, tokens, saved, probed = 0, 0, begin, begin
    seen = {length: 0 for length in TOKENS_PER_STEP}
    while True:
        now = time.perf_counter()
        fraction = (now - begin) / seconds
        if fraction >= 1:
            break
        length, ids, kinds = batches.next(fraction)
        data = torch.from_numpy(ids.view(np.int16)).pin_memory() if scale == 1 else torch.from_numpy(ids.view(np.int16))
        kind = torch.from_numpy(kinds).to(device, non_blocking=True).long()
        data = data.to(device, non_blocking=True).long()
        target = data[:, 1:].contiguous()
        loss, nll = net.loss(data[:, :-1].contiguous(), target, weights[kind[:, 1:]])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, fraction)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + target.numel()
        seen[length] += target.numel()
        if step % args.log_every == 0:
            flat = kind[:, 1:].flatten()
            kinds_of = {"text": TEXT, "answer": ANSWER, "copy": COPY}
            means = {n: round(float(nll[flat == k].mean()), 4) for n, k in kinds_of.items()}
            now = time.perf_counter()
            note(
                {
                    "step": step,
                    "s": round(now - begin, 1),
                    "length": length,
                    **{n: None if math.isnan(v) else v for n, v in means.items()},
                    "norm": round(float(norm), 3),
                    "lr": round(optimizer.param_groups[0]["lr"], 6),
                    "Mtokens": round(tokens / 1e6, 1),
                    "waited": round(batches.waited, 1),
                }
            )
            if not math.isfinite(means["text"]):
                raise RuntimeError("the loss is not finite")
        if now - probed > args.probe_every:
            graded = probe([n for n in probe.sets if n <= 8192 or fraction > 0.5])
            note({"step": step, "s": round(now - begin, 1), "probe": graded})
            probed = time.perf_counter()
        if now - saved > 60:
            net.save(args.out)
            saved = time.perf_counter()
    net.save(args.out)
    final = {"steps": step, "seconds": round(time.perf_counter() - begin, 1), "tokens": seen}
    note({"end": final, "probe": probe(list(probe.sets)), "tasks": list(TASKS), "needles": list(NEEDLE_TASKS)})
    batches.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, the tokenizer and the log")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the encoded corpus; made if absent")
    parser.add_argument("--tokenizer", type=Path, help="an existing tokenizer.json; without it one is trained")
    parser.add_argument("--init", type=Path, help="a model folder to start from")
    parser.add_argument("--seconds", type=float, default=500.0, help="length of the schedule")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds from the start by which training ends")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--probe-every", type=float, default=25.0)
    parser.add_argument("--byte-limit", type=int, help="bytes of each package (for a dry run)")
    parser.add_argument("--tiny", action="store_true", help="a toy model (for a dry run)")
    train(parser.parse_args(), time.time())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""bsfa in transformers: one prompt through generate(), with sdpa, with bsfa dense and with bsfa sparse.

    python examples/hf_generate.py [--tokens N] [--thresholds FILE] [--min-seqlen N] [--device cuda]

The shipped model answers a needle question of one of its evaluation prompts. Prints what each way answers, how
long all of it took, and the share of the blocks that prefill kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import bsfa
import bsfa.integrations.transformers as bsfa_hf
from bsfa.policies import RelativeMax
from bsfa.prompts import load_prompts, tokenize

TINY_LM = Path(__file__).resolve().parent / "tiny_lm"
TASK = "single"


def question(tokenizer: Any, tokens: int) -> tuple[Tensor, str]:
    """The longest beginning of a shipped prompt that ends in a needle question, int64 ids [1, n]; and the answer."""
    prompts = [tokenize(p, tokenizer) for p in load_prompts(TINY_LM / "prompts" / "evaluation.jsonl.gz")]
    asked = [(p.ids, positions) for p in prompts for task, positions in p.answers if task == TASK]
    found = [(ids, answer) for ids, answer in asked if int(answer[0]) <= tokens]
    if not found:
        raise SystemExit(f"no shipped prompt asks within {tokens} tokens")
    ids, answer = max(found, key=lambda pair: int(pair[1][0]))
    return ids[None, : int(answer[0])], tokenizer.decode(ids[answer])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt, at most")
    parser.add_argument("--thresholds", metavar="FILE", help="of bsfa calibrate; default: RelativeMax(alpha=0.1)")
    parser.add_argument(
        "--min-seqlen", type=int, default=bsfa_hf.DEFAULT_MIN_SEQLEN, help="dense below that many tokens"
    )
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=dtype).to(arguments.device).eval()
    ids, answer = question(tokenizer, arguments.tokens)
    ids = ids.to(arguments.device)
    policy = bsfa.ThresholdTable.load(arguments.thresholds) if arguments.thresholds else RelativeMax(alpha=0.1)
    print(f"{ids.shape[1]} tokens; the answer is {answer!r}")
    for name in ("sdpa", "bsfa dense", "bsfa sparse"):
        # set_policy switches the model to "bsfa"; sdpa knows nothing of policies.
        bsfa_hf.set_policy(
            model, policy if name == "bsfa sparse" else None, min_seqlen=arguments.min_seqlen, record=True
        )
        model.set_attn_implementation("sdpa" if name == "sdpa" else "bsfa")
        started = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokenizer(answer).input_ids), do_sample=False
        )
        told = tokenizer.decode(out[0, ids.shape[1] :])  # waits for the device
        seconds = time.perf_counter() - started
        kept = [float(d) for d in bsfa_hf.density(model).values()]
        share = f", {sum(kept) / len(kept):.0%} of the blocks" if kept else ""
        print(f"{name:<12} {told!r} in {seconds:.1f} s{share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

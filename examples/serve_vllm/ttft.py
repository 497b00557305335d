"""Time to first token of one prompt in vLLM, with bsfa or without: needs a GPU and vLLM, with bsfa installed beside it.

python examples/serve_vllm/ttft.py MODEL --tokens 16384 131072 --config examples/serve_vllm/bsfa.toml
python examples/serve_vllm/ttft.py MODEL --tokens 16384 131072 --backend FLASH_ATTN

``--load-format dummy`` takes random weights: it needs the model's config.json alone, and times the same work (except
that a policy finds another density in random attention).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time to first token in vLLM")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536], help="prompt lengths")
    parser.add_argument("--backend", default="CUSTOM", help="CUSTOM (bsfa) or one of vLLM's own, e.g. FLASH_ATTN")
    parser.add_argument("--config", help="the file for BSFA_CONFIG")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill chunk (max_num_batched_tokens)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.config:
        os.environ["BSFA_CONFIG"] = os.path.abspath(options.config)  # before vLLM starts its processes
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=options.model,
        attention_config={"backend": options.backend},
        load_format=options.load_format,
        skip_tokenizer_init=True,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=max(options.tokens) + 16,
        max_num_batched_tokens=options.chunk,
        enable_prefix_caching=False,  # a second run of a prompt would find it in the cache
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    rng = random.Random(1)
    for count in options.tokens:
        prompt = {"prompt_token_ids": [rng.randrange(vocabulary) for _ in range(count)]}
        times = []
        for _ in range(options.runs + 1):  # the first warms up
            start = time.perf_counter()
            llm.generate(prompt, one, use_tqdm=False)
            times.append(time.perf_counter() - start)
        row = {"tokens": count, "backend": options.backend, "seconds": round(statistics.median(times[1:]), 4)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

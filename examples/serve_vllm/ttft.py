"""Time to first token of one prompt in vLLM, with bsfa or without: needs a GPU and vLLM, with bsfa installed beside it.

python examples/serve_vllm/ttft.py MODEL --tokens 16384 131072 --config examples/serve_vllm/bsfa.toml
python examples/serve_vllm/ttft.py MODEL --tokens 16384 131072 --backend FLASH_ATTN

``--load-format dummy`` takes random weights: it needs the model's config.json alone, and times the same work (except
that a policy finds another density in random attention). A start without torch.compile and with few CUDA graphs, of a
fourth of an 8B model's layers, takes seconds:

    --load-format dummy --hf-overrides '{"num_hidden_layers": 8}' --max-num-seqs 4
    --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
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
    parser.add_argument("--max-num-seqs", type=int, help="requests at a time; vLLM's CUDA graphs are for as many")
    parser.add_argument("--hf-overrides", type=json.loads, default={}, help="JSON over the model's config.json")
    parser.add_argument("--compilation-config", type=json.loads, help="vLLM's, as JSON")
    parser.add_argument("--decode", type=int, default=0, help="also time so many tokens after the first")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.config:
        os.environ["BSFA_CONFIG"] = os.path.abspath(options.config)  # before vLLM starts its processes
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    others = {"max_num_seqs": options.max_num_seqs, "compilation_config": options.compilation_config}
    llm = LLM(
        model=options.model,
        attention_config={"backend": options.backend},
        load_format=options.load_format,
        skip_tokenizer_init=True,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=max(options.tokens) + options.decode + 16,
        hf_overrides=options.hf_overrides,
        max_num_batched_tokens=options.chunk,
        enable_prefix_caching=False,  # a second run of a prompt would find it in the cache
        **{name: value for name, value in others.items() if value is not None},
    )
    print(json.dumps({"backend": options.backend, "start_seconds": round(time.perf_counter() - start, 1)}), flush=True)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rng = random.Random(1)

    def seconds(prompt: object, tokens: int) -> float:
        """The median time of ``tokens`` tokens after the prompt; the first run warms up."""
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True)
        times = []
        for _ in range(options.runs + 1):
            start = time.perf_counter()
            llm.generate(prompt, sampling, use_tqdm=False)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    for count in options.tokens:
        prompt = {"prompt_token_ids": [rng.randrange(vocabulary) for _ in range(count)]}
        first = seconds(prompt, 1)
        row = {"tokens": count, "backend": options.backend, "seconds": round(first, 4)}
        if options.decode:
            more = seconds(prompt, 1 + options.decode) - first
            row["decode_ms_per_token"] = round(1000 * more / options.decode, 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

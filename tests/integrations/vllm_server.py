"""vLLM itself on a GPU with bsfa: a server and its answers, and greedy tokens beside those of vLLM's own backend.

    python tests/integrations/vllm_server.py all build/vllm_model    # everything below; 1 if something differs

    python tests/integrations/vllm_server.py model FOLDER --layers 4 --weights
    examples/serve_vllm/serve.sh FOLDER ... --port 8000 > server.log 2>&1 &
    python tests/integrations/vllm_server.py client 8000 server.log
    python tests/integrations/vllm_server.py greedy FOLDER FLASH_ATTN flash_attn.json
    BSFA_CONFIG=FOLDER/every_block.toml python tests/integrations/vllm_server.py greedy FOLDER CUSTOM every_block.json
    python tests/integrations/vllm_server.py compare flash_attn.json every_block.json

Needs a GPU, vLLM, and bsfa installed beside it; no network, the model is made here. What was found and what is not
covered: docs/integrations_vllm.md. Not a pytest module: a CI without a GPU has nothing of it to run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bsfa.files import replacing, write_text

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "examples" / "serve_vllm" / "serve.sh"

# The shape of Llama 3.1 8B, with a vocabulary of words "w3", "w4", ... instead of its own.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 262144,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
SPECIAL = ["<unk>", "<s>", "</s>"]

# bsfa's kernels with nothing left out, from prompts on that are not quite short.
EVERY_BLOCK = """\
min_seqlen = 1024

[policy]
name = "RelativeMax"
alpha = 0.0
last_tiles = 0
"""

# Prefill in chunks, graphs for decode steps; without torch.compile, which only makes the start longer.
MAX_TOKENS, CHUNK, REQUESTS, CACHE_BYTES, GPU_SHARE = 32768, 8192, 8, 12 << 30, 0.25
COMPILATION = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
SERVER_OPTIONS = [
    *("--max-model-len", str(MAX_TOKENS), "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", str(REQUESTS)),
    *("--kv-cache-memory-bytes", str(CACHE_BYTES), "--gpu-memory-utilization", str(GPU_SHARE), "--seed", "0"),
    *("--compilation-config", json.dumps(COMPILATION), "--host", "127.0.0.1"),
]

ANSWER = 12  # tokens of an answer of the server,
LONG_ANSWER = 200  # of the one that decodes while other prompts are prefilled,
GREEDY = 16  # and of the engine without a server

Answers = dict[str, list[int]]


# The model


def write_model(folder: Path, layers: int) -> dict[str, Any]:
    """config.json and a tokenizer: enough for ``--load-format dummy``. And the file for bsfa with every block."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "num_hidden_layers": layers}
    write_text(folder / "config.json", json.dumps(config, indent=1))
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), config["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    write_text(
        folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=1)
    )
    write_text(folder / "every_block.toml", EVERY_BLOCK)
    return config


def write_weights(folder: Path, config: dict[str, Any]) -> None:
    """Random weights under which attention matters: vLLM's dummy ones are so small that tokens hardly depend on it.

    Every projection keeps the scale of its input, and logits of attention get a standard deviation of 3.
    """
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator(device).manual_seed(5)
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=rng, device=device).mul_(std).bfloat16().cpu()

    def projection(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return normal(rows, columns, gain * columns**-0.5)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": normal(vocabulary, hidden, 1.0),
        "lm_head.weight": projection(vocabulary, hidden),
        "model.norm.weight": ones(),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": projection(queries, hidden, 3**0.5),
            "self_attn.k_proj": projection(keys, hidden, 3**0.5),
            "self_attn.v_proj": projection(keys, hidden),
            "self_attn.o_proj": projection(hidden, queries),
            "mlp.gate_proj": projection(inner, hidden),
            "mlp.up_proj": projection(inner, hidden),
            "mlp.down_proj": projection(hidden, inner),
            "input_layernorm": ones(),
            "post_attention_layernorm": ones(),
        }
        tensors.update({f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()})
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    print(f"{folder}: {sum(t.numel() for t in tensors.values()) / 1e6:.0f} million weights")


def model(folder: Path, layers: int, weights: bool) -> None:
    config = write_model(folder, layers)
    if weights:
        write_weights(folder, config)


def prompts() -> Answers:
    """The token ids. ``long_again`` is all of ``long``; ``prefix`` begins with 100 whole blocks of it."""
    rng = random.Random(7)

    def ids(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), CONFIG["vocab_size"]) for _ in range(count)]

    long = ids(20000)
    return {
        "long": long,
        "long_again": long,
        "prefix": long[:12800] + ids(3000),
        "short": ids(200),
        "tiny": ids(7),
        "middle": ids(9000),
        "fresh": ids(18000),
    }


# Without a server


def greedy(folder: Path, backend: str, out: Path) -> None:
    """Greedy tokens and their log probabilities: of each prompt alone, then of all in one batch."""
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(f"{folder} has no weights: model {folder} --layers 4 --weights")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        attention_config={"backend": backend},
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=MAX_TOKENS,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=REQUESTS,
        kv_cache_memory_bytes=CACHE_BYTES,
        gpu_memory_utilization=GPU_SHARE,
        compilation_config=COMPILATION,
    )
    sampling = SamplingParams(max_tokens=GREEDY, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=1)
    texts = prompts()

    def run(names: Sequence[str]) -> dict[str, dict[str, Any]]:
        requests = [{"prompt_token_ids": texts[name]} for name in names]
        found = {}
        for name, answer in zip(names, llm.generate(requests, sampling, use_tqdm=False), strict=True):
            output = answer.outputs[0]
            tokens = list(output.token_ids)
            logprobs = [of_step[token].logprob for token, of_step in zip(tokens, output.logprobs, strict=True)]
            found[name] = {"tokens": tokens, "logprobs": logprobs, "cached": answer.num_cached_tokens}
        return found

    alone = {}
    for name in texts:
        alone.update(run([name]))
    llm.reset_prefix_cache()
    write_text(out, json.dumps({"backend": backend, "alone": alone, "batch": run(list(texts))}))
    for name, row in alone.items():
        print(f"{name}: {row['cached']} tokens from the cache, {row['tokens'][:6]} ...")


def differences(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """For each prompt how many tokens are equal before the first that is not, and how far log probabilities are apart.

    The first unequal token counts for the latter: where two tokens are nearly as likely it shows how nearly.
    """
    rows = []
    for name, a in ours.items():
        b = theirs[name]
        count = len(a["tokens"])
        equal = next((i for i in range(count) if a["tokens"][i] != b["tokens"][i]), count)
        apart = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)][: equal + 1]
        rows.append({"what": what, "prompt": name, "equal_tokens": equal, "of": count, "max_dlogprob": max(apart)})
    return rows


def compare(first: Path, others: Sequence[Path]) -> bool:
    """Prints how the files of ``greedy`` differ; True if each prompt alone has the tokens of the first file.

    A batch is only printed: with other row counts the GEMMs round differently, whatever computes attention.
    """
    reference = json.loads(first.read_text())
    rows = differences(f"{first.stem}, batch / alone", reference["batch"], reference["alone"])
    good = True
    for other in others:
        result = json.loads(other.read_text())
        rows += differences(f"{other.stem}, batch / alone", result["batch"], result["alone"])
        alone = differences(f"{other.stem} / {first.stem}, alone", result["alone"], reference["alone"])
        good &= all(row["equal_tokens"] == row["of"] for row in alone)
        rows += alone
        rows += differences(f"{other.stem} / {first.stem}, batch", result["batch"], reference["batch"])
    for row in rows:
        print(json.dumps(row))
    print("greedy tokens, each prompt alone:", "equal" if good else "DIFFERENT")
    return good


# The server


class Server:
    """vLLM's HTTP API on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.model = ""
        self.prompts = prompts()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.base + path, timeout=5) as answer:
            return answer.read()

    def wait(self, limit: float, alive: Callable[[], bool]) -> None:
        """Until the server is ready to answer."""
        start = time.perf_counter()
        while True:
            try:
                self.get("/health")
                break
            except OSError as error:
                if not alive():
                    raise SystemExit("the server has ended") from None
                if time.perf_counter() - start > limit:
                    raise SystemExit(f"no answer from {self.base}/health in {limit:.0f} s: {error}") from None
                time.sleep(0.5)
        self.model = json.loads(self.get("/v1/models"))["data"][0]["id"]
        print(f"healthy after {time.perf_counter() - start:.1f} s", flush=True)

    def ask(self, name: str, tokens: int = ANSWER) -> list[int]:
        """The greedy tokens after a prompt."""
        body = {
            "model": self.model,
            "prompt": self.prompts[name],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.base}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found = json.load(answer)["choices"][0]["token_ids"]
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{name}: {error.code} {error.read()[:2000]!r}") from None
        if len(found) != tokens:
            raise SystemExit(f"{name}: {len(found)} tokens instead of {tokens}")
        print(f"{name}: {len(found)} tokens in {time.perf_counter() - start:.3f} s, {found[:6]} ...", flush=True)
        return found

    def cache_hits(self) -> float:
        """Tokens of prompts that came from the prefix cache, by the server's metrics."""
        lines = self.get("/metrics").decode().splitlines()
        hits = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
        return sum(float(line.rsplit(maxsplit=1)[1]) for line in hits)


def ask_alone(server: Server) -> tuple[Answers, float, bool]:
    """Each prompt but ``fresh`` with the server to itself; the seconds of ``tiny``, and whether ``long`` gave the same
    twice: computed, then from the cache."""
    server.ask("tiny")  # the first request of a server takes longer
    alone = {"middle": server.ask("middle"), "long": server.ask("long"), "long_again": server.ask("long_again")}
    alone |= {"short": server.ask("short"), "prefix": server.ask("prefix")}
    start = time.perf_counter()
    alone["tiny"] = server.ask("tiny", LONG_ANSWER)
    return alone, time.perf_counter() - start, alone["long"] == alone["long_again"]


def ask_together(server: Server, decode_seconds: float) -> tuple[Answers, bool]:
    """While ``tiny`` decodes, a new prompt (``fresh``) and cached ones come; and whether they came in time.

    Late in its answer: a step in a batch is rounded another way, and in time turns two nearly equal tokens around.
    """
    with ThreadPoolExecutor(REQUESTS) as pool:
        running = {"tiny": pool.submit(server.ask, "tiny", LONG_ANSWER)}
        time.sleep(0.7 * decode_seconds)
        for name in ("fresh", "short", "prefix", "middle", "long", "long_again"):
            running[name] = pool.submit(server.ask, name)
        mixed = not running["tiny"].done()
        return {name: answer.result() for name, answer in running.items()}, mixed


def client(server: Server, log: Path) -> bool:
    """Sends the requests to a server that is ready; prints and returns whether all is as it should be."""
    alone, decode_seconds, repeated = ask_alone(server)
    together, mixed = ask_together(server, decode_seconds)
    alone["fresh"] = server.ask("fresh")  # prefilled in the batch; now from the cache
    checks = {"the same prompt again, from the prefix cache, gives the same": repeated}
    checks["a decode step was under way when the other prompts came"] = mixed
    for name, tokens in alone.items():
        checks[f"{name}: in the mixed batch as alone"] = together[name] == tokens
    hits = server.cache_hits()
    checks[f"the prefix cache was used: {hits:.0f} tokens"] = hits > 0
    serving = [line for line in log.read_text(errors="replace").splitlines() if "bsfa: serving" in line]
    checks[f"the log says what bsfa serves: {serving[0] if serving else 'no line of bsfa'}"] = bool(serving)
    for what, good in checks.items():
        print("ok  " if good else "FAIL", what, flush=True)
    return all(checks.values())


def stop(server: subprocess.Popen[bytes]) -> None:
    """The server and the processes that it started, which are one session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        for _ in range(40):
            if server.poll() is not None:
                break
            time.sleep(0.5)
    server.wait()


def serve_and_ask(folder: Path, port: int, limit: float) -> bool:
    log = folder / "server.log"
    environment = {name: value for name, value in os.environ.items() if name != "BSFA_CONFIG"}  # serve.sh has its own
    command = [str(SERVE), str(folder), *SERVER_OPTIONS, "--port", str(port)]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        server = Server(port)
        server.wait(limit, lambda: process.poll() is None)
        return client(server, log)
    finally:
        stop(process)
        print(f"the server's log: {log}", flush=True)


def everything(folder: Path, layers: int, port: int, limit: float) -> bool:
    model(folder, layers, weights=True)
    good = serve_and_ask(folder, port, limit)
    results = []
    runs = {"flash_attn": "FLASH_ATTN", "every_block": "CUSTOM", "unconfigured": "CUSTOM"}
    for name, backend in runs.items():
        environment = {key: value for key, value in os.environ.items() if key != "BSFA_CONFIG"}
        if name == "every_block":
            environment["BSFA_CONFIG"] = str((folder / "every_block.toml").resolve())
        out = folder / f"{name}.json"
        print(f"greedy tokens by {backend} ({name})", flush=True)
        subprocess.run([sys.executable, __file__, "greedy", folder, backend, out], env=environment, check=True)
        results.append(out)
    return compare(results[0], results[1:]) and good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="vLLM on a GPU with bsfa")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    one = command("model", "a model of Llama 3.1 8B's shape: config.json, a tokenizer, and every_block.toml")
    one.add_argument("folder", type=Path)
    one.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    one.add_argument("--weights", action="store_true", help="and random weights")
    one = command("greedy", "greedy tokens of one backend, without a server")
    one.add_argument("folder", type=Path)
    one.add_argument("backend", help="CUSTOM (bsfa, by BSFA_CONFIG) or one of vLLM's own, e.g. FLASH_ATTN")
    one.add_argument("out", type=Path, help="a JSON file")
    one = command("compare", "files of greedy; 1 if a prompt alone has other tokens than in the first")
    one.add_argument("first", type=Path)
    one.add_argument("others", type=Path, nargs="+")
    one = command("client", "asks a server; 1 if an answer depends on its batch or bsfa does not serve")
    one.add_argument("port", type=int)
    one.add_argument("log", type=Path, help="where the server's output goes")
    one.add_argument("--wait", type=float, default=300.0, help="seconds for the server to start")
    one = command("all", "all of these, with a server by examples/serve_vllm/serve.sh")
    one.add_argument("folder", type=Path, help="for the model, the server's log and the results")
    one.add_argument("--layers", type=int, default=4)
    one.add_argument("--port", type=int, default=8017)
    one.add_argument("--wait", type=float, default=300.0, help="seconds for the server to start")
    return parser.parse_args()


def main() -> None:
    options = parse()
    good = True
    if options.command == "model":
        model(options.folder, options.layers, options.weights)
    elif options.command == "greedy":
        greedy(options.folder, options.backend, options.out)
    elif options.command == "compare":
        good = compare(options.first, options.others)
    elif options.command == "client":
        server = Server(options.port)
        server.wait(options.wait, lambda: True)
        good = client(server, options.log)
    else:
        good = everything(options.folder, options.layers, options.port, options.wait)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

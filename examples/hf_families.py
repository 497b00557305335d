#!/usr/bin/env python3
"""Every decoder family of transformers that a small random config can make, with attn_implementation="bsfa".

    python examples/hf_families.py [--only NAME ...]

For each family: the error of bsfa's dense logits beside that of eager ones, how many of its attention layers a policy
acts on, and why it does not act on the others. Random weights, no download, a minute on a CPU. Writes
benchmarks/results/hf_families.csv and the table in docs/integrations_transformers.md; with --only, prints and writes
nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import bsfa
import bsfa.integrations.transformers as bsfa_hf
from bsfa.files import write_text
from bsfa.policies import RelativeMax, StaticPattern

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "benchmarks" / "results" / "hf_families.csv"
PAGE = ROOT / "docs" / "integrations_transformers.md"
BEGIN, END = "<!-- families: written by examples/hf_families.py -->", "<!-- /families -->"

VOCAB, BATCH, LENGTH, WINDOW, BLOCK = 97, 2, 70, 21, 16
SPARSE = StaticPattern(sink_blocks=1, window_blocks=2, block_m=BLOCK, block_n=BLOCK)
KEEP_ALL = RelativeMax(alpha=0.0, block_m=BLOCK, block_n=BLOCK)

#: Small values of whatever a config has of these.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,  # all of them: which ones are chosen would hang on the last bit
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "word_embed_proj_dim": 64,
}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": None}

#: name: (model type of transformers, what its config has beside SMALL).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1, 3]}),
    "beam": ("beam", {}),
    "bigbird-pegasus": ("bigbird_pegasus", {"decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}),
    "biogpt": ("biogpt", {}),
    "bitnet": ("bitnet", {}),
    "bloom": ("bloom", {}),
    "codegen": ("codegen", {"rotary_dim": 8}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {}),
    "cohere2-moe": ("cohere2_moe", {}),
    "ctrl": ("ctrl", {"dff": 96}),
    "cwm": ("cwm", {"bos_token_id": 1, "eos_token_id": 2}),
    "deepseek-v2": ("deepseek_v2", MLA),
    "deepseek-v3": ("deepseek_v3", MLA),
    "deepseek-v3.2": ("deepseek_v32", {**MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16}),
    "deepseek-v4": ("deepseek_v4", {}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "dots1": ("dots1", {"n_shared_experts": 1}),
    "ernie4.5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {}),
    "exaone-moe": ("exaone_moe", {}),
    "falcon": ("falcon", {"bias": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon-h1": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16}),
    "flint": ("flint", {}),
    "flex-olmo": ("flex_olmo", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", CAPS),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3n": (
        "gemma3n_text",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [96] * 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
        },
    ),
    "gemma4, heads of 512": ("gemma4_text", {"vocab_size_per_layer_input": VOCAB, "global_head_dim": 512}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-moe": ("glm4_moe", {}),
    "glm4-moe-lite": ("glm4_moe_lite", MLA),
    "glm-moe-dsa": ("glm_moe_dsa", {**MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16}),
    "gpt-bigcode": ("gpt_bigcode", {}),
    "gpt-neo": ("gpt_neo", {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-oss": ("gpt_oss", {}),
    "gpt2": ("gpt2", {}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "granite": ("granite", {}),
    "granite-hybrid": ("granitemoehybrid", {**MAMBA, "layer_types": ["mamba", "attention"] * 2}),
    "granite-moe": ("granitemoe", {}),
    "granite-moe-swa": ("granitemoe_swa", {}),
    "granite-swa": ("granite_swa", {}),
    "helium": ("helium", {}),
    "hunyuan-dense": ("hunyuan_v1_dense", {}),
    "hunyuan-moe": ("hunyuan_v1_moe", {}),
    "hy-v3": ("hy_v3", {}),
    "hy-v4": ("hy_v4", {}),
    "hyperclovax": ("hyperclovax", {}),
    "inkling": ("inkling_text", {}),
    "inkling2": ("inkling2_text", {}),
    "internlm3": ("internlm3", {}),
    "jais2": ("jais2", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "jetmoe": ("jetmoe", {"kv_channels": 16, "num_key_value_heads": 2}),
    "kimi-linear": ("kimi_linear", {**MLA, "num_attention_heads": 4}),
    "kolibri1": ("kolibri1", {}),
    "laguna": ("laguna", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm3": ("lfm3", {}),
    "llama": ("llama", {}),
    "llama4": ("llama4_text", {"intermediate_size_mlp": 96, "attention_chunk_size": 128}),
    "llama4, beyond a chunk": ("llama4_text", {"intermediate_size_mlp": 96, "attention_chunk_size": 32}),
    "longcat-flash": (
        "longcat_flash",
        {
            **MLA,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "zero_expert_num": 2,
            "num_layers": 2,
        },
    ),
    "mamba": ("mamba", {}),
    "mellum": ("mellum", {}),
    "mimo-v2-flash": ("mimo_v2_flash", {}),
    "minicpm3": ("minicpm3", MLA),
    "minimax-m2": ("minimax_m2", {}),
    "minimax-m3": ("minimax_m3_vl_text", {}),
    "ministral": ("ministral", {}),
    "ministral3": ("ministral3", {"sliding_window": None}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding window": ("mistral", {}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "mpt": ("mpt", {}),
    "nemotron": ("nemotron", {}),
    "nemotron-h": ("nemotron_h", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "olmoe": ("olmoe", {}),
    "olmo-hybrid": ("olmo_hybrid", {}),
    "opt": ("opt", {}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, sliding window": ("phi3", {}),
    "phimoe": ("phimoe", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3.5": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "recurrent-gemma": ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 128}),
    "seed-oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "solar-open": ("solar_open", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "vaultgemma": ("vaultgemma", CAPS),
    "youtu": ("youtu", MLA),
    "xglm": ("xglm", {"num_layers": 4, "attention_heads": 4}),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the family, weights drawn from a seed, eager attention."""
    kind, own = FAMILIES[name]
    config_class = transformers.CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    config = config_class(**{**{key: value for key, value in SMALL.items() if key in known}, **own})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():  # some leave these at zero, where they would do nothing
            if key.endswith("sinks"):
                p.normal_()
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the other has no kernel for it
    return model.to(dtype)


def prompt() -> Tensor:
    """Random ids [BATCH, LENGTH]."""
    return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def logits(model: Any, implementation: str, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits in float64, without a cache."""
    model.set_attn_implementation(implementation)
    out: Tensor = model(ids, use_cache=False, **inputs).logits
    return out.double()


def difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found - wanted).norm() / wanted.norm())


@dataclasses.dataclass(frozen=True)
class Found:
    """One row of the table.

    The errors are |logits - reference| / |reference|, the reference being eager attention in float64: of bsfa's dense
    logits in float32 and in bfloat16, and of eager ones. attention_layers: attention calls of a forward pass;
    sparse_layers: those that the policy acted on. reason: why the others are dense, or what was refused. Numbers are
    None where nothing ran.
    """

    family: str
    model: str
    f32_error: float | None = None
    f32_eager_error: float | None = None
    bf16_error: float | None = None
    bf16_eager_error: float | None = None
    attention_layers: int | None = None
    sparse_layers: int | None = None
    reason: str = ""


@torch.no_grad()
def examine(name: str) -> Found:
    """Run one family. What bsfa refuses is part of the result, other errors are not caught."""
    model, ids = make(name), prompt()
    kind = type(model).__name__
    try:
        bsfa_hf.set_policy(model, None)
        dense = logits(model, "bsfa", ids)
    except bsfa.UnsupportedError as error:
        return Found(name, kind, reason=str(error).split(":")[0])
    wanted, errors = logits(make(name, torch.float64), "eager", ids), []
    for dtype in (torch.float32, torch.bfloat16):
        rounded = make(name, dtype)
        errors += [difference(logits(rounded, i, ids), wanted) for i in ("bsfa", "eager")]

    calls: list[bsfa_hf.AttentionCall] = []
    bsfa_hf.set_policy(model, SPARSE, min_seqlen=0, record=True)
    with warnings.catch_warnings(), bsfa_hf.observe(model, calls.append):
        warnings.simplefilter("ignore", bsfa.DenseFallbackWarning)
        sparse = logits(model, "bsfa", ids)
    acted = [call for call in calls if call.info.mask is not None and float(call.info.density()) < 1.0]
    reasons = Counter(call.info.dense_reason for call in calls if call.info.dense_reason is not None)
    if len(acted) + sum(reasons.values()) != len(calls) or not bool(sparse.isfinite().all()):
        raise AssertionError(f"{name}: a call was dense without a reason, or its logits are not finite")
    if bool(acted) == torch.equal(sparse, dense):
        raise AssertionError(f"{name}: the policy acted on {len(acted)} layers, its logits say otherwise")
    return Found(
        name,
        kind,
        *errors,
        len(calls),
        len(acted),
        "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items())),
    )


# ---- the table ------------------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def as_csv(rows: list[Found]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in dataclasses.fields(Found)])
    for row in rows:
        values = dataclasses.astuple(row)
        writer.writerow([number(v) if isinstance(v, float) else "" if v is None else v for v in values])
    return text.getvalue()


def as_markdown(rows: list[Found]) -> str:
    """The rows that ran, then those that were refused."""
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, on a CPU; {len(rows)} configurations.",
        "",
        "| family | float32: bsfa, eager | bfloat16: bsfa, eager | policy acts on | the other layers |",
        "|---|---|---|---|---|",
    ]
    refused = [row for row in rows if row.bf16_error is None]
    for row in rows:
        if row.bf16_error is not None:
            high = f"{number(row.f32_error)}, {number(row.f32_eager_error)}"
            low = f"{number(row.bf16_error)}, {number(row.bf16_eager_error)}"
            acts = f"{row.sparse_layers} of {row.attention_layers} layers"
            lines.append(f"| {row.family} | {high} | {low} | {acts} | {row.reason} |")
    lines += ["", "Refused with `bsfa.UnsupportedError`, by `set_policy` or by the first prefill:", ""]
    lines += ["| family | reason |", "|---|---|"]
    lines += [f"| {row.family} | {row.reason.replace('|', '/')} |" for row in refused]
    return "\n".join(lines)


def put(page: str, table: str) -> str:
    """The page with the table between its markers. Raises ``ValueError`` if they are not there."""
    head, found, rest = page.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"no {BEGIN} ... {END} in the page")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(FAMILIES))
    only = parser.parse_args().only
    transformers.logging.set_verbosity_error()
    rows = []
    for name in only or FAMILIES:
        rows.append(examine(name))
        print(as_csv(rows).splitlines()[-1], flush=True)
    if not only:
        write_text(CSV, as_csv(rows))
        write_text(PAGE, put(PAGE.read_text(encoding="utf-8"), as_markdown(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

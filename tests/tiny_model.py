"""A random two-layer model with sharp attention, a tokenizer and prompts: seconds, not minutes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bsfa.prompts import Prompt, parse_prompt

LINE = "amber river castle cold tower lake gate code green field stone bridge north south quiet light"
WORDS = LINE.split()


def text_of(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text_of(random.Random(1), 500)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sharpen(model: Any, factor: float) -> Any:
    """Larger query and key projections, so that attention is not flat."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                p.mul_(factor)
    return model.eval()


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    }
    return sharpen(LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})), 12.0)


def make_mixed_model() -> Qwen2ForCausalLM:
    """Layer 0 has a sliding window, layer 1 full attention."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    return sharpen(Qwen2ForCausalLM(config), 12.0)


def make_rows(count: int, words: int = 120, seed: int = 5) -> list[dict[str, Any]]:
    """Prompts as JSON objects; every third is twice as long."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        before = text_of(rng, words * (2 if i % 3 == 0 else 1))
        answer = rng.choice(WORDS)
        text = f"{before} the code is {answer} and {text_of(rng, 5)}"
        start = len(before) + len(" the code is ")
        rows.append(
            {
                "id": f"p{i}",
                "text": text,
                "answers": [{"task": "single" if i % 2 else "multi", "start": start, "end": start + len(answer)}],
                "prose": [[0, len(before)]],
            }
        )
    return rows


def make_prompts(count: int, words: int = 120, seed: int = 5) -> list[Prompt]:
    return [parse_prompt(row) for row in make_rows(count, words, seed)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path

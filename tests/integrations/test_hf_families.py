"""Every decoder family of transformers that examples/hf_families.py makes: bsfa equals eager, or refuses."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
hf = pytest.importorskip("bsfa.integrations.transformers")

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("hf_families", ROOT / "examples" / "hf_families.py")
assert SPEC is not None and SPEC.loader is not None
script: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = script
SPEC.loader.exec_module(script)

pytestmark = pytest.mark.filterwarnings("ignore:bsfa ran dense attention")

REFUSED = {
    "bloom": "no attention layers of transformers' attention interface",
    "codegen": "no attention layers of transformers' attention interface",
    "deepseek-v3.2": "needs a full mask",
    "deepseek-v4": "needs a full mask",
    "doge": "no attention layers of transformers' attention interface",
    "falcon": "stays with attn_implementation='eager'",
    "falcon, alibi": "stays with attn_implementation='eager'",
    "gemma4, heads of 512": "no head_dim beyond 256",
    "glm-moe-dsa": "needs a full mask",
    "gpt-neo": "no attention layers of transformers' attention interface",
    "gptj": "stays with attn_implementation='eager'",
    "hy-v4": "needs a full mask",
    "inkling": "a position bias",
    "inkling2": "sinks that vary with the query",
    "kimi-linear": "no attention layers of transformers' attention interface",
    "llama4, beyond a chunk": "no chunked attention",
    "mamba": "no attention layers of transformers' attention interface",
    "mpt": "no attention layers of transformers' attention interface",
    "xglm": "no attention layers of transformers' attention interface",
}
WINDOWS_ONLY = {"kolibri1", "ministral", "mistral, sliding window", "phi3, sliding window", "recurrent-gemma"}
#: Their recurrent layers carry what attention leaves at padding into real tokens; that is no one's result.
LEAKING = {"recurrent-gemma"}
RUNNING = [name for name in script.FAMILIES if name not in REFUSED]
#: Families whose layers are all of attention, one of each kind: generate() runs through them in every way.
GENERATING = [
    "cohere2",
    "deepseek-v3",
    "gemma2",
    "gemma3",
    "gpt-neox",
    "gpt-oss",
    "granite",
    "llama",
    "llama4",
    "mistral, sliding window",
    "mixtral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2, sliding window",
    "qwen3-moe",
    "smollm3",
    "stablelm",
]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 13},
    "beams": {"num_beams": 3},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", list(script.FAMILIES))
def test_family(name: str) -> None:
    """Errors no larger than twice those of eager attention in the same precision; or a reason."""
    found = script.examine(name)
    if name in REFUSED:
        assert REFUSED[name] in found.reason and found.bf16_error is None and found.attention_layers is None
        return
    assert found.f32_error <= 2 * found.f32_eager_error < 1e-4
    assert found.bf16_error <= 2 * found.bf16_eager_error
    assert (found.sparse_layers == 0) == (name in WINDOWS_ONLY)
    assert (found.sparse_layers < found.attention_layers) == ("sliding-window layer" in found.reason)


@pytest.mark.parametrize("name", RUNNING)
def test_padded_batch(name: str) -> None:
    """With padding on the left: dense and with a policy that keeps every block, eager's logits of the real tokens."""
    model, ids = script.make(name), script.prompt()
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    wanted = script.logits(model, "eager", ids, attention_mask=mask)[mask.bool()]
    if name in LEAKING:
        alone = script.logits(model, "eager", ids[1:, 17:])[0]
        assert script.difference(wanted[-len(alone) :], alone) > 1e-3
        return
    for policy in (None, script.KEEP_ALL):
        hf.set_policy(model, policy, min_seqlen=0)
        found = script.logits(model, "bsfa", ids, attention_mask=mask)[mask.bool()]
        assert script.difference(found, wanted) < 1e-4


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str) -> None:
    """A batch with padding on the left: the tokens are those of eager attention, however they are made."""
    model, ids = script.make(name), script.prompt()[:, :40]
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for way, options in WAYS.items():
        tokens = {}
        for implementation in ("eager", "bsfa"):
            model.set_attn_implementation(implementation)
            hf.clear_policy(model)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
            assert out.shape == (2, 45)
            tokens[implementation] = out.tolist()
        assert tokens["bsfa"] == tokens["eager"], way


def test_committed_table() -> None:
    """The table and the page were written from the list that is tested here."""
    rows = list(csv.DictReader(script.CSV.read_text().splitlines()))
    assert [row["family"] for row in rows] == list(script.FAMILIES)
    assert {row["family"] for row in rows if not row["bf16_error"]} == set(REFUSED)
    page = script.PAGE.read_text()
    table = page[page.index(script.BEGIN) : page.index(script.END)]
    assert all(f"\n| {name} | " in table for name in script.FAMILIES)
    assert script.put(page, "x") == page.replace(table, f"{script.BEGIN}\n\nx\n\n")
    with pytest.raises(ValueError, match="no <!--"):
        script.put("a page", "x")

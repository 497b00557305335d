"""transformers on GPUs: attention sinks against eager, and a model on two GPUs like the same one on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

import bsfa.integrations.transformers as hf
from bsfa.policies import RelativeMax

pytestmark = pytest.mark.filterwarnings("ignore:bsfa ran dense attention")

VOCAB, LENGTH, LAYERS, HEADS = 97, 700, 4, 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
PER_HEAD = RelativeMax(alpha=torch.tensor([0.8, 0.9, 0.95, 1.0]), sink_blocks=1, window_blocks=1, last_tiles=0)


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt-oss":
        config = GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=2, sliding_window=100)
    else:
        config = LlamaConfig(**SHAPE)
    return AutoModelForCausalLM.from_config(config).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Ids [2, LENGTH] and a mask that pads the second row on the left."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :130] = 0
    return ids.cuda(), mask.cuda()


@torch.no_grad()
def logits(model: Any, implementation: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Of the real tokens, float32 on the CPU."""
    model.set_attn_implementation(implementation)
    out = model(ids, attention_mask=mask, use_cache=False).logits.float().cpu()
    return out if mask is None else out[mask.bool().cpu()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_dense_like_eager(kind: str, padded: bool) -> None:
    """bfloat16 logits are at most twice as far from eager float32 ones as those of eager; a decode step's too."""
    ids, mask = batch()
    given = mask if padded else None
    wanted = logits(make(kind).cuda(), "eager", ids, given)
    model = make(kind).to(device="cuda", dtype=torch.bfloat16)
    error = {i: (logits(model, i, ids, given) - wanted).norm() for i in ("eager", "bsfa")}
    assert error["bsfa"] <= 2 * error["eager"]
    last = torch.tensor([LENGTH - 1, -1]) if padded else (torch.tensor([0, 1]), torch.tensor([-1, -1]))
    for i in ("eager", "bsfa"):
        model.set_attn_implementation(i)
        with torch.no_grad():
            head = None if given is None else given[:, :-1]
            past = model(ids[:, :-1], attention_mask=head, use_cache=True).past_key_values
            step = model(ids[:, -1:], attention_mask=given, past_key_values=past).logits.float().cpu()[:, 0]
        error[i] = (step - wanted[last]).norm()
    assert error["bsfa"] <= 2 * error["eager"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.0, 7.0, 9.0])])
def test_decode_is_not_rounded_before_the_softmax(sinks: Tensor | None, dtype: torch.dtype) -> None:
    """Large logits, with a softcap or sinks: float32 products of the cache as it is, without a copy of it."""
    q, k, v = (torch.randn(2, heads, tokens, 64).to("cuda", dtype) for heads, tokens in ((4, 1), (2, 6000), (2, 7000)))
    v = v[:, :, :6000]  # a part of a static cache
    logits = (q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3)) * 2
    if sinks is None:
        logits = 50 * torch.tanh(logits / 50)
    else:
        logits = torch.cat([logits, sinks.cuda().double().view(1, 4, 1, 1).expand(2, 4, 1, 1)], -1)
    want = (logits.softmax(-1)[..., :6000] @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    options = {"scaling": 2.0, "softcap": 50.0 if sinks is None else None, "s_aux": sinks}
    hf.bsfa_attention(torch.nn.Module(), q, k, v, None, **options)  # with which cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = hf.bsfa_attention(torch.nn.Module(), q, k, v, None, **options)[0]
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=2 * unit, atol=2 * unit)
    assert torch.cuda.max_memory_allocated() - before < k.nbytes


@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_policy_acts(kind: str) -> None:
    ids, mask = batch()
    model = make(kind).to(device="cuda", dtype=torch.bfloat16)
    dense = logits(model, "bsfa", ids, mask)
    for keeps_all, policy in ((True, RelativeMax(alpha=0.0)), (False, PER_HEAD)):
        hf.set_policy(model, policy, min_seqlen=0, record=True)
        found = logits(model, "bsfa", ids, mask)
        density = [float(d) for d in hf.density(model).values()]
        acts_on = [
            kind == "llama" or t == "full_attention" for t in getattr(model.config, "layer_types", [""] * LAYERS)
        ]
        if keeps_all:
            assert (found - dense).norm() <= 0.05 * dense.norm() and density == [1.0] * LAYERS
        else:
            assert [d < 1.0 for d in density] == acts_on and not torch.equal(found, dense)
            assert bool(found.isfinite().all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_two_gpus_like_one(kind: str, tmp_path: Path) -> None:
    """device_map of accelerate: dense, with thresholds per head, padded, and generated tokens."""
    make(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    places: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": 2 * i // LAYERS for i in range(LAYERS)}
    load: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "bsfa"}
    one = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}, **load).eval()
    two = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, **load).eval()
    assert {p.device.index for p in two.parameters()} == {0, 1}
    ids, mask = batch()
    dense = None
    for policy in (None, PER_HEAD):
        for model in (one, two):
            hf.set_policy(model, policy, min_seqlen=0, record=True)
        for given in (None, mask):
            found = logits(two, "bsfa", ids, given)
            assert torch.equal(found, logits(one, "bsfa", ids, given))
            assert [float(d) for d in hf.density(two).values()] == [float(d) for d in hf.density(one).values()]
        assert dense is None or not torch.equal(found, dense)
        dense = found
        tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).tolist() for m in (one, two)]
        assert tokens[0] == tokens[1]
    state: Any = two.model.layers[-1].self_attn._bsfa_state
    assert state.policy.alpha.device == torch.device("cuda:1")

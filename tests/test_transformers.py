"""bsfa as an attention implementation of transformers, against eager attention of the same tiny random models."""

from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bsfa
from bsfa.policies import Policy, RelativeMax, StaticPattern

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("bsfa.integrations.transformers")

set_policy = partial(hf.set_policy, min_seqlen=0)  # at every length: the prompts here are short
pytestmark = pytest.mark.filterwarnings("ignore:bsfa ran dense attention")

S, WINDOW, BLOCK = 70, 21, 16
SIZE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.25}
COMMON = {**SIZE, **HEADS, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": None, "query_pre_attn_scalar": 24}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "head_dim": 8, **CAPS}),
    "gpt_oss": ("GptOss", {"sliding_window": WINDOW, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2}),
}
ALL = list(SHAPES)
PADDINGS = ["none", "full", "left", "right", "holes", "empty"]
STATIC = StaticPattern(sink_blocks=1, window_blocks=2, block_m=BLOCK, block_n=BLOCK)
KEEP_ALL = RelativeMax(alpha=0.0, block_m=BLOCK, block_n=BLOCK)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    family, own = SHAPES[name]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **own})
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    return {name: build(name) for name in ALL}


@pytest.fixture
def model(request: pytest.FixtureRequest, shared: dict[str, Any]) -> Any:
    """One of the models, dense again afterwards."""
    model = shared[getattr(request, "param", "llama")]
    model.set_attn_implementation("bsfa")
    yield model
    hf.clear_policy(model)
    model.set_attn_implementation("eager")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokens(batch: int = 3, length: int = S) -> Tensor:
    return torch.randint(1, 97, (batch, length))


def padding(kind: str, batch: int = 3, length: int = S) -> Tensor | None:
    """2-D mask: row 0 is whole, row 1 misses some tokens, row 2 more."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[1, :13], mask[2, : length - 5] = 0, 0
    elif kind == "right":
        mask[1, -13:], mask[2, 5:] = 0, 0
    elif kind == "holes":
        mask[1, 20:31], mask[2, 3:9] = 0, 0
    elif kind == "empty":
        mask[1, :13], mask[2] = 0, 0
    return None if kind == "none" else mask


def seen(mask: Tensor | None, batch: int = 3, length: int = S) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()


def logits(model: Any, impl: str, ids: Tensor, **inputs: Any) -> Tensor:
    model.set_attn_implementation(impl)
    return model(ids, **{"use_cache": False, **inputs}).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("model", ALL, indirect=True)
def test_prefill(model: Any, kind: str, request: pytest.FixtureRequest) -> None:
    ids, mask = tokens(), padding(kind)
    if kind == "holes" and request.node.callspec.params["model"] in ("qwen2", "mistral", "gemma2", "gpt_oss"):
        with pytest.raises(bsfa.UnsupportedError, match="holes"):
            logits(model, "bsfa", ids, attention_mask=mask)
        return
    want = logits(model, "eager", ids, attention_mask=mask)
    for policy in (None, KEEP_ALL):
        set_policy(model, policy)
        got = logits(model, "bsfa", ids, attention_mask=mask)
        close(got[seen(mask)], want[seen(mask)])
        assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    ids, mask = tokens(), padding("left")
    exact, low = build(name), build(name, dtype)
    want = logits(exact, "eager", ids, attention_mask=mask)[seen(mask)]
    error = {i: (logits(low, i, ids, attention_mask=mask)[seen(mask)] - want).abs().mean() for i in ("eager", "bsfa")}
    assert error["bsfa"] <= 2 * error["eager"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("model", ALL, indirect=True)
def test_cached_chunks_and_decode(model: Any, kind: str, cache: str) -> None:
    """Chunks of the prompt, then single tokens; a static cache is longer than what is in it."""
    ids, mask = tokens(), padding(kind)
    want = logits(model, "eager", ids, attention_mask=mask)
    model.set_attn_implementation("bsfa")
    set_policy(model, KEEP_ALL)
    dynamic, static = transformers.DynamicCache, partial(transformers.StaticCache, max_cache_len=S + 9)
    past = (dynamic if cache == "dynamic" else static)(config=model.config)
    parts, start = [], 0
    for n in (23, 40, 4, 1, 1, 1):
        part = None if mask is None else mask[:, : start + n]
        parts.append(model(ids[:, start : start + n], attention_mask=part, past_key_values=past).logits)
        start += n
    assert start == S
    close(torch.cat(parts, 1)[seen(mask)], want[seen(mask)])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 20}])
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("model", ["llama", "qwen2", "mistral", "gemma2", "gpt_oss"], indirect=True)
def test_generate(model: Any, kind: str, options: dict[str, Any]) -> None:
    ids, mask = tokens(), padding(kind)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    got = model.generate(ids, **options)
    sdpa = type(model)._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None
    model.set_attn_implementation("sdpa" if sdpa else "eager")
    want = model.generate(ids, **options)
    assert got.shape == (3, S + 6)
    assert got.tolist() == want.tolist()


def test_custom_scaling_and_inference_mode(model: Any) -> None:
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "scaling"):
            module.scaling = 0.05
    ids = tokens()
    with torch.inference_mode():
        want = logits(other, "eager", ids)
        close(logits(other, "bsfa", ids), want)
        close(logits(other, "bsfa", ids, attention_mask=padding("left"))[0], want[0])
    assert (want - logits(model, "eager", ids)).abs().max() > 0.1


# Not gpt_oss, which does not show position_ids to transformers' masks: nobody can tell its sequences apart.
@pytest.mark.parametrize("model", [name for name in ALL if name != "gpt_oss"], indirect=True)
def test_packed_sequences(model: Any) -> None:
    """Several sequences in a row, told by position_ids, by cumulative lengths, or by both."""
    lengths = (30, 1, 39)
    parts = [tokens(1, n) for n in lengths]
    alone = torch.cat([logits(model, "eager", p) for p in parts], 1)
    ids, positions = torch.cat(parts, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, 30, 31, 70])
    told = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 39, "max_length_k": 39}
    close(logits(model, "bsfa", ids, position_ids=positions), alone)
    close(logits(model, "bsfa", ids, position_ids=positions, **told), alone)
    close(logits(model, "bsfa", ids, position_ids=positions, use_cache=True, **told), alone)
    two = torch.cat([ids, ids.flip(1)])
    close(logits(model, "bsfa", two, position_ids=positions.expand(2, -1))[:1], alone)
    with pytest.raises(bsfa.UnsupportedError, match="contradicts"):
        logits(model, "bsfa", ids, position_ids=positions, **{**told, "cu_seq_lens_q": cu[:-1]})
    with pytest.raises(bsfa.UnsupportedError, match="batch of one row"):
        logits(model, "bsfa", two, position_ids=torch.arange(S)[None], **told)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_masks(model: Any, dtype: torch.dtype) -> None:
    """A custom mask raises in prefill and is honoured for a single query."""
    ids = tokens(2)
    keep = torch.ones(2, 1, S, S, dtype=torch.bool).tril()
    keep[:, :, :, 3] = keep[:, :, 3] = False
    additive = torch.where(keep, 0.0, -1e30)
    custom = keep if dtype == torch.bool else additive
    with pytest.raises(bsfa.UnsupportedError, match="custom attention mask"):
        logits(model, "bsfa", ids, attention_mask=custom)
    results = []
    for impl, mask in (("eager", additive), ("bsfa", custom)):
        model.set_attn_implementation("eager")
        past = model(ids[:, :-1], use_cache=True).past_key_values
        results.append(logits(model, impl, ids[:, -1:], attention_mask=mask[:, :, -1:], past_key_values=past))
    close(*results)


def call(**kwargs: Any) -> Tensor:
    """The attention function itself, q 8 tokens over 8 keys unless said otherwise."""
    q, k, v = kwargs.pop("q", torch.randn(2, 4, 8, 8)), torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    return hf.bsfa_attention(torch.nn.Module(), q, k, v, kwargs.pop("mask", None), **kwargs)[0]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"s_aux": torch.zeros(3)}, r"shape \(4,\), and got s_aux of shape \(3,\)"),
        ({"q": torch.randn(2, 4, 8, 257)}, "head_dim beyond 256"),
        ({"sinks": torch.zeros(2, 4, 8, 1)}, "vary with the query"),
        ({"position_bias": torch.zeros(1, 4, 8, 8)}, "position bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cache": object()}, "continuous batching"),
        ({"indices": torch.zeros(1)}, "indexer"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 4, "is_causal": False}, "without causality"),
        ({"mask": object()}, "custom attention mask"),
        ({"mask": torch.ones(2, 9)}, "covers 9 keys"),
        ({"q": torch.randn(2, 4, 1, 8), "mask": torch.ones(2, 9)}, "covers 9 keys"),
        ({"q": torch.randn(2, 4, 1, 8), "mask": torch.ones(2, 1, 2, 8)}, "one query token"),
    ],
)
def test_refused_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(bsfa.UnsupportedError, match=message):
        call(**kwargs)


@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.0, 3.0, -torch.inf])])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "mask, window",
    [
        (None, None),
        (None, 3),
        (torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 1]]), None),  # 2-D, over the first 5 keys
        (torch.tensor([True, False, True, True, False, True, True, True])[None, None, None], None),
        (torch.linspace(-2, 2, 64).view(2, 4, 1, 8), None),  # additive, per head
    ],
)
def test_decode(mask: Tensor | None, window: int | None, softcap: float | None, sinks: Tensor | None) -> None:
    """One query against the softmax written out."""
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 6)
    options = {"scaling": 0.5, "softcap": softcap, "sliding_window": window, "s_aux": sinks}
    out, weights = hf.bsfa_attention(torch.nn.Module(), q, k, v, mask, **options)
    assert weights is None
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.5
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    if window:
        logits[..., :-window] = -torch.inf
    if mask is not None and mask.is_floating_point():
        logits = logits + mask
    elif mask is not None:
        visible = mask[:, None, None].bool() if mask.dim() == 2 else mask
        visible = torch.nn.functional.pad(visible, (0, 8 - visible.shape[-1]))
        logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.view(1, 4, 1, 1).expand(2, 4, 1, 1)], -1)
    want = torch.einsum("bhqk,bhkd->bqhd", logits.softmax(-1)[..., :8], v.repeat_interleave(2, 1))
    torch.testing.assert_close(out, want)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator makes; views are of what is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_takes_the_cache_as_it_is(dtype: torch.dtype, with_sinks: bool, softcap: float | None) -> None:
    """No copy of K or V, in another dtype or the same; at most twice the error of eager maths in the dtype."""
    q, k, v = (torch.randn(2, heads, tokens, 32).to(dtype) for heads, tokens in ((4, 1), (2, 600), (2, 700)))
    v = v[:, :, :600]  # a part of a static cache
    sinks = torch.tensor([-2.0, 0.0, 7.0, 9.0]) if with_sinks else None

    def eager(as_dtype: torch.dtype) -> Tensor:
        keys, values = (t.to(as_dtype).repeat_interleave(2, 1) for t in (k, v))
        logits = q.to(as_dtype) @ keys.transpose(2, 3) * 0.5
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(as_dtype).view(1, 4, 1, 1).expand(2, 4, 1, 1)], -1)
        return (logits.softmax(-1)[..., :600] @ values).transpose(1, 2).double()

    with Largest() as largest:
        out = hf.bsfa_attention(torch.nn.Module(), q, k, v, None, scaling=0.5, softcap=softcap, s_aux=sinks)[0]
    assert out.dtype == dtype and out.shape == (2, 1, 4, 32)
    want = eager(torch.float64)
    assert (out.double() - want).norm() <= 2 * (eager(dtype) - want).norm()
    if with_sinks or softcap is not None:  # else it is torch's operator, whose intermediates are its own
        assert largest.bytes < k.nbytes / 2


def test_harmless_arguments() -> None:
    assert call(s_aux=None, output_attentions=False, use_cache=True, position_ids=None).shape == (2, 8, 4, 8)
    assert call(sliding_window=8, is_causal=False).shape == (2, 8, 4, 8)
    assert call(mask=torch.ones(2, 8)).shape == (2, 8, 4, 8)
    with pytest.raises(ValueError, match="fewer than the 8 queries"):
        call(mask=torch.ones(2, 7))


def test_training(model: Any) -> None:
    with torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        logits(model, "bsfa", tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_sinks_of_kept_blocks(kind: str, dtype: torch.dtype) -> None:
    """With a policy: softmax over the kept keys and the sink, written out; what observers see is without the sink."""
    mask = padding(kind)
    q, k, v = (torch.randn(3, heads, S, 8).to(dtype) for heads in (4, 2, 2))
    sinks = torch.tensor([-2.0, 0.0, 3.0, -torch.inf], dtype=dtype)
    seen_by = seen(mask)
    kept = torch.stack([pattern_mask(int(row.sum()), S) for row in seen_by])[:, None]
    scores = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.repeat_interleave(2, 1).float()) * 8**-0.5
    scores = torch.cat([scores.masked_fill(~kept, -torch.inf), sinks.float().view(1, 4, 1, 1).expand(3, 4, S, 1)], -1)
    want = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1)[..., :S], v.repeat_interleave(2, 1).float())

    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    module._bsfa_state = hf._LayerState(STATIC, record=False)  # type: ignore[assignment]
    calls: list[tuple[Tensor, Any]] = []
    hf._observers[module] = [lambda c: calls.append((c.out.clone(), c))]
    out = hf.bsfa_attention(module, q, k, v, mask, s_aux=sinks)[0]
    close_enough = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(out[seen_by].float(), want[seen_by], **close_enough)
    before, call = calls[0]
    assert torch.equal(call.sinks, sinks.float())
    assert torch.equal(before[..., 3, :], call.out[..., 3, :]) and not torch.equal(before, call.out)


MASKING = transformers.masking_utils


def mask_of(function: Callable[..., Any], length: int = S, **kwargs: Any) -> Tensor | None:
    return hf.bsfa_mask(batch_size=2, q_length=length, kv_length=length, mask_function=function, **kwargs)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda b, h, q, k: k <= q, "pattern '<lambda>'"),
        (MASKING.or_masks(MASKING.causal_mask_function, MASKING.bidirectional_mask_function), "pattern 'or_masks"),
        (MASKING.and_masks(MASKING.causal_mask_function, lambda b, h, q, k: k > 3), "pattern"),
        (MASKING.blockwise_overlay(torch.zeros(2, S)), "pattern 'blockwise"),
        (MASKING.chunked_causal_mask_function(S - 1, torch.zeros(2)), "chunked attention"),
        (MASKING.sliding_window_overlay(4), "without causality"),
        (MASKING.and_masks(*(MASKING.sliding_window_causal_mask_function(n) for n in (3, 4))), "two patterns"),
    ],
)
def test_refused_patterns(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(bsfa.UnsupportedError, match=message):
        mask_of(function, allow_is_bidirectional_skip=True)


def test_mask_function() -> None:
    causal = MASKING.causal_mask_function
    chunked = MASKING.chunked_causal_mask_function(S, torch.zeros(2))
    for plain in (mask_of(causal), mask_of(chunked), mask_of(causal, attention_mask=torch.ones(2, S + 3))):
        assert plain is not None and plain.shape == (2, 1, 1, S) and bool(plain.all())
        assert (plain.facts.causal, plain.facts.window, plain.facts.packing) == (True, None, None)
    with pytest.raises(bsfa.UnsupportedError, match="appends"):
        torch.cat([plain, plain], dim=-1)
    with pytest.raises(ValueError, match="must cover the cached tokens"):
        mask_of(causal, attention_mask=torch.ones(2, S - 1))
    with pytest.raises(bsfa.UnsupportedError, match="needs a full mask"):
        mask_of(causal, allow_is_causal_skip=False)
    with pytest.raises(bsfa.UnsupportedError, match="shape"):
        mask_of(causal, attention_mask=torch.ones(2, S, S))
    with pytest.raises(bsfa.UnsupportedError, match="cannot place"):
        mask_of(causal, q_offset=1)
    left = torch.ones(2, S)
    left[1, :7] = 0
    mask = mask_of(causal, attention_mask=left)
    assert mask is not None and mask.shape == (2, 1, 1, S) and mask.dtype == torch.bool
    assert mask.contiguous().facts is mask.facts and mask.to("cpu").facts is mask.facts
    moved = mask.to("meta")
    assert moved.facts.packing.cu_seqlens_q.device.type == moved.device.type == "meta"
    with pytest.raises(bsfa.UnsupportedError, match="custom attention mask"):
        call(mask=mask[:, :, :, :8])
    with pytest.raises(bsfa.UnsupportedError, match=f"made for {S} queries"):
        call(mask=mask)
    window = mask_of(MASKING.sliding_window_causal_mask_function(4), 8)
    assert call(mask=window, sliding_window=4).shape == (2, 8, 4, 8)
    with pytest.raises(bsfa.UnsupportedError, match="sliding window of 3"):
        call(mask=window, sliding_window=3)


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_encoder(kind: str) -> None:
    config = transformers.BertConfig(**SIZE, num_attention_heads=4, initializer_range=0.25)
    bert = transformers.AutoModelForMaskedLM.from_config(config).eval()
    ids, mask = tokens(), padding(kind)
    inputs = {"attention_mask": mask, "use_cache": None}
    close(logits(bert, "bsfa", ids, **inputs), logits(bert, "eager", ids, **inputs))


def test_encoder_decoder() -> None:
    half = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in half.items()}
    config = transformers.BartConfig(**sizes, vocab_size=97, d_model=32, init_std=0.25, forced_eos_token_id=None)
    bart = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    ids, target, mask = tokens(), tokens(3, 30), padding("right")
    results = [
        logits(bart, impl, ids, attention_mask=mask, decoder_input_ids=target, use_cache=cached)
        for impl, cached in (("eager", False), ("bsfa", False), ("bsfa", True))
    ]
    close(results[1], results[0])
    close(results[2], results[0])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    got = bart.generate(ids, **options)
    bart.set_attn_implementation("sdpa")
    assert got.tolist() == bart.generate(ids, **options).tolist()


# ---- policies -------------------------------------------------------------------------------------------------------


def pattern_mask(length: int, total: int) -> Tensor:
    """What STATIC leaves of a causal prompt: ``length`` tokens at the end of ``total`` columns, bool [total, total]."""
    position = torch.arange(length)
    block, tile = position // BLOCK, (position // BLOCK)[:, None]
    keep = ((block < 1) | (block > tile - 2)) & (position <= position[:, None])
    return torch.nn.functional.pad(keep, (total - length, 0, total - length, 0))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma2"], indirect=True)
def test_policy_against_a_token_mask(model: Any, per_layer: bool) -> None:
    """StaticPattern of padded prompts equals eager attention with the same tokens masked, in the layers it acts on."""
    ids, lengths = tokens(), (S, S - 13, 37)
    mask = torch.stack([torch.arange(S) >= S - n for n in lengths]).long()
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    sparse = [t == "full_attention" and (i == 1 or not per_layer) for i, t in enumerate(kinds)]

    causal = torch.ones(S, S, dtype=torch.bool).tril()
    visible = torch.stack([causal & (torch.arange(S) >= S - n) for n in lengths])
    window = visible & ~causal.tril(-WINDOW)
    blocks = torch.stack([pattern_mask(n, S) for n in lengths])
    hooks = []
    for use, kind, layer in zip(sparse, kinds, model.model.layers, strict=True):
        kept = blocks if use else (window if kind == "sliding_attention" else visible)
        given = {"attention_mask": torch.where(kept, 0.0, -1e30)[:, None]}

        def swap(module: Any, args: Any, kwargs: Any, given: dict[str, Tensor] = given) -> Any:
            return args, {**kwargs, **given}

        hooks.append(layer.self_attn.register_forward_pre_hook(swap, with_kwargs=True))
    want = logits(model, "eager", ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()

    set_policy(model, [None, STATIC] if per_layer else STATIC, record=True)
    got = logits(model, "bsfa", ids, attention_mask=mask)
    close(got[mask.bool()], want[mask.bool()])
    density = {index: float(d) for index, d in hf.density(model).items()}
    assert [d < 1 for d in density.values()] == sparse


@dataclass
class Table:
    """A stand-in for a threshold table of one model."""

    owner: Any
    policy: Policy

    def layer(self, index: int) -> Policy | None:
        return self.policy if index == 1 else None

    def check_model(self, model: Any) -> None:
        if model is not self.owner:
            raise bsfa.ThresholdMismatchError("made for another model")


def test_policies_belong_to_their_model(model: Any) -> None:
    ids, other = tokens(), build("llama")
    dense = logits(model, "bsfa", ids)
    set_policy(model, Table(model, STATIC), record=True)
    sparse = logits(model, "bsfa", ids)
    assert (sparse - dense).abs().max() > 0.1
    assert {i: bool(d < 1) for i, d in hf.density(model).items()} == {0: False, 1: True}

    close(logits(other, "bsfa", ids), dense)
    with pytest.raises(bsfa.ThresholdMismatchError):
        set_policy(other, Table(model, STATIC))
    close(logits(other, "bsfa", ids), dense)

    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "bsfa", ids), sparse)
    hf.clear_policy(twin)
    close(logits(twin, "bsfa", ids), dense)
    assert torch.equal(logits(model, "bsfa", ids), sparse)
    model.set_attn_implementation("sdpa")
    hf.set_policy(model, None)
    assert model.config._attn_implementation == "bsfa"
    close(model(ids).logits, dense)


def test_refused_policies_and_models(model: Any) -> None:
    bad: list[tuple[Any, Any, type[Exception], str]] = [
        (model, [STATIC], ValueError, "2 layers, but 1 policies"),
        (model, [STATIC, "dense"], TypeError, "policy of layer 1"),
        (model, "dense", TypeError, "policy must be"),
        (torch.nn.Linear(2, 2), STATIC, bsfa.UnsupportedError, "no attention layers"),
        (model.model.layers[0], STATIC, TypeError, "PreTrainedModel"),
    ]
    for target, policy, error, message in bad:
        with pytest.raises(error, match=message):
            set_policy(target, policy)


@pytest.mark.parametrize("kind", ["none", "left"])
def test_minimum_length(model: Any, kind: str) -> None:
    """Calls over fewer keys are dense and say why; padding and the empty part of a static cache are no keys."""
    ids, mask = tokens(), padding(kind)
    longest = S if kind == "none" else S - 13  # without the row that has no padding
    if mask is not None:
        ids, mask = ids[1:], mask[1:]
    dense = logits(model, "bsfa", ids, attention_mask=mask)
    calls: list[Any] = []
    with hf.observe(model, calls.append):
        for minimum in (longest, longest + 1):
            set_policy(model, STATIC, min_seqlen=minimum, record=True)
            past = transformers.StaticCache(config=model.config, max_cache_len=S + 9)
            for cache in ({}, {"use_cache": True, "past_key_values": past}):
                got = logits(model, "bsfa", ids, attention_mask=mask, **cache)
                short = minimum > longest
                assert torch.equal(got, dense) == short
                assert [float(d) < 1 for d in hf.density(model).values()] == [not short] * 2
                reasons = {c.info.dense_reason for c in calls}
                assert reasons == ({"fewer keys than min_seqlen"} if short else {None})
                assert all(c.info.policy is STATIC for c in calls)
                calls.clear()
    past = transformers.DynamicCache(config=model.config)
    set_policy(model, STATIC, min_seqlen=S)
    with hf.observe(model, calls.append):
        for part in tokens().split((40, 30), 1):  # the second chunk sees enough
            model(part, past_key_values=past)
    assert [c.info.dense_reason is None for c in calls] == [False, False, True, True]


def test_default_minimum_length(model: Any) -> None:
    calls: list[Any] = []
    hf.set_policy(model, STATIC)
    with warnings.catch_warnings(), hf.observe(model, calls.append):
        warnings.simplefilter("error", bsfa.DenseFallbackWarning)  # by design, so without a warning
        model(tokens())
    assert model.model.layers[0].self_attn._bsfa_state.min_seqlen == hf.DEFAULT_MIN_SEQLEN > S
    assert [c.info.dense_reason for c in calls] == ["fewer keys than min_seqlen"] * 2
    with pytest.raises(ValueError, match="min_seqlen"):
        hf.set_policy(model, STATIC, min_seqlen=-1)


def test_warnings(model: Any, shared: dict[str, Any]) -> None:
    """Decode is dense without a word; a sliding-window layer says once that the policy is not applied."""
    ids = tokens()
    set_policy(model, STATIC)
    with warnings.catch_warnings():
        warnings.simplefilter("error", bsfa.DenseFallbackWarning)
        model.generate(ids, attention_mask=padding("left"), max_new_tokens=3)
        logits(model, "bsfa", ids[:, :2], attention_mask=torch.tensor([[1, 0]] * 3))
    mistral = shared["mistral"]
    set_policy(mistral, STATIC)
    with pytest.warns(bsfa.DenseFallbackWarning, match="sliding-window") as caught:
        logits(mistral, "bsfa", ids)
        logits(mistral, "bsfa", ids)
    assert len(caught) == 1
    hf.clear_policy(mistral)


def test_density_needs_recording(model: Any) -> None:
    for policy in (None, STATIC):
        set_policy(model, policy)
        with pytest.raises(ValueError, match="record=True"):
            hf.density(model)
    set_policy(model, STATIC, record=True)
    assert hf.density(model) == {}
    logits(model, "bsfa", tokens())
    first = hf.density(model)
    logits(model, "bsfa", tokens(3, 1))  # a decode step leaves the densities alone
    assert list(first) == [0, 1] and first == hf.density(model)


# ---- observe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("model", ["llama", "gemma2"], indirect=True)
def test_observe(model: Any, kind: str) -> None:
    ids, mask = tokens(), padding(kind)
    model.set_attn_implementation("eager")
    calls: list[Any] = []
    with hf.observe(model, calls.append):
        assert model.config._attn_implementation == "bsfa"
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("bsfa")
    model(ids, use_cache=False)
    assert [c.layer for c in calls] == [0, 1]
    for c in calls:
        assert c.causal and c.info.mask is None and c.info.dense_reason is None
        assert c.window_left == (WINDOW - 1 if "Gemma" in type(model).__name__ and c.layer == 0 else None)
        dim = c.q.shape[-1]
        options: dict[str, Any] = {"softmax_scale": c.softmax_scale, "softcap": c.softcap, "window_left": c.window_left}
        if kind == "none":
            assert c.cu_seqlens_q is None and c.max_seqlen_q is None and c.lse.shape == (3, 4, S)
            assert c.q.shape == c.out.shape == (3, S, 4, dim) and c.k.shape == c.v.shape == (3, S, 2, dim)
            out, lse = bsfa.attention(c.q, c.k, c.v, return_lse=True, **options)
        else:
            assert c.cu_seqlens_q.tolist() == c.cu_seqlens_k.tolist() == [0, S, 2 * S - 13, 2 * S - 8]
            assert c.q.shape == (2 * S - 8, 4, dim) and c.k.shape == (2 * S - 8, 2, dim)
            lengths = (c.cu_seqlens_q, c.cu_seqlens_k, c.max_seqlen_q, c.max_seqlen_k)
            out, lse = bsfa.attention_varlen(c.q, c.k, c.v, *lengths, return_lse=True, **options)
        assert torch.equal(out, c.out) and torch.equal(lse, c.lse)


def test_observe_reports_the_policy(shared: dict[str, Any]) -> None:
    model, calls = shared["gemma2"], []
    set_policy(model, STATIC)
    with pytest.warns(bsfa.DenseFallbackWarning), hf.observe(model, calls.append):
        model(tokens())
    hf.clear_policy(model)
    sliding, full = calls
    assert sliding.info.policy is full.info.policy is STATIC
    assert sliding.info.mask is None and "sliding-window" in sliding.info.dense_reason
    assert float(full.info.density()) < 1 and full.info.dense_reason is None


def test_observers_nest_and_leave(model: Any) -> None:
    one: list[Any] = []
    two: list[Any] = []

    with hf.observe(model, one.append):
        with hf.observe(model, two.append):
            model(tokens())
        with pytest.raises(ZeroDivisionError), hf.observe(model, lambda c: c.layer / 0):
            model(tokens())
        copy.deepcopy(model)(tokens())
    model(tokens())
    assert len(two) == 2 and len(one) == 3


def test_from_pretrained(model: Any, tmp_path: Path) -> None:
    ids = tokens()
    set_policy(model, STATIC)  # leaves no trace in the files
    model.save_pretrained(tmp_path)
    hf.register()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="bsfa").eval()
    assert loaded.config._attn_implementation == "bsfa"
    close(loaded(ids).logits, logits(model, "eager", ids))


def test_compiled_decode(model: Any) -> None:
    """A decode step over a static cache traces into one graph, with a policy set."""
    set_policy(model, STATIC)
    ids = tokens()
    past = transformers.StaticCache(config=model.config, max_cache_len=S + 4)
    model(ids, past_key_values=past)
    mask = MASKING.create_masks_for_generate(
        config=model.config, inputs_embeds=torch.empty(3, 1, 0), attention_mask=None, past_key_values=past
    )
    twin = copy.deepcopy(past)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(ids[:, :1], attention_mask=mask, past_key_values=past).logits
    close(got, model(ids[:, :1], attention_mask=mask, past_key_values=twin).logits)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("_bsfa_hf_again", hf.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for found, message in ((None, r"bsfa\[transformers\]"), (transformers, "upgrade")):
        with monkeypatch.context() as patch, pytest.raises(ImportError, match=message):
            patch.setitem(sys.modules, spec.name, module)
            patch.setitem(sys.modules, "transformers", found)
            patch.setattr(MASKING, "sdpa_mask", lambda batch_size, cache_position: None)  # as it once was
            spec.loader.exec_module(module)

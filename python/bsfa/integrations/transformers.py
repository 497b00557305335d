"""bsfa as an attention implementation of Hugging Face transformers.

    import bsfa.integrations.transformers as bsfa_hf

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="bsfa")
    bsfa_hf.set_policy(model, bsfa.policies.RelativeMax(alpha=0.1))
    model.generate(**inputs)

Importing this module registers "bsfa" for every model that uses transformers' attention interface. Without a policy it
computes dense, exact attention. A policy acts on prefill (more than one query token) over at least ``min_seqlen`` keys,
in layers without a sliding window; sliding-window layers are dense inside their window, which a warning says once.
Shorter prompts are dense by design, since choosing blocks would cost more than it saves. Decode steps (one query token)
are dense by design and run on ``torch.nn.functional.scaled_dot_product_attention``.

Padded batches, packed sequences, chunked prefill, static caches, GQA, softcaps and attention sinks are honoured. What
cannot be honoured raises :class:`bsfa.UnsupportedError`: custom 4-D masks in prefill, chunked attention beyond one
chunk, position biases, dropout, attention weights as output. Outputs at padded positions are zeros. Each chunk of a
chunked prefill counts as the end of the prompt for ``last_tiles`` of a policy, because transformers does not say how
long the whole prompt is.

An attention sink (GPT-OSS) is one more logit ``a`` per head that takes its share of the softmax and has no value, so it
only scales the output: ``out * sigmoid(lse - a)``. That is exact for dense attention; with a policy it is the softmax
over the kept blocks and the sink. Policies choose blocks without regard to the sink.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "bsfa.integrations.transformers needs transformers 5: install it with pip install 'bsfa[transformers]'. "
        f"Cause: {error}"
    ) from error
if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    import transformers

    raise ImportError(
        f"bsfa.integrations.transformers does not know the masks of transformers {transformers.__version__}: upgrade "
        "it with pip install -U 'bsfa[transformers]'"
    )

from bsfa.attention import attention, attention_varlen
from bsfa.errors import UnsupportedError, warn_dense
from bsfa.info import AttentionInfo
from bsfa.integrations._hf_masks import KeyMask, MaskFacts, Packing, bsfa_mask, padding_facts
from bsfa.integrations.min_seqlen import DEFAULT_MIN_SEQLEN, SHORT_REASON, check_min_seqlen
from bsfa.layout import MAX_HEAD_DIM
from bsfa.placement import module_device
from bsfa.policies import Policy
from bsfa.policies.composed import PerLayer, on_device
from bsfa.stages import check_skip

__all__ = [
    "DEFAULT_MIN_SEQLEN",
    "AttentionCall",
    "LayerPolicies",
    "attention_implementations",
    "attention_layers",
    "bsfa_attention",
    "bsfa_mask",
    "clear_policy",
    "density",
    "observe",
    "register",
    "set_policy",
]

NAME = "bsfa"
WINDOW_REASON = "a sliding-window layer is dense inside its window"
DECODE_REASON = "one query token per sequence is dense by design"

#: Arguments of an attention function that change its result and that bsfa cannot honour.
REFUSED = {
    "sinks": "attention sinks that vary with the query (sinks)",
    "position_bias": "a position bias",
    "indices": "token indices of a sparse-attention indexer",
    "block_indices": "block indices of a sparse-attention indexer",
    "cache": "the paged cache of continuous batching",
    "output_attentions": "attention weights as output (output_attentions)",
}


@runtime_checkable
class LayerPolicies(Protocol):
    """A policy for each layer of one model, such as a ``bsfa.ThresholdTable``."""

    def layer(self, index: int) -> Policy | None:
        """The policy of layer ``index``; None is dense."""

    def check_model(self, model: Any) -> None:
        """Raise if the policies were made for another model."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One prefill attention call of one layer, as :func:`observe` reports it.

    Batches without padding: ``q [B, Sq, Hq, D]``, ``k``/``v`` ``[B, Sk, Hkv, D]``, ``out [B, Sq, Hq, Dv]``, ``lse``
    float32 [B, Hq, Sq]; ``cu_seqlens_*`` and ``max_seqlen_*`` are None. Padded batches and packed sequences: padding is
    gone, ``q``, ``k``, ``v``, ``out`` are ``[total, heads, D]`` and ``lse`` is [Hq, total_q], with ``cu_seqlens_*``
    int32 [N + 1] and ``max_seqlen_*`` in tokens; the arguments of the bsfa functions go by the same names. K and V have
    their own number of heads, and no keys beyond those that the queries may see. The tensors are the layer's own: clone
    what is to outlive the callback.

    ``out`` and ``lse`` are without ``sinks``, the model's sink logits float32 [Hq], which scale the output afterwards.
    ``window_left``: as in :func:`bsfa.attention`; ``softmax_scale``: the scale in use; ``softcap``: 0 is off.
    ``info.dense_reason``: why the layer's policy was not applied; ``SHORT_REASON`` for less than ``min_seqlen`` keys.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    causal: bool
    softmax_scale: float
    softcap: float
    window_left: int | None
    info: AttentionInfo
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    sinks: Tensor | None = None


Callback = Callable[[AttentionCall], None]


@dataclass
class _LayerState:
    """What :func:`set_policy` leaves on an attention module; it is copied with the module."""

    policy: Policy | None
    record: bool
    density: Tensor | None = None
    mean_correction: bool = False
    min_seqlen: int = 0


_observers: WeakKeyDictionary[nn.Module, list[Callback]] = WeakKeyDictionary()


# ---- the attention function -----------------------------------------------------------------------------------------


def _refuse(query: Tensor, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    for name, what in REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise UnsupportedError(f"attn_implementation='bsfa' does not support {what}: use 'sdpa' or 'eager'")
    if dropout:
        raise UnsupportedError(
            f"attn_implementation='bsfa' has no dropout (got {dropout}): call model.eval(), or train with 'sdpa'"
        )
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(
            "attn_implementation='bsfa' is forward only, and the attention inputs require grad: run the model under "
            "torch.no_grad() or torch.inference_mode(), or train with 'sdpa'"
        )


def _sink_logits(s_aux: Any, query: Tensor) -> Tensor | None:
    """The sinks of a layer as float32 [Hq]; None: it has none."""
    if s_aux is None:
        return None
    if not isinstance(s_aux, Tensor) or s_aux.shape != (query.shape[1],):
        raise UnsupportedError(
            f"bsfa knows attention sinks of one logit per query head, shape ({query.shape[1]},), and got s_aux of "
            f"shape {tuple(getattr(s_aux, 'shape', ()))}: use attn_implementation='eager'"
        )
    return s_aux.detach().to(device=query.device, dtype=torch.float32)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``q . k`` of ``[B, H, G, D]`` and ``[B, H, K, D]``: float32 ``[B, H, G, K]``, without a float32 copy of ``k``.

    On the CPU torch rounds the products of a lower precision to it, as eager attention does everywhere.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        products = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return products.unflatten(0, q.shape[:2])
    return (q @ k.transpose(2, 3)).float()


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention of one query token: ``[B, Hq, 1, D]`` over ``[B, Hkv, K, D]`` to ``[B, 1, Hq, Dv]``.

    The query heads of a group become the queries of their KV head, so K and V are neither repeated nor copied.
    """
    batch, heads, _, _ = query.shape
    groups = (key.shape[1], heads // key.shape[1])
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if isinstance(mask, KeyMask) or (mask is not None and (mask.dim() != 4 or mask.shape[2] != 1)):
        raise UnsupportedError(f"bsfa cannot run an attention mask of shape {tuple(mask.shape)} with one query token")
    if mask is not None:
        if mask.shape[-1] > key.shape[2]:
            raise UnsupportedError(f"the attention mask covers {mask.shape[-1]} keys, there are {key.shape[2]}")
        key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
        if mask.shape[1] != 1:
            mask = mask.squeeze(2).unflatten(1, groups)
    elif window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    grouped = query.squeeze(2).unflatten(1, groups)
    if not softcap and sinks is None:
        out = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    else:
        logits = _products(grouped, key) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        total = logits.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.view(*groups, 1))
        out = (logits - total).exp().to(value.dtype) @ value
    return out.reshape(batch, 1, heads, value.shape[-1])


def _mask_facts(
    query: Tensor, key: Tensor, mask: Any, causal: bool, window: int | None, kwargs: dict[str, Any]
) -> MaskFacts:
    """What the mask of a prefill call says; ``mask`` is what the model passed to the attention function."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(mask, KeyMask):
        facts = mask.facts
        if facts.q_length != q_length or facts.kv_length > kv_length:
            raise UnsupportedError(
                f"the attention mask was made for {facts.q_length} queries over {facts.kv_length} keys, the layer has "
                f"{q_length} over {kv_length}"
            )
        if window is not None and window != facts.window and window < facts.kv_length:
            raise UnsupportedError(
                f"the layer asks for a sliding window of {window} tokens, its attention mask has {facts.window}"
            )
    elif mask is None:
        facts = MaskFacts(causal, window, q_length, kv_length, None)
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        if mask.shape[1] > kv_length:
            raise UnsupportedError(f"the attention mask covers {mask.shape[1]} keys, there are {kv_length}")
        facts = padding_facts(mask, q_length, causal, window)
    else:
        shape = tuple(mask.shape) if hasattr(mask, "shape") else ()
        raise UnsupportedError(
            f"bsfa cannot run a custom attention mask ({type(mask).__name__} {getattr(mask, 'dtype', '')} {shape}) in "
            "prefill: pass a 2-D padding mask, or position_ids of packed sequences, or use attn_implementation='sdpa'"
        )
    if facts.window is not None and not facts.causal:
        if facts.window < max(q_length, facts.kv_length):
            raise UnsupportedError("bsfa has no sliding window without causality: use attn_implementation='sdpa'")
        facts = replace(facts, window=None)

    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is None and cu_k is None:
        return facts
    max_q, max_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    if facts.packing is not None:
        if facts.packing.index_q is None and cu_q is not None and cu_q.shape == facts.packing.cu_seqlens_q.shape:
            return facts  # the same packing, found from position_ids
        raise UnsupportedError("cu_seq_lens_q contradicts the attention mask or position_ids")
    if query.shape[0] != 1 or cu_q is None or cu_k is None or max_q is None or max_k is None:
        raise UnsupportedError(
            "packed sequences need a batch of one row and cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k"
        )
    packing = Packing(cu_q.to(torch.int32), cu_k.to(torch.int32), int(max_q), int(max_k), None, None)
    return replace(facts, packing=packing)


def _prefill(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    facts: MaskFacts,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``[B, Hq, Lq, D]`` over ``[B, Hkv, Lk, D]`` to ``[B, Lq, Hq, Dv]``, by the layer's policy."""
    state: _LayerState | None = module.__dict__.get("_bsfa_state")
    callbacks = _observers.get(module, [])
    recording = state is not None and state.record
    policy = None if state is None else state.policy
    packing = facts.packing

    reason: str | None = None
    if policy is not None and facts.window is not None:
        reason = WINDOW_REASON
        warn_dense(reason)
    elif policy is not None and packing is not None and packing.max_seqlen_q <= 1:
        reason = DECODE_REASON
    elif policy is not None and state is not None:
        longest = facts.kv_length if packing is None else packing.max_seqlen_k
        reason = SHORT_REASON if longest < state.min_seqlen else None
    window_left = None if facts.window is None else facts.window - 1
    options: dict[str, Any] = {
        "policy": None if reason else policy,
        "mean_correction": reason is None and policy is not None and state is not None and state.mean_correction,
        "causal": facts.causal,
        "softmax_scale": scale,
        "softcap": softcap,
        "window_left": window_left,
        "return_lse": True,
        "return_info": True,
    }
    q, k, v = (t.transpose(1, 2) if t.stride(-1) == 1 else t.transpose(1, 2).contiguous() for t in (query, key, value))
    k, v = k[:, : facts.kv_length], v[:, : facts.kv_length]
    sequences: dict[str, Any] = {}
    if packing is not None:
        q, k, v = packing.pack(q, packing.index_q), packing.pack(k, packing.index_k), packing.pack(v, packing.index_k)
        sequences = {
            "cu_seqlens_q": packing.cu_seqlens_q,
            "cu_seqlens_k": packing.cu_seqlens_k,
            "max_seqlen_q": packing.max_seqlen_q,
            "max_seqlen_k": packing.max_seqlen_k,
        }
        result = attention_varlen(q, k, v, **sequences, **options)
    else:
        result = attention(q, k, v, **options)
    out, lse, info = cast(tuple[Tensor, Tensor, AttentionInfo], result)

    if recording:
        assert state is not None
        state.density = info.density()
    if callbacks:
        if reason:
            info = replace(info, policy=policy, dense_reason=reason)
        index = cast(int, module.layer_idx)
        call = AttentionCall(
            index, q, k, v, out, lse, facts.causal, scale, softcap, window_left, info, **sequences, sinks=sinks
        )
        for callback in list(callbacks):
            callback(call)
    if sinks is not None:
        out.mul_(torch.sigmoid(lse - sinks[:, None]).transpose(-1, -2).unsqueeze(-1))
    return out if packing is None else packing.unpack(out, query.shape[0], query.shape[2])


def bsfa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: ``query [B, Hq, Lq, D]``, ``key``/``value`` ``[B, Hkv, Lk, D]``.

    Returns ``out [B, Lq, Hq, Dv]`` and None (no attention weights). See the module docstring for what it honours and
    refuses.
    """
    _refuse(query, key, value, dropout, kwargs)
    sinks = _sink_logits(kwargs.get("s_aux"), query)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cap = 0.0 if softcap is None else float(softcap)
    if query.shape[2] == 1:
        return _decode(query, key, value, attention_mask, scale, cap, sliding_window, sinks), None
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"attn_implementation='bsfa' has no head_dim beyond {MAX_HEAD_DIM} (got {query.shape[-1]} and "
            f"{value.shape[-1]}): use 'sdpa'"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    facts = _mask_facts(query, key, attention_mask, causal, sliding_window, kwargs)
    return _prefill(module, query, key, value, facts, scale, cap, sinks), None


# ---- models ---------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make "bsfa" an attention implementation of transformers. Importing this module does it; again is harmless."""
    AttentionInterface.register(NAME, bsfa_attention)
    AttentionMaskInterface.register(NAME, bsfa_mask)


def attention_layers(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Attention modules by layer index (rising): the causal ones, or all if none is causal.

    More than one of an index where a model has several stacks. Raises :class:`bsfa.UnsupportedError` if there is none.
    """
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "is_causal")]
    layers: dict[int, list[nn.Module]] = {}
    for module in [m for m in found if m.is_causal] or found:
        layers.setdefault(cast(int, module.layer_idx), []).append(module)
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no attention layers of transformers' attention interface")
    return dict(sorted(layers.items()))


def attention_implementations(model: Any) -> str | dict[str, Any]:
    """The attention implementations in use, as ``model.set_attn_implementation`` takes them: a name, or one for each
    part of a model that has several.
    """
    config = model.config
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    if not parts:
        return cast(str, config._attn_implementation)
    return {
        "": config._attn_implementation,
        **{name: part._attn_implementation for name, part in parts.items() if part is not None},
    }


def _use_bsfa(model: Any) -> None:
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    model.set_attn_implementation(NAME)
    for index, modules in attention_layers(model).items():
        for module in modules:
            used = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
            if used != NAME:
                raise UnsupportedError(
                    f"layer {index} of {type(model).__name__} stays with attn_implementation='{used}': the model does "
                    "not use transformers' attention interface"
                )


def _per_layer(
    model: nn.Module,
    policy: Policy | Sequence[Policy | None] | LayerPolicies | None,
    layers: dict[int, list[nn.Module]],
) -> dict[int, Policy | None]:
    """The policy of each attention layer, after checking that ``policy`` fits the model."""
    if policy is None or isinstance(policy, Policy):
        return dict.fromkeys(layers, policy)
    twice = [index for index, modules in layers.items() if len(modules) > 1]
    if twice:
        raise UnsupportedError(
            f"{type(model).__name__} has several attention layers with index {twice[0]}: set policies per layer on the "
            "part of it that is the language model"
        )
    if isinstance(policy, PerLayer):
        policy = policy.policies
    if isinstance(policy, LayerPolicies):
        policy.check_model(model)
        chosen = {index: policy.layer(index) for index in layers}
    elif isinstance(policy, Sequence) and not isinstance(policy, str):
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        count = max(getattr(text, "num_hidden_layers", 0), max(layers) + 1)
        if len(policy) != count:
            raise ValueError(f"{type(model).__name__} has {count} layers, but {len(policy)} policies were given")
        extra = [index for index, p in enumerate(policy) if p is not None and index not in layers]
        if extra:
            raise ValueError(f"layer {extra[0]} of {type(model).__name__} has no attention, its policy must be None")
        chosen = {index: policy[index] for index in layers}
    else:
        raise TypeError(
            "policy must be None, a bsfa.policies.Policy, a sequence (or PerLayer) of them, or an object with "
            f"layer(index) and check_model(model) such as a bsfa.ThresholdTable; got {type(policy).__name__}"
        )
    for index, p in chosen.items():
        if p is not None and not isinstance(p, Policy):
            raise TypeError(
                f"the policy of layer {index} must be a bsfa.policies.Policy or None, got {type(p).__name__}"
            )
    return chosen


def _beside(module: nn.Module, policy: Policy | None) -> Policy | None:
    """``policy`` with its per-head thresholds where the module computes, so that calls do not copy them again."""
    device = module_device(module)
    return policy if device is None else on_device(policy, device)


def set_policy(
    model: nn.Module,
    policy: Policy | Sequence[Policy | None] | LayerPolicies | None,
    *,
    min_seqlen: int = DEFAULT_MIN_SEQLEN,
    record: bool = False,
    mean_correction: bool = False,
) -> None:
    """Choose the blocks that each layer of ``model`` attends to in prefill; switches the model to "bsfa".

    model: a ``transformers.PreTrainedModel``. policy: None (dense), one :class:`bsfa.policies.Policy` for all layers, a
    sequence or ``PerLayer`` with one Policy or None per layer, or an object with ``layer(index)`` and
    ``check_model(model)`` such as a ``bsfa.ThresholdTable``, which refuses a model that it was not made for. Policies
    belong to this model (and to deep copies made afterwards), replace earlier ones, and act on its causal attention
    layers.
    min_seqlen: tokens; a prefill call over fewer keys (the longest sequence of its batch counts, with cached tokens and
    without padding) is dense, and :class:`AttentionCall` says so. The default is where sparse attention starts to be
    faster; 0 applies the policy at every length. Each chunk of a chunked prefill is a call of its own.
    record: keep the density of each layer's last prefill call for :func:`density`.
    mean_correction: as in :func:`bsfa.attention`, for every layer with a policy; none of them may be ``ExactSkip``.

    Raises ``TypeError``/``ValueError`` for a policy that does not fit, :class:`bsfa.UnsupportedError` for a model that
    does not use transformers' attention interface, and whatever ``check_model`` raises. Policies set before then stay.
    """
    if not isinstance(mean_correction, bool):
        raise TypeError(f"mean_correction must be a bool, got {type(mean_correction).__name__}")
    check_min_seqlen(min_seqlen)
    layers = attention_layers(model)
    chosen = _per_layer(model, policy, layers)
    for p in chosen.values():
        check_skip(p, mean_correction)
    _use_bsfa(model)
    for index, modules in layers.items():
        for module in modules:
            beside = _beside(module, chosen[index])
            state: Any = _LayerState(beside, record, mean_correction=mean_correction, min_seqlen=min_seqlen)
            module._bsfa_state = state


def clear_policy(model: nn.Module) -> None:
    """Drop policies and recordings of ``model``: attention is dense and exact again. Stays with "bsfa"."""
    for module in model.modules():
        module.__dict__.pop("_bsfa_state", None)


def density(model: nn.Module) -> dict[int, Tensor]:
    """Kept / visible blocks of each layer's last prefill call (1.0: dense), float32 scalars on the device.

    What was skipped inside attention counts as not kept (:meth:`bsfa.AttentionInfo.density`). With chunked prefill that
    is the last chunk. Layers without a prefill since :func:`set_policy` are left out. Raises ``ValueError`` unless the
    policy was set with ``record=True``.
    """
    states = {
        index: cast(_LayerState, module._bsfa_state)
        for index, modules in attention_layers(model).items()
        for module in modules
        if hasattr(module, "_bsfa_state")
    }
    if not any(state.record for state in states.values()):
        raise ValueError("no densities are recorded: call set_policy(model, policy, record=True) first")
    return {index: state.density for index, state in states.items() if state.density is not None}


@contextmanager
def observe(model: nn.Module, callback: Callback) -> Iterator[None]:
    """Within the context, ``callback`` gets an :class:`AttentionCall` after each layer's prefill attention.

    Runs the model with "bsfa" and its policies (none: dense) and goes back to the former implementation at the end.
    Decode steps are not reported. An exception of the callback passes through the model to the caller.
    """
    layers = attention_layers(model)
    before = attention_implementations(model) if hasattr(model, "set_attn_implementation") else NAME
    _use_bsfa(model)
    modules = [module for group in layers.values() for module in group]
    for module in modules:
        _observers.setdefault(module, []).append(callback)
    try:
        yield
    finally:
        for module in modules:
            _observers[module].remove(callback)
            if not _observers[module]:
                del _observers[module]
        cast(Any, model).set_attn_implementation(before)


register()

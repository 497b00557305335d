"""SGLang: the attention backend ``bsfa``, found through the entry point ``sglang.srt.plugins``.

``pip install bsfa`` beside SGLang is the whole installation; nothing of SGLang is changed on disk::

    BSFA_CONFIG=bsfa.toml python -m sglang.launch_server --model-path ... \
        --prefill-attention-backend bsfa --decode-attention-backend fa3

bsfa computes prefill, mixed batches of prefill and decode included, of layers that have a policy, over SGLang's own KV
pool. All else goes to one of SGLang's backends, the *dense backend*: that of ``--decode-attention-backend``, or
SGLang's choice for the device if that is bsfa too. This is so for decode batches, layers and batches without a sparse
request (no policy, or shorter than ``min_seqlen``), and for what bsfa does not compute; a reason of the last kind is
logged once. See docs/integrations_sglang.md for the list.

SGLang is imported when a function here is called, not with this module; what it is asked is in _sglang_runner.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsfa.errors import UnsupportedError
from bsfa.integrations._sglang_runner import decoding_backend, parallel, records_prefill, unsuited, write_location
from bsfa.integrations.serving import (
    ENVIRONMENT,
    PrefillPlan,
    ServingConfig,
    log_once,
    plan_prefill,
    run_prefill,
    serving_config,
    unsupported_reason,
)
from bsfa.limits import check_tma
from bsfa.policies import Policy

#: The backend's name on SGLang's command line.
NAME = "bsfa"

_logger = logging.getLogger("bsfa.sglang")

#: Forward modes of batches that extend sequences by whole chunks. Others: decode, speculative and diffusion steps.
_MODES = ("EXTEND", "MIXED")
#: Attributes of the dense backend's metadata that are not None where a batch has a mask of its own.
_MASKS = ("custom_mask", "image_token_ranges")


# ---- the KV pool as pages -------------------------------------------------------------------------------------------


def paged_view(buffer: Tensor, page_size: int, num_heads: int, head_dim: int) -> Tensor | None:
    """A layer's pool buffer as pages ``[num_pages, page_size, Hkv, D]``, a view; None for a layout of another kind.

    Taken: ``[slots, Hkv, D]`` with any strides, ``[slots, Hkv * D]``, and pages with heads first ``[num_pages, Hkv,
    page_size, D]``. Slots past the last whole page belong to no page.
    """
    if buffer.dim() == 2 and buffer.shape[1] == num_heads * head_dim:
        buffer = buffer.unflatten(1, (num_heads, head_dim))
    if buffer.dim() == 3 and tuple(buffer.shape[1:]) == (num_heads, head_dim):
        pages, slot = buffer.shape[0] // page_size, buffer.stride(0)
        return buffer.as_strided((pages, page_size, *buffer.shape[1:]), (slot * page_size, slot, *buffer.stride()[1:]))
    if buffer.dim() == 4 and tuple(buffer.shape[1:]) == (num_heads, page_size, head_dim):
        return buffer.transpose(1, 2)
    return None


@dataclass(frozen=True, eq=False)
class _Batch:
    """One pass of a batch through the layers: what it is recognised by, and what bsfa does with it."""

    batch: weakref.ref[Any]
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    plan: PrefillPlan


# ---- the backend ----------------------------------------------------------------------------------------------------


class _Layers:
    """The policies of a runner's layers, and why some layers are not for bsfa."""

    def __init__(self, runner: Any, config: ServingConfig) -> None:
        self.config = config
        self.device = torch.device(runner.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.size = parallel("attn_tp_rank", 0), parallel("attn_tp_size", 1)
        self.max_seqlen = int(runner.model_config.context_len)
        hf_config = runner.model_config.hf_config
        config.check_model(hf_config)
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        heads, kv_heads = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        # All of them now: a table that does not fit this rank's heads is to stop the server, not the first prompt.
        self.policies: dict[int, Policy | None] = {}
        for index in range(int(getattr(text, "num_hidden_layers", 0))):
            self.policy(index)
            if isinstance(heads, int) and isinstance(kv_heads, int):
                config.check_heads(index, heads // self.size, max(kv_heads // self.size, 1), self.rank, self.size)
        self._reasons: dict[tuple[Any, ...], str | None] = {}

    def policy(self, index: int) -> Policy | None:
        """The policy of a layer for this rank's heads; None is dense."""
        if index not in self.policies:
            self.policies[index] = self.config.layer_policy(index, self.rank, self.size, self.device)
        return self.policies[index]

    def reason(self, layer: Any, dtype: torch.dtype) -> str | None:
        """Why a layer with a policy is not for bsfa, by what the layer is; None if it is."""
        facts = (
            getattr(layer, "is_cross_attention", False),
            getattr(getattr(layer, "attn_type", None), "value", "decoder"),
            getattr(layer, "sliding_window_size", -1),
            getattr(layer, "use_irope", False),
            getattr(layer, "logit_capping_method", "tanh"),
            getattr(layer, "pos_encoding_mode", "NONE"),
            getattr(layer, "xai_temperature_len", -1),
            layer.head_dim,
            layer.v_head_dim,
            dtype,
        )
        key = (layer.layer_id, *facts)
        if key not in self._reasons:
            self._reasons[key] = self._find_reason(layer, *facts)
        return self._reasons[key]

    def _find_reason(
        self,
        layer: Any,
        cross: bool,
        kind: str,
        window: int | None,
        local: bool,
        capping: str,
        positions: str,
        temperature: int | None,
        head_dim: int,
        v_head_dim: int,
        dtype: torch.dtype,
    ) -> str | None:
        if cross:
            return "cross attention"
        if kind != "decoder":
            return f"attention of the type '{kind}' is not causal"
        if window is not None and window > -1:
            return "sliding-window layers bound their work already"
        if local:
            return "chunked local attention"
        if layer.logit_cap and capping != "tanh":
            return f"logits are capped by '{capping}', not by tanh"
        if positions != "NONE":
            return f"the positional encoding '{positions}' is part of attention"
        if temperature is not None and temperature > 0:
            return "logits are scaled by position"
        index = layer.layer_id
        self.config.check_heads(index, layer.tp_q_head_num, layer.tp_k_head_num, self.rank, self.size)
        return unsupported_reason(self.policy(index), self.device, dtype, head_dim, self.max_seqlen, v_head_dim)


def _speculates(batch: Any) -> bool:
    """Whether a batch is of a server with speculative decoding."""
    algorithm = getattr(batch, "spec_algorithm", None)
    none = algorithm is None or algorithm.is_none()
    return not none or getattr(batch, "spec_info", None) is not None


def _prompt_lens(batch: Any, count: int) -> Tensor | None:
    """How long the prompts of a batch's requests are in all their chunks, int32 on the device; None: it does not say.

    SGLang counts what a request has generated before it was retracted as part of its prompt, once a chunk gets there.
    """
    lengths = getattr(batch, "orig_seq_lens", None)
    if not isinstance(lengths, Tensor) or lengths.shape != (count,) or lengths.device != batch.seq_lens.device:
        return None
    return lengths.to(torch.int32)


def _accepts(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the keyword arguments that ``function`` takes; None: any."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


def _heads(q: Tensor, layer: Any) -> Tensor:
    """Queries ``[tokens, Hq, D]``; a view, unless rows lie apart in a way that has none."""
    return q.reshape(-1, layer.tp_q_head_num, layer.head_dim)


def _asks(value: Any) -> bool:
    """Whether an optional argument asks for anything."""
    return value is not None and value is not False


@functools.cache
def backend_class() -> type[Any]:
    """The class of the backend. Made when first asked for, since its base is SGLang's."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    class BsfaAttnBackend(AttentionBackend):
        """Prefill by bsfa where a policy applies, everything else by ``dense``, a backend of SGLang.

        dense: the dense backend. reasons: how often batches of a layer went to it because bsfa does not compute
        them, by reason. served: how many it computed.
        """

        def __init__(self, runner: Any, dense: Any, dense_name: str, config: ServingConfig | None = None) -> None:
            self.dense = dense
            self.dense_name = dense_name
            self.config = serving_config() if config is None else config
            self.reasons: Counter[str] = Counter()
            self.served = 0
            self.req_to_token_pool = runner.req_to_token_pool
            self.token_to_kv_pool = runner.token_to_kv_pool
            self.page_size = int(runner.page_size)
            self._unsuited = unsuited(runner)
            # A draft model has layers of its own, which the configuration does not describe.
            self._layers = None if getattr(runner, "is_draft_worker", False) else _Layers(runner, self.config)
            self._batch: _Batch | None = None
            self._last_layer = -1
            self._takes = _accepts(dense.forward_extend)
            _logger.info("bsfa: prefill attention, beside SGLang's backend '%s': %s", dense_name, self.config)

        def __getattr__(self, name: str) -> Any:
            # What models and runners look for beyond the base class is a matter of the dense backend.
            if name == "dense" or name.startswith("__"):
                raise AttributeError(name)
            return getattr(self.dense, name)

        # -- metadata and CUDA graphs: all batches may have layers for the dense backend --

        def init_forward_metadata(self, forward_batch: Any) -> None:
            """Metadata of the dense backend. bsfa plans a batch with its first layer."""
            self._batch = None
            self.dense.init_forward_metadata(forward_batch)

        def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
            """See :meth:`init_forward_metadata`."""
            self._batch = None
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

        def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
            """See :meth:`init_forward_metadata`."""
            self._batch = None
            self.dense.init_forward_metadata_in_graph(forward_batch)

        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            """Graphs are of decode steps, which the dense backend computes."""
            self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

        def get_cuda_graph_seq_len_fill_value(self) -> Any:
            """See :meth:`init_cuda_graph_state`."""
            return self.dense.get_cuda_graph_seq_len_fill_value()

        def shared_read_ends(self, fm: Any) -> Any:
            """The page table of a prefill is read with its first layer, whatever the dense backend says of its own."""
            return super().shared_read_ends(fm) if fm.name in _MODES else self.dense.shared_read_ends(fm)

        # -- forward --

        def forward_decode(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Any:
            """A decode step is dense: the dense backend's."""
            return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

        def forward_extend(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Any:
            """Attention of new tokens over their sequences' keys so far: ``[tokens, Hq * Dv]``.

            By bsfa if the layer has a policy and a request of the batch is for it, else by the dense backend.
            """
            if self._layers is None or self._layers.policy(layer.layer_id) is None:
                return self._run_dense(q, k, v, layer, forward_batch, save_kv_cache, kwargs)
            reason = self._reason(q, layer, forward_batch, kwargs)
            if reason is None:
                plan = self._plan(forward_batch, layer)
                if plan.sparse is None:  # all requests are short
                    return self._run_dense(q, k, v, layer, forward_batch, save_kv_cache, kwargs)
                return self._run(q, k, v, layer, forward_batch, save_kv_cache, plan)
            self.reasons[reason] += 1
            log_once(f"SGLang's backend '{self.dense_name}' computes prefill: {reason}", logger=_logger)
            return self._run_dense(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

        def _run_dense(
            self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, save_kv_cache: bool, kwargs: dict[str, Any]
        ) -> Any:
            if self._takes is not None:
                refused = [name for name, value in kwargs.items() if _asks(value) and name not in self._takes]
                if refused:
                    raise UnsupportedError(
                        f"layer {layer.layer_id} passes '{refused[0]}', which neither bsfa nor SGLang's backend "
                        f"'{self.dense_name}' can do: choose another --decode-attention-backend, which bsfa hands over "
                        "to, or another --prefill-attention-backend"
                    )
                kwargs = {name: value for name, value in kwargs.items() if name in self._takes}
            return self.dense.forward_extend(q, k, v, layer, batch, save_kv_cache=save_kv_cache, **kwargs)

        def _reason(self, q: Tensor, layer: Any, batch: Any, kwargs: dict[str, Any]) -> str | None:
            """Why this call is not for bsfa; None if it is. Reads nothing from the device."""
            if self._unsuited is not None:
                return self._unsuited
            mode = batch.forward_mode.name
            if mode not in _MODES:
                return f"a batch of the mode {mode} is not a plain prefill"
            for name, value in kwargs.items():
                if _asks(value):
                    return f"layers pass '{name}', which bsfa does not compute"
            assert self._layers is not None
            reason = self._layers.reason(layer, q.dtype) or self._batch_reason(q, layer, batch)
            if reason is None and q.is_cuda and torch.cuda.is_current_stream_capturing():
                reason = "a CUDA graph is being recorded, which would replay the lengths of one batch"
            return reason

        def _batch_reason(self, q: Tensor, layer: Any, batch: Any) -> str | None:
            if getattr(batch, "encoder_lens", None) is not None:
                return "encoder and decoder tokens share the KV cache"
            if getattr(batch, "multi_item_delimiter_indices", None) is not None:
                return "multi-item scoring has a mask of its own"
            if getattr(batch, "mha_return_lse", None):
                return "the caller wants the LSE"
            if getattr(self.dense, "fa_skip_kv_cache", False):
                return "an embedding model without KV cache"
            metadata = getattr(self.dense, "forward_metadata", None)
            if any(getattr(metadata, name, None) is not None for name in _MASKS):
                return "the batch has an attention mask of its own"
            lengths, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
            if lengths is None or prefixes is None:
                return "the batch has no lengths on the host"
            if batch.forward_mode.name == "MIXED" and _speculates(batch):
                return "with speculative decoding the lengths of a mixed batch are known on the device only"
            if not len(lengths) == len(prefixes) == batch.seq_lens.shape[0] == batch.req_pool_indices.shape[0]:
                return "the batch is padded with requests that have no lengths"
            if sum(lengths) > q.shape[0]:
                return "this rank has a part of the batch's queries only"
            keys, values = self._pages(layer)
            if keys is None or values is None:
                return f"the KV pool {type(self.token_to_kv_pool).__name__} is laid out in another way"
            if keys.dtype != q.dtype or values.dtype != q.dtype:
                kind = str(keys.dtype).removeprefix("torch.")
                return f"the KV cache is {kind}, queries are {str(q.dtype).removeprefix('torch.')}"
            if q.device.type != "cpu":
                try:
                    check_tma("attention", q=_heads(q, layer), k=keys, v=values)
                except UnsupportedError as error:
                    return str(error)
            return None

        def _pages(self, layer: Any) -> tuple[Tensor | None, Tensor | None]:
            """Keys and values of a layer as pages. Asked of the pool each time: it may wait for a transfer to end."""
            keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
            return (
                paged_view(keys, self.page_size, layer.tp_k_head_num, layer.head_dim),
                paged_view(values, self.page_size, layer.tp_v_head_num, layer.v_head_dim),
            )

        def _plan(self, batch: Any, layer: Any) -> PrefillPlan:
            """The plan of a batch, made with the first layer that asks and again when layers begin anew.

            Not with the metadata: with prefill graphs SGLang has other hooks for that, and one object for many batches.
            """
            lengths, prefixes = tuple(batch.extend_seq_lens_cpu), tuple(batch.extend_prefix_lens_cpu)
            now = self._batch
            known = now is not None and now.batch() is batch and (now.lengths, now.prefixes) == (lengths, prefixes)
            if now is None or not known or layer.layer_id <= self._last_layer:
                plan = self._make_plan(batch, lengths, prefixes)
                self._batch = now = _Batch(weakref.ref(batch), lengths, prefixes, plan)
            self._last_layer = layer.layer_id
            return now.plan

        def _make_plan(self, batch: Any, lengths: Sequence[int], prefixes: Sequence[int]) -> PrefillPlan:
            starts = [0]
            for n in lengths:
                starts.append(starts[-1] + n)
            lengths_k = [p + n for p, n in zip(prefixes, lengths, strict=True)]
            # A page's tokens have consecutive slots: every page_size-th entry names the page.
            slots = self.req_to_token_pool.req_to_token[:, : max(lengths_k, default=0) : self.page_size]
            slots = slots.index_select(0, batch.req_pool_indices)
            table = slots if self.page_size == 1 else torch.div(slots, self.page_size, rounding_mode="floor")
            cu_seqlens_q = torch.nn.functional.pad(batch.extend_seq_lens.cumsum(0), (1, 0)).to(torch.int32)
            return plan_prefill(
                table.to(torch.int32),
                cu_seqlens_q,
                batch.seq_lens.to(torch.int32),
                starts,
                lengths_k,
                self.config.min_seqlen,
                prompt_lens=_prompt_lens(batch, len(lengths)),
            )

        def _run(
            self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, save_kv_cache: bool, plan: PrefillPlan
        ) -> Tensor:
            if k is not None and save_kv_cache:
                k = k.view(-1, layer.tp_k_head_num, layer.head_dim)
                v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
                location = write_location(batch, layer)
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
            keys, values = self._pages(layer)
            assert keys is not None and values is not None and self._layers is not None
            queries = _heads(q, layer)
            shape = (queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
            out = getattr(batch, "_attn_output", None)  # SGLang's own, if it has one already
            if out is None or out.dtype != q.dtype or out.numel() != shape[0] * shape[1] * shape[2]:
                out = q.new_empty(shape)
            out = out.view(shape)
            run_prefill(
                plan,
                queries,
                keys,
                values,
                policy=self._layers.policy(layer.layer_id),
                out=out,
                softmax_scale=layer.scaling,
                softcap=float(layer.logit_cap or 0.0),
            )
            self.served += 1
            total = sum(batch.extend_seq_lens_cpu)
            if total < shape[0]:
                out[total:].zero_()  # rows that pad the batch
            return out.view(shape[0], -1)

    _forward_rest(BsfaAttnBackend, AttentionBackend)
    return BsfaAttnBackend


#: What is not forwarded: what the base class does by the methods above, and what SGLang notes on a backend.
_OWN = frozenset(
    {
        "forward",
        "resolve_prefill_shared_read_ends",
        "_snapshot_prefill_shared_reads",
        "prefill_attention_backend_str",
        "decode_attention_backend_str",
    }
)


def _forward_rest(kind: type[Any], base: type[Any]) -> None:
    """Let every attribute and method of ``base`` that ``kind`` does not define be the dense backend's.

    By listing them and not by name, since they come and go with SGLang's releases. Assignments go there too: SGLang
    keeps state like ``forward_metadata`` on backends.
    """
    for name in vars(base):
        if name.startswith("__") or name.startswith("_abc") or name in _OWN or name in vars(kind):
            continue

        def get(self: Any, name: str = name) -> Any:
            return getattr(self.dense, name)

        def put(self: Any, value: Any, name: str = name) -> None:
            setattr(self.dense, name, value)

        setattr(kind, name, property(get, put))


# ---- registration ---------------------------------------------------------------------------------------------------


def create_backend(runner: Any) -> Any:
    """The backend for a model runner, as SGLang's registry calls it.

    Raises ``ValueError`` for a configuration that does not fit the model, and :class:`bsfa.UnsupportedError` for what
    bsfa cannot serve at all: MLA, and prefill graphs that contain attention.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if getattr(runner, "use_mla_backend", False):
        raise UnsupportedError(
            "bsfa has no multi-head latent attention (MLA): choose another --prefill-attention-backend"
        )
    if records_prefill(runner):
        raise UnsupportedError(
            "bsfa cannot be part of a full prefill CUDA graph, which would replay one batch's lengths: start with "
            "--cuda-graph-backend-prefill breakable (or disabled)"
        )
    name = decoding_backend(runner, NAME)
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"SGLang has no attention backend '{name}' (it has {', '.join(sorted(ATTENTION_BACKENDS))})")
    return backend_class()(runner, ATTENTION_BACKENDS[name](runner), name)


def register() -> None:
    """The entry point ``sglang.srt.plugins``: make ``bsfa`` known to SGLang. Called in each of its processes.

    Also reads the configuration file, if there is one, so that a mistake in it is in the log before a model is loaded;
    the server then stops when it makes the backend.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(NAME)(create_backend)
    try:
        from sglang.srt.arg_groups import choices
    except ImportError:  # where releases before the argument groups have it
        from sglang.srt import server_args as choices
    if NAME not in getattr(choices, "ATTENTION_BACKEND_CHOICES", ()):
        choices.add_attention_backend_choices([NAME])
    if os.environ.get(ENVIRONMENT):
        try:
            serving_config()
        except ValueError as error:
            _logger.error("bsfa: %s", error)

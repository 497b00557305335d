"""The backend that vLLM loads: its own FlashAttention, except for the prefill of long prompts.

vLLM's FlashAttention classes are the base, so whatever this file does not speak of is theirs: the cache and its update,
decode and its CUDA graphs, quantised caches, windows, sinks, cascades, context parallelism. What is added:

* The builder looks, once per batch, for requests that a policy is for (long enough, and more than a decode step). If
  there are any, the batch is cut before the first: the requests in front get FlashAttention metadata of their own, the
  others a :class:`bsfa.integrations.serving.PrefillPlan`. vLLM puts decode steps in front (reorder_batch_threshold).
* A layer that has a policy runs the two parts; all other layers, and batches without such requests, are passed on.
  Why a layer or a batch is passed on although a policy is configured is logged, once per reason.

All decisions use lengths that vLLM has on the host: nothing waits for the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from bsfa.errors import UnsupportedError
from bsfa.integrations.serving import (
    PrefillPlan,
    log_once,
    plan_prefill,
    run_prefill,
    serving_config,
    unsupported_reason,
)
from bsfa.integrations.vllm import NAME, logger
from bsfa.policies import Policy

if FlashAttentionBackend.forward_includes_kv_cache_update:
    # A forward over a part of the batch would then write a part of the keys.
    raise UnsupportedError("this vLLM's FlashAttention fills the KV cache within forward: bsfa cannot run beside it")

#: Tokens of a cache page that are asked for where the user does not say: 16, vLLM's default, costs 15 % of attention.
PAGE_SIZE = 64

_PLAIN_CACHES = ("auto", "float16", "bfloat16")


def _note(reason: str) -> None:
    log_once(f"attention is vLLM's FlashAttention, dense, for {reason}", logger=logger)


def layer_index(name: str) -> int | None:
    """The decoder layer of an attention layer's name ("model.layers.3.self_attn.attn": 3); None if it is not clear."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(numbers) > 1:  # several modules in a layer
        numbers = [i for i in numbers if i > 0 and parts[i - 1] in ("layers", "h", "blocks")]
    return int(parts[numbers[0]]) if len(numbers) == 1 else None


@functools.cache
def _pair_dim() -> int | None:
    """Where a cache of five dimensions has its keys and its values; None: this vLLM has no such caches."""
    shape_of = getattr(FlashAttentionBackend, "get_kv_cache_shape", None)
    if shape_of is None:
        return None
    shape = tuple(shape_of(num_blocks=3, block_size=16, num_kv_heads=1, head_size=64))
    return shape.index(2) if shape in ((2, 3, 16, 1, 64), (3, 2, 16, 1, 64)) else None


def cache_views(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[pages, page_size, Hkv, D]`` of a layer's cache, as views.

    vLLM's versions have ``[2, pages, page_size, Hkv, D]``, then ``[pages, 2, page_size, Hkv, D]``, then
    ``[pages, Hkv, page_size, 2 D]`` with the keys first; each in several orders of memory, which only the strides show.
    """
    pair = _pair_dim()
    if pair is not None and kv_cache.dim() == 5 and kv_cache.shape[pair] == 2 and kv_cache.shape[-1] == head_size:
        k, v = kv_cache.unbind(pair)  # by vLLM's own word, since there may be two pages
    elif pair is None and kv_cache.dim() == 4 and kv_cache.shape[-1] == 2 * head_size:
        k, v = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    else:
        raise UnsupportedError(
            f"bsfa does not know a KV cache of shape {tuple(kv_cache.shape)} for head_size {head_size}: this vLLM is "
            "newer than this bsfa"
        )
    return k, v


def _rank() -> tuple[int, int]:
    """This process's rank among the tensor-parallel ones, and their number."""
    from vllm.distributed import parallel_state as state

    if not state.model_parallel_is_initialized():
        return 0, 1
    return state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()


@dataclass(frozen=True, eq=False)
class Split:
    """A batch in two parts. front: metadata of its first ``tokens`` rows, None if there are none; plan: of the others.

    replan: the plan over another block table with the same requests, from ``first`` on.
    """

    front: Any
    first: int
    tokens: int
    plan: PrefillPlan
    replan: Callable[[Tensor], PrefillPlan]


@dataclass
class BsfaMetadata(FlashAttentionMetadata):
    """FlashAttention's metadata of a batch with something for a policy. A field: vLLM copies metadata by fields."""

    bsfa: Split | None = None


class BsfaMetadataBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's metadata, and :class:`BsfaMetadata` for batches with something for a policy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bsfa = config = serving_config()
        self._decode_tokens = 1
        log_once(f"serving {config}", logging.INFO, logger)
        if config.dense:
            return
        config.check_model(self.vllm_config.model_config.hf_config)
        # Decode steps first, those that verify drafts among them.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._decode_tokens = self.reorder_batch_threshold or 1

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        """Graphs of decode steps; a prefill with a policy runs between the pieces of a graph."""
        support = super().get_cudagraph_support(*args, **kwargs)
        if serving_config().dense:
            return support
        return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda s: s.value)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Not with a policy, which chooses blocks of the common prefix too (older vLLM asks)."""
        return self._bsfa.dense and bool(super().use_cascade_attention(*args, **kwargs))

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's metadata of the whole batch, for layers without a policy, with the split for the others."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        split = self._split(common_prefix_len, common_attn_metadata)
        if split is None:
            return metadata
        return BsfaMetadata(**{f.name: getattr(metadata, f.name) for f in fields(metadata)}, bsfa=split)

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """The same batch in another group of layers: its pages, in the split too."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        split: Split | None = getattr(metadata, "bsfa", None)
        if split is not None:
            front = split.front
            if front is not None:
                pages, slots = blk_table[: split.first], slot_mapping[: split.tokens]
                front = super().update_block_table(front, pages, slots)
            updated.bsfa = Split(front, split.first, split.tokens, split.replan(blk_table), split.replan)
        return updated

    def _split(self, common_prefix_len: int, common: Any) -> Split | None:
        config = self._bsfa
        if config.dense or common.max_query_len <= self._decode_tokens or common.max_seq_len < config.min_seqlen:
            return None
        lengths = getattr(common, "seq_lens_cpu_upper_bound", None)
        if lengths is None:
            lengths = getattr(common, "_seq_lens_cpu", None)  # the property without underscore waits for the device
        reason = self._passed_on(common_prefix_len, common, lengths)
        if reason is not None:
            _note(reason)
            return None
        count = common.num_reqs
        assert lengths is not None
        starts: list[int] = common.query_start_loc_cpu[: count + 1].tolist()
        lengths_k: list[int] = lengths[:count].tolist()
        first = next(
            (
                i
                for i in range(count)
                if starts[i + 1] - starts[i] > self._decode_tokens and lengths_k[i] >= config.min_seqlen
            ),
            None,
        )
        if first is None:
            return None
        tokens = starts[first]
        cu_seqlens_q = common.query_start_loc[first : count + 1]
        plan = functools.partial(
            _plan,
            first=first,
            cu_seqlens_q=cu_seqlens_q - tokens if tokens else cu_seqlens_q,
            seqlens_k=common.seq_lens[first:count],
            starts=[s - tokens for s in starts[first:]],
            lengths_k=lengths_k[first:],
            min_seqlen=config.min_seqlen,
            decode_tokens=self._decode_tokens,
        )
        front = None
        if tokens:
            longest_q = max(starts[i + 1] - starts[i] for i in range(first))
            part = common.unpadded(tokens, first)
            part = part.replace(max_query_len=longest_q, max_seq_len=max(lengths_k[:first]))
            # fast_build: without a schedule made ahead, for which the builder has one buffer, taken by the whole batch.
            front = super().build(0, part, True)
        return Split(front, first, tokens, plan(common.block_table_tensor), plan)

    def _passed_on(self, common_prefix_len: int, common: Any, lengths: Tensor | None) -> str | None:
        """Why no policy can be for this batch."""
        if common_prefix_len > 0:
            return "batches with a cascade over a common prefix"
        if isinstance(common.causal, Tensor) or not common.causal:
            return "batches that are not causal"
        if getattr(self, "dcp_world_size", 1) > 1:
            return "decode context parallelism"
        if getattr(common, "mm_req_doc_ranges", None) is not None:
            return "batches with multimodal tokens that see each other (PrefixLM)"
        if getattr(common, "rswa_prefix_lens", None) is not None:
            return "reference sliding windows"
        if lengths is None:
            return "batches whose lengths are on the device only (asynchronous speculative decoding)"
        return None


def _plan(
    block_table: Tensor,
    *,
    first: int,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    starts: list[int],
    lengths_k: list[int],
    min_seqlen: int,
    decode_tokens: int,
) -> PrefillPlan:
    pages = block_table[first : first + len(lengths_k)]
    return plan_prefill(pages, cu_seqlens_q, seqlens_k, starts, lengths_k, min_seqlen, decode_tokens)


class BsfaImpl(FlashAttentionImpl):
    """One attention layer: FlashAttention's forward, or for a batch with a :class:`Split`, its two parts."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_heads if num_kv_heads is None else num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **others,
        )
        unknown = [name for name, value in others.items() if value is not None and value is not False]
        reasons = {
            "layers with ALiBi": alibi_slopes is not None,
            "layers with a sliding window": sliding_window is not None,
            f"a KV cache in {kv_cache_dtype}": kv_cache_dtype not in _PLAIN_CACHES,
            f"layers of type {attn_type}": attn_type != "decoder",
            f"layers with {', '.join(unknown)}": len(unknown) > 0,
            "decode context parallelism": getattr(self, "dcp_world_size", 1) > 1,
            "prefill context parallelism": getattr(self, "pcp_world_size", 1) > 1,
        }
        self._bsfa_reason = next((reason for reason, applies in reasons.items() if applies), None)
        self._bsfa_policy: Policy | None = None
        self._bsfa_resolved = False

    def _resolve(self, layer: Any, query: Tensor) -> None:
        """Find the layer's policy: at its first call, which is the profiling run, before there is any request.

        Raises ``ValueError`` if a configured policy does not fit the layer's heads.
        """
        self._bsfa_resolved = True
        config = serving_config()
        if config.dense:
            return
        index = layer_index(layer.layer_name)
        if index is not None and index in config.dense_layers:
            return
        reason = self._bsfa_reason
        if reason is None and index is None:
            reason = f"layer '{layer.layer_name}', whose number is not clear"
        if reason is None and config.thresholds is not None and index >= config.thresholds.num_layers:  # type: ignore[operator]
            reason = "layers beyond those of the threshold file (a draft model's?)"
        if reason is not None:
            _note(reason)
            return
        assert index is not None
        rank, size = _rank()
        config.check_heads(index, self.num_heads, self.num_kv_heads, rank, size)
        policy = config.layer_policy(index, rank, size, query.device)
        if policy is not None:
            why_not = unsupported_reason(policy, query.device, query.dtype, self.head_size)
            if why_not is not None:
                _note(f"all layers with head_size {self.head_size} in {query.dtype}: {why_not}")
                return
        self._bsfa_policy = policy

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor | None = None,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """vLLM's call: query [T, Hq, D]; the cache holds this batch's keys and values already; writes ``output``."""
        if not self._bsfa_resolved:
            self._resolve(layer, query)
        split: Split | None = getattr(attn_metadata, "bsfa", None)
        policy = self._bsfa_policy
        if policy is not None and split is not None and kv_cache.dtype != query.dtype:
            _note(f"queries in {query.dtype} over a KV cache in {kv_cache.dtype}")
            policy = None
        scaled = output_scale is not None or output_block_scale is not None  # which FlashAttention refuses by itself
        whole = functools.partial(super().forward, layer, query, key, value, kv_cache)
        if policy is None or split is None or output is None or scaled:
            passed: Tensor = whole(attn_metadata, output, output_scale, output_block_scale)
            return passed
        if split.front is not None:
            whole(split.front, output)
        k_cache, v_cache = cache_views(kv_cache, self.head_size)
        rows = slice(split.tokens, None)
        run_prefill(
            split.plan,
            query[rows],
            k_cache,
            v_cache,
            policy=policy,
            out=output.view(-1, self.num_heads, self.head_size)[rows],
            softmax_scale=self.scale,
            softcap=float(self.logits_soft_cap or 0.0),
        )
        return output


class BsfaBackend(FlashAttentionBackend):
    """The backend under its own name."""

    @staticmethod
    def get_name() -> str:
        """The name of this backend among vLLM's."""
        return NAME

    @staticmethod
    def get_impl_cls() -> type[BsfaImpl]:
        """What runs a layer."""
        return BsfaImpl

    @staticmethod
    def get_builder_cls() -> type[BsfaMetadataBuilder]:
        """What describes a batch."""
        return BsfaMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages of 64 tokens where the user does not say."""
        preferred: int = super().get_preferred_block_size(default_block_size)
        return preferred if serving_config().dense else max(preferred, PAGE_SIZE)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Not with a policy: a short prompt's kernel depends on whether a long one shares its batch."""
        return serving_config().dense and bool(super().supports_batch_invariance())

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Not with a policy: batches are cut by the lengths that the host has."""
        return serving_config().dense and bool(super().supports_device_cpu_query_lens_mismatch())

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """vLLM's reasons why this backend cannot run a model; a configuration file that cannot be used is one."""
        try:
            serving_config()
        except ValueError as error:  # the other checks ask for the configuration too
            return [f"bsfa: {error}"]
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        return reasons


class CustomBackend(BsfaBackend):
    """The same under the name that vLLM keeps for backends from outside."""

    @staticmethod
    def get_name() -> str:
        """The name of this backend among vLLM's."""
        return "CUSTOM"

"""What bsfa asks of SGLang: of its processes, a model runner and its KV pool. Of features, never of its version: what
has another name or place in some releases is looked for in each.

SGLang is imported when a function here is called, not with this module.
"""

from __future__ import annotations

from typing import Any

import torch


def parallel(name: str, default: int) -> int:
    """A number of the process's place among the ranks (``attn_tp_rank``, ``attn_cp_size`` ...)."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:
        pass
    else:
        try:
            return int(getattr(get_parallel(), name))
        except AttributeError:
            return default
    from sglang.srt.layers import dp_attention  # where releases before the runtime context have it

    old = getattr(dp_attention, name.replace("attn_", "get_attention_"), None)
    return default if old is None else int(old())


def write_location(forward_batch: Any, layer: Any) -> Any:
    """Where a full-attention layer's new keys belong, as ``set_kv_buffer`` of this SGLang wants it."""
    try:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    except ImportError:
        return forward_batch.out_cache_loc
    if hasattr(KVWriteLoc, "for_layer"):
        return KVWriteLoc.for_layer(forward_batch, layer)
    return KVWriteLoc(forward_batch.out_cache_loc)


def _default_dense(runner: Any) -> str:
    """Name of the dense backend where the command line names no other than bsfa."""
    device = torch.device(runner.device)
    if device.type != "cuda":
        return "torch_native"
    return "fa3" if torch.cuda.get_device_capability(device)[0] in (8, 9) else "flashinfer"


def decoding_backend(runner: Any, own: str) -> str:
    """The backend that decodes, if that is not ``own``, the one that asks."""
    name = getattr(runner, "decode_attention_backend_str", None)
    if name is None:  # set on the arguments before it was on the runner
        arguments = getattr(runner, "server_args", None)
        name = getattr(arguments, "decode_attention_backend", None) or getattr(arguments, "attention_backend", None)
    return _default_dense(runner) if name in (None, own) else str(name)


def records_prefill(runner: Any) -> bool:
    """Whether whole prefill forwards are recorded in CUDA graphs, attention included."""
    graphs = getattr(getattr(runner, "server_args", None), "cuda_graph_config", None)
    try:
        from sglang.srt.runtime_context import get_exec

        graphs = get_exec().graph.cuda_graph_config  # what SGLang made of the arguments
    except (ImportError, AttributeError):  # releases before the runtime context
        pass
    backend = getattr(getattr(graphs, "prefill", None), "backend", None)
    return str(getattr(backend, "value", backend)).lower() == "full"


def unsuited(runner: Any) -> str | None:
    """Why no batch of this runner is for bsfa; None if some may be."""
    if getattr(runner, "is_draft_worker", False):
        return "this is the draft model of speculative decoding; policies are for the target model"
    if parallel("attn_cp_size", 1) > 1:
        return "context parallelism splits the sequence over ranks"
    if parallel("attn_dcp_size", 1) > 1:
        return "decode context parallelism splits the KV cache over ranks"
    if getattr(getattr(runner, "kv_index_translator", None), "is_translating", False):
        return "the unified memory pool numbers KV slots in another way than req_to_token"
    pool = runner.token_to_kv_pool
    if any(kind.__name__.startswith("PageInterleave") for kind in type(pool).__mro__):
        return "the KV pool is sharded by pages"
    inner = getattr(pool, "full_kv_pool", pool)  # of pools that keep several kinds of layers
    if getattr(inner, "is_quantized_kv_cache", False):
        return "the KV cache is quantized"
    return None

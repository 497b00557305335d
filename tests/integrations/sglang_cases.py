"""Contract cases for the SGLang backend, run with SGLang's own Python files and no GPU; see test_sglang_contract.py.

``sglang_stubs.install()`` goes before the import of this file; :func:`main` runs every case_* function (or those named
on the command line) and prints one JSON object: name -> error text or null. The pools, the layers, the batches, the
hybrid backend and the dense backend (``torch_native``) are SGLang's.

``BSFA_CASES_DEVICE=cuda`` runs them with the CUDA kernels: bfloat16, blocks of 128 tokens, prompts eight times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.srt import plugins
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.cuda_graph_config import Phase, default_cuda_graph_config, with_phase
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import build_attention_backends
from sglang.srt.runtime_context import get_context, get_exec, get_parallel
from sglang.srt.server_args import ServerArgs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import bsfa
from bsfa import _library, limits
from bsfa.integrations import sglang as backend_module
from bsfa.integrations._sglang_runner import unsuited
from bsfa.integrations.serving import ServingConfig
from bsfa.policies import RelativeMax

DEVICE = os.environ.get("BSFA_CASES_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
DTYPE = torch.float32 if ON_CPU else torch.bfloat16
HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 64, 2
BLOCK = 16 if ON_CPU else 128
UNIT = BLOCK // 16  # what lengths below are multiplied with
SCALE = 0.17  # not the default of either side
RELATIVE = f"""
min_seqlen = 0
[policy]
name = "RelativeMax"
alpha = ALPHA
sink_blocks = 0
window_blocks = 1
last_tiles = 0
block_m = {BLOCK}
block_n = {BLOCK}
"""
STATIC = f"""
min_seqlen = {48 * UNIT}
[policy]
name = "StaticPattern"
sink_blocks = 1
window_blocks = 2
block_m = {BLOCK}
block_n = {BLOCK}
"""


# ---- a server without a model ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def published(rank: int = 0, size: int = 1, **arguments: Any) -> Iterator[None]:
    """SGLang's process-wide settings, as they are once a server has started."""
    arguments = {"prefill_attention_backend": "bsfa", "decode_attention_backend": "torch_native", **arguments}
    place = {"attn_tp_rank": rank, "attn_tp_size": size, "tp_size": size, "moe_tp_size": size}
    with get_context().override_server_args(**arguments), get_parallel().override(**place):
        yield


@contextlib.contextmanager
def configuration(text: str | None) -> Iterator[None]:
    """``BSFA_CONFIG`` naming a file with this text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bsfa.toml"
        os.environ.pop("BSFA_CONFIG", None)
        if text is not None:
            path.write_text(text)
            os.environ["BSFA_CONFIG"] = str(path)
        try:
            yield
        finally:
            os.environ.pop("BSFA_CONFIG", None)


def make_runner(page_size: int = 1, dtype: torch.dtype = DTYPE, **changes: Any) -> SimpleNamespace:
    """What of a ModelRunner backends look at, with real pools."""
    size = 2048 * UNIT
    pool = MHATokenToKVPool(
        size=size,
        page_size=page_size,
        dtype=dtype,
        head_num=changes.pop("kv_heads", KV_HEADS),
        head_dim=changes.pop("head_dim", DIM),
        v_head_dim=changes.pop("v_head_dim", None),
        layer_num=LAYERS,
        device=DEVICE,
        enable_memory_saver=False,
    )
    requests = ReqToTokenPool(size=8, max_context_len=512 * UNIT, device=DEVICE, enable_memory_saver=False)
    hf_config = LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    config = SimpleNamespace(
        context_len=512 * UNIT, hf_config=hf_config, hf_text_config=hf_config, attention_arch=None, quantization=None
    )
    config.linear_attn_registry_result = None
    facts: dict[str, Any] = {
        "device": DEVICE,
        "page_size": page_size,
        "kv_cache_dtype": dtype,
        "req_to_token_pool": requests,
        "token_to_kv_pool": pool,
        "model_config": config,
        "server_args": SimpleNamespace(),
        "kv_index_translator": None,
        "prefill_attention_backend_str": "bsfa",
        "decode_attention_backend_str": "torch_native",
        "draft_attention_backend": None,
        "use_mla_backend": False,
        "is_draft_worker": False,
    }
    return SimpleNamespace(**{**facts, **changes})


def make_layer(index: int = 0, heads: int = HEADS, kv_heads: int = KV_HEADS, **changes: Any) -> RadixAttention:
    return RadixAttention(heads, changes.pop("head_dim", DIM), SCALE, kv_heads, index, **changes)


class Request:
    """A sequence of ``prefix`` units of tokens in the cache and ``new`` ones (1: one token), with one layer's data."""

    def __init__(
        self,
        prefix: int,
        new: int,
        seed: int,
        heads: int = HEADS,
        kv_heads: int = KV_HEADS,
        dim: int = DIM,
        dim_v: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.prefix, self.new, self.row = prefix * UNIT, new * UNIT if new > 1 else 1, -1
        total = self.prefix + self.new
        shapes = ((total, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim if dim_v is None else dim_v))
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        k += torch.randn(-(-total // BLOCK), 1, dim, generator=generator).repeat_interleave(BLOCK, 0)[:total] / 2
        self.q, self.k, self.v = (t.to(DEVICE, DTYPE) for t in (3 * q, k, v))  # blocks of keys that differ
        self.slots = torch.empty(0, dtype=torch.int64)


class Server:
    """One backend, with requests that are placed in scattered pages of its pool."""

    def __init__(self, page_size: int = 1, text: str | None = STATIC, **changes: Any) -> None:
        self.runner = make_runner(page_size, **changes)
        with configuration(text):
            self.backend = backend_module.create_backend(self.runner)
        self.page_size = page_size
        order = torch.randperm(2048 * UNIT // page_size - 1, generator=torch.Generator().manual_seed(7)) + 1
        self.free = order.tolist()
        self.rows = list(range(1, 8))

    def place(self, request: Request, layer: int = 0) -> None:
        """Give a request pages and a row of the table, and its cached part its keys."""
        total = request.prefix + request.new
        pages = [self.free.pop() for _ in range(-(-total // self.page_size))]
        slots = torch.tensor([p * self.page_size + i for p in pages for i in range(self.page_size)], device=DEVICE)
        request.slots, request.row = slots[:total], self.rows.pop()
        self.runner.req_to_token_pool.req_to_token[request.row].fill_(2**30)  # reading past the end would not do
        self.runner.req_to_token_pool.req_to_token[request.row, :total] = request.slots.to(torch.int32)
        for index in range(LAYERS):
            keys, values = self.runner.token_to_kv_pool.get_kv_buffer(index)
            keys[request.slots] = math.nan if keys.dtype.is_floating_point else 0  # until they are saved
            keys[request.slots[: request.prefix]] = request.k[: request.prefix].to(keys.dtype)
            values[request.slots[: request.prefix]] = request.v[: request.prefix].to(values.dtype)

    def batch(self, requests: list[Request], mode: ForwardMode, **changes: Any) -> ForwardBatch:
        """The batch of the requests' new tokens, as SGLang's scheduler fills it."""
        lengths, prefixes = [r.new for r in requests], [r.prefix for r in requests]
        totals = [a + b for a, b in zip(lengths, prefixes, strict=True)]
        fields: dict[str, Any] = {
            "forward_mode": mode,
            "batch_size": len(requests),
            "input_ids": torch.zeros(sum(lengths), dtype=torch.int64, device=DEVICE),
            "req_pool_indices": torch.tensor([r.row for r in requests], device=DEVICE),
            "seq_lens": torch.tensor(totals, device=DEVICE),
            "seq_lens_cpu": torch.tensor(totals),
            "out_cache_loc": torch.cat([r.slots[r.prefix : r.prefix + r.new] for r in requests]),
            "seq_lens_sum": sum(totals),
        }
        if mode != ForwardMode.DECODE:
            fields["extend_seq_lens"] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
            fields["extend_prefix_lens"] = torch.tensor(prefixes, dtype=torch.int32, device=DEVICE)
            fields["extend_seq_lens_cpu"], fields["extend_prefix_lens_cpu"] = lengths, prefixes
            fields["extend_num_tokens"] = sum(lengths)
        return ForwardBatch(**{**fields, **changes})

    def run(
        self,
        requests: list[Request],
        mode: ForwardMode = ForwardMode.EXTEND,
        layer: RadixAttention | None = None,
        batch: ForwardBatch | None = None,
        backend: Any = None,
        metadata: bool = True,
        **options: Any,
    ) -> list[Tensor]:
        """Outputs [new, Hq, D] of each request, by the way that a model takes through ``backend.forward``."""
        backend = self.backend if backend is None else backend
        layer = make_layer() if layer is None else layer
        batch = self.batch(requests, mode) if batch is None else batch
        if metadata:
            backend.init_forward_metadata(batch)
        q, k, v = (
            torch.cat([getattr(r, name)[r.prefix : r.prefix + r.new] for r in requests]) for name in ("q", "k", "v")
        )
        out = backend.forward(q=q.flatten(1), k=k, v=v, layer=layer, forward_batch=batch, **options)
        assert out.shape == (q.shape[0], q.shape[1] * v.shape[2]), out.shape
        return list(out.view(*q.shape[:2], v.shape[2]).split([r.new for r in requests]))


def reference(
    request: Request, sparse: bool, softcap: float = 0.0, sink: int = 1, window: int = 2, scale: float = SCALE
) -> Tensor:
    """Attention of a request's new tokens in plain torch, row by row; STATIC's blocks if ``sparse``."""
    rows = []
    q, k, v = (getattr(request, name).float().cpu() for name in ("q", "k", "v"))
    group = request.q.shape[1] // request.k.shape[1]
    for position in range(request.prefix, request.prefix + request.new):
        keep = torch.arange(position + 1)
        if sparse:
            blocks = keep // BLOCK
            keep = keep[(blocks < sink) | (blocks > position // BLOCK - window)]
        heads = []
        for head in range(request.q.shape[1]):
            logits = k[keep, head // group] @ q[position, head] * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            heads.append(torch.softmax(logits, 0) @ v[keep, head // group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def close(a: Tensor, b: Tensor) -> None:
    tolerance = 2e-5 if ON_CPU else 3e-2
    torch.testing.assert_close(a.float().cpu(), b.float().cpu(), rtol=tolerance, atol=tolerance)


def far(a: Tensor, b: Tensor) -> None:
    """The two are told apart by :func:`close`."""
    assert float((a.float().cpu() - b.float().cpu()).abs().max()) > 0.1


def raises(kind: type[Exception], words: str, function: Any, *arguments: Any, **options: Any) -> None:
    try:
        function(*arguments, **options)
    except kind as error:
        assert words in str(error), f"'{words}' is not in: {error}"
        return
    raise AssertionError(f"no {kind.__name__} with '{words}'")


def mixed_requests() -> list[Request]:
    """A long prompt, a decode step, a prompt with a cached prefix, and a short one."""
    return [Request(0, 100, 1), Request(70, 1, 2), Request(64, 45, 3), Request(0, 20, 4)]


# ---- cases ----------------------------------------------------------------------------------------------------------


def case_entry_point_registers() -> None:
    assert "bsfa" not in ATTENTION_BACKENDS and "bsfa" not in ATTENTION_BACKEND_CHOICES
    plugins.load_plugins()  # by the entry point of the installed package
    assert ATTENTION_BACKENDS["bsfa"] is backend_module.create_backend
    backend_module.register()  # in a process that has it already
    assert ATTENTION_BACKEND_CHOICES.count("bsfa") == 1


def case_command_line_takes_it() -> None:
    backend_module.register()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    words = ["--model-path", "x", "--prefill-attention-backend", "bsfa", "--decode-attention-backend", "fa3"]
    arguments = parser.parse_args(words)
    assert (arguments.prefill_attention_backend, arguments.decode_attention_backend) == ("bsfa", "fa3")


def case_signatures_fit_the_base_class() -> None:
    kind = backend_module.backend_class()
    for name, theirs in inspect.getmembers(AttentionBackend, inspect.isfunction):
        if name.startswith("__"):
            continue
        mine = inspect.getattr_static(kind, name)
        if isinstance(mine, property) or mine is theirs:
            continue
        expected = list(inspect.signature(theirs).parameters.values())
        found = list(inspect.signature(mine).parameters.values())
        assert [p.name for p in found] == [p.name for p in expected], (name, found)
        assert [p.default for p in found] == [p.default for p in expected], (name, found)
    for name in ("init_forward_metadata", "forward_extend", "forward_decode", "init_cuda_graph_state"):
        assert name in vars(kind), name


def case_everything_else_is_the_dense_backends() -> None:
    with published():
        backend = Server().backend
    assert type(backend.dense) is TorchNativeAttnBackend and isinstance(backend, AttentionBackend)
    explicit = {n for n, value in vars(type(backend)).items() if not isinstance(value, property)}
    inherited = {"forward", "resolve_prefill_shared_read_ends", "_snapshot_prefill_shared_reads"}
    stamped = {"prefill_attention_backend_str", "decode_attention_backend_str"}
    names = {n for n in vars(AttentionBackend) if not n.startswith(("__", "_abc"))} - explicit - inherited - stamped
    assert len(names) > 20 and {"needs_cpu_seq_lens", "get_fused_kv_write_buffers", "verify_mask"} <= names
    backend.dense = SimpleNamespace(**{name: object() for name in names})
    assert all(getattr(backend, name) is getattr(backend.dense, name) for name in names)
    with published():
        backend = Server().backend
    assert backend.support_triton() is False  # torch_native's answer, not the base class's
    backend.forward_metadata = "state"
    assert backend.dense.forward_metadata == "state"
    backend.dense.of_this_backend_only = 5
    assert backend.of_this_backend_only == 5
    assert not hasattr(backend, "of_no_backend")
    # The page table is read late, whatever the dense backend says of its own reads.
    backend.dense.shared_read_ends = lambda mode: SharedReadEnds.PRE_REPLAY
    assert backend.shared_read_ends(ForwardMode.EXTEND) == SharedReadEnds.UNKNOWN
    assert backend.shared_read_ends(ForwardMode.DECODE) == SharedReadEnds.PRE_REPLAY


def case_hybrid_routing() -> None:
    """SGLang's own construction: prefill by bsfa, decode by the other backend, which bsfa hands over to as well."""
    backend_module.register()
    with published():
        server = Server()
        with configuration(STATIC):
            built = build_attention_backends(model_runner=server.runner).attn_backend
    assert type(built) is HybridAttnBackend, type(built)
    prefill, decode = built.prefill_backend, built.decode_backend
    assert type(prefill) is backend_module.backend_class() and type(decode) is TorchNativeAttnBackend
    assert prefill.dense_name == "torch_native"
    request = Request(0, 100, 5)
    server.place(request)
    (out,) = server.run([request], backend=built)
    close(out, reference(request, sparse=True))
    assert prefill.served == 1 and not prefill.reasons
    step = Request(99, 1, 6)
    server.place(step)
    (out,) = server.run([step], ForwardMode.DECODE, backend=built)
    close(out, reference(step, sparse=False))
    assert prefill.served == 1


def case_bsfa_for_decode_too() -> None:
    backend_module.register()
    with published(decode_attention_backend="bsfa"):
        server = Server(decode_attention_backend_str="bsfa")
        with configuration(STATIC):
            built = build_attention_backends(model_runner=server.runner).attn_backend
    assert type(built) is backend_module.backend_class() and built.dense_name == "torch_native"
    assert built.prefill_attention_backend_str == "bsfa"
    step = Request(99, 1, 6)
    server.place(step)
    (out,) = server.run([step], ForwardMode.DECODE, backend=built)
    close(out, reference(step, sparse=False))


def case_mixed_batch_equals_each_request_alone() -> None:
    for page_size in (1, 16):
        with published():
            server, alone = Server(page_size), Server(page_size)
        requests = mixed_requests()
        for r in requests:
            server.place(r)
        outputs = server.run(requests, ForwardMode.MIXED)
        assert server.backend.served == 1 and not server.backend.reasons
        for r, out in zip(requests, outputs, strict=True):
            sparse = r.new > 1 and r.prefix + r.new >= 48 * UNIT
            close(out, reference(r, sparse))
            alone.place(r)
            (single,) = alone.run([r], ForwardMode.EXTEND if r.new > 1 else ForwardMode.DECODE)
            if sparse:
                assert torch.equal(out, single), f"page_size {page_size}, prefix {r.prefix}"
            else:
                close(out, single)
        far(reference(requests[0], True), reference(requests[0], False))  # the policy does something here


def case_calibrated_kind_of_policy() -> None:
    """A score of queries and keys over the pool equals the same policy over the tokens themselves."""
    with published():
        server = Server(16, RELATIVE.replace("ALPHA", "0.6"))
    requests = mixed_requests()
    for r in requests:
        server.place(r)
    outputs = server.run(requests, ForwardMode.MIXED)
    for r, out in zip(requests, outputs, strict=True):
        q, k, v = r.q[r.prefix :].unsqueeze(0), r.k.unsqueeze(0), r.v.unsqueeze(0)
        options = {"sink_blocks": 0, "window_blocks": 1, "last_tiles": 0, "block_m": BLOCK, "block_n": BLOCK}
        policy = RelativeMax(alpha=0.6, **options) if r.new > 1 else None
        expected, info = bsfa.attention(q, k, v, policy=policy, softmax_scale=SCALE, return_info=True)
        close(out, expected[0])
        if r.prefix == 0 and policy is not None and r.new > 48 * UNIT:
            assert 0.1 < float(info.density()) < 0.9, info.density()


def case_chunks_equal_the_whole() -> None:
    text = STATIC.replace(f"min_seqlen = {48 * UNIT}", "min_seqlen = 0")
    whole = Request(0, 150, 8)
    with published():
        server = Server(16, text)
    server.place(whole)
    (expected,) = server.run([whole])
    parts = Request(0, 150, 8)
    server.place(parts)
    outputs = []
    for begin, end in ((0, 64), (64, 128), (128, 150)):
        parts.prefix, parts.new = begin * UNIT, (end - begin) * UNIT
        outputs += server.run([parts])
    assert torch.equal(torch.cat(outputs), expected)
    close(expected, reference(whole, sparse=True))


def case_last_tiles_are_at_the_end_of_the_prompt() -> None:
    """SGLang tells of each chunk how long its prompt is: chunks give what the whole prompt does."""
    text = RELATIVE.replace("ALPHA", "0.9").replace("last_tiles = 0", "last_tiles = 1")
    whole, parts = Request(0, 150, 8), Request(0, 150, 8)
    with published():
        server = Server(16, text)
    for r in (whole, parts):
        server.place(r)
    (expected,) = server.run([whole])
    outputs: dict[bool, list[Tensor]] = {True: [], False: []}
    lengths = torch.tensor([150 * UNIT], dtype=torch.int32, device=DEVICE)
    for begin, end in ((0, 64), (64, 128), (128, 150)):
        parts.prefix, parts.new = begin * UNIT, (end - begin) * UNIT
        for told in (True, False):
            batch = server.batch([parts], ForwardMode.EXTEND, orig_seq_lens=lengths if told else None)
            outputs[told] += server.run([parts], batch=batch)
    assert torch.equal(torch.cat(outputs[True]), expected)
    assert not torch.equal(torch.cat(outputs[False]), expected)
    # A ForwardBatch of another size than its lengths, as padding leaves it, says nothing.
    batch = server.batch([parts], ForwardMode.EXTEND, orig_seq_lens=lengths.expand(2).contiguous())
    assert torch.equal(server.run([parts], batch=batch)[0], outputs[False][-1])
    # What SGLang's scheduler fills it with.
    scheduled = inspect.getsource(ScheduleBatch.prepare_for_extend).splitlines()
    (line,) = (x for x in scheduled if "orig_seq_lens = [" in x)
    assert "max(" in line and "len(r.origin_input_ids)" in line


def case_layers_of_one_pass_share_a_plan() -> None:
    with published():
        server = Server(16)
    plans = []
    make = server.backend._make_plan
    server.backend._make_plan = lambda *a: plans.append(1) or make(*a)
    first, second, third = Request(0, 100, 9), Request(0, 120, 10), Request(0, 120, 26)
    for r in (first, second, third):
        server.place(r)
    batch = server.batch([first], ForwardMode.EXTEND)
    for index in range(LAYERS):
        (out,) = server.run([first], layer=make_layer(index), batch=batch, metadata=index == 0)
        close(out, reference(first, sparse=True))
    assert len(plans) == 1
    # The same object with another batch in it, and no hook called: prefill graphs may do so.
    for request, index in ((first, 0), (second, 1), (third, 0)):
        for name, value in vars(server.batch([request], ForwardMode.EXTEND)).items():
            setattr(batch, name, value)
        (out,) = server.run([request], layer=make_layer(index), batch=batch, metadata=False)
        close(out, reference(request, sparse=True))
    assert len(plans) == 4


def case_planning_waits_for_no_device() -> None:
    """Nothing is read back: on a GPU each such read would be a synchronisation."""

    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "local_scalar" not in str(function) and "nonzero" not in str(function), str(function)
            return function(*args, **(kwargs or {}))

    with published():
        server = Server(16)
    requests = mixed_requests()
    for r in requests:
        server.place(r)
    batch = server.batch(requests, ForwardMode.MIXED)
    layer = make_layer()
    with Forbid():
        assert server.backend._reason(requests[0].q.new_empty(165 * UNIT + 1, HEADS * DIM), layer, batch, {}) is None
        plan = server.backend._plan(batch, layer)
    assert plan.sparse is not None and plan.dense is not None
    assert plan.everything.max_seqlen_k == 109 * UNIT and plan.everything.block_table.shape == (4, -(-109 * UNIT // 16))


def case_softcap() -> None:
    request = Request(0, 100, 11)
    with published():
        server = Server()
    server.place(request)
    (out,) = server.run([request], layer=make_layer(logit_cap=2.0))
    close(out, reference(request, sparse=True, softcap=2.0))
    far(out, reference(request, sparse=True))


def case_keys_are_saved_where_asked() -> None:
    request = Request(32, 68, 12)
    with published():
        server = Server(16)
    server.place(request)
    keys, values = server.runner.token_to_kv_pool.get_kv_buffer(1)
    layer = make_layer(1)
    server.run([request], layer=layer)
    assert torch.equal(keys[request.slots], request.k) and torch.equal(values[request.slots], request.v)
    assert bool(
        server.runner.token_to_kv_pool.get_kv_buffer(0)[0][request.slots[request.prefix :]].isnan().all()
    )  # another layer
    before = keys.clone()
    other = Request(32, 68, 12)
    other.slots, other.row, other.k = request.slots, request.row, request.k + 1
    (out,) = server.run([other], layer=layer, save_kv_cache=False)
    assert torch.equal(keys, before)
    close(out, reference(request, sparse=True))
    assert server.backend.served == 2


def case_heads_first_pool() -> None:
    """Pages with heads before tokens, and a pool that interleaves layers: views with other strides."""
    for page_size in (1, 16):
        slots = torch.randn(64, KV_HEADS, DIM)
        pages = slots.view(-1, page_size, KV_HEADS, DIM)
        assert torch.equal(backend_module.paged_view(slots, page_size, KV_HEADS, DIM), pages)
        heads_first = pages.transpose(1, 2).contiguous()
        assert torch.equal(backend_module.paged_view(heads_first, page_size, KV_HEADS, DIM), pages)
        wide = torch.randn(64, 3, KV_HEADS, DIM)
        view = backend_module.paged_view(wide[:, 1], page_size, KV_HEADS, DIM)
        assert torch.equal(view, wide[:, 1].reshape(pages.shape)) and view.data_ptr() == wide[:, 1].data_ptr()
        assert torch.equal(backend_module.paged_view(slots.flatten(1), page_size, KV_HEADS, DIM), pages)
    assert backend_module.paged_view(torch.zeros(64, 1, 576), 1, KV_HEADS, DIM) is None


def case_own_output_and_padding() -> None:
    """SGLang may bring the output, and rows beyond the batch's tokens."""
    request = Request(0, 100, 13)
    with published():
        server = Server()
    server.place(request)
    batch = server.batch([request], ForwardMode.EXTEND)
    batch._attn_output = torch.full_like(request.q.flatten(1), math.nan)
    (out,) = server.run([request], batch=batch)
    assert out.data_ptr() == batch._attn_output.data_ptr()
    close(out, reference(request, sparse=True))
    batch = server.batch([request], ForwardMode.EXTEND)
    server.backend.init_forward_metadata(batch)
    q = torch.cat([request.q, torch.full_like(request.q[:4], math.nan)]).flatten(1)
    padded = server.backend.forward_extend(q, None, None, make_layer(), batch)
    close(padded[:-4].view(request.q.shape), reference(request, sparse=True))
    assert bool((padded[-4:] == 0).all())


def case_tensor_parallel_slices() -> None:
    """Each rank uses the thresholds of its own heads."""
    values = [0.2, 0.9, 0.5, 0.7]
    text = RELATIVE.replace("ALPHA", str(values))
    full = Request(0, 100, 14)
    with published():
        server = Server(text=text)
    server.place(full)
    (expected,) = server.run([full])
    for rank in range(2):
        part = Request(0, 100, 14)
        heads, kv_heads = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        part.q, part.k, part.v = part.q[:, heads], part.k[:, kv_heads], part.v[:, kv_heads]
        with published(rank, 2):
            server = Server(text=text, kv_heads=1)
        server.place(part)
        (out,) = server.run([part], layer=make_layer(heads=2, kv_heads=1))
        assert torch.equal(out, expected[:, heads]), rank
    with published(0, 3):
        raises(ValueError, "cannot divide", Server, text=text)


def case_dense_layers_and_short_batches() -> None:
    with published():
        server = Server(text=STATIC.replace("[policy]", "dense_layers = [0]\n[policy]"))
    request = Request(0, 100, 15)
    server.place(request)
    (out,) = server.run([request], layer=make_layer(0))
    close(out, reference(request, sparse=False))
    assert server.backend.served == 0
    (out,) = server.run([request], layer=make_layer(1))
    close(out, reference(request, sparse=True))
    assert server.backend.served == 1
    short = Request(0, 47, 16)
    server.place(short)
    (out,) = server.run([short], layer=make_layer(1))
    close(out, reference(short, sparse=False))
    assert server.backend.served == 1 and not server.backend.reasons  # asked for, nothing to explain


def case_layers_it_does_not_compute() -> None:
    """Each goes to the dense backend, for a reason that is counted, and with the dense backend's result."""
    cases = [
        ({"sliding_window_size": 24}, "sliding-window"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "not causal"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "not causal"),
        ({"use_irope": True}, "local attention"),
        ({"pos_encoding_mode": "ALIBI"}, "positional encoding"),
        ({"logit_cap": 30.0, "logit_capping_method": "sigmoid"}, "capped by"),
    ]
    for changes, words in cases:
        with published():
            server = Server()
        seen = []
        server.backend.dense.forward_extend = lambda q, *a, seen=seen, **o: seen.append(o) or torch.zeros_like(q)
        request = Request(0, 100, 17)
        server.place(request)
        server.run([request], layer=make_layer(**changes), save_kv_cache=False)
        assert len(seen) == 1 and seen[0]["save_kv_cache"] is False, changes
        assert server.backend.served == 0 and len(server.backend.reasons) == 1
        assert words in next(iter(server.backend.reasons)), server.backend.reasons
    with published():
        server = Server()
    request = Request(0, 100, 18)
    server.place(request)
    (out,) = server.run([request], layer=make_layer(sliding_window_size=24))
    far(out, reference(request, sparse=False))  # the window was honoured, by torch_native


def case_a_pool_of_full_and_window_layers() -> None:
    """Models that alternate the two keep them in one pool of two: full layers by bsfa, the others by the dense one."""
    size = 2048 * UNIT
    common = {"head_num": KV_HEADS, "head_dim": DIM, "device": DEVICE, "dtype": DTYPE, "page_size": 16}
    pool = SWAKVPool(size=size, size_swa=size, full_attention_layer_ids=[0], swa_attention_layer_ids=[1], **common)
    pool.register_mapping(torch.arange(size + 17, device=DEVICE))
    with published():
        server = Server(16, token_to_kv_pool=pool)
    request = Request(0, 100, 27)
    server.place(request)
    batch = server.batch([request], ForwardMode.EXTEND)
    (out,) = server.run([request], layer=make_layer(0), batch=batch)
    close(out, reference(request, sparse=True))
    window = make_layer(1, sliding_window_size=BLOCK - 1)
    (out,) = server.run([request], layer=window, batch=batch, metadata=False)
    last = request.new - 1
    seen = slice(last - window.sliding_window_size, last + 1)
    q, k, v = (getattr(request, name).float().cpu() for name in ("q", "k", "v"))
    weights = torch.softmax(k[seen, 0] @ q[last, 1] * SCALE, 0)
    close(out[last, 1], weights @ v[seen, 0])
    assert server.backend.served == 1 and server.backend.reasons.total() == 1


def case_values_of_another_head_dim() -> None:
    """A plain pool has buffers of both sizes: a policy runs where the table of kernels has the pair."""
    dims = {"head_dim": 192, "v_head_dim": 128}
    with published():
        server = Server(16, **dims)
        scored = Server(16, RELATIVE.replace("ALPHA", "0.5"), **dims)
    request = Request(70, 60, 28, dim=192, dim_v=128)
    server.place(request)
    layer = make_layer(**dims)
    (out,) = server.run([request], layer=layer)
    close(out, reference(request, sparse=True))
    assert server.backend.served == 1 and not server.backend.reasons

    row = {"device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16", "blocks": f"{BLOCK}x{BLOCK}"}
    rows = [{**row, "op": op, "head_dim": "64, 128"} for op in ("pool_blocks", "select_blocks")]
    rows.append({**row, "op": "attention", "head_dim": "64, 192/128"})
    kernels = {"cuda": frozenset(row["op"] for row in rows)}
    with (
        mock.patch.dict(_library.KERNELS, kernels),
        mock.patch.object(limits, "LIMITS", limits.parse(rows)),
        mock.patch.object(limits, "_capability_of", {0: 90}),
    ):
        for there in (server, scored):
            there.backend._layers.device = torch.device("cuda", 0)
            there.backend._layers._reasons.clear()
        assert server.backend._layers.reason(layer, torch.bfloat16) is None
        assert "'pool_blocks'" in scored.backend._layers.reason(layer, torch.bfloat16)
        other = make_layer(head_dim=64, v_head_dim=128)
        assert "head_dim 64 of q and k and 128 of v" in server.backend._layers.reason(other, torch.bfloat16)


def case_optional_arguments() -> None:
    with published():
        server = Server()
    request = Request(0, 100, 19)
    server.place(request)
    sinks = torch.zeros(HEADS)
    # torch_native has no sinks: neither of the two may ignore them.
    raises(bsfa.UnsupportedError, "'sinks'", server.run, [request], sinks=sinks)
    (out,) = server.run([request], sinks=None, q_rope=None, return_lse=False)
    close(out, reference(request, sparse=True))
    seen = []
    server.backend._takes = None
    server.backend.dense.forward_extend = lambda q, *a, **o: seen.append(o) or torch.zeros_like(q)
    server.run([request], sinks=sinks)
    assert seen[0]["sinks"] is sinks
    assert any("'sinks'" in reason for reason in server.backend.reasons)


def case_batches_it_does_not_compute() -> None:
    request = Request(0, 100, 20)
    one = torch.ones(1)
    cases: list[tuple[ForwardMode, dict[str, Any], str]] = [
        (ForwardMode.TARGET_VERIFY, {}, "TARGET_VERIFY"),
        (ForwardMode.DRAFT_EXTEND_V2, {}, "DRAFT_EXTEND_V2"),
        (ForwardMode.SPLIT_PREFILL, {}, "SPLIT_PREFILL"),
        (ForwardMode.DLLM_EXTEND, {}, "DLLM_EXTEND"),
        (ForwardMode.EXTEND, {"encoder_lens": one}, "encoder"),
        (ForwardMode.EXTEND, {"multi_item_delimiter_indices": [one]}, "multi-item"),
        (ForwardMode.EXTEND, {"mha_return_lse": True}, "LSE"),
        (ForwardMode.EXTEND, {"extend_seq_lens_cpu": None}, "no lengths on the host"),
        (ForwardMode.EXTEND, {"extend_seq_lens_cpu": [100 * UNIT, 0], "extend_prefix_lens_cpu": [0, 0]}, "padded"),
        (ForwardMode.EXTEND, {"extend_seq_lens_cpu": [100 * UNIT + 1]}, "part of the batch's queries"),
        (ForwardMode.MIXED, {"spec_info": object()}, "speculative"),
    ]
    for mode, changes, words in cases:
        with published():
            server = Server()
        seen = []
        server.backend.dense.forward_extend = lambda q, *a, seen=seen, **o: seen.append(o) or torch.zeros_like(q)
        request.row = -1
        server.place(request)
        batch = server.batch([request], mode)
        for name, value in changes.items():
            setattr(batch, name, value)
        server.run([request], batch=batch, metadata=False)
        assert len(seen) == 1 and server.backend.served == 0, (mode, changes)
        assert words in next(iter(server.backend.reasons)), server.backend.reasons
    with published():
        server = Server()
    server.place(request)
    server.backend.dense.forward_metadata = SimpleNamespace(custom_mask=one)
    assert "mask of its own" in server.backend._reason(
        request.q.flatten(1), make_layer(), server.batch([request], ForwardMode.EXTEND), {}
    )


def case_servers_it_does_not_serve() -> None:
    request = Request(0, 100, 21)
    for changes, words in (
        ({"is_draft_worker": True}, ""),  # its layers have no policy here
        ({"kv_index_translator": SimpleNamespace(is_translating=True)}, "unified memory"),
    ):
        with published():
            server = Server(**changes)
        server.place(request)
        (out,) = server.run([request])
        close(out, reference(request, sparse=False))
        assert server.backend.served == 0 and all(words in reason for reason in server.backend.reasons)
    for name, sizes in (("attn_cp_size", {"tp_size": 2, "moe_tp_size": 2}), ("attn_dcp_size", {})):
        with published(), get_parallel().override(**{name: 2, **sizes}):
            assert "context parallelism" in unsuited(make_runner())
    quantized = make_runner()
    quantized.token_to_kv_pool = SimpleNamespace(full_kv_pool=SimpleNamespace(is_quantized_kv_cache=True))
    with published():
        assert "quantized" in unsuited(quantized)


def case_fp8_cache() -> None:
    request = Request(0, 100, 22)
    with published():
        server = Server(dtype=torch.float8_e4m3fn)
    server.place(request)
    (out,) = server.run([request])
    for name in ("k", "v"):
        setattr(request, name, getattr(request, name).to(torch.float8_e4m3fn).to(DTYPE))
    close(out, reference(request, sparse=False))
    assert server.backend.served == 0
    assert "float8_e4m3fn" in next(iter(server.backend.reasons)), server.backend.reasons


def case_reasons_are_logged_once() -> None:
    import logging

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logger = logging.getLogger("bsfa.sglang")
    logger.addHandler(handler)
    try:
        with published():
            server = Server()
        request = Request(0, 100, 23)
        server.place(request)
        batch = server.batch([request], ForwardMode.EXTEND, encoder_lens=torch.zeros(1, dtype=torch.int64))
        from bsfa.integrations import serving

        serving._logged.clear()
        for _ in range(3):
            server.run([request], batch=batch)
    finally:
        logger.removeHandler(handler)
    assert sum("encoder" in line for line in lines) == 1, lines
    assert server.backend.reasons.total() == 3


def case_a_configuration_that_does_not_fit() -> None:
    with published():
        raises(
            ValueError,
            "dense_layers names layer 9",
            Server,
            text=STATIC.replace("[policy]", "dense_layers=[9]\n[policy]"),
        )
        raises(ValueError, "window_bloks", Server, text=STATIC.replace("window_blocks", "window_bloks"))
        raises(ValueError, "2 values", _per_head_mismatch)


def _per_head_mismatch() -> None:
    server = Server(text=RELATIVE.replace("ALPHA", "[0.1, 0.2]"))
    request = Request(0, 100, 24)
    server.place(request)
    server.run([request])


def case_no_configuration_is_dense() -> None:
    with published():
        server = Server(text=None)
    request = Request(0, 100, 25)
    server.place(request)
    (out,) = server.run([request])
    close(out, reference(request, sparse=False))
    assert server.backend.served == 0 and not server.backend.reasons


def case_what_it_refuses_to_start_with() -> None:
    with published():
        raises(bsfa.UnsupportedError, "MLA", Server, use_mla_backend=True)
        for backend in ("full", "breakable", "disabled"):
            graphs = with_phase(default_cuda_graph_config(), Phase.PREFILL, backend=backend)
            with get_exec().graph.override(cuda_graph_config=graphs):
                if backend == "full":
                    raises(bsfa.UnsupportedError, "--cuda-graph-backend-prefill", Server)
                else:
                    Server()
        raises(ValueError, "no attention backend 'nonsense'", Server, decode_attention_backend_str="nonsense")


def case_thresholds_of_another_model() -> None:
    """The file that ``bsfa calibrate`` writes knows its model."""
    from test_thresholds import make_table  # the tests' own small table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        make_table().save(path)
        config = ServingConfig.load(_write(folder, 'thresholds = "t.safetensors"\nmin_seqlen = 0\n'))
    with published():
        raises(
            bsfa.ThresholdMismatchError,
            "",
            lambda: backend_module.backend_class()(make_runner(), SimpleNamespace(forward_extend=print), "x", config),
        )


def _write(folder: str, text: str) -> Path:
    path = Path(folder) / "bsfa.toml"
    path.write_text(text)
    return path


def main() -> None:
    """Run the cases named on the command line, or all."""
    warnings.simplefilter("ignore")
    cases = {name: f for name, f in globals().items() if name.startswith("case_")}
    results: dict[str, str | None] = {}
    for name in sys.argv[1:] or cases:
        try:
            cases[name]()
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
    print(json.dumps(results))

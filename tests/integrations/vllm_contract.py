"""What bsfa's vLLM backend relies on, held against one vLLM: run by test_vllm_contract.py, once for each version.

vLLM's own registry, abstract classes and FlashAttention classes are imported from the Python files of its wheel. Only
what is compiled in vLLM is replaced: its attention kernel by the plain one below, and the one that fills the cache.
``VLLM_CONTRACT_DEVICE=cuda`` has the same tensors on a GPU, and bsfa's kernels for it.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blank
import pytest
import torch
from torch import Tensor

# Servers, parsers and downloads: imported on the way to the attention classes, not used by them.
UNUSED = """
    vllm.parser vllm.v1.structured_output aiohttp blake3 cpuinfo einops fastapi gguf ijson openai openai_harmony
    partial_json_parser prometheus_client pybase64 requests sniffio tvm_ffi urllib3 uvloop xgrammar
"""
blank.install(UNUSED.split())

import vllm.platforms  # noqa: E402

# No platform, even beside a GPU: for one, vLLM imports what is compiled in it.
vllm.platforms.builtin_platform_plugins.clear()


from transformers import LlamaConfig  # noqa: E402
from vllm.config.attention import AttentionConfig  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention import backend as abstract  # noqa: E402
from vllm.v1.attention.backends import flash_attn  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

import bsfa  # noqa: E402
from bsfa.errors import ThresholdMismatchError  # noqa: E402
from bsfa.identity import ModelIdentity, config_fields  # noqa: E402
from bsfa.integrations import serving  # noqa: E402
from bsfa.integrations import vllm as plugin  # noqa: E402
from bsfa.integrations.vllm import backend as ours  # noqa: E402
from bsfa.policies import RelativeMax  # noqa: E402
from test_thresholds import make_table  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OLD_LAYOUT = hasattr(abstract.AttentionBackend, "get_kv_cache_shape")
NAMED = hasattr(AttentionBackendEnum, "register")
HQ, HKV, D, LAYERS = 4, 2, 64, 2
BF16 = torch.bfloat16
DEVICE = torch.device(os.environ.get("VLLM_CONTRACT_DEVICE", "cpu"))
BF16_THERE: Any = {"dtype": BF16, "device": DEVICE}
#: Tokens of a block, and what lengths below are multiplied by: GPU kernels have blocks of 128.
BLOCK, SCALE = (32, 1) if DEVICE.type == "cpu" else (128, 4)
LENGTH = 100 * SCALE
SPARSE = RelativeMax(alpha=1.0, block_m=BLOCK, block_n=BLOCK, sink_blocks=1, window_blocks=1, last_tiles=0)
TOML = f"""
min_seqlen = {LENGTH}
dense_layers = [1]
[policy]
name = "RelativeMax"
alpha = 1.0
block_m = {BLOCK}
block_n = {BLOCK}
sink_blocks = 1
window_blocks = 1
last_tiles = 0
"""


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; on a GPU, where the order of sums may depend on the batch, the same numbers."""
    return torch.equal(a, b) if DEVICE.type == "cpu" else torch.allclose(a.float(), b.float(), atol=0.02, rtol=0.02)


# ---- vLLM's kernels -------------------------------------------------------------------------------------------------

calls: list[dict[str, Any]] = []


def plain_attention(q: Tensor, k: Tensor, v: Tensor, **o: Any) -> Tensor:
    """flash_attn_varlen_func over pages, in float32 and by definition; every call is kept in ``calls``."""
    calls.append({"rows": len(q), **o})
    starts, table = o["cu_seqlens_q"].tolist(), o["block_table"]
    window = o["window_size"] or [-1, -1]
    for i, length in enumerate(o["seqused_k"].tolist()):
        rows = slice(starts[i], starts[i + 1])
        count = rows.stop - rows.start
        if count == 0:
            continue
        assert count <= o["max_seqlen_q"] and length <= o["max_seqlen_k"]
        pages = table[i, : -(-length // k.shape[1])].long()
        keys, values = (t[pages].flatten(0, 1)[:length].float().repeat_interleave(HQ // HKV, 1) for t in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * o["softmax_scale"]
        behind = (length - count + torch.arange(count))[:, None].to(q.device) - torch.arange(length, device=q.device)
        unseen = behind < 0 if o["causal"] else torch.zeros_like(behind, dtype=torch.bool)
        if window[0] >= 0:
            unseen |= behind > window[0]
        weights = logits.masked_fill(unseen, -torch.inf).softmax(-1)
        o["out"][rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return o["out"]


def fill_cache(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor, *others: Any) -> None:
    for t, slot in enumerate(slots.tolist()):
        k[slot // k.shape[1], slot % k.shape[1]] = key[t]
        v[slot // v.shape[1], slot % v.shape[1]] = value[t]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM with the kernels above, and bsfa with the configuration above."""
    nothing = SimpleNamespace(model_config=None, cache_config=None)
    kernels = {
        "get_current_vllm_config": lambda: nothing,
        "flash_attn_varlen_func": plain_attention,
        "reshape_and_cache_flash": fill_cache,
        "get_flash_attn_version": lambda *args, **kwargs: 2,
        "flash_attn_supports_sinks": lambda: True,
        "flash_attn_supports_fp8": lambda: True,
        "flash_attn_supports_quant_query_input": lambda: True,
        "flash_attn_supports_kv_cache_dtype": lambda *args, **kwargs: True,
    }
    for name, function in kernels.items():
        monkeypatch.setattr(flash_attn, name, function, raising=False)
    if not torch.cuda.is_available():  # some versions take every machine for one that can pin memory
        monkeypatch.setattr("vllm.utils.torch_utils.PIN_MEMORY", False, raising=False)
    calls.clear()
    configure(monkeypatch, tmp_path, TOML)


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | None) -> None:
    monkeypatch.setattr(serving, "_config", None)
    monkeypatch.setattr(serving, "_logged", set())
    if text is None:
        monkeypatch.delenv("BSFA_CONFIG", raising=False)
        return
    path = folder / "bsfa.toml"
    path.write_text(text)
    monkeypatch.setenv("BSFA_CONFIG", str(path))


# ---- registration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Any:
    """vLLM's registry, as it was before and after."""
    AttentionBackendEnum.CUSTOM.clear_override()
    yield AttentionBackendEnum
    AttentionBackendEnum.CUSTOM.clear_override()


def test_registered_under_both_names(registry: Any) -> None:
    for _ in range(2):  # vLLM calls it in every process, and may do so twice in one
        plugin.register()
    assert registry["CUSTOM"].get_class() is ours.CustomBackend
    assert ("BSFA" in registry.__members__) is NAMED
    for member in (registry["CUSTOM"], *([registry["BSFA"]] if NAMED else [])):
        found = member.get_class()
        assert registry[found.get_name()] is member  # how vLLM finds the member again
        assert issubclass(found, abstract.AttentionBackend) and not inspect.isabstract(found)


def test_the_backend_of_another_package_stays(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    register_backend(registry.CUSTOM, "elsewhere.Backend")
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert registry.CUSTOM.get_path() == "elsewhere.Backend"
    assert "the backend CUSTOM is elsewhere.Backend already" in caplog.text


def test_vllm_finds_the_plugin(registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the entry point of pyproject.toml, as pip writes it."""
    import tomllib
    from vllm.plugins import load_plugins_by_group

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "vllm.general_plugins"
    lines = [f"{name} = {target}" for name, target in project["entry-points"][group].items()]
    info = tmp_path / "bsfa_checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bsfa-checkout\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins_by_group(group)["bsfa"]()
    assert registry["CUSTOM"].get_class() is ours.CustomBackend


def test_selected_by_name(registry: Any) -> None:
    plugin.register()
    for name in ("CUSTOM", *(["BSFA"] if NAMED else [])):
        assert AttentionConfig(backend=name).backend is registry[name]


@pytest.mark.skipif(not NAMED, reason="this vLLM takes no new names")
def test_a_spawned_process_knows_the_name(registry: Any) -> None:
    """It unpickles its configuration before it loads plug-ins."""
    plugin.register()
    data = pickle.dumps(registry["BSFA"])
    code = (
        "import blank, sys, pickle; blank.install(sys.argv[2].split()); "
        "member = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "print(member.name, member.get_path(), pickle.loads(pickle.dumps(member)) is member)"
    )
    command = [sys.executable, "-c", code, data.hex(), UNUSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-3:] == ["BSFA", "bsfa.integrations.vllm.backend.BsfaBackend", "True"]


# ---- signatures -----------------------------------------------------------------------------------------------------

PAIRS = [
    (ours.BsfaBackend, abstract.AttentionBackend),
    (ours.BsfaMetadataBuilder, abstract.AttentionMetadataBuilder),
    (ours.BsfaImpl, abstract.AttentionImpl),
]


@pytest.mark.parametrize(("mine", "base"), PAIRS, ids=lambda c: c.__name__)
def test_methods_take_what_vllm_gives(mine: type, base: type) -> None:
    """Every method that bsfa defines takes the arguments of vLLM's abstract one, in its order and by its names."""
    assert not inspect.isabstract(mine)
    checked = 0
    for name, own in vars(mine).items():
        theirs = inspect.getattr_static(base, name, None)
        function, wanted = (getattr(f, "__func__", f) for f in (own, theirs))
        if theirs is None or not inspect.isfunction(function) or name == "__doc__":
            continue
        checked += 1
        parameters = list(inspect.signature(function).parameters.values())
        kinds = {p.kind for p in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD in kinds:
            continue
        expected = [p for p in inspect.signature(wanted).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert [p.name for p in parameters][: len(expected)] == [p.name for p in expected], name
    assert checked >= 2


def test_the_cache_is_filled_before_forward() -> None:
    """Else forward over a part of the batch would write a part of the keys: garbage, and no error."""
    assert ours.BsfaBackend.forward_includes_kv_cache_update is False
    assert ours.BsfaImpl.do_kv_cache_update is flash_attn.FlashAttentionImpl.do_kv_cache_update


# ---- validate_configuration -----------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "head_size": 128,
    "dtype": BF16,
    "kv_cache_dtype": "auto",
    "block_size": 64,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": DeviceCapability(9, 0),
    "attn_type": "decoder",
}


def validate(**changes: Any) -> list[str]:
    return ours.CustomBackend.validate_configuration(**{**GOOD, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"block_size": 16}, {"block_size": 128}, {"block_size": None}, {"dtype": torch.float16}]
)
def test_good_configurations(changes: dict[str, Any]) -> None:
    assert validate(**changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"head_size": 100}, "head_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"block_size": 24}, "block_size not supported"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], reason: str) -> None:
    assert validate(**changes) == [reason]


def test_a_bad_file_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configure(monkeypatch, tmp_path, "min_length = 1")
    (reason,) = validate()
    assert "bsfa.toml: unknown key 'min_length'" in reason


def test_only_a_policy_restricts_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = make_spec()
    builder = ours.BsfaMetadataBuilder
    theirs = flash_attn.FlashAttentionMetadataBuilder.get_cudagraph_support(None, spec)
    assert builder.get_cudagraph_support(None, spec) is abstract.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert ours.BsfaBackend.get_preferred_block_size(16) == 64
    assert ours.BsfaBackend.get_preferred_block_size(128) == 128
    if hasattr(abstract.AttentionBackend, "supports_batch_invariance"):
        assert not ours.BsfaBackend.supports_batch_invariance()
    configure(monkeypatch, tmp_path, None)
    assert builder.get_cudagraph_support(None, spec) is theirs
    assert ours.BsfaBackend.get_preferred_block_size(16) == 16
    if hasattr(abstract.AttentionBackend, "supports_batch_invariance"):
        assert ours.BsfaBackend.supports_batch_invariance()


# ---- a model, its layers and batches --------------------------------------------------------------------------------


def make_spec(page_size: int = 16, **changes: Any) -> Any:
    return FullAttentionSpec(block_size=page_size, num_kv_heads=HKV, head_size=D, dtype=BF16, **changes)


HF = LlamaConfig(
    vocab_size=64,
    hidden_size=HQ * D,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=HQ,
    num_key_value_heads=HKV,
    head_dim=D,
)


def vllm_config(**changes: Any) -> Any:
    """What the builders ask of vLLM's configuration."""
    fields: dict[str, Any] = {
        "model_config": SimpleNamespace(
            hf_config=HF,
            rswa_window=None,
            is_mm_prefix_lm=False,
            get_num_attention_heads=lambda _: HQ,
            get_num_kv_heads=lambda _: HKV,
            get_head_size=lambda: D,
        ),
        "parallel_config": SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "compilation_config": SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: True),
            max_cudagraph_capture_size=64,
            static_forward_context={},
        ),
        "attention_config": SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32),
        "scheduler_config": SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=4096),
        "kernel_config": SimpleNamespace(enable_jit_warmup=False),
        "speculative_config": None,
        "use_v2_model_runner": True,
    }
    return SimpleNamespace(**{**fields, **changes})


def make_builder(page_size: int = 16, **changes: Any) -> Any:
    config = vllm_config(**changes)
    return ours.BsfaMetadataBuilder(make_spec(page_size), ["model.layers.0.self_attn.attn"], config, DEVICE)


def make_layer(index: int = 0) -> Any:
    one = torch.ones(1, device=DEVICE)
    return SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn", _q_scale=one, _k_scale=one, _v_scale=one)


def make_impl(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "num_heads": HQ,
        "head_size": D,
        "scale": 0.2,
        "num_kv_heads": HKV,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    return ours.BsfaImpl(**{**options, **changes})


def make_cache(pages: int, page_size: int, heads_first: bool) -> Tensor:
    """A layer's cache full of NaN, as this vLLM lays it out, in either order of tokens and heads in memory."""
    if OLD_LAYOUT:
        shape = ours.BsfaBackend.get_kv_cache_shape(pages, page_size, HKV, D)
        assert sorted(shape[:2]) == sorted((2, pages)) and shape[2:] == (page_size, HKV, D)
        memory = torch.full((*shape[:2], HKV, page_size, D) if heads_first else shape, torch.nan, **BF16_THERE)
        return memory.transpose(2, 3) if heads_first else memory
    shape = (pages, HKV, page_size, 2 * D) if heads_first else (pages, page_size, HKV, 2 * D)
    memory = torch.full(shape, torch.nan, **BF16_THERE)
    return memory if heads_first else memory.transpose(1, 2)


def split_of(metadata: Any) -> Any:
    """What the layers look for."""
    return getattr(metadata, "bsfa", None)


class Batch:
    """Requests ``(query tokens, KV tokens)`` over one cache, filled by vLLM's own do_kv_cache_update."""

    def __init__(
        self, requests: list[tuple[int, int]], page_size: int = 16, heads_first: bool = False, seed: int = 3
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        requests = [(n if n < 5 else n * SCALE, k * SCALE) for n, k in requests]  # decode steps stay what they are
        self.requests, self.page_size = requests, page_size
        count = sum(-(-k // page_size) for _, k in requests)
        free = torch.randperm(count + 2, generator=rng).tolist()
        self.pages = [[free.pop() for _ in range(-(-k // page_size))] for _, k in requests]
        self.cache = make_cache(count + 2, page_size, heads_first)
        for pages, (_, length) in zip(self.pages, requests, strict=True):
            slots = torch.tensor([pages[t // page_size] * page_size + t % page_size for t in range(length)])
            key, value = (torch.randn(length, HKV, D, generator=rng).to(**BF16_THERE) for _ in "kv")
            make_impl().do_kv_cache_update(make_layer(), key, value, self.cache, slots)
        self.starts = [sum(n for n, _ in requests[:i]) for i in range(len(requests) + 1)]
        self.q = torch.randn(self.starts[-1], HQ, D, generator=rng).to(**BF16_THERE)

    def common(self, only: int | None = None, pad: int = 0, **changes: Any) -> Any:
        """vLLM's description of the batch, or of one request; ``pad`` requests without tokens behind."""
        chosen = list(range(len(self.requests))) if only is None else [only]
        lengths_q = [self.requests[i][0] for i in chosen] + [0] * pad
        lengths_k = [self.requests[i][1] for i in chosen] + [0] * pad
        width = 2 + max(len(self.pages[i]) for i in chosen)
        table = torch.full((len(lengths_q), width), -1, dtype=torch.int32)
        for row, i in enumerate(chosen):
            table[row, : len(self.pages[i])] = torch.tensor(self.pages[i], dtype=torch.int32)
        starts = torch.tensor([sum(lengths_q[:i]) for i in range(len(lengths_q) + 1)], dtype=torch.int32)
        seq_lens = torch.tensor(lengths_k, dtype=torch.int32)
        names = {f.name for f in abstract.CommonAttentionMetadata.__dataclass_fields__.values()}
        host = "seq_lens_cpu_upper_bound" if "seq_lens_cpu_upper_bound" in names else "_seq_lens_cpu"
        fields: dict[str, Any] = {
            "query_start_loc": starts.to(DEVICE),
            "query_start_loc_cpu": starts.clone(),
            "seq_lens": seq_lens.to(DEVICE),
            "num_reqs": len(lengths_q),
            "num_actual_tokens": int(starts[-1]),
            "max_query_len": max(lengths_q),
            "max_seq_len": max(lengths_k),
            "block_table_tensor": table.to(DEVICE),
            "slot_mapping": torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE),
            host: seq_lens.clone(),
        }
        return abstract.CommonAttentionMetadata(**{**fields, **changes})

    def rows(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i + 1])

    def run(self, impl: Any, metadata: Any, layer: int = 0, only: int | None = None) -> Tensor:
        q = self.q if only is None else self.q[self.rows(only)]
        padded = torch.cat([q, torch.full((3, HQ, D), torch.nan, **BF16_THERE)])  # vLLM pads for its graphs
        output = torch.full_like(padded, torch.nan)
        kv = padded[:, :HKV]
        assert impl.forward(make_layer(layer), padded, kv, kv, self.cache, metadata, output) is output
        assert bool(output[len(q) :].isnan().all()) and bool(output[: len(q)].isfinite().all())
        return output[: len(q)]

    def by_bsfa(self, i: int, policy: Any) -> Tensor:
        """Request i by itself, through bsfa's public call."""
        k, v = ours.cache_views(self.cache, D)
        table = torch.tensor([self.pages[i]], dtype=torch.int32, device=DEVICE)
        length = torch.tensor([self.requests[i][1]], dtype=torch.int32, device=DEVICE)
        q = self.q[self.rows(i)].unsqueeze(0)
        out = bsfa.attention_paged(q, k, v, table, length, policy=policy, softmax_scale=0.2)
        assert isinstance(out, Tensor)
        return out[0]


# decode steps first, as vLLM orders them; a short prompt before and one behind the first long one; chunks over a prefix
MIXED = [(1, 300), (1, 40), (30, 30), (160, 160), (20, 20), (130, 330), (64, 256)]
LONG = (3, 5, 6)


# ---- forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("heads_first", [False, True])
def test_a_mixed_batch_is_each_request_alone(page_size: int, heads_first: bool) -> None:
    batch, builder, impl = Batch(MIXED, page_size, heads_first), make_builder(page_size), make_impl()
    metadata = builder.build(0, batch.common())
    assert metadata.bsfa.first == 3 and metadata.bsfa.tokens == batch.starts[3]
    out = batch.run(impl, metadata)
    (front,) = calls
    assert front["rows"] == batch.starts[3]
    assert (front["max_seqlen_q"], front["max_seqlen_k"]) == (30 * SCALE, 300 * SCALE)
    for i in range(len(MIXED)):
        alone = batch.run(impl, builder.build(0, batch.common(only=i)), only=i)
        if i == 4:  # by vLLM when alone, by bsfa, dense, between two long ones
            torch.testing.assert_close(out[batch.rows(i)], alone, atol=0.02, rtol=0.02)
            assert same(out[batch.rows(i)], batch.by_bsfa(i, None))
        else:
            assert same(out[batch.rows(i)], alone), f"request {i}"
        if i in LONG:
            assert same(alone, batch.by_bsfa(i, SPARSE))
            assert not torch.equal(alone, batch.by_bsfa(i, None))


def test_layers_without_a_policy_are_vllms() -> None:
    """Layer 1 is in dense_layers: the whole batch in one call of FlashAttention, with its own metadata."""
    batch, impl = Batch(MIXED), make_impl()
    metadata = make_builder().build(0, batch.common())
    out = batch.run(impl, metadata, layer=1)
    (call,) = calls
    assert call["rows"] == len(batch.q)
    theirs = flash_attn.FlashAttentionImpl(HQ, D, 0.2, HKV, None, None, "auto")
    assert torch.equal(out, batch.run(theirs, metadata))


def test_batches_without_a_long_prompt_are_vllms() -> None:
    batch, builder = Batch([(1, 300), (1, 20), (40, 90)]), make_builder()
    for only in (None, 0, 2):
        metadata = builder.build(0, batch.common(only))
        assert split_of(metadata) is None
        batch.run(make_impl(), metadata, only=only)
    assert len(calls) == 3
    assert split_of(builder.build_for_cudagraph_capture(batch.common(0))) is None


def test_a_batch_of_long_prompts_alone_needs_no_flash_attention() -> None:
    batch = Batch([(160, 160), (130, 330)])
    metadata = make_builder().build(0, batch.common(pad=2))
    assert metadata.bsfa.front is None
    out = batch.run(make_impl(), metadata)
    assert calls == []
    for i in (0, 1):
        assert same(out[batch.rows(i)], batch.by_bsfa(i, SPARSE))


class OnDevice(Tensor):
    """A tensor whose values must not be read on the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__"):
            raise AssertionError(f"{func.__name__} waits for the device")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_batch_is_described_without_waiting_for_the_device() -> None:
    batch = Batch(MIXED)
    plain = batch.common()
    names = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    on_device = {name: getattr(plain, name).as_subclass(OnDevice) for name in names}
    with pytest.raises(AssertionError, match="tolist waits"):
        on_device["seq_lens"].tolist()
    split = split_of(make_builder().build(0, batch.common(**on_device)))
    want = split_of(make_builder().build(0, plain))
    assert isinstance(split.plan.sparse.seqlens_k, OnDevice)
    for got, expected in ((split.plan.sparse, want.plan.sparse), (split.plan.dense, want.plan.dense)):
        for name in ("cu_seqlens_q", "seqlens_k", "block_table"):
            assert torch.equal(getattr(got, name).as_subclass(Tensor), getattr(expected, name))


def test_decode_steps_before_long_prompts_alone() -> None:
    """What is behind the cut is one group then, whose row offsets come from vLLM's tensor."""
    batch = Batch([(1, 300), (1, 40), (160, 160), (130, 330)])
    out = batch.run(make_impl(), make_builder().build(0, batch.common(pad=1)))
    assert [c["rows"] for c in calls] == [2] and calls[0]["max_seqlen_q"] == 1
    for i in (2, 3):
        assert same(out[batch.rows(i)], batch.by_bsfa(i, SPARSE))
    out = batch.run(make_impl(), make_builder().build(0, batch.common()))
    for i in (2, 3):
        assert same(out[batch.rows(i)], batch.by_bsfa(i, SPARSE))


def test_profiling_has_no_metadata() -> None:
    q = torch.randn(8, HQ, D).to(**BF16_THERE)
    output = torch.full_like(q, torch.nan)
    impl = make_impl()
    empty = torch.empty(0)
    impl.forward(make_layer(), q, q[:, :HKV], q[:, :HKV], empty, None, output)
    assert not bool(output.any()) and impl._bsfa_policy is not None  # found before the first request


def test_without_a_configuration_all_is_vllms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configure(monkeypatch, tmp_path, None)
    batch = Batch(MIXED)
    builder = make_builder()
    assert builder.reorder_batch_threshold is None
    metadata = builder.build(0, batch.common())
    assert split_of(metadata) is None
    batch.run(make_impl(), metadata)
    assert [c["rows"] for c in calls] == [len(batch.q)]


def test_another_groups_block_table() -> None:
    """Layers of another cache group get the metadata of the first with their own pages."""
    batch, builder, impl = Batch(MIXED), make_builder(), make_impl()
    other = Batch(MIXED, seed=4)
    other.q = batch.q
    assert other.pages != batch.pages
    metadata = builder.update_block_table(
        builder.build(0, batch.common()), other.common().block_table_tensor, batch.common().slot_mapping
    )
    want = other.run(impl, builder.build(0, other.common()))
    assert same(other.run(impl, metadata), want)
    assert not torch.equal(batch.run(impl, builder.build(0, batch.common())), want)


def test_heads_of_a_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = replace(make_table(SPARSE), model=ModelIdentity("this", config_fields(HF)))
    table.save(tmp_path / "t")
    configure(monkeypatch, tmp_path, f'thresholds = "t"\nmin_seqlen = {LENGTH}')
    batch = Batch([(200, 200)])
    whole = batch.run(make_impl(), make_builder().build(0, batch.common()))
    monkeypatch.setattr(ours, "_rank", lambda: (1, 2))
    impl = make_impl(num_heads=2, num_kv_heads=1)
    metadata = make_builder().build(0, batch.common())
    q, output = batch.q[:, 2:].contiguous(), torch.empty_like(batch.q[:, 2:])
    cache = batch.cache[:, :, :, 1:] if OLD_LAYOUT else batch.cache[:, 1:]
    impl.forward(make_layer(), q, q, q, cache, metadata, output)
    assert same(output, whole[:, 2:])
    with pytest.raises(ValueError, match="has 2 values for this rank, the layer has 4 query heads"):
        make_impl().forward(make_layer(), batch.q, batch.q, batch.q, batch.cache, metadata, torch.empty_like(batch.q))


# ---- what stays with vLLM -------------------------------------------------------------------------------------------


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "dense, for" in r.getMessage()]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alibi_slopes": [0.5] * HQ}, "layers with ALiBi"),
        ({"sliding_window": 64}, "layers with a sliding window"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache in fp8"),
        ({"attn_type": "encoder_only"}, "layers of type encoder_only"),
        ({"sinks": torch.zeros(HQ)}, "layers with sinks"),
    ],
)
def test_layers_that_stay_with_vllm(changes: dict[str, Any], reason: str, log: Any) -> None:
    impl = make_impl(**changes)
    for _ in range(2):
        impl._resolve(make_layer(), torch.zeros(1, HQ, D, **BF16_THERE))
        assert impl._bsfa_policy is None
    make_impl(**changes)._resolve(make_layer(), torch.zeros(1, HQ, D, **BF16_THERE))
    (message,) = messages(log)
    assert message.endswith(f"dense, for {reason}")


def test_a_window_reaches_flash_attention() -> None:
    batch, impl = Batch([(160, 160)]), make_impl(sliding_window=64)
    spec = make_spec(sliding_window=64)  # where some versions take it from
    builder = ours.BsfaMetadataBuilder(spec, ["model.layers.0.self_attn.attn"], vllm_config(), DEVICE)
    batch.run(impl, builder.build(0, batch.common()))
    assert [c["window_size"] for c in calls] == [[63, 0]]


def test_batches_that_stay_with_vllm(log: Any) -> None:
    batch, builder = Batch([(1, 40), (160, 160)]), make_builder()
    names = abstract.CommonAttentionMetadata.__dataclass_fields__
    host = "seq_lens_cpu_upper_bound" if "seq_lens_cpu_upper_bound" in names else "_seq_lens_cpu"
    cases: dict[str, dict[str, Any]] = {"not causal": {"causal": False}, "on the device only": {host: None}}
    for name, change in (("mm_req_doc_ranges", {0: [(0, 4)]}), ("rswa_prefix_lens", torch.zeros(2))):
        if name in names:
            cases["PrefixLM" if name.startswith("mm") else "reference sliding"] = {name: change}
    for number, (reason, change) in enumerate(cases.items(), 1):
        for _ in range(2):
            assert split_of(builder.build(0, batch.common(**change))) is None
        assert len(messages(log)) == number and reason in messages(log)[-1]
    if "use_cascade" in flash_attn.FlashAttentionMetadata.__dataclass_fields__:
        assert split_of(builder.build(16, batch.common())) is None and "cascade" in messages(log)[-1]
        assert builder.use_cascade_attention() is False
    assert split_of(builder.build(0, batch.common())) is not None


def test_draft_verification_counts_as_decode() -> None:
    speculative = SimpleNamespace(num_speculative_tokens=3, parallel_drafting=False)
    builder = make_builder(speculative_config=speculative)
    assert builder.reorder_batch_threshold == 4
    batch = Batch([(4, 300), (3, 200), (160, 160)])
    assert builder.build(0, batch.common()).bsfa.first == 2
    assert split_of(builder.build(0, batch.common(only=0))) is None


def test_a_cache_of_another_dtype_stays_with_vllm(log: Any) -> None:
    batch = Batch([(160, 160)])
    batch.cache = batch.cache.half()
    batch.run(make_impl(), make_builder().build(0, batch.common()))
    assert len(calls) == 1 and "over a KV cache in torch.float16" in messages(log)[0]


def test_a_layer_whose_number_is_not_clear(log: Any) -> None:
    impl = make_impl()
    impl._resolve(SimpleNamespace(layer_name="model.attn"), torch.zeros(1, HQ, D, **BF16_THERE))
    assert impl._bsfa_policy is None and "'model.attn', whose number is not clear" in messages(log)[0]
    assert ours.layer_index("language_model.model.layers.17.self_attn.attn") == 17
    assert ours.layer_index("model.layers.3.mixer.0.attn") == 3
    assert ours.layer_index("a.1.b.2") is None


def test_kernels_that_cannot_run_are_said_at_start(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "unsupported_reason", lambda *args: "no kernel for it")
    impl = make_impl()
    impl._resolve(make_layer(), torch.zeros(1, HQ, D, **BF16_THERE))
    assert impl._bsfa_policy is None and "head_size 64 in torch.bfloat16: no kernel for it" in messages(log)[0]


@pytest.mark.skipif(not OLD_LAYOUT, reason="keys and values lie in the last dimension")
def test_a_cache_of_two_pages() -> None:
    """Its shape begins with 2, 2, whichever of them stands for keys and values."""
    cache = make_cache(2, 16, False)
    slots = torch.arange(32)
    key, value = (torch.full((32, HKV, D), x, **BF16_THERE) for x in (1.0, 2.0))
    make_impl().do_kv_cache_update(make_layer(), key, value, cache, slots)
    k, v = ours.cache_views(cache, D)
    assert bool((k == 1).all()) and bool((v == 2).all())


def test_an_unknown_cache_is_refused() -> None:
    of_another_generation = (4, HKV, 16, 2 * D) if OLD_LAYOUT else (4, 2, 16, HKV, D)
    for shape in ((2, 4, 16, HKV, D, 1), (4, HKV, 16, D), (3, 4, 16, HKV, D), of_another_generation):
        with pytest.raises(bsfa.UnsupportedError, match="does not know a KV cache of shape"):
            ours.cache_views(torch.zeros(shape), D)


# ---- the model ------------------------------------------------------------------------------------------------------


def test_thresholds_of_another_model_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fields = {**config_fields(HF), "vocab_size": 65}
    replace(make_table(SPARSE), model=ModelIdentity("another", fields)).save(tmp_path / "t")
    configure(monkeypatch, tmp_path, 'thresholds = "t"')
    with pytest.raises(ThresholdMismatchError, match="vocab_size is 65 in the file but 64 in the model"):
        make_builder()


def test_vllm_reads_a_config_as_transformers_does() -> None:
    """The identity in a threshold file comes from transformers, the one it is checked against from vLLM."""
    from transformers import AutoConfig
    from vllm.transformers_utils.config import get_config

    path = str(ROOT / "examples/tiny_lm/model")
    assert config_fields(get_config(path, trust_remote_code=False)) == config_fields(AutoConfig.from_pretrained(path))


def test_this_is_the_version_that_was_asked_for() -> None:
    assert f"vllm-{os.environ['VLLM_CONTRACT_VERSION']}-py" in str(sys.modules["vllm"].__file__)

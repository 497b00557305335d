"""What the plug-ins for inference servers share: their configuration file, and one mixed batch over a paged KV cache.

No server is imported here. A plug-in builds, once per batch, a :class:`PrefillPlan` from the lengths that it has on the
host, and every layer runs it with :func:`run_prefill`; :func:`prefill_attention` does both at once.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bsfa.attention import attention_paged
from bsfa.errors import UnsupportedError
from bsfa.integrations.min_seqlen import DEFAULT_MIN_SEQLEN, check_min_seqlen
from bsfa.limits import check_bounds, check_limits
from bsfa.policies import (
    Antidiagonal,
    Composed,
    CumulativeMass,
    Dense,
    ExactSkip,
    Fixed,
    FlexPrefill,
    Policy,
    RelativeMax,
    ScoredPolicy,
    StaticPattern,
    ThresholdPolicy,
)
from bsfa.thresholds import ThresholdTable

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same module under the name it had before
    import tomli as tomllib

#: The environment variable that names the configuration file. Servers have no other channel for an external backend.
ENVIRONMENT = "BSFA_CONFIG"

_POLICIES: dict[str, type[Policy]] = {
    kind.__name__: kind
    for kind in (Dense, StaticPattern, RelativeMax, CumulativeMass, FlexPrefill, Antidiagonal, ExactSkip)
}
#: Fields that a file cannot hold: tensors. A threshold file can.
_NOT_IN_FILES = frozenset({"reference", "positions"})
_KEYS = ("policy", "thresholds", "min_seqlen", "dense_layers")

_logger = logging.getLogger("bsfa.serving")
_logged: set[str] = set()


def log_once(message: str, level: int = logging.WARNING, logger: logging.Logger | None = None) -> None:
    """Log ``message`` the first time that this process has it. ``logger``: a server's own, which people see."""
    if message not in _logged:
        _logged.add(message)
        (logger or _logger).log(level, "bsfa: %s", message)


# ---- heads of one rank ----------------------------------------------------------------------------------------------


def _share(owner: str, what: str, values: Any, rank: int, size: int) -> Any:
    """The part of ``rank`` of per-head values. With fewer KV heads than ranks, ranks share one, as in servers."""
    count = len(values)
    if count % size == 0:
        step = count // size
        return values[rank * step : (rank + 1) * step]
    if what == "KV heads" and size % count == 0:
        index = rank // (size // count)
        return values[index : index + 1]
    raise ValueError(f"{owner} has values for {count} {what}, which {size} tensor-parallel ranks cannot divide")


def slice_heads(policy: Policy | None, tp_rank: int, tp_size: int) -> Policy | None:
    """``policy`` with its per-head values reduced to the heads of one tensor-parallel rank.

    Query heads are split evenly and in order. Thresholds per KV head (``shared``) likewise; with fewer KV heads than
    ranks, the ranks that hold copies of one KV head share its value. Raises ``ValueError`` if they do not divide.
    """
    if tp_size < 1 or not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank must be 0 .. tp_size - 1, got rank {tp_rank} of {tp_size}")
    if policy is None or tp_size == 1:
        return policy
    owner = type(policy).__name__
    if isinstance(policy, Fixed):
        raise ValueError("Fixed is a mask of one call: no policy for a server")
    if isinstance(policy, Composed):
        return type(policy)(*(slice_heads(p, tp_rank, tp_size) for p in policy.policies))
    changes: dict[str, Any] = {}
    if isinstance(policy, ExactSkip):
        if policy.within is not None:
            changes["within"] = slice_heads(policy.within, tp_rank, tp_size)
        if policy.reference is not None and policy.reference.shape[0] != 1:  # one row is for all heads
            changes["reference"] = _share(f"{owner}.reference", "query heads", policy.reference, tp_rank, tp_size)
    name = "gamma" if isinstance(policy, FlexPrefill) else ""
    heads = "query heads"
    if isinstance(policy, ThresholdPolicy):
        name = policy.threshold_name
        heads = "KV heads" if policy.shares_thresholds else heads
    if name and not isinstance(getattr(policy, name), int | float):
        changes[name] = _share(f"{owner}.{name}", heads, getattr(policy, name), tp_rank, tp_size)
    return cast(Policy, replace(cast(Any, policy), **changes)) if changes else policy


# ---- configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class ServingConfig:
    """What a server's attention layers do.

    policy: for every layer, or thresholds: a table with a policy for each layer; at most one of them. Neither: dense.
    min_seqlen: KV tokens from which on a request's prefill uses the policy; below, it is dense.
    dense_layers: indices of layers (from 0, as in the model's weights) that stay dense.
    source: the file, for messages.
    """

    policy: Policy | None = None
    thresholds: ThresholdTable | None = None
    min_seqlen: int = DEFAULT_MIN_SEQLEN
    dense_layers: frozenset[int] = field(default_factory=frozenset)
    source: str = "no file"

    def __post_init__(self) -> None:
        check_min_seqlen(self.min_seqlen)
        if self.policy is not None and self.thresholds is not None:
            raise ValueError(f"{self.source}: give [policy] or thresholds, not both")
        if self.thresholds is not None:
            self._check_layers(self.thresholds.num_layers)

    def _check_layers(self, num_layers: int) -> None:
        beyond = sorted(i for i in self.dense_layers if not 0 <= i < num_layers)
        if beyond:
            raise ValueError(f"{self.source}: dense_layers names layer {beyond[0]}, there are 0 .. {num_layers - 1}")

    @staticmethod
    def load(path: str | Path) -> ServingConfig:
        """Read a TOML file; docs/integrations.md has its keys. Paths in it are relative to it.

        Raises ``ValueError`` naming file and key for anything unknown, of the wrong type or out of range, and
        ``OSError`` if it cannot be opened.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from None
        unknown = [key for key in data if key not in _KEYS]
        if unknown:
            raise ValueError(f"{path}: unknown key '{unknown[0]}' (known: {', '.join(_KEYS)})")
        values: dict[str, Any] = {"source": str(path)}
        if "policy" in data:
            values["policy"] = _parse_policy(data["policy"], f"{path}: policy")
        if "thresholds" in data:
            name = data["thresholds"]
            if not isinstance(name, str):
                raise ValueError(f"{path}: thresholds must be a file name, got {type(name).__name__}")
            try:
                values["thresholds"] = ThresholdTable.load(path.parent / name)
            except OSError as error:
                raise ValueError(f"{path}: thresholds: {path.parent / name}: {error.strerror or error}") from None
            except ValueError as error:
                raise ValueError(f"{path}: thresholds: {error}") from None
        if "min_seqlen" in data:
            try:
                values["min_seqlen"] = check_min_seqlen(data["min_seqlen"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from None
        if "dense_layers" in data:
            layers = data["dense_layers"]
            if not isinstance(layers, list) or any(type(i) is not int or i < 0 for i in layers):
                raise ValueError(f"{path}: dense_layers must be a list of layer indices (from 0), got {layers!r}")
            values["dense_layers"] = frozenset(layers)
        return ServingConfig(**values)

    @property
    def dense(self) -> bool:
        """Whether every layer is dense."""
        return self.thresholds is None and (self.policy is None or isinstance(self.policy, Dense))

    def layer_policy(
        self, index: int, tp_rank: int = 0, tp_size: int = 1, device: torch.device | str = "cpu"
    ) -> Policy | None:
        """The policy of layer ``index`` for the query heads of one rank, its tensors on ``device``; None is dense.

        Raises ``ValueError`` for a layer that the threshold table does not have, and if per-head values do not divide
        among the ranks.
        """
        if index < 0:
            raise ValueError(f"a layer's index is 0 or more, got {index}")
        if index in self.dense_layers or self.dense:
            return None
        policy = self.policy
        if self.thresholds is not None:
            try:
                policy = self.thresholds.layer(index)
            except IndexError as error:
                raise ValueError(f"{self.source}: {error}") from None
        sliced = slice_heads(policy, tp_rank, tp_size)
        return None if sliced is None else sliced.to(torch.device(device))

    def check_model(self, hf_config: Any) -> None:
        """Raise ``ValueError`` unless a Hugging Face config fits: the one of the calibration, with those dense layers.

        A threshold file also knows a fingerprint of the weights, which a server that shards them cannot be asked for:
        that a fine-tune of the same shape is another model goes unnoticed here (``bsfa eval`` notices).
        """
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        count = getattr(text, "num_hidden_layers", None)
        if isinstance(count, int):
            self._check_layers(count)
        if self.thresholds is not None:
            self.thresholds.check_config(hf_config)

    def check_heads(self, index: int, num_heads: int, num_kv_heads: int, tp_rank: int = 0, tp_size: int = 1) -> None:
        """Raise ``ValueError`` unless the policy of layer ``index`` fits a rank's numbers of heads."""
        _check_head_counts(self.layer_policy(index, tp_rank, tp_size), num_heads, num_kv_heads, self.source)

    def __str__(self) -> str:
        what = "dense everywhere"
        if self.thresholds is not None:
            what = repr(self.thresholds)
        elif not self.dense:
            what = repr(self.policy)
        dense = f", dense layers {sorted(self.dense_layers)}" if self.dense_layers and not self.dense else ""
        return f"{what}, min_seqlen {self.min_seqlen}{dense} ({self.source})"


def _check_head_counts(policy: Policy | None, num_heads: int, num_kv_heads: int, source: str) -> None:
    if isinstance(policy, ExactSkip):
        _check_head_counts(policy.within, num_heads, num_kv_heads, source)
    value: Any = None
    want, name = num_heads, ""
    if isinstance(policy, ThresholdPolicy):
        value, name = policy.threshold, policy.threshold_name
        want = num_kv_heads if policy.shares_thresholds else num_heads
    elif isinstance(policy, FlexPrefill):
        value, name = policy.gamma, "gamma"
    if value is not None and not isinstance(value, int | float) and len(value) != want:
        raise ValueError(
            f"{source}: {type(policy).__name__}.{name} has {len(value)} values for this rank, the layer has {want} "
            f"{'KV' if want == num_kv_heads != num_heads else 'query'} heads"
        )


def _parse_policy(row: Any, where: str) -> Policy:
    """The policy of a ``[policy]`` table."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be a table, [policy], got {type(row).__name__}")
    row = dict(row)
    name = row.pop("name", None)
    kind = _POLICIES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{where}.name must be one of {', '.join(_POLICIES)}, got {name!r}")
    known = [f for f in fields(kind) if f.init and f.name not in _NOT_IN_FILES]
    names = [f.name for f in known]
    for key in row:
        if key not in names:
            raise ValueError(f"{where}.{key} is no parameter of {name} (it has {', '.join(names)})")
    missing = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING and f.name not in row]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing: {name} has no default for it")
    if "within" in row:
        row["within"] = _parse_policy(row["within"], f"{where}.within")
    try:
        return kind(**row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


_config: tuple[str | None, ServingConfig] | None = None


def serving_config() -> ServingConfig:
    """The configuration of this process: the file that ``BSFA_CONFIG`` names, read once; without it dense, said once.

    Raises what :meth:`ServingConfig.load` raises, and ``ValueError`` if there is no such file.
    """
    global _config
    name = os.environ.get(ENVIRONMENT) or None
    if _config is None or _config[0] != name:
        if name is None:
            log_once(f"{ENVIRONMENT} is not set: attention is dense everywhere")
            _config = (None, ServingConfig())
        else:
            try:
                _config = (name, ServingConfig.load(name))
            except OSError as error:
                raise ValueError(f"{ENVIRONMENT}={name}: {error.strerror or error}") from None
    return _config[1]


def unsupported_reason(
    policy: Policy | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    max_seqlen_k: int = 0,
    head_dim_v: int | None = None,
) -> str | None:
    """Why the kernels of ``device`` cannot run ``policy`` in this dtype and head_dim; None if they can.

    head_dim: of queries and keys; head_dim_v: of values, None where it is the same.

    For the start of a server, which would else find out with the first prompt. Some limits, like the alignment of the
    cache, only a call can know.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    blocks = None if policy is None or isinstance(policy, Dense) else (policy.block_m, policy.block_n)
    op = "attention"
    try:
        if isinstance(policy, ExactSkip) and policy.passes == 1:
            op = "skip_attention"
        elif isinstance(policy, ExactSkip):
            check_limits("skip_mask", device, dtype, head_dim, blocks)
        check_limits(op, device, dtype, head_dim, blocks, head_dim_v=head_dim_v)
        if isinstance(policy, ExactSkip) and policy.bounds:
            check_bounds(device, dtype, head_dim, (policy.block_m, policy.block_n), max_seqlen_k)
        _check_selection(policy, device, dtype, head_dim, max_seqlen_k)
    except UnsupportedError as error:
        return str(error)
    return None


def _check_selection(
    policy: Policy | None, device: torch.device, dtype: torch.dtype, head_dim: int, max_seqlen_k: int
) -> None:
    if isinstance(policy, Composed):
        for member in policy.members:
            _check_selection(member, device, dtype, head_dim, max_seqlen_k)
    elif isinstance(policy, ExactSkip):
        _check_selection(policy.within, device, dtype, head_dim, max_seqlen_k)
    elif isinstance(policy, ScoredPolicy | FlexPrefill):
        if policy.needs_summary:
            check_limits("pool_blocks", device, dtype, head_dim)
        blocks = (policy.block_m, policy.block_n)
        count = -(-max_seqlen_k // policy.block_n)
        if isinstance(policy, FlexPrefill):
            check_limits("probe_attention", device, dtype, head_dim, blocks)
            check_limits("select_blocks", device, dtype, head_dim, blocks, "pooled", None, "none", count)
        else:
            rule, stride, sharing = policy.scoring.rule, policy.scoring.stride, policy.scoring.sharing
            step = stride if rule == "antidiagonal" else None
            check_limits("select_blocks", device, dtype, head_dim, blocks, rule, step, sharing, count)


# ---- one batch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """Requests of a batch that run in one call. ``rows``: their query rows, a slice or int64 indices on the device.

    prompt_lens: int32, their whole prompts, where the server says how long these are.
    """

    rows: slice | Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    block_table: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    prompt_lens: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """Which requests of a batch a policy is for. Made once per batch, the same for all layers.

    everything: all requests. sparse, dense: those that a policy applies to and the others; None if there are none.
    """

    everything: Group
    sparse: Group | None
    dense: Group | None


def _to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small host list on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _group(whole: Group, members: list[int], starts: Sequence[int], lengths_k: Sequence[int]) -> Group:
    """Some requests of a batch. Those that follow each other are views; others are gathered by index."""
    device = whole.seqlens_k.device
    lengths = [starts[i + 1] - starts[i] for i in members]
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    rows: slice | Tensor
    if all(starts[a + 1] == starts[b] for a, b in itertools.pairwise(members)):
        rows = slice(starts[members[0]], starts[members[-1] + 1])
    else:
        rows = _to_device([r for i in members for r in range(starts[i], starts[i + 1])], torch.int64, device)
    along = members[-1] - members[0] == len(members) - 1
    index = None if along else _to_device(members, torch.int64, device)

    def of_members(values: Tensor) -> Tensor:
        return values[members[0] : members[-1] + 1] if index is None else values.index_select(0, index)

    return Group(
        rows,
        _to_device(cu, torch.int32, device),
        of_members(whole.seqlens_k),
        of_members(whole.block_table),
        max(lengths),
        max(lengths_k[i] for i in members),
        None if whole.prompt_lens is None else of_members(whole.prompt_lens),
    )


def plan_prefill(
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    cu_seqlens_q_host: Sequence[int],
    seqlens_k_host: Sequence[int],
    min_seqlen: int = DEFAULT_MIN_SEQLEN,
    decode_tokens: int = 1,
    prompt_lens: Tensor | None = None,
) -> PrefillPlan:
    """Sort the requests of a batch by what runs them; waits for no device.

    block_table int32 [B, max_pages], cu_seqlens_q int32 [B + 1], seqlens_k int32 [B]: on the device.
    cu_seqlens_q_host, seqlens_k_host: the same numbers on the host. Those of seqlens_k may be upper bounds.
    prompt_lens: int32 [B] on the device, how long each prompt is once all its chunks are there: the end that a policy's
    ``last_tiles`` speak of. None, where the server does not say: each chunk ends its prompt.

    A policy is for requests with at least ``min_seqlen`` KV tokens and more than ``decode_tokens`` query tokens: a
    decode step is dense, whatever it shares the batch with. Requests without query tokens, with which servers pad, are
    left out.
    Raises ``ValueError`` if the host's numbers contradict each other.
    """
    starts, lengths_k = [int(x) for x in cu_seqlens_q_host], [int(x) for x in seqlens_k_host]
    batch = len(lengths_k)
    if len(starts) != batch + 1 or cu_seqlens_q.shape[0] != batch + 1 or seqlens_k.shape[0] != batch:
        raise ValueError(
            f"a batch of {batch} requests needs {batch + 1} entries in cu_seqlens_q, got {len(starts)} on the host, "
            f"{cu_seqlens_q.shape[0]} and {seqlens_k.shape[0]} lengths on the device"
        )
    if prompt_lens is not None and prompt_lens.shape[0] != batch:
        raise ValueError(f"a batch of {batch} requests has {prompt_lens.shape[0]} prompt lengths")
    lengths_q = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] != 0 or min(lengths_q, default=0) < 0:
        raise ValueError(f"cu_seqlens_q must start with 0 and never decrease, got {starts}")
    everything = whole = Group(
        slice(0, starts[-1]),
        cu_seqlens_q,
        seqlens_k,
        block_table,
        max(lengths_q, default=0),
        max(lengths_k, default=0),
        prompt_lens,
    )
    present = [i for i in range(batch) if lengths_q[i] > 0]
    if 0 < len(present) < batch:  # whose pages and lengths may be anything
        everything = _group(everything, present, starts, lengths_k)
    sparse = [i for i in present if lengths_q[i] > decode_tokens and lengths_k[i] >= min_seqlen]
    chosen = set(sparse)
    dense = [i for i in present if i not in chosen]
    if not sparse or not dense:
        return PrefillPlan(everything, everything if sparse else None, everything if dense else None)
    return PrefillPlan(everything, _group(whole, sparse, starts, lengths_k), _group(whole, dense, starts, lengths_k))


def _run_group(
    group: Group,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    policy: Policy | None,
    out: Tensor,
    options: dict[str, Any],
) -> None:
    gathered = isinstance(group.rows, Tensor)
    rows = q.index_select(0, group.rows) if isinstance(group.rows, Tensor) else q[group.rows]
    result = attention_paged(
        rows,
        k_cache,
        v_cache,
        group.block_table,
        group.seqlens_k,
        cu_seqlens_q=group.cu_seqlens_q,
        max_seqlen_q=group.max_seqlen_q,
        max_seqlen_k=group.max_seqlen_k,
        prompt_lens=group.prompt_lens,
        policy=policy,
        out=None if gathered else out[group.rows],
        **options,
    )
    if isinstance(group.rows, Tensor):
        out.index_copy_(0, group.rows, cast(Tensor, result))


def run_prefill(
    plan: PrefillPlan,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    policy: Policy | None,
    out: Tensor,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Attention of one layer over a batch, written into ``out`` and returned; at most two calls of ``attention_paged``.

    q [T, Hq, D], out [T, Hq, Dv]: rows past the batch's last token are neither read nor written. k_cache, v_cache:
    views ``[num_pages, page_size, Hkv, D]``, any strides but a unit one on D; the chunk's own keys are in them already.
    Raises as :func:`bsfa.attention_paged` does.
    """
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "causal": causal}
    if plan.everything.rows.stop > q.shape[0]:  # type: ignore[union-attr]
        raise ValueError(f"q has {q.shape[0]} rows, the batch has {plan.everything.rows.stop}")  # type: ignore[union-attr]
    if policy is None or isinstance(policy, Dense):
        if plan.everything.max_seqlen_q > 0:
            _run_group(plan.everything, q, k_cache, v_cache, None, out, options)
        return out
    for group, chosen in ((plan.sparse, policy), (plan.dense, None)):
        if group is not None:
            _run_group(group, q, k_cache, v_cache, chosen, out, options)
    return out


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    cu_seqlens_q_host: Sequence[int],
    seqlens_k_host: Sequence[int],
    policy: Policy | None,
    out: Tensor,
    min_seqlen: int = DEFAULT_MIN_SEQLEN,
    prompt_lens: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """:func:`plan_prefill` and :func:`run_prefill` in one, for a single layer."""
    plan = plan_prefill(
        block_table,
        cu_seqlens_q,
        seqlens_k,
        cu_seqlens_q_host,
        seqlens_k_host,
        min_seqlen,
        prompt_lens=prompt_lens,
    )
    return run_prefill(
        plan,
        q,
        k_cache,
        v_cache,
        policy=policy,
        out=out,
        softmax_scale=softmax_scale,
        softcap=softcap,
        causal=causal,
    )

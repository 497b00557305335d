"""What dropping blocks changes: error of each head's attention output at thresholds of a policy, measured on prompts.

For a head h with output projection W_h (its columns of the layer's projection), its dense attention output o and its
output o' under a threshold, both [tokens, D], one of

    output   mean over tokens of |W_h (o' - o)|^2, over the mean of |layer's attention output after the projection|^2
    loss     mean over tokens of (g . (o' - o))^2 / 2, g the gradient of log p(label) at o, the labels drawn from the
             model's own predictions: to second order, and with the errors of the tokens taken as independent, the
             Kullback-Leibler divergence of its predictions, nats per token

"output" needs no gradients: |W_h d|^2 = d^T (W_h^T W_h) d. "loss" takes a backward pass of the dense model per prompt,
with all of its activations in memory. Every threshold costs a mask and a block-sparse attention over the dense run's
q, k, v; so a head is measured at POINTS thresholds, spread evenly in the logarithm of its density. Between them
the error is linear in the density.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bsfa.block_mask import BlockMask
from bsfa.calibration.collect import CurveCollector
from bsfa.calibration.curves import BlockCurves
from bsfa.errors import UnsupportedError
from bsfa.placement import input_device
from bsfa.policies import ScoredPolicy, ThresholdPolicy
from bsfa.stages import block_sparse_attention, pool_blocks, select_blocks

if TYPE_CHECKING:
    from bsfa.integrations.transformers import AttentionCall

COSTS = ("output", "loss")
POINTS = 22  # thresholds per head, besides keep-all, whose error is 0
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
CHUNK = 1 << 24  # elements of the change of the output in float32
LABEL_ROWS = 256  # rows of logits whose labels are drawn at once
UNIT = 2.0**40  # probabilities are summed as integers of 1 / UNIT: the same labels whatever the order of additions
BIAS_SCALE = 64.0  # unit vectors are projected at this size, so that a bias in low precision rounds little of them off


@dataclass(frozen=True, eq=False)
class ErrorCurves(BlockCurves):
    """:class:`BlockCurves` with the error at every threshold: float32 [Hq, G], 0 where all is kept."""

    error: Tensor


# ---- which thresholds -----------------------------------------------------------------------------------------------


def spread_points(density: Tensor, group: int = 1, points: int = POINTS) -> Tensor:
    """Grid indices int64 [heads, points] of density [heads, G]: the last one, and steps of equal ratio of the density.

    Heads of a group share a threshold, and so the indices, those of the first of them. Where a density jumps, an index
    comes several times.
    """
    d = density.double()
    first, last = d[:, 1:2], d[:, -1:]
    ratio = torch.arange(points, dtype=torch.float64) / max(points - 1, 1)
    wanted = first * (last / first) ** ratio
    index = (d[:, None, 1:] >= wanted[:, :, None] * (1 - 1e-9)).sum(-1)
    index[:, -1] = d.shape[1] - 1
    return index.clamp(1, d.shape[1] - 1)[::group].repeat_interleave(group, dim=0)


def between(density: Tensor, index: Tensor, error: Tensor) -> Tensor:
    """Errors [heads, G] from those at grid indices [heads, n] (and 0 at index 0): linear in the density."""
    heads, points = density.shape
    d = density.double()
    known = torch.cat((torch.zeros(heads, 1, dtype=torch.int64), index), 1)
    value = torch.cat((torch.zeros(heads, 1, dtype=torch.float64), error.double()), 1)
    grid = torch.arange(points).expand(heads, -1).contiguous()
    right = torch.searchsorted(known.contiguous(), grid).clamp(1, known.shape[1] - 1)
    low, high = known.gather(1, right - 1), known.gather(1, right)
    d_low, d_high = d.gather(1, low), d.gather(1, high)
    part = (d_low - d) / (d_low - d_high).clamp(min=1e-300)
    part = torch.where(d_low > d_high, part.clamp(0.0, 1.0), (grid > low).double())
    e_low, e_high = value.gather(1, right - 1), value.gather(1, right)
    return e_low + (e_high - e_low) * part


# ---- one attention call ---------------------------------------------------------------------------------------------


class MaskMaker:
    """The masks of one prompt's call under many thresholds: bit for bit those of :func:`bsfa.select_blocks`.

    Keys are pooled once. Scores are made once too where a mask is the blocks whose score passes, and those of the
    loosest threshold. On a GPU the mass rules are no such case: their selection sums weights in another order than
    their scores do, and a score within rounding of the threshold may fall on its other side.
    """

    def __init__(self, policy: ScoredPolicy, q: Tensor, k: Tensor, **options: Any):
        self._policy, self._q, self._k, self._options = policy, q, k, options
        self._summary = None
        if policy.needs_summary:
            self._summary = pool_blocks(k, block_n=policy.block_n, pooling=policy.summary_pooling)
        self._scores: Tensor | None = None
        if policy.scoring.sharing != "union" and (q.device.type == "cpu" or policy.scoring.rule == "relative_max"):
            loosest = policy.with_threshold(1.0 if policy.keeps_at_least else 0.0)
            self._forced, self._scores = self._select(loosest, return_scores=True)
            self._always = self._forced.to_rows()

    def _select(self, policy: ScoredPolicy, **more: Any) -> Any:
        q, k = self._q, self._k
        return select_blocks(q, self._summary, policy, k=k, seqlen_k=k.shape[1], **self._options, **more)

    def mask(self, threshold: Tensor) -> BlockMask:
        """The mask under a threshold per head of the mask, float32 [heads]."""
        policy = self._policy.with_threshold(threshold.to(self._q.device))
        if self._scores is None:
            mask = self._select(policy)
            assert isinstance(mask, BlockMask)
            return mask
        limit = policy.thresholds_for(self._scores.shape[1], self._q.device)[:, None]
        if policy.keeps_at_least:
            passes = (limit < 0) | ~((self._scores < limit) | (self._scores <= 0))
        else:
            passes = ~(self._scores >= limit)
        return BlockMask.from_rows(passes | self._always, self._forced.geometry)


def squared_changes(
    policy: ScoredPolicy,
    thresholds: Tensor,
    call: AttentionCall,
    *,
    grams: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """Mean over tokens of d^T gram d, or of (gradient . d)^2, d the change of a head's output: float64 [Hq, n], CPU.

    thresholds: float32 [Hq, n], the same for query heads that share one. grams: float32 [Hq, D, D]; gradient:
    [S, Hq, D]; exactly one of them.
    """
    options: dict[str, Any] = {"causal": call.causal, "softmax_scale": call.softmax_scale, "softcap": call.softcap}
    q, k, v = call.q, call.k, call.v
    tokens, heads, dim = q.shape[1], q.shape[2], v.shape[3]
    group = heads // k.shape[2] if policy.shares_thresholds else 1
    rows = max(1, CHUNK // (heads * dim))
    masks = MaskMaker(policy, q, k, **options)
    found = torch.zeros(heads, thresholds.shape[1], dtype=torch.float64, device=q.device)
    before: tuple[Tensor, int] | None = None
    for i in range(thresholds.shape[1]):
        if before is not None and torch.equal(before[0], thresholds[:, i]):
            found[:, i] = found[:, before[1]]
            continue
        before = thresholds[:, i], i
        sparse = block_sparse_attention(q, k, v, masks.mask(thresholds[::group, i]), **options)[0]
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            change = (sparse[0, part].float() - call.out[0, part].float()).transpose(0, 1)  # [Hq, rows, D]
            if grams is not None:
                found[:, i] += (change @ grams * change).sum(-1).double().sum(-1)
            else:
                assert gradient is not None
                along = (gradient[part].float().transpose(0, 1) * change).sum(-1)
                found[:, i] += along.double().square().sum(-1)
    return found.cpu() / tokens


# ---- the output projection ------------------------------------------------------------------------------------------


def output_projections(model: nn.Module) -> dict[int, nn.Module]:
    """The output projection of each attention layer, by the names that transformers' models give it.

    Raises :class:`bsfa.UnsupportedError` naming the layer where there is none, or several attention modules.
    """
    from bsfa.integrations.transformers import attention_layers

    found = {}
    for layer, modules in attention_layers(model).items():
        if len(modules) > 1:
            raise UnsupportedError(f"layer {layer} has {len(modules)} attention modules: their errors cannot be told")
        named = [getattr(modules[0], name, None) for name in PROJECTIONS]
        chosen = [m for m in named if isinstance(m, nn.Module)]
        if not chosen:
            raise UnsupportedError(
                f"layer {layer}: {type(modules[0]).__name__} has no output projection by a known name "
                f"({', '.join(PROJECTIONS)}), so the error of its output cannot be measured"
            )
        found[layer] = chosen[0]
    return found


def projected(module: nn.Module, x: Tensor) -> Tensor:
    """float32 [n, hidden] of x [n, in features] by the linear module without its bias, whatever holds its weights
    (quantised, offloaded, adapters): it is run.
    """
    y: Tensor = module(x[None])[0].float()
    return y - module(torch.zeros_like(x[None, :1]))[0].float()


def gram_matrices(module: nn.Module, heads: int, like: Tensor) -> Tensor:
    """W_h^T W_h of every head, float32 [heads, D, D]; ``like``: attention output [..., D] for D, dtype and device."""
    dim = like.shape[-1]
    grams = torch.empty(heads, dim, dim, dtype=torch.float32, device=like.device)
    for h in range(heads):
        units = torch.zeros(dim, heads * dim, dtype=like.dtype, device=like.device)
        units[:, h * dim : (h + 1) * dim] = torch.eye(dim, dtype=like.dtype, device=like.device) * BIAS_SCALE
        columns = projected(module, units).to(like.device) / BIAS_SCALE  # [D, hidden]
        grams[h] = columns @ columns.T
    return grams


def output_power(module: nn.Module, out: Tensor) -> float:
    """Mean over tokens of the squared norm of the projection of attention output [S, Hq, D]."""
    rows = max(1, CHUNK // (out.shape[1] * out.shape[2]))
    total = 0.0
    for part in out.flatten(1).split(rows):
        total += float(projected(module, part).square().sum(-1).double().sum())
    return total / out.shape[0]


# ---- gradients ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients flow to activations only, and CUDA's kernels that would add in any order do not."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for p in wanted:
        p.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that have no deterministic kernel, which are not used here
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        for p in wanted:
            p.requires_grad_(True)


def draw_labels(logits: Tensor, ids: Tensor) -> Tensor:
    """A token per row of logits [S, vocab], drawn from their softmax; the same for the same logits and prompt."""
    seed = int.from_bytes(hashlib.sha256(ids.to(torch.int64).cpu().numpy().tobytes()).digest()[:7], "little")
    uniform = torch.rand(logits.shape[0], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = []
    for rows, u in zip(logits.split(LABEL_ROWS), uniform.to(logits.device).split(LABEL_ROWS), strict=True):
        share = (torch.softmax(rows.float(), -1).double() * UNIT).round().to(torch.int64).cumsum(-1)
        at = (u * share[:, -1:].double()).floor().to(torch.int64)
        labels.append(torch.searchsorted(share, at, right=True).clamp_(max=logits.shape[-1] - 1))
    return torch.cat(labels)


def loss_gradients(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Gradient of the sum of log p(label) at the input of each layer's output projection, [S, Hq * D], by layer.

    One pass forth and back with attention "sdpa"; the labels are :func:`draw_labels`. Raises
    :class:`bsfa.UnsupportedError` where memory does not suffice, or the model's gradients are of no use.
    """
    from bsfa.integrations.transformers import attention_implementations

    inputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[layer] = args[0]

        return hook

    def begin(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.detach().clone().requires_grad_(True)

    implementation = attention_implementations(model)
    handles = [m.register_forward_pre_hook(keep(i)) for i, m in output_projections(model).items()]
    handles.append(model.get_input_embeddings().register_forward_hook(begin))
    try:
        with _without_parameter_gradients(model):
            model.set_attn_implementation("sdpa")
            tokens = ids.clone()[None].to(input_device(model))
            logits = model(input_ids=tokens, use_cache=False).logits[0]
            with torch.no_grad():
                labels = draw_labels(logits.detach(), ids)
            scalar = torch.log_softmax(logits.float(), -1).gather(-1, labels).sum()
            found = torch.autograd.grad(scalar, list(inputs.values()))
    except torch.OutOfMemoryError:
        raise UnsupportedError(
            f"out of memory in the backward pass of {len(ids)} tokens, which errors='loss' needs: measure with "
            "errors='output', or cut the prompts (max_length)"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(implementation)
    gradients = {layer: g[0].detach() for layer, g in zip(inputs, found, strict=True)}
    odd = [layer for layer, g in gradients.items() if not bool(g.isfinite().all())]
    if odd:
        raise UnsupportedError(
            f"the gradients of layer {odd[0]} are not finite: run the model in bfloat16 or float32, or measure with "
            "errors='output'"
        )
    return gradients


# ---- all calls of a prompt ------------------------------------------------------------------------------------------


class ErrorCollector(CurveCollector):
    """Curves with errors. Use it within :meth:`attached`, which checks what feeds the output projections."""

    kind = ErrorCurves
    dense: ClassVar[Mapping[str, float]] = {**CurveCollector.dense, "error": 0.0}

    def __init__(self, model: Any, policy: ThresholdPolicy, num_layers: int, grid: Tensor, tail: float, cost: str):
        super().__init__(policy, num_layers, grid, tail)
        self.model = model
        self.cost = cost
        self.projections = output_projections(model)
        self.grams: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.expected: dict[int, Tensor] = {}  # outputs that the projection is to see unchanged
        self.checked: set[int] = set()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, a projection that sees anything but the attention's output raises."""

        def watch(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                out = self.expected.pop(layer, None)
                if out is None:
                    return
                if not args or args[0].numel() != out.numel() or not torch.equal(args[0].flatten(), out.flatten()):
                    raise UnsupportedError(
                        f"layer {layer}: attention's output is changed before its projection, so the error after it "
                        "cannot be measured"
                    )
                self.checked.add(layer)

            return hook

        handles = [m.register_forward_pre_hook(watch(i)) for i, m in self.projections.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.expected.clear()
            self.gradients.clear()

    def prepare(self, ids: Tensor) -> None:
        """The gradients of a prompt that is about to run."""
        if self.cost == "loss":
            self.gradients = loss_gradients(self.model, ids)

    def reduce(self, call: AttentionCall) -> ErrorCurves:
        """Curves and errors of one call."""
        curves = super().reduce(call)
        assert isinstance(self.policy, ScoredPolicy)
        heads, dim = call.out.shape[2], call.out.shape[3]
        index = spread_points(curves.density.cpu(), self.group if self.policy.shares_thresholds else 1)
        thresholds, module = self.grid[index], self.projections[call.layer]
        if self.cost == "loss":
            if call.softcap:
                raise UnsupportedError(
                    f"layer {call.layer} has a softcap, which torch's attention with gradients has not: measure with "
                    "errors='output'"
                )
            gradient = self.gradients.pop(call.layer).view(-1, heads, dim)
            error = squared_changes(self.policy, thresholds, call, gradient=gradient) / 2
        else:
            if call.layer not in self.grams:
                self.grams[call.layer] = gram_matrices(module, heads, call.out)
            error = squared_changes(self.policy, thresholds, call, grams=self.grams[call.layer])
            error /= max(output_power(module, call.out[0]), torch.finfo(torch.float32).tiny)
        if not bool(error.isfinite().all()):
            raise ValueError(f"layer {call.layer}: the error of attention's output is not finite")
        if call.layer not in self.checked:
            self.expected[call.layer] = call.out
        # What keeps all differs from dense attention by rounding at most.
        error = torch.where(curves.density.cpu().gather(1, index) < 1.0, error.clamp(min=0.0), 0.0)
        full = between(curves.density.cpu(), index, error)
        return ErrorCurves(curves.lost, curves.tail_lost, curves.density, full.to(torch.float32))

    def take(self) -> ErrorCurves:
        """What the prompt gave; raises if a projection was never run."""
        if self.expected:
            raise UnsupportedError(f"layer {min(self.expected)}: its output projection did not run after attention")
        self.gradients = {}  # of layers that stay dense
        found = super().take()
        assert isinstance(found, ErrorCurves)
        return found

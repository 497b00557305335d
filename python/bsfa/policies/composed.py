"""Union, Intersection and PerLayer: policies made of policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask
from bsfa.policies.base import Policy, ScoredPolicy, Selection
from bsfa.policies.dense import Dense
from bsfa.policies.exact_skip import ExactSkip
from bsfa.policies.static_pattern import StaticPattern
from bsfa.policies.token_topk import TokenTopK
from bsfa.pooling import pool

C = TypeVar("C", bound="Composed")


@dataclass(frozen=True, eq=False, kw_only=True, init=False)
class Composed(Policy):
    """Base of :class:`Union` and :class:`Intersection`: members that select from the same blocks in one call.

    Members that look at pooled keys share one summary per kind of pooling: the policy's own ``summary_pooling`` comes
    from the caller, further kinds are pooled from the keys (then ``needs_keys`` is true).
    """

    policies: tuple[Policy | None, ...]
    #: The policies that are asked; none if the result is dense anyway.
    members: tuple[Policy, ...] = ()
    #: Kinds of pooled keys that they ask for, in order.
    poolings: tuple[str, ...] = ()
    #: Whether one dense member makes the whole dense.
    _dense_decides: ClassVar[bool] = False

    def __init__(self, *policies: Policy | None) -> None:
        owner = type(self).__name__
        if not policies:
            raise ValueError(f"{owner} needs at least one policy")
        for p in policies:
            if p is not None and not isinstance(p, Policy):
                raise TypeError(f"{owner} takes policies or None (dense), got {type(p).__name__}")
            if isinstance(p, ExactSkip):
                raise ValueError(f"ExactSkip decides inside attention: give it the {owner} as ExactSkip(within=...)")
            if isinstance(p, TokenTopK):
                raise ValueError(f"TokenTopK chooses keys of single queries, which a {owner} of blocks would lose")
        # Dense ones have no blocks of their own.
        sizes = {(p.block_m, p.block_n): p for p in policies if p is not None and not _is_dense(p)}
        if len(sizes) > 1:
            text = ", ".join(f"{type(p).__name__} {m} x {n}" for (m, n), p in sizes.items())
            raise ValueError(f"the policies of a {owner} must have the same block_m x block_n, got {text}")
        members = tuple(p for p in policies if p is not None and not _is_dense(p))
        if self._dense_decides and len(members) < len(policies):
            members = ()
        block_m, block_n = next(iter(sizes), (128, 128))
        found: dict[str, object] = {"policies": policies, "members": members, "block_m": block_m, "block_n": block_n}
        found["poolings"] = tuple(dict.fromkeys(p.summary_pooling for p in members if p.needs_summary))
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _combine(self, masks: list[BlockMask], selection: Selection) -> BlockMask:
        raise NotImplementedError

    @property
    def needs_summary(self) -> bool:
        """Whether a member looks at pooled keys."""
        return len(self.poolings) > 0

    @property
    def needs_keys(self) -> bool:
        """Whether a member looks at the keys themselves, or members pool them in different ways."""
        return len(self.poolings) > 1 or any(p.needs_keys for p in self.members)

    @property
    def summary_pooling(self) -> str:
        """The pooling of the first member that looks at pooled keys."""
        return self.poolings[0] if self.poolings else "mean"

    def select(self, selection: Selection) -> BlockMask | None:
        """Ask the members, and combine what they keep. None if all blocks are kept for certain."""
        summaries: dict[str, Tensor | None] = {self.summary_pooling: selection.summary}
        masks: list[BlockMask] = []
        for p in self.members:
            seen = selection
            if p.needs_summary:
                if p.summary_pooling not in summaries:
                    summaries[p.summary_pooling] = self._pool(selection, p.summary_pooling)
                seen = replace(selection, summary=summaries[p.summary_pooling])
            mask = p.select(seen)
            if mask is not None:
                masks.append(mask)
            elif self._dense_decides:
                return None
        return self._combine(masks, selection) if masks else None

    def to(self: C, device: torch.device) -> C:
        """The same policy of members with tensors on ``device``."""
        moved = [on_device(p, device) for p in self.policies]
        return self if all(a is b for a, b in zip(moved, self.policies, strict=True)) else type(self)(*moved)

    def _pool(self, selection: Selection, pooling: str) -> Tensor:
        if selection.k is None:
            raise ValueError(
                f"the members of this {type(self).__name__} pool keys in different ways ({', '.join(self.poolings)}): "
                "pass k"
            )
        return pool(selection.k, selection.layout, self.block_n, pooling)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.policies))})"


def _is_dense(policy: Policy | None) -> bool:
    return policy is None or isinstance(policy, Dense) or (isinstance(policy, Composed) and len(policy.members) == 0)


def _keeps_diagonal(policy: Policy) -> bool:
    """Whether every row is known to keep its own blocks: by the window, which is at least one block."""
    if isinstance(policy, Composed):
        return isinstance(policy, Intersection) or any(map(_keeps_diagonal, policy.members))
    return isinstance(policy, ScoredPolicy | StaticPattern)


@dataclass(frozen=True, eq=False, kw_only=True, init=False, repr=False)
class Union(Composed):
    """Keep what any of the policies keeps: ``Union(a, b, ...)``. With a dense member (Dense or None) it is dense.

    The members must have the same ``block_m`` and ``block_n``. Their masks may have query heads, KV heads or one; the
    result has the most of them. Use it to add what a score cannot know: ``Union(RelativeMax(), Fixed(mask=mine))``.
    """

    name: ClassVar[str] = "union"
    _dense_decides: ClassVar[bool] = True

    def _combine(self, masks: list[BlockMask], selection: Selection) -> BlockMask:
        return reduce(BlockMask.__or__, masks)


@dataclass(frozen=True, eq=False, kw_only=True, init=False, repr=False)
class Intersection(Composed):
    """Keep what all of the policies keep, and every row's own blocks: ``Intersection(a, b, ...)``.

    Dense members (Dense or None) change nothing. A query tile always keeps the blocks that its own tokens lie in, so
    that no query ends with nothing; members with a window (at least one block) keep them anyway. Block sizes and heads
    as in :class:`Union`. Sinks and ``last_tiles`` of one member do not outvote another: give them to both.
    """

    name: ClassVar[str] = "intersection"

    def _combine(self, masks: list[BlockMask], selection: Selection) -> BlockMask:
        mask = reduce(BlockMask.__and__, masks)
        if all(map(_keeps_diagonal, self.members)):
            return mask
        own = StaticPattern(sink_blocks=0, window_blocks=1, block_m=self.block_m, block_n=self.block_n)
        return mask | own.select(selection)


class PerLayer:
    """A policy for each layer of a model, by hand: what ``set_policy`` and ``bsfa.evaluation`` take for a
    :class:`bsfa.ThresholdTable`. None is dense.
    """

    def __init__(self, policies: Sequence[Policy | None]) -> None:
        if isinstance(policies, str) or not isinstance(policies, Sequence):
            raise TypeError(f"PerLayer takes a sequence of policies, got {type(policies).__name__}")
        for i, p in enumerate(policies):
            if p is not None and not isinstance(p, Policy):
                raise TypeError(f"the policy of layer {i} must be a policy or None, got {type(p).__name__}")
        if not policies:
            raise ValueError("PerLayer needs a policy or None for each layer, got none")
        self.policies = tuple(policies)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.policies)

    def layer(self, index: int, device: torch.device | str = "cpu") -> Policy | None:
        """The policy of layer ``index``, thresholds that are tensors moved to ``device``; None is dense."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"there are policies for layers 0 .. {self.num_layers - 1}, not {index}")
        return on_device(self.policies[index], torch.device(device))

    def check_model(self, model: Any) -> None:
        """Raise ``ValueError`` unless ``model`` has as many layers."""
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        count = getattr(text, "num_hidden_layers", None)
        if count is not None and count != self.num_layers:
            raise ValueError(f"{type(model).__name__} has {count} layers, but {self.num_layers} policies were given")

    def __repr__(self) -> str:
        return f"PerLayer({list(self.policies)!r})"


def on_device(policy: Policy | None, device: torch.device) -> Policy | None:
    """``policy`` with thresholds that are tensors on ``device``, so that calls do not copy them again."""
    return None if policy is None else policy.to(device)

"""TokenTopK: the keys that each query is given, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask
from bsfa.layout import Layout
from bsfa.policies.base import Policy, Selection
from bsfa.token_mask import TokenMask, mask_of_indices


@dataclass(frozen=True, eq=False)
class TokenTopK(Policy):
    """Every query attends to the keys that it is given and to no others; all heads alike (DeepSeek sparse attention).

    indices: int32 ``[B, seqlen_q, topk]``, or ``[total_q, topk]`` for packed queries: positions in the query's own
    sequence, -1 padded, in any order; see :meth:`bsfa.TokenMask.from_indices`. Or a :class:`bsfa.TokenMask` that was
    made of them: layers that share their indices then share it too.
    check: whether invalid indices raise, as ``from_indices`` takes it; a TokenMask was checked or not when it was made.

    The indices belong to one call: another layout raises ``ValueError``. Blocks of 128 x 128 tokens that hold none of
    the keys are skipped, the rest is computed and masked, so the time is that of the blocks. It says what attention
    is, not what may be left out: decode steps are masked too, and it goes neither with ``window_left``, nor with the
    mean correction, nor into :class:`Union`, :class:`Intersection` or :class:`ExactSkip`. As a selection
    (:func:`bsfa.select_blocks`) it gives its blocks.
    """

    indices: Tensor | TokenMask
    check: bool | None = None
    block_m: int = field(init=False, default=128)
    block_n: int = field(init=False, default=128)
    name: ClassVar[str] = "token-topk"

    def __post_init__(self) -> None:
        if not isinstance(self.indices, Tensor | TokenMask):
            raise TypeError(f"TokenTopK.indices must be a tensor or a TokenMask, got {type(self.indices).__name__}")
        if isinstance(self.indices, Tensor) and self.indices.dtype != torch.int32:
            raise TypeError(f"TokenTopK.indices must be int32, got {self.indices.dtype}")
        if self.check is not None and not isinstance(self.check, bool):
            raise TypeError(f"TokenTopK.check must be a bool or None, got {type(self.check).__name__}")

    def token_mask(self, layout: Layout) -> TokenMask:
        """The mask for a call of this layout."""
        if isinstance(self.indices, TokenMask):
            return self.indices
        return mask_of_indices(self.indices, layout, self.check)

    def select(self, selection: Selection) -> BlockMask:
        """The blocks that hold a key of one of their queries."""
        mask = self.token_mask(selection.layout)
        mask.check_call(selection.layout, selection.q.device)
        return mask.blocks_for(selection.layout)

    def to(self, device: torch.device) -> TokenTopK:
        """The same policy with its indices on ``device``."""
        moved = self.indices.to(device)
        return self if moved is self.indices else replace(self, indices=moved)

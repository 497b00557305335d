"""bsfa: training-free block-sparse flash attention for long-context LLM prefill.

    out = bsfa.attention(q, k, v, policy=bsfa.policies.RelativeMax(alpha=0.1))

Three stages, three nouns: :func:`pool_blocks` makes a summary of the keys, :func:`select_blocks` a :class:`BlockMask`,
and :func:`block_sparse_attention` computes exact attention over the kept blocks; :func:`attention` chains them.
"""

from __future__ import annotations

from bsfa import policies
from bsfa._library import __version__
from bsfa.attention import attention, attention_paged, attention_varlen
from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.doctor import doctor
from bsfa.errors import DenseFallbackWarning, ThresholdMismatchError, UnsupportedError
from bsfa.importing import import_bsfa
from bsfa.info import AttentionInfo
from bsfa.masked_mha import masked_mha, merge_attention
from bsfa.measuring import block_mass, tile_max
from bsfa.plotting import plot_mask
from bsfa.stages import block_sparse_attention, pool_blocks, select_blocks
from bsfa.summary import BlockSummary
from bsfa.thresholds import ThresholdTable
from bsfa.token_mask import TokenMask

__all__ = [
    "AttentionInfo",
    "BlockMask",
    "BlockSummary",
    "DenseFallbackWarning",
    "MaskGeometry",
    "ThresholdMismatchError",
    "ThresholdTable",
    "TokenMask",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_paged",
    "attention_varlen",
    "block_mass",
    "block_sparse_attention",
    "doctor",
    "import_bsfa",
    "masked_mha",
    "merge_attention",
    "plot_mask",
    "policies",
    "pool_blocks",
    "select_blocks",
    "tile_max",
]

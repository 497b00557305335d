"""Loads the compiled libraries and knows which operator has a kernel for which device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bsfa.errors import UnsupportedError

try:
    from bsfa import _C
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "bsfa's compiled extension bsfa._C cannot be loaded: build it with "
        "'pip install --no-build-isolation .' against the torch of this environment "
        f"({torch.__version__}). Cause: {error}"
    ) from error

# The operations; bound_mask is CUDA's alone. attention_out and skip_attention_out are no further ones but the same into
# a given tensor, and dense_attention is the plain part of attention; a device has all or none.
OPERATORS = (
    "pool_blocks",
    "score_blocks",
    "select_blocks",
    "probe_attention",
    "pattern_mask",
    "token_mask",
    "attention",
    "skip_attention",
    "skip_mask",
    "bound_mask",
    "block_mass",
    "tile_max",
)

#: Why the CUDA library is not in use; None if it is.
cuda_missing: str | None = None


def cuda_library_path() -> Path | None:
    """The CUDA library that was built into this package, if any: of CMake's and setup.py's, which carries the Python
    version in its name, the one that was built last.
    """
    found = sorted((Path(__file__).parent / "lib").glob("libbsfa_cuda*.so"))
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _load_cuda() -> str | None:
    path = cuda_library_path()
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if path is None:
        return "the CUDA library was not built (no nvcc when bsfa was installed?)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


cuda_missing = _load_cuda()
__version__: str = _C.build_info()["version"]

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
KERNELS: dict[str, frozenset[str]] = {
    device: frozenset(op for op in OPERATORS if _has_kernel(f"bsfa::{op}", key))
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
}


def kernel_table() -> list[dict[str, Any]]:
    """The compiled kernels: one row each with op, device, arch, dtypes, head_dim; where not all go, also
    blocks, rule, sharing, stride, max_blocks. A head_dim 192/128 is one of 128 in v.
    """
    rows: list[dict[str, Any]] = list(_C.kernels())
    if cuda_missing is None:
        rows += json.loads(torch.ops.bsfa.cuda_kernels())
    return rows


def require_kernel(op: str, device: torch.device) -> None:
    """Raise :class:`UnsupportedError` naming ``op`` if it has no kernel for ``device``."""
    if op in KERNELS.get(device.type, frozenset()):
        return
    if device.type == "cuda":
        why = cuda_missing or "it has no CUDA kernel in this version of bsfa"
    else:
        why = f"bsfa has no kernels for device type '{device.type}'"
    raise UnsupportedError(
        f"bsfa operation '{op}' cannot run on {device}: {why}. "
        "Move the tensors to the CPU, or see bsfa.doctor() for what this installation can run."
    )

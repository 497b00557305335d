"""What was built, what this machine can run, and why not the rest."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from bsfa import _library


def cpu_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def doctor() -> dict[str, Any]:
    """Facts about this installation.

    Returns a dict: ``build`` (version, compiler, torch target, CPU instruction set), ``machine`` (python, torch, CPU,
    GPUs), ``kernels`` (the compiled kernels, one row each) and ``operations``: for each operation and device either
    "ok" or the reason why it cannot run here. ``python -m bsfa doctor`` prints it.
    """
    gpus: list[dict[str, Any]] = []
    cuda_problem = _library.cuda_missing
    if cuda_problem is None and not torch.cuda.is_available():
        cuda_problem = "torch finds no CUDA device"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpus.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": p.total_memory / 2**30})
        if cuda_problem is None and all(not g["capability"].startswith("9.0") for g in gpus):
            cuda_problem = "the CUDA kernels are compiled for compute capability 9.0 (Hopper) only"
    operations: dict[str, dict[str, str]] = {}
    for op in _library.OPERATORS:
        cuda = cuda_problem or ("ok" if op in _library.KERNELS["cuda"] else "no CUDA kernel in this version of bsfa")
        operations[op] = {"cpu": "ok" if op in _library.KERNELS["cpu"] else "none: of use on a GPU alone", "cuda": cuda}
    return {
        "build": dict(_library._C.build_info()),
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "kernels": _library.kernel_table(),
        "operations": operations,
    }


def default_device() -> torch.device:
    """A GPU if every operation runs on it, else the CPU."""
    operations = doctor()["operations"]
    return torch.device("cuda" if all(row["cuda"] == "ok" for row in operations.values()) else "cpu")

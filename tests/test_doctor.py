"""bsfa.doctor() returns what it documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import bsfa
from bsfa import _library

OPERATIONS = {
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
}


def test_doctor() -> None:
    facts = bsfa.doctor()
    assert set(facts) == {"build", "machine", "kernels", "operations"}
    assert facts["build"]["version"] == bsfa.__version__
    assert {"compiler", "torch_target", "cpu_instruction_set"} <= set(facts["build"])
    assert facts["build"]["cpu_instruction_set"] in ("generic", "avx2", "avx512")
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert len(facts["machine"]["gpus"]) == torch.cuda.device_count()
    json.dumps(facts)


CUDA_ONLY = {"bound_mask"}


def test_every_operation_has_a_verdict_and_all_but_one_a_cpu_kernel() -> None:
    facts = bsfa.doctor()
    assert set(facts["operations"]) == OPERATIONS
    for op, verdicts in facts["operations"].items():
        assert set(verdicts) == {"cpu", "cuda"} and verdicts["cuda"]
        assert verdicts["cpu"] == ("none: of use on a GPU alone" if op in CUDA_ONLY else "ok")
        if not torch.cuda.is_available():
            assert verdicts["cuda"] != "ok"
    rows = facts["kernels"]
    assert all({"op", "device", "arch", "dtypes", "head_dim"} <= set(row) for row in rows)
    assert {row["op"] for row in rows if row["device"] == "cpu"} == OPERATIONS - CUDA_ONLY


def test_unsupported_devices_are_named() -> None:
    q = torch.empty(1, 8, 2, 16, device="meta")
    try:
        bsfa.attention(q, q, q)
    except bsfa.UnsupportedError as error:
        assert "meta" in str(error) and "attention" in str(error)
    else:
        raise AssertionError("meta tensors have no kernel")


def test_of_two_cuda_libraries_the_newer_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    assert _library.cuda_library_path() is None
    (tmp_path / "lib").mkdir()
    paths = [tmp_path / "lib" / name for name in ("libbsfa_cuda.so", "libbsfa_cuda.cpython-311-x86_64-linux-gnu.so")]
    for path in paths:
        path.touch()
    for newer, older in (paths, paths[::-1]):
        os.utime(older, (1000, 1000))
        os.utime(newer, (2000, 2000))
        assert _library.cuda_library_path() == newer

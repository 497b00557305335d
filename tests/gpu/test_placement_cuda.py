"""Models offloaded from a GPU, or with layers on two of them, calibrate and evaluate like one on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

from bsfa._library import KERNELS
from bsfa.calibration import choose, collect
from bsfa.evaluation import evaluate
from bsfa.identity import weight_fingerprint
from bsfa.placement import input_device, model_devices
from bsfa.policies import RelativeMax
from tiny_model import make_model, make_prompts, make_tokenizer

if "block_mass" not in KERNELS["cuda"]:
    pytest.skip("needs block_mass on CUDA", allow_module_level=True)

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
LATE = ("model.layers.1", "model.norm", "lm_head")
MAPS: dict[str, dict[str, Any]] = {
    "a layer on the CPU": {p: "cpu" if p == "model.layers.0" else 0 for p in PARTS},
    "a layer on the disk": {p: "disk" if p == "model.layers.1" else 0 for p in PARTS},
    "embedding on the CPU": {p: "cpu" if p == "model.embed_tokens" else 0 for p in PARTS},
    "two GPUs": {p: 1 if p in LATE else 0 for p in PARTS},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(hidden_size=256, head_dim=64).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", MAPS)
def test_same_as_one_gpu(case: str, folder: Path, tmp_path: Path) -> None:
    if case == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    policy = RelativeMax(sink_blocks=1, window_blocks=1, last_tiles=1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda:0").eval()
    spread = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=MAPS[case], offload_folder=str(tmp_path)
    ).eval()
    assert input_device(spread) == torch.device("cuda:0")
    assert len([d for d in model_devices(spread) if d.type == "cuda"]) == (2 if case == "two GPUs" else 1)
    assert weight_fingerprint(spread) == weight_fingerprint(plain) is not None
    tokenizer, prompts = make_tokenizer(), make_prompts(6, words=600)
    tables = [choose(collect(m, tokenizer, prompts, policy), 0.6) for m in (plain, spread)]
    assert torch.equal(tables[0].thresholds, tables[1].thresholds)
    runs = [evaluate(m, tokenizer, prompts[:2], {"t": tables[0]}).runs["t"] for m in (plain, spread)]
    for name in ("prose_loss", "layer_density", "layer_recall"):
        assert getattr(runs[0], name) == getattr(runs[1], name)
    assert all(run.seconds > 0 and run.speedup > 0 for run in runs)


def test_two_runs_are_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """Sums of a GPU in any order: calibrating twice gives the same file."""
    policy = RelativeMax(sink_blocks=1, window_blocks=1, last_tiles=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda:0").eval()
    for name in ("a", "b"):
        curves = collect(model, make_tokenizer(), make_prompts(8, words=600), policy)
        choose(curves, 0.6).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

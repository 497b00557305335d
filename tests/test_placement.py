"""Models that accelerate spreads or offloads are calibrated, identified and evaluated like plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bsfa.calibration import CalibrationCurves, choose, collect
from bsfa.calibration.forward import logits_at
from bsfa.cli import app
from bsfa.evaluation import evaluate
from bsfa.identity import ModelIdentity, weight_fingerprint
from bsfa.integrations.transformers import set_policy
from bsfa.placement import input_device, is_spread, model_devices, module_device, parameters
from bsfa.policies import RelativeMax
from bsfa.thresholds import ThresholdTable
from tiny_model import make_model, make_prompts, make_rows, make_tokenizer, write_rows

POLICY = RelativeMax(block_m=32, block_n=32, sink_blocks=1, window_blocks=1, last_tiles=1)
CPU = torch.device("cpu")

Offload = Callable[[Any, Path], Any]


def on_cpu(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=CPU)


def on_disk(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.disk_offload(model, str(folder / "weights"), execution_device=CPU)
    return model


def loaded(device_map: Any) -> Offload:
    """Saved, and loaded with a device map: what is on the disk is read from the model's own files."""

    def load(model: Any, folder: Path) -> Any:
        pytest.importorskip("accelerate")
        model.save_pretrained(folder / "model")
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=device_map, offload_folder=str(folder / "weights")
        ).eval()

    return load


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED: dict[str, Offload] = {
    "cpu": on_cpu,
    "disk": on_disk,
    "disk, loaded": loaded(dict.fromkeys(PARTS, "disk")),
    "one layer and norm on disk": loaded(
        {p: "disk" if p in ("model.layers.0", "model.norm") else "cpu" for p in PARTS}
    ),
}


@pytest.fixture(scope="module")
def plain() -> dict[bool, tuple[Any, CalibrationCurves]]:
    """By whether embeddings are tied: the model, and what it calibrates to."""
    models = {tied: make_model(tie_word_embeddings=tied) for tied in (False, True)}
    return {tied: (m, collect(m, make_tokenizer(), make_prompts(6), POLICY)) for tied, m in models.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", OFFLOADED)
def test_offloaded_models_are_the_plain_ones(
    case: str, tied: bool, plain: dict[bool, tuple[Any, CalibrationCurves]], tmp_path: Path
) -> None:
    """Same curves, thresholds, fingerprint, loss; weights are back on "meta" afterwards."""
    original, want = plain[tied]
    model = OFFLOADED[case](make_model(tie_word_embeddings=tied), tmp_path)
    assert is_spread(model) and not is_spread(original)
    away = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    assert away
    assert input_device(model) == CPU and model_devices(model) == [CPU]
    assert weight_fingerprint(model) == weight_fingerprint(original) is not None
    another = OFFLOADED[case](make_model(3, tie_word_embeddings=tied), tmp_path / "another")
    assert weight_fingerprint(another) not in (None, weight_fingerprint(original))

    curves = collect(model, make_tokenizer(), make_prompts(6), POLICY, resume=tmp_path / "part")
    assert curves.layers == want.layers
    for name in ("lost_mass", "tail_lost", "density"):
        assert torch.equal(getattr(curves, name), getattr(want, name))
    table, other = choose(curves, 0.6), choose(want, 0.6)
    assert torch.equal(table.thresholds, other.thresholds) and not bool(table.dense_heads().all())
    other.check_model(model)
    assert {name for name, p in model.named_parameters() if p.device.type == "meta"} >= set(away)
    assert weight_fingerprint(model) == weight_fingerprint(original)  # tied weights are two after a first run

    sparse, reference = (evaluate(m, make_tokenizer(), make_prompts(2), {"t": other}) for m in (model, original))
    for name in ("prose_loss", "layer_density", "layer_recall", "accuracy"):
        assert getattr(sparse.runs["t"], name) == getattr(reference.runs["t"], name)
    assert sparse.runs["t"].density < 1.0


def test_thresholds_go_where_layers_compute(tmp_path: Path) -> None:
    model = on_disk(make_model(), tmp_path)
    set_policy(model, RelativeMax(alpha=torch.full((4,), 0.1), block_m=32, block_n=32))
    state: Any = model.model.layers[0].self_attn._bsfa_state
    assert state.policy.alpha.device == CPU


def test_logits_of_chosen_positions(tmp_path: Path) -> None:
    model, original = on_disk(make_model(), tmp_path), make_model()
    ids, positions = torch.arange(3, 90), torch.tensor([0, 5, 86])
    with torch.no_grad():
        want = original(ids[None]).logits[0, positions]
        torch.testing.assert_close(logits_at(model, ids, positions), want)


def test_weights_that_are_gone(tmp_path: Path) -> None:
    """Not a crash, and not a fingerprint of something else."""
    model = on_disk(make_model(), tmp_path)
    for path in (tmp_path / "weights").glob("*q_proj*"):
        path.unlink()
    assert weight_fingerprint(model) is None
    with torch.device("meta"):
        bare = make_model()
    assert weight_fingerprint(bare) is None and ModelIdentity.of(bare).weights is None
    assert dict(parameters(bare)).keys() == dict(make_model().named_parameters()).keys()


def hooked(module: torch.nn.Module, *devices: Any) -> torch.nn.Module:
    """With hooks as accelerate hangs them, of these execution devices."""
    hooks = tuple(SimpleNamespace(execution_device=d, offload=False) for d in devices)
    hook: Any = hooks[0] if len(hooks) == 1 else SimpleNamespace(hooks=hooks)
    module._hf_hook = hook
    return module


def test_devices_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks outrank parameters; several in a row, names, indices and "meta" are understood."""
    linear = torch.nn.Linear(2, 2)
    assert module_device(linear) == CPU
    assert module_device(torch.nn.Module()) is None
    assert module_device(torch.nn.Linear(2, 2, device="meta")) is None
    assert module_device(hooked(linear, "cuda:1")) == torch.device("cuda:1")
    assert module_device(hooked(linear, None, torch.device("cuda:1"))) == torch.device("cuda:1")
    assert module_device(hooked(linear, "meta")) == CPU
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    assert module_device(hooked(linear, 3)) == torch.device("cuda:3")
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), linear)
    assert module_device(outer) == torch.device("cuda:3")
    assert module_device(torch.nn.Sequential(torch.nn.Linear(2, 2), linear)) == CPU
    model = make_model()
    hooked(model.model.embed_tokens, "cuda:1")
    hooked(model.lm_head, "cuda:0")
    assert input_device(model) == torch.device("cuda:1")
    assert model_devices(model) == [torch.device(d) for d in ("cpu", "cuda:0", "cuda:1")]


# ---- the command line -----------------------------------------------------------------------------------------------


def test_device_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate places the model; without accelerate a line says what to install."""
    pytest.importorskip("accelerate")
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "p.jsonl", make_rows(4))
    seen: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (seen.append(k), load(*a, **k))[1])
    arguments = ["calibrate", "--model", tmp_path / "model", "--data", data, "-o", tmp_path / "t.safetensors"]
    command = [str(a) for a in (*arguments, "--device", "auto", "--dtype", "float32", "--target-recall", 0.6)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert seen[0]["device_map"] == "auto"
    ThresholdTable.load(tmp_path / "t.safetensors").check_model(make_model())
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "pip install accelerate" in result.output

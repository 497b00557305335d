"""The committed GPU report follows its schema, and the tree hash that ties it to the sources equals git's."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bsfa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
reports = importlib.import_module("report")

REPORT = ROOT / "benchmarks" / "results" / "h200.json"

GOOD = {
    "schema": 1,
    "tree": {"csrc": "0" * 40, "python": "f" * 40},
    "device": {"name": "d", "driver": "1", "torch": "2", "cuda": "13", "python": "3", "sm_count": 1},
    "tests": {"passed": 1, "failed": 0, "skipped": 0},
    "sanitizer": {"memcheck": 0, "racecheck": 0, "initcheck": None, "synccheck": 3},
    "measurements": [
        {"id": "pool.64k.us", "value": 1.5, "unit": "us", "n": 15, "clock_mhz": None, "peers": {"copy_gbps": 1.0}}
    ],
    "failures": [],
}


def test_committed_report_follows_the_schema() -> None:
    if not REPORT.is_file():
        pytest.skip("no report committed yet")
    committed = json.loads(REPORT.read_text())
    assert reports.problems(committed) == []
    assert committed["failures"] == []
    assert committed["tests"]["failed"] == 0 and committed["tests"]["passed"] > 0
    assert all(errors == 0 for errors in committed["sanitizer"].values())


def test_good_report_has_no_problems() -> None:
    assert reports.problems(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("tree", "csrc"), "abc"),
        (("tree",), {"csrc": "0" * 40}),
        (("device",), {"name": "d"}),
        (("tests", "failed"), -1),
        (("tests", "passed"), True),
        (("sanitizer", "memcheck"), "none"),
        (("sanitizer",), {}),
        (("measurements",), {}),
        (("measurements", 0, "id"), "Pool 64k"),
        (("measurements", 0, "value"), float("nan")),
        (("measurements", 0, "n"), 9),
        (("measurements", 0, "peers"), {"copy_gbps": None}),
        (("measurements", 0, "clock_mhz"), "fast"),
        (("failures",), "no"),
    ],
)
def test_bad_reports_are_named(path: tuple[str | int, ...], value: object) -> None:
    bad = copy.deepcopy(GOOD)
    target = bad
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert len(reports.problems(bad)) == 1


def test_an_id_stands_for_one_measurement() -> None:
    bad = copy.deepcopy(GOOD)
    bad["measurements"] *= 2
    assert reports.problems(bad) == ["id twice: pool.64k.us"]


def git(root: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath=/dev/null"]
    return subprocess.run(
        ["git", "-C", root, *identity, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_tree_hash_equals_git(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    source = tmp_path / "csrc"
    for name, content in {
        "a.cpp": "int a;\n",
        "a/z.h": "",  # "a.cpp" < "a/" < "a0" in git's order
        "a0": "zero",
        "deep/er/x.txt": "é\n",
        "deep/lib.so": "ignored",
        "__pycache__/x.pyc": "ignored",
        "only_ignored/__pycache__/y": "ignored",
        "bsfa.egg-info/PKG-INFO": "ignored",
        "build": "a file: /build/ names a directory at the root",
    }.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("a.cpp")
    (source / "empty").mkdir()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "x")
    assert reports.tree_hash("csrc", tmp_path) == git(tmp_path, "rev-parse", "HEAD:csrc")
    (source / "a0").write_text("one")
    assert reports.tree_hash("csrc", tmp_path) != git(tmp_path, "rev-parse", "HEAD:csrc")


@pytest.mark.parametrize("folder", reports.TREES)
def test_tree_hash_of_this_checkout(folder: str) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    if git(ROOT, "status", "--porcelain", "--", folder):
        pytest.skip(f"{folder} has uncommitted changes")
    assert reports.tree_hash(folder) == git(ROOT, "rev-parse", f"HEAD:{folder}")


def test_attention_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes, no clock: every section runs on right outputs, and its ids are those that others read."""
    suite = importlib.import_module("attention")
    timing = importlib.import_module("timing")
    compared: list[int] = []

    def interleaved(peers, rounds=15, warmup=3, watch_clock=True):
        for work in peers.values():
            work.body()
        return {name: timing.Timing(1.0, [1.0] * rounds) for name in peers}, 1980

    def flex_attention(q, k, v, block_mask, enable_gqa):
        kept = block_mask.to_dense().bool()
        compared.append(int(kept.sum()))
        for dim in (-1, -2):
            kept = kept.repeat_interleave(suite.BLOCK, dim)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, kept.tril(), scale=q.shape[-1] ** -0.5, enable_gqa=enable_gqa
        )

    for name, value in {
        "DEVICE": "cpu",
        "K": 8,
        "BLOCK": 16,
        "HEADS_Q": 4,
        "HEADS_KV": 2,
        "L2_BYTES": 1 << 16,
        "SDPA": dict.fromkeys(suite.SDPA, torch.nn.attention.SDPBackend.MATH),
        "interleaved": interleaved,
        "compiled_flex": lambda: flex_attention,
    }.items():
        assert hasattr(suite, name)
        monkeypatch.setattr(suite, name, value)
    rows = suite.run()
    assert reports.problems({**GOOD, "measurements": rows}) == []
    assert compared and all("flex_ms" in row["peers"] for row in rows if ".density." in row["id"])
    by_id = {row["id"]: row for row in rows}
    assert set(suite.DEMANDED) <= set(by_id)

    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "_load", lambda name: (GOOD, by_id))
    assert readme.attention().count("\n| ") == 4 + 5 + 2 + 3  # tables of 4, 5 and 2 rows with their heads
    panels = importlib.import_module("plot_attention").draw({**GOOD, "measurements": rows}).axes
    assert [len(line.get_xdata()) for panel in panels for line in panel.get_lines()] == [8, 8, 8, 7, 7]


def test_selection_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for the suite 'select'."""
    suite, base = importlib.import_module("selection"), importlib.import_module("attention")
    timing = importlib.import_module("timing")

    def interleaved(peers, rounds=15, warmup=3):
        for work in peers.values():
            work.body()
        return {name: timing.Timing(1.0, [1.0] * (rounds * work.samples)) for name, work in peers.items()}, None

    for module, values in (
        (
            base,
            {
                "DEVICE": "cpu",
                "K": 8,
                "BLOCK": 64,  # flat64 takes no smaller one
                "HEADS_Q": 4,
                "HEADS_KV": 2,
                "L2_BYTES": 1 << 16,
                "SDPA": dict.fromkeys(base.SDPA, torch.nn.attention.SDPBackend.MATH),
            },
        ),
        (
            suite,
            {
                "interleaved": interleaved,
                "capturable": lambda call: True,
                "peak_bytes": lambda call: (0, call()),
                "workspace_bytes": lambda policy, *sizes: 0,
            },
        ),
    ):
        for name, value in values.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
    rows = suite.run()
    assert reports.problems({**GOOD, "measurements": rows}) == []
    by_id = {row["id"]: row for row in rows}
    assert set(suite.DEMANDED) <= set(by_id)
    # Words and counts of 128 tiles x 4 heads, and 128 means of 2 heads.
    size = 128 * 4 * (4 + 1) * 4 + 128 * 2 * 128 * 2
    assert by_id["select.workspace.1m.mb"]["value"] == float(f"{size / 1e6:.5g}")
    assert by_id["attn.correction.64k.x_plain"]["peers"]["limit"] == float(f"{1.1 + 1 / 64:.5g}")
    assert by_id["e2e.relmax.256k.x_fa2"]["n"] == 12 and by_id["e2e.relmax.256k.x_fa2"]["peers"]["peer_rounds"] == 3

    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "_load", lambda name: (GOOD, by_id))
    assert readme.attention() == ""
    assert readme.selection().count("\n| ") == 8 + 7  # tables of 7 and 6 rows with their heads
    panels = importlib.import_module("plot_selection").draw({**GOOD, "measurements": rows}).axes
    assert [len(line.get_xdata()) for panel in panels for line in panel.get_lines()] == [5] * 6


def test_skip_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for the suite 'skip', with one and with two groups of rows in a tile."""
    suite, base = importlib.import_module("skip"), importlib.import_module("attention")
    timing = importlib.import_module("timing")

    def interleaved(peers, rounds=15, warmup=3):
        for work in peers.values():
            work.body()
        times = {name: 1.0 + 7 * i % 5 for i, name in enumerate(peers)}  # neither in order nor all different
        return {name: timing.Timing(us, [us] * rounds) for name, us in times.items()}, None

    for block in (16, 128):
        small = {"DEVICE": "cpu", "K": block // 2, "BLOCK": block, "HEADS_Q": 4, "HEADS_KV": 2, "L2_BYTES": 1 << 16}
        for name, value in {**small, "interleaved": interleaved}.items():
            assert hasattr(base, name)
            monkeypatch.setattr(base, name, value)
        rows = suite.run()
        assert reports.problems({**GOOD, "measurements": rows}) == []
        by_id = {row["id"]: row for row in rows}
        assert set(suite.DEMANDED) <= set(by_id)
        assert by_id["skip.0.x_dense"]["peers"]["skipped"] == 0.0
        for percent in (50, 70, 90):
            share = by_id[f"skip.{percent}.x_dense"]["peers"]["skipped"]
            assert share == pytest.approx(percent / 100, abs=0.12)  # 8 patterns of few blocks
        assert {
            "skip.sparse10.x_sparse",
            "skip.relative.70.ms",
            "skip.apart.70.x_dense",
        } <= set(by_id)
        ways, names = ("one_pass", "two_pass", "bounds"), ("0", "50", "70", "90", "relative.70", "apart.70")
        for name, over in (*((name, "dense") for name in names), ("sparse10", "sparse")):
            best = by_id[f"skip.{name}.x_{over}"]
            of_ways = {way: by_id[f"skip.{way}.{name}.x_{over}"] for way in ways}
            assert best["value"] == max(row["value"] for row in of_ways.values())
            for way, row in of_ways.items():
                assert best["peers"][f"{way}_ms"] == by_id[f"skip.{way}.{name}.ms"]["value"]
                assert not {f"{w}_ms" for w in ways} & set(row["peers"]) and f"{over}_ms" in row["peers"]
            one, two, bounds = (of_ways[way]["peers"]["skipped"] for way in ways)
            assert two <= one == bounds
        assert "skip.counted.70.x_dense" in by_id and "skip.one_pass.counted.70.ms" not in by_id

        with monkeypatch.context() as patch:
            readme = importlib.import_module("readme")
            patch.setattr(readme, "_load", lambda name, by_id=by_id: (GOOD, by_id))
            assert readme.skip().count("\n| ") == 1 + 7 and "On a random mask" in readme.skip()

        plant = suite.planted(512, 70)
        with pytest.raises(AssertionError, match="planted"):
            suite.check_counts("one too many", torch.ones(4, 2, dtype=torch.int64), plant.visible, plant.low)


def test_mmha_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for the suite 'mmha'."""
    suite, base = importlib.import_module("masked_mha"), importlib.import_module("attention")
    timing = importlib.import_module("timing")

    def interleaved(peers, rounds=15, warmup=3):
        for work in peers.values():
            work.body()
        return {name: timing.Timing(1.0, [1.0] * rounds) for name in peers}, 1980

    math = dict.fromkeys(suite.PEERS, torch.nn.attention.SDPBackend.MATH)
    for module, values in (
        (suite, {"DEVICE": "cpu", "K": 40, "TOPK": 80, "HEADS": (16, 128), "PEERS": math, "interleaved": interleaved}),
        (suite, {"DIM": 24, "DIM_V": 16, "DIM_ROPE": 8, "LATENT": 32, "GATHERED": 64, "CROSSOVER_KILO": (4,)}),
        (base, {"DEVICE": "cpu", "K": 40, "interleaved": interleaved}),
    ):
        for name, value in values.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
    rows = suite.run()
    assert reports.problems({**GOOD, "measurements": rows}) == []
    by_id = {row["id"]: row for row in rows}
    assert set(suite.DEMANDED) <= set(by_id)
    assert by_id["mmha.16k.x_dense"]["peers"]["density"] == 1.0 > by_id["mmha.16k.local.x_dense"]["peers"]["density"]
    assert len([id_ for id_ in by_id if id_.startswith("mmha.cross.4k.h")]) == len(suite.CROSSOVER_HEADS)


def test_top_k_sets_of_the_mmha_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sets have TOPK different keys, or all; the gathering baseline is attention over them."""
    suite = importlib.import_module("masked_mha")
    for name, value in {"DEVICE": "cpu", "K": 16, "TOPK": 12, "LATENT": 8, "DIM_ROPE": 4, "GATHERED": 7}.items():
        monkeypatch.setattr(suite, name, value)
    indices = suite.random_sets(40)
    for i, keys in enumerate(indices[0].tolist()):
        real = [key for key in keys if key != -1]
        assert len(real) == len(set(real)) == min(i + 1, 12) and max(real) <= i
    mask = bsfa.TokenMask.from_indices(indices, seqlen_k=40)
    call = suite.gather_call(40, 2, indices)
    inside = dict(zip(call.__code__.co_freevars, (c.cell_contents for c in call.__closure__), strict=True))
    q, latent = inside["q"], inside["latent"]
    scores = torch.einsum("ihd,jd->hij", q.float(), latent.float()) / suite.DIM**0.5
    want = scores.masked_fill(~mask.to_bool(), -torch.inf).softmax(-1) @ latent[:, :8].float()
    torch.testing.assert_close(call().float(), want.transpose(0, 1), atol=0.05, rtol=0.05)
    local = bsfa.TokenMask.from_indices(suite.local_sets(40), seqlen_k=40)  # raises if an index is invalid
    assert bool((local.counts >= torch.arange(1, 41).clamp(max=9)).all())


def test_calib_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for the suite 'calib': few and short prompts of both models."""
    suite = importlib.import_module("calibrating")
    large = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
    }
    for name, value in {
        "DEVICE": "cpu",
        "DTYPE": torch.float32,
        "TARGET": 0.7,
        "TINY_LENGTH": 2048,
        "TINY_PROMPTS": 8,
        "SKIP_PROMPTS": 3,
        "LARGE_LENGTH": 1000,
        "LARGE_PROMPTS": 5,
        "WARM_UP_LENGTH": 100,
        "LARGE": {**suite.LARGE, **large},
    }.items():
        assert hasattr(suite, name)
        monkeypatch.setattr(suite, name, value)
    rows = suite.run()
    assert reports.problems({**GOOD, "measurements": rows}) == []
    by_id = {row["id"]: row for row in rows}
    assert set(suite.DEMANDED) <= set(by_id)
    parts = by_id["calib.tiny.16k.s"]["peers"]
    total = parts["collect_s"] + parts["choose_s"] + parts["save_s"]
    assert by_id["calib.tiny.16k.s"]["value"] == pytest.approx(total, rel=1e-4) and parts["recall"] >= 0.7
    assert by_id["calib.8b.64k.s"]["n"] == 2 * 5


def test_ttft_suite_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for the suite 'ttft': a tiny model, and every variant's attention is seen and restored."""
    suite = importlib.import_module("ttft")
    selection, base = importlib.import_module("selection"), importlib.import_module("attention")
    timing = importlib.import_module("timing")
    slow: set[int] = set()

    def interleaved(peers, rounds=15, warmup=3):
        for work in peers.values():
            work.body()
        times = {name: 1.0 if "sparse" in name or "graph" in name else 0.5 for name in peers}
        factor = 1.0 if len(measured) in slow else 3.0
        measured.append(peers)
        return {
            name: timing.Timing(us * (factor if "dense" in name else 1.0), [1.0] * rounds) for name, us in times.items()
        }, None

    measured: list[object] = []
    small = {
        "num_hidden_layers": 5,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "initializer_range": 0.2,
    }
    for module, values in (
        (base, {"DEVICE": "cpu", "K": 16, "BLOCK": 16, "HEADS_Q": 4, "HEADS_KV": 2}),
        (selection, {"interleaved": interleaved, "capturable": lambda call: True}),
        (suite, {"DEVICE": "cpu", "DTYPE": torch.float32, "SHAPE": {**suite.SHAPE, **small}, "DENSITY": 0.3}),
    ):
        for name, value in values.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
    before = dict(suite.ALL_ATTENTION_FUNCTIONS)
    rows = suite.run()
    assert dict(suite.ALL_ATTENTION_FUNCTIONS) == before
    assert reports.problems({**GOOD, "measurements": rows}) == []
    by_id = {row["id"]: row for row in rows}
    assert set(suite.DEMANDED) <= set(by_id)
    assert {f"ttft.8b.{n}k.{name}.x_sdpa" for n in (16, 64, 128) for name in ("dense", "calibrated")} <= set(by_id)
    for id_, row in by_id.items():
        if not id_.startswith("ttft"):
            continue
        peers = row["peers"]
        assert row["value"] == pytest.approx(peers["sdpa_ttft_ms"] / peers["ttft_ms"], rel=1e-3)
        assert 0 < peers["attention_share"] < 1 and 0 < peers["sdpa_attention_share"] < 1
        assert (peers["density"] < 0.9) == ("calibrated" in id_)
    assert by_id["ttft.8b.128k.calibrated.x_sdpa"]["peers"]["density"] == pytest.approx(0.3, abs=0.01)

    assert len(measured) == 5 and by_id["crossover.relmax.tokens"]["value"] == 1024
    assert by_id["crossover.relmax.tokens"]["peers"]["x_dense_2k"] == 1.5
    measured.clear()
    slow.add(2)  # at 4K dense attention is faster: sparse attention wins from 8K on
    assert suite.crossover()[0]["value"] == 8192
    measured.clear()
    slow.add(4)
    with pytest.raises(AssertionError, match="not faster"):
        suite.crossover()


def test_searched_density() -> None:
    """The thresholds keep at most the density that was asked for, and a step less would keep more."""
    suite = importlib.import_module("ttft")
    torch.manual_seed(0)
    q, k = torch.randn(1, 2048, 4, 16) * 3, torch.randn(1, 2048, 2, 16)
    search = suite.SearchDensity(density=0.4, block_m=32, block_n=32)
    _, info = bsfa.attention(q, k, k, policy=search, return_info=True)  # type: ignore[misc]
    (alpha,) = search.found
    kept = info.mask.density(per_head=True)
    assert bool((kept <= 0.4).all()) and bool((kept > 0.39).all()) and len(set(alpha.tolist())) == 4
    _, again = bsfa.attention(q, k, k, policy=search.at(alpha), return_info=True)  # type: ignore[misc]
    assert torch.equal(again.mask.words, info.mask.words)
    _, more = bsfa.attention(q, k, k, policy=search.at(alpha - 1e-5), return_info=True)  # type: ignore[misc]
    assert bool((more.mask.density(per_head=True) > 0.4).all())


def test_ids_as_text() -> None:
    suite = importlib.import_module("calibrating")
    text = "5 107 3"
    found = suite.IdTokenizer()(text, return_offsets_mapping=True)
    assert found["input_ids"] == [5, 107, 3]
    assert [text[a:b] for a, b in found["offset_mapping"]] == ["5", "107", "3"]


def test_no_benchmark_hides_a_standard_module() -> None:
    """Scripts run with this folder first in sys.path."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["attention", "selection", "skip", "masked_mha", "calibrating", "ttft"])
def test_missed_demands_are_named(name: str) -> None:
    suite = importlib.import_module(name)
    exact = [reports.measurement(id_, limit, "x", 10, None) for id_, (_, limit) in suite.DEMANDED.items()]
    assert reports.missed(exact, suite.DEMANDED) == []
    for row in (exact[0], exact[-1]):
        row["value"] += 0.01 if suite.DEMANDED[row["id"]][0] == "<=" else -0.01
    assert len(reports.missed(exact, suite.DEMANDED)) == 2
    assert len(reports.missed(exact[1:], suite.DEMANDED)) == 2


def test_a_check_in_parts(tmp_path: Path) -> None:
    gpu_check = importlib.import_module("gpu_check")
    first = {**copy.deepcopy(GOOD), "tree": {folder: reports.tree_hash(folder) for folder in reports.TREES}}
    first["failures"] = ["test one"]
    path = tmp_path / "part.json"
    path.write_text(json.dumps(first))
    before = gpu_check.earlier(path)
    second = copy.deepcopy(first)
    second |= {"tests": {"passed": 0, "failed": 0, "skipped": 0}, "failures": ["suite two"]}
    second["sanitizer"] = dict.fromkeys(reports.SANITIZER_TOOLS)
    second["measurements"] = [{**GOOD["measurements"][0], "id": "skip.50.ms"}]  # type: ignore[index]
    gpu_check.join(second, before, ["skip"])
    assert reports.problems(second) == []
    assert second["tests"] == first["tests"] and second["sanitizer"] == first["sanitizer"]
    assert [m["id"] for m in second["measurements"]] == ["pool.64k.us", "skip.50.ms"]
    assert second["failures"] == ["test one", "suite two"]  # what failed stays

    # Of several reports each gives what it has; what is run again leaves its failures behind.
    tests = {**copy.deepcopy(second), "tests": {"passed": 2, "failed": 0, "skipped": 0}, "failures": []}
    tests |= {"sanitizer": dict.fromkeys(reports.SANITIZER_TOOLS), "measurements": []}
    suites = {**copy.deepcopy(tests), "tests": {"passed": 0, "failed": 0, "skipped": 0}, "failures": ["suite skip: x"]}
    suites["measurements"] = second["measurements"]
    for earlier in (first, suites):
        gpu_check.join(tests, earlier, ["tests", "attention"])
    assert tests["tests"]["passed"] == 2 and tests["sanitizer"] == first["sanitizer"]
    assert sorted(m["id"] for m in tests["measurements"]) == ["pool.64k.us", "skip.50.ms"]
    assert tests["failures"] == ["suite skip: x"]

    elsewhere = {**copy.deepcopy(first), "device": {**GOOD["device"], "name": "another"}}  # type: ignore[dict-item]
    gpu_check.join(elsewhere, before, ["skip"])
    assert any("another device" in failure for failure in elsewhere["failures"])

    path.write_text(json.dumps({**first, "tree": GOOD["tree"]}))
    with pytest.raises(gpu_check.Failed, match="other sources"):
        gpu_check.earlier(path)


def test_cycles_of_one_sm_only() -> None:
    """Counters of two SMs need not agree."""
    timing = importlib.import_module("timing")
    start, end, elsewhere = (torch.tensor(pair) for pair in ((1 << 40, 7), ((1 << 40) + 12345, 7), (1 << 41, 8)))
    assert timing._cycles_between(start, end) == 12345.0
    assert timing._cycles_between(start, elsewhere) is None

#!/usr/bin/env python3
"""Everything that needs a GPU, in one go: build, tests, compute-sanitizer, benchmarks, one report.

    python benchmarks/gpu_check.py [--output FILE] [--only STEP,...]

Exits with 0 only if all of it passed; the report is written either way and says what failed. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import ROOT, SANITIZER_TOOLS, TREES, problems, tree_hash, write_json

# Modules of this folder with a run() that returns measurements. The suite 'select' is not select.py, which would hide
# Python's module of that name from everything that runs in this folder.
SUITES = {
    "pool": "pool",
    "attention": "attention",
    "select": "selection",
    "skip": "skip",
    "mmha": "masked_mha",
    "calib": "calibrating",
    "ttft": "ttft",
}
BUILD_TIMEOUT_S, TEST_TIMEOUT_S, SANITIZER_TIMEOUT_S, SUITE_TIMEOUT_S = 900, 600, 400, 420
TEST_PROCESSES = 8
STEPS = ("tests", "sanitizer", *SUITES)
PACKAGE = ROOT / "python" / "bsfa"
RESULT = ROOT / "benchmarks" / "results" / "h200.json"


class Failed(Exception):
    """A step that did not do its work; the message goes into the report."""


def command(step: str, args: list[str], timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``args`` in the repository root with bsfa importable; its output is shown and kept."""
    started = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            args,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        print(f"== {step}: over {timeout:.0f} s\n{output[-4000:]}", flush=True)
        raise Failed(f"{step}: over {timeout:.0f} s") from error
    except OSError as error:
        raise Failed(f"{step}: {error}") from error
    verdict = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
    shown = done.stdout[-4000:] if done.returncode == 0 else done.stdout[-100_000:]
    print(f"== {step}: {verdict}, {time.monotonic() - started:.0f} s\n{shown}", flush=True)
    return done


# setup.py without its CUDA part: that library is CMake's, or was built elsewhere and brought along.
BUILD_EXTENSION = """
import runpy, sys
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = None
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def build() -> None:
    """Make what is not there: the extension for this Python, and the CUDA library."""
    if not (PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        done = command("build extension", [sys.executable, "-c", BUILD_EXTENSION], BUILD_TIMEOUT_S)
        if done.returncode:
            raise Failed("the Python extension did not build")
    if not list((PACKAGE / "lib").glob("libbsfa_cuda*.so")):
        folder = str(ROOT / "build" / "gpu-check")
        configure = ["cmake", "-S", str(ROOT), "-B", folder, f"-DBSFA_PYTHON={sys.executable}"]
        if command("configure", configure, BUILD_TIMEOUT_S).returncode:
            raise Failed("CMake could not configure")
        make = ["cmake", "--build", folder, "--target", "bsfa_cuda", "-j", str(os.cpu_count() or 1)]
        if command("build libbsfa_cuda", make, BUILD_TIMEOUT_S).returncode:
            raise Failed("libbsfa_cuda did not build")


def device() -> dict[str, str | int]:
    """What this ran on. Raises :class:`Failed` without a CUDA device or without bsfa's CUDA library."""
    script = (
        "import json, platform, torch, bsfa, bsfa._library as l; p = torch.cuda.get_device_properties(0); "
        "assert l.cuda_missing is None, l.cuda_missing; "
        "print(json.dumps(dict(name=p.name, sm_count=p.multi_processor_count, torch=torch.__version__, "
        "cuda=torch.version.cuda, python=platform.python_version(), bsfa=bsfa.__version__)))"
    )
    done = command("device", [sys.executable, "-c", script], 120)
    if done.returncode:
        raise Failed(f"no usable CUDA device: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ''}")
    found: dict[str, str | int] = json.loads(done.stdout.splitlines()[-1])
    driver = command("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 60)
    found["driver"] = driver.stdout.split()[0] if driver.returncode == 0 else "unknown"
    return found


def run_tests(scratch: Path) -> tuple[dict[str, int], list[str]]:
    """pytest over tests/gpu: the counts, and the names of what failed."""
    xml = scratch / "tests.xml"
    args = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    if importlib.util.find_spec("xdist") is not None:  # the tests wait for Python more than for the device
        args += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    done = command("tests", args, TEST_TIMEOUT_S)
    if not xml.is_file():
        raise Failed(f"pytest wrote no result (exit status {done.returncode})")
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    counts = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    names = [f"test {c.get('name')}" for c in failed]
    if done.returncode and not names:
        names = [f"pytest: exit status {done.returncode}"]
    if counts["passed"] == 0:
        names.append("no GPU test ran")
    return counts, names


def sanitize(tool: str) -> int:
    """Errors that one tool of compute-sanitizer finds in sanitize_shapes.py.

    racecheck does not see the kernels whose warps hand shared memory over through mbarriers (attention, relative_max,
    strided, measure): it does not follow waits by parity, and calls every guarded slot a race. Torch's caching
    allocator is off: then every tensor is an allocation of its own, with edges that memcheck sees.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    args = [program, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all"]
    if tool == "racecheck":
        args += ["--kernel-name-exclude", "kernel_substring=attention_kernel"]
    args += [sys.executable, "benchmarks/sanitize_shapes.py"]
    if tool == "racecheck":
        args.append("--races")
    done = command(f"compute-sanitizer {tool}", args, SANITIZER_TIMEOUT_S, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    # racecheck sums up hazards in its own words
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", done.stdout)
    if not found or "done" not in done.stdout.split():
        raise Failed(f"compute-sanitizer {tool} did not finish (exit status {done.returncode})")
    return sum(int(a or b) for a, b in found)


def run_suite(name: str, scratch: Path) -> list[dict[str, Any]]:
    """The measurements of one suite, run in a process of its own."""
    output = scratch / f"{name}.json"
    done = command(
        f"suite {name}", [sys.executable, f"benchmarks/{SUITES[name]}.py", "--output", str(output)], SUITE_TIMEOUT_S
    )
    if done.returncode or not output.is_file():
        raise Failed(f"suite {name}: exit status {done.returncode}")
    found: list[dict[str, Any]] = json.loads(output.read_text())
    return found


def earlier(path: Path) -> dict[str, Any]:
    """A report of other steps, to be gone on with. Raises :class:`Failed` unless it is of the sources that are here."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise Failed(f"{path}: {error}") from error
    if problems(report):
        raise Failed(f"{path}: {'; '.join(problems(report))}")
    if report["tree"] != {folder: tree_hash(folder) for folder in TREES}:
        raise Failed(f"{path} is of other sources")
    return report


def step_of(failure: str) -> str | None:
    """The step that a failure is of, as :func:`check` names them; None: of none of them."""
    if failure.startswith(("test ", "pytest", "no GPU test")):
        return "tests"
    if failure.startswith("compute-sanitizer"):
        return "sanitizer"
    suite = re.match(r"suite (\w+):", failure)
    return suite[1] if suite else None


def join(report: dict[str, Any], before: dict[str, Any], steps: Collection[str]) -> None:
    """Put what ``before`` found, and ``report`` lacks, into ``report``, but for ``steps``, which were run again."""
    if report["device"] != before["device"]:
        report["failures"].append(f"the earlier report is of another device or software: {before['device']}")
    if "tests" not in steps and not any(report["tests"].values()):
        report["tests"] = before["tests"]
    if "sanitizer" not in steps and set(report["sanitizer"].values()) == {None}:
        report["sanitizer"] = before["sanitizer"]
    measured = {m["id"] for m in report["measurements"]}
    report["measurements"] = [m for m in before["measurements"] if m["id"] not in measured] + report["measurements"]
    report["failures"] = [f for f in before["failures"] if step_of(f) not in steps] + report["failures"]


def check(steps: Collection[str], keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Build, then run ``steps``; one that fails is named in ``failures`` and does not stop the others.

    ``keep``: called with the report after every step, so that a run that is cut short leaves what it has.
    """
    report: dict[str, Any] = {
        "schema": 1,
        "tree": {folder: tree_hash(folder) for folder in TREES},
        "device": {"name": "unknown", "driver": "unknown", "torch": "unknown", "cuda": "unknown", "python": "unknown"},
        "tests": {"passed": 0, "failed": 0, "skipped": 0},
        "sanitizer": dict.fromkeys(SANITIZER_TOOLS),
        "measurements": [],
        "failures": [],
    }
    failures: list[str] = report["failures"]
    try:
        build()
        report["device"] = device()
    except Failed as error:
        failures.append(str(error))
        return report

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # Side by side: all of them keep the processor busier than the device.
        tools = SANITIZER_TOOLS if "sanitizer" in steps else ()
        with ThreadPoolExecutor(len(SANITIZER_TOOLS)) as pool:
            runs = {tool: pool.submit(sanitize, tool) for tool in tools}
            if "tests" in steps:
                try:
                    report["tests"], names = run_tests(scratch)
                    failures += names
                except Failed as error:
                    failures.append(str(error))
                keep(report)
        for tool, run in runs.items():
            try:
                errors = run.result()
                report["sanitizer"][tool] = errors
                if errors:
                    failures.append(f"compute-sanitizer {tool}: {errors} errors")
            except Failed as error:
                failures.append(str(error))
        keep(report)

        for name in SUITES:  # after everything else, alone on the device
            if name not in steps:
                continue
            try:
                report["measurements"] += run_suite(name, scratch)
            except Failed as error:
                failures.append(str(error))
            keep(report)
    failures += problems(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {RESULT.relative_to(ROOT)}")
    parser.add_argument("--only", metavar="STEP,...", help=f"of {', '.join(STEPS)}; such a report needs --output")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", action="append", default=[], help="with --only: a report of other steps"
    )
    arguments = parser.parse_args()
    steps = STEPS if arguments.only is None else arguments.only.split(",")
    if not set(steps) <= set(STEPS):
        parser.error(f"--only takes {', '.join(STEPS)}")
    if arguments.only is not None and arguments.output is None:
        parser.error("--only makes a partial report: say with --output where it goes")
    output = arguments.output or RESULT
    try:
        befores = [earlier(path) for path in arguments.add]
    except Failed as error:
        parser.error(str(error))
    unfinished = "this report was written before all of its steps were done"

    def write(report: dict[str, Any], also_failed: tuple[str, ...] = ()) -> dict[str, Any]:
        whole = copy.deepcopy(report)
        for before in befores:
            join(whole, before, steps)
        whole["failures"] += also_failed
        write_json(output, whole)
        return whole

    report = write(check(steps, functools.partial(write, also_failed=(unfinished,))))
    for m in report["measurements"]:
        print(f"{m['id']:42s} {m['value']:10.5g} {m['unit']}")
    print(f"tests {report['tests']}  sanitizer {report['sanitizer']}  report {output}")
    for failure in report["failures"]:
        print(f"FAILED {failure}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

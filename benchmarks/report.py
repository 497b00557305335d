"""The report of gpu_check: its schema, the git tree hashes that tie it to the sources, its writing. Needs no GPU."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TREES = ("csrc", "python")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MEASUREMENT_ID = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


# --- git tree hashes --------------------------------------------------------------------------------------------------


def ignore_patterns(root: Path = ROOT) -> list[str]:
    """The lines of .gitignore. Of git's rules we need: ``*.so``, ``name/`` at any depth, ``/path/`` from the root."""
    lines = (root / ".gitignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_ignored(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    relative = path.relative_to(root).as_posix()
    for pattern in patterns:
        if pattern.endswith("/") and not path.is_dir():
            continue
        bare = pattern.strip("/")
        if fnmatch.fnmatchcase(relative if pattern.startswith("/") or "/" in bare else path.name, bare):
            return True
    return False


def _object_hash(kind: str, data: bytes) -> bytes:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).digest()


def _tree(path: Path, root: Path, patterns: Sequence[str]) -> bytes | None:
    """SHA-1 of the directory as a git tree object; None if it holds nothing that git would keep."""
    entries: list[tuple[bytes, bytes]] = []
    for child in path.iterdir():
        if is_ignored(child, root, patterns):
            continue
        name = child.name.encode()
        if child.is_symlink():
            mode, digest = b"120000", _object_hash("blob", os.readlink(child).encode())
        elif child.is_dir():
            subtree = _tree(child, root, patterns)
            if subtree is None:
                continue
            mode, digest = b"40000", subtree
        else:
            mode = b"100755" if os.access(child, os.X_OK) else b"100644"
            digest = _object_hash("blob", child.read_bytes())
        sort_key = name + b"/" if mode == b"40000" else name
        entries.append((sort_key, mode + b" " + name + b"\0" + digest))
    if not entries:
        return None
    return _object_hash("tree", b"".join(entry for _, entry in sorted(entries)))


def tree_hash(folder: str, root: Path = ROOT) -> str:
    """What ``git rev-parse HEAD:folder`` says of a clean checkout, from the files alone."""
    digest = _tree(root / folder, root, ignore_patterns(root))
    return (digest or _object_hash("tree", b"")).hex()


# --- schema -----------------------------------------------------------------------------------------------------------


def problems(report: Any) -> list[str]:
    """What is wrong with a report; empty if it follows the schema of benchmarks/README.md."""
    found: list[str] = []

    def check(condition: bool, message: str) -> bool:
        if not condition:
            found.append(message)
        return condition

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not check(isinstance(report, dict), "the report is not an object"):
        return found
    keys = {"schema", "tree", "device", "tests", "sanitizer", "measurements", "failures"}
    if not check(set(report) == keys, f"keys are {sorted(report)}, expected {sorted(keys)}"):
        return found
    check(report["schema"] == 1, "schema is not 1")
    check(
        isinstance(report["tree"], dict)
        and set(report["tree"]) == set(TREES)
        and all(re.fullmatch(r"[0-9a-f]{40}", str(h)) for h in report["tree"].values()),
        "tree must hold the 40-digit hashes of " + ", ".join(TREES),
    )
    device = report["device"]
    check(
        isinstance(device, dict)
        and {"name", "driver", "torch", "cuda", "python"} <= set(device)
        and all(isinstance(v, str | int) for v in device.values()),
        "device must name name, driver, torch, cuda, python",
    )
    tests = report["tests"]
    check(
        isinstance(tests, dict)
        and set(tests) == {"passed", "failed", "skipped"}
        and all(map(is_count, tests.values())),
        "tests must count passed, failed, skipped",
    )
    sanitizer = report["sanitizer"]
    check(
        isinstance(sanitizer, dict)
        and set(sanitizer) == set(SANITIZER_TOOLS)
        and all(value is None or is_count(value) for value in sanitizer.values()),
        "sanitizer must give each tool's errors, or null where it did not run",
    )
    check(
        isinstance(report["failures"], list) and all(isinstance(f, str) for f in report["failures"]),
        "failures must be a list of strings",
    )
    seen: set[str] = set()
    if not check(isinstance(report["measurements"], list), "measurements must be a list"):
        return found
    fields = {"id", "value", "unit", "n", "clock_mhz", "peers"}
    for m in report["measurements"]:
        if not check(isinstance(m, dict) and set(m) == fields, f"bad measurement: {m}"):
            continue
        check(isinstance(m["id"], str) and bool(MEASUREMENT_ID.fullmatch(m["id"])), f"bad id: {m['id']}")
        check(m["id"] not in seen, f"id twice: {m['id']}")
        seen.add(m["id"])
        check(is_number(m["value"]), f"{m['id']}: value is no number")
        check(isinstance(m["unit"], str) and bool(m["unit"]), f"{m['id']}: no unit")
        check(is_count(m["n"]) and m["n"] >= 10, f"{m['id']}: fewer than 10 samples")
        check(m["clock_mhz"] is None or is_count(m["clock_mhz"]), f"{m['id']}: bad clock_mhz")
        check(
            isinstance(m["peers"], dict) and all(isinstance(k, str) and is_number(v) for k, v in m["peers"].items()),
            f"{m['id']}: peers must map names to numbers",
        )
    return found


def measurement(
    id: str, value: float, unit: str, n: int, clock_mhz: int | None, peers: dict[str, float] | None = None
) -> dict[str, Any]:
    """One entry of ``measurements``, rounded to 5 significant digits."""
    short = {name: float(f"{v:.5g}") for name, v in (peers or {}).items()}
    return {"id": id, "value": float(f"{value:.5g}"), "unit": unit, "n": n, "clock_mhz": clock_mhz, "peers": short}


def missed(rows: Sequence[dict[str, Any]], demanded: Mapping[str, tuple[str, float]]) -> list[str]:
    """Demands (">=" or "<=", limit) by id that the measurements do not meet, or that nothing measured."""
    values = {row["id"]: row["value"] for row in rows}
    return [
        f"{id_}: {values.get(id_)}, demanded {sign} {limit}"
        for id_, (sign, limit) in demanded.items()
        if id_ not in values or (values[id_] < limit if sign == ">=" else values[id_] > limit)
    ]


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def suite_main(
    doc: str | None, run: Callable[[], list[dict[str, Any]]], demanded: Mapping[str, tuple[str, float]]
) -> None:
    """A suite as a program: run it, print what it measured and what it missed, write it to ``--output``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    found = run()
    for row in found:
        print(f"{row['id']:<42} {row['value']:>8.4g} {row['unit']}")
    for miss in missed(found, demanded):
        print(f"missed {miss}")
    if output is not None:
        write_json(output, found)

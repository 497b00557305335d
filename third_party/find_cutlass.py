#!/usr/bin/env python3
"""Where the CUTLASS headers are: one answer for setup.py and CMake.

Looks, in this order, at $CUTLASS_PATH, at third_party/cutlass, and at the installed PyPI package nvidia-cutlass.
As a program it prints the include directory, or says how to get one and exits with status 1. With --requirement it
prints what pip would have to install.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

VERSION = "4.2.0"
PYPI_REQUIREMENT = "nvidia-cutlass==4.2.0.0"


def candidates() -> list[tuple[str, Path]]:
    """(where it comes from, include directory) in order of preference; they need not exist."""
    found = []
    if "CUTLASS_PATH" in os.environ:
        found.append(("CUTLASS_PATH", Path(os.environ["CUTLASS_PATH"]) / "include"))
    found.append(("third_party/cutlass", Path(__file__).resolve().parent / "cutlass" / "include"))
    package = importlib.util.find_spec("cutlass_library")
    if package is not None and package.origin is not None:
        found.append(("PyPI nvidia-cutlass", Path(package.origin).parent / "source" / "include"))
    return found


def version_of(include: Path) -> str | None:
    """The version that the headers state, or None if they are not there."""
    header = include / "cutlass" / "version.h"
    if not header.is_file():
        return None
    values = {}
    for line in header.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "#define":
            values[words[1]] = words[2]
    return ".".join(values.get(f"CUTLASS_{part}", "?") for part in ("MAJOR", "MINOR", "PATCH"))


def find() -> Path:
    """The include directory. Raises RuntimeError when there is none, or when it holds another version than VERSION."""
    for origin, include in candidates():
        version = version_of(include)
        if version is None:
            if origin == "CUTLASS_PATH":  # the user named it: looking elsewhere would hide the mistake
                raise RuntimeError(f"CUTLASS_PATH is set, but {include} holds no CUTLASS headers")
            continue
        if version != VERSION:
            raise RuntimeError(f"{origin}: {include} is CUTLASS {version}; bsfa is built and tested with {VERSION}")
        return include
    raise RuntimeError(
        f"no CUTLASS headers: set CUTLASS_PATH, clone CUTLASS {VERSION} to third_party/cutlass, "
        f"or run: pip install --no-deps {PYPI_REQUIREMENT}"
    )


if __name__ == "__main__":
    try:
        print(PYPI_REQUIREMENT if "--requirement" in sys.argv[1:] else find())
    except RuntimeError as error:
        sys.exit(f"find_cutlass: {error}")

"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there takes its place at the end, or goes away on an error.

    The suffix is kept, for writers that choose a format by it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # of a write, which does not know: a full disk
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write ``path`` in one step, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

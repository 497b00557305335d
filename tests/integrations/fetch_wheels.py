"""Fetch what a contract test imports: the Python files of a wheel of hundreds of MB, and a few small dependencies.

A wheel is a zip: its directory stands at the end, and PyPI answers range requests, so the Python files come alone. They
go to ``$BSFA_CACHE`` (default ``~/.cache/bsfa``), complete or not at all, and stay there.
"""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

INDEX = "https://pypi.org/simple"
TIMEOUT = 20  # seconds without an answer
GAP = 1 << 16  # bytes not wanted that are fetched rather than asking again
TAIL = 1 << 16  # bytes at the end of a wheel that are asked for first


class Unavailable(Exception):
    """The index cannot be reached: a reason to skip. Anything else that goes wrong is an error."""


def cache_folder() -> Path:
    """Where downloads stay."""
    return Path(os.environ.get("BSFA_CACHE") or Path.home() / ".cache" / "bsfa")


def _get(url: str, first: int | None = None, last: int | None = None, **headers: str) -> bytes:
    """The bytes first .. last of ``url``; ``last`` alone: so many from the end."""
    if last is not None:
        headers["Range"] = f"bytes=-{last}" if first is None else f"bytes={first}-{last}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            if last is not None and answer.status != 206:
                raise RuntimeError(f"{url}: the server does not answer range requests")
            data: bytes = answer.read()
            return data
    except OSError as error:
        raise _reason(url, error) from None


def _reason(url: str, error: OSError) -> Exception:
    """What an error of urllib means: no network or an index in trouble, or a page that is not there."""
    gone = isinstance(error, urllib.error.HTTPError) and error.code < 500
    return RuntimeError(f"{url}: {error}") if gone else Unavailable(f"{url}: {error}")


def versions(package: str) -> list[str]:
    """Final releases of ``package`` on the index, oldest first."""
    page = _get(f"{INDEX}/{package}/").decode()
    stem = package.replace("-", "[-_]")
    found = set(re.findall(rf">{stem}-(\d+(?:\.\d+)*)(?:-[^<]*\.whl|\.tar\.gz)</a>", page))
    return sorted(found, key=lambda v: [int(x) for x in v.split(".")])


def wheel_url(package: str, version: str) -> str:
    """The wheel for this kind of machine, or for any; else any wheel, since only Python files are taken."""
    page = _get(f"{INDEX}/{package}/").decode()
    urls = [html.unescape(u) for u in re.findall(r'href="([^"#]+\.whl)[#"]', page)]
    stem = f"/{package.replace('-', '_')}-{version}-"
    mine = [u for u in urls if stem in u]
    if not mine:
        raise RuntimeError(f"{package} {version} has no wheel on {INDEX}")
    return min(mine, key=lambda u: ("none-any" not in u, "x86_64" not in u))


class _Tail(io.BytesIO):
    """The end of a file, read as if it were the whole: enough for ZipFile to find the directory."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.missing, self.size = size - len(data), size

    def seek(self, offset: int, whence: int = 0) -> int:
        target = offset if whence == 0 else (self.size + offset if whence == 2 else self.tell() + offset)
        if target < self.missing:
            raise BadZipFile(f"the directory begins before the last {len(self.getbuffer())} bytes")
        return super().seek(target - self.missing) + self.missing

    def tell(self) -> int:
        return super().tell() + self.missing


def _directory(url: str) -> list[ZipInfo]:
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            size = int(answer.headers["Content-Length"])
    except OSError as error:
        raise _reason(url, error) from None
    tail = _get(url, None, min(TAIL, size))
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise RuntimeError(f"{url}: no zip directory at its end")
    length, start = struct.unpack("<II", tail[end + 12 : end + 20])
    tail = _get(url, None, size - start) if length and size - start > len(tail) else tail
    with ZipFile(_Tail(tail, size)) as archive:
        return archive.infolist()


def _runs(members: list[ZipInfo], others: list[ZipInfo]) -> Iterable[tuple[int, int, list[ZipInfo]]]:
    """Byte ranges that hold ``members``, those with little between them joined."""
    starts = sorted(m.header_offset for m in others)
    after = dict(zip(starts, [*starts[1:], None], strict=True))
    run: list[ZipInfo] = []
    first = last = 0
    for m in sorted(members, key=lambda m: m.header_offset):
        end = after[m.header_offset] or m.header_offset + m.compress_size + (1 << 12)
        if run and m.header_offset - last > GAP:
            yield first, last, run
            run = []
        if not run:
            first = m.header_offset
        run.append(m)
        last = end
    if run:
        yield first, last, run


def _member(data: bytes) -> bytes:
    """The contents of the member that begins ``data``."""
    method, _, _, _, packed, _, name, extra = struct.unpack("<HHHIIIHH", data[8:30])
    body = data[30 + name + extra :]
    if method == 0:
        return body[:packed]
    return zlib.decompressobj(-15).decompress(body)


def fetch_python(package: str, version: str, wanted: Callable[[str], bool]) -> tuple[Path, int]:
    """The files of a wheel that ``wanted`` accepts, and its metadata, in a folder to import from; and bytes fetched.

    0 bytes: they were in the cache.
    """
    target = cache_folder() / f"{package}-{version}-py"
    if target.is_dir():
        return target, 0
    url = wheel_url(package, version)
    everything = _directory(url)
    members = [m for m in everything if wanted(m.filename) or ".dist-info/" in m.filename]
    target.parent.mkdir(parents=True, exist_ok=True)
    fetched = 0
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for first, last, run in _runs(members, everything):
            data = _get(url, first, last - 1)
            fetched += len(data)
            for m in run:
                content = _member(data[m.header_offset - first :])[: m.file_size]
                if zlib.crc32(content) != m.CRC:
                    raise RuntimeError(f"{url}: {m.filename} arrived damaged")
                path = temporary / m.filename
                if not path.resolve().is_relative_to(temporary.resolve()):
                    raise RuntimeError(f"{url}: {m.filename} leaves its folder")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        _settle(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target, fetched


def _settle(temporary: Path, target: Path) -> None:
    """Rename; another process may have been first."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def fetch_packages(name: str, requirements: list[str], options: Sequence[str] = ()) -> Path:
    """A folder with these packages (pinned), without their dependencies, by pip with ``options``."""
    target = cache_folder() / f"{name}-packages"
    stamp = target / "requirements.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == requirements:
        return target
    _get(f"{INDEX}/{requirements[0].split('==')[0]}/")  # without a network pip would try for long
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", *options]
    command += ["--target", str(temporary)]
    try:
        done = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"pip could not install {name}'s packages: {done.stderr.strip()[-500:]}")
        (temporary / stamp.name).write_text(json.dumps(requirements))
        shutil.rmtree(target, ignore_errors=True)
        _settle(temporary, target)
    except subprocess.TimeoutExpired:
        raise Unavailable("pip took more than ten minutes") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target

"""Fetching a part of a wheel: over a local server that answers range requests, as the index does."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fetch_wheels
import pytest
from fetch_wheels import Unavailable, fetch_packages, fetch_python, versions

FILES = {
    "pack/__init__.py": b"VALUE = 1\n",
    "pack/big.so": bytes(range(256)) * 4096,  # between what is wanted, and larger than GAP
    "pack/stored.py": b"x = 2\n" * 100,
    "pack-1.2.dist-info/METADATA": b"Name: pack\n",
}


class _Index(BaseHTTPRequestHandler):
    wheel = b""
    sent = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.wheel)))
        self.end_headers()

    def do_GET(self) -> None:
        if self.path == "/simple/pack/":
            body, code = b"", 200
            for name in ("pack-1.2-py3-none-any.whl", "pack-1.10.tar.gz", "pack-2.0rc1.tar.gz"):
                body += f'<a href="http://{self.headers["Host"]}/files/{name}#sha256=0">{name}</a>'.encode()
        elif self.path.startswith("/files/"):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            body, code = self.wheel[int(first) : int(last) + 1] if first else self.wheel[-int(last) :], 206
            type(self).sent += len(body)
        else:
            body, code = b"", 404
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Index]]:
    path = tmp_path / "wheel"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            kind = zipfile.ZIP_STORED if "big" in name or "stored" in name else zipfile.ZIP_DEFLATED
            archive.writestr(name, data, kind)
    _Index.wheel, _Index.sent = path.read_bytes(), 0
    server = HTTPServer(("127.0.0.1", 0), _Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetch_wheels, "INDEX", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setattr(fetch_wheels, "TAIL", 1 << 10)
    monkeypatch.setenv("BSFA_CACHE", str(tmp_path / "cache"))
    yield _Index
    server.shutdown()
    server.server_close()


def is_python(name: str) -> bool:
    return name.endswith(".py")


def test_only_what_is_wanted_is_fetched(index: type[_Index], tmp_path: Path) -> None:
    folder, fetched = fetch_python("pack", "1.2", is_python)
    assert folder == tmp_path / "cache/pack-1.2-py" and 0 < fetched < 4096 and index.sent < 8192 < len(index.wheel)
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {name: data for name, data in FILES.items() if not name.endswith(".so")}
    assert fetch_python("pack", "1.2", is_python) == (folder, 0)


def test_versions_are_in_order_and_final(index: type[_Index]) -> None:
    assert versions("pack") == ["1.2", "1.10"]


def test_damage_leaves_nothing(index: type[_Index], tmp_path: Path) -> None:
    index.wheel = index.wheel.replace(b"x = 2", b"x = 3", 1)
    with pytest.raises(RuntimeError, match=r"stored\.py arrived damaged"):
        fetch_python("pack", "1.2", is_python)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_not_there_is_an_error(index: type[_Index]) -> None:
    with pytest.raises(RuntimeError, match=r"pack 9\.9 has no wheel"):
        fetch_python("pack", "9.9", is_python)
    with pytest.raises(RuntimeError, match="404"):
        fetch_packages("other", ["other==1"])


def test_no_network_is_a_reason_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_wheels, "INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("BSFA_CACHE", str(tmp_path))
    with pytest.raises(Unavailable):
        fetch_python("pack", "1.2", is_python)
    with pytest.raises(Unavailable):
        fetch_packages("pack", ["pack==1.2"])
    assert list(tmp_path.iterdir()) == []

"""The SGLang backend against SGLang's own Python files, on a machine without a GPU.

``sglang_cases.py`` has the cases and runs them in a process of its own: SGLang changes settings of the process that
imports it. Its wheel and small dependencies are fetched once into ``$BSFA_CACHE``; without network this is skipped.
Another release: ``BSFA_SGLANG_VERSION=0.5.24 pytest tests/integrations/test_sglang_contract.py``.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from fetch_wheels import Unavailable, cache_folder, fetch_packages

from bsfa.integrations.serving import ServingConfig
from bsfa.policies import RelativeMax

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CASES = HERE / "sglang_cases.py"
VERSION = os.environ.get("BSFA_SGLANG_VERSION", "0.5.23")
GROUP = "sglang.srt.plugins"
RUN = "import sglang_stubs; sglang_stubs.install(); import sglang_cases; sglang_cases.main()"

#: What SGLang's attention and scheduling modules import, beside what the tests of bsfa need anyway.
PACKAGES = [
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "apache-tvm-ffi==0.1.15.post2",
    "attrs==26.1.0",
    "certifi==2026.10.18",
    "charset-normalizer==3.5.2",
    "compressed-tensors==0.20.0",
    "dill==0.4.1",
    "einops==0.8.2",
    "fastapi==0.165.0",
    "frozenlist==1.8.0",
    "gguf==0.19.0",
    "ipython==9.18.1",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "multidict==7.2.1",
    "openai==3.54.0",
    "opentelemetry-api==1.45.2",
    "orjson==3.13.0",
    "partial-json-parser==0.2.1.1.post7",
    "propcache==0.5.4",
    "pybase64==1.5.1",
    "pyzmq==27.3.0",
    "requests==2.34.2",
    "sentencepiece==0.2.3",
    "setproctitle==1.3.8",
    "sniffio==1.3.1",
    "starlette==1.10.0",
    "traitlets==5.16.1",
    "urllib3==2.8.0",
    "uvicorn==0.54.0",
    "yarl==1.25.1",
]
#: Folders that nothing imported here needs.
_LEFT_OUT = ("sglang/multimodal_gen/", "sglang/test/")
#: Whose mere presence is checked when SGLang's kernels are imported.
_PRESENT = ("sglang/kernels/jit/include/", "sglang/kernels/jit/csrc/")


def _wanted(name: str) -> bool:
    if ".dist-info/" in name or name.startswith(_PRESENT):
        return True
    return name.endswith(".py") and not name.startswith(_LEFT_OUT)


def fetch_sglang(version: str) -> Path:
    """A folder with the Python files of SGLang's wheel, downloaded by pip."""
    target = cache_folder() / f"sglang-{version}-py"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(temporary / "wheel"), f"sglang=={version}"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode:
            raise Unavailable(f"pip could not download sglang {version}: {done.stderr.strip()[-500:]}")
        (wheel,) = (temporary / "wheel").glob("*.whl")
        with ZipFile(wheel) as archive:
            for name in filter(_wanted, archive.namelist()):
                archive.extract(name, temporary / "files")
        try:
            (temporary / "files").rename(target)
        except OSError:
            if not target.is_dir():  # another process may have been first
                raise
    except subprocess.TimeoutExpired:
        raise Unavailable("pip took more than ten minutes") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _installed_plugin(folder: Path) -> None:
    """Metadata of an installed bsfa with the entry points of pyproject.toml, whatever is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "bsfa-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bsfa\nVersion: 0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in project["entry-points"][GROUP].items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def case_names() -> list[str]:
    """The cases, read without importing them."""
    tree = ast.parse(CASES.read_text())
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("case_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case said: None, or the traceback."""
    try:
        paths = [fetch_sglang(VERSION), fetch_packages("sglang", PACKAGES)]
    except Unavailable as reason:
        pytest.skip(f"SGLang's files cannot be had: {reason}")
    installed = tmp_path_factory.mktemp("installed")
    _installed_plugin(installed)
    paths = [installed, HERE, HERE.parent, ROOT / "python", *paths]
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "BSFA_CONFIG"))}
    environment = {**keep, "PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert done.returncode == 0 and done.stdout, f"SGLang {VERSION} cannot be imported:\n{done.stderr[-6000:]}"
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_the_entry_point_needs_no_sglang() -> None:
    """SGLang is imported when the entry point is called."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"][GROUP]["bsfa"].partition(":")
    command = f"import sys, {module} as m; assert callable(m.{function}); assert 'sglang' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-c", command], check=True, timeout=120, env=environment)


def test_the_example_configuration_loads() -> None:
    config = ServingConfig.load(ROOT / "examples" / "serve_sglang" / "bsfa.toml")
    assert isinstance(config.policy, RelativeMax) and config.dense_layers == {0, 1} and config.min_seqlen == 8192


@pytest.mark.parametrize("case", case_names())
def test_contract(case: str, results: dict[str, Any]) -> None:
    assert results[case] is None, results[case]

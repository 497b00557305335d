"""Holds bsfa's vLLM backend against vLLM itself, for each version, without a GPU and without installing vLLM.

The Python files of the wheel (5 to 12 MB of hundreds) and a few small packages (5 MB) are downloaded once, to
``$BSFA_CACHE`` or ``~/.cache/bsfa``; torch and transformers are those of this environment. Without a network: skipped.
``BSFA_VLLM`` names further versions, or "newest" for the newest of the index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fetch_wheels
import pytest
from fetch_wheels import Unavailable, cache_folder, fetch_packages, fetch_python

VERSIONS = ("0.19.1", "0.25.1", "0.33.0", *os.environ.get("BSFA_VLLM", "").split())
#: What vLLM's attention and configuration classes import, and torch and transformers do not bring.
PACKAGES = [
    "annotated-types==0.8.0",
    "cachetools==8.0.1",
    "cbor2==6.2.1",
    "cloudpickle==3.1.2",
    "msgspec==0.22.0",
    "psutil==7.2.2",
    "pydantic==2.14.3",
    "pydantic_core==2.50.4",
    "pyzmq==27.3.0",
    "typing-inspection==0.4.5",
]
HERE = Path(__file__).resolve().parent


def contract(version: str, folders: list[Path], **more: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs vllm_contract.py over the packages in ``folders``, and its environment."""
    here = [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, folders), *here])),
        "VLLM_CONTRACT_VERSION": version,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache_folder() / "vllm-runtime"),
        **more,
    }
    environment.pop("BSFA_CONFIG", None)
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, str(HERE / "vllm_contract.py")], environment


@pytest.fixture(scope="module")
def packages() -> Path:
    try:
        return fetch_packages("vllm", PACKAGES)
    except Unavailable as error:
        pytest.skip(f"what vLLM imports cannot be downloaded: {error}")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="vLLM needs Python 3.11")
@pytest.mark.parametrize("version", VERSIONS)
def test_contract(version: str, packages: Path) -> None:
    try:
        if version == "newest":
            version = fetch_wheels.versions("vllm")[-1]
        vllm, fetched = fetch_python("vllm", version, lambda name: name.endswith(".py"))
    except Unavailable as error:
        pytest.skip(f"vLLM {version} cannot be downloaded: {error}")
    print(f"vLLM {version}: {fetched / 1e6:.1f} MB downloaded")
    command, environment = contract(version, [vllm, packages])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"vLLM {version}\n{done.stdout}\n{done.stderr}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 40

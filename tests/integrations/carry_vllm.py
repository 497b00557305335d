"""The vLLM contract on a GPU machine that has no network: pack here, carry the file, run there.

    python tests/integrations/carry_vllm.py pack build/vllm.tar.gz --python 3.12    # 20 MB
    python tests/integrations/carry_vllm.py run build/vllm.tar.gz                   # there

``run`` needs bsfa with its CUDA library, and the torch, transformers and pytest of that machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from fetch_wheels import fetch_packages, fetch_python
from test_vllm_contract import PACKAGES, VERSIONS, contract


def pack(archive: Path, python: str) -> None:
    foreign = ["--python-version", python, "--only-binary=:all:"]
    foreign += [f"--platform=manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_28")]
    folders = {"packages": fetch_packages(f"vllm-{python}", PACKAGES, foreign)}
    for version in VERSIONS:
        folders[f"vllm-{version}-py"], _ = fetch_python("vllm", version, lambda name: name.endswith(".py"))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as out:
        for name, folder in folders.items():
            out.add(folder, name)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def run(archive: Path, device: str) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        for version in VERSIONS:
            folders = [folder / f"vllm-{version}-py", folder / "packages"]
            command, environment = contract(version, folders, VLLM_CONTRACT_DEVICE=device)
            print(f"vLLM {version} on {device}", flush=True)
            failed += subprocess.run(command, env=environment, check=False).returncode != 0
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="The vLLM contract on a GPU machine without a network")
    parser.add_argument("what", choices=("pack", "run"))
    parser.add_argument("archive", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of that machine")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.what == "pack":
        pack(options.archive, options.python)
    else:
        sys.exit(run(options.archive, options.device))


if __name__ == "__main__":
    main()

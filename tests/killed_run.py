"""Runs that die at a chosen moment, for test_resume.py: python killed_run.py WHAT FOLDER [ARGUMENT ...].

calibrate N OUT: `bsfa calibrate` of FOLDER/model to FOLDER/OUT, killed (SIGKILL) after N measured prompts; -1: never.
replace: FOLDER/other.safetensors is saved over FOLDER/t.safetensors, and the process killed before the rename.
limit BYTES ...: the same with files limited to BYTES, as on a full disk; a line for each of them.
measure: calibrates with FOLDER/part for finished prompts and files limited to 6000 bytes: none fits.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import bsfa.files
from bsfa.thresholds import ThresholdTable

ARGUMENTS = ["--block-size", "32", "--last-tiles", "1", "--sink-blocks", "1", "--window-blocks", "1", "--device", "cpu"]


def kill() -> None:
    """As an out-of-memory killer does: no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int) -> None:
    """No file may grow beyond ``size`` bytes: a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def calibrate(folder: Path, prompts: int, output: str) -> None:
    """The command, with a progress callback that kills at the start of a prompt."""
    import bsfa.cli
    import bsfa.cli_calibrate

    measure = bsfa.cli_calibrate.collect
    seen = {"prompts": 0, "measured": 0}

    def watched(*arguments: Any, progress: Any, **options: Any) -> Any:
        def report(done: float, total: float, now: str) -> None:
            progress(done, total, now)
            if done < total:
                if seen["measured"] == prompts:
                    kill()
                seen["measured"] += 1

        curves = measure(*arguments, progress=report, **options)
        print(f"measured {seen['measured']}")
        return curves

    bsfa.cli_calibrate.collect = watched  # type: ignore[assignment]
    files = ["--model", str(folder / "model"), "--data", str(folder / "p.jsonl"), "-o", str(folder / output)]
    sys.argv = ["bsfa", "calibrate", *files, "--target-recall", "0.6", *ARGUMENTS]
    bsfa.cli.main()


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "calibrate":
        calibrate(folder, int(sys.argv[3]), sys.argv[4])
        return
    if what == "measure":
        from bsfa.calibration import collect
        from tiny_model import make_model, make_prompts, make_tokenizer

        limit_files(6000)
        policy = bsfa.policies.RelativeMax(block_m=32, block_n=32)
        try:
            collect(make_model(), make_tokenizer(), make_prompts(2), policy, resume=folder / "part")
        except OSError as error:
            sys.exit(str(error))
    table, old = ThresholdTable.load(folder / "other.safetensors"), (folder / "t.safetensors").read_bytes()
    if what == "replace":
        bsfa.files.os.replace = lambda *_: kill()  # type: ignore[assignment]
        table.save(folder / "t.safetensors")
    for size in map(int, sys.argv[3:]):
        limit_files(size)
        try:
            table.save(folder / "t.safetensors")
            text = "written"
        except OSError as error:
            text = str(error)
        print(text, "old" if (folder / "t.safetensors").read_bytes() == old else "new")


if __name__ == "__main__":
    main()

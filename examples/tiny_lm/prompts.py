"""Writes the held-out prompts: prompts/calibration.jsonl.gz, prompts/evaluation.jsonl.gz and prompts/SOURCES.md.

    python prompts.py --cache /tmp/tiny_lm --out prompts

Both sets are draws of one distribution a length, from different held-out files and different seeds. A prompt holds its
questions and the right answers, so one teacher-forced prefill scores every question. One JSON object a line:

    id       "evaluation-8192-3"
    text     what the tokenizer is given
    tokens   number of tokens of text, BOS included
    answers  [{"task", "start", "end"}]: text[start:end] is the answer, whole tokens
    prose    [[start, end], ...]: the real text between the inserted lines
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from corpus import SHIPPED
from tasks import ANSWER, TEXT, Piece, Stream, encode_groups, encoded_size, interleave, make_groups

# Questions of each task at each length, the same in both sets.
QUESTIONS = {
    2048: {"single": 2, "multi_key": 3, "multi_value": 1, "variable": 1, "common_word": 1},
    4096: {"single": 3, "multi_key": 4, "multi_value": 3, "variable": 1, "common_word": 1},
    8192: {"single": 4, "multi_key": 5, "multi_value": 4, "variable": 2, "common_word": 1},
    16384: {"single": 4, "multi_key": 5, "multi_value": 4, "variable": 2, "common_word": 1},
}
SETS = {"calibration": {2048: 64, 4096: 36, 8192: 20, 16384: 8}, "evaluation": {8192: 10, 16384: 10}}
SEEDS = {"calibration": 101, "evaluation": 202}

# Where the installed licence file does not say it.
NOTICES = {
    "python": "Copyright (c) 2001 Python Software Foundation; All Rights Reserved",
    "jax": "Copyright 2018 The JAX Authors",
}
BSD_TEXT = """\
Redistribution and use in source and binary forms, with or without modification, are permitted provided that the
following conditions are met: (1) Redistributions of source code must retain the above copyright notice, this list of
conditions and the following disclaimer. (2) Redistributions in binary form must reproduce the above copyright notice,
this list of conditions and the following disclaimer in the documentation and/or other materials provided with the
distribution. (3) Neither the name of the copyright holder nor the names of its contributors may be used to endorse or
promote products derived from this software without specific prior written permission.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES,
INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY,
WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF
THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE."""


def make_prompt(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    text: np.ndarray,
    cuts: np.ndarray,
    groups: list[Any],
    encoded: Any,
    name: str,
) -> dict[str, Any]:
    """One prompt over the given text; checks that its text encodes to exactly the tokens put together."""
    pieces: list[Piece] = interleave(rng, text, cuts, groups, encoded)
    out: list[str] = []
    answers, prose, at = [], [], 0
    for piece in pieces:
        string = tokenizer.decode(piece.ids.tolist(), skip_special_tokens=False)
        if piece.kind == ANSWER:
            answers.append({"task": piece.task, "start": at, "end": at + len(string)})
        elif piece.kind == TEXT:
            prose.append([at, at + len(string)])
        out.append(string)
        at += len(string)
    joined = "".join(out)
    ids = np.concatenate([p.ids for p in pieces])
    encoding = tokenizer.encode(joined)
    if encoding.ids[1:] != ids.tolist():
        raise RuntimeError(f"{name}: the text does not encode to its tokens")
    return {"id": name, "text": joined, "tokens": len(encoding.ids), "answers": answers, "prose": prose}


def make_set(tokenizer: Tokenizer, stream: Stream, kind: str, scale: int = 1) -> tuple[list[dict[str, Any]], list[Any]]:
    """The prompts of a set in shuffled order, and the (start, end) of the text of each in the split's stream."""
    rng = np.random.default_rng(SEEDS[kind])
    lengths = [length for length, count in SETS[kind].items() for _ in range(max(1, count // scale))]
    lengths = [int(n) for n in rng.permutation(lengths)]
    total, room = sum(lengths), len(stream.tokens) - 200
    if total > room:
        raise RuntimeError(f"{kind}: {room} held-out tokens for {total} tokens of prompts")
    prompts, spans, start, number = [], [], 0, dict.fromkeys(lengths, 0)
    for length in lengths:
        groups = make_groups(rng, QUESTIONS[length])
        encoded = encode_groups(tokenizer, groups)
        text, cuts = stream.lines(start * room // total, length - 1 - encoded_size(encoded))
        prompts.append(make_prompt(rng, tokenizer, text, cuts, groups, encoded, f"{kind}-{length}-{number[length]}"))
        spans.append((start * room // total, start * room // total + len(text)))
        number[length] += 1
        start += length
    return prompts, spans


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _notices(package: str) -> list[str]:
    """The first copyright lines of a distribution's own licence file."""
    if package in NOTICES:
        return [NOTICES[package]]
    files = [p for p in importlib.metadata.distribution(package).files or [] if "dist-info" in str(p)]
    files = [p for p in files if re.fullmatch(r"(LICEN[CS]E|COPYING)(\.txt|\.md|\.rst)?", p.name)]
    if not files:
        return []
    own = min(files, key=lambda p: (len(p.parts), str(p)))
    lines = Path(str(own.locate())).read_text(encoding="utf-8", errors="replace").split("\n")[:12]
    return [" ".join(x.split()) for x in lines if re.match(r"\s*(Copyright\b|\(c\)).*\d{4}", x)]


def sources(cache: Path, used: dict[str, list[str]]) -> str:
    """SOURCES.md: packages, versions, licences, notices, and every file that gave text."""
    records = {r["package"]: r for r in json.loads((cache / "corpus.json").read_text())["packages"]}
    packages = [p for p in SHIPPED if any(n.startswith(p + "/") for names in used.values() for n in names)]
    out = ["# Where the text of the prompts comes from", ""]
    out += [
        "The prompts are excerpts of source files and documentation of the packages below, joined by header lines that",
        "name the file, with synthetic lines (facts, questions, answers) put between. Written by `prompts.py`.",
        "",
        "| package | version | licence | copyright |",
        "|---|---|---|---|",
    ]
    for package in packages:
        notices = "; ".join(_notices(package)) or "see the package"
        out.append(f"| {package} | {records[package]['version']} | {records[package]['licence']} | {notices} |")
    out += ["", "The excerpts stay under these licences. PSF-2.0: <https://docs.python.org/3/license.html>;"]
    out += ["Apache-2.0: <https://www.apache.org/licenses/LICENSE-2.0>; BSD-3-Clause:", "", BSD_TEXT, ""]
    for kind, names in used.items():
        out += [f"## Files of {kind}.jsonl.gz", "", *[f"* {name}" for name in names], ""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the encoded corpus (see train.py)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prompts")
    parser.add_argument("--scale", type=int, default=1, help="divides the number of prompts (for a dry run)")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.cache / "tokenizer.json"))
    index = json.loads((args.cache / "files.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    used: dict[str, list[str]] = {}
    for kind in SETS:
        stream = Stream.load(args.cache, kind, tokenizer)
        prompts, spans = make_set(tokenizer, stream, kind, args.scale)
        write_jsonl(args.out / f"{kind}.jsonl.gz", prompts)
        at, names = 0, []
        for name, size in index[kind]:
            if any(start < at + size and at < end + 200 for start, end in spans):
                names.append(name)
            at += size
        used[kind] = names
        size = (args.out / f"{kind}.jsonl.gz").stat().st_size
        print(f"{kind}: {len(prompts)} prompts, {sum(p['tokens'] for p in prompts)} tokens, {size} bytes", flush=True)
    (args.out / "SOURCES.md").write_text(sources(args.cache, used))


if __name__ == "__main__":
    main()

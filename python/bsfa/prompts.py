"""Prompts with marked answers and prose: what calibration and evaluation run on.

A file has one JSON object a line (``.jsonl`` or ``.jsonl.gz``); positions are character offsets into ``text``:

    {"id": "a-1", "text": "...", "answers": [{"task": "single", "start": 812, "end": 818}], "prose": [[0, 640]]}

``id``, ``answers`` and ``prose`` may be missing; other keys are ignored. Answers stand in the text, so that a single
teacher-forced prefill scores every question. Without ``prose``, all text that is no answer counts as prose.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """``text[start:end]`` is the right answer to a question of kind ``task``."""

    task: str
    start: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """A text with its marked parts. ``prose`` None: everything that is no answer."""

    text: str
    id: str = ""
    answers: tuple[Answer, ...] = ()
    prose: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """Token ids int64 [S], token positions of each answer (task, int64 [n]), and of the prose, int64 [m].

    Position p is scored by the logits at p - 1, so position 0 is never listed.
    """

    id: str
    ids: Tensor
    answers: tuple[tuple[str, Tensor], ...]
    prose: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]


def _span(value: Any, length: int, what: str) -> tuple[int, int]:
    ok = isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value)
    if not ok:
        raise ValueError(f"{what} must be two integers [start, end], got {json.dumps(value)[:60]}")
    start, end = value
    if not 0 <= start < end <= length:
        raise ValueError(f"{what} = [{start}, {end}] must satisfy 0 <= start < end <= {length} (length of text)")
    return start, end


def parse_prompt(row: Any, default_id: str = "") -> Prompt:
    """One prompt from a decoded JSON object. Raises ``ValueError`` that names the field."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError("'text' must be a non-empty string")
    identifier = row.get("id", default_id)
    if not isinstance(identifier, str):
        raise ValueError("'id' must be a string")
    answers = []
    rows = row.get("answers") or []
    if not isinstance(rows, list):
        raise ValueError("'answers' must be a list")
    for i, a in enumerate(rows):
        if not isinstance(a, dict) or not isinstance(a.get("task"), str):
            raise ValueError(f"answers[{i}] must be an object with a string 'task', 'start' and 'end'")
        answers.append(Answer(a["task"], *_span([a.get("start"), a.get("end")], len(text), f"answers[{i}]")))
    prose = row.get("prose")
    if prose is not None:
        if not isinstance(prose, list):
            raise ValueError("'prose' must be a list of [start, end]")
        prose = tuple(_span(s, len(text), f"prose[{i}]") for i, s in enumerate(prose))
    return Prompt(text, identifier, tuple(answers), prose)


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read the first ``limit`` prompts (default: all) of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises ``ValueError`` with file and line for what cannot be read, ``OSError`` if the file cannot be opened.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    number = 0
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        lines: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        try:
            for line in lines:
                number += 1
                if limit is not None and len(prompts) >= limit:
                    break
                if line.strip():
                    prompts.append(parse_prompt(json.loads(line), f"line-{number}"))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip data after line {number}: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number}: not UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def prompts_sha256(texts: Sequence[str]) -> str:
    """Hash of the texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _overlapping(offsets: Tensor, start: int, end: int) -> Tensor:
    """Positions > 0 of the tokens that share a character with [start, end)."""
    hit = (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
    hit[:1] = False
    return hit.nonzero()[:, 0]


def tokenize(prompt: Prompt, tokenizer: Any, max_length: int | None = None) -> TokenizedPrompt:
    """Token ids and token positions of a prompt, cut to ``max_length`` tokens (answers beyond the cut are dropped).

    ``tokenizer``: a fast Hugging Face tokenizer; special tokens are added as it does by default. Raises ``ValueError``
    for a tokenizer without offsets, an empty result, or an answer that no token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed")
    encoding = tokenizer(prompt.text, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    offsets = torch.tensor(encoding["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    if ids.numel() == 0:
        raise ValueError(f"prompt '{prompt.id}' has no tokens")
    length = len(ids) if max_length is None else min(len(ids), max_length)
    answers = []
    is_answer = torch.zeros(len(ids), dtype=torch.bool)
    for a in prompt.answers:
        positions = _overlapping(offsets, a.start, a.end)
        if positions.numel() == 0:
            raise ValueError(f"prompt '{prompt.id}': no token covers the answer [{a.start}, {a.end}]")
        is_answer[positions] = True
        if int(positions[-1]) < length:
            answers.append((a.task, positions))
    if prompt.prose is None:
        is_prose = ~is_answer
        is_prose[0] = False
    else:
        is_prose = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in prompt.prose:
            is_prose[_overlapping(offsets, start, end)] = True
    return TokenizedPrompt(prompt.id, ids[:length], tuple(answers), is_prose[:length].nonzero()[:, 0])


def length_bucket(tokens: int) -> int:
    """The power of two nearest to a length (in ratio): 8192 for 6000 .. 11500 tokens."""
    return 1 << max(round(math.log2(max(tokens, 1))), 0)


def length_name(tokens: int) -> str:
    """'16K' for 16384, '512' for 512."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)

"""The training text: Python's standard library and an allow-list of installed packages under free licences.

Files are split by a hash of their path into `train`, `validation`, `calibration` and `evaluation`; the model never
trains on the last three. Every file is preceded by a header line that names it, and files follow each other in the
order of their paths, so that a long window holds neighbouring files of one package.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID = 0
VOCAB_SIZE = 2048
SPLITS = ("train", "validation", "calibration", "evaluation")

# Distribution -> SPDX licence. What the distribution itself declares is checked against FREE and recorded as well.
PACKAGES = {
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "scikit-learn": "BSD-3-Clause",
    "scikit-image": "BSD-3-Clause",
    "statsmodels": "BSD-3-Clause",
    "seaborn": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "torchvision": "BSD-3-Clause",
    "numba": "BSD-2-Clause",
    "mpmath": "BSD-3-Clause",
    "joblib": "BSD-3-Clause",
    "h5py": "BSD-3-Clause",
    "pybind11": "BSD-3-Clause",
    "pygments": "BSD-2-Clause",
    "jinja2": "BSD-3-Clause",
    "werkzeug": "BSD-3-Clause",
    "click": "BSD-3-Clause",
    "markdown": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "accelerate": "Apache-2.0",
    "peft": "Apache-2.0",
    "sentence-transformers": "Apache-2.0",
    "timm": "Apache-2.0",
    "pytorch-lightning": "Apache-2.0",
    "jax": "Apache-2.0",
    "flax": "Apache-2.0",
    "optax": "Apache-2.0",
    "numpyro": "Apache-2.0",
    "equinox": "Apache-2.0",
    "diffrax": "Apache-2.0",
    "tensorboard": "Apache-2.0",
    "onnx": "Apache-2.0",
    "pyarrow": "Apache-2.0",
    "xarray": "Apache-2.0",
    "requests": "Apache-2.0",
    "aiohttp": "Apache-2.0",
    "torch-geometric": "MIT",
    "gpytorch": "MIT",
    "botorch": "MIT",
    "cupy-cuda13x": "MIT",
    "onnxscript": "MIT",
    "einops": "MIT",
    "rich": "MIT",
    "fonttools": "MIT",
    "attrs": "MIT",
    "pytest": "MIT",
    "setuptools": "MIT",
    "urllib3": "MIT",
}
# The few whose held-out files are shipped in prompts/ (their notices are in prompts/SOURCES.md).
SHIPPED = ("python", "numpy", "scipy", "pandas", "sympy", "networkx", "scikit-learn", "jax", "transformers")
FREE = re.compile(r"BSD|MIT|Apache|PSF|Python Software Foundation", re.IGNORECASE)
SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".rst", ".md", ".txt", ".h", ".hpp", ".cuh"}
# Code of other projects inside a distribution, and licence files (they would be seen hundreds of times).
SKIPPED_PARTS = re.compile(
    r"^(_?vendor(ed)?|third_party|extern(al|als)?|externals|site-packages|dist-packages|__pycache__|data|lib2to3"
    r"|idlelib|nvfuser|node_modules|licenses?|.*\.dist-info)$"
)
PACKAGE_BYTES = 16_000_000
FILE_BYTES = (800, 400_000)


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: `name` is `<distribution>/<path inside site-packages>`, the key of the split."""

    name: str
    package: str
    path: Path


def split_of(name: str) -> str:
    """The split of a file: 2 % validation, 4 % calibration, 3 % evaluation, the rest train."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % 100
    return "validation" if bucket < 2 else "calibration" if bucket < 6 else "evaluation" if bucket < 9 else "train"


def _declared_licence(dist: importlib.metadata.Distribution) -> str:
    meta = dist.metadata
    fields = [(meta.get_all(name) or [""])[0] for name in ("License-Expression", "License")]
    found = [field.strip().split("\n")[0][:80] for field in fields]
    found += [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    return "; ".join(f for f in found if f)


def _files(package: str) -> tuple[str, str, list[SourceFile]]:
    """Version, declared licence and files of a distribution (or of Python itself)."""
    if package == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*") if p.suffix in SUFFIXES]
        version, licence = platform.python_version(), "PSF-2.0"
    else:
        dist = importlib.metadata.distribution(package)
        root = Path(str(dist.locate_file("")))
        paths = [Path(str(p.locate())) for p in dist.files or [] if p.suffix in SUFFIXES]
        version, licence = dist.version, _declared_licence(dist)
    files = []
    for path in sorted(set(paths)):
        relative = path.relative_to(root) if path.is_relative_to(root) else None
        if relative is None or any(SKIPPED_PARTS.match(part) for part in relative.parts[:-1]):
            continue
        if re.search(r"licen[cs]e|copying|authors|third.?party", path.name, re.IGNORECASE):
            continue
        files.append(SourceFile(f"{package}/{relative.as_posix()}", package, path))
    return version, licence, files


def read_text(path: Path) -> str | None:
    """The file as ASCII text that ends in one newline, or None where it is not wanted (binary, data, generated)."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if not FILE_BYTES[0] <= len(raw) <= FILE_BYTES[1] or not raw.isascii():
        return None
    text = raw.decode("ascii").replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r" +\n", "\n", text)).strip("\n") + "\n"
    digits = sum(map(text.count, "0123456789"))
    longest = max(map(len, text.split("\n")))
    return None if digits > 0.15 * len(text) or longest > 600 else text


def collect(byte_limit: int | None = None) -> tuple[list[SourceFile], list[dict[str, object]]]:
    """All files of the corpus in order, and one record a package (version, licence, files, bytes)."""
    files: list[SourceFile] = []
    records: list[dict[str, object]] = []
    limit = byte_limit or PACKAGE_BYTES
    for package in ("python", *PACKAGES):
        try:
            version, declared, found = _files(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not FREE.search(declared):
            records.append({"package": package, "version": version, "skipped": f"licence: {declared}"})
            continue
        # A package over the limit gives whole files drawn by hash, so that its part is the same at every run.
        drawn = sorted(found, key=lambda f: hashlib.sha256(b"draw" + f.name.encode()).digest())
        kept, size = [], 0
        for file in drawn:
            size += file.path.stat().st_size
            if size > limit:
                break
            kept.append(file)
        files += sorted(kept, key=lambda f: f.name)
        spdx = "PSF-2.0" if package == "python" else PACKAGES[package]
        records.append({"package": package, "version": version, "licence": spdx, "declared": declared})
    return files, records


def header(file: SourceFile) -> str:
    """The line before a file: `=== scipy/linalg/basic.py ===`."""
    return f"=== {file.name.split('/', 1)[1]} ===\n"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens. Each newline is a token by itself and digits go in pairs from the left.

    No pre-token spans a newline, so encoding line by line and joining equals encoding the whole: sequences are put
    together from encoded lines and still agree with the tokenizer on their text.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = r"\n|\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    pairs = " ".join(f"{i:02d}" for i in range(100))

    def samples() -> Iterator[str]:
        yield from texts
        for _ in range(5000):
            yield pairs  # makes every pair of digits one token

    tokenizer.train_from_iterator(samples(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    missing = [i for i in range(100) if tokenizer.token_to_id(f"{i:02d}") is None]
    if missing:
        raise RuntimeError(f"digit pairs without a token: {missing}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and the tokenizer_config.json that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


_TOKENIZER: Tokenizer | None = None


def _load(path: str) -> None:
    global _TOKENIZER
    _TOKENIZER = Tokenizer.from_file(path)


def _encode(file: SourceFile) -> tuple[int, np.ndarray] | None:
    text = read_text(file.path)
    if text is None:
        return None
    assert _TOKENIZER is not None
    ids = _TOKENIZER.encode(header(file) + text, add_special_tokens=False).ids
    return len(text), np.asarray(ids, dtype=np.uint16)


def tokenizer_sample(files: list[SourceFile], budget: int = 12_000_000) -> Iterator[str]:
    """Training files drawn by hash, up to `budget` bytes: what the tokenizer is trained on."""
    total = 0
    for file in sorted(files, key=lambda f: hashlib.sha256(b"bpe" + f.name.encode()).digest()):
        text = read_text(file.path) if split_of(file.name) == "train" else None
        if text is not None:
            yield text
            total += len(text)
            if total > budget:
                return


def prepare(cache: Path, tokenizer_json: Path | None, workers: int, byte_limit: int | None = None) -> None:
    """Collects, trains the tokenizer (unless one is given), encodes; leaves <split>.npy, files.json and corpus.json."""
    cache.mkdir(parents=True, exist_ok=True)
    files, records = collect(byte_limit)
    if tokenizer_json is None:
        tokenizer_json = cache / "tokenizer.json"
        train_tokenizer(tokenizer_sample(files)).save(str(tokenizer_json))
    elif tokenizer_json != cache / "tokenizer.json":
        (cache / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    with multiprocessing.get_context("spawn").Pool(workers, _load, (str(tokenizer_json),)) as pool:
        encoded = pool.map(_encode, files, chunksize=64)
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    index: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    counts: dict[str, list[int]] = {}
    for file, result in zip(files, encoded, strict=True):
        if result is None:
            continue
        size, ids = result
        split = split_of(file.name)
        if split in ("calibration", "evaluation") and file.package not in SHIPPED:
            continue  # held out, but nothing is shipped from it
        parts[split].append(ids)
        index[split].append((file.name, len(ids)))
        count = counts.setdefault(file.package, [0, 0, 0])
        count[0] += 1
        count[1] += size
        count[2] += len(ids)
    for split, arrays in parts.items():
        np.save(cache / f"{split}.npy", np.concatenate(arrays) if arrays else np.zeros(0, np.uint16))
    for record in records:
        done = counts.get(str(record["package"]))
        if done is not None:
            record.update(files=done[0], bytes=done[1], tokens=done[2])
    totals = {s: {"files": len(index[s]), "tokens": sum(n for _, n in index[s])} for s in SPLITS}
    (cache / "files.json").write_text(json.dumps(index))
    (cache / "corpus.json").write_text(json.dumps({"splits": totals, "packages": records}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Collects and encodes the corpus; train.py does it when needed.")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="an existing tokenizer.json; without it one is trained")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--byte-limit", type=int, help="bytes of each package (for a dry run)")
    args = parser.parse_args()
    prepare(args.cache, args.tokenizer, args.workers, args.byte_limit)


if __name__ == "__main__":
    main()

"""Synthetic long-range tasks in RULER's style, and sequences that hide them in real text.

A group is a set of needle lines and the questions about them. Needle lines go to random places of the text; a question
comes after every needle it needs, in mid-sequence or at the end. Each answer is a run of whole tokens:

  single       The access code of amber river is 482913.            one needle with this attribute
  multi_key    the same, among needles with confusable keys         (amber river, amber castle, cold river, ...)
  multi_value  The second gate code of amber river is 482913.       the question asks for all of them in order
  variable     Set QX48 to 482913. / Copy QX48 into BK17.           the question asks for all names that hold the value
  common_word  Word list: lake tower lake ...                       the question asks for the most frequent word
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from words import ADJECTIVES, ATTRIBUTES, NOUNS, ORDINALS

TEXT, NEEDLE, QUESTION, ANSWER, COPY = range(5)
LOSS_WEIGHTS = (1.0, 0.3, 0.5, 10.0, 2.0)
TASKS = ("single", "multi_key", "multi_value", "variable", "common_word")
NEEDLE_TASKS = TASKS[:3]
BOS_ID = 0


@dataclass
class Question:
    """`before` + `answer` + ".": `after` names the group's needles that must come first."""

    task: str
    before: str
    answer: str
    after: range


@dataclass
class Group:
    needles: list[str]
    questions: list[Question]


@dataclass
class Piece:
    """A run of tokens of one kind; an answer carries its task."""

    ids: np.ndarray
    kind: int
    task: str | None = None


class Names:
    """Hands out attributes, keys, values and variables, none twice in a sequence."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.attributes = [str(a) for a in rng.permutation(ATTRIBUTES)]
        self.used: set[str] = set()

    def _fresh(self, draw: Callable[[], str]) -> str:
        while (name := draw()) in self.used:
            pass
        self.used.add(name)
        return name

    def attribute(self) -> str:
        return self.attributes.pop()

    def keys(self, count: int) -> list[str]:
        """`count` keys that share adjectives and nouns (or nouns alone, with numbers)."""
        rng = self.rng
        side = max(2, int(np.ceil(np.sqrt(count))))
        adjectives, nouns = rng.choice(ADJECTIVES, side, False), rng.choice(NOUNS, side, False)
        if rng.random() < 0.35:
            return [self._fresh(lambda: f"{rng.choice(nouns)}-{rng.integers(1000, 10000)}") for _ in range(count)]
        grid = [f"{a} {n}" for a in adjectives for n in nouns]
        chosen = [str(k) for k in rng.permutation(grid)[:count]]
        if self.used.intersection(chosen):
            return self.keys(count)
        self.used.update(chosen)
        return chosen

    def values(self, count: int) -> list[str]:
        """`count` values of one kind: 4, 6 or 8 digits, or two words."""
        rng = self.rng
        kind = rng.choice([4, 6, 8, 0], p=[0.2, 0.4, 0.15, 0.25])
        if kind:
            return [self._fresh(lambda: "".join(map(str, rng.integers(0, 10, kind)))) for _ in range(count)]
        return [self._fresh(lambda: " ".join(rng.choice(NOUNS, 2))) for _ in range(count)]

    def variable(self) -> str:
        letters, rng = list("BCDFGHJKLMNPQRSTVWXZ"), self.rng
        return self._fresh(lambda: "".join(rng.choice(letters, 2)) + f"{rng.integers(0, 100):02d}")


def _fact(subject: str, value: str) -> str:
    return f"The {subject} is {value}.\n"


def _split_answer(before: str, answer: str) -> tuple[str, str]:
    """Digits are tokens of their own after the space; a word's first token holds the space before it."""
    return (before + " ", answer) if answer[0].isdigit() else (before, " " + answer)


def _ask(task: str, question: str, lead: str, answer: str, after: range) -> Question:
    before, answer = _split_answer(f"Question: {question}?\nAnswer: {lead}", answer)
    return Question(task, before, answer, after)


def keyed(names: Names, n_keys: int, n_questions: int) -> Group:
    """`single` for one key, `multi_key` for several."""
    attribute, keys, values = names.attribute(), names.keys(n_keys), names.values(n_keys)
    task = "single" if n_keys == 1 else "multi_key"
    group = Group([_fact(f"{attribute} of {k}", v) for k, v in zip(keys, values, strict=True)], [])
    for i in range(n_questions):
        subject = f"{attribute} of {keys[i]}"
        group.questions.append(_ask(task, f"what is the {subject}", f"The {subject} is", values[i], range(n_keys)))
    return group


def multi_value(names: Names, n_keys: int) -> Group:
    """Each key has two to four values under one attribute; one question a key asks for all of them."""
    attribute = names.attribute()
    group = Group([], [])
    for key in names.keys(n_keys):
        values = names.values(int(names.rng.integers(2, 5)))
        first = len(group.needles)
        order = ORDINALS[: len(values)]
        group.needles += [_fact(f"{o} {attribute} of {key}", v) for o, v in zip(order, values, strict=True)]
        listed = ", ".join(f"{o} {v}" for o, v in zip(order, values, strict=True)).split(" ", 1)[1]
        lead = f"The {attribute} of {key} is first"
        after = range(first, len(group.needles))
        group.questions.append(_ask("multi_value", f"list every {attribute} of {key}", lead, listed, after))
    return group


def variable(names: Names) -> Group:
    """A value that goes through two to four variables."""
    rng = names.rng
    value = "".join(map(str, rng.integers(0, 10, 6)))
    chain = [names.variable() for _ in range(int(rng.integers(2, 5)))]
    needles = [f"Set {chain[0]} to {value}.\n"]
    needles += [f"Copy {a} into {b}.\n" for a, b in pairwise(chain)]
    question = f"which variables hold {value}"
    return Group(
        needles, [_ask("variable", question, f"The value {value} is in", ", ".join(chain), range(len(needles)))]
    )


def common_word(names: Names, n_lines: int) -> Group:
    """Word lists in which one word comes often and the others once or twice."""
    rng = names.rng
    words = rng.choice(NOUNS, n_lines * 6 + 1, True)
    others = [str(w) for w in words[1:] if w != words[0]]
    pool = [str(w) for w in rng.permutation(others + [words[0]] * (2 * n_lines))]
    cuts = np.linspace(0, len(pool), n_lines + 1).astype(int)
    needles = [f"Word list: {' '.join(pool[a:b])}.\n" for a, b in pairwise(cuts)]
    lead = "The most common word is"
    return Group(
        needles,
        [_ask("common_word", "which word is the most common in the word lists", lead, str(words[0]), range(n_lines))],
    )


def make_groups(rng: np.random.Generator, counts: dict[str, int]) -> list[Group]:
    """Groups that hold exactly counts[task] questions of each task."""
    names = Names(rng)
    groups = [keyed(names, 1, 1) for _ in range(counts.get("single", 0))]
    left = counts.get("multi_key", 0)
    while left:
        asked = min(left, int(rng.integers(1, 4)))
        groups.append(keyed(names, asked + int(rng.integers(1, 5)), asked))
        left -= asked
    left = counts.get("multi_value", 0)
    while left:
        asked = min(left, int(rng.integers(1, 3)))
        groups.append(multi_value(names, asked))
        left -= asked
    groups += [variable(names) for _ in range(counts.get("variable", 0))]
    groups += [common_word(names, int(rng.integers(2, 5))) for _ in range(min(1, counts.get("common_word", 0)))]
    return groups


def random_counts(rng: np.random.Generator, length: int) -> dict[str, int]:
    """A draw of how many questions of each task a training sequence of `length` tokens carries."""
    low, high = (3, 11) if length <= 2048 else (6, 22) if length <= 8192 else (10, 41)
    drawn = rng.multinomial(int(rng.integers(low, high)), [0.25, 0.31, 0.2, 0.16, 0.08])
    counts = dict(zip(TASKS, drawn.tolist(), strict=True))
    counts["single"] = min(counts["single"], 7)
    counts["multi_key"] = min(counts["multi_key"], 12)
    counts["multi_value"] = min(counts["multi_value"], 8)
    return counts


class Stream:
    """One split of the corpus: tokens in order, and where its lines end."""

    def __init__(self, tokens: np.ndarray, newline: int):
        self.tokens = tokens
        self.ends = np.flatnonzero(tokens == newline) + 1

    @classmethod
    def load(cls, cache: Path, split: str, tokenizer: Tokenizer) -> Stream:
        newline = tokenizer.encode("\n", add_special_tokens=False).ids[0]
        return cls(np.load(cache / f"{split}.npy", mmap_mode="r"), newline)

    def window(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens that end a line, and the places inside (counted from its start) where a line may be put in."""
        low = np.searchsorted(self.ends, size)
        end = int(self.ends[rng.integers(low, len(self.ends))])
        return self.cut(end - size, end)

    def cut(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        inside = self.ends[np.searchsorted(self.ends, start, "right") : np.searchsorted(self.ends, end, "right")]
        return np.asarray(self.tokens[start:end]), inside - start

    def lines(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `size` tokens of whole lines from the first line that begins at or after `start`."""
        begin = 0 if start == 0 else int(self.ends[np.searchsorted(self.ends, start)])
        end = int(self.ends[np.searchsorted(self.ends, begin + size, "right") - 1])
        return self.cut(begin, end)


def encode_all(tokenizer: Tokenizer, strings: list[str]) -> list[np.ndarray]:
    return [np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(strings, add_special_tokens=False)]


def encode_groups(tokenizer: Tokenizer, groups: list[Group]) -> tuple[list[list[Piece]], list[list[list[Piece]]]]:
    """The needle lines and the questions of each group as pieces."""
    strings: list[str] = []
    for group in groups:
        strings += group.needles
        for q in group.questions:
            strings += [q.before, q.answer, ".\n"]
    ids = iter(encode_all(tokenizer, strings))
    needles, questions = [], []
    for group in groups:
        needles.append([Piece(next(ids), NEEDLE) for _ in group.needles])
        questions.append(
            [
                [Piece(next(ids), QUESTION), Piece(next(ids), ANSWER, q.task), Piece(next(ids), QUESTION)]
                for q in group.questions
            ]
        )
    return needles, questions


def encoded_size(encoded: tuple[list[list[Piece]], list[list[list[Piece]]]]) -> int:
    """Number of tokens of what encode_groups returned."""
    needles, questions = encoded
    return sum(len(p.ids) for g in needles for p in g) + sum(len(p.ids) for g in questions for q in g for p in q)


def interleave(
    rng: np.random.Generator,
    text: np.ndarray,
    cuts: np.ndarray,
    groups: list[Group],
    encoded: tuple[list[list[Piece]], list[list[list[Piece]]]],
    mid_share: float = 0.25,
    copies: list[tuple[int, list[Piece]]] | None = None,
) -> list[Piece]:
    """The text with needle lines at random line ends, questions after their needles, most of them at the end."""
    placed: list[tuple[int, int, list[Piece]]] = []  # (slot, tie-break, pieces)
    last: list[list[Piece]] = []
    slots = len(cuts)
    for group, needles, questions in zip(groups, *encoded, strict=True):
        at = rng.integers(0, slots, len(needles))
        placed += [(int(s), 0, [piece]) for s, piece in zip(at, needles, strict=True)]
        for q, pieces in zip(group.questions, questions, strict=True):
            ready = int(at[q.after.start : q.after.stop].max()) + 1
            if ready < slots and rng.random() < mid_share:
                placed.append((int(rng.integers(ready, slots)), 1, pieces))
            else:
                last.append(pieces)
    placed += [(slot, 2, pieces) for slot, pieces in copies or []]
    placed.sort(key=lambda p: (p[0], p[1]))
    out: list[Piece] = []
    done = 0
    for slot, _, pieces in placed:
        cut = int(cuts[slot])
        if cut > done:
            out.append(Piece(text[done:cut], TEXT))
            done = cut
        out += pieces
    if done < len(text):
        out.append(Piece(text[done:], TEXT))
    for i in rng.permutation(len(last)):
        out += last[i]
    return out


def _copies(
    rng: np.random.Generator, text: np.ndarray, cuts: np.ndarray, sizes: list[int]
) -> list[tuple[int, list[Piece]]]:
    """Passages of the text that come again later; the first tokens of each count as text, the rest as copied."""
    out = []
    for size in sizes:
        start = int(rng.integers(0, max(1, len(text) - 2 * size)))
        first = min(int(np.searchsorted(cuts, start + size)), len(cuts) - 1)
        passage = text[start : start + size]
        out.append((int(rng.integers(first, len(cuts))), [Piece(passage[:8], TEXT), Piece(passage[8:], COPY)]))
    return out


def training_sequence(
    rng: np.random.Generator, tokenizer: Tokenizer, stream: Stream, length: int, task_share: float = 0.7
) -> tuple[np.ndarray, np.ndarray]:
    """`length` + 1 token ids (BOS first) and the kind of each."""
    groups = make_groups(rng, random_counts(rng, length)) if rng.random() < task_share else []
    encoded = encode_groups(tokenizer, groups)
    extra = encoded_size(encoded)
    sizes = rng.integers(24, 160, rng.integers(1, 5)).tolist() if rng.random() < 0.25 else []
    text, cuts = stream.window(rng, length - extra - sum(sizes))
    copies = _copies(rng, text, cuts, sizes)
    pieces = interleave(rng, text, cuts, groups, encoded, copies=copies)
    ids = np.concatenate([[BOS_ID], *[p.ids for p in pieces]]).astype(np.uint16)
    kinds = np.repeat(np.array([TEXT, *[p.kind for p in pieces]], np.uint8), [1, *[len(p.ids) for p in pieces]])
    return ids, kinds

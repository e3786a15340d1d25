"""Why a generated text is kept or not: its form, what it repeats, and whether it activates its feature."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

VERDICTS = ("kept", "empty", "unparsable", "too_short", "repetitive", "copy", "below_threshold", "duplicate")
"""After ``kept``, the reasons of rejection in the order in which they are looked for."""
MIN_WORDS = 3
NEAR = 0.6
"""Texts whose word 5-grams have a larger Jaccard index than this are near-duplicates."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Written:
    """A generated text, as far as the verdict needs it."""

    text: str
    feature: int
    score: float
    delta: float
    shown: tuple[str, ...]
    """The examples that its prompt showed."""


def fault(text: str) -> str:
    """What is wrong with the form of a text: one of ``VERDICTS``, or empty when nothing is."""
    words = _words(text)
    if not text.strip():
        return "empty"
    if not words or "\ufffd" in text or not all(c.isprintable() for c in text):
        return "unparsable"
    if len(words) < MIN_WORDS:
        return "too_short"
    # Strong steering makes a model stutter: one word fills over a third of the text, or most words are repeats.
    most = Counter(words).most_common(1)[0][1]
    if len(words) >= 6 and (most > max(2, len(words) / 3) or len(set(words)) < 0.5 * len(words)):
        return "repetitive"
    return ""


def judge(written: Sequence[Written], known_texts: Iterable[str]) -> list[str]:
    """The verdict on each text.

    Args:
        written: Texts with their scores.
        known_texts: Texts that may not be repeated.

    Returns:
        One of ``VERDICTS`` each. Of two near-duplicates that pass everything else, the one that ranks higher among
        the texts of its own feature is kept.
    """
    known = NearDuplicates(known_texts)
    verdicts = [""] * len(written)
    passing: dict[int, list[tuple[float, int]]] = {}
    for i, w in enumerate(written):
        wrong = fault(w.text)
        if wrong:
            verdicts[i] = wrong
        elif w.text in known or any(jaccard(shingles(w.text), shingles(x)) > NEAR for x in w.shown):
            verdicts[i] = "copy"
        elif not w.score > w.delta:
            verdicts[i] = "below_threshold"
        else:
            passing.setdefault(w.feature, []).append((-w.score, i))
    taken = NearDuplicates()
    for _, i in sorted((rank, i) for group in passing.values() for rank, (_, i) in enumerate(sorted(group))):
        verdicts[i] = "duplicate" if written[i].text in taken else "kept"
        if verdicts[i] == "kept":
            taken.add(written[i].text)
    return verdicts


class NearDuplicates:
    """Texts seen so far, searched by the Jaccard index of their word 5-grams.

    Exact (no false negatives): two sets with an index of at least t share a member among the first
    ``|s| − ⌈t|s|⌉ + 1`` of each in one fixed order, so only these are indexed. A text of fewer than five words is
    one single gram. Case, punctuation and white space do not count.
    """

    def __init__(self, texts: Iterable[str] = (), *, limit: float = NEAR) -> None:
        self.limit = limit
        self._sets: list[frozenset[int]] = []
        self._where: dict[int, list[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Remember a text."""
        grams = shingles(text)
        for gram in self._prefix(grams):
            self._where.setdefault(gram, []).append(len(self._sets))
        self._sets.append(grams)

    def __contains__(self, text: str) -> bool:
        grams = shingles(text)
        seen = {i for gram in self._prefix(grams) for i in self._where.get(gram, ())}
        return any(jaccard(grams, self._sets[i]) > self.limit for i in seen)

    def _prefix(self, grams: frozenset[int]) -> list[int]:
        return sorted(grams)[: len(grams) - int(np.ceil(self.limit * len(grams) - 1e-9)) + 1]


def shingles(text: str) -> frozenset[int]:
    """Hashes of the word 5-grams; empty for a text without words."""
    words = _words(text)
    if not words:
        return frozenset()
    grams = (" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4)))
    return frozenset(int.from_bytes(hashlib.blake2b(g.encode(), digest_size=8).digest()) for g in grams)


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Shared part of two sets; 0 when both are empty."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def _words(text: str) -> list[str]:
    return [m.group().casefold() for m in _WORD.finditer(text)]

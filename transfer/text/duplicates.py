"""What a new text must not repeat: texts seen before (exactly or by MinHash), and passages of the evaluation data."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.span import opened, words

NEAR = 0.6
"""Texts whose word 5-grams have a larger Jaccard index than this are near-duplicates."""


class Seen(Protocol):
    """Texts seen so far."""

    def add(self, text: str) -> None:
        """Remember a text."""
        ...

    def __contains__(self, text: str) -> bool: ...


class NearDuplicates:
    """Texts seen so far, searched by the Jaccard index of their word 5-grams.

    Exact (no false negatives): two sets with an index of at least t share a member among the first
    ``|s| − ⌈t|s|⌉ + 1`` of each in one fixed order, so only these are indexed. A text of fewer than five words is
    one single gram. Case, punctuation and white space do not count. Memory grows with the words of all texts, about
    100 bytes a word; for millions of texts see ``MinHashDuplicates``.
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


class MinHashDuplicates:
    """The same question answered from MinHash signatures with locality-sensitive hashing (needs datasketch).

    A text takes ``permutations`` × 8 bytes and its band entries, however long it is, and is compared only with the
    texts that share a band with it. The Jaccard index is estimated from the signature, with a standard error of at
    most ``1 / (2 √permutations)``: close calls can fall on either side, and the banding misses a few of them, which
    ``NearDuplicates`` does not. Deterministic: the permutations come from ``seed``.

    Args:
        texts: Texts to remember.
        limit: Jaccard index above which two texts are near-duplicates.
        permutations: Length of a signature.
        seed: Of the permutations.

    Raises:
        TransferError: When datasketch is not installed.
    """

    def __init__(
        self, texts: Iterable[str] = (), *, limit: float = NEAR, permutations: int = 128, seed: int = 1
    ) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise TransferError("MinHash needs datasketch.", "Run `pip install datasketch`.") from None
        self.limit = limit
        self._empty = MinHash(num_perm=permutations, seed=seed, hashfunc=_low)
        # Weighted towards few false negatives: what a band wrongly proposes, the signature refutes.
        self._bands = MinHashLSH(threshold=limit, num_perm=permutations, weights=(0.2, 0.8))
        self._signatures: list[Any] = []
        for text in texts:
            self.add(text)

    def _sign(self, text: str) -> Any:
        signature = self._empty.copy()
        grams = sorted(shingles(text))
        if grams:
            signature.update_batch(grams)
        return signature

    def add(self, text: str) -> None:
        """Remember a text; one without words is like no other and is left out."""
        signature = self._sign(text)
        if not signature.is_empty():
            self._bands.insert(str(len(self._signatures)), signature)
            self._signatures.append(signature)

    def __contains__(self, text: str) -> bool:
        signature = self._sign(text)
        if signature.is_empty():
            return False
        near = self._bands.query(signature)
        return any(signature.jaccard(self._signatures[int(str(i))]) > self.limit for i in near)


DUPLICATES: dict[str, Callable[..., Seen]] = {"exact": NearDuplicates, "minhash": MinHashDuplicates}
"""How near-duplicates are looked for, by the name the configuration uses."""


class Contamination:
    """Passages of texts that no training text may hold: any shared run of ``n`` words, or the whole of a short text.

    A text of fewer than ``n`` words is protected as a whole, and only where it makes up all of the other text's words
    (a two-word text stands in too many others). Case, punctuation and white space do not count. Memory: 8 bytes and
    one hash-table entry a word.

    Args:
        texts: Texts to protect, such as the evaluation set.
        n: Words of a run.

    Raises:
        TransferError: For ``n`` below 1.
    """

    def __init__(self, texts: Iterable[str], n: int = 8) -> None:
        if n < 1:
            raise TransferError(f"Decontamination by runs of {n} words means nothing.", "Use 1 or more, such as 8.")
        self.n = n
        self._runs: set[int] = set()
        for text in texts:
            self._runs |= self._of(text)

    def _of(self, text: str) -> set[int]:
        found = words(text)
        if not found:
            return set()
        if len(found) < self.n:
            return {_hash(f"whole {' '.join(found)}")}
        return {_hash(" ".join(found[i : i + self.n])) for i in range(len(found) - self.n + 1)}

    def __contains__(self, text: str) -> bool:
        return not self._runs.isdisjoint(self._of(text))


class Copies:
    """Whole texts that no training text may repeat; case, punctuation and white space do not count.

    What ``Contamination`` refuses at any ``n`` includes this. Memory: one hash a text.

    Args:
        texts: Texts to protect, such as the evaluation set.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._whole = {_hash(" ".join(found)) for text in texts if (found := words(text))}

    def __contains__(self, text: str) -> bool:
        return _hash(" ".join(words(text))) in self._whole


def continued(texts: Iterable[tuple[str, str]], known: Iterable[str]) -> list[bool]:
    """Which texts say nothing of their own behind the words they were made to start with.

    Of a text that starts with its opening, more than ``NEAR`` of the 5-grams that reach behind it stand in one known
    text that holds the opening too, or nothing stands behind it. A Jaccard index overlooks that: the known text may be
    much longer.
    Memory: the places in ``known`` of these grams alone.

    Args:
        texts: (text, opening); an empty opening, or one that the text does not start with, is never found.
        known: Texts seen before.
    """
    texts = list(texts)
    parts = [_behind(text, opening) for text, opening in texts]
    wanted = frozenset(gram for part in parts for gram in part or ())
    where: dict[int, list[str]] = {}
    for text in known if wanted else ():
        for gram in shingles(text) & wanted:
            where.setdefault(gram, []).append(text)
    found = []
    for part, (_, opening) in zip(parts, texts, strict=True):
        shared = Counter(text for gram in part or () for text in where.get(gram, ()))
        start = f" {' '.join(words(opening))}"
        goes_on = any(n > NEAR * len(part or ()) and start in f" {' '.join(words(text))}" for text, n in shared.items())
        found.append(part is not None and (not part or goes_on))
    return found


def _behind(text: str, opening: str) -> frozenset[int] | None:
    """The 5-grams that reach behind the opening; None for a text that does not start with one."""
    if not opened(text, opening):
        return None
    found, start = words(text), words(opening)
    # The last word of the opening may have been carried on, so it is compared too.
    copied = next((i for i, (a, b) in enumerate(zip(found, start, strict=False)) if a != b), len(start))
    if len(found) <= copied:
        return frozenset()
    return frozenset(_hash(" ".join(found[i : i + 5])) for i in range(max(0, copied - 4), max(1, len(found) - 4)))


def shingles(text: str) -> frozenset[int]:
    """Hashes of the word 5-grams; empty for a text without words."""
    found = words(text)
    if not found:
        return frozenset()
    return frozenset(_hash(" ".join(found[i : i + 5])) for i in range(max(1, len(found) - 4)))


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Shared part of two sets; 0 when both are empty."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _low(gram: int) -> int:
    return gram & 0xFFFFFFFF

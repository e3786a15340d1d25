"""Where a feature fires and where it does not: top, stratified and silent examples from a store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.span import WORD, Span
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus

SHINGLE = 3
"""Words in a row that near-duplicates are compared by."""


class Spans:
    """Examples of features in the documents of one corpus, from the store alone.

    Preparing copies the documents' codes and peaks by column (16 bytes a code); what is shown afterwards costs only
    the columns looked at.

    Args:
        store: Activations.
        corpus: Texts of the store, or a part of them: only these are looked at.
        near: Word-trigram Jaccard from which two texts count as the same; identical ones only (up to white space and
            case) when None.

    Raises:
        TransferError: When the corpus holds a document that the store does not.
    """

    def __init__(self, store: ActivationStore, corpus: Corpus, *, near: float | None = None) -> None:
        self.store = store
        self.near = near
        self.rows = np.sort(store.rows([t.id for t in corpus]))
        self.texts = {t.id: t.text for t in corpus}
        self.docs, self.peaks = store.docs[self.rows].tocsc(), store.peaks[self.rows].tocsc()
        self.docs.sort_indices()
        self.peaks.sort_indices()

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers in the order of documents, and where each document begins among them."""
        order = np.argsort(self.store.token_docs, kind="stable")
        first = np.searchsorted(self.store.token_docs[order], np.arange(len(self.store.doc_ids) + 1))
        return order, first

    def _column(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of one feature in the store's columns, strongest first, ties in the order of the store; values."""
        begin, end = self.docs.indptr[feature], self.docs.indptr[feature + 1]
        order = np.lexsort((self.docs.indices[begin:end], -self.docs.data[begin:end]))
        return begin + order, self.docs.data[begin:end][order]

    def text(self, row: int) -> str:
        """Text of a row of the corpus part, in the order of the store."""
        return self.texts[self.store.doc_ids[self.rows[row]]]

    def _span(self, place: int, quantile: float | None = None) -> Span:
        row = int(self.rows[self.docs.indices[place]])
        return self._at(row, int(self.peaks.data[place]) - 1, float(self.docs.data[place]), quantile)

    def _at(self, row: int, position: int, value: float, quantile: float | None = None) -> Span:
        """The span of one content token of a document."""
        order, first = self._tokens
        token = first[row] + position
        end = int(self.store.token_ends[order[token]])
        begin = int(self.store.token_ends[order[token - 1]]) if position else 0
        doc_id = self.store.doc_ids[row]
        text = self.texts[doc_id]
        return Span(doc_id, text, *_characters(text, begin, end), value, quantile)

    def top(self, features: Iterable[int], k: int = 10) -> dict[int, list[Span]]:
        """The ``k`` distinct texts in which each feature fires most, strongest first."""
        out: dict[int, list[Span]] = {}
        for feature in features:
            spans: list[Span] = []
            seen = _Seen(self.near)
            for place in self._column(int(feature))[0]:
                if len(spans) == k:
                    break
                if seen.new(self.text(self.docs.indices[place])):
                    spans.append(self._span(place))
            out[int(feature)] = spans
        return out

    def stratified(
        self, features: Iterable[int], *, strata: int = 5, per_stratum: int = 2, seed: int = 0
    ) -> dict[int, list[Span]]:
        """Examples from all of a feature's range: draws from strata of equally many positive documents.

        Top examples alone make a feature look cleaner than it is. Each span carries its quantile among the feature's
        positive documents; a stratum in which only near-duplicates are left gives fewer.

        Returns:
            Spans of each feature, strongest stratum first, within a stratum strongest first.
        """
        out: dict[int, list[Span]] = {}
        for feature in features:
            places, values = self._column(int(feature))
            rng = np.random.default_rng([seed, int(feature)])
            seen = _Seen(self.near)
            spans: list[Span] = []
            for part in np.array_split(np.arange(len(places)), strata):
                drawn: list[int] = []
                for i in rng.permutation(part):
                    if len(drawn) == per_stratum:
                        break
                    if seen.new(self.text(self.docs.indices[places[i]])):
                        drawn.append(int(i))
                for i in sorted(drawn):
                    share = float(np.count_nonzero(values <= values[i]) / len(values))
                    spans.append(self._span(places[i], share))
            out[int(feature)] = spans
        return out

    def silent(self, features: Iterable[int], k: int = 10, *, seed: int = 0) -> dict[int, list[Span]]:
        """Up to ``k`` distinct texts, drawn at random, in which a feature does not fire at all; nothing is marked."""
        out: dict[int, list[Span]] = {}
        for feature in features:
            begin, end = self.docs.indptr[int(feature)], self.docs.indptr[int(feature) + 1]
            fires = np.zeros(len(self.rows), dtype=bool)
            fires[self.docs.indices[begin:end]] = True
            rng = np.random.default_rng([seed, int(feature), 1])
            seen = _Seen(self.near)
            spans: list[Span] = []
            for row in rng.permutation(np.flatnonzero(~fires)):
                if len(spans) == k:
                    break
                text = self.text(row)
                if text.strip() and seen.new(text):
                    spans.append(Span(self.store.doc_ids[self.rows[row]], text, 0, 0, 0.0))
            out[int(feature)] = spans
        return out

    def mismarked(self, feature: int, spans: Sequence[Span], *, seed: int = 0) -> list[Span | None]:
        """The same texts with a token marked on which the feature does not fire; None where it fires on all of them.

        The token is drawn among those that write something visible.
        """
        _, first = self._tokens
        order = self._tokens[0]
        where = {d: int(r) for d, r in zip((self.store.doc_ids[r] for r in self.rows), self.rows, strict=True)}
        rng = np.random.default_rng([seed, feature, 2])
        out: list[Span | None] = []
        for span in spans:
            row = where[span.doc_id]
            tokens = order[first[row] : first[row + 1]]
            codes = np.asarray(self.store.tokens[tokens][:, [feature]].todense()).ravel()
            found = None
            for position in rng.permutation(np.flatnonzero(codes == 0)):
                candidate = self._at(row, int(position), 0.0)
                if WORD.search(candidate.token):
                    found = candidate
                    break
            out.append(found)
        return out


def top_spans(store: ActivationStore, corpus: Corpus, features: Iterable[int], k: int = 10) -> dict[int, list[Span]]:
    """The ``k`` distinct texts in which each feature fires most; see ``Spans.top``.

    Raises:
        TransferError: When the corpus holds a document that the store does not.
    """
    return Spans(store, corpus).top(features, k)


class _Seen:
    """Texts shown so far."""

    def __init__(self, near: float | None) -> None:
        if near is not None and not 0 < near <= 1:
            raise TransferError(f"Near-duplicates are compared by a share between 0 and 1, not {near}.")
        self.near = near
        self.keys: set[str] = set()
        self.shingles: list[frozenset[tuple[str, ...]]] = []

    def new(self, text: str) -> bool:
        """Whether the text is none of those before; it is remembered."""
        key = " ".join(text.casefold().split())
        if key in self.keys:
            return False
        if self.near is not None:
            mine = shingles(text)
            if any(_alike(mine, theirs) >= self.near for theirs in self.shingles):
                return False
            self.shingles.append(mine)
        self.keys.add(key)
        return True


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of ``SHINGLE`` words of a text; shorter texts are one run."""
    words = [m.group().casefold() for m in WORD.finditer(text)]
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE, 0) + 1))


def _alike(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / max(len(one | other), 1)


def _characters(text: str, begin: int, end: int) -> tuple[int, int]:
    """Character span of a byte span; a character cut by a token belongs to the span whole."""
    data = text.encode("utf8")
    start = len(data[:begin].decode("utf8", "ignore"))
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    stop = len(data[:end].decode("utf8", "ignore"))
    blank = len(text[start:stop]) - len(text[start:stop].lstrip())
    return (start + blank, stop) if start + blank < stop else (start, stop)

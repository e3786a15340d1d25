"""What a feature is about, and whether it matters for a task, judged from labelled documents without a language model.

The judge asks of every feature whether its activation goes with a facet of the data: a class label, or a topic.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.coverage import DeltaRule, alive, fires, size, thresholds

JUDGE = "statistical-1"
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STOP = frozenset(
    """
    a an and are as at be but by can do for from has have how i if in is it me my not of on or so that the their them
    they this to up was we what when which who will with would you your i'm it's i've
    """.split()  # noqa: SIM905 - a paragraph reads better than ninety quoted words
)


# --- task relevance -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Associations:
    """Tests of every feature against every facet."""

    facets: tuple[str, ...]
    """Such as ``label harmful`` or ``topic gardening``."""
    p_values: np.ndarray
    """Float64 [n_features, facets]; 1 where a feature was not tested or not enriched."""
    tested: np.ndarray
    """bool [n_features]: alive and with enough support."""


def associate(
    fired: sp.csr_matrix, facets: dict[str, np.ndarray], *, min_support: int = 3, skip: np.ndarray | None = None
) -> Associations:
    """One-sided hypergeometric test of enrichment (exact for any support) for every feature and facet.

    Args:
        fired: Boolean indicator, [docs, n_features].
        facets: Name to members, bool [docs] each.
        min_support: Features that fire on fewer documents are not tested.
        skip: Features not to test, bool [n_features].

    Returns:
        p-values. Those of facets with no more hits than expected are set to 1: they can never be discoveries.
        Memory is a few arrays of ``n_features × facets`` float64.
    """
    from scipy.stats import hypergeom

    n_docs, n_features = size(fired)
    members = np.column_stack([np.asarray(m, dtype=np.float32) for m in facets.values()])
    hits = np.rint(fired.T.tocsr().astype(np.float32) @ members).astype(np.int64)
    support = np.bincount(fired.indices, minlength=n_features)
    n_members = np.rint(members.sum(axis=0)).astype(np.int64)
    tested = support >= min_support
    if skip is not None:
        tested &= ~skip
    p = np.ones(hits.shape)
    row, column = np.nonzero((hits * n_docs > support[:, None] * n_members) & tested[:, None])
    # Few distinct (hits, support, size) triples: the exact test is computed once for each.
    cases = np.stack([hits[row, column], support[row], n_members[column]], axis=1)
    unique, back = np.unique(cases, axis=0, return_inverse=True)
    if len(unique):
        p[row, column] = hypergeom.sf(unique[:, 0] - 1, n_docs, unique[:, 1], unique[:, 2])[back.ravel()]
    return Associations(tuple(facets), p, tested)


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg q-values of a flat array of p-values."""
    n = len(p_values)
    order = np.argsort(p_values, kind="stable")
    ranked = p_values[order] * n / np.arange(1, n + 1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return q


def judge_relevance(
    space: FeatureSpace,
    docs: sp.csr_matrix,
    labels: Sequence[str],
    topics: Sequence[str] = (),
    *,
    delta: np.ndarray | None = None,
    fdr: float = 0.1,
    min_support: int = 3,
    always_on: float = 0.5,
    cells: bool = False,
    n_top: int = 10,
) -> FeatureSet:
    """The task-relevant features F: those whose activation goes with a label or a topic.

    All tests of all features and facets share one Benjamini–Hochberg correction. A feature found by a label (or by a
    label within a topic) carries that label; one found by a topic alone carries the majority label of the documents
    that activate it most, ties going to the larger summed activation.

    Args:
        space: Space of the columns.
        docs: Max over tokens of labelled documents, [docs, n_features].
        labels: Class of each document; documents with an empty label belong to no class.
        topics: Topic of each document, or nothing.
        delta: Thresholds [n_features]; each feature's own median by default.
        fdr: Largest q-value of a relevant feature.
        min_support: Fewest documents above the threshold.
        always_on: Features firing on more than this share of the documents are not tested.
        cells: Also test each label within each topic.
        n_top: Documents that vote on the label of a topic feature.

    Returns:
        Features with a label, the strength ``-log10 p`` of their best facet, and that facet as description.

    Raises:
        TransferError: When the lengths differ, or there are neither two labels nor two topics.
    """
    label, topic = np.asarray(labels, dtype=object), np.asarray(topics, dtype=object)
    if docs.shape != (len(label), space.n_features) or (len(topic) and len(topic) != len(label)):
        raise TransferError(
            f"Relevance in {space.id} needs one label and topic a document: documents {docs.shape}, "
            f"{len(label)} labels, {len(topic)} topics."
        )
    facets = _facets(label, topic, cells)
    delta = thresholds(docs, DeltaRule()) if delta is None else delta
    state = alive(docs, always_on)
    found = associate(fires(docs, delta), facets, min_support=min_support, skip=~state.mask)
    p = found.p_values
    q = np.ones(p.shape)
    q[found.tested] = false_discovery(p[found.tested].ravel()).reshape(-1, p.shape[1])
    ids = np.flatnonzero(q.min(axis=1, initial=1.0) <= fdr)
    best = p[ids].argmin(axis=1)
    names = [found.facets[b] for b in best]
    has_label = np.array([not name.startswith("topic ") for name in found.facets])
    by_label = np.where(has_label & (q[ids] <= fdr), p[ids], np.inf)
    by_top = majority_labels(docs, ids, list(labels), n_top)
    chosen = [
        _label_of(found.facets[row.argmin()]) if np.isfinite(row.min()) else top
        for row, top in zip(by_label, by_top, strict=True)
    ]
    return FeatureSet(
        space=space,
        features=ids,
        why=(
            f"goes with one of {len(facets)} facets (labels, topics) on {len(label)} documents at FDR {fdr:g}; "
            f"{int(found.tested.sum())} features tested, {int(state.dead.sum())} dead, "
            f"{int(state.always_on.sum())} always-on"
        ),
        judge=f"{JUDGE} (hypergeometric, Benjamini-Hochberg {fdr:g})",
        labels=tuple(chosen),
        scores=-np.log10(np.maximum(p[ids, best], 1e-300)),
        descriptions=tuple(names),
    )


def _facets(label: np.ndarray, topic: np.ndarray, cells: bool) -> dict[str, np.ndarray]:
    labels = sorted({x for x in label if x})
    topics = sorted({x for x in topic if x})
    facets = {f"label {x}": label == x for x in labels} if len(labels) > 1 else {}
    if len(topics) > 1:
        facets |= {f"topic {x}": topic == x for x in topics}
    if cells and len(labels) > 1 and len(topics) > 1:
        facets |= {f"label {x} in topic {y}": (label == x) & (topic == y) for x in labels for y in topics}
    if not facets:
        raise TransferError(
            "Relevance needs documents of at least two labels or two topics.", "Name label_column or topic_column."
        )
    return {name: members for name, members in facets.items() if members.any()}


def _label_of(facet: str) -> str:
    return facet.removeprefix("label ").partition(" in topic ")[0]


def majority_labels(docs: sp.csr_matrix, ids: np.ndarray, labels: Sequence[str], n_top: int = 10) -> list[str]:
    """The label of most of the documents that activate each feature most.

    Args:
        docs: Max over tokens, [docs, n_features].
        ids: Feature ids.
        labels: Label of each document; empty ones do not vote.
        n_top: Documents that vote; ties go to the label with the larger summed activation.

    Returns:
        One label a feature; empty when no labelled document fires it.
    """
    columns = docs.tocsc()
    starts, rows, values = columns.indptr, columns.indices, np.asarray(columns.data, dtype=np.float64)
    out = []
    for i in ids:
        row, value = rows[starts[i] : starts[i + 1]], values[starts[i] : starts[i + 1]]
        votes: dict[str, tuple[int, float]] = {}
        for j in np.lexsort((row, -value))[:n_top]:
            name = labels[int(row[j])]
            n, total = votes.get(name, (0, 0.0))
            votes[name] = (n + 1, total + float(value[j]))
        votes.pop("", None)
        out.append(max(sorted(votes), key=lambda x: votes[x]) if votes else "")
    return out


# --- spans --------------------------------------------------------------------------------------------------------
_SENTENCE = re.compile(r"[.!?]+[\"'’)]*\s+")


@dataclass(frozen=True)
class Span:
    """A document in which a feature fires, and where."""

    doc_id: str
    text: str
    start: int
    """First character of the token with the largest activation, its leading white space left out."""
    end: int
    """Character after it."""
    value: float

    @property
    def token(self) -> str:
        """The firing token."""
        return self.text[self.start : self.end]

    def marked(self, left: str = "«", right: str = "»") -> str:
        """The text with the firing token marked."""
        return f"{self.text[: self.start]}{left}{self.token}{right}{self.text[self.end :]}"

    def word(self) -> str:
        """The whole word around the firing token, lower case; empty when the token is no part of a word."""
        for match in _WORD.finditer(self.text):
            if match.start() < self.end and match.end() > self.start:
                return match.group().casefold()
        return ""

    def opening(self, words: int = 8) -> str:
        """Where a new text can start: the sentence up to the word that fires, at most its last ``words`` words."""
        start = max((m.end() for m in _SENTENCE.finditer(self.text) if m.end() <= self.start), default=0)
        places = [m.span() for m in _WORD.finditer(self.text) if start <= m.start() < self.end]
        if not places:
            return ""
        begin, end = places[max(0, len(places) - words)][0], max(places[-1][1], self.end)
        return " ".join(self.text[begin:end].split())


def top_spans(store: ActivationStore, corpus: Corpus, features: Iterable[int], k: int = 10) -> dict[int, list[Span]]:
    """The ``k`` distinct texts in which each feature fires most, from the store alone.

    Args:
        store: Activations.
        corpus: Texts of the store, or a part of them: only these are looked at.
        features: Feature ids.
        k: Spans a feature at most.

    Returns:
        Spans of each feature, strongest first, ties in the order of the store. Identical texts (up to white space
        and case) appear once.

    Raises:
        TransferError: When the corpus holds a document that the store does not.
    """
    rows = np.sort(store.rows([t.id for t in corpus]))
    texts = {t.id: t.text for t in corpus}
    docs, peaks = store.docs[rows].tocsc(), store.peaks[rows].tocsc()
    docs.sort_indices()
    peaks.sort_indices()
    order = np.argsort(store.token_docs, kind="stable")
    first = np.searchsorted(store.token_docs[order], np.arange(len(store.doc_ids) + 1))
    out: dict[int, list[Span]] = {}
    for feature in features:
        part = slice(docs.indptr[feature], docs.indptr[feature + 1])
        spans: list[Span] = []
        seen: set[str] = set()
        for i in np.lexsort((docs.indices[part], -docs.data[part])):
            row = rows[docs.indices[part][i]]
            doc_id = store.doc_ids[row]
            text = texts[doc_id]
            key = " ".join(text.casefold().split())
            if key in seen:
                continue
            seen.add(key)
            position = int(peaks.data[part][i]) - 1
            token = first[row] + position
            end = int(store.token_ends[order[token]])
            begin = int(store.token_ends[order[token - 1]]) if position else 0
            spans.append(Span(doc_id, text, *_characters(text, begin, end), float(docs.data[part][i])))
            if len(spans) == k:
                break
        out[int(feature)] = spans
    return out


def _characters(text: str, begin: int, end: int) -> tuple[int, int]:
    """Character span of a byte span; a character cut by a token belongs to the span whole."""
    data = text.encode("utf8")
    start = len(data[:begin].decode("utf8", "ignore"))
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    stop = len(data[:end].decode("utf8", "ignore"))
    blank = len(text[start:stop]) - len(text[start:stop].lstrip())
    return (start + blank, stop) if start + blank < stop else (start, stop)


# --- descriptions -------------------------------------------------------------------------------------------------


class WordCounts:
    """In how many distinct texts of a corpus each word stands: the background that descriptions contrast with."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.n = 0
        for text in texts:
            self.counts.update(_words(text))
            self.n += 1

    def contrast(self, texts: Sequence[str], n: int = 4) -> list[str]:
        """Words that stand in ``texts`` more often than in the rest: log-odds with a Dirichlet prior, as z-scores.

        The prior is the background itself (Monroe, Colaresi and Quinn 2008), so rare words need more evidence.
        ``texts`` are taken to be part of the background. Words in fewer than two of them, and function words, are
        left out.
        """
        inside = Counter(w for t in texts for w in _words(t))
        scored = []
        for word, a in inside.items():
            if a < min(2, len(texts)) or word in _STOP or len(word) < 2:
                continue
            b = max(self.counts[word] - a, 0)
            prior = (self.counts[word] + 1) / (self.n + 2)
            rest = max(self.n - len(texts), 0)
            odds = math.log((a + prior) / (len(texts) - a + 1 - prior)) - math.log((b + prior) / (rest - b + 1 - prior))
            z = odds / math.sqrt(1 / (a + prior) + 1 / (b + prior))
            if z > 1:
                scored.append((-z, word))
        return [word for _, word in sorted(scored)[:n]]


def describe(spans: Sequence[Span], background: WordCounts) -> str:
    """One line: the words it fires on, and the words its texts share against the background."""
    if not spans:
        return "never fires on this corpus"
    words = Counter(w for s in spans if (w := s.word()))
    common = [w for w, n in sorted(words.items(), key=lambda x: (-x[1], x[0])) if n > 1][:3]
    on = common or [s.word() or s.token.strip() for s in spans[:2]]
    about = [w for w in background.contrast([s.text for s in spans]) if w not in on]
    line = "fires on " + ", ".join(f"“{w}”" for w in dict.fromkeys(on))
    return f"{line}; texts with: {', '.join(about)}" if about else line


def _words(text: str) -> set[str]:
    return {m.group().casefold() for m in _WORD.finditer(text)}

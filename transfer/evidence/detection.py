"""Does a description predict, on texts it was not made from, where its feature fires?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.stats import norm, rankdata

from models.detector import ChatReader, Quiz
from transfer.core.errors import TransferError
from transfer.core.stats import mean_interval
from transfer.evidence.spans import Spans
from transfer.text.words import STOP, terms

LEAST = 3
"""Held-out documents in which a feature has to fire, and not to fire, to be scored."""


FEATURES = 5
"""Features below which a mean over them has no interval."""


@dataclass(frozen=True)
class Auroc:
    """How well scores rank positive above negative documents."""

    value: float
    low: float
    high: float
    n_positive: int
    n_negative: int


def auroc(positive: np.ndarray, scores: np.ndarray, level: float = 0.95) -> Auroc:
    """AUROC, ties counting half, with DeLong's interval on the logit scale (DeLong et al. 1988).

    The interval covers other documents of the same kind, for this one description. Where all pairs are ranked alike
    the variance is 0; the interval then comes from adding one tied pair of documents.

    Args:
        positive: bool [docs].
        scores: Float [docs].
        level: Coverage.

    Raises:
        TransferError: Without a positive or without a negative document.
    """
    positive = np.asarray(positive, dtype=bool)
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        raise TransferError(f"AUROC needs both kinds of documents: {m} positive, {n} negative.")
    ranks = rankdata(scores)
    over = (ranks[positive] - rankdata(scores[positive])) / n
    under = 1.0 - (ranks[~positive] - rankdata(scores[~positive])) / m
    value = float(over.mean())
    if m > 1 and n > 1 and 0 < value < 1:
        variance = over.var(ddof=1) / m + under.var(ddof=1) / n
        middle = value
    else:
        # One tied pair more, and the variance of a share of the smaller class: wide, but not nothing.
        middle = (value * m * n + 0.5) / (m * n + 1)
        variance = middle * (1 - middle) / min(m, n)
    half = norm.ppf((1 + level) / 2) * math.sqrt(variance) / (middle * (1 - middle))
    center = math.log(middle / (1 - middle))
    low, high = (1 / (1 + math.exp(-(center + s * half))) for s in (-1, 1))
    return Auroc(value, min(low, value), max(high, value), m, n)


def description_terms(description: str) -> dict[str, float]:
    """Words and pairs of a free description, all of one weight; function words are left out."""
    return {t: 1.0 for t in sorted(terms(description, pairs=True)) if STOP.isdisjoint(t.split()) and len(t) > 1}


@dataclass(frozen=True)
class WordDetection:
    """Descriptions as bags of words, tried on held-out texts."""

    features: np.ndarray
    """Scored features, int64 [n]."""
    own: tuple[Auroc, ...]
    """Of each feature's own description."""
    other: tuple[Auroc, ...]
    """Control: of another feature's description, drawn at random, on the same texts."""
    n_untested: int
    """Features that fire in too few held-out texts, or in too many, or have no words."""

    def summary(self) -> dict[str, Any]:
        """Means over features with intervals that cover other features of the same kind."""
        if not self.own:
            return {"n": 0, "n_untested": self.n_untested}
        own, other = (np.array([a.value for a in part]) for part in (self.own, self.other))
        found: dict[str, Any] = {"n": len(own), "n_untested": self.n_untested}
        found |= _interval("auroc", own)
        if len(own) > 1:
            found |= _interval("control", other)
            found |= _interval("gain", own - other, -1.0)
        return found


def word_detection(
    weights: Mapping[int, Mapping[str, float]], docs: sp.csr_matrix, texts: Sequence[str], *, seed: int = 0
) -> WordDetection:
    """Score held-out texts by the words of each description that they hold, against where the feature fires.

    Args:
        weights: Feature to the weighted terms of its description.
        docs: Max over tokens of the held-out documents, [docs, n_features].
        texts: Their texts, in the same order.
        seed: Decides whose description is the control.

    Returns:
        AUROC of each feature with ``LEAST`` positive and negative documents; all documents count, not a balanced
        draw. Memory: the terms of the descriptions by document, sparse.
    """
    ids = np.array(sorted(weights), dtype=np.int64)
    columns = docs[:, ids].tocsc() if len(ids) else sp.csc_matrix((len(texts), 0))
    fires = np.array(
        [np.count_nonzero(columns.data[columns.indptr[i] : columns.indptr[i + 1]]) for i in range(len(ids))]
    )
    able = np.array([bool(weights[int(i)]) for i in ids], dtype=bool)
    scored = np.flatnonzero(able & (fires >= LEAST) & (len(texts) - fires >= LEAST)) if len(ids) else np.zeros(0, int)
    place = {t: j for j, t in enumerate(sorted({t for i in scored for t in weights[int(ids[i])]}))}
    present = _present(texts, place)
    # A rotation of a random order gives everyone another's description, and each to one.
    order = np.random.default_rng([seed, 3]).permutation(len(scored))
    partner = np.empty(len(scored), dtype=np.int64)
    partner[order] = np.roll(order, 1)
    scores = []
    for i in scored:
        vector = np.zeros(len(place))
        for term, weight in weights[int(ids[i])].items():
            vector[place[term]] = weight
        scores.append(present @ vector)
    own, other = [], []
    for row, i in enumerate(scored):
        positive = columns[:, [i]].toarray().ravel() > 0
        own.append(auroc(positive, scores[row]))
        other.append(auroc(positive, scores[partner[row]]))
    return WordDetection(ids[scored], tuple(own), tuple(other), len(ids) - len(scored))


def _present(texts: Sequence[str], place: Mapping[str, int]) -> sp.csr_matrix:
    """Which terms stand in which texts, [texts, terms]."""
    rows, columns = [], []
    for row, text in enumerate(texts):
        for term in terms(text, pairs=True):
            if term in place:
                rows.append(row)
                columns.append(place[term])
    return sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), max(len(place), 1)))[:, : len(place)]


def quizzes(
    kind: str,
    descriptions: Mapping[int, str],
    spans: Spans,
    *,
    n: int = 5,
    width: int = 300,
    control: bool = True,
    seed: int = 0,
) -> tuple[list[Quiz], list[int]]:
    """Balanced, shuffled quizzes from held-out texts.

    Detection asks in which texts a feature fires: ``n`` from all strata of its activation, unmarked, and as many in
    which it is silent. Fuzzing asks where a mark is right: in ``n`` texts it stands on the firing token, in as many
    others on a token where the feature is silent.

    Args:
        kind: ``detection`` or ``fuzzing``.
        descriptions: Feature to description.
        spans: Held-out examples.
        n: Texts of each side.
        width: Characters shown of a text.
        control: Also ask everything with another feature's description.
        seed: Of draws, order and controls.

    Returns:
        The quizzes, controls behind the others, and the features with fewer than ``LEAST`` texts of a side.
    """
    ids = sorted(descriptions)
    made: dict[int, Quiz] = {}
    short = []
    # One side of fuzzing is as many texts again, so that no text is seen with both marks.
    firing = spans.stratified(ids, strata=n, per_stratum=1 if kind == "detection" else 2, seed=seed)
    quiet = spans.silent(ids, n, seed=seed) if kind == "detection" else {}
    for feature in ids:
        rng = np.random.default_rng([seed, feature, 4])
        if kind == "detection":
            k = min(len(firing[feature]), len(quiet[feature]))
            right = [s.around(width, "", "") for s in firing[feature][:k]]
            wrong = [s.around(width, "", "") for s in quiet[feature][:k]]
        else:
            drawn = [firing[feature][i] for i in rng.permutation(len(firing[feature]))]
            k = len(drawn) // 2
            moved = [m for m in spans.mismarked(feature, drawn[k:], seed=seed) if m is not None]
            k = min(k, len(moved))
            right = [s.around(width) for s in drawn[:k]]
            wrong = [s.around(width) for s in moved[:k]]
        if k < LEAST:
            short.append(feature)
            continue
        order = rng.permutation(2 * k)
        texts = [*right, *wrong]
        made[feature] = Quiz(
            feature,
            descriptions[feature],
            tuple(" ".join(texts[i].split()) for i in order),
            tuple(bool(i < k) for i in order),
        )
    out = list(made.values())
    if control and len(out) > 1:
        order = np.random.default_rng([seed, 5]).permutation(len(out))
        theirs = {int(order[i]): out[int(order[i - 1])].description for i in range(len(order))}
        out += [Quiz(q.feature, theirs[i], q.texts, q.truth, control=True) for i, q in enumerate(list(out))]
    return out, short


def balanced_accuracy(quiz: Quiz, answer: frozenset[int] | None) -> float:
    """Mean of the shares found on both sides; one half, a guess, where nothing could be read."""
    if answer is None:
        return 0.5
    said = np.array([i + 1 in answer for i in range(len(quiz.truth))])
    truth = np.array(quiz.truth)
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


@dataclass(frozen=True)
class ChatDetection:
    """Quizzes answered by a language model."""

    kind: str
    reader: str
    own: dict[int, float]
    """Feature to balanced accuracy with its own description."""
    other: dict[int, float]
    """Control: with another feature's."""
    counts: dict[str, int]
    n_untested: int

    def summary(self) -> dict[str, Any]:
        """Means over features with intervals that cover other features of the same kind."""
        found: dict[str, Any] = {"n": len(self.own), "n_untested": self.n_untested, "reader": self.reader}
        found |= {f"n_{k}": v for k, v in self.counts.items()}
        if self.own:
            found |= _interval("balanced_accuracy", list(self.own.values()))
        if self.other:
            found |= _interval("control", list(self.other.values()))
            found |= _interval("gain", [self.own[f] - self.other[f] for f in self.other], -1.0)
        return found


def chat_detection(
    reader: ChatReader, kind: str, descriptions: Mapping[int, str], spans: Spans, **settings: Any
) -> ChatDetection:
    """Ask a language model the quizzes of ``quizzes`` (its further arguments too) and score the answers.

    An answer that cannot be read counts as a guess, and is counted.
    """
    asked, short = quizzes(kind, descriptions, spans, **settings)
    answered = reader.answer(kind, asked)
    own: dict[int, float] = {}
    other: dict[int, float] = {}
    for quiz, answer in zip(asked, answered.answers, strict=True):
        (other if quiz.control else own)[quiz.feature] = balanced_accuracy(quiz, answer)
    return ChatDetection(kind, answered.reader, own, other, answered.counts, len(short))


def _interval(name: str, values: Sequence[float] | np.ndarray, least: float = 0.0) -> dict[str, float | None]:
    """Mean with its t interval cut at ``least`` and 1; no ends with fewer than ``FEATURES`` values."""
    found = mean_interval(values)
    few = len(values) < FEATURES
    ends = (None, None) if few else (max(found.low, least), min(found.high, 1.0))
    return {name: found.value, f"{name}_low": ends[0], f"{name}_high": ends[1]}

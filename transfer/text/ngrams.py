"""Word n-grams of a list of texts, and the counts that diversity metrics are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from transfer.core.errors import TransferError

VOCABULARY = 30_522
"""Words that expectation-adjusted distinct supposes a writer could choose from: the size its authors used."""

BLEU_ORDER = 4


@dataclass(frozen=True)
class Ngrams:
    """All n-grams of one order, text after text; equal n-grams have equal ids."""

    ids: np.ndarray
    """int64 [n-grams]."""
    starts: np.ndarray
    """int64 [texts + 1]: where each text's n-grams begin."""

    @staticmethod
    def up_to(tokens: Sequence[Sequence[str]], order: int) -> list[Ngrams]:
        """N-grams of orders 1 to ``order``, none across two texts; 16 bytes an n-gram, three times while one is made.

        Args:
            tokens: Tokens of each text.
            order: Highest order.
        """
        known: dict[str, int] = {}
        flat = np.array([known.setdefault(t, len(known)) for text in tokens for t in text], dtype=np.int64)
        lengths = np.array([len(text) for text in tokens], dtype=np.int64)
        row = np.repeat(np.arange(len(tokens)), lengths)
        made, ids = [Ngrams(flat, _starts(lengths))], flat
        for n in range(2, order + 1):
            place = np.flatnonzero(row[: max(len(row) - n + 1, 0)] == row[n - 1 :])
            pair = ids[place] * (len(known) + 1) + flat[place + n - 1]
            short = np.unique(pair, return_inverse=True)[1].astype(np.int64)
            # Kept at the place of its first token, where the next order looks it up.
            ids = np.zeros(len(flat), dtype=np.int64)
            ids[place] = short
            made.append(Ngrams(short, _starts(np.maximum(lengths - n + 1, 0))))
        return made

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Ids of the n-grams of some texts, int64 [their n-grams]."""
        return self.ids[self._places(rows)]

    def _places(self, rows: np.ndarray) -> np.ndarray:
        size = self.sizes(rows)
        return np.repeat(self.starts[rows] - (np.cumsum(size) - size), size) + np.arange(int(size.sum()))

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """N-grams of each of these texts, int64 [rows]."""
        return self.starts[rows + 1] - self.starts[rows]

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """How often each distinct n-gram of some texts occurs in them, int64 [distinct]."""
        return np.unique(self.of(rows), return_counts=True)[1]

    def per_text(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in ``rows``, n-gram, count) of every n-gram that a text holds, each pair once."""
        place = np.repeat(np.arange(len(rows)), self.sizes(rows))
        width = int(self.ids.max(initial=0)) + 1
        pair, count = np.unique(place * width + self.of(rows), return_counts=True)
        return pair // width, pair % width, count


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes)))


def distinct(counts: np.ndarray) -> float:
    """Distinct n-grams over all n-grams (Li et al., arXiv 1510.03055); NaN without any. Falls as texts are added."""
    return len(counts) / int(counts.sum()) if len(counts) else math.nan


def expectation_adjusted(counts: np.ndarray, vocabulary: int = VOCABULARY) -> float:
    """Distinct words over the number expected of as many uniform draws (EAD; Liu et al., arXiv 2202.13587, Eq. 1).

    Near one means as many different words as a uniform draw from the vocabulary would give. Words are not uniform, so
    it still falls with the number of words, only less; far below ``vocabulary`` words it equals ``distinct``.

    Raises:
        TransferError: When the texts hold more distinct words than the vocabulary.
    """
    if len(counts) > vocabulary:
        raise TransferError(
            f"The texts hold {len(counts)} distinct words, more than the vocabulary of {vocabulary}.",
            "Give a larger one.",
        )
    total = int(counts.sum())
    return len(counts) / (-vocabulary * math.expm1(total * math.log1p(-1 / vocabulary))) if total else math.nan


def rarefied(counts: np.ndarray, size: int) -> float:
    """Expected ``distinct`` of ``size`` n-grams drawn from these without replacement (Hurlbert 1971).

    Exact, and free of the number of n-grams there are; NaN where there are fewer than ``size`` of them.
    """
    from scipy.special import gammaln

    total = int(counts.sum())
    if not 0 < size <= total:
        return math.nan
    often, how_many = np.unique(counts, return_counts=True)
    left = total - often
    possible = left >= size
    log_absent = np.full(len(often), -np.inf)
    log_absent[possible] = (
        gammaln(left[possible] + 1)
        - gammaln(left[possible] - size + 1)
        - gammaln(total + 1)
        + gammaln(total - size + 1)
    )
    return min(1.0, float(np.sum(how_many * -np.expm1(log_absent)) / size))


def entropy(counts: np.ndarray) -> float:
    """Plug-in Shannon entropy of a table of counts, in nats; NaN for an empty one. Too low by about (K - 1) / 2N."""
    if not len(counts):
        return math.nan
    share = counts / counts.sum()
    # 0.0 instead of -0.0 for a single kind.
    return max(0.0, float(-(share * np.log(share)).sum()))


def bleu_tokens(text: str) -> list[str]:
    """Tokens as sacrebleu's default (13a) splits them."""
    return _bleu_tokenizer()(text.rstrip()).split()


@lru_cache(maxsize=1)
def _bleu_tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def self_bleu(grams: Sequence[Ngrams], rows: np.ndarray) -> float:
    """Mean sentence BLEU of each text against all others as references (Zhu et al., arXiv 1802.01886), 0 to 1.

    Equal to sacrebleu's ``sentence_bleu`` (exponential smoothing, effective order) text by text, but in one pass over
    the n-grams: the highest count among the *other* texts needs the two highest of each n-gram only.

    Args:
        grams: Orders 1 to 4 over ``bleu_tokens``.
        rows: The texts compared, int [>= 2]; NaN for fewer.
    """
    from sacrebleu.metrics.bleu import BLEU

    n = len(rows)
    if n < 2:
        return math.nan
    correct = np.zeros((n, BLEU_ORDER), dtype=np.int64)
    for order, gram in enumerate(grams):
        text, which, count = gram.per_text(rows)
        by = np.lexsort((-count, which))
        text, which, count = text[by], which[by], count[by]
        first = np.flatnonzero(np.r_[True, which[1:] != which[:-1]]) if len(which) else np.zeros(0, dtype=np.int64)
        group = np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(which)]))
        second = np.zeros(len(first), dtype=np.int64)
        more = first[np.diff(np.r_[first, len(which)]) > 1]
        second[group[more]] = count[more + 1]
        own = text == text[first][group]
        others = np.where(own, second[group], count[first][group])
        np.add.at(correct[:, order], text, np.minimum(count, others))
    length = grams[0].sizes(rows)
    nearest = _nearest_other(length)
    scores = [
        BLEU.compute_bleu(
            correct[i].tolist(),
            [max(int(length[i]) - k, 0) for k in range(BLEU_ORDER)],
            int(length[i]),
            int(nearest[i]),
            smooth_method="exp",
            effective_order=True,
        ).score
        for i in range(n)
    ]
    return float(np.mean(scores)) / 100


def _nearest_other(length: np.ndarray) -> np.ndarray:
    """Per text the length of another that is nearest to its own, the shorter of two equally near."""
    order = np.argsort(length, kind="stable")
    sorted_ = length[order].astype(np.float64)
    before, after = np.r_[-np.inf, sorted_[:-1]], np.r_[sorted_[1:], np.inf]
    nearest = np.empty(len(length))
    nearest[order] = np.where(sorted_ - before <= after - sorted_, before, after)
    return nearest.astype(np.int64)

"""The features that fire most together where joint events are few: only pairs that ever meet are looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int

from aligners.coactivation import Measure, PairedCodes, measured
from aligners.correlation import dims

SPARSE_SHARE = 1 / 32
"""Joint events per pair of features below which most pairs never meet: going through all would cost more."""
HELD = 2**22
"""Joint events multiplied at once."""


def few_events(codes: PairedCodes) -> bool:
    """Whether so few pairs meet that this way is the faster one, and none that never meets can have a score."""
    if codes.events > SPARSE_SHARE * len(codes.source.mean) * len(codes.target.mean):
        return False
    return all(np.min(m.data, initial=0.0) >= 0 for pair in codes.parts for m in pair)


def flipped(codes: PairedCodes) -> PairedCodes:
    """The same codes with both sides exchanged."""
    parts = [(b, a) for a, b in codes.parts]
    return dataclasses.replace(codes, parts=parts, source=codes.target, target=codes.source)


def meeting_partners(
    codes: PairedCodes, k: int, measure: Measure, min_support: int
) -> tuple[Int[np.ndarray, "n_src k"], np.ndarray, np.ndarray, np.ndarray]:
    """Ids (−1 = none), scores (−inf), n11 and Σ f·g of the ``k`` best partners of every source feature.

    Where no value is negative, a pair that never fires together has no positive score by any measure, so going through
    the joint events finds all that counts. Exact, as ``partners.top_partners``. Memory: both codes twice (12 bytes an
    event each), 40 bytes for each of ``HELD`` joint events at a time, and the lists. Time: twice the joint events.
    """
    n = len(codes.source.mean)
    ids = np.full((n, k), -1, dtype=np.int64)
    scores, n11, products = np.full((n, k), -np.inf), np.zeros((n, k), dtype=np.int64), np.zeros((n, k))
    fit_src, fit_tgt = codes.source.support >= min_support, codes.target.support >= min_support
    for first, sums, counts in _products(codes):
        row = first + np.repeat(np.arange(dims(sums)[0]), np.diff(sums.indptr))
        col = sums.indices.astype(np.int64)
        score = measured(measure, sums.data, counts.data, codes, row, col)
        keep = np.flatnonzero((score > 0) & fit_src[row] & fit_tgt[col])
        keep = keep[np.lexsort((col[keep], -score[keep], row[keep]))]
        owner = row[keep]
        place = np.arange(len(keep)) - np.searchsorted(owner, owner)
        best = np.flatnonzero(place < k)
        keep, at = keep[best], (owner[best], place[best])
        ids[at], scores[at], n11[at], products[at] = col[keep], score[keep], counts.data[keep], sums.data[keep]
    return ids, scores, n11, products


def _products(codes: PairedCodes) -> Iterator[tuple[int, sp.csr_matrix, sp.csr_matrix]]:
    """First feature, Σ f·g and n11 of blocks of source features, both on the pairs that meet."""
    a = sp.vstack([a for a, _ in codes.parts], format="csr")
    b = sp.vstack([b for _, b in codes.parts], format="csr")
    values = sp.csr_matrix(a.T, dtype=np.float64)
    other = sp.csr_matrix(b, dtype=np.float64)
    values.eliminate_zeros()
    other.eliminate_zeros()
    events = np.cumsum(values.astype(bool).astype(np.float64) @ np.diff(other.indptr))
    fires = sp.csr_matrix((np.ones(other.nnz, dtype=np.int32), other.indices, other.indptr), shape=other.shape)
    start, n = 0, dims(values)[0]
    while start < n:
        done = events[start - 1] if start else 0.0
        stop = max(start + 1, int(np.searchsorted(events, done + HELD, side="right")))
        part = values[start:stop]
        ones = sp.csr_matrix((np.ones(part.nnz, dtype=np.int32), part.indices, part.indptr), shape=part.shape)
        sums, counts = sp.csr_matrix(part @ other), sp.csr_matrix(ones @ fires)
        sums.sort_indices()
        counts.sort_indices()
        yield start, sums, counts
        start = stop

"""How often and how strongly a set of documents activates each feature, in parts that can be drawn again.

One pass over the documents is all that coverage, its intervals and its curves need. The parts are single documents
where the set is small; of a large store they are groups of documents (the method of random groups): drawing
groups with replacement shows how the numbers vary as drawing documents does, at 64 rows in place of a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.store import ActivationStore
from transfer.delta import above, size

GROUPS = 64
"""Random groups of a large store; memory is ``GROUPS × features × 8`` bytes for each δ (34 MB at 65,536)."""


@dataclass(frozen=True, eq=False)
class Tally:
    """Activations above δ, by part of the data and feature."""

    features: np.ndarray
    """Ids of the columns, int64 [F]."""
    sizes: np.ndarray
    """Documents of each part, int64 [parts]."""
    counts: np.ndarray | sp.csr_matrix
    """Documents that activate each feature, float32 [parts, F]."""
    sums: np.ndarray | sp.csr_matrix
    """Sum of their activations, float32 [parts, F]."""

    @property
    def n_docs(self) -> int:
        """All documents."""
        return int(self.sizes.sum())

    @cached_property
    def support(self) -> np.ndarray:
        """Documents that activate each feature, int64 [F]."""
        return np.rint(_total(self.counts)).astype(np.int64)

    @cached_property
    def mass(self) -> np.ndarray:
        """Sum of activations of each feature, float64 [F]."""
        return _total(self.sums)

    def over(self, features: np.ndarray) -> Tally:
        """These features only.

        Raises:
            TransferError: For a feature that was not tallied.
        """
        at = np.searchsorted(self.features, features)
        if len(features) and not np.array_equal(self.features[np.minimum(at, len(self.features) - 1)], features):
            raise TransferError("The tally does not hold all features asked for.")
        return Tally(np.asarray(features, dtype=np.int64), self.sizes, self.counts[:, at], self.sums[:, at])

    def times(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents [draws], counts [F, draws] and sums [F, draws] when each part counts ``weights`` [parts, draws]."""
        weights = np.asarray(weights, dtype=np.float32)
        return self.sizes @ weights.astype(np.float64), _by_feature(self.counts) @ weights, self._sums_by @ weights

    @cached_property
    def _sums_by(self) -> np.ndarray | sp.csr_matrix:
        return _by_feature(self.sums)


def _total(by_part: np.ndarray | sp.csr_matrix) -> np.ndarray:
    return np.asarray(by_part.sum(axis=0, dtype=np.float64)).ravel()


def _by_feature(by_part: np.ndarray | sp.csr_matrix) -> np.ndarray | sp.csr_matrix:
    return by_part.T if isinstance(by_part, np.ndarray) else by_part.T.tocsr()


def tally(docs: sp.csr_matrix, delta: np.ndarray, features: np.ndarray) -> Tally:
    """Every document a part of its own.

    Args:
        docs: Max over tokens, [docs, n_features].
        delta: Thresholds, [n_features].
        features: Ids to count, sorted, [F].

    Raises:
        TransferError: For widths that differ, NaN or infinity.
    """
    sums = above(docs, delta)[:, features]
    counts = sp.csr_matrix((np.ones(sums.nnz, dtype=np.float32), sums.indices, sums.indptr), shape=sums.shape)
    return Tally(np.asarray(features, dtype=np.int64), np.ones(size(docs)[0], dtype=np.int64), counts, sums)


def tally_store(
    store: ActivationStore,
    deltas: Sequence[np.ndarray],
    features: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    groups: int = GROUPS,
    seed: int = 0,
) -> list[Tally]:
    """Tallies of a store of any size at several thresholds, in one pass over its shards.

    Memory: ``groups × F × 8`` bytes for each threshold, and a few copies of one block of 4 M codes (32 MB each).

    Args:
        store: Activations.
        deltas: Thresholds, [n_features] each.
        features: Ids to count, sorted, [F].
        rows: Only these documents, bool [docs].
        groups: Random groups. Each block is cut into as many runs of neighbouring documents, and these are dealt to
            the groups; where neighbours are alike, as in a store sorted by topic, intervals are those of runs.
        seed: Of the dealing; the same documents fall into the same groups whatever δ.

    Raises:
        TransferError: For widths that differ, a damaged store, NaN or infinity.
    """
    n_features = store.space.n_features
    for delta in deltas:
        if len(delta) != n_features:
            raise TransferError(f"{store.space.id} has {n_features} features, the thresholds {len(delta)}.")
    groups = max(1, min(groups, int(rows.sum()) if rows is not None else len(store.doc_ids)))
    shape = (groups, n_features)
    counts = [np.zeros(shape, dtype=np.float32) for _ in deltas]
    sums = [np.zeros(shape, dtype=np.float32) for _ in deltas]
    sizes = np.zeros(groups, dtype=np.int64)
    rng, one = np.random.default_rng(seed), np.ones(1, dtype=np.float32)
    lowest = [np.maximum(delta, 0).astype(np.float32) for delta in deltas]
    for first, block in store.doc_blocks():
        if rows is not None:
            block = block[np.flatnonzero(rows[first : first + len(block.indptr) - 1])]
        n = len(block.indptr) - 1
        if n == 0:
            continue
        bounds = np.linspace(0, n, groups + 1).astype(np.int64)
        # Which groups get one document more than others is random too.
        order = rng.permutation(groups)
        sizes[order] += np.diff(bounds)
        for part, start, stop in zip(order, bounds[:-1], bounds[1:], strict=True):
            low, high = block.indptr[start], block.indptr[stop]
            if low == high:
                continue
            # A run of a block fits the processor's cache, where everything below happens.
            values, at = block.data[low:high], block.indices[low:high]
            if not np.isfinite(values.sum()):
                raise TransferError(f"The activations of {store.path} hold NaN or infinity.", "Harvest again.")
            # One long document: scipy's scattered addition of its codes is several times as fast as a weighted count.
            shape = (n_features, 1)
            run = sp.csc_matrix((np.empty(high - low, np.float32), at, np.array([0, high - low])), shape, copy=False)
            for delta, count, total in zip(lowest, counts, sums, strict=True):
                run.data = (values > delta.take(at, mode="clip")).astype(np.float32)
                count[part] += run @ one
                run.data *= values
                total[part] += run @ one
    features = np.asarray(features, dtype=np.int64)
    whole = len(features) == n_features
    return [
        Tally(features, sizes, c if whole else c[:, features], s if whole else s[:, features])
        for c, s in zip(counts, sums, strict=True)
    ]

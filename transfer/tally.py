"""How often and how strongly a set of documents activates each feature, in parts that can be taken anew.

One pass over the documents is all that coverage, its intervals and its curves need. The parts are single documents
where the set is small, and groups of documents of a large store: unions of groups are its nested subsets. Groups will
not do for intervals: features that one document of a group activates would come and go together. A large store is
therefore resampled document by document while it is read, with Poisson weights (each document counts Poisson(1) times,
independently), which is the bootstrap where the number of documents is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy.sparse as sp

from transfer.core.compiled import compiled
from transfer.core.errors import TransferError
from transfer.core.store import ActivationStore
from transfer.delta import above, size

GROUPS = 64
"""Groups of a large store; memory is ``GROUPS × features × 8`` bytes for each δ (34 MB at 65,536)."""

BLOCK = 6 << 20
"""Codes read at once: a run of one of 64 groups then fits the cache and outweighs the sums that it is added to."""
WHOLE = 5000
"""Up to this many documents a store may as well be read whole, and drawn document by document."""


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
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """Bootstrap replicates made while reading: documents [draws], counts [F, draws] and sums [F, draws]."""

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
        drawn = None if self.drawn is None else (self.drawn[0], self.drawn[1][at], self.drawn[2][at])
        return Tally(np.asarray(features, dtype=np.int64), self.sizes, self.counts[:, at], self.sums[:, at], drawn)

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
    draws: int = 0,
    seed: int = 0,
) -> list[Tally]:
    """Tallies of a store of any size at several thresholds, in one pass over its shards.

    Memory: ``(groups + draws) × n_features × 8`` bytes for each threshold (86 MB at 65,536 features and 100 draws),
    with draws also five copies of one block of 6 to 9 M codes (25 to 38 MB each) and its draws of documents.

    Args:
        store: Activations.
        deltas: Thresholds, [n_features] each.
        features: Ids to count, sorted, [F].
        rows: Only these documents, bool [docs].
        groups: Groups. Each block is cut into as many runs of neighbouring documents, and these are dealt to the
            groups at random.
        draws: Bootstrap replicates; 100 take about ten times as long as the pass itself.
        seed: Of dealing and drawing, which are the same for every δ.

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
    rng = np.random.default_rng(seed)
    n_drawn = np.zeros(draws)
    again = [[np.zeros((n_features, draws), dtype=np.float32) for _ in range(2)] for _ in deltas]
    lowest = [np.maximum(delta, 0).astype(np.float32) for delta in deltas]
    add = _adder()
    for first, block in store.doc_blocks(BLOCK):
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
            # A run of a block fits the processor's cache, and is read there once for each δ.
            values, at = block.data[low:high], block.indices[low:high]
            for delta, count, total in zip(lowest, counts, sums, strict=True):
                if not add(values, at, delta, count[part], total[part]):
                    raise TransferError(f"{store.path} holds NaN, infinity or unknown features.", "Harvest again.")
        if draws:
            weights = rng.poisson(1.0, size=(n, draws)).astype(np.float32)
            n_drawn += weights.sum(axis=0)
            resample(block, lowest, weights, again)
    features = np.asarray(features, dtype=np.int64)
    whole = len(features) == n_features
    at = slice(None) if whole else features
    return [
        Tally(features, sizes, count[:, at], total[:, at], (n_drawn, drawn[0][at], drawn[1][at]) if draws else None)
        for count, total, drawn in zip(counts, sums, again, strict=True)
    ]


@lru_cache(maxsize=1)
def _adder() -> Callable[..., bool]:
    """Adds codes above δ to the counts and sums of their features; False for codes that are none."""
    return compiled(_add)


def _add(values: np.ndarray, at: np.ndarray, delta: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> bool:
    fine = True
    for i in range(len(values)):
        value, feature = values[i], at[i]
        if 0 <= feature < len(delta):
            passes = np.float32(value > delta[feature])  # no branch: which codes pass cannot be foretold
            counts[feature] += passes
            sums[feature] += passes * value  # 0 × NaN is NaN, and told
            fine &= np.isfinite(value)
        else:
            fine = False
    return fine


def resample(
    block: sp.csr_matrix, deltas: Sequence[np.ndarray], weights: np.ndarray, into: list[list[np.ndarray]]
) -> None:
    """Add one block's weighted counts and sums above each δ to ``into``, [n_features, draws] each.

    Draws are taken a few at a time: a row of sums is then a cache line or two.
    """
    by_feature = block.T
    values, at = by_feature.data, by_feature.indices
    for delta, found in zip(deltas, into, strict=True):
        passing = (values > delta.take(at, mode="clip")).astype(np.float32)
        for out, data in zip(found, (passing, passing * values), strict=True):
            by_feature.data = data
            for start in range(0, weights.shape[1], 25):
                out[:, start : start + 25] += by_feature @ np.ascontiguousarray(weights[:, start : start + 25])

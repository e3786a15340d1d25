"""How often and how strongly a set of documents activates each feature, in parts that can be taken anew.

One pass over the documents is all that coverage, its intervals and its curves need. The parts are single documents
where the set is small, and groups of documents of a large store, dealt at random: unions of groups are its nested
subsets, and leaving out one group after the other gives its intervals.
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
from transfer.cover.delta import above, size

GROUPS = 64
"""Groups of a large store; memory is ``GROUPS × features × 8`` bytes for each δ (34 MB at 65,536)."""

BLOCK = 6 << 20
"""Codes read at once: a run of one of 64 groups then fits the cache and outweighs the sums that it is added to."""
RUN = 8
"""Neighbours that go to one group: dealing single ones takes 40 % longer, as each starts on another page."""
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

    Memory: ``groups × n_features × 8`` bytes for each threshold, and a block of 6 to 9 M codes.

    Args:
        store: Activations.
        deltas: Thresholds, [n_features] each.
        features: Ids to count, sorted, [F].
        rows: Only these documents, bool [docs].
        groups: Groups, to which the documents of each block are dealt at random, as neighbours may be alike.
        seed: Of dealing, which is the same for every δ.

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
    lowest = [np.maximum(delta, 0).astype(np.float32) for delta in deltas]
    add = _adder()
    for first, block in store.doc_blocks(BLOCK):
        if rows is not None:
            block = block[np.flatnonzero(rows[first : first + len(block.indptr) - 1])]
        n = len(block.indptr) - 1
        if n == 0:
            continue
        for part, docs in zip(rng.permutation(groups), _dealt(n, groups, rng), strict=True):
            sizes[part] += len(docs)
            # A group's codes in a block fit the processor's cache, and are read there once for each δ.
            for delta, count, total in zip(lowest, counts, sums, strict=True):
                if not add(block.data, block.indices, block.indptr, docs, delta, count[part], total[part]):
                    raise TransferError(f"{store.path} holds NaN, infinity or unknown features.", "Harvest again.")
    features = np.asarray(features, dtype=np.int64)
    whole = len(features) == n_features
    at = slice(None) if whole else features
    return [Tally(features, sizes, count[:, at], total[:, at]) for count, total in zip(counts, sums, strict=True)]


def _dealt(n: int, groups: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Documents 0 to n in groups of nearly one size, at random in runs of at most ``RUN`` neighbours."""
    run = min(max(n // (8 * groups), 1), RUN)
    dealt = np.array_split(rng.permutation(-(-n // run)), groups)
    members = [(np.sort(runs)[:, None] * run + np.arange(run)).ravel() for runs in dealt]
    return [docs[docs < n] for docs in members]


@lru_cache(maxsize=1)
def _adder() -> Callable[..., bool]:
    """Adds the codes of some documents above δ to counts and sums of their features; False for codes that are none."""
    return compiled(_add)


def _add(
    values: np.ndarray,
    at: np.ndarray,
    indptr: np.ndarray,
    docs: np.ndarray,
    delta: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
) -> bool:
    fine = True
    for doc in docs:
        first, last = indptr[doc], indptr[doc + 1]
        # Slices, as an index that counts from 0 needs no check for being negative.
        codes, places = values[first:last], at[first:last]
        for i in range(len(codes)):
            value, feature = codes[i], places[i]
            if 0 <= feature < len(delta):
                passes = np.float32(value > delta[feature])  # no branch: which codes pass cannot be foretold
                counts[feature] += passes
                sums[feature] += passes * value  # 0 × NaN is NaN, and told
                fine &= np.isfinite(value)
            else:
                fine = False
    return fine

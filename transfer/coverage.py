"""Feature Activation Coverage: which task-relevant features a dataset activates (arXiv 2602.10388, section 5).

Two numbers that the paper's tables mix up are kept apart here: ``fac``, the share of the anchor's relevant features
that a dataset covers, and ``missing_hit_rate``, the share of the features missing at the start that generated data hit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.store import ActivationStore
from transfer.cover.compare import compare, deal, interval
from transfer.cover.delta import DeltaRule, activated, fires, size, thresholds
from transfer.cover.tally import tally, tally_store

__all__ = [
    "Alive",
    "DeltaRule",
    "activated",
    "alive",
    "coverage",
    "fires",
    "live_features",
    "missing_hit_interval",
    "missing_hit_rate",
    "size",
    "store_coverage",
    "thresholds",
]


@dataclass(frozen=True)
class Alive:
    """Which features cannot say anything, as bool [n_features] each."""

    dead: np.ndarray
    """No document fires them."""
    always_on: np.ndarray
    """More than the allowed share of documents fires them."""

    @property
    def mask(self) -> np.ndarray:
        """The features left, bool [n_features]."""
        return ~(self.dead | self.always_on)


def alive(docs: sp.csr_matrix, always_on: float = 0.5, *, also: sp.csr_matrix | None = None) -> Alive:
    """Find dead features and those that fire (positive value) on more than ``always_on`` of the documents.

    Args:
        docs: Max over tokens, [docs, n_features].
        always_on: Largest allowed share of documents.
        also: Further documents, of which one is enough for a feature not to be dead.
    """
    support = _support(docs)
    dead = (support == 0) if also is None else (support == 0) & (_support(also) == 0)
    return Alive(dead, support > always_on * size(docs)[0])


def _support(docs: sp.csr_matrix) -> np.ndarray:
    return np.bincount(docs.indices[docs.data > 0], minlength=size(docs)[1])


def coverage(
    space: FeatureSpace,
    anchor_docs: sp.csr_matrix,
    data_docs: sp.csr_matrix,
    relevant: FeatureSet,
    delta: np.ndarray,
    *,
    dataset: str = "data",
    anchor: str = "anchor",
    delta_rule: str = "",
    always_on: float = 0.5,
    confidence: float = 0.95,
    eps: float = 1e-3,
    seed: int = 0,
) -> CoverageReport:
    """Coverage of a dataset against an anchor (Eqs. 5 and 6).

    Features of ``relevant`` that neither set of documents ever fires, or that fire on more than ``always_on`` of the
    anchor, are left out of F; the counts stand in the report.

    Memory: a few copies of the documents' codes, and ``GROUPS`` × features × 16 bytes.

    Args:
        space: The space everything here belongs to.
        anchor_docs: Max over tokens of the anchor, [docs, n_features].
        data_docs: The same for the dataset; may have no rows.
        relevant: Task-relevant features F.
        delta: Thresholds, [n_features].
        dataset: Name of the dataset.
        anchor: Name of the anchor.
        delta_rule: The rule as text.
        always_on: See ``alive``.
        confidence: Of the intervals, see ``transfer.cover.compare``.
        eps: Smoothing of the divergences.
        seed: Of the groups that the intervals leave out.

    Raises:
        TransferError: When shapes or spaces differ, or the anchor activates no relevant feature.
    """
    space.check(relevant.space, "The relevant feature set")
    for side, docs in (("anchor", anchor_docs), ("data", data_docs)):
        if size(docs)[1] != space.n_features:
            raise TransferError(f"The {side} documents have {size(docs)[1]} features, {space.id} {space.n_features}.")
    live, counts = live_features(relevant, alive(anchor_docs, always_on, also=data_docs), always_on)
    return compare(
        tally(anchor_docs, delta, live.features),
        tally(data_docs, delta, live.features),
        live,
        dataset=dataset,
        anchor=anchor,
        delta_rule=delta_rule,
        confidence=confidence,
        eps=eps,
        seed=seed,
        left_out=counts,
    )


def live_features(relevant: FeatureSet, state: Alive, always_on: float) -> tuple[FeatureSet, dict[str, Any]]:
    """F without dead and always-on features, and how many those were.

    A feature that only the data fires stays (when ``state`` was found with ``also``): the uncapped ratio counts it.
    """
    ids = relevant.features
    n_dead, n_always_on = int(state.dead[ids].sum()), int(state.always_on[ids].sum())
    why = f"{relevant.why}; left out {n_dead} dead and {n_always_on} always-on (over {always_on:.0%})"
    counts = {"n_dead": n_dead, "n_always_on": n_always_on, "always_on": always_on}
    return relevant.subset(ids[state.mask[ids]], why), counts


def store_coverage(
    anchor_docs: sp.csr_matrix,
    store: ActivationStore,
    relevant: FeatureSet,
    delta: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    always_on: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> CoverageReport:
    """``coverage`` of a store that does not fit into memory, in one pass over its shards.

    A feature that no anchor document fires counts as dead unless some document of the store activates it above δ.

    Memory: that of ``tally_store``, and the anchor's codes a few times over.

    Args:
        anchor_docs: Max over tokens of the anchor, [docs, n_features].
        store: The dataset.
        relevant: Task-relevant features F.
        delta: Thresholds, [n_features].
        rows: Only these documents of the store, bool [docs].
        always_on: See ``alive``.
        seed: Of the groups that the intervals leave out.
        **options: Names, ``delta_rule``, ``confidence`` and ``eps`` of ``transfer.cover.compare``.

    Raises:
        TransferError: As ``coverage`` and ``tally_store``.
    """
    store.space.check(relevant.space, "The relevant feature set")
    (data,) = tally_store(store, [delta], relevant.features, rows=rows, seed=seed)
    state = alive(anchor_docs, always_on)
    fired = np.zeros(store.space.n_features, dtype=bool)
    fired[relevant.features] = data.support > 0
    live, counts = live_features(relevant, Alive(state.dead & ~fired, state.always_on), always_on)
    ids = live.features
    anchor = tally(anchor_docs, delta, ids)
    return compare(anchor, data.over(ids), live, seed=seed, left_out=counts, **options)


def missing_hit_rate(missing: FeatureSet, kept_docs: sp.csr_matrix, delta: np.ndarray) -> tuple[int, float]:
    """How many of the missing features some kept text activates: what the paper's tables call "FAC (%)".

    Args:
        missing: Features missing before generation.
        kept_docs: Max over tokens of the kept texts, [texts, n_features].
        delta: Thresholds, [n_features].

    Returns:
        The number hit and its share; NaN as the share when nothing was missing.
    """
    n_hit = int(activated(kept_docs, delta)[missing.features].sum())
    return n_hit, n_hit / len(missing) if len(missing) else math.nan


def missing_hit_interval(
    missing: FeatureSet,
    kept_docs: sp.csr_matrix,
    delta: np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """Interval of ``missing_hit_rate`` over as many kept texts of the same kind, see ``transfer.cover.compare``."""
    _, rate = missing_hit_rate(missing, kept_docs, delta)
    n_docs = size(kept_docs)[0]
    if not len(missing) or not n_docs:
        return None, None
    hit = fires(kept_docs, delta)[:, missing.features].T.astype(np.float32)
    group = deal(n_docs, seed)
    counts = np.asarray(hit @ np.eye(group.max() + 1, dtype=np.float32)[group])
    without = (counts.sum(axis=1, keepdims=True) - counts > 0).mean(axis=0)
    low, high = interval(without, rate, confidence, 1 / len(missing), share=True)
    return low, high

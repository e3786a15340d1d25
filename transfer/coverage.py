"""Feature Activation Coverage: which task-relevant features a dataset activates (arXiv 2602.10388, section 5).

Two numbers that the paper's tables mix up are kept apart here: ``fac``, the share of the anchor's relevant features
that a dataset covers, and ``missing_hit_rate``, the share of the features missing at the start that generated data hit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSet, FeatureSpace

_BOOTSTRAP_BLOCK = 32
"""Bootstrap replicates held at once; memory is ``n_features × _BOOTSTRAP_BLOCK`` floats."""


def size(docs: sp.csr_matrix) -> tuple[int, int]:
    """Documents and features of an activation matrix."""
    return cast(tuple[int, int], docs.shape)


@dataclass(frozen=True)
class DeltaRule:
    """How high an activation must be to count: strictly above δ.

    ``constant`` is one δ for all features, as in the paper (0 there). ``quantile`` gives each feature the quantile of
    its own positive values (max over tokens) on the anchor documents: activation scales differ between features and
    between SAEs, so one constant cuts through the bulk of some features and below that of others.
    """

    kind: Literal["constant", "quantile"] = "quantile"
    value: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "quantile"):
            raise TransferError(f"Unknown delta rule {self.kind!r}.", "Use constant or quantile.")
        if not math.isfinite(self.value) or self.value < 0 or (self.kind == "quantile" and self.value >= 1):
            raise TransferError(f"The delta rule {self} is out of range.", "Use constant >= 0 or 0 <= quantile < 1.")

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"

    @classmethod
    def parse(cls, text: str) -> DeltaRule:
        """Read ``constant:1`` or ``quantile:0.5``.

        Raises:
            TransferError: For anything else.
        """
        kind, _, value = text.partition(":")
        try:
            return cls(kind, float(value))  # pyright: ignore[reportArgumentType]  (checked on construction)
        except ValueError:
            raise TransferError(
                f"The delta rule {text!r} has no number.", "Write quantile:0.5 or constant:0."
            ) from None


def thresholds(anchor_docs: sp.csr_matrix, rule: DeltaRule | None = None) -> np.ndarray:
    """δ of every feature.

    Args:
        anchor_docs: Max over tokens, [docs, n_features].
        rule: The rule; ``quantile:0.5`` by default. Quantiles interpolate linearly; a feature without a positive
            value on the anchor gets δ = 0.

    Returns:
        float32 [n_features]. Memory is a few copies of the anchor's non-zeros.
    """
    rule = rule or DeltaRule()
    _, n_features = size(anchor_docs)
    if rule.kind == "constant":
        return np.full(n_features, rule.value, dtype=np.float32)
    keep = anchor_docs.data > 0
    column, value = anchor_docs.indices[keep], anchor_docs.data[keep].astype(np.float32)
    # Positive floats order like their bits, so one integer sort orders by feature and then by value.
    key = (column.astype(np.uint64) << np.uint64(32)) | value.view(np.uint32)
    key.sort()
    value = key.astype(np.uint32).view(np.float32).astype(np.float64)
    count = np.bincount(column, minlength=n_features)
    start = np.cumsum(count) - count
    delta = np.zeros(n_features, dtype=np.float32)
    some = np.flatnonzero(count)
    place = rule.value * (count[some] - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, count[some] - 1)
    below, above = value[start[some] + low], value[start[some] + high]
    delta[some] = below + (above - below) * (place - low)
    return delta


def fires(docs: sp.csr_matrix, delta: np.ndarray) -> sp.csr_matrix:
    """The indicator A_i(x) = 1[g_i(x) > δ_i] (Eq. 4), strict, as a Boolean CSR [docs, n_features]."""
    if size(docs)[1] != len(delta):
        raise TransferError(f"The documents have {size(docs)[1]} features, the thresholds {len(delta)}.")
    if not np.all(np.isfinite(docs.data)):
        raise TransferError("The activations hold NaN or infinity.", "Harvest again.")
    keep = (docs.data > delta[docs.indices]) & (docs.data > 0)
    passed = np.concatenate(([0], np.cumsum(keep)))
    return sp.csr_matrix((np.ones(passed[-1], dtype=bool), docs.indices[keep], passed[docs.indptr]), shape=size(docs))


def activated(docs: sp.csr_matrix, delta: np.ndarray) -> np.ndarray:
    """Whether any document activates each feature, bool [n_features]."""
    hit = np.zeros(size(docs)[1], dtype=bool)
    hit[fires(docs, delta).indices] = True
    return hit


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


def kl_terms(n_anchor: int, n_data: int, n_covered: int, n_relevant: int, eps: float) -> tuple[float, float]:
    """The two terms of the smoothed surrogate KL(P_F ‖ Q_F^ε), Eq. 47 of Appendix D.

    P_F is uniform on the anchor's features F(P); Q^ε mixes the uniform distribution on the data's features F(Q) with
    weight 1 − ε and that on all relevant features F with weight ε.

    Args:
        n_anchor: |F(P)|.
        n_data: |F(Q)|.
        n_covered: |F(P) ∩ F(Q)|.
        n_relevant: |F|.
        eps: Smoothing weight, 0 < ε ≤ 1.

    Returns:
        The term of the covered features (not monotone) and that of the missing ones, which falls linearly with each
        feature covered. Their sum is the divergence.

    Raises:
        TransferError: For ε outside (0, 1] or an empty F(P).
    """
    if not 0 < eps <= 1:
        raise TransferError(f"The smoothing weight eps is {eps}.", "Use a value above 0 and at most 1.")
    if n_anchor == 0:
        raise TransferError("The divergence from an empty anchor set is undefined.")
    covered = 0.0
    if n_covered:
        q = (1 - eps) / n_data + eps / n_relevant
        covered = n_covered / n_anchor * math.log(1 / (n_anchor * q))
    missing = (n_anchor - n_covered) / n_anchor * math.log(n_relevant / (eps * n_anchor))
    return covered, missing


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
    n_bootstrap: int = 200,
    confidence: float = 0.95,
    eps: float = 1e-3,
    seed: int = 0,
) -> CoverageReport:
    """Coverage of a dataset against an anchor (Eqs. 5 and 6).

    Features of ``relevant`` that neither set of documents ever fires, or that fire on more than ``always_on`` of the
    anchor, are left out of F; the counts stand in ``relevant.why`` of the report.

    The interval comes from resampling the data's documents. A resample holds only about 63 % of the distinct
    documents and so covers less than the data itself; the replicates are therefore centred on the observed value
    before the percentiles are read, and cut at [0, 1].

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
        n_bootstrap: Resamples; 0 gives an interval of the value alone.
        confidence: Of the interval.
        eps: Smoothing of the divergence.
        seed: Of the resampling.

    Raises:
        TransferError: When shapes or spaces differ, or the anchor activates no relevant feature.
    """
    space.check(relevant.space, "The relevant feature set")
    for side, docs in (("anchor", anchor_docs), ("data", data_docs)):
        if size(docs)[1] != space.n_features:
            raise TransferError(f"The {side} documents have {size(docs)[1]} features, {space.id} {space.n_features}.")
    relevant = _live(relevant, anchor_docs, data_docs, always_on)
    ids = relevant.features
    in_anchor, data_fires = activated(anchor_docs, delta)[ids], fires(data_docs, delta)[:, ids]
    in_data = np.zeros(len(ids), dtype=bool)
    in_data[data_fires.indices] = True
    n_anchor = int(in_anchor.sum())
    if n_anchor == 0:
        raise TransferError(
            f"{anchor} activates none of the {len(relevant)} relevant features of {space.id}: coverage is undefined.",
            "Lower delta, use a larger anchor, or judge relevance again.",
        )
    covered, missing = in_anchor & in_data, in_anchor & ~in_data
    fac = float(covered.sum() / n_anchor)
    low, high = _interval(data_fires[:, np.flatnonzero(in_anchor)], fac, n_bootstrap, confidence, seed)
    return CoverageReport(
        space=space,
        dataset=dataset,
        anchor=anchor,
        relevant=relevant,
        anchor_features=relevant.subset(ids[in_anchor], f"relevant and activated by {anchor}"),
        covered=relevant.subset(ids[covered], f"activated by {anchor} and by {dataset}"),
        missing=relevant.subset(ids[missing], f"activated by {anchor} but not by {dataset}"),
        fac=fac,
        fac_uncapped=float(in_data.sum() / n_anchor),
        ci_low=low,
        ci_high=high,
        delta_rule=delta_rule,
        n_docs=size(data_docs)[0],
        kl=sum(kl_terms(n_anchor, int(in_data.sum()), int(covered.sum()), len(ids), eps)),
    )


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


def _live(relevant: FeatureSet, anchor: sp.csr_matrix, data: sp.csr_matrix, always_on: float) -> FeatureSet:
    # A feature that only the data fires stays: the uncapped ratio counts it.
    state = alive(anchor, always_on, also=data)
    ids = relevant.features
    left_out = f"{state.dead[ids].sum()} dead and {state.always_on[ids].sum()} always-on (over {always_on:.0%})"
    return relevant.subset(ids[state.mask[ids]], f"{relevant.why}; left out {left_out}")


def _interval(fired: sp.csr_matrix, fac: float, n_bootstrap: int, confidence: float, seed: int) -> tuple[float, float]:
    n_docs, n_anchor = size(fired)
    if n_docs == 0 or n_bootstrap == 0:
        return fac, fac
    rng = np.random.default_rng(seed)
    by_feature = fired.T.tocsr().astype(np.float32)
    values = np.empty(n_bootstrap)
    for begin in range(0, n_bootstrap, _BOOTSTRAP_BLOCK):
        n = min(_BOOTSTRAP_BLOCK, n_bootstrap - begin)
        drawn = np.zeros((n_docs, n), dtype=np.float32)
        for column in range(n):
            drawn[rng.integers(n_docs, size=n_docs), column] = 1
        values[begin : begin + n] = ((by_feature @ drawn) > 0).sum(axis=0) / n_anchor
    values += fac - values.mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(np.clip(low, 0, fac)), float(np.clip(high, fac, 1))

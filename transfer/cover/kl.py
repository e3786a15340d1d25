"""The divergence that FAC Synthesis minimises (Eq. 3 of arXiv 2602.10388), as two surrogates, feature by feature.

``uniform`` is the paper's (Appendix D): P and Q are uniform on the features that the anchor and the data activate.
``frequency`` takes how often each feature is activated: P and Q are the shares of each feature in all activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from transfer.core.errors import TransferError


def _check(n_anchor: int, eps: float) -> None:
    if not 0 < eps <= 1:
        raise TransferError(f"The smoothing weight eps is {eps}.", "Use a value above 0 and at most 1.")
    if n_anchor == 0:
        raise TransferError("The divergence from an empty anchor set is undefined.")


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
        The term of the covered features and that of the missing ones, which falls linearly with each feature covered.
        Their sum is the divergence. The first is not monotone: a feature that the data activates and the anchor does
        not takes mass from all covered ones, and each newly covered feature spreads Q thinner over the others.

    Raises:
        TransferError: For ε outside (0, 1] or an empty F(P).
    """
    _check(n_anchor, eps)
    covered = 0.0
    if n_covered:
        q = (1 - eps) / n_data + eps / n_relevant
        covered = n_covered / n_anchor * math.log(1 / (n_anchor * q))
    missing = (n_anchor - n_covered) / n_anchor * math.log(n_relevant / (eps * n_anchor))
    return covered, missing


def smoothed(counts: np.ndarray, eps: float) -> np.ndarray:
    """Q^ε: each feature's share of all activations with weight 1 − ε, the uniform distribution with weight ε.

    Args:
        counts: Documents that activate each feature, [features] or [features, draws].
        eps: Smoothing weight. Without any activation only the uniform part is left, which sums to ε.
    """
    total = counts.sum(axis=0)
    return (1 - eps) * counts / np.maximum(total, 1) + eps / len(counts)


def kl_frequency(anchor: np.ndarray, data: np.ndarray, eps: float) -> np.ndarray:
    """KL(P_Z ‖ Q_Z^ε) over features by how often each is activated; one value for each column of ``data``.

    Args:
        anchor: Documents of the anchor that activate each feature of F, [features].
        data: The same of the data, [features] or [features, draws].
        eps: Smoothing weight of Q; P needs none.
    """
    some = anchor > 0
    p = anchor[some] / anchor.sum()
    return p @ (np.log(p).reshape(-1, *[1] * (data.ndim - 1)) - np.log(smoothed(data, eps)[some]))


@dataclass(frozen=True, eq=False)
class FeatureCosts:
    """What each relevant feature adds to the two divergences; negative where the data holds more of it than its share.

    Only features of F(P) cost anything: P is zero elsewhere.
    """

    features: np.ndarray
    """Ids, int64 [F]."""
    uniform: np.ndarray
    """Float64 [F]; adds up to ``sum(kl_terms(...))``. All missing features cost the same."""
    frequency: np.ndarray
    """Float64 [F]; adds up to ``kl_frequency(...)``. A missing feature costs more the more often the anchor has it."""

    def order(self) -> np.ndarray:
        """Rows from the dearest on, by ``frequency``, ties to the smaller id."""
        return np.lexsort((self.features, -self.frequency))


def feature_costs(features: np.ndarray, anchor: np.ndarray, data: np.ndarray, eps: float) -> FeatureCosts:
    """Decompose both divergences.

    Args:
        features: Relevant ids F, [F].
        anchor: Documents of the anchor that activate each, [F].
        data: The same of the data, [F].
        eps: Smoothing weight.

    Raises:
        TransferError: For ε outside (0, 1] or an anchor that activates none.
    """
    in_anchor, in_data = anchor > 0, data > 0
    n = int(in_anchor.sum())
    _check(n, eps)
    # With no feature in the data, Q has only its smoothing part.
    q = (1 - eps) * in_data / max(int(in_data.sum()), 1) + eps / len(features)
    uniform = np.where(in_anchor, np.log(1 / (n * q)) / n, 0.0)
    p = anchor / anchor.sum()
    frequency = np.zeros(len(features))
    frequency[in_anchor] = p[in_anchor] * np.log(p[in_anchor] / smoothed(data, eps)[in_anchor])
    return FeatureCosts(np.asarray(features, dtype=np.int64), uniform, frequency)

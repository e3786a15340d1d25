"""δ: how high an activation must be to count, and which activations pass it (Eq. 4 of arXiv 2602.10388)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.space import FeatureSpace

STRONG = 0.95
"""Quantile of a feature's positive values that ``scale`` takes as its scale: its maximum would be one document's."""

Kind = Literal["constant", "quantile", "scale"]


def size(docs: sp.csr_matrix) -> tuple[int, int]:
    """Documents and features of an activation matrix."""
    return cast(tuple[int, int], docs.shape)


@dataclass(frozen=True)
class DeltaRule:
    """How high an activation must be to count: strictly above δ.

    ``constant`` is one δ for all features, as in the paper (0 there). The others give each feature a δ of its own,
    from its positive values (max over tokens) on the anchor documents, because activation scales differ between
    features and between SAEs: one constant cuts through the bulk of some features and below that of others.
    ``quantile:q`` is the q-quantile of these values: the feature counts where it is among its own upper 1 − q.
    ``scale:x`` is x times their 95th percentile: the feature counts where it reaches the share x of what it does when
    it is strong. Unlike the quantile it does not depend on how many of its activations are weak ones.
    """

    kind: Kind = "quantile"
    value: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "quantile", "scale"):
            raise TransferError(f"Unknown delta rule {self.kind!r}.", "Use constant, quantile or scale.")
        if not math.isfinite(self.value) or self.value < 0 or (self.kind == "quantile" and self.value >= 1):
            raise TransferError(
                f"The delta rule {self} is out of range.", "Use constant >= 0, 0 <= quantile < 1 or scale >= 0."
            )

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"

    @classmethod
    def parse(cls, text: str) -> DeltaRule:
        """Read ``constant:1``, ``quantile:0.5`` or ``scale:0.5``.

        Raises:
            TransferError: For anything else.
        """
        kind, _, value = text.partition(":")
        try:
            return cls(kind, float(value))  # pyright: ignore[reportArgumentType]  (checked on construction)
        except ValueError:
            raise TransferError(
                f"The delta rule {text!r} has no number.", "Write quantile:0.5, scale:0.5 or constant:0."
            ) from None


def thresholds(anchor_docs: sp.csr_matrix, rule: DeltaRule | None = None) -> np.ndarray:
    """δ of every feature.

    Args:
        anchor_docs: Max over tokens, [docs, n_features].
        rule: The rule; ``quantile:0.5`` by default. Quantiles interpolate linearly; a feature without a positive
            value on the anchor gets δ = 0.

    Returns:
        float32 [n_features]. Memory is about 40 bytes a non-zero of the anchor.
    """
    rule = rule or DeltaRule()
    _, n_features = size(anchor_docs)
    if rule.kind == "constant":
        return np.full(n_features, rule.value, dtype=np.float32)
    if rule.kind == "quantile":
        return quantiles(anchor_docs, rule.value).astype(np.float32)
    return (rule.value * quantiles(anchor_docs, STRONG)).astype(np.float32)


def quantiles(docs: sp.csr_matrix, q: float) -> np.ndarray:
    """The q-quantile of each feature's positive values, float64 [n_features]; 0 where it has none."""
    _, n_features = size(docs)
    keep = docs.data > 0
    column, value = docs.indices[keep], docs.data[keep].astype(np.float32)
    # Positive floats order like their bits, so one integer sort orders by feature and then by value.
    key = (column.astype(np.uint64) << np.uint64(32)) | value.view(np.uint32)
    key.sort()
    value = key.astype(np.uint32).view(np.float32).astype(np.float64)
    count = np.bincount(column, minlength=n_features)
    start = np.cumsum(count) - count
    found = np.zeros(n_features)
    some = np.flatnonzero(count)
    place = q * (count[some] - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, count[some] - 1)
    below, above = value[start[some] + low], value[start[some] + high]
    found[some] = below + (above - below) * (place - low)
    return found


def fires(docs: sp.csr_matrix, delta: np.ndarray) -> sp.csr_matrix:
    """The indicator A_i(x) = 1[g_i(x) > δ_i] (Eq. 4), strict, as a Boolean CSR [docs, n_features]."""
    keep, bounds = _passing(docs, delta)
    return sp.csr_matrix((np.ones(bounds[-1], dtype=bool), docs.indices[keep], bounds), shape=size(docs))


def above(docs: sp.csr_matrix, delta: np.ndarray) -> sp.csr_matrix:
    """What passes δ, with its value: g_i(x) A_i(x), float32 CSR [docs, n_features]."""
    keep, bounds = _passing(docs, delta)
    return sp.csr_matrix((docs.data[keep].astype(np.float32), docs.indices[keep], bounds), shape=size(docs))


def _passing(docs: sp.csr_matrix, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which stored values count, and where the rows of those begin."""
    if size(docs)[1] != len(delta):
        raise TransferError(f"The documents have {size(docs)[1]} features, the thresholds {len(delta)}.")
    if not np.all(np.isfinite(docs.data)):
        raise TransferError("The activations hold NaN or infinity.", "Harvest again.")
    keep = (docs.data > delta[docs.indices]) & (docs.data > 0)
    return keep, np.concatenate(([0], np.cumsum(keep)))[docs.indptr]


def activated(docs: sp.csr_matrix, delta: np.ndarray) -> np.ndarray:
    """Whether any document activates each feature, bool [n_features]."""
    hit = np.zeros(size(docs)[1], dtype=bool)
    hit[fires(docs, delta).indices] = True
    return hit


def floor_of(space: FeatureSpace) -> float:
    """Codes of this space at or below the floor are not stored (``dense-<floor>``); 0 for all other rules."""
    kind, _, value = space.rule.split(",")[0].partition("-")
    return float(value) if kind == "dense" else 0.0


def below_floor(space: FeatureSpace, delta: np.ndarray, live: np.ndarray) -> int:
    """How many thresholds of live features lie below what the space stores; see ``check_floor``."""
    return int(np.count_nonzero(delta[live] < floor_of(space)))


def check_floor(space: FeatureSpace, delta: np.ndarray, live: np.ndarray) -> None:
    """Refuse thresholds below what the space stores: activations between the two would be lost unseen.

    Args:
        space: The space; only dense codes have a floor.
        delta: Thresholds, [n_features].
        live: Features that the anchor activates at all, bool [n_features]; the others have no threshold of their own.

    Raises:
        TransferError: Saying how many thresholds are too low.
    """
    if low := below_floor(space, delta, live):
        raise TransferError(
            f"{low} thresholds lie below {floor_of(space):g}, up to which {space.id} stores no activation.",
            f"Raise delta, or harvest with codes dense:{float(delta[live].min()):g}.",
        )

"""One space for the directions of both models, learned from residuals at paired positions; symmetric in the models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from aligners.maps import SplitSums, Sums, blocks_of
from aligners.seeded import NEIGHBOURS, centred
from aligners.topk import TopK, topk_cosine
from transfer.core.errors import TransferError
from transfer.core.rows import Rows

RIDGE = 0.03
"""Added to both covariances before whitening, as a share of their mean variance; chosen on the zoo."""
RANK = 1024
"""Canonical directions kept at most; what they drop of a 4,096-wide space are its weakest correlations."""
SINGLE_FROM = 1024
"""Width from which directions are kept in float32: n × r is what memory goes to."""
BLOCK = 16384
"""Rows moved at once."""


@dataclass(frozen=True)
class CanonicalSpace:
    """Directions of both sides, centred and of length one, where inner products compare them."""

    source: Float[np.ndarray, "n_src r"]
    target: Float[np.ndarray, "n_tgt r"]
    correlations: Float[np.ndarray, " r"]
    """Regularised canonical correlations of the residual streams, largest first."""
    into: tuple[Float[np.ndarray, "d_src r"], Float[np.ndarray, "d_tgt r"]]
    """What takes a direction of either stream into the space, before it is centred and made one long."""
    rows: int
    """Positions it was learned from."""
    pairs: Int[np.ndarray, "0 2"]
    """None: the space has seen no feature pair."""

    @property
    def joint(self) -> tuple[Float[np.ndarray, "n_src r"], Float[np.ndarray, "n_tgt r"]]:
        """Rows whose inner products are the cosines."""
        return self.source, self.target

    def nearest(self, k: int) -> TopK:
        """The best partners of both sides, at least as many as CSLS needs."""
        return topk_cosine(self.source, self.target, max(k, NEIGHBOURS))

    def cosines(self, src: Int[np.ndarray, " edges"], tgt: Int[np.ndarray, " edges"]) -> Float[np.ndarray, " edges"]:
        """Cosine of each edge."""
        out = np.empty(len(src))
        for start in range(0, len(src), BLOCK):
            part = slice(start, start + BLOCK)
            out[part] = np.einsum("nd,nd->n", self.source[src[part]], self.target[tgt[part]])
        return out


def canonical_space(
    x: Rows,
    y: Rows,
    residual_x: Rows,
    residual_y: Rows,
    docs: Int[np.ndarray, " rows"],
) -> CanonicalSpace:
    """Bring the directions ``x`` [n_src, d_src] and ``y`` [n_tgt, d_tgt] into the canonical coordinates of two streams.

    Unlike through a map from one side to the other, cosines are the same both ways round, and the width is at most
    ``RANK``. On the zoo, pairs that are sure from held-out activations stand out from unrelated ones by 5.2–5.8
    spreads here, on less text by 4.6–5.1 through a ridge map one way and 4.9–5.3 through both.

    Memory: what ``SplitSums`` takes, and the result. Time: 2·rows·(d_src² + d_src·d_tgt + d_tgt²) FLOP for the sums.

    Raises:
        TransferError: When ``SplitSums.of`` refuses the residuals, a stream does not vary, or a direction is zero.
    """
    sums = SplitSums.of(blocks_of(residual_x, residual_y, docs), full=True).total
    into_source, into_target, rho = canonical_coordinates(sums)
    return CanonicalSpace(
        source=_moved(x, into_source),
        target=_moved(y, into_target),
        correlations=rho,
        into=(into_source, into_target),
        rows=sums.n,
        pairs=np.empty((0, 2), dtype=np.int64),
    )


def canonical_coordinates(
    sums: Sums, strength: float = RIDGE
) -> tuple[Float[np.ndarray, "d_src r"], Float[np.ndarray, "d_tgt r"], Float[np.ndarray, " r"]]:
    """Matrices into the canonical coordinates of either side, and the canonical correlations, largest first.

    With covariances A, B (``strength`` times the mean variance added; Vinod 1976) and cross-covariance C,
    ``A^-½ C B^-½ = U ρ Vᵀ`` (Hotelling 1936). Coordinates are weighted by √(ρ / (1 − ρ²)), so that an inner product is
    the part of the Gaussian log-likelihood ratio "two views of one point" against "unrelated points" that depends on
    both (the score of probabilistic linear discriminant analysis; the model is that of Bach and Jordan 2005).
    Directions that the streams do not share count little, and a few of large variance do not own the cosine.

    Args:
        sums: With ``yy``.
        strength: Above 0.

    Raises:
        TransferError: When a stream does not vary.
    """
    from scipy.linalg import cholesky, eigh, solve_triangular

    assert sums.yy is not None
    lowers = []
    for side, total in (("source", sums.xx), ("target", sums.yy)):
        variance = np.trace(total) / len(total)
        if not variance > 0:
            raise TransferError(f"The paired {side} residuals do not vary; no space can be learned.")
        # Any whitening gives the same inner products; Cholesky's is the cheapest.
        lowers.append(cholesky(total + strength * variance * np.eye(len(total)), lower=True, overwrite_a=True))
    whitened = solve_triangular(lowers[0], sums.xy, lower=True)
    whitened = solve_triangular(lowers[1], whitened.T, lower=True).T
    swap = whitened.shape[0] < whitened.shape[1]
    if swap:
        whitened = whitened.T
    width = whitened.shape[1]
    keep = min(width, RANK)
    square, v = eigh(whitened.T @ whitened, subset_by_index=(width - keep, width - 1))
    rho, v = np.sqrt(np.maximum(square[::-1], 0.0)), v[:, ::-1]
    u = np.divide(whitened @ v, rho, out=np.zeros((len(whitened), keep)), where=rho > 1e-9)
    if swap:
        u, v = v, u
    rho = np.minimum(rho, 1 - 1e-9)
    weight = np.sqrt(rho / (1 - rho**2))
    into = (solve_triangular(low, z, lower=True, trans=1) * weight for low, z in zip(lowers, (u, v), strict=True))
    return (*into, rho)


def _moved(x: Rows, matrix: Float[np.ndarray, "d r"]) -> Float[np.ndarray, "n r"]:
    """Centred unit rows of ``x @ matrix``."""
    if x.shape[1] < SINGLE_FROM:
        return centred(np.asarray(x[:], dtype=np.float64) @ matrix)
    moved = np.empty((len(x), matrix.shape[1]), dtype=np.float32)
    narrow = matrix.astype(np.float32)
    for start in range(0, len(x), BLOCK):
        moved[start : start + BLOCK] = np.asarray(x[start : start + BLOCK], dtype=np.float32) @ narrow
    for step in range(2):
        length = np.sqrt(np.einsum("nd,nd->n", moved, moved))
        if not np.all(length > 0):
            raise TransferError(f"Direction {int(np.argmin(length))} is zero in the canonical space.", "Leave it out.")
        moved /= length[:, None]
        if step == 0:
            moved -= moved.mean(axis=0, dtype=np.float64).astype(np.float32)
    return moved

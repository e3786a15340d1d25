"""Solvers of the residual maps, from covariances alone: ridge, rotation, and canonical correlation analysis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from transfer.core.errors import TransferError

if TYPE_CHECKING:
    from aligners.maps import Sums

Solution = tuple[Float[np.ndarray, "d_src d_tgt"], float, float, int]
"""Matrix, ridge strength, least canonical correlation, rank."""


def ridge(sums: Sums, strengths: tuple[float, ...], floors: tuple[float, ...]) -> Iterator[Solution]:
    """Least squares with ``strength`` times the mean variance on the diagonal; one Cholesky for each strength."""
    from scipy.linalg import solve

    variance = _variance(sums.xx, "source")
    for strength in strengths:
        matrix = solve(sums.xx + strength * variance * np.eye(len(sums.xx)), sums.xy, assume_a="pos")
        yield matrix, strength, 0.0, min(matrix.shape)


def procrustes(sums: Sums, strengths: tuple[float, ...], floors: tuple[float, ...]) -> Iterator[Solution]:
    """The best rotation and scale (Schönemann 1966) where the widths are equal.

    Where they differ there is no rotation between the spaces as they are: both are whitened, rotated onto each other,
    and coloured as the target; a scale is fitted at the end. Every direction then counts the same, noise included.
    """
    if len(sums.xx) == sums.xy.shape[1]:
        _variance(sums.xx, "source")
        u, _, vt = _svd(sums.xy)
        yield _scaled(sums, u @ vt), 0.0, 0.0, len(sums.xx)
        return
    for c in _canonical(sums, strengths):
        yield _scaled(sums, c.whiten_source @ (c.u @ c.vt) @ c.colour_target), c.strength, 0.0, len(c.rho)


def cca(sums: Sums, strengths: tuple[float, ...], floors: tuple[float, ...]) -> Iterator[Solution]:
    """Canonical correlation analysis as a map: whiten both sides, keep shared directions, colour as the target.

    With C = Cx^-½ Cxy Cy^-½ = U ρ Vᵀ (both covariances regularised), the map is Cx^-½ U₊ ρ₊ V₊ᵀ Cy^½, where ₊ keeps the
    directions with ρ ≥ floor (at least the first). With all of them this is ridge regression; without the weak ones it
    is the reduced-rank regression of the canonical coordinates (Breiman and Friedman 1997), and shrinking by ρ
    is what makes it predict vectors and not only rank them. One SVD for each strength.
    """
    for c in _canonical(sums, strengths):
        for floor in floors:
            r = max(1, int(np.sum(c.rho >= floor)))
            matrix = (c.whiten_source @ (c.u[:, :r] * c.rho[:r])) @ (c.vt[:r] @ c.colour_target)
            yield matrix, c.strength, floor, r


@dataclass(frozen=True)
class _Canonical:
    """One regularised CCA: whitened sides, and U ρ Vᵀ of the covariance between them."""

    strength: float
    whiten_source: Float[np.ndarray, "d_src d_src"]
    colour_target: Float[np.ndarray, "d_tgt d_tgt"]
    """Undoes the target's whitening."""
    u: Float[np.ndarray, "d_src r"]
    rho: Float[np.ndarray, " r"]
    vt: Float[np.ndarray, "r d_tgt"]


def _canonical(sums: Sums, strengths: tuple[float, ...]) -> Iterator[_Canonical]:
    """CCA for each strength."""
    assert sums.yy is not None
    left, right = _spectrum(sums.xx, "source"), _spectrum(sums.yy, "target")
    turned = left[1].T @ sums.xy @ right[1]
    for strength in strengths:
        a, b = (np.sqrt(values + strength * values.mean()) for values, _ in (left, right))
        if not (a.min() > 0 and b.min() > 0):
            raise TransferError("Some coordinates of the residuals do not vary.", "Use a strength above 0.")
        u, rho, vt = _svd(turned / a[:, None] / b)
        yield _Canonical(strength, left[1] / a, (right[1] * b).T, u, rho, vt)


def _spectrum(covariance: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh

    _variance(covariance, side)
    values, vectors = eigh(covariance)
    return np.maximum(values, 0.0), vectors


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from scipy.linalg import svd

    return svd(matrix, full_matrices=False)


def _scaled(sums: Sums, matrix: np.ndarray) -> np.ndarray:
    """Times the factor that fits the target best."""
    return matrix * (np.sum(matrix * sums.xy) / np.sum(matrix * (sums.xx @ matrix)))


def _variance(covariance: np.ndarray, side: str) -> float:
    """Mean variance of a coordinate, undivided."""
    variance = float(np.trace(covariance)) / len(covariance)
    if not variance > 0:
        raise TransferError(f"The paired {side} residuals do not vary; no map can be fitted.")
    return variance

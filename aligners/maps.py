"""Linear maps between two residual spaces, from sums over paired positions only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from jaxtyping import Float, Int

from transfer.core.errors import TransferError

Kind = Literal["ridge", "procrustes"]
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths tried, as shares of the mean variance of a source coordinate."""
INNER_FRACTION = 0.8
"""Documents the strength is fitted on; the rest picks it."""
OUTLIER = 5.0
"""Positions whose norm passes this multiple of the median are left out: a few huge ones would own the map."""
BLOCK = 16384
"""Positions converted to float64 in one go."""


@dataclass(frozen=True)
class Sums:
    """What a least-squares fit needs of paired points; adds up over blocks. Memory (d_src + d_tgt)² at most."""

    n: int
    x: Float[np.ndarray, " d_src"]
    y: Float[np.ndarray, " d_tgt"]
    xx: Float[np.ndarray, "d_src d_src"]
    xy: Float[np.ndarray, "d_src d_tgt"]
    yy: float
    """Sum of squares of all target coordinates."""

    @classmethod
    def of(cls, x: Float[np.ndarray, "rows d_src"], y: Float[np.ndarray, "rows d_tgt"], rows: np.ndarray) -> Self:
        """Sums over the rows listed, in float64, a block at a time."""
        total = cls(
            0,
            np.zeros(x.shape[1]),
            np.zeros(y.shape[1]),
            np.zeros((x.shape[1], x.shape[1])),
            np.zeros((x.shape[1], y.shape[1])),
            0.0,
        )
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            a, b = x[part].astype(np.float64), y[part].astype(np.float64)
            total = total.plus(cls(len(part), a.sum(axis=0), b.sum(axis=0), a.T @ a, a.T @ b, float(np.sum(b * b))))
        return total

    def plus(self, other: Sums) -> Self:
        """Sums over both."""
        return type(self)(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def centred(self) -> tuple[Float[np.ndarray, "d_src d_src"], Float[np.ndarray, "d_src d_tgt"]]:
        """Covariances, undivided: Σ(x−x̄)(x−x̄)ᵀ and Σ(x−x̄)(y−ȳ)ᵀ."""
        return self.xx - np.outer(self.x, self.x) / self.n, self.xy - np.outer(self.x, self.y) / self.n


@dataclass(frozen=True)
class ResidualMap:
    """An affine map from the source's residual stream to the target's."""

    matrix: Float[np.ndarray, "d_src d_tgt"]
    bias: Float[np.ndarray, " d_tgt"]
    kind: Kind
    strength: float
    """Ridge strength chosen, as a share of the mean variance; 0 for Procrustes."""
    heldout_r2: float
    """Share of target variance explained on inner held-out documents, all coordinates together."""
    n_rows: int
    n_outliers: int
    """Positions left out for their norm."""

    def points(self, x: Float[np.ndarray, "rows d_src"]) -> Float[np.ndarray, "rows d_tgt"]:
        """Residual vectors, bias included."""
        return x @ self.matrix + self.bias

    def vectors(self, v: Float[np.ndarray, "n d_src"]) -> Float[np.ndarray, "n d_tgt"]:
        """Directions: differences of points, so without the bias (Sec. 3 of arXiv 2506.06609)."""
        return v @ self.matrix


def fit_map(
    x: Float[np.ndarray, "rows d_src"],
    y: Float[np.ndarray, "rows d_tgt"],
    docs: Int[np.ndarray, " rows"],
    *,
    kind: Kind = "ridge",
    strengths: tuple[float, ...] = STRENGTHS,
    seed: int = 0,
) -> ResidualMap:
    """Fit the map on paired residuals by normal equations.

    The ridge strength and the R² come from an inner split by document; the map itself is then fitted on all rows.
    With kind ``procrustes`` the matrix is a scaled semi-orthogonal one, the best rotation when the widths are equal.
    Memory: d_src² + d_src·d_tgt float64 three times, plus one block of rows.

    Raises:
        TransferError: When rows differ, are not finite, come from fewer than two documents, or do not vary.
    """
    if kind not in ("ridge", "procrustes"):
        raise TransferError(f"Unknown kind of map {kind!r}.", "Use 'ridge' or 'procrustes'.")
    if not len(x) == len(y) == len(docs):
        raise TransferError(f"A map needs paired rows, got {len(x)} source, {len(y)} target and {len(docs)} documents.")
    ids = np.unique(docs)
    if len(ids) < 2:
        raise TransferError(f"A map needs at least two documents to hold some out, got {len(ids)}.", "Pair more text.")
    keep = _ordinary(x) & _ordinary(y)
    shuffled = np.random.default_rng(seed).permutation(ids)
    inner = np.isin(docs, shuffled[: min(len(ids) - 1, max(1, round(INNER_FRACTION * len(ids))))])
    fit_rows, held_rows = np.flatnonzero(keep & inner), np.flatnonzero(keep & ~inner)
    if len(fit_rows) < 2 or len(held_rows) < 2:
        raise TransferError(f"A map needs more than {len(docs)} paired positions.", "Pair more text.")
    fit, held = Sums.of(x, y, fit_rows), Sums.of(x, y, held_rows)
    tried = [(r2(held, *_solve(fit, kind, s)), s) for s in (strengths if kind == "ridge" else (0.0,))]
    best, strength = max(tried)
    if not np.isfinite(best):
        raise TransferError("The paired residuals are not finite or do not vary; no map can be fitted.")
    total = fit.plus(held)
    matrix, bias = _solve(total, kind, strength)
    return ResidualMap(
        matrix=matrix,
        bias=bias,
        kind=kind,
        strength=strength,
        heldout_r2=float(best),
        n_rows=total.n,
        n_outliers=int(np.sum(~keep)),
    )


def r2(sums: Sums, matrix: Float[np.ndarray, "d_src d_tgt"], bias: Float[np.ndarray, " d_tgt"]) -> float:
    """R² of a map on the points behind ``sums``; NaN when the target does not vary."""
    error = (
        sums.yy
        - 2 * np.sum(matrix * sums.xy)
        - 2 * bias @ sums.y
        + np.sum(matrix * (sums.xx @ matrix))
        + 2 * (sums.x @ matrix) @ bias
        + sums.n * bias @ bias
    )
    spread = sums.yy - sums.y @ sums.y / sums.n
    return float(1 - error / spread) if spread > 0 else float("nan")


def _solve(sums: Sums, kind: Kind, strength: float) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import solve, svd

    xx, xy = sums.centred()
    variance = np.trace(xx) / len(xx)
    if not variance > 0:
        raise TransferError("The paired source residuals do not vary; no map can be fitted.")
    if kind == "ridge":
        matrix = solve(xx + strength * variance * np.eye(len(xx)), xy, assume_a="pos")
    else:
        u, s, vt = svd(xy, full_matrices=False)
        rotation = u @ vt
        matrix = rotation * (s.sum() / np.sum(rotation * (xx @ rotation)))
    return matrix, (sums.y - sums.x @ matrix) / sums.n


def _ordinary(x: np.ndarray) -> np.ndarray:
    """Rows whose norm is finite and at most ``OUTLIER`` medians."""
    norm = np.concatenate(
        [np.linalg.norm(x[i : i + BLOCK].astype(np.float64), axis=1) for i in range(0, len(x), BLOCK)]
    )
    if not np.all(np.isfinite(norm)):
        raise TransferError("The paired residuals hold NaN or infinity.", "Harvest again.")
    return norm <= OUTLIER * np.median(norm)

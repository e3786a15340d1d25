"""Linear maps between two residual spaces, from sums over paired positions only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from jaxtyping import Float, Int

from transfer.core.errors import TransferError
from transfer.core.rows import Rows

Kind = Literal["ridge", "procrustes", "cca"]
Block = tuple[Float[np.ndarray, "rows d_src"], Float[np.ndarray, "rows d_tgt"], Int[np.ndarray, " rows"]]
"""Paired residuals of both sides and the document of each row."""
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths tried, as shares of the mean variance of a coordinate."""
CORRELATIONS = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Least canonical correlations tried; directions below are left out of a CCA map."""
INNER_FRACTION = 0.8
"""Documents the strength is fitted on; the rest picks it."""
OUTLIER = 5.0
"""Positions whose norm passes this multiple of the median are left out: a few huge ones would own the map."""
WIDE = 2048
"""Width from which a block's products are taken in float32, about its mean, and only added up in float64: 2–3 × as
fast, and the error (1e-6 of a variance) is far below any ridge."""
BLOCK = 4096
"""Positions read at once."""


@dataclass(frozen=True)
class Sums:
    """What a least-squares fit needs of paired points; adds up over blocks of rows.

    Kept about the means (Chan, Golub and LeVeque 1983), so that a stream shifted far from zero loses no digits and the
    order of the blocks changes nothing beyond rounding. Float64: 8·(d_src² + d_src·d_tgt) bytes, with ``yy`` another
    8·d_tgt² (354 MB for 4,096 and 3,584). Cost 2·n·(d_src² + d_src·d_tgt) FLOP, with ``yy`` another 2·n·d_tgt².
    """

    n: int
    x: Float[np.ndarray, " d_src"]
    """Mean."""
    y: Float[np.ndarray, " d_tgt"]
    xx: Float[np.ndarray, "d_src d_src"]
    """Σ(x−x̄)(x−x̄)ᵀ."""
    xy: Float[np.ndarray, "d_src d_tgt"]
    spread: float
    """Σ|y−ȳ|²."""
    yy: Float[np.ndarray, "d_tgt d_tgt"] | None = None
    """Σ(y−ȳ)(y−ȳ)ᵀ, where asked for: CCA, whitening and the way back need it."""

    @classmethod
    def zero(cls, d_src: int, d_tgt: int, full: bool) -> Self:
        """Sums over nothing."""
        yy = np.zeros((d_tgt, d_tgt)) if full else None
        return cls(0, np.zeros(d_src), np.zeros(d_tgt), np.zeros((d_src, d_src)), np.zeros((d_src, d_tgt)), 0.0, yy)

    @classmethod
    def of(cls, x: Float[np.ndarray, "rows d_src"], y: Float[np.ndarray, "rows d_tgt"], full: bool = False) -> Self:
        """Sums over one block of at least one row; products in float64, in float32 from a width of ``WIDE``."""
        dtype = np.float32 if max(x.shape[1], y.shape[1]) >= WIDE else np.float64
        a, b = x.astype(dtype), y.astype(dtype)
        mean_a, mean_b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
        a -= mean_a.astype(dtype)
        b -= mean_b.astype(dtype)
        products = (None if p is None else p.astype(np.float64) for p in (a.T @ a, a.T @ b, b.T @ b if full else None))
        xx, xy, yy = products
        assert xx is not None and xy is not None
        return cls(len(a), mean_a, mean_b, xx, xy, float(np.sum(b * b, dtype=np.float64)), yy)

    def plus(self, other: Sums) -> Self:
        """Sums over both."""
        n = self.n + other.n
        dx, dy = other.x - self.x, other.y - self.y
        weight = self.n * other.n / n if n else 0.0
        share = other.n / n if n else 0.0
        both = None if self.yy is None or other.yy is None else self.yy + other.yy + weight * np.outer(dy, dy)
        return replace(
            self,
            n=n,
            x=self.x + share * dx,
            y=self.y + share * dy,
            xx=self.xx + other.xx + weight * np.outer(dx, dx),
            xy=self.xy + other.xy + weight * np.outer(dx, dy),
            spread=self.spread + other.spread + weight * float(dy @ dy),
            yy=both,
        )

    def reversed(self) -> Self:
        """The same points with both sides exchanged; needs ``yy``."""
        assert self.yy is not None
        return replace(self, x=self.y, y=self.x, xx=self.yy, xy=self.xy.T, spread=float(np.trace(self.xx)), yy=self.xx)


@dataclass(frozen=True)
class SplitSums:
    """Sums of two parts of a stream that share no document; the second judges what is fitted on the first."""

    fit: Sums
    held: Sums
    n_outliers: int
    """Rows of huge norm, in neither part."""

    @classmethod
    def of(cls, blocks: Iterable[Block], *, full: bool, seed: int = 0) -> Self:
        """Read the stream twice: norms and documents first, then the sums.

        So outliers and documents are those of the whole stream, and how it is cut into blocks does not matter. Memory:
        ``Sums`` twice, the block at hand, its chosen rows in float64, and 25 bytes a row of the stream.

        Raises:
            TransferError: When rows differ, are not finite, come from fewer than two documents or are too few, or the
                stream cannot be read twice.
        """
        if isinstance(blocks, Iterator):
            raise TransferError(
                "The blocks of a map are read twice, and this iterator can be read once only.",
                "Pass a list, or an object whose __iter__ starts anew.",
            )
        norms: list[np.ndarray] = []
        marks: list[np.ndarray] = []
        widths: set[tuple[int, int]] = set()
        for x, y, docs in blocks:
            if not len(x) == len(y) == len(docs):
                raise TransferError(
                    f"A map needs paired rows, got {len(x)} source, {len(y)} target and {len(docs)} documents."
                )
            widths.add((x.shape[1], y.shape[1]))
            marks.append(np.asarray(docs))
            norms.append(np.stack([_norms(x), _norms(y)]))
        if len(widths) != 1:
            raise TransferError(
                f"The blocks of a map have {len(widths)} pairs of widths.", "Give residuals of one pair."
            )
        norm, all_docs = np.hstack(norms), np.concatenate(marks)
        keep = np.all(norm <= OUTLIER * np.median(norm, axis=1, keepdims=True), axis=0) if norm.size else norm[0] > 0
        inner = _inner(all_docs, seed)
        if min(np.sum(keep & inner), np.sum(keep & ~inner)) < 2:
            raise TransferError(f"A map needs more than {len(all_docs)} paired positions.", "Pair more text.")
        parts = [Sums.zero(*next(iter(widths)), full) for _ in range(2)]
        at = 0
        for x, y, _ in blocks:
            rows = slice(at, at + len(x))
            at = rows.stop
            if at > len(keep):
                break
            for n, chosen in enumerate((keep[rows] & inner[rows], keep[rows] & ~inner[rows])):
                if chosen.any():
                    parts[n] = parts[n].plus(Sums.of(x[chosen], y[chosen], full))
        if at != len(keep):
            raise TransferError(f"The blocks of a map gave {len(keep)} rows at first and {at} read again.")
        return cls(parts[0], parts[1], int(np.sum(~keep)))

    @property
    def total(self) -> Sums:
        """Both parts."""
        return self.fit.plus(self.held)

    def reversed(self) -> Self:
        """The same split of the way back."""
        return replace(self, fit=self.fit.reversed(), held=self.held.reversed())


@dataclass(frozen=True)
class ResidualMap:
    """An affine map from the source's residual stream to the target's."""

    matrix: Float[np.ndarray, "d_src d_tgt"]
    bias: Float[np.ndarray, " d_tgt"]
    kind: Kind
    strength: float
    """Ridge strength chosen, as a share of the mean variance; 0 for a plain rotation."""
    floor: float
    """Least canonical correlation kept; 0 for other kinds."""
    rank: int
    """Directions that the map carries over."""
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
    x: Rows,
    y: Rows,
    docs: Int[np.ndarray, " rows"],
    *,
    kind: Kind = "ridge",
    strengths: tuple[float, ...] = STRENGTHS,
    seed: int = 0,
) -> ResidualMap:
    """``fit_blocks`` on paired residuals [rows, d_src] and [rows, d_tgt]."""
    return fit_blocks(blocks_of(x, y, docs), kind=kind, strengths=strengths, seed=seed)


@dataclass(frozen=True, eq=False)
class PairedBlocks:
    """Paired rows, ``BLOCK`` at a time; read anew each time they are gone through."""

    x: Rows
    y: Rows
    docs: Int[np.ndarray, " rows"]

    def __iter__(self) -> Iterator[Block]:
        """Source rows, target rows and documents of each block."""
        for i in range(0, len(self.docs), BLOCK):
            yield self.x[i : i + BLOCK], self.y[i : i + BLOCK], self.docs[i : i + BLOCK]


def blocks_of(x: Rows, y: Rows, docs: Int[np.ndarray, " rows"]) -> PairedBlocks:
    """Blocks of paired rows [rows, d_src] and [rows, d_tgt].

    Raises:
        TransferError: When rows differ.
    """
    if not len(x) == len(y) == len(docs):
        raise TransferError(f"A map needs paired rows, got {len(x)} source, {len(y)} target and {len(docs)} documents.")
    return PairedBlocks(x, y, docs)


def fit_blocks(
    blocks: Iterable[Block], *, kind: Kind = "ridge", strengths: tuple[float, ...] = STRENGTHS, seed: int = 0
) -> ResidualMap:
    """Fit the map on a stream of paired residuals by normal equations; rows × d never has to be in memory.

    Kinds: ``ridge``; ``procrustes``, a scaled rotation where the widths are equal, and between whitened spaces where
    they differ; ``cca``, least squares cut to the canonical directions that both spaces share and shrunk by their
    correlations (``aligners.cca``). Strength, least correlation and R² come from an inner split by document; the map
    itself is then fitted on all rows.

    Cost: 2·rows·(d_src² + d_src·d_tgt) FLOP (and 2·rows·d_tgt² unless ``ridge``), then d³ work for each strength.
    Memory: ``SplitSums``, their total, and about four d × d float64.

    Args:
        blocks: Source rows, target rows and documents; iterated twice.
        kind: Of the map.
        strengths: Ridge strengths tried.
        seed: Of the inner split.

    Raises:
        TransferError: For an unknown kind, or blocks that ``SplitSums.of`` refuses or that do not vary.
    """
    check_kind(kind)
    return best_map(SplitSums.of(blocks, full=kind != "ridge", seed=seed), kind, strengths)[0]


def best_map(sums: SplitSums, kind: Kind, strengths: tuple[float, ...] = STRENGTHS) -> tuple[ResidualMap, ResidualMap]:
    """The map fitted on both parts with the setting that did best on the second, and the one fitted on the first only.

    Raises:
        TransferError: When the residuals do not vary.
    """
    from aligners.cca import cca, procrustes, ridge

    solve = {"ridge": ridge, "procrustes": procrustes, "cca": cca}[kind]
    inner = None
    for matrix, strength, floor, rank in solve(sums.fit, strengths, CORRELATIONS):
        bias = sums.fit.y - sums.fit.x @ matrix
        score = r2(sums.held, matrix, bias)
        if np.isfinite(score) and (inner is None or score > inner.heldout_r2):
            inner = ResidualMap(matrix, bias, kind, strength, floor, rank, score, sums.fit.n, sums.n_outliers)
    if inner is None:
        raise TransferError("The paired residuals do not vary; no map can be fitted.")
    total = sums.total
    matrix, _, _, rank = next(solve(total, (inner.strength,), (inner.floor,)))
    return replace(inner, matrix=matrix, bias=total.y - total.x @ matrix, rank=rank, n_rows=total.n), inner


def r2(sums: Sums, matrix: Float[np.ndarray, "d_src d_tgt"], bias: Float[np.ndarray, " d_tgt"]) -> float:
    """R² of a map on the points behind ``sums``; NaN when the target does not vary."""
    offset = sums.y - sums.x @ matrix - bias
    error = (
        sums.spread - 2 * np.sum(matrix * sums.xy) + np.sum(matrix * (sums.xx @ matrix)) + sums.n * (offset @ offset)
    )
    return float(1 - error / sums.spread) if sums.spread > 0 else float("nan")


def check_kind(kind: str) -> None:
    """Raise for a kind of map that there is not.

    Raises:
        TransferError: Listing those there are.
    """
    if kind not in ("ridge", "procrustes", "cca"):
        raise TransferError(f"Unknown kind of map {kind!r}.", "Use 'ridge', 'procrustes' or 'cca'.")


def _inner(docs: Int[np.ndarray, " rows"], seed: int) -> np.ndarray:
    """Rows whose documents the settings are fitted on."""
    ids = np.unique(docs)
    if len(ids) < 2:
        raise TransferError(f"A map needs at least two documents to hold some out, got {len(ids)}.", "Pair more text.")
    shuffled = np.random.default_rng(seed).permutation(ids)
    return np.isin(docs, shuffled[: min(len(ids) - 1, max(1, round(INNER_FRACTION * len(ids))))])


def _norms(x: np.ndarray) -> Float[np.ndarray, " rows"]:
    norm = np.linalg.norm(x.astype(np.float64), axis=1)
    if not np.all(np.isfinite(norm)):
        raise TransferError("The paired residuals hold NaN or infinity.", "Harvest again.")
    return norm

"""Exact Pearson correlation of sparse codes, by blocks, without a dense matrix above the block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from aligners.topk import BLOCK_BYTES, TopK, block_rows, topk_blocks
from transfer.core.errors import TransferError
from transfer.core.store import PairedActivations

ALWAYS_ON = 0.5
"""A feature that fires on more than this share of the rows says nothing about where it fires."""


def dims(matrix: sp.csr_matrix) -> tuple[int, int]:
    """Shape of a sparse matrix (scipy's own annotations say that it may be None)."""
    rows, columns = matrix.shape  # pyright: ignore[reportGeneralTypeIssues]
    return int(rows), int(columns)


@dataclass(frozen=True)
class Codes:
    """Codes of some features of one side, with what correlation needs of them."""

    matrix: sp.csr_matrix
    """float64 [rows, n], no stored zeros."""
    ids: Int[np.ndarray, " n"]
    """Feature ids of the columns."""

    @classmethod
    def of(cls, values: sp.csr_matrix, ids: Int[np.ndarray, " n"] | None = None) -> Codes:
        """Columns ``ids`` (all if None) in float64; the input is not touched."""
        ids = np.arange(dims(values)[1]) if ids is None else np.asarray(ids, dtype=np.int64)
        matrix = sp.csr_matrix(sp.csr_matrix(values)[:, ids], dtype=np.float64, copy=True)
        matrix.eliminate_zeros()
        return cls(matrix, ids)

    @cached_property
    def support(self) -> Int[np.ndarray, " n"]:
        """Rows each feature fires on."""
        return np.bincount(self.matrix.indices, minlength=dims(self.matrix)[1])

    @cached_property
    def mean(self) -> Float[np.ndarray, " n"]:
        """Mean over all rows, silent ones included."""
        rows, columns = dims(self.matrix)
        return np.bincount(self.matrix.indices, self.matrix.data, columns) / rows

    @cached_property
    def std(self) -> Float[np.ndarray, " n"]:
        """Standard deviation over all rows; 0 for a constant feature."""
        m = self.matrix
        rows, columns = dims(m)
        # Two passes, on the firing rows and the silent ones: no difference of large squares.
        off = m.data - self.mean[m.indices]
        total = np.bincount(m.indices, off * off, columns) + (rows - self.support) * self.mean**2
        return np.where(self.support > 0, np.sqrt(total / rows), 0.0)


@dataclass(frozen=True)
class Support:
    """Which features of one side have enough events to say anything about."""

    ids: Int[np.ndarray, " n"]
    dead: int
    """Features that never fire."""
    rare: int
    """Features that fire on fewer than ``min_support`` rows."""
    always_on: int

    @classmethod
    def of(cls, values: sp.csr_matrix, min_support: int, max_rate: float = ALWAYS_ON) -> Support:
        """Split the features of one side by how many rows they fire on."""
        rows, columns = dims(values)
        support = np.bincount(values.indices[values.data != 0], minlength=columns)
        high: Bool[np.ndarray, " n"] = support > max_rate * rows
        low = support < min_support
        return cls(
            ids=np.flatnonzero(~high & ~low),
            dead=int(np.sum(support == 0)),
            rare=int(np.sum(low & (support > 0))),
            always_on=int(np.sum(high & ~low)),
        )


def usable_features(pairs: PairedActivations, min_support: int) -> tuple[Support, Support, dict[str, int]]:
    """Testable features of both sides, and the counts for ``Alignment.info``.

    Raises:
        TransferError: When one side has none, or ``min_support`` is below 2.
    """
    if min_support < 2:
        raise TransferError(f"min_support is {min_support}; a correlation over fewer than 2 events means nothing.")
    source, target = Support.of(pairs.source, min_support), Support.of(pairs.target, min_support)
    for side, found in (("source", source), ("target", target)):
        if not len(found.ids):
            raise TransferError(
                f"No {side} feature fires on at least {min_support} of the {len(pairs.docs)} paired rows "
                f"and on at most {ALWAYS_ON:.0%} of them.",
                "Pair more text or lower min_support.",
            )
    info = {"testable_source": len(source.ids), "testable_target": len(target.ids)}
    for name in ("dead", "rare", "always_on"):
        info[f"{name}_source"], info[f"{name}_target"] = getattr(source, name), getattr(target, name)
    return source, target, info


def correlation_blocks(
    a: Codes, b: Codes, budget: int = BLOCK_BYTES
) -> Iterator[tuple[int, Float[np.ndarray, "block n_tgt"]]]:
    """Pearson correlations of all columns of ``a`` with all of ``b``, a block of ``a`` at a time.

    Work is the number of joint events (rows × active × active), not rows × n²: the codes are multiplied sparse.
    Memory: float64 copies of both codes and at most ``budget`` bytes for the running block. A constant feature
    correlates 0 with everything.
    """
    rows, n_src = dims(a.matrix)
    transposed = sp.csr_matrix(a.matrix.T)
    inverse_b = _inverse(b.std)
    step = block_rows(dims(b.matrix)[1], budget)
    for start in range(0, n_src, step):
        part = slice(start, start + step)
        block = (transposed[part] @ b.matrix).toarray()
        block /= rows
        block -= np.outer(a.mean[part], b.mean)
        block *= _inverse(a.std[part])[:, None]
        block *= inverse_b
        yield start, np.clip(block, -1.0, 1.0, out=block)


def top_correlations(a: Codes, b: Codes, k: int, budget: int = BLOCK_BYTES) -> TopK:
    """The ``k`` best correlated partners of every feature, both directions in one pass (rows of the codes' ``ids``)."""
    return topk_blocks(correlation_blocks(a, b, budget), (len(a.ids), len(b.ids)), k)


def pair_correlations(
    pairs: PairedActivations, src_ids: Int[np.ndarray, " n"], tgt_ids: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Pearson correlation of each listed pair; NaN where a feature is constant on these rows."""
    return listed_correlations(Codes.of(pairs.source, src_ids), Codes.of(pairs.target, tgt_ids))


def listed_correlations(a: Codes, b: Codes, shift: int = 0) -> Float[np.ndarray, " n"]:
    """Correlation of column i of ``a`` with column i of ``b``, the rows of ``b`` moved up by ``shift`` in a circle."""
    moved = b.matrix if not shift else sp.vstack([b.matrix[shift:], b.matrix[:shift]], format="csr")
    rows = dims(a.matrix)[0]
    joint = np.asarray(a.matrix.multiply(moved).sum(axis=0)).ravel() / rows
    spread = a.std * b.std
    corr = np.full(len(joint), np.nan)
    np.divide(joint - a.mean * b.mean, spread, out=corr, where=spread > 0)
    return np.clip(corr, -1.0, 1.0)


def _inverse(std: np.ndarray) -> np.ndarray:
    return np.divide(1.0, std, out=np.zeros_like(std), where=std > 0)

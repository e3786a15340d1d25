"""Which features of two sides fire together: Pearson, φ and Jaccard of all pairs from one streamed pass over codes.

Every joint event (one active feature of each side in one row) is one multiply-add into a row of sums that stays in the
cache. The full table of sums never exists: blocks of source features are finished one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.correlation import dims
from transfer.core.errors import TransferError

Measure = Literal["pearson", "phi", "jaccard"]
Parts = Iterable[tuple[sp.csr_matrix, sp.csr_matrix]]
"""Row chunks of the codes of both sides, the same rows on both.

Read once for every block of features (2,000 times at 65,536 × 65,536): memory-mapped chunks, which cost nothing to read
again, or larger blocks (``sums_bytes``). Chunks of a million rows or more are best: with ten, every sum is fetched from
memory ten times.
"""

HELD_BYTES = 1792 * 2**20
"""Source codes held by feature at a time, 8 bytes an event; more events are taken in several rounds."""
SUMS_BYTES = 48 * 2**20
"""Sums of one block of source features with what is selected from them; small enough to stay near the processor."""
BYTES_PER_PAIR = 18
"""Sum of products (8), joint events (4), score (4) and the maxima of scores, per pair of a block."""
EVENTS = 2**18
"""Joint events handled at once: their indices and weights stay in the cache."""
DENSE_SHARE = 1 / 250
"""Joint events per cell of rows × source × target above which a dense product is faster (6 % density; measured)."""
MEASURED = 2**20
"""Events whose moments are taken at once."""
ONE = np.int32(1)
"""Counts are int32; a plain 1 would send ``np.add.at`` down a path forty times as slow."""
DENSE_BYTES = 128 * 2**20
"""Rows made dense at once."""


@dataclass(frozen=True)
class Moments:
    """Sums over all rows, per feature of one side."""

    rows: int
    support: Int[np.ndarray, " n"]
    """Rows the feature fires on."""
    mean: Float[np.ndarray, " n"]
    """Over all rows, silent ones included."""
    spread: Float[np.ndarray, " n"]
    """Sum of squared deviations from the mean."""

    @cached_property
    def scales(self) -> dict[Measure, Float[np.ndarray, " n"]]:
        """What sums of deviations are multiplied by, once for each side; 0 for a constant feature."""
        spreads: dict[Measure, np.ndarray] = {
            "pearson": self.spread,
            "phi": self.support * (1 - self.support / self.rows),
        }
        return {name: np.divide(1.0, np.sqrt(x), out=np.zeros(len(x)), where=x > 0) for name, x in spreads.items()}

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both (Chan, Golub & LeVeque 1979: no difference of large squares)."""
        rows = self.rows + other.rows
        gap = other.mean - self.mean
        return Moments(
            rows,
            self.support + other.support,
            self.mean + gap * (other.rows / rows),
            self.spread + other.spread + gap**2 * (self.rows * other.rows / rows),
        )

    @classmethod
    def added(cls, before: Moments | None, codes: sp.csr_matrix, name: str) -> Moments | None:
        """Of the rows so far and one chunk more, read a million events at a time.

        Raises:
            TransferError: For NaN or infinity.
        """
        rows = dims(codes)[0]
        step = max(1, MEASURED * rows // max(codes.nnz, 1))
        for start in range(0, rows, step):
            part = codes[start : start + step]
            if not np.all(np.isfinite(part.data)):
                raise TransferError(f"The {name} hold NaN or infinity.", "Harvest again.")
            one = cls.of(part)
            before = one if before is None else before.merged(one)
        return before

    @classmethod
    def of(cls, codes: sp.csr_matrix) -> Moments:
        """Of a few rows: all events at once."""
        rows, columns = dims(codes)
        support = np.bincount(codes.indices[codes.data != 0], minlength=columns)
        mean = np.bincount(codes.indices, codes.data, columns) / rows
        off = codes.data - mean[codes.indices]
        stored = np.bincount(codes.indices, minlength=columns)
        spread = np.bincount(codes.indices, off * off, columns) + (rows - stored) * mean**2
        return cls(rows, support, mean, np.where(support > 0, spread, 0.0))


@dataclass(frozen=True)
class PairedCodes:
    """Codes of both sides with their moments, ready to be multiplied."""

    parts: Parts
    source: Moments
    target: Moments
    events: int
    """Joint events: multiply-adds of the sparse product."""
    dense: bool
    """Whether a dense product is faster."""

    @classmethod
    def of(cls, parts: Parts) -> PairedCodes:
        """Read the codes once.

        Raises:
            TransferError: For no rows, chunks that differ in rows or features, NaN or infinity, or an iterator that
                can be read only once.
        """
        if iter(parts) is parts:
            raise TransferError(
                "The row chunks can be read only once, but every block of features reads them.",
                "Pass a list, or an object whose __iter__ starts again.",
            )
        source: Moments | None = None
        target: Moments | None = None
        events = 0
        for i, (a, b) in enumerate(parts):
            if dims(a)[0] != dims(b)[0]:
                raise TransferError(f"Chunk {i} has {dims(a)[0]} source rows and {dims(b)[0]} target rows.")
            if source is not None and target is not None:
                before = (len(source.mean), len(target.mean))
                if before != (dims(a)[1], dims(b)[1]):
                    raise TransferError(
                        f"Chunk {i} has {dims(a)[1]} × {dims(b)[1]} features, those before it "
                        f"{before[0]} × {before[1]}."
                    )
            if not dims(a)[0]:
                continue
            source, target = (
                Moments.added(source, a, f"source codes of chunk {i}"),
                Moments.added(target, b, f"target codes of chunk {i}"),
            )
            events += int(np.dot(np.diff(a.indptr).astype(np.int64), np.diff(b.indptr)))
        if source is None or target is None or not len(source.mean) or not len(target.mean):
            raise TransferError("There are no codes to correlate: no rows, or a side without features.")
        cells = source.rows * len(source.mean) * len(target.mean)
        return cls(parts, source, target, events, events > DENSE_SHARE * cells)


@dataclass(frozen=True)
class Joint:
    """Sums of one block of source features with all target features."""

    features: Int[np.ndarray, " block"]
    products: Float[np.ndarray, "block n_tgt"]
    """Σ f·g, float64."""
    n11: Int[np.ndarray, "block n_tgt"]
    """Rows on which both fire, int32."""


def joint_blocks(
    codes: PairedCodes,
    features: Int[np.ndarray, " n"] | None = None,
    held_bytes: int = HELD_BYTES,
    sums_bytes: int = SUMS_BYTES,
) -> Iterator[Joint]:
    """Σ f·g and n11 of source features with all target features, a block of source features at a time.

    Exact: sums are float64 and int32, products of float32 codes are formed in float64. A block's arrays are reused for
    the next one. Memory: ``held_bytes`` for source codes by feature (8 bytes an event if float32; 10M tokens at 20
    active take 1.5 GiB), ``sums_bytes`` for the block, and a chunk three times over; the target's chunks are read
    where they lie.

    Args:
        codes: Of both sides.
        features: Source features (all if None), in the order wanted.
        held_bytes: See above.
        sums_bytes: See above.
    """
    ids = np.arange(len(codes.source.mean)) if features is None else np.asarray(features, dtype=np.int64)
    n_tgt = len(codes.target.mean)
    block = block_features(n_tgt, len(ids), sums_bytes)
    products, n11 = np.empty((block, n_tgt)), np.empty((block, n_tgt), dtype=np.int32)
    for first, last in _rounds(codes.source.support[ids], block, held_bytes):
        held = [_by_feature(a, ids[first:last]) for a, _ in codes.parts]
        for start in range(first, last, block):
            stop = min(start + block, last)
            out = Joint(ids[start:stop], products[: stop - start], n11[: stop - start])
            out.products[:], out.n11[:] = 0, 0
            for columns, (_, b) in zip(held, codes.parts, strict=True):
                add = _add_dense if codes.dense else _add_sparse
                add(out, columns[:, start - first : stop - first], b)
            yield out


def block_features(n_tgt: int, n_src: int, budget: int = SUMS_BYTES) -> int:
    """Source features in a block: a multiple of 16 that fits the budget, 16 at least."""
    fitting = budget // (BYTES_PER_PAIR * n_tgt) // 16 * 16
    return max(16, min(fitting, -(-n_src // 16) * 16))


def _rounds(stored: Int[np.ndarray, " n"], block: int, held_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs of whole blocks whose stored codes fit, one block at least."""
    starts = np.arange(0, len(stored), block)
    size = np.add.reduceat(stored, starts) * 8
    first = 0
    for i in range(1, len(starts) + 1):
        if i == len(starts) or size[first : i + 1].sum() > held_bytes:
            yield int(starts[first]), int(starts[i]) if i < len(starts) else len(stored)
            first = i


def _by_feature(codes: sp.csr_matrix, ids: Int[np.ndarray, " n"]) -> sp.csc_matrix:
    everything = len(ids) == dims(codes)[1] and np.all(ids == np.arange(len(ids)))
    columns = sp.csc_matrix(codes if everything else codes[:, ids])
    if np.any(columns.data == 0):
        columns = columns.copy()
        columns.eliminate_zeros()
    return columns


def _add_sparse(out: Joint, a: sp.csc_matrix, b: sp.csr_matrix) -> None:
    """Add one chunk, event by event; events of one source feature follow each other, so its row stays in the cache."""
    n_tgt = out.products.shape[1]
    flat, counts = out.products.reshape(-1), out.n11.reshape(-1)
    row_of = np.repeat(np.arange(len(out.features), dtype=np.int64) * n_tgt, np.diff(a.indptr))
    ends = np.cumsum(b.indptr[a.indices + 1] - b.indptr[a.indices], dtype=np.int64)
    start = 0
    while start < len(ends):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + EVENTS, side="right")))
        met = b[a.indices[start:stop]]
        each = np.diff(met.indptr)
        at = np.repeat(row_of[start:stop], each)
        at += met.indices
        weight = np.repeat(a.data[start:stop].astype(np.float64), each)
        weight *= met.data
        np.add.at(flat, at, weight)
        fires = met.data != 0
        np.add.at(counts, at if fires.all() else at[fires], ONE)
        start = stop


def _add_dense(out: Joint, a: sp.csc_matrix, b: sp.csr_matrix) -> None:
    """Add one chunk by a dense product of a few rows at a time."""
    rows = sp.csr_matrix(a)
    step = max(1, min(2**23, DENSE_BYTES // (12 * sum(out.products.shape))))  # counts below 2**24 are exact in float32
    for start in range(0, dims(rows)[0], step):
        x = rows[start : start + step].toarray().astype(np.float64)
        y = b[start : start + step].toarray().astype(np.float64)
        out.products[:] += x.T @ y
        out.n11[:] += ((x != 0).astype(np.float32).T @ (y != 0).astype(np.float32)).astype(np.int32)


def measured(
    measure: Measure,
    products: Float[np.ndarray, ...],
    n11: Int[np.ndarray, ...],
    codes: PairedCodes,
    src: Int[np.ndarray, ...],
    tgt: Int[np.ndarray, ...],
) -> Float[np.ndarray, ...]:
    """Pearson, ``φ = (n11/T − p p') / √(p q p' q')`` or ``n11 / (n + n' − n11)`` of pairs, in float64.

    A feature that is constant correlates 0 with everything. All arrays broadcast.

    Raises:
        TransferError: For an unknown measure.
    """
    refuse_unknown(measure)
    a, b, rows = codes.source, codes.target, codes.source.rows
    if measure == "jaccard":
        return n11 / np.maximum(a.support[src] + b.support[tgt] - n11, 1)
    if measure == "pearson":
        joint = (products - (rows * a.mean[src]) * b.mean[tgt]) * (a.scales[measure][src] * b.scales[measure][tgt])
    else:
        joint = (n11 - a.support[src] / rows * b.support[tgt]) * (a.scales[measure][src] * b.scales[measure][tgt])
    return np.clip(joint, -1.0, 1.0)


def refuse_unknown(measure: Measure) -> None:
    """Check the name of a measure.

    Raises:
        TransferError: For an unknown one.
    """
    if measure not in ("pearson", "phi", "jaccard"):
        raise TransferError(f"Unknown measure {measure!r}.", "Use 'pearson', 'phi' or 'jaccard'.")

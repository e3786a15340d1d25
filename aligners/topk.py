"""Exact top-k similarity in bounded memory: both directions and the k-NN means of CSLS in one pass over blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from aligners.shortlist import UnitRows
from transfer.core.errors import TransferError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bfloat16", "float32"]
BLOCK_BYTES = 256 * 2**20
"""Memory that one block of similarities with its temporaries may take."""
BYTES_PER_PAIR = 48
"""Similarity, its transpose, partition and the temporaries of a sparse block, per pair."""
SMALL = 2**22
"""Pairs up to which a plain product is faster than shortlists."""
SPARE = 16
"""Partners that shortlists hold beyond those wanted; near-ties beyond that are searched in full."""


@dataclass(frozen=True)
class TopK:
    """The ``k`` best partners of every row and of every column, best first; ties go to the lower id."""

    row_ids: Int[np.ndarray, "n_src k"]
    row_scores: Float[np.ndarray, "n_src k"]
    col_ids: Int[np.ndarray, "n_tgt k"]
    col_scores: Float[np.ndarray, "n_tgt k"]
    recomputed: int = 0
    """Rows and columns whose shortlist left a doubt and that were searched in full."""


def topk_cosine(
    x: Float[np.ndarray, "n_src d"],
    y: Float[np.ndarray, "n_tgt d"],
    k: int,
    *,
    precision: Precision = "auto",
    device: str = "cpu",
) -> TopK:
    """Top-k cosine of every row of ``x`` with every row of ``y``, both directions from one pass over the pairs.

    The pass runs in bfloat16 where the processor has instructions for it, and in float32 otherwise, and only makes
    shortlists (``aligners.shortlist``). What can be among the best ``k`` is scored again pair by pair in float32
    (float64 for float64 rows), so that a score does not depend on where a pair stands, and permuting rows permutes
    the result. A list whose k-th score leaves a doubt is searched in full and counted (``aligners.rerank``).

    Memory beyond the inputs, which may be memory-mapped (float16, float32 or float64): 2·d·(n_tgt + 2,048) bytes (the
    target and a strip of the source in bfloat16; twice that in float32), 32 MiB for a tile of products (64 in
    float32), and ``110·(k + 16)·(n_src + n_tgt)`` bytes for the lists and their pairs: 1.2 GiB for 65,536² × 4,096 at
    k = 32. On another device than the processor, both inputs are held there in full precision as well.

    Time: 2·n_src·n_tgt·d FLOP, about 0.5 ns a pair for scanning it, and one gathered row for each pair scored again;
    131,072² × 1,024 takes a minute of one core with AMX, shared with other work. The scans are compiled when first
    used, which takes some seconds, and kept in numba's cache.

    Args:
        x: Source rows.
        y: Target rows.
        k: Partners to keep; cut to the number there is.
        precision: Of the pass; ``auto`` asks the processor.
        device: Of torch, such as ``cpu`` or ``cuda``.

    Raises:
        TransferError: When a row is zero or not finite, a side is empty, the widths differ or k < 1.
    """
    from aligners.rerank import both_topk, exact_rows

    source, target = UnitRows.of(x, "source"), UnitRows.of(y, "target")
    if x.shape[1] != y.shape[1]:
        raise TransferError(f"Cosine needs one width, got {x.shape[1]} and {y.shape[1]}.")
    _refuse(len(x), len(y), k)
    if len(x) * len(y) <= SMALL:
        rows = exact_rows(source, target, np.arange(len(x)), min(k, len(y)), device)
        cols = exact_rows(target, source, np.arange(len(y)), min(k, len(x)), device)
        return TopK(*rows, *cols)
    rows, cols, searched = both_topk(source, target, k, SPARE, fast_dtype(precision, device), device)
    return TopK(*rows, *cols, searched)


def fast_dtype(precision: Precision, device: str = "cpu") -> torch.dtype:
    """Type of the pass: bfloat16 where matrix or vector instructions for it exist, as torch reports them.

    Raises:
        TransferError: For an unknown precision.
    """
    import torch

    if precision not in ("auto", "bfloat16", "float32"):
        raise TransferError(f"Unknown precision {precision!r}.", "Use 'auto', 'bfloat16' or 'float32'.")
    if precision == "auto":
        able = torch.cpu.get_capabilities() if device == "cpu" else {"bf16": True}
        precision = "bfloat16" if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def neighbour_means(
    top: TopK, neighbours: int | None = None
) -> tuple[Float[np.ndarray, " n_src"], Float[np.ndarray, " n_tgt"]]:
    """Mean similarity to the nearest neighbours (all k of them if None), per row and per column: the r of CSLS."""
    return (
        top.row_scores[:, :neighbours].mean(axis=1, dtype=np.float64),
        top.col_scores[:, :neighbours].mean(axis=1, dtype=np.float64),
    )


def block_rows(n_tgt: int, budget: int = BLOCK_BYTES) -> int:
    """Source rows a block may hold so that it stays under ``budget`` bytes (at least one)."""
    return max(1, budget // (BYTES_PER_PAIR * max(n_tgt, 1)))


def topk_blocks(blocks: Iterable[tuple[int, np.ndarray]], shape: tuple[int, int], k: int) -> TopK:
    """Top-k of a similarity matrix that arrives in row blocks.

    Memory: the result (12·k bytes a row and a column at float32) plus what one block takes.

    Args:
        blocks: (first row, block [rows, n_tgt]) in order, covering every row once.
        shape: (n_src, n_tgt).
        k: Partners to keep; cut to the number there is.

    Raises:
        TransferError: For an empty matrix or k < 1.
    """
    n_src, n_tgt = shape
    _refuse(n_src, n_tgt, k)
    k_row, k_col = min(k, n_tgt), min(k, n_src)
    row_parts: list[tuple[np.ndarray, np.ndarray]] = []
    col_ids = np.empty((n_tgt, 0), dtype=np.int64)
    col_scores: np.ndarray | None = None
    for start, block in blocks:
        row_parts.append(_best(block, None, k_row))
        ids, scores = _best(np.ascontiguousarray(block.T), None, min(k_col, len(block)))
        if col_scores is None:
            col_ids, col_scores = ids + start, scores
        else:
            col_ids, col_scores = _best(np.hstack([col_scores, scores]), np.hstack([col_ids, ids + start]), k_col)
    assert col_scores is not None
    return TopK(
        row_ids=np.vstack([ids for ids, _ in row_parts]),
        row_scores=np.vstack([scores for _, scores in row_parts]),
        col_ids=col_ids,
        col_scores=col_scores,
    )


def _refuse(n_src: int, n_tgt: int, k: int) -> None:
    if k < 1 or not n_src or not n_tgt:
        raise TransferError(f"Top-k needs k ≥ 1 and features on both sides, got k = {k} and {n_src} × {n_tgt}.")


def _best(scores: np.ndarray, ids: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of the ``k`` best of every row, best first; of equal ones, those that stand first."""
    rows, columns = scores.shape
    k = min(k, columns)
    if k == 1:
        at = np.argmax(scores, axis=1)[:, None]
    else:
        reached = np.partition(scores, columns - k, axis=1)[:, columns - k]
        row, column = np.nonzero(scores >= reached[:, None])  # more than k where some are equal to the k-th
        order = np.lexsort((column, -scores[row, column], row))
        at = column[order[np.searchsorted(row, np.arange(rows))[:, None] + np.arange(k)]]
    chosen = at.astype(np.int64) if ids is None else np.take_along_axis(ids, at, axis=1)
    return chosen, np.take_along_axis(scores, at, axis=1)


def inner_blocks(
    x: Float[np.ndarray, "n_src d"],
    y: Float[np.ndarray, "n_tgt d"],
    row_shift: Float[np.ndarray, " n_src"] | None = None,
    col_shift: Float[np.ndarray, " n_tgt"] | None = None,
    budget: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Float[np.ndarray, "block n_tgt"]]]:
    """Inner products block by block; with shifts, CSLS: ``2·x·y − row_shift − col_shift`` (Eq. 1 of 1710.04087)."""
    step = block_rows(len(y), budget)
    for start in range(0, len(x), step):
        block = x[start : start + step] @ y.T
        if row_shift is not None and col_shift is not None:
            block *= 2
            block -= row_shift[start : start + step, None]
            block -= col_shift
        yield start, block


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length one.

    Raises:
        TransferError: When a row is zero.
    """
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.all(length > 0):
        raise TransferError(f"Row {int(np.argmin(length))} is zero and has no direction.", "Leave dead features out.")
    return x / length

"""Exact top-k similarity in bounded memory: both directions and the k-NN means of CSLS in one pass over blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from transfer.core.errors import TransferError

BLOCK_BYTES = 256 * 2**20
"""Memory that one block of similarities with its temporaries may take."""
BYTES_PER_PAIR = 48
"""Similarity, its transpose, argpartition indices and the temporaries of a sparse block, per pair."""


@dataclass(frozen=True)
class TopK:
    """The ``k`` best partners of every row and of every column, best first; ties go to the lower id."""

    row_ids: Int[np.ndarray, "n_src k"]
    row_scores: Float[np.ndarray, "n_src k"]
    col_ids: Int[np.ndarray, "n_tgt k"]
    col_scores: Float[np.ndarray, "n_tgt k"]


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
    if k < 1 or not n_src or not n_tgt:
        raise TransferError(f"Top-k needs k ≥ 1 and features on both sides, got k = {k} and {n_src} × {n_tgt}.")
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


def _best(scores: np.ndarray, ids: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of the ``k`` best of every row, best first."""
    k = min(k, scores.shape[1])
    if k == 1:
        at = np.argmax(scores, axis=1)[:, None]
    else:
        at = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k < scores.shape[1] else _all_columns(scores)
        at = np.sort(at, axis=1)
        order = np.argsort(-np.take_along_axis(scores, at, axis=1), axis=1, kind="stable")
        at = np.take_along_axis(at, order, axis=1)
    chosen = at.astype(np.int64) if ids is None else np.take_along_axis(ids, at, axis=1)
    return chosen, np.take_along_axis(scores, at, axis=1)


def _all_columns(scores: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)


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


def topk_cosine(
    x: Float[np.ndarray, "n_src d"], y: Float[np.ndarray, "n_tgt d"], k: int, budget: int = BLOCK_BYTES
) -> TopK:
    """Exact top-k cosine of every row of ``x`` with every row of ``y``, both directions in one pass.

    Memory: unit copies of both inputs, the result, and at most ``budget`` bytes for the running block.

    Raises:
        TransferError: When a row is zero or the widths differ.
    """
    if x.shape[1] != y.shape[1]:
        raise TransferError(f"Cosine needs one width, got {x.shape[1]} and {y.shape[1]}.")
    return topk_blocks(inner_blocks(unit_rows(x), unit_rows(y), budget=budget), (len(x), len(y)), k)


def neighbour_means(top: TopK) -> tuple[Float[np.ndarray, " n_src"], Float[np.ndarray, " n_tgt"]]:
    """Mean similarity to the k nearest neighbours, per row and per column: the r of CSLS."""
    return top.row_scores.mean(axis=1), top.col_scores.mean(axis=1)


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length one.

    Raises:
        TransferError: When a row is zero.
    """
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.all(length > 0):
        raise TransferError(f"Row {int(np.argmin(length))} is zero and has no direction.", "Leave dead features out.")
    return x / length

"""From similarities to pairs: mutual nearest neighbours, or one-to-one by linear assignment on small problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.base import match_columns
from aligners.topk import TopK, topk_blocks
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError

Rule = Literal["mutual", "one_to_one"]
DENSE_LIMIT = 4096
"""Features a side that dense assignment and dense transport accept."""


def mutual_nearest(top: TopK) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Pairs of row and column that are each other's best."""
    rows = np.arange(len(top.row_ids))
    best = top.row_ids[:, 0]
    keep = top.col_ids[best, 0] == rows
    return rows[keep], best[keep]


def counterparts(alignment: Alignment) -> Alignment:
    """Every feature with its best partner in the coupling, either way round; several may share one.

    Mutual matches say which features correspond; this says where to go from a feature that has no mutual match, as
    carrying a list of features to another model needs. Scored anew by ``aligners.calibrate.score_matches``.
    """
    coupling = sp.csr_matrix(alignment.coupling)
    coupling.eliminate_zeros()
    pairs: set[tuple[int, int]] = set()
    for matrix, flip in ((coupling, False), (sp.csr_matrix(coupling.T), True)):
        best = np.asarray(matrix.argmax(axis=1)).ravel()
        for i in np.flatnonzero(np.diff(matrix.indptr)):
            pairs.add((int(best[i]), int(i)) if flip else (int(i), int(best[i])))
    src, tgt = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
    score = np.asarray(coupling[src, tgt], dtype=np.float64).ravel() if len(src) else np.empty(0)
    return dataclasses.replace(
        alignment, method=f"{alignment.method}-best", matches=match_columns(src, tgt, score), null_corr=None
    )


def one_to_one(
    similarity: Float[np.ndarray, "n_src n_tgt"], floor: float = 0.0
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The one-to-one pairs with the largest total similarity; pairs at or below ``floor`` stay unmatched.

    Clipping at the floor makes an unwanted pair worth as much as no pair, so the partial optimum is exact.

    Raises:
        TransferError: Above ``DENSE_LIMIT`` features a side (scipy takes about 20 bytes a pair).
    """
    from scipy.optimize import linear_sum_assignment

    if max(similarity.shape) > DENSE_LIMIT:
        raise TransferError(
            f"One-to-one assignment takes at most {DENSE_LIMIT} features a side, got {similarity.shape}.",
            "Use the mutual rule, or raise min_support so that fewer features are testable.",
        )
    rows, cols = linear_sum_assignment(np.maximum(similarity, floor), maximize=True)
    keep = similarity[rows, cols] > floor
    return rows[keep], cols[keep]


def select(
    blocks: Iterator[tuple[int, np.ndarray]], shape: tuple[int, int], rule: Rule
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Pairs from a similarity matrix that arrives in row blocks.

    Raises:
        TransferError: For an unknown rule, or when ``one_to_one`` is asked of too many features.
    """
    if rule == "mutual":
        return mutual_nearest(topk_blocks(blocks, shape, 1))
    if rule != "one_to_one":
        raise TransferError(f"Unknown matching rule {rule!r}.", "Use 'mutual' or 'one_to_one'.")
    if max(shape) > DENSE_LIMIT:
        return one_to_one(np.broadcast_to(0.0, shape))
    return one_to_one(np.vstack([block for _, block in blocks]), floor=-np.inf)

"""Hubness-corrected neighbours (CSLS) from top-k lists, with a certificate instead of a second pass over all pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from aligners.topk import TopK, neighbour_means


@dataclass(frozen=True)
class CslsNearest:
    """The best partner of every row and column by ``2·cos(x, y) − r(x) − r(y)`` (arXiv 1710.04087)."""

    row_ids: Int[np.ndarray, " n_src"]
    row_scores: Float[np.ndarray, " n_src"]
    row_sure: Bool[np.ndarray, " n_src"]
    """No pair outside the lists can score higher."""
    col_ids: Int[np.ndarray, " n_tgt"]
    col_scores: Float[np.ndarray, " n_tgt"]
    col_sure: Bool[np.ndarray, " n_tgt"]

    def mutual(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Pairs that are each other's best."""
        rows = np.arange(len(self.row_ids))
        keep = self.col_ids[self.row_ids] == rows
        return rows[keep], self.row_ids[keep]


def csls_nearest(top: TopK, neighbours: int = 10) -> CslsNearest:
    """Best CSLS partners among the pairs that stand in a row's or a column's list.

    A pair in no list has a cosine of at most the last of its row's list and of its column's list. For a row with last
    value s, target j can therefore reach at most ``2·min(s, c_j) − r_j`` (without the row's own mean), where c_j is the
    last value and r_j the mean of j's list. A row whose best listed partner reaches the maximum of this over all j is
    sure; the others are told, not guessed away. The bound of all rows costs two sorts.

    Args:
        top: Both directions, with at least ``neighbours`` partners (fewer only where a side has fewer).
        neighbours: In the means r.
    """
    r_row, r_col = neighbour_means(top, neighbours)
    n_src, k_row = top.row_ids.shape
    n_tgt, k_col = top.col_ids.shape
    rows = np.concatenate([np.repeat(np.arange(n_src), k_row), top.col_ids.ravel()])
    cols = np.concatenate([top.row_ids.ravel(), np.repeat(np.arange(n_tgt), k_col)])
    cosine = np.concatenate([top.row_scores.ravel(), top.col_scores.ravel()]).astype(np.float64)
    row_last = np.where(k_row < n_tgt, top.row_scores[:, -1], -np.inf)  # a list of all partners leaves nothing out
    col_last = np.where(k_col < n_src, top.col_scores[:, -1], -np.inf)
    row_ids, row_best = _best(rows, cols, 2 * cosine - r_col[cols], n_src)
    col_ids, col_best = _best(cols, rows, 2 * cosine - r_row[rows], n_tgt)
    return CslsNearest(
        row_ids,
        row_best - r_row,
        row_best > _bound(row_last, col_last, r_col),
        col_ids,
        col_best - r_col,
        col_best > _bound(col_last, row_last, r_row),
    )


def _best(owner: np.ndarray, partner: np.ndarray, score: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Best partner of each owner, the lower id where scores are equal."""
    order = np.lexsort((partner, -score, owner))
    first = order[np.searchsorted(owner[order], np.arange(n))]
    return partner[first], score[first]


def _bound(last: np.ndarray, other_last: np.ndarray, other_mean: np.ndarray) -> np.ndarray:
    """``max over j of 2·min(last_i, other_last_j) − other_mean_j`` for every i."""
    order = np.argsort(other_last)
    below = np.maximum.accumulate(2 * other_last[order] - other_mean[order])
    above = np.minimum.accumulate(other_mean[order][::-1])[::-1]
    at = np.searchsorted(other_last[order], last, side="right")
    bound = np.where(at > 0, below[np.maximum(at - 1, 0)], -np.inf)
    reach = 2 * last - above[np.minimum(at, len(order) - 1)]
    return np.maximum(bound, np.where(at < len(order), reach, -np.inf))

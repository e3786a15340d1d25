"""Partial one-to-one assignment along candidate edges, with the graph tools it shares with transport along edges."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from transfer.core.errors import TransferError

WORTHWHILE = 0.005
"""Settling goes on while a round settles at least this share of the rows left; the simplex does the rest faster."""


def extent(matrix: Any) -> tuple[int, int]:
    """Rows and columns."""
    return int(matrix.shape[0]), int(matrix.shape[1])


class Edges:
    """Index arrays of a canonical CSR matrix, for reductions by row and by column: 16 bytes an edge."""

    def __init__(self, matrix: sp.csr_matrix) -> None:
        self.shape: tuple[int, int] = extent(matrix)
        self.cols = matrix.indices
        self.row_degree = np.diff(matrix.indptr)
        self.col_degree = np.bincount(self.cols, minlength=self.shape[1])
        self.rows = np.repeat(np.arange(self.shape[0], dtype=self.cols.dtype), self.row_degree)
        self.order = np.argsort(self.cols, kind="stable")
        """Edges in column order."""
        self._row_starts = matrix.indptr[:-1][self.row_degree > 0]
        self._col_starts = (np.cumsum(self.col_degree) - self.col_degree)[self.col_degree > 0]

    def by_row(self, reduce: np.ufunc, values: Float[np.ndarray, " edges"], empty: float) -> np.ndarray:
        """``reduce`` over the edges of every row; ``empty`` for rows without an edge."""
        out = np.full(self.shape[0], empty)
        if len(values):
            out[self.row_degree > 0] = reduce.reduceat(values, self._row_starts)
        return out

    def by_col(self, reduce: np.ufunc, values: Float[np.ndarray, " edges"], empty: float) -> np.ndarray:
        """``reduce`` over the edges of every column; ``empty`` for columns without an edge."""
        out = np.full(self.shape[1], empty)
        if len(values):
            out[self.col_degree > 0] = reduce.reduceat(values[self.order], self._col_starts)
        return out


def checked_edges(matrix: Any, what: str) -> sp.csr_matrix:
    """A CSR copy in float32 or float64 with sorted indices; stored zeros stay, for a pair of value 0 is a candidate.

    Raises:
        TransferError: For a matrix that is not sparse, has no rows or columns, holds a value that is not finite, or
            lists a pair twice.
    """
    if not sp.issparse(matrix) or matrix.ndim != 2:
        raise TransferError(f"{what} must be a sparse matrix of candidate edges, got {type(matrix).__name__}.")
    if 0 in matrix.shape:
        raise TransferError(f"{what} is empty: {matrix.shape[0]} × {matrix.shape[1]} features.")
    csr = sp.csr_matrix(matrix, dtype=matrix.dtype if matrix.dtype == np.float32 else np.float64, copy=True)
    if not np.isfinite(csr.data).all():
        raise TransferError(
            f"{what} holds {int((~np.isfinite(csr.data)).sum())} values that are NaN or infinite.",
            "Leave such pairs out of the candidate graph.",
        )
    listed = csr.nnz
    csr.sum_duplicates()  # also sorts
    if csr.nnz != listed:
        raise TransferError(f"{what} lists {listed - csr.nnz} pairs more than once.", "Merge them first.")
    return csr


def cheapest_flow(
    rows: Int[np.ndarray, " edges"],
    cols: Int[np.ndarray, " edges"],
    cost: Float[np.ndarray, " edges"],
    supply: Float[np.ndarray, " n"],
    demand: Float[np.ndarray, " m"],
    *,
    slack: float | None,
    max_iter: int,
) -> tuple[sp.coo_array, Float[np.ndarray, " n"], Float[np.ndarray, " m"], bool]:
    """Exact transport along edges by POT's sparse network simplex; every row and column must have an edge.

    With ``slack``, a dummy row and a dummy column take what stays unmatched, for ``slack / 2`` a unit, and share a
    free edge for what is not needed of either. A vertex of the feasible set comes back, so integer masses give
    integer flows. Memory: about 300 bytes an edge.

    Returns:
        The flow [n, m], both potentials (relative to the dummies), and whether the optimum was reached.

    Raises:
        TransferError: When the edges cannot carry the masses; POT returns an empty plan and a warning then.
    """
    os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")  # POT would import torch otherwise: seconds
    import ot

    n, m = len(supply), len(demand)
    if slack is not None:
        rows = np.concatenate([rows, np.arange(n), np.full(m, n), [n]])
        cols = np.concatenate([cols, np.full(n, m), np.arange(m), [m]])
        cost = np.concatenate([cost, np.full(n + m, slack / 2), [0.0]])
        supply, demand = np.append(supply, demand.sum()), np.append(demand, supply.sum())
    graph = sp.coo_array((cost, (rows, cols)), shape=(len(supply), len(demand)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # judged below
        solved: Any = ot.emd(supply, demand, graph, numItermax=max_iter, log=True, center_dual=False)
    flow, log = solved
    stopped = log["result_code"] == 3
    if not stopped and not (log["result_code"] == 1 and np.isclose(flow.sum(), supply.sum(), rtol=1e-6)):
        raise TransferError(
            f"No plan along the {len(cost)} edges carries all the mass ({log['warning']}).",
            "Allow features to stay unmatched (slack), or keep more candidates.",
        )
    f, g = np.asarray(log["u"], dtype=np.float64), np.asarray(log["v"], dtype=np.float64)
    if slack is not None:
        f, g = f[:n] + g[m], g[:m] + f[n]
        real = (flow.row < n) & (flow.col < m)
        flow = sp.coo_array((flow.data[real], (flow.row[real], flow.col[real])), shape=(n, m))
    return flow, f, g, not stopped


def sparse_one_to_one(
    similarity: sp.csr_matrix, floor: float = 0.0
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """The one-to-one pairs among the candidates with the largest total of ``similarity − floor``; exact.

    Pairs at or below ``floor`` stay unmatched, so the matching is partial and always exists. First, an edge that
    gains no less than the best other edges of its two ends together is settled, which loses nothing; what remains goes
    to the network simplex. Where two matchings tie, the lower source id, then the lower target id, is settled
    first and the simplex picks by edge order, so ties (and only they) can depend on the order of the features.

    Memory: about 250 bytes an edge above the floor (1.1 GB at 131,072 features with 32 such edges each).

    Args:
        similarity: Candidate edges [n_src, n_tgt]; stored zeros are candidates of similarity 0.
        floor: Below what a pair is not wanted.

    Returns:
        Source and target ids of the pairs, by source id.

    Raises:
        TransferError: For bad edges (``checked_edges``) or a floor that is not finite.
    """
    if not np.isfinite(floor):
        raise TransferError(f"The floor of an assignment must be a finite number, got {floor}.")
    gain = sp.csr_matrix(checked_edges(similarity, "The similarity"), dtype=np.float64)
    gain.data -= floor
    gain.data[gain.data <= 0] = 0
    gain.eliminate_zeros()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while gain.nnz:
        rows, cols = _settled(gain)
        found.append((rows, cols))
        before = int((np.diff(gain.indptr) > 0).sum())
        gain = _without(gain, rows, cols)
        if len(rows) < WORTHWHILE * before or not len(rows):
            break
    if gain.nnz:
        found.append(_simplex(gain))
    rows = np.concatenate([r for r, _ in found] or [np.empty(0, dtype=np.int64)])
    cols = np.concatenate([c for _, c in found] or [np.empty(0, dtype=np.int64)])
    order = np.argsort(rows)
    return rows[order].astype(np.int64), cols[order].astype(np.int64)


def _settled(gain: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Edges that some best matching contains.

    Take a best matching without edge (i, j): dropping the edges it has at i and at j loses at most the best other
    gain of i plus that of j; if (i, j) gains as much, the exchange is no loss. Settled edges share no feature, and
    settling one only shrinks what the others could lose, so a round may settle all of them.
    """
    edges = Edges(gain)
    by_row = _top_two(gain.data, edges.rows, edges.by_row)
    by_col = _top_two(gain.data, edges.cols, edges.by_col)
    best = by_row[0][by_row[0] >= 0]
    rows, cols = edges.rows[best], edges.cols[best]
    keep = (by_col[0][cols] == best) & (gain.data[best] >= by_row[1][rows] + by_col[1][cols])
    return rows[keep], cols[keep]


def _top_two(values: np.ndarray, ids: np.ndarray, reduce: Any) -> tuple[np.ndarray, np.ndarray]:
    """First largest edge of every feature (−1 without edges), and the largest value among its others (0 without)."""
    largest = reduce(np.maximum, values, 0.0)
    at = np.flatnonzero(values == largest[ids])
    first = np.full(len(largest), -1, dtype=np.int64)
    first[ids[at[::-1]]] = at[::-1]  # the last write wins: the lowest edge
    others = values.copy()
    others[first[first >= 0]] = 0
    return first, reduce(np.maximum, others, 0.0)


def _without(gain: sp.csr_matrix, rows: np.ndarray, cols: np.ndarray) -> sp.csr_matrix:
    """The graph without these features, ids unchanged."""
    row_free, col_free = (np.ones(size, dtype=bool) for size in extent(gain))
    row_free[rows], col_free[cols] = False, False
    keep = np.repeat(row_free, np.diff(gain.indptr)) & col_free[gain.indices]
    indptr = np.concatenate([[0], np.cumsum(keep)])[gain.indptr]
    return sp.csr_matrix((gain.data[keep], gain.indices[keep], indptr), shape=gain.shape)


def _simplex(gain: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """The best matching of what is left: a transport of one unit a feature that may stay for nothing."""
    graph = gain.tocoo()
    rows, i = np.unique(graph.row, return_inverse=True)
    cols, j = np.unique(graph.col, return_inverse=True)
    flow, _, _, done = cheapest_flow(
        i,
        j,
        np.negative(graph.data),
        np.ones(len(rows)),
        np.ones(len(cols)),
        slack=0.0,
        max_iter=np.iinfo(np.int32).max,
    )
    if not done:
        raise TransferError(
            f"The assignment of {len(rows)} × {len(cols)} features did not finish.",
            "Raise the floor or keep fewer candidates.",
        )
    taken = flow.data > 0.5
    return rows[flow.row[taken]], cols[flow.col[taken]]

"""Partial one-to-one assignment on a candidate graph: features per second against scipy's sparse and dense solvers.

The graph is hard on purpose: 60 % of the sources have a true partner whose score overlaps with the chance ones, targets
are hub-skewed, and the floor lies below most edges, so that one component holds nearly everything.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from aligners.sparse_assignment import Edges, extent, sparse_one_to_one
from tests.benchmarks.case import measure, row, seconds, watched

FLOOR = 0.1
COPY_BYTES = 256 * 2**20


def candidates(n: int, degree: int, seed: int = 0) -> sp.csr_matrix:
    """Similarities [n, n] with about ``degree`` candidates a row, float32."""
    rng = np.random.default_rng(seed)
    shared = np.flatnonzero(rng.uniform(size=n) < 0.6)
    weight = np.arange(1, n + 1) ** -0.3
    rows = np.concatenate([shared, np.repeat(np.arange(n), degree)])
    cols = np.concatenate([rng.permutation(n)[shared], rng.choice(n, n * degree, p=weight / weight.sum())])
    values = np.concatenate([rng.normal(0.6, 0.12, len(shared)), rng.normal(0.35, 0.08, n * degree)])
    first = np.unique(rows * n + cols, return_index=True)[1]
    return sp.csr_matrix((values[first].astype(np.float32), (rows[first], cols[first])), shape=(n, n))


def bandwidth() -> float:
    """Bytes per second of a copy, read and write counted; the best of three."""
    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    return 2 * COPY_BYTES / min(seconds(lambda: np.copyto(target, source)) for _ in range(3))


def one_pass(graph: sp.csr_matrix) -> float:
    """Seconds to see every edge once from both of its ends, which no exact method can do without."""

    def work() -> None:
        edges = Edges(graph)
        edges.by_row(np.maximum, graph.data, 0.0)
        edges.by_col(np.maximum, graph.data, 0.0)

    return min(seconds(work) for _ in range(3))


def total(graph: sp.csr_matrix, rows: np.ndarray, cols: np.ndarray, floor: float) -> float:
    """What an assignment gains above the floor."""
    return float((np.asarray(graph[rows, cols], dtype=np.float64) - floor).sum())


def one_block(graph: sp.csr_matrix, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """The peer: scipy's sparse matching of the whole graph, a private dummy column for every row."""
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n, m = extent(graph)
    top = float(graph.data.max()) + 1
    cost = sp.hstack([graph.astype(np.float64), sp.identity(n, format="csr") * floor], format="csr")
    cost.data = top - cost.data
    rows, cols = min_weight_full_bipartite_matching(cost)
    return rows[cols < m], cols[cols < m]


def partial(n: int, degree: int) -> None:
    """Ours against one block of scipy, once each, and both totals; the limit is one pass over the edges."""
    graph = candidates(n, degree)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    ours = watched(lambda: found.append(sparse_one_to_one(graph, FLOOR)))
    peer = seconds(lambda: found.append(one_block(graph, FLOOR)))
    row(
        f"assign.partial-{n}", n / ours, "scipy sparse matching, one block", n / peer, "features/s", n / one_pass(graph)
    )
    gains = [total(graph, *pairs, FLOOR) for pairs in found]
    row(f"assign.partial-{n}.total", gains[0], "scipy sparse matching, one block", gains[1], "gain", gains[1])


def exact(n: int, degree: int) -> None:
    """Ours against scipy's dense assignment of the same graph, and both totals."""
    from scipy.optimize import linear_sum_assignment

    graph = candidates(n, degree)
    edges = graph.tocoo()
    dense = np.zeros((n, n))
    dense[edges.row, edges.col] = np.maximum(edges.data.astype(np.float64) - FLOOR, 0)
    taken = measure(
        {
            "ours": lambda: sparse_one_to_one(graph, FLOOR),
            "peer": lambda: linear_sum_assignment(dense, maximize=True),
        },
        rounds=1,
    )
    words = "scipy linear_sum_assignment, dense"
    row(f"assign.exact-{n}", n / taken["ours"], words, n / taken["peer"], "features/s", n / one_pass(graph))
    best = float(dense[linear_sum_assignment(dense, maximize=True)].sum())
    row(f"assign.exact-{n}.total", total(graph, *sparse_one_to_one(graph, FLOOR), FLOOR), words, best, "gain", best)


def main() -> None:
    """Totals equal at 4,096 and 8,192; 131,072 features with 32 candidates each (scipy's block takes minutes)."""
    exact(4096, 32)
    exact(8192, 32)
    partial(131072, 32)

"""How far a plan is from the best one: a feasible plan above the optimum, feasible potentials below it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.sparse.linalg import cg
from scipy.special import kl_div

from aligners.transport import Problem, Transport
from transfer.core.errors import TransferError

NEWTON = 8
"""Newton steps at most when a balanced plan is made feasible."""
ROUNDING = 1e-12
"""Share of a unit of mass that counts as float64 rounding."""


def relative_gap(primal: float, dual: float) -> float:
    """(primal − dual) / |primal|; infinite without a feasible plan, and never below zero by rounding."""
    if not np.isfinite(primal):
        return float("inf")
    return max(0.0, primal - dual) / max(abs(primal), 1e-300)


def account(
    problem: Problem,
    mass: np.ndarray,
    slacks: tuple[np.ndarray, ...],
    want: tuple[np.ndarray, ...],
    g: np.ndarray,
    *,
    reg: float,
    n_iter: int,
    done: bool,
    tol: float,
) -> Transport:
    """Errors of the plan as it is, value of the plan made feasible, value of the potentials made feasible."""
    edges, given = problem.edges, (problem.source_mass, problem.target_mass)
    sums = edges.by_row(np.add, mass, 0.0), edges.by_col(np.add, mass, 0.0)
    errors = [float(np.abs(sums[k] + slacks[k] - want[k]).sum() / given[k].sum()) for k in (0, 1)]
    if problem.kl is not None:
        slacks = tuple(np.maximum(given[k] - sums[k], 0) for k in (0, 1))
    f, g = tightened(problem, g)
    primal, dual = primal_value(problem, mass), dual_value(problem, f, g)
    coupling = sp.csr_matrix((mass, edges.cols.copy(), problem.cost.indptr.copy()), shape=problem.cost.shape)
    coupling.eliminate_zeros()
    return Transport(
        coupling=coupling,
        row_slack=slacks[0],
        col_slack=slacks[1],
        row_potential=f,
        col_potential=g,
        kind=problem.kind,
        reg=reg,
        n_iter=n_iter,
        converged=done and max(errors) <= tol,
        row_error=errors[0],
        col_error=errors[1],
        primal=primal,
        dual=dual,
        relative_gap=relative_gap(primal, dual),
    )


def tightened(
    problem: Problem, g: Float[np.ndarray, " n_tgt"]
) -> tuple[Float[np.ndarray, " n_src"], Float[np.ndarray, " n_tgt"]]:
    """Feasible potentials on the support: the largest f for this g, then the largest g for that f."""
    edges, cost = problem.edges, problem.cost.data
    g = np.minimum(g, problem.ceiling)
    f = np.minimum(edges.by_row(np.minimum, cost - g[edges.cols], np.inf), problem.ceiling)
    return f, np.minimum(edges.by_col(np.minimum, cost - f[edges.rows], np.inf), problem.ceiling)


def dual_value(problem: Problem, f: np.ndarray, g: np.ndarray) -> float:
    """Value of feasible potentials."""
    a, b, kl = problem.source_mass, problem.target_mass, problem.kl
    if kl is not None:
        return float(-kl * (a @ np.expm1(-f / kl) + b @ np.expm1(-g / kl)))
    return float(a @ f + b @ g)


def primal_value(problem: Problem, mass: np.ndarray) -> float:
    """Value of the plan made feasible; infinite when that fails."""
    edges, a, b = problem.edges, problem.source_mass, problem.target_mass
    if problem.kl is None:
        # Never more than the marginals: rows first, then columns (Altschuler et al., arXiv 1705.09634, Alg. 2).
        mass = mass * _shrink(a, edges.by_row(np.add, mass, 0.0))[edges.rows]
        mass *= _shrink(b, edges.by_col(np.add, mass, 0.0))[edges.cols]
        if problem.slack is None:
            mass = _completed(problem, mass)
    if not np.isfinite(mass).all():
        return float("inf")
    row, col, value = edges.by_row(np.add, mass, 0.0), edges.by_col(np.add, mass, 0.0), float(mass @ problem.cost.data)
    if problem.slack is not None:
        return value + problem.slack / 2 * float((a - row).sum() + (b - col).sum())
    if problem.kl is not None:
        return value + problem.kl * float(kl_div(row, a).sum() + kl_div(col, b).sum())
    return value


def _shrink(mass: np.ndarray, carried: np.ndarray) -> np.ndarray:
    return np.divide(mass, carried, out=np.ones_like(mass), where=carried > mass)


def _completed(problem: Problem, mass: np.ndarray) -> np.ndarray:
    """Place what a rounded balanced plan leaves over, first in proportion to its masses, then exactly; NaN on failure.

    The first part is damped Newton steps, P ← P∘(1 + x_i + y_j) with the marginals linear in x and y.
    """
    edges, n = problem.edges, len(problem.source_mass)
    for _ in range(NEWTON):
        row, col = edges.by_row(np.add, mass, 0.0), edges.by_col(np.add, mass, 0.0)
        need = np.concatenate([problem.source_mass - row, problem.target_mass - col])
        if not (row.all() and col.all()) or np.abs(need).max() <= ROUNDING * row.mean():
            break  # a feature whose every edge underflowed, or nothing to do
        plan = sp.csr_matrix((mass, edges.cols, problem.cost.indptr), shape=problem.cost.shape)
        sums = np.concatenate([row, col])
        system = sp.diags(sums) + sp.bmat([[None, plan], [plan.T, None]])
        x, _ = cg(sp.csr_matrix(system), need, rtol=1e-11, maxiter=200, M=sp.diags(1 / sums))
        change = x[edges.rows] + x[n + edges.cols]
        step = min(1.0, 0.9 / max(-float(change.min()), 1e-300))
        mass = mass * (1 + step * change)
        if step == 1:
            break
    return _routed(problem, mass)


def _routed(problem: Problem, mass: np.ndarray) -> np.ndarray:
    """Send what is left over along the spanning forest of the heaviest edges, leaves first; NaN on failure."""
    edges, (n, m) = problem.edges, problem.edges.shape
    need = np.concatenate(
        [
            problem.source_mass - edges.by_row(np.add, mass, 0.0),
            problem.target_mass - edges.by_col(np.add, mass, 0.0),
        ]
    )
    weight = 1 + np.log(mass.max() / np.maximum(mass, 1e-300))  # positive, and the forest takes the lightest
    graph = sp.csr_matrix((weight, (edges.rows, edges.cols + n)), shape=(n + m, n + m))
    forest = sp.csr_matrix(minimum_spanning_tree(graph), copy=True)
    _, part = connected_components(forest, directed=False)
    roots = np.unique(part, return_index=True)[1]
    hub = n + m  # joined to one feature of every part, so that one traversal orders them all
    forest.resize((hub + 1, hub + 1))
    forest += sp.csr_matrix((np.ones(len(roots)), (np.full(len(roots), hub), roots)), shape=forest.shape)
    order, parent = breadth_first_order(forest, hub, directed=False)
    above, left = parent.tolist(), [*need.tolist(), 0.0]
    for node in order[:0:-1].tolist():
        if above[node] != hub:
            left[above[node]] -= left[node]
    sent = np.asarray(left[:hub])
    child = np.setdiff1d(np.arange(hub), roots)
    ends = np.sort(np.stack([child, parent[child]]), axis=0).astype(np.int64)
    key = edges.rows.astype(np.int64) * m + edges.cols
    out = mass.copy()
    out[np.searchsorted(key, ends[0] * m + ends[1] - n)] += sent[child]
    # A part whose two sides differ in mass has no plan; an edge may carry less than before, but not less than nothing.
    unit = float(problem.source_mass.mean())
    failed = np.abs(sent[roots]).max() > ROUNDING * unit * (n + m) or out.min() < -ROUNDING * unit
    return np.full_like(mass, np.nan) if failed else np.maximum(out, 0)


@dataclass(frozen=True)
class Certificate:
    """What a plan is worth in the problem over all pairs, candidates or not."""

    primal: float
    """Of the plan, which is feasible there too."""
    dual: float
    """Of potentials that are feasible for every pair."""
    relative_gap: float
    violated: int
    """Pairs that would have been cheaper than the plan's own potentials allow; 0 when no candidate was missed."""
    row_potential: Float[np.ndarray, " n_src"]
    """f, feasible for every pair with the plan's column potential."""


def certify_all_pairs(problem: Problem, plan: Transport, blocks: Iterable[tuple[int, np.ndarray]]) -> Certificate:
    """Bound the cost of the plan against the best plan over *all* pairs, in one pass over the full cost.

    The column potential stays, every row's becomes the largest that no pair forbids: f_i = min(h, min_j c_ij − g_j).
    That is feasible for the problem with all pairs, so its dual value is a lower bound of that problem's optimum. A
    poor candidate graph shows as a large gap and in ``violated``.

    Memory: 17 bytes a pair of one block.

    Args:
        problem: The problem that the plan solves; its costs must be those of the blocks on the candidate edges.
        plan: From ``sparse_sinkhorn`` or ``exact_transport``.
        blocks: (first row, costs [rows, n_tgt]) in order, covering every row once.

    Raises:
        TransferError: When the blocks do not cover the rows in order, or hold a NaN.
    """
    n, m = problem.edges.shape
    f = np.empty(n)
    at = violated = 0
    slop = 1e-6 * float(np.abs(problem.cost.data).max(initial=1.0))  # float32 costs round; that violates nothing
    for start, block in blocks:
        stop = start + len(block)
        if start != at or block.ndim != 2 or block.shape[1] != m or stop > n:
            raise TransferError(
                f"Cost block [{start}:{stop}] of shape {block.shape} does not continue at row {at} of {n} × {m}."
            )
        room = block - plan.col_potential
        least = room.min(axis=1)
        if np.isnan(least).any():
            raise TransferError(f"The costs of rows {start} to {stop - 1} hold NaN.")
        violated += int((room < plan.row_potential[start:stop, None] - slop).sum())
        f[start:stop] = np.minimum(least, problem.ceiling)
        at = stop
    if at != n:
        raise TransferError(f"The cost blocks end at row {at} of {n}.")
    dual = dual_value(problem, f, plan.col_potential)
    return Certificate(plan.primal, dual, relative_gap(plan.primal, dual), violated, f)

"""Optimal transport along candidate edges, and a certificate of how far a plan is from the best one.

One problem, three ways to treat mass that finds no partner: ``balanced`` (all of it must move along the edges),
``slack`` (a unit may stay unmatched for half of ``slack``) and ``unbalanced`` (marginals may be missed at the price of
a Kullback-Leibler divergence). Two solvers: entropic Sinkhorn iterations, and the exact network simplex of POT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.sparse.linalg import cg
from scipy.special import kl_div

from aligners.sparse_assignment import Edges, cheapest_flow, checked_edges, extent
from transfer.core.errors import TransferError

Kind = Literal["balanced", "slack", "unbalanced"]
START = 0.1
"""First temperature of the annealing, as a share of the spread of the costs that matter."""
STAGE_TOL = 1e-2
"""Marginal error at which an intermediate temperature is left."""
RANGE = 15.0
"""Scalings beyond e^±RANGE are absorbed into the potentials; float32 products stay normal numbers up to there."""
FLUSH = 1e-25
"""Kernel entries below this count as zero: even scaled by e^(2·RANGE) they carry no mass, and denormals are slow."""
FAR = 50.0
"""A potential of FAR·kl is infinite for the divergence: e^−50 is below float64 resolution."""
NEWTON = 8
"""Newton steps at most when a balanced plan is made feasible."""
ROUNDING = 1e-12
"""Share of a unit of mass that counts as float64 rounding."""
COLDEST = 1e-7
"""Temperature, as a share of the spread of costs, below which annealing for a gap gives up."""


def edge_costs(similarity: sp.csr_matrix) -> sp.csr_matrix:
    """``1 − similarity`` on the same edges, explicit zeros included.

    Raises:
        TransferError: As ``checked_edges``.
    """
    cost = checked_edges(similarity, "The similarity")
    np.subtract(1, cost.data, out=cost.data)
    return cost


@dataclass(frozen=True)
class Problem:
    """What is to be moved, along which edges, at which cost; build it with ``Problem.of``."""

    cost: sp.csr_matrix
    source_mass: Float[np.ndarray, " n_src"]
    target_mass: Float[np.ndarray, " n_tgt"]
    slack: float | None
    kl: float | None

    @classmethod
    def of(
        cls,
        cost: sp.csr_matrix,
        *,
        slack: float | None = None,
        kl: float | None = None,
        source_mass: Float[np.ndarray, " n_src"] | None = None,
        target_mass: Float[np.ndarray, " n_tgt"] | None = None,
    ) -> Problem:
        """Check and complete a problem.

        Args:
            cost: Candidate edges [n_src, n_tgt]; stored zeros are edges of cost 0. Sinkhorn computes its kernel in
                this matrix's dtype (float32: 2/3 of the memory traffic).
            slack: Partial transport: a unit of either side may stay unmatched for ``slack / 2``, so that a pair is
                worth matching when it costs less than ``slack``.
            kl: Unbalanced transport: weight ρ of KL(row sums | source_mass) + KL(column sums | target_mass).
            source_mass: Positive; one unit a feature by default.
            target_mass: Positive; by default one unit a feature, or n_src / n_tgt when balanced.

        Raises:
            TransferError: For bad edges, masses or parameters; for balanced masses that differ in total, or a
                feature without any edge, for then no plan exists.
        """
        cost = checked_edges(cost, "The cost")
        n, m = extent(cost)
        if slack is not None and kl is not None:
            raise TransferError("Transport takes slack or kl, not both.", "Leave one of them None.")
        for name, value in (("slack", slack), ("kl", kl)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise TransferError(f"{name} must be a positive number or None, got {value}.")
        balanced = slack is None and kl is None
        a = _masses(source_mass, n, 1.0, "source_mass")
        b = _masses(target_mass, m, float(a.sum()) / m if balanced else 1.0, "target_mass")
        problem = cls(cost, a, b, slack, kl)
        if balanced:
            if not np.isclose(a.sum(), b.sum(), rtol=1e-9):
                raise TransferError(
                    f"Balanced transport needs equal total masses, got {a.sum():g} and {b.sum():g}.",
                    "Rescale one side, or pass slack.",
                )
            bare = int((problem.edges.row_degree == 0).sum()), int((problem.edges.col_degree == 0).sum())
            if any(bare):
                raise TransferError(
                    f"{bare[0]} source and {bare[1]} target features have no candidate edge, so no balanced plan "
                    "exists.",
                    "Pass slack, drop these features, or keep more candidates.",
                )
        return problem

    @property
    def kind(self) -> Kind:
        """Which of the three problems this is."""
        return "slack" if self.slack is not None else "unbalanced" if self.kl is not None else "balanced"

    @cached_property
    def edges(self) -> Edges:
        """Index arrays of the support."""
        return Edges(self.cost)

    @property
    def ceiling(self) -> float:
        """Largest value a potential can have (slack), or can usefully have (unbalanced)."""
        return self.slack / 2 if self.slack is not None else FAR * self.kl if self.kl is not None else np.inf


def _masses(given: np.ndarray | None, n: int, default: float, name: str) -> np.ndarray:
    if given is None:
        return np.full(n, default)
    mass = np.asarray(given, dtype=np.float64)
    if mass.shape != (n,) or not (np.isfinite(mass) & (mass > 0)).all():
        raise TransferError(
            f"{name} must be {n} positive numbers, one a feature; got shape {mass.shape}, "
            f"{int((~(mass > 0)).sum())} of them not positive.",
            "Drop features that carry nothing.",
        )
    return mass


@dataclass(frozen=True)
class Transport:
    """A plan along the edges with its own account of itself; masses are in the units of the problem.

    ``primal``, ``dual`` and ``relative_gap`` certify the *unregularised* problem on the given edges, whatever
    temperature the plan was computed at: with a, b the masses and h = slack / 2,

    * balanced: min ⟨c, P⟩ s.t. P1 = a, Pᵀ1 = b;
    * slack: min ⟨c, P⟩ + h·Σ(a − P1) + h·Σ(b − Pᵀ1) s.t. P1 ≤ a, Pᵀ1 ≤ b;
    * unbalanced: min ⟨c, P⟩ + kl·KL(P1 | a) + kl·KL(Pᵀ1 | b), KL(p | q) = Σ p log(p / q) − p + q.

    ``primal`` is the value of the coupling *rounded* to a feasible one, ``dual`` that of potentials that satisfy
    f_i + g_j ≤ c_ij on every edge (and f, g ≤ h with slack), so dual ≤ optimum ≤ primal up to float64 rounding.
    """

    coupling: sp.csr_matrix
    """[n_src, n_tgt] on the candidate edges; entries that are exactly zero are not stored."""
    row_slack: Float[np.ndarray, " n_src"]
    """Mass of each source feature left unmatched (slack and unbalanced; never negative)."""
    col_slack: Float[np.ndarray, " n_tgt"]
    row_potential: Float[np.ndarray, " n_src"]
    """f, feasible with g on every edge."""
    col_potential: Float[np.ndarray, " n_tgt"]
    kind: Kind
    reg: float
    """Temperature of the coupling; 0 for the exact solver."""
    n_iter: int
    """Sinkhorn iterations, all temperatures together; 0 for the exact solver, which does not tell."""
    converged: bool
    row_error: float
    """Σ|row sum + row slack − a| / Σa of the coupling as it is; unbalanced: against a·exp(−f / kl), which the row
    sums of the entropic optimum equal."""
    col_error: float
    primal: float
    """Infinite when rounding found no feasible plan (balanced only: on few edges there may be none)."""
    dual: float
    relative_gap: float
    """(primal − dual) / |primal|."""


def relative_gap(primal: float, dual: float) -> float:
    """(primal − dual) / |primal|; infinite without a feasible plan, and never below zero by rounding."""
    if not np.isfinite(primal):
        return float("inf")
    return max(0.0, primal - dual) / max(abs(primal), 1e-300)


def sparse_sinkhorn(
    problem: Problem, *, reg: float, gap: float | None = None, max_iter: int = 5000, tol: float = 1e-4
) -> Transport:
    """Entropic transport: the problem plus ``reg · Σ x (log(x / unit) − 1)`` over couplings and slacks, unit = mean a.

    Iterations are two sparse matrix-vector products with a kernel around the current log potentials; scalings that
    grow are absorbed into these (Schmitzer, arXiv 1610.06519, Alg. 2), so no temperature under- or overflows. The
    temperature starts at a tenth of the spread of costs and halves down to ``reg``, each a warm start of the next.
    Slack is private to each feature, as if the corner between slack row and slack column held unlimited free mass.

    Memory: about 100 bytes an edge and 150 a feature beyond the cost (0.25 GB at 131,072 features and 2 M edges).

    Args:
        problem: From ``Problem.of``.
        reg: Temperature to stop at, in units of cost.
        gap: If given, the temperature goes on halving below ``reg`` until ``relative_gap`` is at most this: the
            softest plan of the sequence that is certified to cost at most this much more than the best one.
        max_iter: Iterations at most, all temperatures together.
        tol: Largest marginal error of a converged plan, each side. With a float32 cost no less than 1e-6.

    Returns:
        The plan; ``converged`` is False when ``max_iter`` ran out first or the gap was not reached.

    Raises:
        TransferError: For parameters out of range.
    """
    if not (np.isfinite(reg) and reg > 0) or max_iter < 1 or not tol > 0 or (gap is not None and not gap > 0):
        raise TransferError(
            f"Sinkhorn needs reg > 0, max_iter ≥ 1, tol > 0 and gap > 0 or None; got reg={reg}, max_iter={max_iter}, "
            f"tol={tol}, gap={gap}."
        )
    spread = _spread(problem)
    now = max(reg, START * spread)
    state = Scaling(problem, now)
    while True:
        left = state.n_iter < max_iter and state.run(STAGE_TOL, max_iter)
        if left and now <= reg and (gap is None or _certified(problem, state) <= gap):
            plan = state.transport(state.run(0.9 * tol, max_iter), tol)  # the plan's own float64 errors decide
            if gap is None or plan.relative_gap <= gap or not plan.converged:
                return plan
        if not left or (now <= reg and now <= COLDEST * spread):
            return state.transport(False, tol)
        now = max(now / 2, reg) if now > reg else now / 2
        state.cool(now)


def _spread(problem: Problem) -> float:
    """Range of the costs that compete: those above the slack never do."""
    cost = problem.cost.data
    if not len(cost):
        return 0.0
    return float(max(min(cost.max(), problem.slack or np.inf) - cost.min(), 0.0))


def _certified(problem: Problem, state: Scaling) -> float:
    f, g, mass = state.plan()
    return relative_gap(_primal(problem, mass), _dual(problem, *tightened(problem, g)))


class Scaling:
    """Sinkhorn iterations of one problem in progress: log potentials, and scalings around their kernel."""

    def __init__(self, problem: Problem, reg: float) -> None:
        self.problem, self.reg, self.n_iter = problem, reg, 0
        self._dtype = problem.cost.dtype
        self._unit = float(problem.source_mass.mean())
        self._a = (problem.source_mass / self._unit).astype(self._dtype)
        self._b = (problem.target_mass / self._unit).astype(self._dtype)
        # Tight potentials: every row and every column has a kernel entry of one, so nothing underflows.
        self._rebuild(*tightened(problem, np.zeros(len(self._b))))

    def _rebuild(self, f: np.ndarray, g: np.ndarray) -> None:
        problem, edges = self.problem, self.problem.edges
        if not (np.isfinite(f).all() and np.isfinite(g).all()):
            f, g = tightened(problem, np.where(np.isfinite(g), g, 0.0))
        self.f, self.g = f, g
        self._u, self._v = np.ones(len(f), self._dtype), np.ones(len(g), self._dtype)
        kernel = self._exp(edges, f, g)
        kernel[kernel < FLUSH] = 0
        self._kernel = sp.csr_matrix(
            (kernel.astype(self._dtype, copy=False), edges.cols, problem.cost.indptr), shape=problem.cost.shape
        )
        self._transposed = self._kernel.T
        self._row_slack, self._col_slack = (
            (np.exp((x - problem.ceiling) / self.reg).astype(self._dtype) for x in (f, g))
            if problem.slack is not None
            else (self._dtype.type(0), self._dtype.type(0))
        )

    def _exp(self, edges: Edges, f: np.ndarray, g: np.ndarray) -> np.ndarray:
        out = f[edges.rows]
        out += g[edges.cols]
        out -= self.problem.cost.data
        out /= self.reg
        return np.exp(out, out=out)

    def potentials(self) -> tuple[Float[np.ndarray, " n_src"], Float[np.ndarray, " n_tgt"]]:
        """Log potentials with the scalings absorbed."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (
                self.f + self.reg * np.log(self._u.astype(np.float64)),
                self.g + self.reg * np.log(self._v.astype(np.float64)),
            )

    def cool(self, reg: float) -> None:
        """Go on at a lower temperature from the same potentials."""
        f, g = self.potentials()
        self.reg = reg
        self._rebuild(f, g)

    def _new(self, mass: np.ndarray, carried: np.ndarray, potential: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """The scaling that meets the marginal, or its Kullback-Leibler relaxation (Chizat, arXiv 1607.05816)."""
        kl = self.problem.kl
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            if kl is None:
                return mass / carried
            share = kl / (kl + self.reg)
            new = (mass / carried) ** share * np.exp((share - 1) * potential / self.reg)
        new[degree == 0] = 1  # nothing to scale: all of this mass is given up
        return new.astype(self._dtype, copy=False)

    def _error(self, carried: np.ndarray) -> float:
        want = self._a
        if self.problem.kl is not None:
            want = want * np.exp(-self.potentials()[0] / self.problem.kl)
        return float(np.abs(self._u * carried - want).sum(dtype=np.float64) / self._a.sum(dtype=np.float64))

    def _step(self, carried: np.ndarray) -> None:
        """Meet the row marginals, given what the rows carry now, then the column marginals."""
        edges = self.problem.edges
        self._u = self._new(self._a, carried, self.f, edges.row_degree)
        self._absorb(self._u)
        self._v = self._new(self._b, self._transposed @ self._u + self._col_slack, self.g, edges.col_degree)
        self._absorb(self._v)
        self.n_iter += 1

    def _absorb(self, scaling: np.ndarray) -> None:
        if not (scaling.min() > np.exp(-RANGE) and scaling.max() < np.exp(RANGE)):
            self._rebuild(*self.potentials())

    def run(self, tol: float, max_iter: int) -> bool:
        """Iterate until the row error is at most ``tol`` (columns are then exact); False when ``max_iter`` ends it."""
        first = True
        while True:
            carried = self._kernel @ self._v + self._row_slack
            if not first and self._error(carried) <= tol:
                return True
            if self.n_iter >= max_iter:
                return False
            self._step(carried)
            first = False

    def plan(self) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, " edges"]]:
        """Potentials and the mass on every edge, in float64."""
        f, g = self.potentials()
        return f, g, self._exp(self.problem.edges, f, g) * self._unit

    def transport(self, done: bool, tol: float) -> Transport:
        """The plan as it stands, with its account."""
        problem = self.problem
        f, g, mass = self.plan()
        want, slacks = (problem.source_mass, problem.target_mass), _none(problem)
        if problem.slack is not None:
            slacks = tuple(self._unit * np.exp((x - problem.ceiling) / self.reg) for x in (f, g))
        if problem.kl is not None:
            want = tuple(w * np.exp(-x / problem.kl) for w, x in zip(want, (f, g), strict=True))
        return _account(problem, mass, slacks, want, g, reg=self.reg, n_iter=self.n_iter, done=done, tol=tol)


def exact_transport(problem: Problem, *, max_iter: int = np.iinfo(np.int32).max) -> Transport:
    """The optimum of the balanced or slack problem (POT's network simplex, ``cheapest_flow``).

    Edges that cost no less than the slack are left out: the optimum never needs them. Time depends on the data, most
    on near ties (seconds at 131,072 features); memory is about 350 bytes an edge.

    Raises:
        TransferError: For an unbalanced problem, or when the edges cannot carry the balanced masses.
    """
    if problem.kl is not None:
        raise TransferError("The exact solver takes balanced and slack problems only.", "Use sparse_sinkhorn.")
    edges, cost = problem.edges, problem.cost.data.astype(np.float64)
    a, b = problem.source_mass, problem.target_mass
    f, g = np.full(len(a), problem.ceiling), np.full(len(b), problem.ceiling)
    mass, done = np.zeros(len(cost)), True
    keep = np.flatnonzero(cost < problem.slack) if problem.slack is not None else np.arange(len(cost))
    if len(keep):
        rows, i = np.unique(edges.rows[keep], return_inverse=True)
        cols, j = np.unique(edges.cols[keep], return_inverse=True)
        flow, f[rows], g[cols], done = cheapest_flow(
            i, j, cost[keep], a[rows], b[cols], slack=problem.slack, max_iter=max_iter
        )
        key = edges.rows.astype(np.int64) * len(b) + edges.cols
        mass[np.searchsorted(key, rows[flow.row].astype(np.int64) * len(b) + cols[flow.col])] = flow.data
    sums = edges.by_row(np.add, mass, 0.0), edges.by_col(np.add, mass, 0.0)
    slacks = (np.maximum(a - sums[0], 0), np.maximum(b - sums[1], 0)) if problem.slack is not None else _none(problem)
    return _account(problem, mass, slacks, (a, b), g, reg=0.0, n_iter=0, done=done, tol=1e-9)


def _none(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(problem.source_mass)), np.zeros(len(problem.target_mass))


def _account(
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
    primal, dual = _primal(problem, mass), _dual(problem, f, g)
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


def _dual(problem: Problem, f: np.ndarray, g: np.ndarray) -> float:
    a, b, kl = problem.source_mass, problem.target_mass, problem.kl
    if kl is not None:
        return float(-kl * (a @ np.expm1(-f / kl) + b @ np.expm1(-g / kl)))
    return float(a @ f + b @ g)


def _primal(problem: Problem, mass: np.ndarray) -> float:
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
    return np.minimum(1, np.divide(mass, carried, out=np.ones_like(mass), where=carried > 0))


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
    dual = _dual(problem, f, plan.col_potential)
    return Certificate(plan.primal, dual, relative_gap(plan.primal, dual), violated, f)


def transport_matches(plan: Transport) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Pairs that are each other's largest mass, larger than what either leaves unmatched; with that mass.

    Ties go to the lower id, on both sides.
    """
    edges, mass = Edges(plan.coupling), plan.coupling.data
    by_row, by_col = (
        _first(mass == reduce(np.maximum, mass, 0.0)[ids], ids)
        for reduce, ids in ((edges.by_row, edges.rows), (edges.by_col, edges.cols))
    )
    both = np.intersect1d(by_row, by_col)
    rows, cols = edges.rows[both].astype(np.int64), edges.cols[both].astype(np.int64)
    keep = (mass[both] > plan.row_slack[rows]) & (mass[both] > plan.col_slack[cols])
    return rows[keep], cols[keep], mass[both][keep]


def _first(chosen: np.ndarray, ids: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(chosen)
    return at[np.unique(ids[at], return_index=True)[1]]


def transport_links(
    plan: Transport, share: float
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Many-to-many pairs: edges that carry at least ``share`` of what either end holds (mass and slack), with mass.

    A feature that splits in two keeps both halves; a share above one half leaves no ambiguity on that side.

    Raises:
        TransferError: For a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise TransferError(f"The share of a link must be in (0, 1], got {share}.")
    edges, mass = Edges(plan.coupling), plan.coupling.data
    row = edges.by_row(np.add, mass, 0.0) + plan.row_slack
    col = edges.by_col(np.add, mass, 0.0) + plan.col_slack
    keep = mass >= share * np.minimum(row[edges.rows], col[edges.cols])
    return edges.rows[keep].astype(np.int64), edges.cols[keep].astype(np.int64), mass[keep]

"""Transport along candidate edges: entropic Sinkhorn iterations, and the exact network simplex of POT."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from aligners.certificate import account, dual_value, primal_value, relative_gap, tightened
from aligners.sparse_assignment import Edges, cheapest_flow
from aligners.transport import Problem, Transport
from transfer.core.errors import TransferError

START = 0.1
"""First temperature of the annealing, as a share of the spread of the costs that matter."""
STAGE_TOL = 1e-2
"""Marginal error at which an intermediate temperature is left."""
RANGE = 15.0
"""Scalings beyond e^±RANGE are absorbed into the potentials; float32 products stay normal numbers up to there."""
FLUSH = 1e-25
"""Kernel entries below this count as zero: even scaled by e^(2·RANGE) they carry no mass, and denormals are slow."""
COLDEST = 1e-7
"""Temperature, as a share of the spread of costs, below which annealing for a gap gives up."""


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
        # Mass that is out of place counts in the gap, too: once that decides, less of it may remain.
        stage = STAGE_TOL if gap is None or now > reg else min(STAGE_TOL, gap / 4)
        left = state.n_iter < max_iter and state.run(stage, max_iter)
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
    return relative_gap(primal_value(problem, mass), dual_value(problem, *tightened(problem, g)))


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
        want, slacks = (problem.source_mass, problem.target_mass), _no_slack(problem)
        if problem.slack is not None:
            slacks = tuple(self._unit * np.exp((x - problem.ceiling) / self.reg) for x in (f, g))
        if problem.kl is not None:
            want = tuple(w * np.exp(-x / problem.kl) for w, x in zip(want, (f, g), strict=True))
        return account(problem, mass, slacks, want, g, reg=self.reg, n_iter=self.n_iter, done=done, tol=tol)


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
    slacks = (
        (np.maximum(a - sums[0], 0), np.maximum(b - sums[1], 0)) if problem.slack is not None else _no_slack(problem)
    )
    return account(problem, mass, slacks, (a, b), g, reg=0.0, n_iter=0, done=done, tol=1e-9)


def _no_slack(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(problem.source_mass)), np.zeros(len(problem.target_mass))

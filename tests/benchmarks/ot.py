"""Sinkhorn on a candidate graph: iterations and solves per second against log-domain reductions, POT and OTT-JAX."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from aligners.sparse_ot import Scaling, exact_transport, sparse_sinkhorn
from aligners.transport import Problem, edge_costs
from tests.benchmarks.assign import bandwidth, candidates
from tests.benchmarks.case import measure, row, seconds, watched

SLACK, REG, GAP = 0.8, 0.05, 0.01
ROUND = 25
"""Iterations that are timed together."""


def log_iteration(problem: Problem, g: np.ndarray) -> np.ndarray:
    """The peer: one plain log-domain iteration, two log-sum-exp reductions over the edges."""
    edges, cost = problem.edges, problem.cost.data
    for potential, ids, own, reduce in (
        (g, edges.cols, edges.rows, edges.by_row),
        (None, edges.rows, edges.cols, edges.by_col),
    ):
        z = ((f if potential is None else potential)[ids] - cost) / REG
        top = np.maximum(reduce(np.maximum, z, -np.inf), -SLACK / 2 / REG)
        f = -REG * (top + np.log(reduce(np.add, np.exp(z - top[own]), 0.0) + np.exp(-SLACK / 2 / REG - top)))
    return f


def iteration(n: int, degree: int) -> None:
    """One iteration; the limit reads the kernel (value and index) twice."""
    problem = Problem.of(edge_costs(candidates(n, degree)), slack=SLACK)
    state, g = Scaling(problem, REG), np.zeros(n)
    taken = measure(
        {
            "ours": lambda: state.run(1e-30, state.n_iter + ROUND),
            "log": lambda: log_iteration(problem, g),
        },
        rounds=5,
    )
    limit = bandwidth() / (2 * problem.cost.nnz * 8)
    words = "log-domain np.add.reduceat"
    name = f"ot.sparse-{n}-{problem.cost.nnz / 1e6:.1f}M"
    row(name, ROUND / taken["ours"], words, 1 / taken["log"], "iterations/s", limit)


def solve(n: int, degree: int) -> None:
    """From costs to a plan certified within one per cent, against the exact simplex; and what is certified, in %."""
    problem = Problem.of(edge_costs(candidates(n, degree)), slack=SLACK)
    plans = []
    ours = watched(lambda: plans.append(sparse_sinkhorn(problem, reg=REG, gap=GAP)))
    peer = seconds(lambda: plans.append(exact_transport(problem)))
    name = f"ot.sparse-{n}-{problem.cost.nnz / 1e6:.1f}M"
    limit = n * bandwidth() / (plans[0].n_iter * 2 * problem.cost.nnz * 8)
    row(f"{name}.solve", n / ours, "POT sparse network simplex (exact)", n / peer, "features/s", limit)
    shares = [100 * (1 - plan.relative_gap) for plan in plans]
    row(f"{name}.certified", shares[0], "POT sparse network simplex (exact)", shares[1], "% of the cost", 100.0)


def dense(n: int, degree: int) -> None:
    """Iterations on the candidates of a problem that POT takes dense and in the log domain, over all pairs."""
    import ot

    problem = Problem.of(edge_costs(candidates(n, degree)), slack=SLACK)
    state = Scaling(problem, REG)
    full = np.full((n + 1, n + 1), 2.0)
    edges = problem.cost.tocoo()
    full[edges.row, edges.col] = edges.data
    full[n, :], full[:, n], full[n, n] = SLACK / 2, SLACK / 2, 0
    mass = np.append(np.ones(n), n) / (2 * n)
    few = 5
    works = {
        "ours": lambda: state.run(1e-30, state.n_iter + ROUND),
        "POT ot.sinkhorn(method='sinkhorn_log'), all pairs": lambda: ot.sinkhorn(
            mass, mass, full, REG, "sinkhorn_log", numItermax=few, stopThr=0, warn=False
        ),
    }
    if find_spec("ott"):
        works["OTT-JAX Sinkhorn, log domain, float32, all cores, all pairs"] = jax_iterations(full, mass, few)
    taken = measure(works, rounds=2)
    limit = bandwidth() / (2 * problem.cost.nnz * 8)
    for words in list(works)[1:]:
        row(f"ot.dense-{n}", ROUND / taken["ours"], words, few / taken[words], "iterations/s", limit)


def jax_iterations(cost: np.ndarray, mass: np.ndarray, count: int) -> Callable[[], object]:
    """Compiled once, on the processor."""
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
    from ott.geometry.geometry import Geometry  # pyright: ignore[reportMissingImports]
    from ott.problems.linear.linear_problem import LinearProblem  # pyright: ignore[reportMissingImports]
    from ott.solvers.linear.sinkhorn import Sinkhorn  # pyright: ignore[reportMissingImports]

    solver = jax.jit(Sinkhorn(lse_mode=True, threshold=-1.0, min_iterations=count, max_iterations=count))
    weights = jnp.asarray(mass)
    problem = LinearProblem(Geometry(jnp.asarray(cost), epsilon=REG), a=weights, b=weights)
    return lambda: jax.block_until_ready(solver(problem).f)


def main() -> None:
    """131,072 features with 2 M candidate edges, and POT at 4,096."""
    iteration(131072, 15)
    solve(131072, 15)
    dense(4096, 32)

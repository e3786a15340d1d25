"""Transport along candidate edges: optima against linear programming and POT, and certificates that hold."""

from __future__ import annotations

import dataclasses
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from aligners.certificate import certify_all_pairs
from aligners.sparse_ot import exact_transport, sparse_sinkhorn
from aligners.transport import Problem, edge_costs, transport_links, transport_matches
from transfer.core.errors import TransferError


def support(n: int, m: int, density: float, seed: int, scale: float = 1.0) -> sp.csr_matrix:
    """Random costs of both signs, some of them stored zeros."""
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.uniform(size=(n, m)) < density)
    values = np.where(rng.uniform(size=len(rows)) < 0.15, 0.0, rng.normal(0.5, 0.5, len(rows)))
    return sp.csr_matrix((scale * values, (rows, cols)), shape=(n, m))


def planted(n: int, degree: int, seed: int = 0, dtype: type = np.float64) -> tuple[sp.csr_matrix, np.ndarray]:
    """Similarities of n features a side; the first 60 % have a partner, given by the permutation."""
    rng = np.random.default_rng(seed)
    order, shared = rng.permutation(n), int(0.6 * n)
    rows = np.concatenate([np.arange(shared), np.repeat(np.arange(n), degree)])
    cols = np.concatenate([order[:shared], rng.integers(n, size=n * degree)])
    values = np.concatenate([rng.normal(0.75, 0.08, shared), rng.normal(0.3, 0.06, n * degree)])
    first = np.unique(rows * n + cols, return_index=True)[1]
    return sp.csr_matrix((values[first].astype(dtype), (rows[first], cols[first])), shape=(n, n)), order[:shared]


def optimum(problem: Problem) -> float | None:
    """By linear programming, straight from the definition; None when no plan exists."""
    edges, (n, m) = problem.edges, problem.edges.shape
    count = np.arange(len(edges.rows))
    a_rows = sp.csr_matrix((np.ones(len(count)), (edges.rows, count)), shape=(n, len(count)))
    a_cols = sp.csr_matrix((np.ones(len(count)), (edges.cols, count)), shape=(m, len(count)))
    marginals = np.concatenate([problem.source_mass, problem.target_mass])
    if not len(count):
        return problem.slack / 2 * marginals.sum() if problem.slack else None
    if problem.slack is not None:
        solved = linprog(problem.cost.data - problem.slack, A_ub=sp.vstack([a_rows, a_cols]), b_ub=marginals)
        return float(solved.fun + problem.slack / 2 * marginals.sum())
    solved = linprog(problem.cost.data, A_eq=sp.vstack([a_rows, a_cols]), b_eq=marginals)
    return float(solved.fun) if solved.status == 0 else None


def feasible(plan: Any, problem: Problem) -> bool:
    """The potentials satisfy every constraint of the dual."""
    edges, f, g = problem.edges, plan.row_potential, plan.col_potential
    on_edges = f[edges.rows] + g[edges.cols] <= problem.cost.data + 1e-9
    return bool(on_edges.all() and (f <= problem.ceiling).all() and (g <= problem.ceiling).all())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0.1, 1),
    st.one_of(st.none(), st.floats(0.05, 3)),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.sampled_from([1.0, 0.05]),
    st.integers(1, 300),
    st.integers(0, 10**6),
)
@example(1, 4, 1.0, 1.0, 30.0, 0.05, 1, 6)  # columns that carry 1e-317
def test_dual_optimum_primal(
    n: int, m: int, density: float, slack: float | None, scale: float, reg: float, max_iter: int, seed: int
) -> None:
    """Weak duality brackets the optimum whatever the temperature and however early the solver stops."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.1, 2, n), rng.uniform(0.1, 2, m)
    if slack is None:
        b *= a.sum() / b.sum()
    try:
        problem = Problem.of(support(n, m, density, seed, scale), slack=slack, source_mass=a, target_mass=b)
    except TransferError:
        assert slack is None  # a feature without an edge
        return
    best = optimum(problem)
    plan = sparse_sinkhorn(problem, reg=reg, max_iter=max_iter)
    assert feasible(plan, problem)
    if best is None:
        assert not plan.converged and plan.primal == np.inf
        with pytest.raises(TransferError, match="No plan along"):
            exact_transport(problem)
        return
    room = 1e-7 * (1 + abs(best))
    assert plan.dual <= best + room and best <= plan.primal + room
    exact = exact_transport(problem)
    assert exact.converged and feasible(exact, problem)
    assert abs(exact.primal - best) < room and abs(exact.dual - best) < room
    # Certified over every pair: pairs that are no candidates cost 0.2 · scale here.
    full = np.full((n, m), 0.2 * scale)
    edges = problem.edges
    full[edges.rows, edges.cols] = problem.cost.data
    whole = Problem.of(sp.csr_matrix(np.where(full == 0, 1e-12, full)), slack=slack, source_mass=a, target_mass=b)
    over = certify_all_pairs(problem, exact, ((i, full[i : i + 2]) for i in range(0, n, 2)))
    overall = optimum(whole)
    assert overall is not None
    assert over.dual <= overall + room and overall <= over.primal + room
    assert np.all(over.row_potential[:, None] + exact.col_potential <= full + 1e-9 * scale)


def test_equals_pot_dense() -> None:
    """On a full support: balanced and unbalanced Sinkhorn, and exact transport."""
    import ot

    rng = np.random.default_rng(0)
    a, b, cost = rng.uniform(0.5, 1, 12), rng.uniform(0.5, 1, 9), rng.uniform(size=(12, 9))
    a /= a.mean()  # POT's entropy is relative to a mass of one an edge, ours to the mean mass
    b *= a.sum() / b.sum()
    edges = sp.csr_matrix(cost)
    balanced = Problem.of(edges, source_mass=a, target_mass=b)
    plan = sparse_sinkhorn(balanced, reg=0.05, tol=1e-9)
    assert plan.converged
    dense: Any = ot.sinkhorn(a, b, cost, 0.05, stopThr=1e-12)
    assert np.allclose(plan.coupling.toarray(), dense, atol=1e-7)
    assert np.isclose(exact_transport(balanced).primal, ot.emd2(a, b, cost))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT announces its choice of reference measure
        loose: Any = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, 0.05, 0.4, reg_type="entropy", numItermax=10**5, stopThr=1e-13
        )
    plan = sparse_sinkhorn(Problem.of(edges, kl=0.4, source_mass=a, target_mass=b), reg=0.05, tol=1e-8)
    assert plan.converged and np.allclose(plan.coupling.toarray(), loose, atol=1e-6)


def test_unbalanced_certificate_brackets_the_optimum() -> None:
    """The optimum by majorisation-minimisation (POT), which is a value from above that converges."""
    import ot

    rng = np.random.default_rng(1)
    cost = rng.uniform(size=(8, 6))
    problem = Problem.of(sp.csr_matrix(cost), kl=0.3)
    solved = ot.unbalanced.mm_unbalanced(np.ones(8), np.ones(6), cost, 0.3, numItermax=20000, stopThr=1e-14)
    plan: Any = solved
    row, col = plan.sum(axis=1), plan.sum(axis=0)
    best = float((plan * cost).sum() + 0.3 * sum((x * np.log(x) - x + 1).sum() for x in (row, col)))
    gaps = []
    for reg in (0.3, 0.03, 0.003):
        ours = sparse_sinkhorn(problem, reg=reg)
        assert ours.converged and ours.dual <= best + 1e-7 and best <= ours.primal + 1e-4
        gaps.append(ours.relative_gap)
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.01


def test_unbalanced_gives_up_a_feature_without_edges() -> None:
    cost = sp.csr_matrix(([0.1, 0.2], ([0, 1], [0, 1])), shape=(3, 4))
    plan = sparse_sinkhorn(Problem.of(cost, kl=0.5), reg=0.01)
    assert plan.converged and plan.relative_gap < 0.05
    assert plan.row_slack[2] == 1 and np.all(plan.col_slack[2:] == 1) and np.all(plan.row_slack[:2] < 0.3)


def test_gap_is_reached_where_reg_alone_does_not() -> None:
    similarity, _ = planted(1500, 16)
    problem = Problem.of(edge_costs(similarity), slack=0.8)
    soft = sparse_sinkhorn(problem, reg=0.1)
    assert soft.converged and soft.reg == 0.1 and soft.relative_gap > 0.05
    sharp = sparse_sinkhorn(problem, reg=0.1, gap=0.01)
    assert sharp.converged and sharp.relative_gap <= 0.01 and 0.001 < sharp.reg < 0.1
    assert max(sharp.row_error, sharp.col_error) <= 1e-4
    best = exact_transport(problem)
    assert sharp.dual <= best.primal <= sharp.primal <= 1.01 * best.primal
    assert best.relative_gap < 1e-9


def test_planted_partners_are_found_and_the_rest_stays_unmatched() -> None:
    similarity, partner = planted(1500, 16)
    problem = Problem.of(edge_costs(similarity), slack=0.9)  # a pair must reach a similarity of .1: too lenient
    strict = Problem.of(edge_costs(similarity), slack=0.45)
    for found in (sparse_sinkhorn(strict, reg=0.05, gap=0.01), exact_transport(strict)):
        rows, cols, mass = transport_matches(found)
        assert np.mean(np.isin(np.arange(len(partner)), rows)) > 0.98
        true = rows < len(partner)
        assert np.mean(partner[rows[true]] == cols[true]) > 0.99 and true.mean() > 0.99
        assert found.row_slack[: len(partner)].mean() < 0.1 and found.row_slack[len(partner) :].mean() > 0.9
        assert np.all(mass > 0)
    assert sparse_sinkhorn(problem, reg=0.05).row_slack[len(partner) :].mean() < 0.9


def test_splits_stay_many_to_many() -> None:
    """Source 0 is targets 0 and 1 together; source 1 is target 2."""
    similarity = sp.csr_matrix(np.array([[0.9, 0.9, 0.0], [0.0, 0.1, 0.9]]))
    plan = sparse_sinkhorn(Problem.of(edge_costs(similarity), slack=0.8), reg=0.1)
    rows, cols, _ = transport_links(plan, 0.3)
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == {(0, 0), (0, 1), (1, 2)}
    with pytest.raises(TransferError, match="share"):
        transport_links(plan, 0.0)


def test_max_iter_one_is_not_converged() -> None:
    similarity, _ = planted(200, 8)
    problem = Problem.of(edge_costs(similarity), slack=0.8)
    one = sparse_sinkhorn(problem, reg=0.05, max_iter=1)
    assert not one.converged and one.n_iter == 1
    assert one.dual <= exact_transport(problem).primal <= one.primal
    for reg, gap in ((0.05, 1e-9), (1e-3, None)):
        assert not sparse_sinkhorn(problem, reg=reg, gap=gap, max_iter=30).converged


def test_same_again_permuted_and_at_any_scale() -> None:
    similarity, _ = planted(300, 8)
    cost = edge_costs(similarity)
    before = cost.copy()
    plan = sparse_sinkhorn(Problem.of(cost, slack=0.8), reg=0.05)
    assert (cost != before).nnz == 0
    again = sparse_sinkhorn(Problem.of(cost, slack=0.8), reg=0.05)
    assert np.array_equal(plan.coupling.data, again.coupling.data) and plan.n_iter == again.n_iter
    rng = np.random.default_rng(4)
    left, right = rng.permutation(300), rng.permutation(300)
    moved = sparse_sinkhorn(Problem.of(sp.csr_matrix(cost[left][:, right]), slack=0.8), reg=0.05)
    assert np.allclose(moved.coupling.toarray(), plan.coupling.toarray()[left][:, right], atol=1e-9)
    for unit in (1e-6, 1e6):  # of mass
        mass = np.full(300, unit)
        scaled = sparse_sinkhorn(Problem.of(cost, slack=0.8, source_mass=mass, target_mass=mass), reg=0.05)
        assert scaled.converged and np.allclose(scaled.coupling.toarray() / unit, plan.coupling.toarray(), atol=1e-9)


@pytest.mark.parametrize("kind", [{"slack": 0.8}, {"kl": 0.5}])
def test_float32_is_float64(kind: dict[str, Any]) -> None:
    narrow, _ = planted(400, 12, dtype=np.float32)
    cost = edge_costs(narrow)
    assert cost.dtype == np.float32
    low = sparse_sinkhorn(Problem.of(cost, **kind), reg=0.03, tol=1e-5)
    high = sparse_sinkhorn(Problem.of(sp.csr_matrix(cost, dtype=np.float64), **kind), reg=0.03, tol=1e-5)
    assert low.converged and high.converged and low.coupling.dtype == np.float64
    assert np.allclose(low.coupling.toarray(), high.coupling.toarray(), atol=1e-4)
    assert np.isclose(low.primal, high.primal, rtol=1e-5) and np.isclose(low.dual, high.dual, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cold_temperatures_do_not_underflow(dtype: type) -> None:
    """exp(−cost / reg) is zero at every edge here; without absorption the plan would be NaN."""
    similarity, _ = planted(200, 8, dtype=dtype)
    cost = edge_costs(similarity)
    cost.data += 10
    plan = sparse_sinkhorn(Problem.of(cost, slack=21.6), reg=1e-3, tol=1e-3, max_iter=20000)
    assert plan.converged and np.isfinite(plan.coupling.data).all()
    assert plan.relative_gap < 1e-3


def test_an_infeasible_balanced_problem_is_told() -> None:
    """Two sources share their only target, while another target is out of reach: no warning, no empty plan."""
    cost = sp.csr_matrix(([0.1, 0.2, 0.3, 0.1], ([0, 1, 2, 2], [0, 0, 1, 2])), shape=(3, 3))
    problem = Problem.of(cost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = sparse_sinkhorn(problem, reg=0.1, max_iter=500)
        assert not plan.converged and plan.primal == plan.relative_gap == np.inf
        assert plan.row_error > 0.1
        with pytest.raises(TransferError, match="No plan along the 4 edges"):
            exact_transport(problem)
    assert exact_transport(Problem.of(cost, slack=1.0)).converged


def test_balanced_rounding_completes_the_plan() -> None:
    rng = np.random.default_rng(3)
    problem = Problem.of(sp.csr_matrix(rng.uniform(0.1, 1, size=(20, 30))))
    assert problem.target_mass.sum() == pytest.approx(20)
    plan = sparse_sinkhorn(problem, reg=0.05, tol=1e-3)
    best = exact_transport(problem).primal
    assert plan.converged and plan.row_error > 1e-9  # so there was something to complete
    assert plan.dual <= best <= plan.primal < 1.5 * best


def test_all_pairs_certificate_tells_a_missed_candidate() -> None:
    rng = np.random.default_rng(5)
    similarity = np.clip(rng.normal(0.2, 0.05, size=(40, 40)) + 0.6 * np.eye(40), 0, 1)
    cost = 1 - similarity

    def blocks(rows: int = 7) -> list[tuple[int, np.ndarray]]:
        return [(i, cost[i : i + rows]) for i in range(0, 40, rows)]

    keep = np.argsort(-similarity, axis=1)[:, :4]
    rows = np.repeat(np.arange(40), 4)
    good = Problem.of(sp.csr_matrix((cost[rows, keep.ravel()], (rows, keep.ravel())), shape=(40, 40)), slack=0.7)
    plan = exact_transport(good)
    fine = certify_all_pairs(good, plan, blocks())
    assert fine.violated == 0 and fine.relative_gap < 1e-9 and fine.primal == plan.primal
    missed = keep[:, 1:].ravel()  # without the true partners
    rows = np.repeat(np.arange(40), 3)
    poor = Problem.of(sp.csr_matrix((cost[rows, missed], (rows, missed)), shape=(40, 40)), slack=0.7)
    plan = exact_transport(poor)
    told = certify_all_pairs(poor, plan, blocks())
    assert plan.relative_gap < 1e-9 and told.violated >= 40 and told.relative_gap > 0.1
    for bad in (blocks()[1:], blocks()[:-1], [(0, cost[:, :5])]):
        with pytest.raises(TransferError, match="block"):
            certify_all_pairs(poor, plan, bad)
    with pytest.raises(TransferError, match="NaN"):
        certify_all_pairs(poor, plan, [(0, np.full((40, 40), np.nan))])


def test_memory_is_bounded() -> None:
    similarity, _ = planted(20000, 24, dtype=np.float32)
    cost = edge_costs(similarity)
    tracemalloc.start()
    sparse_sinkhorn(Problem.of(cost, slack=0.8), reg=0.05, max_iter=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120 * cost.nnz + 200 * 40000


def test_no_edge_at_all_leaves_everything_unmatched() -> None:
    problem = Problem.of(sp.csr_matrix((3, 4)), slack=0.5)
    for plan in (sparse_sinkhorn(problem, reg=0.01), exact_transport(problem)):
        assert plan.coupling.nnz == 0 and plan.primal == pytest.approx(7 * 0.25) and plan.converged
        assert not len(transport_matches(plan)[0])


def test_matches_break_ties_to_the_lower_id() -> None:
    plan = exact_transport(Problem.of(sp.csr_matrix(np.full((2, 2), 0.1)), slack=1.0))
    even = dataclasses.replace(plan, coupling=sp.csr_matrix(np.full((2, 2), 0.5)))
    rows, cols, mass = transport_matches(even)
    assert (rows.tolist(), cols.tolist(), mass.tolist()) == ([0], [0], [0.5])


def test_refuses_bad_input() -> None:
    fine = sp.csr_matrix(np.full((2, 3), 0.5))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"slack": 1.0, "kl": 1.0}, "not both"),
        ({"slack": 0.0}, "positive"),
        ({"kl": float("nan")}, "positive"),
        ({"source_mass": np.array([1.0, -1.0]), "slack": 1.0}, "positive numbers"),
        ({"source_mass": np.array([1.0, np.nan]), "slack": 1.0}, "positive numbers"),
        ({"target_mass": np.ones(2), "slack": 1.0}, "shape"),
        ({"source_mass": np.ones(2), "target_mass": np.ones(3)}, "equal total"),
    ]
    for kwargs, words in wrong:
        with pytest.raises(TransferError, match=words):
            Problem.of(fine, **kwargs)
    with pytest.raises(TransferError, match="NaN"):
        Problem.of(sp.csr_matrix(np.array([[np.nan]])), slack=1.0)
    with pytest.raises(TransferError, match="empty"):
        edge_costs(sp.csr_matrix((3, 0)))
    with pytest.raises(TransferError, match="no candidate edge"):
        Problem.of(sp.csr_matrix(([1.0, 1.0], ([0, 0], [0, 1])), shape=(2, 2)))
    problem = Problem.of(fine, slack=1.0)
    for name in ("reg", "max_iter", "tol", "gap"):
        bad: dict[str, Any] = {"reg": 1.0, name: 0}
        with pytest.raises(TransferError, match="Sinkhorn needs"):
            sparse_sinkhorn(problem, **bad)
    with pytest.raises(TransferError, match="balanced and slack"):
        exact_transport(Problem.of(fine, kl=1.0))


@pytest.mark.parametrize("seed", range(0, 60))
def test_gap_is_reached_with_masses_that_differ(seed: int) -> None:
    """Mass out of place counts in the gap: no temperature is cold enough as long as a per cent of it is."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(2, 9, size=2)
    cost = np.where(rng.random(shape) < rng.uniform(0.3, 1), rng.random(shape) + 1e-9, 0.0)
    if not cost.any():
        return
    source, target = rng.uniform(0.1, 2, shape[0]), rng.uniform(0.1, 2, shape[1])
    problem = Problem.of(
        sp.csr_matrix(cost), source_mass=source, target_mass=target, slack=float(rng.uniform(0.3, 1.5))
    )
    plan = sparse_sinkhorn(problem, reg=0.05, gap=0.01)
    assert plan.converged and plan.relative_gap <= 0.01

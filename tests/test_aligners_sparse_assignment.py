"""Partial assignment on a candidate graph: exact, partial, at any order of the features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from aligners.sparse_assignment import Edges, cheapest_flow, checked_edges, extent, sparse_one_to_one
from transfer.core.errors import TransferError


def graph(n: int, m: int, density: float, seed: int, *, rounded: bool = False) -> sp.csr_matrix:
    """Random edges; ``rounded`` gives ties and stored zeros."""
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.uniform(size=(n, m)) < density)
    values = rng.normal(size=len(rows))
    return sp.csr_matrix((np.round(values) if rounded else values, (rows, cols)), shape=(n, m))


def gains(similarity: sp.csr_matrix, floor: float) -> np.ndarray:
    """Dense: what each pair gains, nothing for a pair that is no candidate."""
    edges = similarity.tocoo()
    dense = np.zeros(extent(similarity))
    dense[edges.row, edges.col] = np.maximum(edges.data.astype(np.float64) - floor, 0)
    return dense


def check_exact(similarity: sp.csr_matrix, floor: float) -> None:
    rows, cols = sparse_one_to_one(similarity, floor)
    dense = gains(similarity, floor)
    assert len(set(rows)) == len(rows) and len(set(cols)) == len(cols)
    assert np.all(np.diff(rows) > 0)
    assert np.all(dense[rows, cols] > 0)
    best = dense[linear_sum_assignment(dense, maximize=True)].sum()
    assert np.isclose(dense[rows, cols].sum(), best, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 14), st.integers(1, 14), st.floats(0, 1), st.floats(-1.5, 1), st.booleans(), st.integers(0, 10**6)
)
def test_equals_dense_assignment(n: int, m: int, density: float, floor: float, rounded: bool, seed: int) -> None:
    check_exact(graph(n, m, density, seed, rounded=rounded), floor)


@pytest.mark.parametrize("floor", [-1.0, 0.5, 1.5])
def test_equals_dense_assignment_at_800(floor: float) -> None:
    check_exact(graph(800, 700, 0.03, 3), floor)


def test_stored_zeros_are_candidates() -> None:
    """scipy's sparse matching would drop them."""
    similarity = sp.csr_matrix((np.array([0.0, 0.0]), ([0, 1], [1, 0])), shape=(2, 2))
    rows, cols = sparse_one_to_one(similarity, -1.0)
    assert rows.tolist() == [0, 1] and cols.tolist() == [1, 0]
    assert not len(sparse_one_to_one(similarity, 0.0)[0])  # at the floor


def test_infeasible_support_is_no_problem() -> None:
    """Three rows share one column: a full matching does not exist, a partial one does."""
    similarity = sp.csr_matrix(([0.5, 0.9, 0.7], ([0, 1, 2], [0, 0, 0])), shape=(3, 3))
    rows, cols = sparse_one_to_one(similarity)
    assert rows.tolist() == [1] and cols.tolist() == [0]


def test_two_good_pairs_beat_the_best_edge() -> None:
    similarity = sp.csr_matrix(np.array([[0.9, 0.8], [0.7, 0.0]]))
    rows, cols = sparse_one_to_one(similarity)
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_permuting_features_permutes_the_pairs_and_twice_is_the_same() -> None:
    similarity = graph(300, 260, 0.05, 1)
    rng = np.random.default_rng(2)
    left, right = rng.permutation(300), rng.permutation(260)
    pairs = set(zip(*(x.tolist() for x in sparse_one_to_one(similarity)), strict=True))
    moved = sparse_one_to_one(sp.csr_matrix(similarity[left][:, right]))
    assert {(int(left[i]), int(right[j])) for i, j in zip(*moved, strict=True)} == pairs
    turned = sparse_one_to_one(sp.csr_matrix(similarity.T))
    assert {(int(j), int(i)) for i, j in zip(*turned, strict=True)} == pairs
    again = sparse_one_to_one(similarity)
    assert set(zip(*(x.tolist() for x in again), strict=True)) == pairs


def test_ties_go_to_the_lower_ids() -> None:
    rows, cols = sparse_one_to_one(sp.csr_matrix(np.ones((1, 3))))
    assert (rows.tolist(), cols.tolist()) == ([0], [0])
    rows, cols = sparse_one_to_one(sp.csr_matrix(np.ones((3, 1))))
    assert (rows.tolist(), cols.tolist()) == ([0], [0])


def test_float32_and_the_input_stays() -> None:
    similarity = graph(120, 120, 0.2, 5)
    before = similarity.copy()
    wide = sparse_one_to_one(similarity, 0.2)
    narrow = sparse_one_to_one(sp.csr_matrix(similarity, dtype=np.float32), 0.2)
    assert np.array_equal(wide[0], narrow[0]) and np.array_equal(wide[1], narrow[1])
    assert (similarity != before).nnz == 0
    unsorted = similarity.copy()
    unsorted.indices, unsorted.data = unsorted.indices[::-1].copy(), unsorted.data[::-1].copy()
    unsorted = sp.csr_matrix((unsorted.data, unsorted.indices, (similarity.nnz - similarity.indptr)[::-1]))
    assert not unsorted.has_sorted_indices
    flipped = sparse_one_to_one(unsorted, 0.2)
    assert np.array_equal(np.sort(119 - flipped[0]), wide[0])


def test_no_edge_above_the_floor_gives_no_pair() -> None:
    rows, cols = sparse_one_to_one(graph(5, 5, 1.0, 0), 100.0)
    assert rows.shape == cols.shape == (0,) and rows.dtype == np.int64


def test_refuses_bad_edges() -> None:
    with pytest.raises(TransferError, match="NaN"):
        sparse_one_to_one(sp.csr_matrix(np.array([[np.nan, 1.0]])))
    with pytest.raises(TransferError, match="empty"):
        sparse_one_to_one(sp.csr_matrix((0, 3)))
    with pytest.raises(TransferError, match="sparse matrix"):
        checked_edges(np.ones((2, 2)), "The similarity")
    twice = sp.csr_matrix((np.ones(2), np.array([1, 1]), np.array([0, 2])), shape=(1, 2))
    with pytest.raises(TransferError, match="more than once"):
        sparse_one_to_one(twice)
    with pytest.raises(TransferError, match="floor"):
        sparse_one_to_one(graph(2, 2, 1.0, 0), float("nan"))


def test_an_infeasible_flow_is_refused_without_a_warning() -> None:
    """POT returns an empty plan and only warns."""
    args = (np.array([0, 1]), np.array([0, 0]), np.ones(2), np.ones(2), np.array([1.0, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TransferError, match="No plan along the 2 edges"):
            cheapest_flow(*args, slack=None, max_iter=1000)
        flow, f, g, done = cheapest_flow(*args, slack=4.0, max_iter=1000)
    assert done and flow.sum() == pytest.approx(1.0)
    assert np.all(f[args[0]] + g[args[1]] <= 1 + 1e-12)


def test_reductions_by_row_and_column() -> None:
    matrix = graph(9, 7, 0.3, 8)
    edges = Edges(checked_edges(matrix, "x"))
    assert np.allclose(edges.by_row(np.add, matrix.data, 0.0), matrix.toarray().sum(axis=1))
    assert np.allclose(edges.by_col(np.add, matrix.data, 0.0), matrix.toarray().sum(axis=0))
    bare = Edges(sp.csr_matrix((4, 3)))
    assert bare.by_row(np.add, np.empty(0), 7.0).tolist() == [7.0] * 4

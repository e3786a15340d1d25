"""Top-k, assignment and correlation against dense numpy."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.assignment import mutual_nearest, one_to_one, select
from aligners.correlation import (
    Codes,
    Support,
    correlation_blocks,
    listed_correlations,
    pair_correlations,
    top_correlations,
)
from aligners.topk import BYTES_PER_PAIR, inner_blocks, neighbour_means, topk_blocks, topk_cosine, unit_rows
from transfer.core.errors import TransferError
from transfer.core.objects import PairedActivations


def dense_topk(similarity: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_topk_is_dense_numpy(n: int, m: int, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    found = topk_cosine(x, y, k, budget=rows * m * BYTES_PER_PAIR)  # blocks of `rows` rows
    cosine = unit_rows(x) @ unit_rows(y).T
    assert np.array_equal(found.row_ids, dense_topk(cosine, k))
    assert np.array_equal(found.col_ids, dense_topk(cosine.T, k))
    assert np.allclose(found.row_scores, -np.sort(-cosine, axis=1)[:, :k])
    row_mean, col_mean = neighbour_means(found)
    assert np.allclose(row_mean, -np.sort(-cosine, axis=1)[:, :k].mean(axis=1))
    assert np.allclose(col_mean, -np.sort(-cosine.T, axis=1)[:, :k].mean(axis=1))


def test_csls_shifts() -> None:
    rng = np.random.default_rng(0)
    x, y, r, c = rng.normal(size=(7, 3)), rng.normal(size=(9, 3)), rng.normal(size=7), rng.normal(size=9)
    got = np.vstack([block for _, block in inner_blocks(x, y, r, c, budget=2 * 9 * BYTES_PER_PAIR)])
    assert np.allclose(got, 2 * x @ y.T - r[:, None] - c)


def test_csls_frees_partners_from_a_hub() -> None:
    """A target that is everyone's nearest wins every row by cosine, and not by CSLS."""
    rng = np.random.default_rng(1)
    shared = np.zeros(60)
    shared[0] = 1.0
    own = rng.normal(size=(40, 60)) / 60**0.5
    x = unit_rows(shared + own)
    y = unit_rows(np.vstack([own, shared[None]]))  # the last one is the hub
    plain = topk_blocks(inner_blocks(x, y), (40, 41), 10)
    hub_rows = np.sum(plain.row_ids[:, 0] == 40)
    rows, cols = mutual_nearest(topk_blocks(inner_blocks(x, y, *neighbour_means(plain)), (40, 41), 1))
    assert hub_rows > 5
    assert np.sum(rows == cols) >= 38


def test_topk_memory_is_bounded() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 16)).astype(np.float32)
    budget = 4 * 2**20
    tracemalloc.start()
    topk_cosine(x, x, 8, budget=budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    inputs, result = 2 * x.nbytes, 2 * 3000 * 8 * (8 + 4)
    assert peak < inputs + 3 * result + budget  # a full matrix would be 36 MB
    assert peak < 3000 * 3000 * 4 / 3


def test_topk_refuses() -> None:
    with pytest.raises(TransferError, match="zero"):
        topk_cosine(np.zeros((2, 3)), np.ones((2, 3)), 1)
    with pytest.raises(TransferError, match="one width"):
        topk_cosine(np.ones((2, 3)), np.ones((2, 4)), 1)
    with pytest.raises(TransferError, match="k ≥ 1"):
        topk_cosine(np.ones((2, 3)), np.ones((2, 3)), 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_one_to_one_is_the_best_partial_assignment(n: int, m: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).normal(size=(n, m))
    rows, cols = one_to_one(similarity, floor=0.0)
    assert np.all(similarity[rows, cols] > 0)
    padded = np.maximum(np.pad(similarity, ((0, max(m - n, 0)), (0, max(n - m, 0)))), 0)
    size = len(padded)
    best = max(padded[np.arange(size), list(p)].sum() for p in itertools.permutations(range(size)))
    assert np.isclose(similarity[rows, cols].sum(), best)


def test_assignment_refuses_large_and_unknown() -> None:
    with pytest.raises(TransferError, match="4096"):
        select(iter(()), (5000, 10), "one_to_one")
    with pytest.raises(TransferError, match="Unknown"):
        select(iter(()), (5, 10), "best")  # type: ignore[arg-type]


def sparse_codes(rng: np.random.Generator, rows: int, n: int, density: float = 0.2) -> sp.csr_matrix:
    return sp.csr_matrix(np.where(rng.uniform(size=(rows, n)) < density, rng.exponential(size=(rows, n)), 0))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_correlation_is_numpy(rows: int, n: int, m: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = sparse_codes(rng, rows, n), sparse_codes(rng, rows, m)
    got = np.vstack([x for _, x in correlation_blocks(Codes.of(a), Codes.of(b), budget=block * m * BYTES_PER_PAIR)])
    x, y = a.toarray() - a.toarray().mean(axis=0), b.toarray() - b.toarray().mean(axis=0)
    spread = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    assert np.allclose(got, np.divide(x.T @ y, spread, out=np.zeros((n, m)), where=spread > 1e-12), atol=1e-9)
    pairs = PairedActivations(a, b, np.zeros(rows, dtype=np.int32))
    i, j = rng.integers(n, size=9), rng.integers(m, size=9)
    listed = pair_correlations(pairs, i, j)
    live = np.isfinite(listed)
    assert np.array_equal(live, spread[i, j] > 1e-12)
    assert np.allclose(listed[live], got[i, j][live])


def test_shift_is_a_circular_shift() -> None:
    rng = np.random.default_rng(3)
    a, b = sparse_codes(rng, 30, 4), sparse_codes(rng, 30, 4)
    got = listed_correlations(Codes.of(a), Codes.of(b), 7)
    rolled = np.roll(b.toarray(), -7, axis=0)
    assert np.allclose(got, [np.corrcoef(a.toarray()[:, i], rolled[:, i])[0, 1] for i in range(4)])


def test_correlation_survives_large_offsets() -> None:
    """Codes whose mean dwarfs their spread: the one-pass formula in float32 would give noise."""
    rng = np.random.default_rng(0)
    base = 1e4 + rng.normal(size=(500, 1))
    a = sp.csr_matrix((base + 0.1 * rng.normal(size=(500, 2))).astype(np.float32))
    got = next(iter(correlation_blocks(Codes.of(a), Codes.of(a))))[1]
    assert np.allclose(got, np.corrcoef(a.toarray().astype(np.float64).T), atol=1e-4)


def test_top_correlations_ids() -> None:
    rng = np.random.default_rng(0)
    a = sparse_codes(rng, 200, 20)
    found = top_correlations(Codes.of(a), Codes.of(a[:, ::-1]), 3)
    assert np.array_equal(found.row_ids[:, 0], np.arange(20)[::-1])


def test_support_sorts_features() -> None:
    matrix = np.zeros((100, 5))
    matrix[:5, 1], matrix[:10, 2], matrix[:50, 3], matrix[:51, 4] = 1, 1, 1, 1
    codes = sp.csr_matrix(matrix)
    found = Support.of(codes, 10)
    assert found.ids.tolist() == [2, 3]
    assert (found.dead, found.rare, found.always_on) == (1, 1, 1)


def test_stored_zeros_are_no_events() -> None:
    codes = sp.csr_matrix((np.zeros(20), (np.arange(20), np.zeros(20, int))), shape=(100, 2))
    assert codes.nnz == 20
    assert Support.of(codes, 10).dead == 2
    assert Codes.of(codes).support.tolist() == [0, 0]
    assert codes.nnz == 20  # the input keeps them

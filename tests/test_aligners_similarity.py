"""Top-k, assignment and correlation against dense numpy."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners import coactivation
from aligners.assignment import mutual_nearest, one_to_one, select
from aligners.coactivation import Measure, PairedCodes, block_features, joint_blocks
from aligners.correlation import (
    Codes,
    Support,
    correlation_blocks,
    dims,
    listed_correlations,
    pair_correlations,
    top_correlations,
)
from aligners.partners import Partners, shift_null, top_partners
from aligners.sparse_partners import few_events, flipped, meeting_partners
from aligners.topk import BYTES_PER_PAIR, inner_blocks, neighbour_means, topk_blocks, topk_cosine, unit_rows
from transfer.core.errors import TransferError
from transfer.core.store import PairedActivations


def dense_topk(similarity: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_topk_is_dense_numpy(n: int, m: int, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    cosine = unit_rows(x) @ unit_rows(y).T
    # Whatever the product, and in blocks of `rows` rows.
    blocks = inner_blocks(unit_rows(x), unit_rows(y), budget=rows * m * BYTES_PER_PAIR)
    for found in (topk_cosine(x, y, k), topk_blocks(blocks, (n, m), k)):
        assert np.array_equal(found.row_ids, dense_topk(cosine, k))
        assert np.array_equal(found.col_ids, dense_topk(cosine.T, k))
        assert np.allclose(found.row_scores, -np.sort(-cosine, axis=1)[:, :k])
        row_mean, col_mean = neighbour_means(found)
        assert np.allclose(row_mean, -np.sort(-cosine, axis=1)[:, :k].mean(axis=1))
        assert np.allclose(col_mean, -np.sort(-cosine.T, axis=1)[:, :k].mean(axis=1))
        assert np.allclose(neighbour_means(found, 2)[0], -np.sort(-cosine, axis=1)[:, : min(k, 2)].mean(axis=1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_ties_go_to_the_lower_id(n: int, m: int, k: int, rows: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).integers(0, 3, size=(n, m)).astype(np.float64)
    found = topk_blocks(((i, similarity[i : i + rows]) for i in range(0, n, rows)), (n, m), k)
    assert np.array_equal(found.row_ids, dense_topk(similarity, k))
    assert np.array_equal(found.col_ids, dense_topk(similarity.T, k))


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


def test_block_memory_is_bounded() -> None:
    rng = np.random.default_rng(0)
    x = unit_rows(rng.normal(size=(1500, 16)).astype(np.float32))
    budget = 2**20
    tracemalloc.start()
    topk_blocks(inner_blocks(x, x, budget=budget), (1500, 1500), 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * (2 * 1500 * 8 * (8 + 4)) + budget  # a full matrix would be 9 MB


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


def joint_events(a: sp.csr_matrix, b: sp.csr_matrix) -> np.ndarray:
    return (a.toarray() != 0).astype(int).T @ (b.toarray() != 0)


def chunks(a: sp.csr_matrix, b: sp.csr_matrix, n: int) -> list[tuple[sp.csr_matrix, sp.csr_matrix]]:
    bounds = np.linspace(0, dims(a)[0], n + 1).astype(int)
    return [(a[i:j], b[i:j]) for i, j in zip(bounds[:-1], bounds[1:], strict=True)]


def dense_measure(a: sp.csr_matrix, b: sp.csr_matrix, measure: Measure) -> np.ndarray:
    x, y = a.toarray().astype(np.float64), b.toarray().astype(np.float64)
    if measure != "pearson":
        x, y = (x != 0).astype(np.float64), (y != 0).astype(np.float64)
    if measure == "jaccard":
        union = x.sum(axis=0)[:, None] + y.sum(axis=0) - x.T @ y
        return x.T @ y / np.maximum(union, 1)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    return np.divide(x.T @ y, spread, out=np.zeros(spread.shape), where=spread > 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_joint_sums_are_numpy(rows: int, n: int, m: int, parts: int, dense: bool, seed: int) -> None:
    """Whatever the chunks, the blocks, the rounds and the path; n11 is an integer and exact."""
    rng = np.random.default_rng(seed)
    a, b = sparse_codes(rng, rows, n), sparse_codes(rng, rows, m)
    codes = dataclasses.replace(PairedCodes.of(chunks(a, b, parts)), dense=dense)
    order = rng.permutation(n)
    for features, held in ((None, 2**20), (None, 100), (order, 2**20)):
        ids, n11, products = [], [], []
        for joint in joint_blocks(codes, features, held_bytes=held, sums_bytes=1):
            ids.append(joint.features)
            n11.append(joint.n11.copy())
            products.append(joint.products.copy())
        assert np.array_equal(np.concatenate(ids), np.arange(n) if features is None else order)
        at = np.concatenate(ids)
        assert n11[0].dtype == np.int32
        assert np.array_equal(np.vstack(n11), joint_events(a, b)[at])
        assert np.allclose(np.vstack(products), (a.T @ b).toarray()[at], rtol=1e-12)
    assert np.array_equal(codes.source.support, np.sum(a.toarray() != 0, axis=0))
    assert np.allclose(codes.target.mean, b.toarray().mean(axis=0))
    assert np.allclose(codes.target.spread, b.toarray().var(axis=0) * rows)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["pearson", "phi", "jaccard"]),
    st.floats(0.02, 0.5),
    st.integers(1, 50),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_top_partners_are_dense_numpy(
    measure: Measure, density: float, n: int, k: int, min_support: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = sparse_codes(rng, 120, n, density), sparse_codes(rng, 120, 37, density)
    shared = min(n, 37) // 2
    b = sp.csr_matrix(sp.hstack([a[:, :shared], b[:, shared:]]))
    codes = PairedCodes.of(chunks(a, b, 2))
    full = dense_measure(a, b, measure)
    full[codes.source.support < min_support] = -1
    full[:, codes.target.support < min_support] = -1
    products, n11 = (a.T @ b).toarray(), joint_events(a, b)
    meeting = [Partners(*meeting_partners(c, k, measure, min_support)) for c in (codes, flipped(codes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligners.partners.few_events", lambda codes: False)
        found = [top_partners(codes, k, measure, min_support, sums) for sums in (1, 2**20)]
    for lists in (*found, meeting):
        for got, flip in zip(lists, (False, True), strict=True):
            want = full.T if flip else full
            scores = -np.sort(-want, axis=1)[:, :k]
            width = scores.shape[1]
            positive = scores > 1e-9
            assert np.allclose(got.scores[:, :width][positive], scores[positive], rtol=1e-9)
            there = got.ids >= 0
            assert np.array_equal(there[:, :width] & (got.scores[:, :width] > 1e-9), positive)
            owner, partner = np.nonzero(there)[0], got.ids[there]
            src, tgt = (partner, owner) if flip else (owner, partner)
            assert np.array_equal(got.n11[there], n11[src, tgt])
            assert np.allclose(got.products[there], products[src, tgt], rtol=1e-12)
            assert np.all(got.n11[~there] == 0) and np.all(np.isneginf(got.scores[~there]))


def test_few_meetings_take_the_short_way_unless_values_are_negative() -> None:
    rng = np.random.default_rng(1)
    a, b = sparse_codes(rng, 60, 300, 0.005), sparse_codes(rng, 60, 280, 0.005)
    codes = PairedCodes.of(chunks(a, b, 2))
    assert few_events(codes) and not few_events(PairedCodes.of([(-a, b)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligners.partners.few_events", lambda codes: False)
        want = top_partners(codes, 4, "pearson")
    for one, other in zip(top_partners(codes, 4, "pearson"), want, strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.n11, other.n11)
        assert np.allclose(one.scores, other.scores) and np.allclose(one.products, other.products)


def test_sparse_and_dense_paths_are_chosen_by_density_and_agree() -> None:
    rng = np.random.default_rng(0)
    for density, dense in ((0.01, False), (0.3, True)):
        a, b = sparse_codes(rng, 400, 60, density), sparse_codes(rng, 400, 50, density)
        codes = PairedCodes.of([(a, b)])
        assert codes.dense is dense
        one, _ = top_partners(codes, 5, "pearson")
        other, _ = top_partners(dataclasses.replace(codes, dense=not dense), 5, "pearson")
        assert np.array_equal(one.ids, other.ids) and np.allclose(one.scores, other.scores, equal_nan=True)


def test_partners_survive_large_offsets() -> None:
    """Means a hundred thousand times the spread: float32 sums would give noise."""
    rng = np.random.default_rng(0)
    a = sp.csr_matrix((1e4 + 0.1 * rng.normal(size=(500, 3))).astype(np.float32))
    b = sp.csr_matrix((a.toarray()[:, ::-1] + 0.05 * rng.normal(size=(500, 3))).astype(np.float32))
    found, _ = top_partners(PairedCodes.of(chunks(a, b, 3)), 1, "pearson")
    assert found.ids[:, 0].tolist() == [2, 1, 0]
    want = np.corrcoef(a.toarray().astype(np.float64).T, b.toarray().astype(np.float64).T)[:3, 3:]
    assert np.allclose(found.scores[:, 0], want[np.arange(3), [2, 1, 0]], atol=1e-4)


def test_codes_are_read_from_memory_maps_and_left_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (sp.csr_matrix(sparse_codes(rng, 200, n), dtype=np.float32) for n in (30, 40))
    mapped = []
    for name, codes in (("a", a), ("b", b)):
        for part in ("data", "indices", "indptr"):
            np.save(tmp_path / f"{name}-{part}.npy", getattr(codes, part))
        arrays = [np.load(tmp_path / f"{name}-{part}.npy", mmap_mode="r") for part in ("data", "indices", "indptr")]
        mapped.append(sp.csr_matrix(tuple(arrays), shape=codes.shape, copy=False))
    found = top_partners(PairedCodes.of([(mapped[0], mapped[1])]), 3, "phi")
    want = top_partners(PairedCodes.of([(a, b)]), 3, "phi")
    assert np.array_equal(found[0].ids, want[0].ids) and np.array_equal(found[1].scores, want[1].scores)


def test_chunks_that_are_made_anew_each_time() -> None:
    class Loader:
        def __iter__(self) -> Iterator[tuple[sp.csr_matrix, sp.csr_matrix]]:
            return iter(chunks(a, b, 3))

    rng = np.random.default_rng(0)
    a, b = sparse_codes(rng, 100, 30), sparse_codes(rng, 100, 40)
    found, want = (top_partners(PairedCodes.of(p), 3, "jaccard")[0] for p in (Loader(), [(a, b)]))
    assert np.array_equal(found.ids, want.ids)


def test_partner_memory_is_bounded() -> None:
    """Blocks, not the table of all sums (48 MB here, 51 GB at 65,536 features)."""
    rng = np.random.default_rng(0)
    a, b = (sp.csr_matrix(sp.random(2000, 2000, 0.01, "csr", np.float32, rng)) for _ in range(2))
    codes = PairedCodes.of([(a, b)])
    sums = 2**21
    assert block_features(2000, 2000, sums) * 2000 * coactivation.BYTES_PER_PAIR <= sums
    next(joint_blocks(codes, sums_bytes=sums))
    tracemalloc.start()
    for _ in joint_blocks(codes, sums_bytes=sums):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sums + 4 * 8 * a.nnz + 40 * 2**13 * 20


def test_partners_refuse() -> None:
    rng = np.random.default_rng(0)
    a = sparse_codes(rng, 20, 5)
    codes = PairedCodes.of([(a, a)])
    nan = a.copy()
    nan.data[0] = np.nan
    for parts, words in (
        ([], "no codes"),
        ([(a[:0], a[:0])], "no codes"),
        ([(a, a[:, :0])], "no codes"),
        ([(a, a[:9])], "source rows"),
        ([(a, a), (a, a[:, :4])], "Chunk 1"),
        ([(a, nan)], "NaN"),
        (iter([(a, a)]), "only once"),
    ):
        with pytest.raises(TransferError, match=words):
            PairedCodes.of(parts)
    with pytest.raises(TransferError, match="k ≥ 1"):
        top_partners(codes, 0)
    with pytest.raises(TransferError, match="Unknown measure"):
        top_partners(codes, 1, "cosine")  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="do not fit"):
        shift_null(codes, np.arange(3), np.array([[1, 2]]))


@pytest.mark.parametrize("measure", ["pearson", "phi", "jaccard"])
def test_shift_null_is_the_best_of_rolled_codes(measure: Measure) -> None:
    rng = np.random.default_rng(0)
    parts = [(sparse_codes(rng, rows, 20), sparse_codes(rng, rows, 25)) for rows in (40, 60)]
    null = shift_null(PairedCodes.of(parts), np.array([7, 3, 11]), np.array([[0, 0], [5, 12]]), measure)
    for draw, by in enumerate(((0, 0), (5, 12))):
        rolled = [np.roll(b.toarray(), -s, axis=0) for (_, b), s in zip(parts, by, strict=True)]
        source, target = sp.csr_matrix(sp.vstack([a for a, _ in parts])), sp.csr_matrix(np.vstack(rolled))
        assert np.allclose(null.best[draw], dense_measure(source, target, measure)[[7, 3, 11]].max(axis=1))
    assert np.array_equal(null.support, PairedCodes.of(parts).source.support[[7, 3, 11]])


def test_pearson_null_is_heavier_for_rare_features() -> None:
    """One threshold for all would pass rare features by chance; strata do not."""
    rng = np.random.default_rng(0)
    density = np.repeat([0.005, 0.1], 100)
    a, b = (
        sp.csr_matrix(np.where(rng.random((4000, 200)) < density, rng.exponential(size=(4000, 200)), 0))
        for _ in range(2)
    )
    null = shift_null(PairedCodes.of([(a, b)]), np.arange(200), np.array([500, 1000, 1500]), "pearson")
    rare, frequent = null.thresholds(0.95, np.array([20, 400]), strata=2)
    assert rare > 1.5 * frequent
    pooled = np.quantile(null.best, 0.95)
    assert np.mean(null.best[:, :100] > pooled) > 0.08  # nominal: 0.05
    assert abs(np.mean(null.best[:, :100] > rare) - 0.05) < 0.01

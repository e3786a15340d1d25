"""Lazy greedy selection: the plain method's picks, its guarantee, and the same from a store."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.coverage import plain_greedy, synthetic_store
from tests.test_coverage import csr, scattered
from transfer.core.errors import TransferError
from transfer.cover.selection import Candidates, Saturation, select

SATURATIONS = ("cap:1", "cap:3", "sqrt", "log")


def candidates(docs: sp.csr_matrix, features: np.ndarray | None = None) -> Candidates:
    n = docs.get_shape()[1]
    return Candidates.of(docs, np.zeros(n, dtype=np.float32), np.arange(n) if features is None else features)


def worth(pool: Candidates, taken: list[int], weights: np.ndarray, saturation: Saturation) -> float:
    counts = np.zeros(len(weights))
    for document in taken:
        counts[pool.row(document)] += 1
    return float(weights @ saturation.worth(counts))


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(SATURATIONS), st.booleans())
def test_it_takes_what_the_plain_method_takes(seed: int, kind: str, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    pool = candidates(scattered(rng, 40, 30, 0.15))
    weights = rng.random(30) if weighted else np.ones(30)
    saturation = Saturation.parse(kind)
    found = select(pool, 12, weights=weights, saturation=saturation)
    assert found.documents.tolist() == plain_greedy(pool, 12, weights, saturation).tolist()
    assert np.all(np.diff(found.gains) <= 1e-9) and np.all(np.diff(found.covered) >= 0)
    assert found.gains.sum() == pytest.approx(found.objective)
    assert found.objective == pytest.approx(worth(pool, found.documents.tolist(), weights, saturation))
    assert found.possible == pytest.approx(worth(pool, list(range(40)), weights, saturation))


def test_it_looks_at_few_documents_again() -> None:
    pool = candidates(scattered(np.random.default_rng(0), 3000, 400, 0.05))
    found = select(pool, 60, saturation=Saturation("sqrt"))
    assert found.evaluations < 0.3 * 3000 * 60


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(SATURATIONS))
def test_the_guarantee_holds_against_every_subset(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    pool, weights = candidates(scattered(rng, 9, 12, 0.3)), rng.random(12)
    saturation = Saturation.parse(kind)
    found = select(pool, 3, weights=weights, saturation=saturation)
    best = max(worth(pool, list(s), weights, saturation) for s in itertools.combinations(range(9), 3))
    assert found.objective >= (1 - 1 / math.e) * best - 1e-9


def test_greedy_by_hand() -> None:
    # Document 0 has three features; 1 and 2 have the other four between them, 3 repeats 1.
    docs = csr([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 0]])
    found = select(candidates(docs), 4)
    assert found.documents.tolist() == [0, 1, 2] and found.gains.tolist() == [3, 2, 1]
    assert found.covered.tolist() == [3, 5, 6] and found.exhausted
    # Two documents for each feature: 3 adds its three again, then nothing more to gain from 2 but one.
    found = select(candidates(docs), 4, saturation=Saturation("cap", 2))
    assert found.documents.tolist() == [0, 1, 3, 2] and found.gains.tolist() == [3, 3, 2, 1]
    assert not found.exhausted
    # Feature 5 is worth more than all others together.
    found = select(candidates(docs), 1, weights=np.array([1, 1, 1, 1, 1, 9.0]))
    assert found.documents.tolist() == [2]


def test_what_is_there_already_counts() -> None:
    docs = csr([[1, 1, 1, 0], [0, 0, 0, 1]])
    found = select(candidates(docs), 2, counts=np.array([5, 1, 1, 0]))
    assert found.documents.tolist() == [1] and found.covered.tolist() == [4] and found.covered_before == 3
    assert found.objective == found.possible == 4
    assert select(candidates(docs), 2, without=[0]).documents.tolist() == [1]
    assert len(select(candidates(docs), 2, without=[0, 1]).documents) == 0


def test_only_the_features_asked_for_count() -> None:
    docs = csr([[1, 1, 1, 0], [0, 0, 0, 1]])
    pool = candidates(docs, np.array([3]))
    assert select(pool, 2).documents.tolist() == [1] and pool.row(1).tolist() == [0] and len(pool.row(0)) == 0


@pytest.mark.parametrize("text", ["cap:0", "cap:x", "cube", "cap:nan"])
def test_bad_saturations_are_refused(text: str) -> None:
    with pytest.raises(TransferError):
        Saturation.parse(text)


def test_saturations_are_concave_and_start_at_one() -> None:
    counts = np.arange(50)
    for kind in SATURATIONS:
        saturation = Saturation.parse(kind)
        more = saturation.more(counts)
        assert saturation.worth(np.array([0, 1])).tolist() == [0, 1] and np.all(np.diff(more) <= 1e-12)
        assert Saturation.parse(str(saturation)) == saturation
        assert np.allclose(np.cumsum(more), saturation.worth(counts + 1))


def test_bad_settings_are_refused() -> None:
    pool = candidates(csr([[1, 0]]))
    with pytest.raises(TransferError, match="budget"):
        select(pool, 0)
    with pytest.raises(TransferError, match="not negative"):
        select(pool, 1, weights=np.array([1, -1.0]))
    with pytest.raises(TransferError, match="2 features, 3 weights"):
        select(pool, 1, weights=np.ones(3))


@pytest.mark.parametrize("n_features", [500, 70_000])
def test_a_store_gives_the_same_candidates(tmp_path: Path, n_features: int) -> None:
    store = synthetic_store(tmp_path, 300, n_features, 20)
    features = np.arange(0, n_features, 2)
    delta = np.full(n_features, 0.4, dtype=np.float32)
    whole, mapped = Candidates.of(store.docs, delta, features), Candidates.of_store(store, delta, features)
    assert np.array_equal(whole.bounds, mapped.bounds) and np.array_equal(whole.ids, mapped.ids)
    rows = np.arange(300) % 3 == 0
    some = Candidates.of_store(store, delta, features, rows=rows)
    assert all(np.array_equal(some.row(i), whole.row(i) if rows[i] else whole.row(i)[:0]) for i in range(300))
    assert np.array_equal(select(mapped, 20).documents, select(whole, 20).documents)
    assert Candidates.of_store(store, delta, np.arange(n_features)).ids.dtype == (
        np.uint16 if n_features == 500 else np.int32
    )
    nothing = Candidates.of_store(store, delta + 9, features)
    assert len(nothing.ids) == 0 and len(nothing) == 300 and len(select(nothing, 3).documents) == 0

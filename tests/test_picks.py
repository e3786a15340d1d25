"""Selection baselines: the greedy rule by hand, against another implementation, and within the quota of labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from transfer.core.texts import Corpus, Text
from transfer.grid.picks import by_coverage, facility_location, k_center, picker


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_k_center_goes_where_nothing_is() -> None:
    pool, there = on_circle(0, 10, 90, 170, 100), on_circle(5)
    assert k_center(pool, there, ["a"] * 5, {"a": 3}) == [3, 2, 4]


def test_facility_location_goes_where_most_is() -> None:
    pool, there = on_circle(0, 80, 85, 90, 180), on_circle(0)
    assert facility_location(pool, there, ["a"] * 5, {"a": 2}) == [2, 4]


def test_facility_location_agrees_with_apricot() -> None:
    apricot = pytest.importorskip("apricot")
    rng = np.random.default_rng(0)
    pool = rng.random((40, 5))
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    near = pool @ pool.T
    other = apricot.FacilityLocationSelection(12, metric="precomputed", optimizer="naive").fit(near).ranking
    mine = facility_location(pool, np.zeros((0, 5)), ["a"] * 40, {"a": 12})
    # Two texts that are each other's nearest add the same: which comes first is open, what it is worth is not.
    worth = [[near[order[: k + 1]].max(axis=0).sum() for k in range(12)] for order in (mine, other)]
    assert worth[0] == pytest.approx(worth[1])


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(0, 12), st.integers(0, 12))
def test_selections_fill_the_quota_as_far_as_there_are_texts(seed: int, n: int, a: int, b: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [str(x) for x in rng.choice(["a", "b"], n)]
    there = on_circle(0)[:, [0, 1, 1, 1]] * [1, 0, 0, 0]
    for choose in (k_center, facility_location):
        taken = choose(vectors, there, labels, {"a": a, "b": b})
        counts = Counter(labels[i] for i in taken)
        assert len(set(taken)) == len(taken)
        assert counts["a"] == min(a, labels.count("a")) and counts["b"] == min(b, labels.count("b"))


def test_coverage_takes_missing_features_first_then_more_of_them() -> None:
    docs = np.zeros((5, 6))
    docs[0, [0, 1]] = docs[1, [2]] = docs[2, [3, 4]] = docs[3, [0]] = docs[4, [2, 3]] = 1.0
    there = np.zeros((1, 6))
    there[0, [0, 1, 5]] = 1.0
    pool, seed, delta = sp.csr_matrix(docs), sp.csr_matrix(there), np.full(6, 0.5)
    labels = ["a"] * 5
    assert by_coverage(pool, seed, delta, np.arange(6), labels, {"a": 2}) == [2, 1]
    # Everything is covered by then: what comes next covers most a second time.
    assert by_coverage(pool, seed, delta, np.arange(6), labels, {"a": 4})[2] == 0
    assert sorted(by_coverage(pool, seed, delta, np.arange(6), ["a", "b", "a", "b", "a"], {"a": 1, "b": 1})) == [1, 2]


def test_texts_of_the_seed_are_not_picked_again() -> None:
    texts = tuple(Text(f"a{i}", f"text {i}", "x") for i in range(4))
    corpora = {"anchor": Corpus("anchor", texts), "seed": Corpus("seed", (Text("s", "text 3", "x"),))}
    angles = {f"text {i}": float(30 * i) for i in range(4)}
    docs = sp.csr_matrix(np.eye(4)), sp.csr_matrix(np.eye(4)[3:])
    pick = picker(corpora, lambda t: on_circle(*(angles[x] for x in t)), docs, np.zeros(4), np.arange(4))
    for arm in ("k_center", "facility_location", "coverage_selection"):
        assert {t.id for t in pick(arm, {"x": 9})} == {"a0", "a1", "a2"}

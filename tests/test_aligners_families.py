"""Families over three spaces, their shares, composition of alignments, and scores against truth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.associativity import associativity
from aligners.base import coupling_of, match_columns
from aligners.families import families, match_graph, shares, wilson
from aligners.metrics import Agreement, agreement
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureSpace


def space(name: str) -> FeatureSpace:
    return FeatureSpace(name, name, 1, name, name, 10, 4, "topk-1", 0)


def align(a: str, b: str, pairs: list[tuple[int, int]], q: float = 0.01) -> Alignment:
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    matches = match_columns(rows[:, 0], rows[:, 1], np.ones(len(rows)))
    matches["q_value"] = np.full(len(rows), q)
    return Alignment(space(a), space(b), "test", coupling_of(matches, (10, 10)), matches, True)


def test_three_spaces() -> None:
    found = families(
        [
            align("a", "b", [(0, 0), (1, 1), (2, 2), (5, 5)]),
            align("b", "c", [(0, 0), (1, 1), (6, 6)]),
            align("a", "c", [(0, 0), (1, 3), (7, 7)]),
        ]
    )
    a, b, c = (space(n).id for n in "abc")
    assert found.universal == ({a: 0, b: 0, c: 0},)
    assert found.pairs == {f"{a}|{b}": 4, f"{a}|{c}": 3, f"{b}|{c}": 3}
    assert found.pairs_only == 4  # a2-b2, a5-b5, b6-c6, a7-c7
    assert found.broken == 1  # c3-a1-b1-c1 is no cycle
    # the triangle holds three paths of two edges, the broken group c3-a1-b1 and a1-b1-c1
    assert (found.chains, found.chains_closed) == (5, 3)
    assert found.consistency == 0.6


def test_two_spaces_and_direction() -> None:
    found = families([align("b", "a", [(3, 4)])])
    assert found.universal == ({space("a").id: 4, space("b").id: 3},)
    assert found.consistency is None


def test_q_limit_drops_weak_and_unscored_matches() -> None:
    unscored = align("a", "b", [(0, 0)], q=float("nan"))
    assert len(match_graph([unscored]).edges) == 1
    assert len(match_graph([unscored], q_max=0.1).edges) == 0
    assert len(match_graph([align("a", "b", [(0, 0)], q=0.2)], q_max=0.1).edges) == 0


def test_families_refuse() -> None:
    with pytest.raises(TransferError, match="at least one"):
        families([])
    with pytest.raises(TransferError, match="with itself"):
        families([align("a", "a", [(0, 0)])])


def test_agreement() -> None:
    got = agreement(align("a", "b", [(0, 0), (1, 1), (2, 3)]), np.array([[0, 0], [1, 1], [2, 2], [4, 4]]))
    assert got == Agreement(n_matches=3, n_true=4, n_right=2)
    assert (got.precision, got.recall, got.f1) == (2 / 3, 0.5, 4 / 7)
    assert agreement(align("a", "b", []), np.array([[0, 0]])).precision == 0
    with pytest.raises(TransferError, match="No true pair"):
        agreement(align("a", "b", [(0, 0)]), np.empty((0, 2), dtype=np.int64))


def test_reversed_alignment_gives_the_same_families() -> None:
    one = align("a", "b", [(0, 3), (1, 2)])
    assert families([one]) == families([one.reversed()])


def scored(a: str, b: str, pairs: list[tuple[int, int]], q: list[float], testable: int = 8) -> Alignment:
    made = align(a, b, pairs)
    info = {"testable_source": testable, "testable_target": testable + 1}
    return dataclasses.replace(made, matches={**made.matches, "q_value": np.array(q)}, info=info)


def test_shares_count_testable_features_only() -> None:
    found = shares(
        [
            scored("a", "b", [(0, 0), (1, 1), (2, 2)], [0.01, 0.01, 0.5]),
            scored("b", "c", [(0, 0), (4, 4)], [0.01, float("nan")]),
            scored("a", "c", [(0, 0)], [0.01]),
        ],
        q_max=0.05,
    )
    a, b, c = found
    assert [s.space for s in found] == sorted(space(n).id for n in "abc")
    # a: 8 testable in both pairs; 0 is universal, 1 shared, 2 was tested and is private
    assert (a.n_testable, a.n_untestable, a.n_undecided) == (8, 2, 0)
    assert (a.universal.value, a.shared.value, a.private.value) == (1 / 8, 1 / 8, 6 / 8)
    # b: 9 and 8 testable; its feature 4 has one match, which could not be tested
    assert (b.n_testable, b.n_testable_least, b.n_untestable, b.n_undecided) == (8, 8, 1, 1)
    assert (c.universal.value, c.shared.value) == (1 / 8, 0)
    for one in found:
        for part in (one.universal, one.shared, one.private):
            assert part.low <= part.value <= part.high and part.high - part.low > 0.2  # 8 features say little
            assert part.method == "wilson" and part.n == one.n_testable


def test_shares_refuse_more_matches_than_testable_features() -> None:
    with pytest.raises(TransferError, match="2 features of a.* call 1 testable"):
        shares([scored("a", "b", [(0, 0), (1, 1)], [0.01, 0.01], testable=1)])


def test_wilson() -> None:
    assert wilson(0, 0).method == "none"
    ci = wilson(3, 10)
    assert (ci.low, ci.high) == pytest.approx((0.10779, 0.60322), abs=1e-5)  # textbook value


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0, 1))
def test_shares_add_up(seed: int, n_spaces: int, keep: float) -> None:
    rng = np.random.default_rng(seed)
    names = "abcd"[:n_spaces]
    alignments = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            rows = np.flatnonzero(rng.uniform(size=10) < keep)
            alignments.append(align(a, b, list(zip(rows.tolist(), rng.permutation(10)[: len(rows)], strict=True))))
    found = shares(alignments)
    for one in found:
        assert one.universal.value + one.shared.value + one.private.value == pytest.approx(1)
    # with one-to-one matches each universal family holds one feature of each space
    assert len({round(one.universal.value * 10) for one in found}) == 1
    again = shares([x.reversed() for x in reversed(alignments)])
    assert again == found


def triangle(rng: np.random.Generator, n: int, wrong: float) -> list[Alignment]:
    """A permuted dictionary in three spaces; a share of the B-C matches is shuffled."""
    order = {name: rng.permutation(n) for name in "abc"}

    def one(a: str, b: str, tgt: np.ndarray) -> Alignment:
        matches = match_columns(order[a], tgt, np.ones(n))
        spaces = [dataclasses.replace(space(x), n_features=n) for x in (a, b)]
        return Alignment(spaces[0], spaces[1], "test", coupling_of(matches, (n, n)), matches, True)

    bc = order["c"].copy()
    moved = np.flatnonzero(rng.uniform(size=n) < wrong)
    bc[moved] = bc[np.roll(moved, 1)]
    return [one("a", "b", order["b"]), one("b", "c", bc), one("a", "c", order["c"])]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
def test_composition_counts_what_was_shuffled(seed: int, wrong: float) -> None:
    rng = np.random.default_rng(seed)
    ab, bc, ac = triangle(rng, 40, wrong)
    found = associativity(ab, bc, ac, n_null=50)
    right = int(np.sum((ab_matrix(ab) @ ab_matrix(bc)) * ab_matrix(ac)))
    assert (found.n_claims, found.n_agree, found.n_contradicted, found.n_silent) == (40, right, 40 - right, 0)
    assert found.overlap.value == pytest.approx(right / 40) == found.share.value == found.share_where_direct.value
    assert found.expected < 0.1 and found.overlap_expected < 0.1 and found.lost == 0
    if wrong == 0:
        assert found.share.value == 1 and found.p_value == pytest.approx(1 / 51)
    # whichever way round the three are given
    turned = associativity(bc.reversed(), ab.reversed(), ac.reversed(), n_null=50)
    assert turned.spaces == found.spaces[::-1]
    assert (turned.n_claims, turned.n_agree, turned.overlap.value) == (40, right, pytest.approx(found.overlap.value))


def ab_matrix(alignment: Alignment) -> np.ndarray:
    return alignment.coupling.toarray()


def test_chance_composition_is_no_better_than_chance() -> None:
    p_values, shares_found, expected = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ab, bc, _ = triangle(rng, 60, 0.0)
        _, _, other = triangle(rng, 60, 0.0)
        found = associativity(ab, bc, other, n_null=40)
        p_values.append(found.p_value)
        shares_found.append(found.share.value)
        expected.append(found.expected)
    assert np.mean(np.array(p_values) <= 0.1) < 0.3
    assert np.mean(expected) == pytest.approx(1 / 60, rel=0.1)
    assert np.mean(shares_found) == pytest.approx(1 / 60, rel=0.5)


def test_silent_claims_and_lost_mass() -> None:
    ab, bc = align("a", "b", [(0, 0), (1, 1), (2, 2)]), align("b", "c", [(0, 0), (1, 1)])
    found = associativity(ab, bc, align("a", "c", [(0, 0)]), n_null=20)
    assert (found.n_claims, found.n_agree, found.n_contradicted, found.n_silent) == (2, 1, 0, 1)
    assert (found.share.value, found.share_where_direct.value) == (0.5, 1)
    assert found.lost == pytest.approx(1 / 3) and found.overlap.value == 1 and found.overlap.n == 1
    filtered = associativity(ab, bc, align("a", "c", [(0, 0)], q=0.5), q_max=0.05, n_null=20)
    assert (filtered.n_agree, filtered.n_silent) == (0, 2)
    nothing = associativity(ab, align("b", "c", []), align("a", "c", []), n_null=20)
    assert nothing.n_claims == 0 and np.isnan(nothing.share.value) and np.isnan(nothing.p_value)
    assert nothing.lost == 1 and np.isnan(nothing.overlap.value)


def test_soft_overlap_by_hand() -> None:
    def coupled(a: str, b: str, dense: np.ndarray) -> Alignment:
        return dataclasses.replace(align(a, b, []), coupling=sp.csr_matrix(np.pad(dense, ((0, 8), (0, 8)))))

    half, eye = np.array([[1.0, 1.0], [0.0, 2.0]]), np.eye(2)
    found = associativity(coupled("a", "b", half), coupled("b", "c", eye), coupled("a", "c", eye))
    assert found.overlap.value == pytest.approx((0.5 + 1.0) / 2) and found.overlap.n == 2


def test_associativity_refuses_what_is_no_triangle() -> None:
    ab, bc = align("a", "b", [(0, 0)]), align("b", "c", [(0, 0)])
    for third in (ab, align("b", "d", []), align("c", "d", []), align("a", "a", [])):
        with pytest.raises(TransferError, match="over three spaces"):
            associativity(ab, bc, third)

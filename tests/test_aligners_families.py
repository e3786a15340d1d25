"""Families over three spaces, and scores against truth."""

from __future__ import annotations

import numpy as np
import pytest

from aligners.base import coupling_of, match_columns
from aligners.families import families, match_graph
from aligners.metrics import Agreement, agreement
from transfer.core.errors import TransferError
from transfer.core.objects import Alignment, FeatureSpace


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

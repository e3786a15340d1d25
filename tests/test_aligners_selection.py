"""Judged edges become matches: best of both ends, one-to-one, or transport with its certificate."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from aligners.confidence import Judged
from aligners.fused import FusedAligner
from aligners.metrics import false_share, is_right
from aligners.selection import EVEN, GAP, Rule, select_edges
from aligners.stress import STRESS, StressPair, stress_pair
from transfer.core.errors import TransferError

SMALL = STRESS.scaled(0.06, d_source=96, d_target=128)
NO_EDGE = np.zeros(0, dtype=np.int64)


def judged(confidence: np.ndarray) -> Judged:
    log_odds = np.log(confidence) - np.log1p(-confidence)
    return Judged(confidence, log_odds, np.zeros((1, 3)), 0.5, 1, True)


def choose(src: np.ndarray, tgt: np.ndarray, p: np.ndarray, shape: tuple[int, int], rule: Rule):
    return select_edges(src, tgt, judged(p), np.zeros(len(p)), shape, rule, level=0.05, max_iter=5000, tol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_one_to_one_has_the_most_expected_right_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.02, 0.98, size=(12, 9))
    src, tgt = (ids.ravel() for ids in np.indices(p.shape))
    found = choose(src, tgt, p.ravel(), (12, 9), "one_to_one").chosen
    gain = np.maximum(p - EVEN, 0)
    best = gain[linear_sum_assignment(-gain)].sum()
    assert np.sum(p.ravel()[found] - EVEN) == pytest.approx(best, abs=9 * 1e-3)
    assert len(np.unique(src[found])) == len(found) == len(np.unique(tgt[found]))


@pytest.mark.parametrize("rule", ["transport", "exact"])
def test_a_split_shares_its_unit_and_the_certificate_holds(rule: Rule) -> None:
    src, tgt = np.array([0, 0, 1, 2]), np.array([0, 1, 2, 3])
    found = choose(src, tgt, np.array([0.97, 0.97, 0.9, 0.2]), (3, 4), rule)
    plan = found.coupling.toarray()
    assert found.converged and found.info["relative_gap"] <= GAP
    assert found.info["dual"] <= found.info["primal"] + 1e-9
    assert plan[0].sum() == pytest.approx(1, abs=0.02) and plan[1, 2] > 0.9
    assert plan[2, 3] < 0.01, "an edge that is more likely wrong carries mass"
    if rule == "transport":  # the exact plan may give it all to one half: both cost the same
        assert plan[0, 0] == pytest.approx(plan[0, 1], abs=1e-3)


@pytest.mark.parametrize("rule", ["mutual", "one_to_one", "transport", "exact"])
def test_nothing_likely_gives_nothing(rule: Rule) -> None:
    found = choose(np.array([0, 1]), np.array([1, 0]), np.array([1e-4, 1e-5]), (2, 2), rule)
    assert found.coupling.nnz == 0 and found.converged
    empty = choose(NO_EDGE, NO_EDGE, np.zeros(0), (2, 2), rule)
    assert not len(empty.chosen) and empty.coupling.shape == (2, 2)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(TransferError, match="Unknown rule"):
        choose(NO_EDGE, NO_EDGE, np.zeros(0), (1, 1), "best")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def case() -> StressPair:
    return stress_pair(SMALL, seed=3)


@pytest.mark.parametrize("rule", ["one_to_one", "transport", "exact"])
def test_every_rule_passes_the_stress_test(case: StressPair, rule: Rule) -> None:
    found = FusedAligner(rule=rule).fit(case.source, case.target, pairs=case.pairs).alignment_
    assert found.converged and false_share(found, case.truth, 0.05) <= 0.03
    held = found.coupling.tocoo()
    heavy = held.data >= 0.2
    right = is_right(held.row[heavy], held.col[heavy], case.truth)
    assert right.mean() >= 0.97
    assert len(np.unique(case.left.concept[held.row[heavy][right]])) / SMALL.n_shared >= 0.98
    if rule == "transport":
        kept = set(zip(held.row[heavy].tolist(), held.col[heavy].tolist(), strict=True))
        splits = [all((int(i), int(j)) in kept for i, j in group) for group in case.split_edges()]
        assert np.mean(splits) >= 0.9


def test_too_few_iterations_are_told(case: StressPair) -> None:
    once = FusedAligner(rule="transport", max_iter=1).fit(case.source, case.target, pairs=case.pairs).alignment_
    assert not once.converged
    with pytest.raises(TransferError, match="converge"):
        dataclasses.replace(once).top(1)

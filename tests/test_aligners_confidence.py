"""Confidence is a probability, q-values hold under children and topics, and splits survive."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.activation import ActivationAligner
from aligners.calibrate import score_matches, shuffled
from aligners.confidence import Evidence, anchors, fisher, judge, q_values
from aligners.fused import FusedAligner
from aligners.metrics import agreement, brier_score, false_share, is_right, reliability
from aligners.planted import planted_pair
from aligners.selection import mutual_best
from aligners.stress import STRESS, StressPair, stress_pair
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError

SMALL = STRESS.scaled(0.1, noise=0.4, d_source=96, d_target=128)


@pytest.fixture(scope="module")
def case() -> StressPair:
    return stress_pair(SMALL, seed=11)


@pytest.fixture(scope="module")
def fitted(case: StressPair) -> Alignment:
    return FusedAligner().fit(case.source, case.target, pairs=case.pairs).alignment_


def planted_edges(
    seed: int, null: int = 4000, related: int = 300, same: int = 300, spread: float = 0.12
) -> tuple[Evidence, np.ndarray]:
    """Edges with known kinds: true cosines 0, .36 and .6, two strata that hold them in other shares."""
    rng = np.random.default_rng(seed)
    z = np.concatenate([np.zeros(null), np.full(related, fisher(0.36)), np.full(same, fisher(0.6))])
    kind = np.repeat([0, 1, 2], [null, related, same])
    stratum = (rng.uniform(size=len(z)) < np.array([0.2, 0.8, 0.5])[kind]).astype(np.int64)
    cosine = np.tanh(z + spread * rng.normal(size=len(z)))
    return Evidence(cosine, stratum, np.bincount(stratum), np.full(2, -1.0), spread, 0.6, spread), kind


def test_mixture_finds_the_shares() -> None:
    evidence, kind = planted_edges(0)
    judged = judge(evidence)
    assert judged.converged
    for s in range(2):
        true = np.bincount(kind[evidence.stratum == s], minlength=3) / np.sum(evidence.stratum == s)
        assert np.allclose(judged.shares[s], true, atol=0.04)


def test_confidence_is_a_probability() -> None:
    said, right = [], []
    for seed in range(5):
        evidence, kind = planted_edges(seed)
        said.append(judge(evidence).confidence)
        right.append(kind == 2)
    curve = reliability(np.concatenate(said), np.concatenate(right), bins=5)
    assert len(curve.count) == 5
    assert np.all(np.abs(curve.said - curve.came_true) < 0.12) and curve.error < 0.02


def test_more_cosine_is_never_worse() -> None:
    evidence, _ = planted_edges(1)
    judged = judge(evidence)
    for s in range(2):
        inside = np.flatnonzero(evidence.stratum == s)
        order = inside[np.argsort(evidence.cosine[inside])]
        assert np.all(np.diff(judged.log_odds[order]) >= -1e-9)


def test_best_of_very_many_are_not_believed() -> None:
    """The largest of a million unrelated cosines are edges; the censored bin knows how many there were."""
    rng = np.random.default_rng(2)
    cosine = np.sort(0.12 * rng.normal(size=10**6))[-2000:]
    evidence, _ = planted_edges(2)
    both = dataclasses.replace(
        evidence,
        cosine=np.concatenate([evidence.cosine, cosine]),
        stratum=np.concatenate([evidence.stratum, np.full(2000, 2)]),
        total=np.append(evidence.total, 10**6),
        floor=np.array([-1.0, -1.0, cosine[0]]),
    )
    judged = judge(both)
    assert judged.confidence[-2000:].sum() < 20 and judged.shares[2, 0] > 0.999
    naive = judge(dataclasses.replace(both, total=np.append(evidence.total, 2000), floor=np.full(3, -1.0)))
    assert naive.shares[2, 0] < 0.5


def test_anchor_is_the_upper_group_and_one_group_is_not_cut() -> None:
    rng = np.random.default_rng(3)
    right, wrong = 0.8 + 0.08 * rng.normal(size=300), 0.25 + 0.1 * rng.normal(size=700)
    centre, spread = anchors(np.tanh(np.concatenate([right, wrong])))
    assert fisher(centre) == pytest.approx(0.8, abs=0.03) and spread == pytest.approx(0.08, abs=0.02)
    alone, around = anchors(np.tanh(right))
    assert fisher(alone) == pytest.approx(0.8, abs=0.03) and around == pytest.approx(0.08, abs=0.02)
    assert anchors(np.ones(50)) == (pytest.approx(0.9999), pytest.approx(0, abs=1e-9))


def test_nothing_to_judge_is_refused() -> None:
    evidence, _ = planted_edges(0)
    with pytest.raises(TransferError, match="cannot be judged"):
        judge(dataclasses.replace(evidence, cosine=np.zeros(0), stratum=np.zeros(0, dtype=np.int64)))
    with pytest.raises(TransferError, match="cannot be judged"):
        judge(dataclasses.replace(evidence, spread=0.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_q_values_follow_the_confidence(values: list[float]) -> None:
    confidence = np.array([*values, np.nan])
    q = q_values(confidence)
    assert np.isnan(q[-1]) and np.all((q[:-1] >= 0) & (q[:-1] <= 1))
    order = np.argsort(-confidence[:-1], kind="stable")
    assert np.all(np.diff(q[order]) >= -1e-12)
    assert np.all(q[:-1] >= np.minimum(1 - np.max(values), 1) - 1e-12)
    assert np.all(q[:-1][confidence[:-1] < 0.5] == 1)


def test_q_values_by_hand() -> None:
    q = q_values(np.array([1.0] * 40 + [0.6]))
    assert q[0] == pytest.approx(1 / 40)
    assert q[-1] == pytest.approx((1 + 0.4 + np.sqrt(0.24)) / 41)


def test_mutual_best_takes_the_next_score_on_ties() -> None:
    src, tgt = np.array([0, 0, 1]), np.array([0, 1, 1])
    assert mutual_best(src, tgt, np.array([1.0, 1.0, 1.0]), np.array([0.1, 0.9, 0.2])).tolist() == [1]
    assert mutual_best(src, tgt, np.array([3.0, 1.0, 2.0])).tolist() == [0, 2]


def test_stress_is_passed_at_default_settings(case: StressPair, fitted: Alignment) -> None:
    assert fitted.converged
    edges = fitted.coupling.tocoo()
    right = is_right(edges.row, edges.col, case.truth)
    assert right.mean() >= 0.97
    assert len(np.unique(case.left.concept[edges.row[right]])) / SMALL.n_shared >= 0.99
    assert false_share(fitted, case.truth, 0.05) <= 0.03
    kept = set(zip(edges.row.tolist(), edges.col.tolist(), strict=True))
    splits = [all((int(i), int(j)) in kept for i, j in group) for group in case.split_edges()]
    assert np.mean(splits) >= 0.9


def test_activations_alone_fail_where_the_fused_aligner_passes(case: StressPair) -> None:
    """The trap: co-firing with the shift null promises 5 % and is wrong far more often."""
    first, second = case.pairs.split(0.5, seed=0)
    plain = ActivationAligner(min_support=3).fit(case.source, case.target, pairs=first).alignment_
    assert false_share(score_matches(plain, second), case.truth, 0.05) > 0.2
    fused = FusedAligner().fit(case.source, case.target, pairs=first)
    assert false_share(fused.score(second), case.truth, 0.05) <= 0.05


def test_confidence_of_matches_is_calibrated() -> None:
    said, right = [], []
    for seed in range(3):
        case = stress_pair(dataclasses.replace(SMALL, noise=0.6, d_source=64, d_target=80), seed=20 + seed)
        found = FusedAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
        said.append(found.matches["score"])
        right.append(is_right(found.matches["source"], found.matches["target"], case.truth))
    confidence, truth = np.concatenate(said), np.concatenate(right)
    assert 0.3 < truth.mean() < 0.97
    assert brier_score(confidence, truth) < truth.mean() * (1 - truth.mean())
    assert reliability(confidence, truth).error < 0.08


@pytest.mark.parametrize("children", [0.0, 0.5])
def test_false_discoveries_stay_below_nominal_where_geometry_is_poor(children: float) -> None:
    """Little overlap, much noise: fewer are found, but what is found holds."""
    setting = dataclasses.replace(
        SMALL, n_shared=200, n_own=400, n_concepts=1200, children=children, noise=0.6, d_source=48, d_target=64
    )
    shares, edges = [], []
    for seed in range(3):
        case = stress_pair(setting, seed=30 + seed)
        found = FusedAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
        shares.append(false_share(found, case.truth, 0.05))
        edges.append(found.coupling.nnz)
    assert np.mean(shares) <= 0.05
    if not children:
        assert min(edges) > 100


def test_a_space_that_never_settles_promises_less() -> None:
    """A fifth of the pairs accepted here would be wrong, in a space that still exchanges a tenth of them a round."""
    setting = dataclasses.replace(
        STRESS,
        n_shared=157,
        n_own=419,
        children=0.5,
        n_concepts=2000,
        active=16 / 3,
        n_topics=15,
        noise=0.6,
        d_source=96,
        d_target=128,
    )
    case = stress_pair(setting, seed=3)
    found = FusedAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
    likely = found.matches["score"] >= 0.9
    right = is_right(found.matches["source"][likely], found.matches["target"][likely], case.truth)
    assert not found.converged and 0.1 < 1 - right.mean() < 0.4
    assert found.matches["q_value"].min() > 0.05 and found.coupling.nnz == 0


def test_unrelated_spaces_have_no_match() -> None:
    for seed in range(3):
        case = planted_pair(n_source=120, n_target=100, overlap=0.0, topicality=0.8, seed=seed)
        found = FusedAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
        assert found.coupling.nnz == 0 and not np.any(found.matches["q_value"] <= 0.05)


def test_shuffled_directions_have_no_match(case: StressPair) -> None:
    order = np.random.default_rng(0).permutation(case.target.space.n_features)
    target = dataclasses.replace(case.target, directions=case.target.directions[order])
    found = FusedAligner().fit(case.source, target, pairs=case.pairs).alignment_
    assert found.coupling.nnz <= 2


def test_untestable_is_not_unmatched(case: StressPair) -> None:
    codes = case.pairs.source.tolil(copy=True)
    dead = case.truth[:5, 0]
    codes[:, dead] = 0
    pairs = dataclasses.replace(case.pairs, source=codes.tocsr())
    found = FusedAligner().fit(case.source, case.target, pairs=pairs).alignment_
    info = found.info
    assert info["dead_source"] >= len(np.unique(dead)) and not np.isin(found.matches["source"], dead).any()
    coupled = np.sum(np.diff(found.coupling.indptr) > 0)
    assert info["unmatched_source"] == info["testable_source"] - coupled
    assert info["testable_source"] + info["dead_source"] + info["rare_source"] + info["always_on_source"] == 875


def test_score_keeps_the_stricter_q_value(case: StressPair) -> None:
    first, second = case.pairs.split(0.6, seed=1)
    aligner = FusedAligner().fit(case.source, case.target, pairs=first)
    fitted = aligner.alignment_
    bare = {name: values for name, values in fitted.matches.items() if name != "fit_q"}
    own, shift = fitted.matches["fit_q"], score_matches(dataclasses.replace(fitted, matches=bare), second)
    scored = aligner.score(second)
    expected = np.maximum(own, shift.matches["q_value"])
    assert np.array_equal(scored.matches["q_value"], expected, equal_nan=True)
    assert np.any(own > shift.matches["q_value"]) and np.array_equal(scored.matches["fit_q"], own)
    assert "fit_q" not in shuffled(fitted).matches


def test_metrics_by_hand(case: StressPair, fitted: Alignment) -> None:
    confidence, right = np.array([0.1, 0.15, 0.9, 1.0]), np.array([False, True, True, True])
    assert brier_score(confidence, right) == pytest.approx((0.01 + 0.85**2 + 0.01) / 4)
    curve = reliability(confidence, right, bins=2)
    assert curve.said.tolist() == pytest.approx([0.125, 0.95]) and curve.came_true.tolist() == [0.5, 1.0]
    assert curve.count.tolist() == [2, 2] and curve.error == pytest.approx((0.375 + 0.05) / 2)
    assert is_right(np.array([0, 1]), np.array([5, 2]), np.array([[0, 5], [1, 5]])).tolist() == [True, False]
    for bad in (np.array([]), np.array([1.5]), np.array([np.nan])):
        with pytest.raises(TransferError, match="probabilities"):
            brier_score(bad, np.ones(len(bad), dtype=bool))
    assert false_share(fitted, case.truth[:0], 0.05) == 1.0
    assert false_share(fitted, case.truth, -1.0) == 0.0
    assert agreement(fitted, case.truth).recall > 0.5

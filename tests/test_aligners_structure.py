"""Relative representations, seeded and cold Gromov-Wasserstein, and global similarities against their null."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from aligners.checks import check_aligner
from aligners.global_similarity import MEASURES, global_similarity, linear_cka, mutual_neighbours, rsa, svcca
from aligners.gromov import GromovAligner, distances, fused_plan, warm_start
from aligners.metrics import agreement, is_right
from aligners.planted import Planted, planted_pair
from aligners.relative import RelativeAligner, reference_pairs, relative_rows, restricted
from aligners.stress import STRESS, StressPair, stress_pair
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.store import PairedActivations


@pytest.fixture(scope="module")
def stress() -> StressPair:
    """875 features a side, splits, children, half of the events missing."""
    return stress_pair(STRESS.scaled(0.1), seed=1)


def similarity_of_truth(case: Planted) -> float:
    """RSA of the true pairs' directions."""
    i, j = case.truth.T
    return rsa(case.source.directions[i], case.target.directions[j])(np.arange(len(i)))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# Reference pairs and relative representations.


@pytest.mark.parametrize("aligner", [RelativeAligner(), RelativeAligner(rule="one_to_one", references=20)], ids=repr)
def test_relative_contract(aligner: RelativeAligner) -> None:
    check_aligner(aligner)


def test_ratio_orders_reference_pairs_where_phi_misleads(stress: StressPair) -> None:
    every = np.arange(875)
    found = reference_pairs(restricted(stress.pairs, every, every))
    right = is_right(found.pairs[:, 0], found.pairs[:, 1], stress.truth)
    by_phi = right[np.argsort(-found.phi)]
    assert right[:100].mean() > 0.9 and by_phi[:100].mean() < 0.5
    assert 0.5 < right.mean() < 0.7
    assert np.all(np.diff(found.ratio) <= 0)
    assert len(np.unique(found.pairs[:, 0])) == len(np.unique(found.pairs[:, 1])) == len(found.pairs)
    assert np.array_equal(reference_pairs(restricted(stress.pairs, every, every), 10).pairs, found.pairs[:10])


def test_relative_rows_leave_out_the_own_reference() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 8)) * rng.uniform(1, 5, (30, 1))
    ids, members = np.arange(2, 30), np.array([4, 0, 9, 20])
    got = relative_rows(x, ids, members)
    cosine = unit(unit(x[ids]) - unit(x[ids]).mean(axis=0))
    cosine = cosine @ cosine[members].T
    cosine[members, np.arange(4)] = 0
    assert np.allclose(got, unit(cosine - cosine.mean(axis=0)))


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_relative_rows_do_not_see_rotation_scale_or_width(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 6))
    turned = (x @ np.linalg.qr(rng.normal(size=(9, 6)))[0].T) * rng.uniform(0.5, 3, (40, 1))
    members = rng.permutation(40)[:12]
    one, other = (relative_rows(rows, np.arange(40), members) for rows in (x, turned))
    assert np.allclose(one, other, atol=1e-9)


def test_relative_repairs_what_activations_confuse(stress: StressPair) -> None:
    found = RelativeAligner().fit(stress.source, stress.target, pairs=stress.pairs).alignment_
    i, j, score = (found.matches[name] for name in ("source", "target", "score"))
    right = is_right(i, j, stress.truth)
    concepts = np.unique(stress.left.concept[stress.truth[:, 0]])
    assert len(np.unique(stress.left.concept[i[right]])) >= 0.98 * len(concepts)
    assert right[np.argsort(-score)[:400]].mean() > 0.98
    assert found.info["reference_pairs"] <= 512 and found.info["references_kept"] > 0.4


def test_references_tell_when_the_geometries_have_nothing_in_common(stress: StressPair) -> None:
    random = np.random.default_rng(0).normal(size=stress.target.directions.shape).astype(np.float32)
    target = dataclasses.replace(stress.target, directions=random)
    found = RelativeAligner().fit(stress.source, target, pairs=stress.pairs).alignment_
    assert found.info["references_kept"] < 0.05
    assert is_right(found.matches["source"], found.matches["target"], stress.truth).mean() < 0.05


def test_relative_one_to_one_matches_each_feature_once(stress: StressPair) -> None:
    found = RelativeAligner(rule="one_to_one").fit(stress.source, stress.target, pairs=stress.pairs).alignment_
    i, j = found.matches["source"], found.matches["target"]
    assert len(np.unique(i)) == len(np.unique(j)) == len(i)
    mutual = RelativeAligner().fit(stress.source, stress.target, pairs=stress.pairs).alignment_
    assert right_ones(found, stress) >= 0.98 * right_ones(mutual, stress)


def right_ones(found: Alignment, stress: StressPair) -> int:
    return agreement(found, stress.truth).n_right


def test_relative_refuses_what_it_cannot_do() -> None:
    case = planted_pair(n_source=20, n_target=20)
    with pytest.raises(TransferError, match="Unknown matching rule"):
        RelativeAligner(rule="any").fit(case.source, case.target, pairs=case.pairs)  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="reference pairs"):
        RelativeAligner(references=2).fit(case.source, case.target, pairs=case.pairs)


def test_features_without_direction_are_counted() -> None:
    case = planted_pair(n_source=40, n_target=40)
    directions = case.source.directions.copy()
    directions[[3, 7]] = 0
    view = dataclasses.replace(case.source, directions=directions)
    for aligner in (RelativeAligner(), GromovAligner(), GromovAligner(start="cold")):
        found = aligner.fit(view, case.target, pairs=case.pairs).alignment_
        assert found.info["zero_directions_source"] == 2
        assert not np.isin(found.matches["source"], [3, 7]).any()


# Gromov-Wasserstein.


@pytest.mark.parametrize(
    "aligner", [GromovAligner(), GromovAligner(alpha=0.9, max_iter=50), GromovAligner(start="cold")], ids=repr
)
def test_gromov_contract(aligner: GromovAligner) -> None:
    check_aligner(aligner)


@pytest.mark.parametrize(("d_target", "noise"), [(256, 0.3), (256, 0.15), (40, 0.3)])
def test_seeds_find_what_cold_does_not(d_target: int, noise: float) -> None:
    case = planted_pair(n_source=120, n_target=110, overlap=1.0, d_source=32, d_target=d_target, noise=noise)
    assert 0.6 < similarity_of_truth(case) < 0.95
    seeded = GromovAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
    cold = GromovAligner(start="cold").fit(case.source, case.target, pairs=case.pairs).alignment_
    assert agreement(seeded, case.truth).recall == 1.0
    assert agreement(cold, case.truth).recall <= 0.1
    for found in (seeded, cold):
        assert found.converged and found.row_error < 1e-9 and found.col_error < 1e-9 and np.isfinite(found.cost)
    # The truth has the lower loss: the cold start ends in a local optimum.
    exact = warm_start(case.truth, (120, 110))
    left, right = distances(case.source.directions), distances(case.target.directions)
    truth = fused_plan(left, right, None, exact, alpha=1.0, max_iter=1, tol=1e-9)
    assert truth.loss < 0.9 * cold.cost
    assert (seeded.method, cold.method) == ("gromov", "gromov-cold")


def test_cold_finds_exact_copies_only() -> None:
    case = planted_pair(n_source=80, n_target=70, d_source=24, d_target=24, same_space=True)
    order = np.random.default_rng(0).permutation(80)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0]
    exact = dataclasses.replace(case.source, directions=(case.source.directions @ rotation)[order].astype(np.float32))
    found = GromovAligner(start="cold").fit(case.source, exact).alignment_
    assert np.array_equal(order[found.matches["target"]], found.matches["source"]) and len(found) == 80
    rough = exact.directions + 0.05 * np.random.default_rng(2).normal(size=exact.directions.shape)
    near = dataclasses.replace(exact, directions=rough.astype(np.float32))
    found = GromovAligner(start="cold").fit(case.source, near).alignment_
    assert np.mean(order[found.matches["target"]] == found.matches["source"]) < 0.2


def test_few_seeds_and_unshared_features() -> None:
    case = planted_pair(n_source=120, n_target=110, overlap=0.6, d_source=32, d_target=40, noise=0.5)
    found = GromovAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
    assert agreement(found, case.truth).recall > 0.95
    right = is_right(found.matches["source"], found.matches["target"], case.truth)
    score = found.matches["score"]
    # Everything is matched, so the score must tell.
    assert right.mean() < 0.7 and roc_auc_score(right, score) > 0.95


def test_seeded_is_right_on_the_stress_pair() -> None:
    small = stress_pair(STRESS.scaled(0.04), seed=1)
    ids = [np.flatnonzero(side.shared & (side.half == 0)) for side in (small.left, small.right)]
    found = GromovAligner().fit(small.source, small.target, pairs=small.pairs).alignment_
    whole = np.isin(small.truth, ids[0])[:, 0] & np.isin(small.truth[:, 1], ids[1])
    every = np.arange(small.source.space.n_features)
    seeds = reference_pairs(restricted(small.pairs, every, every)).pairs
    assert is_right(seeds[:, 0], seeds[:, 1], small.truth).mean() < 0.65, "the start is mostly right already"
    assert agreement(found, small.truth[whole]).recall > 0.85
    cold = GromovAligner(start="cold").fit(small.source, small.target, pairs=small.pairs).alignment_
    assert agreement(cold, small.truth).recall < 0.03


def test_warm_start_has_the_marginals() -> None:
    for shape, pairs in (((5, 7), [[0, 1], [3, 3]]), ((4, 4), [[0, 1], [1, 0], [2, 2], [3, 3]]), ((6, 3), [[5, 2]])):
        plan = warm_start(np.array(pairs), shape)
        assert np.allclose(plan.sum(axis=1), 1 / shape[0]) and np.allclose(plan.sum(axis=0), 1 / shape[1])
        assert np.all(plan >= 0) and all(plan[i, j] >= 1 / max(shape) - 1e-12 for i, j in pairs)


def test_loss_is_that_of_the_plan() -> None:
    rng = np.random.default_rng(0)
    left, right, cost = (
        distances(rng.normal(size=(12, 5))),
        distances(rng.normal(size=(9, 4))),
        rng.uniform(size=(12, 9)),
    )
    found = fused_plan(left, right, cost, None, alpha=0.7, max_iter=100, tol=1e-9)
    gap = (left[:, :, None, None] - right[None, None]) ** 2
    quadratic = np.einsum("ikjl,ij,kl->", gap.transpose(0, 1, 2, 3), found.mass, found.mass)
    assert found.loss == pytest.approx(0.3 * np.sum(cost * found.mass) + 0.7 * quadratic, rel=1e-9)
    assert found.converged and found.row_error < 1e-12 and found.col_error < 1e-12
    one = fused_plan(left, right, cost, None, alpha=0.7, max_iter=1, tol=1e-9)
    assert not one.converged and one.n_iter == 1 and one.loss >= found.loss


def test_distances_are_scaled_and_symmetric() -> None:
    found = distances(np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32))
    assert np.array_equal(found, found.T) and found.mean() == pytest.approx(1) and not np.diagonal(found).any()


def test_gromov_refuses_large_and_odd_input() -> None:
    case = planted_pair(n_source=20, n_target=20)
    big = np.tile(case.source.directions, (205, 1))
    many = dataclasses.replace(
        case.source, directions=big, space=dataclasses.replace(case.source.space, n_features=len(big))
    )
    with pytest.raises(TransferError, match="at most 4096 testable features a side, got 4100 × 20"):
        GromovAligner(start="cold").fit(many, case.target)
    wide = PairedActivations(sp.csr_matrix(sp.hstack([case.pairs.source] * 205)), case.pairs.target, case.pairs.docs)
    with pytest.raises(TransferError, match="min_support"):
        GromovAligner().fit(many, case.target, pairs=wide)
    with pytest.raises(TransferError, match="Unknown start"):
        GromovAligner(start="luck").fit(case.source, case.target, pairs=case.pairs)  # type: ignore[arg-type]
    for bad in (GromovAligner(alpha=1.2), GromovAligner(max_iter=0), GromovAligner(tol=0.0)):
        with pytest.raises(TransferError, match="alpha in 0..1"):
            bad.fit(case.source, case.target, pairs=case.pairs)


# Global similarity.


def matched_rows(noise: float, seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 32))
    turned = x @ np.linalg.qr(rng.normal(size=(48, 32)))[0].T
    return x, turned + noise * rng.normal(size=turned.shape)


def test_the_same_rows_are_alike_by_every_measure() -> None:
    for found in global_similarity(*matched_rows(0.0), n_null=20).values():
        assert found.value == pytest.approx(1) and found.score == pytest.approx(1)
        assert found.p_value == pytest.approx(1 / 21) and found.null_mean < found.null_high < 1


def test_unrelated_rows_are_chance_however_high_the_number() -> None:
    rng = np.random.default_rng(0)
    found = global_similarity(rng.normal(size=(100, 60)), rng.normal(size=(100, 80)), components=40, n_null=40)
    assert tuple(found) == MEASURES
    assert found["cka"].value > 0.3 and found["svcca"].value > 0.3, "these are high by chance"
    for one in found.values():
        assert abs(one.score) < 0.05 and one.p_value > 0.02
        assert one.score == pytest.approx((one.value - one.null_mean) / (1 - one.null_mean))


def test_false_alarms_are_rare() -> None:
    rng = np.random.default_rng(3)
    alarms = np.zeros(4)
    for draw in range(40):
        found = global_similarity(rng.normal(size=(40, 8)), rng.normal(size=(40, 9)), n_null=19, seed=draw)
        alarms += [one.p_value <= 0.05 for one in found.values()]
    assert np.all(alarms <= 6), "5 % of 40 are 2"


def test_noise_lowers_the_score() -> None:
    near, far = (global_similarity(*matched_rows(noise), n_null=10) for noise in (0.3, 1.5))
    for name in MEASURES:
        assert 0 < far[name].score < near[name].score < 1


def test_measures_by_hand() -> None:
    from scipy.stats import spearmanr

    x, y = matched_rows(0.7, n=60)
    order = np.random.default_rng(0).permutation(60)
    a, b = x - x.mean(axis=0), (y - y.mean(axis=0))[order]
    k, kk = a @ a.T, b @ b.T
    assert linear_cka(x, y)(order) == pytest.approx(np.sum(k * kk) / (np.linalg.norm(k) * np.linalg.norm(kk)))
    above = np.triu_indices(60, 1)
    by_hand, _ = spearmanr(1 - (unit(x) @ unit(x).T)[above], 1 - (unit(y[order]) @ unit(y[order]).T)[above])
    assert rsa(x, y)(order) == pytest.approx(by_hand)
    u, v = (np.linalg.svd(s, full_matrices=False)[0][:, :5] for s in (a, b))
    assert svcca(x, y, 5)(order) == pytest.approx(np.linalg.svd(u.T @ v)[1].mean())
    near = [np.argsort(-(unit(s) @ unit(s).T) + 9 * np.eye(60), axis=1)[:, :4] for s in (x, y[order])]
    shared = np.mean([len(set(p) & set(q)) / 4 for p, q in zip(*near, strict=True)])
    assert mutual_neighbours(x, y, 4)(order) == pytest.approx(shared)


def test_copies_of_a_row_are_neighbours_of_each_other() -> None:
    x = np.repeat(np.random.default_rng(0).normal(size=(6, 5)), 4, axis=0)
    assert mutual_neighbours(x, x, 3)(np.arange(24)) == 1.0


def test_large_sets_are_sampled_and_say_so() -> None:
    x, y = matched_rows(0.5)
    found = global_similarity(x, y, n_null=5, max_rows=64)
    assert [found[name].n_rows for name in MEASURES] == [300, 300, 64, 64]
    again = global_similarity(x, y, n_null=5, max_rows=64)
    assert found == again and found != global_similarity(x, y, n_null=5, max_rows=64, seed=1)


def test_bad_rows_are_refused() -> None:
    x, y = matched_rows(0.5, n=30)
    for args in ((x, y[:-1]), (x[:9], y[:9]), (x[0], y[0])):
        with pytest.raises(TransferError, match="matched rows"):
            global_similarity(*args)
    with pytest.raises(TransferError, match="NaN"):
        global_similarity(np.where(x > 2, np.nan, x), y)
    with pytest.raises(TransferError, match="all|All"):
        global_similarity(np.ones((30, 4)), y)
    with pytest.raises(TransferError, match="at least 1"):
        global_similarity(x, y, n_null=0)
    with pytest.raises(TransferError, match="zero"):
        global_similarity(x * (np.arange(30) > 0)[:, None], y)

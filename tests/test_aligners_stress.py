"""The planted stress test is what it says, and the seeded map comes out of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from aligners.coactivation import PairedCodes
from aligners.correlation import Codes, dims, listed_correlations
from aligners.metrics import is_right
from aligners.partners import top_partners
from aligners.seeded import SeededMap, centred, difference, seeded_map
from aligners.stress import EASY, STRESS, StressPair, stress_pair
from transfer.core.errors import TransferError

SMALL = STRESS.scaled(0.1, noise=0.4)


@pytest.fixture(scope="module")
def case() -> StressPair:
    return stress_pair(SMALL, seed=1)


@pytest.fixture(scope="module")
def seeds(case: StressPair) -> np.ndarray:
    rows, cols = top_partners(PairedCodes.of([(case.pairs.source, case.pairs.target)]), 1)
    best = rows.ids[:, 0]
    i = np.flatnonzero((best >= 0) & (cols.ids[best, 0] == np.arange(len(best))))
    return np.stack([i, best[i]], axis=1)


@pytest.fixture(scope="module")
def learned(case: StressPair, seeds: np.ndarray) -> SeededMap:
    return seeded_map(case.source.directions, case.target.directions, seeds)[0]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_sizes_at_full_scale() -> None:
    assert STRESS.n_features == EASY.n_features == 8750
    assert SMALL.n_features == 875 and SMALL.n_rows == STRESS.n_rows
    assert SMALL.active / SMALL.n_concepts == pytest.approx(STRESS.active / STRESS.n_concepts)


def test_truth_and_roles(case: StressPair) -> None:
    left, right = case.left, case.right
    assert len(left.concept) == len(right.concept) == 875
    for side in (left, right):
        assert side.shared.sum() == 575 and side.child.sum() == 150 and not np.any(side.shared & side.child)
        assert np.sum(side.half > 0) == 150
    i, j = case.truth.T
    assert np.array_equal(left.concept[i], right.concept[j]) and left.shared[i].all() and right.shared[j].all()
    assert len(np.unique(left.concept[i])) == 500
    both = len(np.intersect1d(left.concept[left.half > 0], right.concept[right.half > 0]))
    assert len(case.truth) == 500 + 75 + 75 + both
    assert len(case.split_edges()) == 150 - 2 * both
    own = ~left.shared & ~left.child
    assert not len(np.intersect1d(left.concept[own], right.concept))


def test_children_fire_with_their_parents_more_than_counterparts(case: StressPair) -> None:
    """The trap itself: by co-firing alone a child looks better than the right one."""
    a, b = case.left, case.right
    whole = {c: j for j, c in enumerate(b.concept) if b.shared[j] and b.half[j] == 0}
    child = np.array([(i, whole[c]) for i, c in enumerate(a.concept) if a.child[i] and c in whole])
    plain = case.truth[(a.half[case.truth[:, 0]] == 0) & (b.half[case.truth[:, 1]] == 0)]
    corr = [
        np.nanmedian(listed_correlations(Codes.of(case.pairs.source, p[:, 0]), Codes.of(case.pairs.target, p[:, 1])))
        for p in (child, plain)
    ]
    assert corr[0] > corr[1] > 0.15


def test_halves_share_no_event() -> None:
    case = stress_pair(dataclasses.replace(SMALL, miss=0.0, spurious=0.0), seed=2)
    codes, side = case.pairs.source.tocsc(), case.left
    fires = codes.copy()
    fires.data[:] = 1
    for concept in np.unique(side.concept[side.half > 0])[:20]:
        one, two = (np.flatnonzero((side.concept == concept) & side.shared & (side.half == h)) for h in (1, 2))
        assert fires[:, one[0]].multiply(fires[:, two[0]]).sum() == 0
    assert dims(case.pairs.source) == (SMALL.n_rows, 875)


def test_directions_follow_the_noise_and_the_parents() -> None:
    case = stress_pair(dataclasses.replace(SMALL, noise=0.5, d_source=400, d_target=400), seed=3)
    rows, side = unit(case.source.directions), case.left
    halves = [np.flatnonzero((side.concept == c) & (side.half > 0)) for c in np.unique(side.concept[side.half > 0])]
    assert np.mean([rows[h[0]] @ rows[h[1]] for h in halves]) == pytest.approx(0.75, abs=0.02)
    parent = {c: i for i, c in enumerate(side.concept) if side.shared[i]}
    cosine = [rows[i] @ rows[parent[side.concept[i]]] for i in np.flatnonzero(side.child)]
    assert np.mean(cosine) == pytest.approx(0.6 * 0.75, abs=0.02)


def test_same_seed_same_pair_other_seed_another() -> None:
    one, two, three = (stress_pair(SMALL, seed=s) for s in (4, 4, 5))
    assert np.array_equal(one.source.directions, two.source.directions)
    assert abs(one.pairs.target - two.pairs.target).sum() == 0
    assert not np.array_equal(one.source.directions, three.source.directions)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(TransferError, match="need .* concepts"):
        stress_pair(dataclasses.replace(SMALL, n_concepts=600))
    with pytest.raises(TransferError, match="noise"):
        stress_pair(dataclasses.replace(SMALL, noise=1.5))


def test_seeds_are_mostly_wrong_and_the_map_repairs_them(
    case: StressPair, seeds: np.ndarray, learned: SeededMap
) -> None:
    assert is_right(seeds[:, 0], seeds[:, 1], case.truth).mean() < 0.65
    assert learned.converged and 2 <= learned.rounds <= 8 and learned.changed[0] > 0.2
    right = is_right(learned.pairs[:, 0], learned.pairs[:, 1], case.truth)
    assert right.mean() > 0.8
    concepts = case.left.concept[learned.pairs[right, 0]]
    assert len(np.unique(concepts)) / SMALL.n_shared >= 0.99


def test_one_round_does_not_converge(case: StressPair, seeds: np.ndarray) -> None:
    once = seeded_map(case.source.directions, case.target.directions, seeds, max_iter=1)[0]
    assert once.rounds == 1 and not once.converged


def test_leaving_out_equals_fitting_without(case: StressPair, learned: SeededMap) -> None:
    """The closed form against maps really fitted without the pairs of an edge's two features."""
    x, y = learned.source, learned.target
    in_map = np.concatenate([learned.pairs[:4], np.stack([learned.pairs[:4, 0], learned.pairs[4:8, 1]], axis=1)])
    loose = np.setdiff1d(np.arange(len(x)), learned.pairs[:, 0])[:2]
    edges = np.concatenate([in_map, np.stack([loose, learned.pairs[:2, 1]], axis=1)])
    got = learned.cosines(*edges.T)
    for (i, j), cosine in zip(edges, got, strict=True):
        rest = learned.pairs[(learned.pairs[:, 0] != i) & (learned.pairs[:, 1] != j)]
        wanted = []
        for a, b, fitted, flip in ((x, y, learned.forward, 1), (y, x, learned.backward, -1)):
            p, (one, other) = rest[:, ::flip], (i, j)[::flip]
            full = learned.pairs[:, ::flip]
            gram = a[full[:, 0]].T @ a[full[:, 0]]
            penalty = fitted.strength * np.trace(gram) / len(gram)
            gram = a[p[:, 0]].T @ a[p[:, 0]] + penalty * np.eye(len(gram))
            image = a[one] @ np.linalg.solve(gram, a[p[:, 0]].T @ b[p[:, 1]])
            wanted.append(image @ b[other] / np.linalg.norm(image))
        assert cosine == pytest.approx(np.mean(wanted), abs=1e-8)


def test_seen_pairs_look_better_than_they_are(learned: SeededMap) -> None:
    """Why pairs are left out: in the fit's own eyes even wrong pairs agree."""
    x, y = learned.joint
    seen = np.einsum("nd,nd->n", x[learned.pairs[:, 0]], y[learned.pairs[:, 1]])
    assert np.all(seen > learned.cosines(*learned.pairs.T))


def test_a_rotation_is_found_exactly() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 16))
    rotation = np.linalg.qr(rng.normal(size=(24, 16)))[0].T
    found, _ = seeded_map(x, unit(x) @ rotation, np.repeat(np.arange(60)[:, None], 2, axis=1))
    assert found.converged and np.array_equal(found.pairs[:, 0], found.pairs[:, 1])
    assert found.cycle_error < 1e-3
    assert found.cosines(np.arange(120), np.arange(120)).min() > 0.999


def test_map_refuses_too_few_seeds_and_zero_rows() -> None:
    x = np.eye(4)
    with pytest.raises(TransferError, match="two feature pairs"):
        seeded_map(x, x, np.array([[0, 0]]))
    with pytest.raises(TransferError, match="zero"):
        centred(np.zeros((2, 3)))


def test_difference_counts_the_longer_list() -> None:
    one = np.array([[0, 0], [1, 1], [2, 2]])
    assert difference(one, one) == 0
    assert difference(one, one[:2]) == pytest.approx(1 / 3)
    assert difference(one[:0], one) == 1

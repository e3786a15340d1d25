"""The crosscoder finds planted concepts, and latent scaling tells exclusive latents from latents that only look so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from aligners.checks import check_aligner
from aligners.crosscoder import (
    Crosscoder,
    CrosscoderAligner,
    Training,
    explained_variance,
    joined_features,
    train_crosscoder,
)
from aligners.latent_scaling import LatentScaling, latent_scaling
from aligners.metrics import is_right
from aligners.planted import planted_pair
from transfer.core.errors import TransferError

SHARED, ALONE = 16, 8
"""Concepts of both models, and of each model alone."""
D_SOURCE, D_TARGET = 32, 40


@dataclasses.dataclass(frozen=True)
class Toy:
    """Two linear models of sparse concepts; the first ``SHARED`` rows of both dictionaries are the same concepts."""

    events: np.ndarray
    """[rows, concepts]: shared, then the source's own, then the target's own."""
    source: np.ndarray
    """Dictionary, rows of length one."""
    target: np.ndarray
    x: np.ndarray
    y: np.ndarray


def make_toy(seed: int = 0, rows: int = 4000) -> Toy:
    rng = np.random.default_rng(seed)
    events = (rng.uniform(size=(rows, SHARED + 2 * ALONE)) < 0.06) * rng.uniform(1, 2, (rows, SHARED + 2 * ALONE))
    source, target = (unit(rng.normal(size=(SHARED + ALONE, d))) for d in (D_SOURCE, D_TARGET))
    x = events[:, : SHARED + ALONE] @ source
    y = events[:, np.r_[:SHARED, SHARED + ALONE : SHARED + 2 * ALONE]] @ target
    x, y = (side + 0.03 * rng.normal(size=side.shape) for side in (x, 3 * y))
    return Toy(events, source, target, x.astype(np.float32), y.astype(np.float32))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def train(x: np.ndarray, y: np.ndarray, **changes: float) -> Training:
    settings: dict = {"latents": 160, "k": 2, "steps": 500, "batch": 128, "rate": 5e-3, "seed": 0}
    return train_crosscoder(x, y, **{**settings, **changes})


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy()


@pytest.fixture(scope="module")
def trained(toy: Toy) -> Training:
    return train(toy.x, toy.y)


@pytest.fixture(scope="module")
def scaling(toy: Toy, trained: Training) -> LatentScaling:
    return latent_scaling(trained.crosscoder, toy.x, toy.y)


def test_contract() -> None:
    # Every feature must be found, the rarest too. The suite's own case takes 512 latents and 300 steps of 128 rows.
    case = planted_pair(n_source=30, n_target=25, d_source=24, d_target=32, n_docs=100)
    check_aligner(CrosscoderAligner(latents=192, k=2, steps=200, batch=64, rate=8e-3), case)


def test_scores_tell_right_matches_from_wrong_ones() -> None:
    case = planted_pair(n_source=30, n_target=25, d_source=24, d_target=32, n_docs=100)
    aligner = CrosscoderAligner(latents=192, k=3, steps=300, batch=128, rate=5e-3)
    found = aligner.fit(case.source, case.target, pairs=case.pairs).alignment_
    right = is_right(found.matches["source"], found.matches["target"], case.truth)
    assert right.sum() == len(case.truth)
    score = found.matches["score"]
    assert np.median(score[right]) > 0.9 and score[right].min() > np.median(score[~right])
    assert found.info["explained_source"] > 0.8 and found.info["explained_target"] > 0.8
    assert 0 < found.info["latents_alive"] <= 192


def test_shared_concepts_get_one_latent_with_both_directions(
    toy: Toy, trained: Training, scaling: LatentScaling
) -> None:
    model, alive = trained.crosscoder, np.flatnonzero(scaling.fires)
    src, tgt, score = joined_features(model, alive, toy.source, toy.target)
    assert set(range(SHARED)) <= set(src[(src == tgt) & (score > 0.9)].tolist())
    assert not np.any((src != tgt) & (score > 0.7))
    best = np.argmax(
        np.minimum(toy.source[:SHARED] @ unit(model.source).T, toy.target[:SHARED] @ unit(model.target).T), 1
    )
    assert np.all(np.abs(model.relative_norm[best] - 0.5) < 0.2)
    assert not scaling.exclusive[best].any() and np.all(scaling.nu_error[best] > 0.5)


def test_own_concepts_get_exclusive_latents(toy: Toy, trained: Training, scaling: LatentScaling) -> None:
    model = trained.crosscoder
    for side, rows, directions in ((0, model.source, toy.source), (1, model.target, toy.target)):
        alive = (scaling.fires > 0) & (scaling.side == side)
        cosine = np.where(alive, directions[SHARED:] @ unit(rows).T, -1)
        assert np.all(cosine.max(axis=1) > 0.9)
        best = np.argmax(cosine, axis=1)
        assert np.sum(scaling.exclusive[best]) == ALONE, scaling.relative_norm[best]


def test_activity_and_reconstruction(toy: Toy, trained: Training) -> None:
    model = trained.crosscoder
    active = model.encode(model.joint(toy.x, toy.y))
    assert np.sum(active > 0) / len(active) == pytest.approx(2, rel=0.15)
    assert min(explained_variance(model, toy.x, toy.y)) > 0.9
    rng = np.random.default_rng(0)
    other = explained_variance(model, rng.permutation(toy.x), toy.y)
    assert max(other) < min(explained_variance(model, toy.x, toy.y))
    rows = model.joint(toy.x, toy.y)
    error = (rows - model.decode(active))[:, : model.d_source]
    by_hand = 1 - np.sum(error.astype(float) ** 2) / np.sum(
        (rows - rows.mean(0))[:, : model.d_source].astype(float) ** 2
    )
    assert explained_variance(model, toy.x, toy.y)[0] == pytest.approx(by_hand, rel=1e-4)


def by_hand(toy: Toy, *, shrink: int, part: int) -> Crosscoder:
    """The true dictionary as a crosscoder with two faults.

    Concept ``shrink`` is shrunk to nothing in the target, and concept ``part`` is two latents, one of each side (the
    second one stands last). The encoder is exact, as both sides together have more coordinates than concepts.
    """
    n = SHARED + 2 * ALONE
    both = np.zeros((n, D_SOURCE + D_TARGET))
    both[: SHARED + ALONE, :D_SOURCE] = toy.source
    both[np.r_[:SHARED, SHARED + ALONE : n], D_SOURCE:] = toy.target
    decoder = np.vstack([both, both[part]])
    decoder[shrink, D_SOURCE:] = 0
    decoder[part, D_SOURCE:] = 0
    decoder[n, :D_SOURCE] = 0
    encoder = np.linalg.pinv(both)
    encoder = np.hstack([encoder, encoder[:, [part]]])
    return Crosscoder(
        encoder=encoder.astype(np.float32),
        encoder_bias=np.zeros(n + 1, dtype=np.float32),
        decoder=decoder.astype(np.float32),
        decoder_bias=np.zeros(D_SOURCE + D_TARGET, dtype=np.float32),
        d_source=D_SOURCE,
        source_scale=1.0,
        target_scale=1 / 3,
        threshold=0.5,
    )


def test_latent_scaling_exposes_both_kinds_of_false_exclusives(toy: Toy) -> None:
    found = latent_scaling(by_hand(toy, shrink=2, part=5), toy.x, toy.y)
    shrunk, part, true = 2, 5, np.arange(SHARED, SHARED + 2 * ALONE)
    assert found.looks_exclusive[[shrunk, part, -1]].all() and found.looks_exclusive[true].all()
    # The shrunk one: what it moves in the target is still there, unexplained.
    assert found.nu_error[shrunk] == pytest.approx(1, rel=0.1) and found.nu_reconstruction[shrunk] < 0.2
    # The one in two parts: nothing is unexplained, but the reconstruction has it.
    assert np.all(found.nu_error[[part, -1]] < 0.2)
    assert found.nu_reconstruction[[part, -1]] == pytest.approx(1, rel=0.1)
    assert not found.exclusive[[shrunk, part, -1]].any()
    # The true ones.
    assert np.all(found.nu_error[true] < 0.2) and np.all(found.nu_reconstruction[true] < 0.3)
    assert found.exclusive[true].all() and not found.exclusive[:SHARED].any()
    assert np.array_equal(found.side[true], np.repeat([0, 1], ALONE))
    assert found.error[0] == pytest.approx([1, 1], rel=0.05)


def test_latent_scaling_does_not_count_noise(toy: Toy) -> None:
    # Latents read from the source alone, and a target that drowns in noise.
    whole = by_hand(toy, shrink=2, part=5)
    blind = np.vstack([np.linalg.pinv(toy.source), np.zeros((D_TARGET, SHARED + ALONE))])
    model = dataclasses.replace(
        whole,
        encoder=blind.astype(np.float32),
        encoder_bias=whole.encoder_bias[: SHARED + ALONE],
        decoder=whole.decoder[: SHARED + ALONE],
    )
    loud = toy.y + 3 * np.random.default_rng(1).normal(size=toy.y.shape).astype(np.float32)
    found = latent_scaling(model, toy.x, loud)
    own = np.arange(SHARED, SHARED + ALONE)
    rows, active = next((r, f) for _, r, f in model.blocks(toy.x, loud))
    error = rows - model.decode(active)
    naive = np.linalg.norm((active.T @ error)[own, D_SOURCE:] / np.sum(active**2, axis=0)[own, None], axis=1)
    assert np.median(naive) > 0.25, "the noise is too small to matter"
    assert np.median(found.nu_error[own]) < 0.2


def test_latents_without_events_are_untestable(toy: Toy) -> None:
    silent = dataclasses.replace(by_hand(toy, shrink=2, part=5), threshold=1e9)
    found = latent_scaling(silent, toy.x, toy.y)
    assert not found.fires.any() and np.isnan(found.error).all() and not found.exclusive.any()
    assert len(joined_features(silent, np.flatnonzero(found.fires), toy.source, toy.target)[0]) == 0


def test_chimeras_of_shuffled_rows_do_not_fire_together(toy: Toy, trained: Training, scaling: LatentScaling) -> None:
    # A visible failure: a latent can merge one concept of either side that have nothing in common, with high cosines.
    order = np.random.default_rng(2).permutation(len(toy.y))
    model = train(toy.x, toy.y[order]).crosscoder
    alive = np.flatnonzero(latent_scaling(model, toy.x, toy.y[order]).fires)
    src, tgt, score = joined_features(model, alive, toy.source, toy.target)
    good = score > 0.9
    assert good.sum() >= 3 and np.mean((src == tgt)[good]) < 0.2
    own = np.r_[:SHARED, SHARED + ALONE : SHARED + 2 * ALONE]
    left, right = toy.events[:, : SHARED + ALONE], toy.events[:, own]
    assert np.all(np.abs(together(left[:, src[good]], right[order][:, tgt[good]])) < 0.1)
    src, tgt, score = joined_features(trained.crosscoder, np.flatnonzero(scaling.fires), toy.source, toy.target)
    good = score > 0.9
    assert good.sum() == SHARED and np.all(together(left[:, src[good]], right[:, tgt[good]]) > 0.9)


def together(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Correlation of column i with column i."""
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(left.T, right.T, strict=True)])


def test_units_do_not_matter(toy: Toy) -> None:
    plain, scaled = (train(toy.x, y, steps=30).crosscoder for y in (toy.y, 64 * toy.y))
    assert np.allclose(plain.decoder, scaled.decoder, atol=1e-5)
    assert scaled.target_scale == pytest.approx(plain.target_scale / 64)


def test_outliers_are_left_out_and_counted(toy: Toy) -> None:
    x = toy.x.copy()
    x[[3, 70]] *= 1e4
    one, other = train(x, toy.y, steps=20), train(toy.x, toy.y, steps=20)
    assert one.n_outliers == other.n_outliers + 2
    assert np.isfinite(one.losses).all() and one.losses[-1] < 10 * other.losses[-1]


def test_convergence_is_told(toy: Toy, trained: Training) -> None:
    assert trained.converged and not train(toy.x, toy.y, steps=19).converged
    assert not dataclasses.replace(trained, losses=np.linspace(2, 1, 100)).converged
    assert not dataclasses.replace(trained, losses=np.full(100, np.nan)).converged


def test_bad_input_is_refused(toy: Toy) -> None:
    for changes in ({"k": 200}, {"latents": 0}, {"steps": 0}, {"rate": 0.0}, {"batch": 0}):
        with pytest.raises(TransferError, match="1 ≤ k ≤ latents"):
            train(toy.x, toy.y, **changes)
    with pytest.raises(TransferError, match="differ in rows"):
        train(toy.x[:-1], toy.y)
    with pytest.raises(TransferError, match="are zero"):
        train(toy.x, np.zeros_like(toy.y))

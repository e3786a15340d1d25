"""Held-out scores: a true null gives uniform p-values, a planted truth small ones, a shuffle none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.activation import ActivationAligner
from aligners.calibrate import (
    benjamini_hochberg,
    document_shifts,
    score_matches,
    shuffled,
    stratified_p_values,
)
from aligners.decoder import DecoderAligner
from aligners.metrics import agreement
from aligners.planted import Planted, planted_pair
from aligners.sinkhorn import SinkhornAligner
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.store import PairedActivations


def fit_and_score(case: Planted, seed: int = 0, n_null: int = 20) -> Alignment:
    fit, held = case.pairs.split(0.6, seed)
    return ActivationAligner().fit(case.source, case.target, pairs=fit).score(held, n_null=n_null, seed=seed)


def test_unrelated_spaces_get_uniform_p_values() -> None:
    """No shared feature: p-values spread over 0..1 and q-values accept next to nothing."""
    p, accepted, total = [], 0, 0
    for seed in range(6):
        scored = fit_and_score(planted_pair(overlap=0.0, n_docs=120, topicality=0, seed=seed), seed)
        p.append(scored.matches["p_value"])
        accepted += int(np.sum(scored.matches["q_value"] <= 0.05))
        total += len(scored)
    values = np.concatenate(p)
    values = values[np.isfinite(values)]
    assert total > 200
    assert accepted <= 0.03 * total
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        spread = 3.5 * np.sqrt(level * (1 - level) / len(values))
        assert abs(np.mean(values <= level) - level) < spread + 0.02, level


def test_a_small_q_value_is_not_precision() -> None:
    """Trap: features of one topic are really correlated, so the shift null accepts matches that are all wrong."""
    scored = fit_and_score(planted_pair(overlap=0.0, n_docs=120))
    assert np.mean(scored.matches["q_value"] <= 0.05) > 0.2


def test_planted_matches_are_accepted_and_wrong_ones_are_not() -> None:
    case = planted_pair(topicality=0, overlap=0.5, n_source=240, n_target=240)
    scored = fit_and_score(case)
    right = {(int(i), int(j)) for i, j in case.truth}
    is_right = np.array([m in right for m in zip(scored.matches["source"], scored.matches["target"], strict=True)])
    accepted = scored.matches["q_value"] <= 0.05
    assert accepted[is_right].mean() > 0.97
    assert len(accepted[~is_right]) > 10 and accepted[~is_right].mean() < 0.15
    assert np.median(scored.matches["heldout_corr"][is_right]) > 0.4
    assert scored.null_corr is not None and abs(np.median(scored.null_corr)) < 0.02
    assert scored.null_corr.shape == (20 * len(scored),)
    assert scored.summary()["heldout_corr_median"] > 0.3


def test_score_keeps_the_matches() -> None:
    case = planted_pair()
    fit, held = case.pairs.split(0.6, 0)
    aligner = ActivationAligner().fit(case.source, case.target, pairs=fit)
    before = aligner.alignment_
    scored = aligner.score(held)
    assert aligner.alignment_ is before and np.isnan(before.matches["q_value"]).all()
    for name in ("source", "target", "score"):
        assert np.array_equal(before.matches[name], scored.matches[name])
    again = aligner.score(held)
    assert np.array_equal(again.matches["p_value"], scored.matches["p_value"], equal_nan=True)
    assert not np.array_equal(aligner.score(held, seed=1).null_corr, scored.null_corr)  # type: ignore[arg-type]


def test_shuffled_corpus_has_no_matches() -> None:
    """Rung G6: targets re-paired with other documents; at most a nominal few matches are accepted."""
    case = planted_pair(n_source=240, n_target=240)
    shift = int(document_shifts(case.pairs.docs, 1, 0)[0])
    rows = np.roll(np.arange(len(case.pairs.docs)), -shift)
    pairs = dataclasses.replace(case.pairs, target=case.pairs.target[rows])
    scored = fit_and_score(dataclasses.replace(case, pairs=pairs))
    assert len(scored) > 20
    assert np.sum(scored.matches["q_value"] <= 0.05) <= 0.05 * len(scored) + 1


def test_shuffled_alignment_loses_everything() -> None:
    case = planted_pair()
    fit, held = case.pairs.split(0.6, 0)
    for aligner in (ActivationAligner(), DecoderAligner(), SinkhornAligner()):
        found = aligner.fit(case.source, case.target, pairs=fit).alignment_
        mixed = shuffled(found, seed=3)
        assert mixed.method == f"{found.method}-shuffled"
        assert np.all(mixed.matches["target"] != found.matches["target"])
        assert sorted(mixed.matches["target"]) == sorted(found.matches["target"])
        assert agreement(mixed, case.truth).n_right <= 3
        assert np.isclose(mixed.coupling.sum(), found.coupling.sum())
        for i, j, score in zip(*(mixed.matches[c] for c in ("source", "target", "score")), strict=True):
            assert np.isclose(mixed.coupling[i, j], score, atol=1e-6)
        scored = score_matches(mixed, held)
        assert np.nanmedian(scored.matches["heldout_corr"]) < 0.1
        assert not np.array_equal(shuffled(found, seed=4).matches["target"], mixed.matches["target"])
    one = dataclasses.replace(found, matches={name: values[:1] for name, values in found.matches.items()})
    with pytest.raises(TransferError, match="nothing to shuffle"):
        shuffled(one)


def test_untestable_is_not_unmatched() -> None:
    """A pair silent on the held-out part gets NaN and is counted; a busy pair that never meets gets p near 1."""
    case = planted_pair()
    fit, held = case.pairs.split(0.6, 0)
    found = ActivationAligner().fit(case.source, case.target, pairs=fit).alignment_
    codes, others = held.source.tolil(), held.target.tolil()
    silent, apart = int(found.matches["source"][0]), int(found.matches["source"][1])
    codes[:, silent] = 0
    codes[:, apart], others[:, int(found.matches["target"][1])] = 0, 0
    half = len(held.docs) // 2
    codes[:half:7, apart] = 1.0
    others[half::7, int(found.matches["target"][1])] = 1.0
    scored = score_matches(found, PairedActivations(sp.csr_matrix(codes), sp.csr_matrix(others), held.docs))
    assert np.isnan(scored.matches["p_value"][0]) and np.isnan(scored.matches["q_value"][0])
    assert scored.matches["p_value"][1] > 0.5
    assert scored.info["n_untestable"] == int(np.isnan(scored.matches["p_value"]).sum()) >= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.integers(0, 99))
def test_shifts_move_whole_documents_to_others(lengths: list[int], seed: int) -> None:
    docs = np.repeat(np.arange(len(lengths)), lengths)
    if max(lengths) * 2 > len(docs):
        return
    try:
        shifts = document_shifts(docs, 5, seed)
    except TransferError:
        starts = np.cumsum([0, *lengths])[:-1]
        assert not any(max(lengths) <= s <= len(docs) - max(lengths) for s in starts)
        return
    assert len(np.unique(shifts)) == len(shifts) <= 5
    for shift in shifts:
        moved = np.roll(docs, -shift)
        assert np.all(moved != docs)
        assert np.any(np.diff(docs, prepend=-1)[shift])  # a document begins there


def test_shifts_refuse() -> None:
    with pytest.raises(TransferError, match="cannot be drawn"):
        document_shifts(np.array([0, 0, 0, 1]), 3, 0)
    with pytest.raises(TransferError, match="grouped"):
        document_shifts(np.array([0, 1, 0, 1]), 3, 0)


def test_score_refuses_other_spaces() -> None:
    case = planted_pair()
    found = ActivationAligner().fit(case.source, case.target, pairs=case.pairs)
    with pytest.raises(TransferError, match="held-out pairs have"):
        found.score(dataclasses.replace(case.pairs, target=case.pairs.target[:, :-1]))
    with pytest.raises(TransferError, match="at least one draw"):
        found.score(case.pairs, n_null=0)


def test_no_match_is_scored_without_trouble() -> None:
    case = planted_pair()
    found = ActivationAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
    none = dataclasses.replace(
        found,
        matches={name: values[:0] for name, values in found.matches.items()},
        coupling=sp.csr_matrix(found.coupling.shape),
    )
    assert len(score_matches(none, case.pairs)) == 0


def test_benjamini_hochberg_is_scipys() -> None:
    from scipy.stats import false_discovery_control

    p = np.random.default_rng(0).uniform(size=50) ** 3
    assert np.allclose(benjamini_hochberg(p), false_discovery_control(p))
    with_gap = np.insert(p, 7, np.nan)
    q = benjamini_hochberg(with_gap)
    assert np.isnan(q[7]) and np.allclose(np.delete(q, 7), false_discovery_control(p))


def test_strata_compare_like_with_like() -> None:
    """Rare pairs have a wide null: a value that is extreme among frequent pairs is ordinary among rare ones."""
    rng = np.random.default_rng(0)
    frequency = np.repeat([1.0, 100.0], 60)
    width = np.where(frequency < 10, 0.3, 0.01)
    null = width * rng.normal(size=(20, 120))
    p = stratified_p_values(np.full(120, 0.1), null, frequency)
    assert p[frequency > 10].max() < 0.01 < 0.2 < p[frequency < 10].min()


def test_p_values_are_never_zero_and_ties_count_against_the_match():
    null = np.array([[0.0], [0.1], [0.2], [0.3]])
    p = [float(stratified_p_values(np.array([x]), null, np.ones(1))[0]) for x in (1.0, 0.3, 0.25, -1.0)]
    assert p == pytest.approx([1 / 5, 2 / 5, 2 / 5, 1.0])

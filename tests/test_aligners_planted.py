"""Every method on planted truth, and the transport against exact optima."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners import decoder
from aligners.activation import ActivationAligner
from aligners.assignment import DENSE_LIMIT
from aligners.base import Aligner
from aligners.chance import RandomAligner
from aligners.decoder import DecoderAligner, Via, comparable
from aligners.dense_ot import all_pairs, dense_transport, transport
from aligners.maps import Kind
from aligners.metrics import agreement
from aligners.planted import Planted, planted_pair
from aligners.sinkhorn import KEEP, SinkhornAligner, keep_largest, typical
from aligners.sparse_ot import sparse_sinkhorn
from aligners.topk import unit_rows
from aligners.transport import Problem, transport_matches
from transfer.core.errors import TransferError


@pytest.fixture(scope="module")
def easy() -> Planted:
    return planted_pair(n_source=300, n_target=260, n_docs=200)


@pytest.fixture(scope="module")
def hard() -> Planted:
    return planted_pair(n_source=300, n_target=260, n_docs=200, miss=0.5, spurious=0.5, noise=0.8)


@pytest.mark.parametrize(
    ("aligner", "precision", "recall"),
    [
        (ActivationAligner(), 0.85, 0.98),
        (DecoderAligner(), 0.8, 0.98),
        (DecoderAligner(kind="procrustes"), 0.7, 0.95),
        (DecoderAligner(via="unembedding"), 0.8, 0.98),
        (SinkhornAligner(cost="activation"), 0.97, 0.97),
        (SinkhornAligner(cost="map"), 0.97, 0.97),
        (SinkhornAligner(cost="unembedding"), 0.97, 0.97),
        (SinkhornAligner(), 0.99, 0.98),
    ],
    ids=repr,
)
def test_planted_truth(easy: Planted, aligner: Aligner, precision: float, recall: float) -> None:
    got = agreement(aligner.fit(easy.source, easy.target, pairs=easy.pairs).alignment_, easy.truth)
    assert got.precision >= precision and got.recall >= recall, (got.precision, got.recall)


def test_random_finds_nothing(easy: Planted) -> None:
    got = agreement(RandomAligner().fit(easy.source, easy.target).alignment_, easy.truth)
    assert got.precision < 0.05


def test_fusion_beats_either_evidence(hard: Planted) -> None:
    """On noisy data the fused transport is at least as good as each of its parts."""
    f1 = {}
    for cost in ("activation", "map", "fused"):
        fitted = SinkhornAligner(cost=cost).fit(hard.source, hard.target, pairs=hard.pairs)
        f1[cost] = agreement(fitted.alignment_, hard.truth).f1
    assert f1["fused"] >= max(f1["activation"], f1["map"]) - 0.005
    assert f1["fused"] > 0.97


def test_slack_leaves_unshared_features_alone(easy: Planted) -> None:
    """Matched mass separates shared from unshared features (a balanced plan would match them all)."""
    coupling = SinkhornAligner().fit(easy.source, easy.target, pairs=easy.pairs).alignment_.coupling
    mass = np.asarray(coupling.sum(axis=1)).ravel()
    shared = np.isin(np.arange(len(mass)), easy.truth[:, 0])
    assert mass[shared].mean() > 0.9
    assert mass[~shared].mean() < 0.3


def test_one_space_needs_no_pairs() -> None:
    case = planted_pair(d_source=48, d_target=48, same_space=True)
    found = DecoderAligner(via="same").fit(case.source, case.target).alignment_
    got = agreement(found, case.truth)
    assert found.method == "decoder" and got.recall == 1 and got.precision > 0.7


def test_rotated_rescaled_permuted_identity() -> None:
    """Rung G0: the same dictionary, rotated into a wider space, permuted, rescaled: precision = recall = 1."""
    case = planted_pair(n_source=400, d_source=32)
    rng = np.random.default_rng(5)
    n, wide = 400, 48
    basis = np.linalg.qr(rng.normal(size=(wide, 32)))[0].T
    order = rng.permutation(n)
    scale = rng.uniform(0.1, 10, size=(n, 1))
    assert case.pairs.source_residual is not None and case.source.unembedding is not None
    space = dataclasses.replace(case.source.space, model="planted:moved", d_model=wide)
    target = dataclasses.replace(
        case.source,
        space=space,
        directions=scale * (case.source.directions[order] @ basis),
        unembedding=case.source.unembedding @ basis,
    )
    codes = sp.csr_matrix(case.pairs.source[:, order] @ sp.diags(1 / scale.ravel()))
    pairs = dataclasses.replace(
        case.pairs,
        target=codes,
        source_residual=case.pairs.source_residual,
        target_residual=case.pairs.source_residual[:] @ basis,
    )
    truth = np.stack([order, np.arange(n)], axis=1)
    aligners = [ActivationAligner(), DecoderAligner(), DecoderAligner(via="unembedding"), SinkhornAligner()]
    for aligner in [*aligners, DecoderAligner(kind="procrustes"), SinkhornAligner(cost="activation")]:
        got = agreement(aligner.fit(case.source, target, pairs=pairs).alignment_, truth)
        assert got.precision == got.recall == 1, (aligner, got)


def test_token_logits_are_the_dense_cosines(easy: Planted) -> None:
    found = comparable(easy.source, easy.target, None, "unembedding")
    u, v = easy.source.unembedding, easy.target.unembedding
    assert u is not None and v is not None
    a = easy.source.directions.astype(np.float64) @ (u - u.mean(axis=0)).T.astype(np.float64)
    b = easy.target.directions.astype(np.float64) @ (v - v.mean(axis=0)).T.astype(np.float64)
    assert np.allclose(found.source @ found.target.T, unit_rows(a) @ unit_rows(b).T, atol=1e-4)


@pytest.mark.parametrize(
    ("via", "kind"), [("map", "ridge"), ("map", "cca"), ("unembedding", "ridge"), ("same", "ridge")]
)
def test_directions_come_by_blocks_from_mapped_float32(
    easy: Planted, via: Via, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from float64 arrays in one piece, but for the rounding of what is kept."""
    sides = easy.source, easy.target if via != "same" else easy.source
    whole, small = [], []
    for side, view in zip("st", sides, strict=True):
        np.save(tmp_path / side, view.directions.astype(np.float32))
        mapped = np.load(tmp_path / f"{side}.npy", mmap_mode="r")
        whole.append(dataclasses.replace(view, directions=np.asarray(mapped, dtype=np.float64)))
        small.append(dataclasses.replace(view, directions=mapped))
    pairs = easy.pairs if via == "map" else None
    want = comparable(whole[0], whole[1], pairs, via, kind=kind)
    monkeypatch.setattr(decoder, "BLOCK", 1000)
    got = comparable(small[0], small[1], pairs, via, kind=kind)
    assert got.source.dtype == got.target.dtype == np.float32 and want.source.dtype == np.float64
    assert np.array_equal(got.source_ids, want.source_ids) and np.array_equal(got.target_ids, want.target_ids)
    assert np.allclose(got.source, want.source, rtol=1e-6, atol=1e-7)
    assert np.allclose(got.target, want.target, rtol=1e-6, atol=1e-7)


def test_directions_take_little_more_than_they_are(easy: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "BLOCK", 2**14)
    rows = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32)
    view = dataclasses.replace(
        easy.source,
        space=dataclasses.replace(easy.source.space, n_features=len(rows), d_model=64),
        directions=rows,
        unembedding=rows[:500],
    )
    tracemalloc.start()
    comparable(view, view, None, "unembedding")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * rows.nbytes + 2**21  # in float64 at once: twelve times the rows


def test_zero_directions_are_counted_not_matched(easy: Planted) -> None:
    dead = easy.source.directions.copy()
    dead[easy.truth[0, 0]] = 0
    found = DecoderAligner().fit(dataclasses.replace(easy.source, directions=dead), easy.target, pairs=easy.pairs)
    assert found.alignment_.info["zero_directions_source"] == 1
    assert easy.truth[0, 0] not in found.alignment_.matches["source"]


def test_info_says_what_was_left_out(easy: Planted) -> None:
    info = ActivationAligner(min_support=300).fit(easy.source, easy.target, pairs=easy.pairs).alignment_.info
    assert info["testable_source"] + info["dead_source"] + info["rare_source"] + info["always_on_source"] == 300
    assert info["rare_source"] > 0
    assert "heldout_r2" in DecoderAligner().fit(easy.source, easy.target, pairs=easy.pairs).alignment_.info


# --- transport ---

PLAN: dict[str, Any] = {"max_iter": 20000, "tol": 1e-5}


def test_small_reg_gives_the_exact_assignment() -> None:
    import ot

    cost = np.random.default_rng(0).uniform(size=(12, 12))
    exact = ot.emd(np.ones(12), np.ones(12), cost)
    problem = Problem.of(all_pairs(cost))
    plans = [transport(problem, reg=reg, **PLAN) for reg in (0.1, 0.03, 0.008)]
    rows, cols, _ = transport_matches(plans[-1])
    assert np.array_equal(cols, exact.argmax(axis=1)) and len(rows) == 12
    optimum = float((exact * cost).sum())
    costs = [float(plan.coupling.multiply(cost).sum()) for plan in plans]
    assert costs[0] > costs[1] > costs[2] >= optimum - 1e-6
    assert costs[2] - optimum < 0.05 * optimum
    for plan in plans:
        assert plan.dual <= optimum + 1e-9 <= plan.primal + 2e-9
    assert transport(problem, reg=0).primal == pytest.approx(optimum)


def test_small_reg_with_slack_is_partial_assignment() -> None:
    """With slack τ the plan tends to the assignment that counts every pair as worth τ − cost."""
    from aligners.assignment import one_to_one

    cost = np.random.default_rng(2).uniform(size=(9, 7))
    plan = transport(Problem.of(all_pairs(cost), slack=0.3), reg=0.008, **PLAN)
    rows, cols = one_to_one(0.3 - cost)
    assert sorted(zip(*transport_matches(plan)[:2], strict=True)) == sorted(zip(rows, cols, strict=True))
    assert 0 < len(rows) < 7


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(["balanced", "slack", "unbalanced"]), st.integers(0, 99))
def test_the_front_door_gives_one_answer(n: int, m: int, kind: str, seed: int) -> None:
    """POT over all pairs and our iterations along the same edges: one optimum, bracketed by both accounts."""
    rng = np.random.default_rng(seed)
    cost = all_pairs(np.round(rng.uniform(size=(n, m)), 1))  # zeros and ties are edges too
    options = {"balanced": {}, "slack": {"slack": 0.6}, "unbalanced": {"kl": 0.4}}[kind]
    problem = Problem.of(cost, source_mass=rng.uniform(0.5, 2, n), **options) if options else Problem.of(cost)
    dense = transport(problem, reg=0.05, max_iter=50000, tol=1e-6)
    ours = sparse_sinkhorn(problem, reg=0.05, max_iter=50000, tol=1e-6)
    assert dense.converged and ours.converged and dense.kind == kind
    room = 1e-4 * problem.source_mass.sum()
    assert dense.dual <= ours.primal + room and ours.dual <= dense.primal + room
    if kind != "slack":  # there the bins differ above temperature zero
        assert np.allclose(dense.coupling.toarray(), ours.coupling.toarray(), atol=1e-3)
    if kind != "unbalanced":
        best = transport(problem, reg=0)
        assert dense.dual <= best.primal + 1e-7 and best.primal <= dense.primal + 1e-7
        assert dense.relative_gap < 0.6


def test_the_dense_account_of_slack_is_tight() -> None:
    """At a low temperature the potentials of POT, brought back from those with bins, certify the plan."""
    cost = np.random.default_rng(3).uniform(size=(20, 14))
    for mass in (np.ones(20), np.random.default_rng(4).uniform(0.5, 2, 20)):
        plan = transport(Problem.of(all_pairs(cost), slack=0.4, source_mass=mass), reg=0.003, max_iter=50000)
        assert plan.converged and plan.relative_gap < 0.02, plan.relative_gap


@pytest.mark.parametrize("slack", [None, 0.5])
@pytest.mark.parametrize("reg", [0.5, 0.004])
def test_errors_are_the_plans_own(slack: float | None, reg: float) -> None:
    """Also in the log domain (cost/reg near 250): sums add up to a unit a feature, and errors are below tol."""
    problem = Problem.of(all_pairs(np.random.default_rng(1).uniform(size=(6, 6))), slack=slack)
    plan = transport(problem, reg=reg, max_iter=20000, tol=1e-4)
    assert plan.converged and plan.row_error < 1e-4 and plan.col_error < 1e-4
    mass = plan.coupling.toarray()
    assert np.allclose(mass.sum(axis=1) + plan.row_slack, 1, atol=2e-3)
    assert np.allclose(mass.sum(axis=0) + plan.col_slack, 1, atol=2e-3)
    cut = transport(problem, reg=reg, max_iter=1, tol=1e-4)
    assert max(cut.row_error, cut.col_error) > 1e-4 and not cut.converged
    assert cut.n_iter == 1


def test_underflow_is_not_called_convergence(easy: Planted) -> None:
    """A reg far too small for the iterations allowed: no NaN in the result, and no claim of convergence."""
    found = (
        SinkhornAligner(reg=1e-4, slack=None, max_iter=20).fit(easy.source, easy.target, pairs=easy.pairs).alignment_
    )
    assert not found.converged
    assert np.all(np.isfinite(found.coupling.data)) and np.isfinite([found.row_error, found.col_error]).all()


def test_transport_refuses() -> None:
    problem = Problem.of(all_pairs(np.ones((2, 2))), slack=0.3)
    bad: dict[str, Any]
    for bad in ({"reg": -1.0}, {"reg": 0.1, "max_iter": 0}, {"reg": 0.1, "tol": 0}):
        with pytest.raises(TransferError, match="Transport needs"):
            transport(problem, **bad)
    with pytest.raises(TransferError, match="all 4 pairs, got 2"):
        dense_transport(Problem.of(sp.csr_matrix(np.eye(2)), slack=0.3), reg=0.1)
    # Above the limit the same problem is solved along its edges.
    wide = Problem.of(all_pairs(np.full((2, DENSE_LIMIT + 1), 0.1)), slack=0.3)
    assert transport(wide, reg=0.05).converged


def test_dense_limit_is_checked_before_the_matrix(monkeypatch: pytest.MonkeyPatch, easy: Planted) -> None:
    monkeypatch.setattr("aligners.sinkhorn.DENSE_LIMIT", 100)
    for cost in ("activation", "fused", "unembedding"):
        with pytest.raises(TransferError, match="100 testable features.*min_support"):
            SinkhornAligner(cost=cost).fit(easy.source, easy.target, pairs=easy.pairs)


def test_coupling_keeps_the_largest_and_says_what_it_drops() -> None:
    mass = np.random.default_rng(0).uniform(size=(40, 30))
    keep = keep_largest(mass)
    assert np.all(keep.sum(axis=1) >= KEEP) and np.all(keep.sum(axis=0) >= KEEP)
    for row, kept in zip(mass, keep, strict=True):
        assert set(np.argsort(-row)[:KEEP]) <= set(np.flatnonzero(kept))
    assert not keep_largest(np.zeros((3, 3))).any()
    assert keep.sum() <= KEEP * 70


def test_dropped_mass(easy: Planted) -> None:
    found = SinkhornAligner(reg=0.3, slack=None).fit(easy.source, easy.target, pairs=easy.pairs).alignment_
    assert found.info["dropped_mass"] > 0.05
    assert found.coupling.nnz <= KEEP * (300 + 260)
    # Without slack each feature of the larger side carries 1/300 and the unit is that: everything sums to 300.
    assert np.isclose(found.coupling.sum(), 300 * (1 - found.info["dropped_mass"]), rtol=1e-3)


def test_typical_of_noise_is_positive() -> None:
    assert typical(-np.ones((3, 3))) == 1.0
    assert typical(np.eye(4) * 0.5) == 0.5

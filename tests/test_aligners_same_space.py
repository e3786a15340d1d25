"""Matching by weights in one space: planted copies exactly, two seeds of the zoo, controls, and chains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners import same_space
from aligners.same_space import (
    SaeWeights,
    activation_scale,
    compose,
    dual_match,
    folded_match,
    match_rows,
    pw_mcc,
)
from transfer.core.errors import TransferError
from transfer.core.files import load_arrays


def planted(n: int = 60, d: int = 24, seed: int = 0) -> SaeWeights:
    rng = np.random.default_rng(seed)
    decoder = rng.normal(size=(n, d))
    encoder = decoder + 0.3 * rng.normal(size=(n, d))
    return SaeWeights(encoder, rng.normal(size=n), decoder, rng.uniform(0.1, 2, size=n))


def disguised(a: SaeWeights, seed: int = 1, rescale: bool = True) -> tuple[SaeWeights, np.ndarray]:
    """The same function with features in another order and on scales of their own; new id of each feature."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(a))
    s = np.exp(rng.normal(size=len(a))) if rescale else np.ones(len(a))
    assert a.threshold is not None
    moved = SaeWeights(a.encoder * s[:, None], a.encoder_bias * s, a.decoder / s[:, None], a.threshold * s)
    arrays = (moved.encoder, moved.encoder_bias, moved.decoder, moved.threshold)
    return SaeWeights(*(v[order] for v in arrays if v is not None)), np.argsort(order)


def run(a: SaeWeights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstruction of a JumpReLU SAE."""
    pre = x @ a.encoder.T + a.encoder_bias
    codes = pre * (pre > a.threshold)
    return codes, codes @ a.decoder


def test_folding_keeps_the_function() -> None:
    a = planted()
    folded = a.folded()
    assert a.threshold is not None and folded.threshold is not None
    x = np.random.default_rng(2).normal(size=(50, 24))
    codes, out = run(a, x)
    folded_codes, folded_out = run(folded, x)
    assert np.allclose(folded.threshold, 1) and np.allclose(out, folded_out)
    assert np.allclose(codes, folded_codes * a.threshold) and np.any(codes > 0)
    scale = np.random.default_rng(3).uniform(0.5, 2, size=60)
    other = a.folded(scale)
    assert other.threshold is not None
    assert np.allclose(run(other, x)[1], out) and np.allclose(other.threshold, a.threshold / scale)
    top = dataclasses.replace(a, threshold=None).folded(scale)
    assert top.threshold is None and np.allclose(top.decoder, a.decoder * scale[:, None])


def test_a_disguised_copy_is_found_exactly() -> None:
    a = planted()
    b, where = disguised(a)
    truth = np.stack([np.arange(60), where], axis=1)
    dual = dual_match(a, b)
    assert np.array_equal(dual.pairs, truth) and dual.source_share == dual.target_share == 1
    assert np.allclose(dual.encoder_cosine, 1) and np.allclose(dual.decoder_cosine, 1)
    assert pw_mcc(a.decoder, b.decoder).mean == pytest.approx(1, abs=1e-12)
    assert np.array_equal(dual_match(a, b, rule="mutual").pairs, truth)
    # Folded, the copies are the same numbers in another order; before, they were not.
    one, other = a.folded(), b.folded()
    found = folded_match(one, other)
    assert np.array_equal(found.pairs, truth)
    assert np.allclose(one.decoder, other.decoder[where]) and np.allclose(one.encoder, other.encoder[where])
    assert not np.allclose(a.decoder, b.decoder[where]) and folded_match(a, b).mean != pytest.approx(found.mean)


@pytest.mark.parametrize("absolute", [False, True])
def test_candidates_find_what_all_pairs_find(monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    """The path for large sides, on a noisy copy with features of its own and opposite signs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 40))
    y = np.concatenate([x[:200] + 0.6 * rng.normal(size=(200, 40)), rng.normal(size=(150, 40))])
    y *= rng.choice([-1, 1], size=(350, 1)) if absolute else 1
    dense = match_rows(x, y, absolute=absolute)
    assert dense.exact and dense.n_source == 300 and dense.n_target == 350
    monkeypatch.setattr(same_space, "DENSE_LIMIT", 10)
    sparse = match_rows(x, y, absolute=absolute)
    assert not sparse.exact
    assert 0 <= dense.score.sum() - sparse.score.sum() < 0.01 * dense.score.sum()
    few = match_rows(x, y, absolute=absolute, k=300)
    assert few.score.sum() == pytest.approx(dense.score.sum()) and np.array_equal(few.pairs, dense.pairs)
    right = np.flatnonzero(sparse.pairs[:, 0] < 200)
    assert np.mean(sparse.pairs[right, 0] == sparse.pairs[right, 1]) > 0.99
    a, b = planted(), disguised(planted())[0]
    assert np.array_equal(folded_match(a.folded(), b.folded()).pairs[:, 1], disguised(planted())[1])


def test_widths_may_differ_and_dead_rows_match_nothing() -> None:
    a, wide = planted(60), planted(90, seed=5)
    b = SaeWeights(
        np.concatenate([a.encoder[10:], wide.encoder]),
        np.concatenate([a.encoder_bias[10:], wide.encoder_bias]),
        np.concatenate([a.decoder[10:], wide.decoder]),
    )
    b.decoder[3] = b.encoder[3] = 0
    dual = dual_match(a, b)
    truth = [i for i in range(10, 60) if i != 13]
    assert np.array_equal(dual.pairs, np.stack([truth, np.array(truth) - 10], axis=1))
    assert dual.source_share == 49 / 60 and dual.target_share == 49 / 140
    assert dual.decoder.zero_target == 1 and dual.decoder.zero_source == 0
    assert 3 not in pw_mcc(a.decoder, b.decoder).pairs[:, 1]
    back = dual_match(b, a)
    assert np.array_equal(back.pairs[:, ::-1], dual.pairs[np.argsort(dual.pairs[:, 1])])


def test_the_dual_rule_needs_both_sides() -> None:
    """A decoder that agrees is not enough, nor is a cosine just below the line."""
    a = planted()
    b, _ = disguised(a)
    turned = dataclasses.replace(b, encoder=b.encoder[::-1], encoder_bias=b.encoder_bias[::-1])
    assert len(dual_match(a, turned)) <= 1
    noisy = dataclasses.replace(b, decoder=b.decoder + 0.5 * b.decoder.std() * planted(seed=9).decoder)
    found = dual_match(a, noisy)
    assert found.n_agreed > len(found) and found.decoder_cosine.min() >= 0.7
    assert len(dual_match(a, noisy, least=0.0)) == found.n_agreed
    assert len(dual_match(a, noisy, least=1.0)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_compose_is_following_by_hand(seed: int, n: int, m: int, o: int) -> None:
    rng = np.random.default_rng(seed)

    def step(left: int, right: int) -> np.ndarray:
        size = rng.integers(0, min(left, right) + 1)
        return np.stack([rng.permutation(left)[:size], rng.permutation(right)[:size]], axis=1)

    one, two, three = step(n, m), step(m, o), step(o, n)
    follow = [dict(s.tolist()) for s in (one, two, three)]
    expected = sorted(
        (i, follow[2][follow[1][j]]) for i, j in follow[0].items() if j in follow[1] and follow[1][j] in follow[2]
    )
    assert compose(one, two, three).tolist() == [list(p) for p in expected]
    assert np.array_equal(compose(one, two, three), compose(compose(one, two), three))
    assert compose(one).tolist() == sorted(one.tolist())


def test_activation_scale_is_the_median() -> None:
    rng = np.random.default_rng(0)
    dense = rng.uniform(size=(40, 7)) * (rng.uniform(size=(40, 7)) < 0.3)
    dense[:, 4] = 0
    found = activation_scale(sp.csr_matrix(dense))
    expected = [np.median(c[c > 0]) if np.any(c > 0) else 1 for c in dense.T]
    assert np.allclose(found, expected) and found[4] == 1


def test_refusals() -> None:
    a = planted()
    assert a.threshold is not None
    with pytest.raises(TransferError, match="do not belong together"):
        SaeWeights(a.encoder, a.encoder_bias, a.decoder[1:])
    with pytest.raises(TransferError, match="NaN or infinity"):
        SaeWeights(a.encoder * np.nan, a.encoder_bias, a.decoder)
    with pytest.raises(TransferError, match="60 positive numbers"):
        SaeWeights(a.encoder, a.encoder_bias, a.decoder, -a.threshold)
    with pytest.raises(TransferError, match="no features"):
        SaeWeights(a.encoder[:0], a.encoder_bias[:0], a.decoder[:0])
    with pytest.raises(TransferError, match="no thresholds"):
        dataclasses.replace(a, threshold=None).folded()
    with pytest.raises(TransferError, match="positive numbers"):
        a.folded(np.zeros(60))
    with pytest.raises(TransferError, match="one width"):
        match_rows(a.decoder, a.decoder[:, 1:])
    with pytest.raises(TransferError, match="No target row"):
        match_rows(a.decoder, 0 * a.decoder)
    with pytest.raises(TransferError, match="matching rule"):
        match_rows(a.decoder, a.decoder, rule="best")  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="must lie in"):
        dual_match(a, a, least=2)
    with pytest.raises(TransferError, match="uses a source feature twice"):
        compose(np.array([[0, 1], [0, 2]]))
    with pytest.raises(TransferError, match="at least one"):
        compose()


def zoo(folder: str) -> SaeWeights:
    """A zoo SAE read off its file; decoder rows have length one, so nothing else rescales its codes."""
    path = Path(__file__).resolve().parents[1] / "models" / "zoo" / "llama" / folder / "sae_weights.safetensors"
    arrays = load_arrays(path)
    return SaeWeights(arrays["W_enc"].T, arrays["b_enc"], arrays["W_dec"])


def test_two_seeds_of_the_zoo() -> None:
    """Some features are shared, most are not (the published finding), and the controls share none."""
    a, b = zoo("sae"), zoo("sae_seed1")
    dual, mcc = dual_match(a, b), pw_mcc(a.decoder, b.decoder)
    assert 0.1 < dual.source_share < 0.5 and dual.n_agreed > 2 * len(dual)
    assert abs(dual_match(a, b, rule="mutual").source_share - dual.source_share) < 0.02
    order = np.random.default_rng(0).permutation(len(b))
    assert dual_match(a, dataclasses.replace(b, decoder=b.decoder[order])).source_share < 0.01
    # Random directions with the covariance of the real ones.
    factor = np.linalg.cholesky(np.cov(b.decoder.T) + 1e-9 * np.eye(b.decoder.shape[1]))
    chance = np.random.default_rng(1).normal(size=b.decoder.shape) @ factor.T
    assert dual_match(a, dataclasses.replace(b, decoder=chance, encoder=chance)).source_share == 0
    assert 1.5 * pw_mcc(a.decoder, chance).mean < mcc.mean < 0.9
    narrow = SaeWeights(b.encoder[::2], b.encoder_bias[::2], b.decoder[::2])
    assert abs(dual_match(a, narrow).target_share - dual.target_share) < 0.05

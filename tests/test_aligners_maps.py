"""Residual maps: exact recovery, R² as computed directly, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from aligners.maps import BLOCK, Sums, fit_map, r2
from transfer.core.errors import TransferError


def paired(noise: float = 0.0, d: int = 6, e: int = 9, rows: int = 400, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, d)) * rng.uniform(0.5, 2, size=d) + 3
    matrix, bias = rng.normal(size=(d, e)), rng.normal(size=e)
    y = x @ matrix + bias
    return x, y + noise * y.std() * rng.normal(size=y.shape), np.arange(rows) // 20, matrix, bias


def test_ridge_recovers_an_affine_map() -> None:
    x, y, docs, matrix, bias = paired()
    found = fit_map(x, y, docs)
    assert found.heldout_r2 > 0.999999
    assert np.allclose(found.matrix, matrix, atol=1e-3)
    assert np.allclose(found.points(x), y, atol=2e-2)
    assert np.allclose(found.vectors(x[:2] - x[1:3]), found.points(x[:2]) - found.points(x[1:3]))
    assert np.allclose(found.vectors(np.zeros((1, 6))), 0)


def test_r2_from_sums_is_r2_from_points() -> None:
    x, y, docs, _, _ = paired(noise=0.8)
    found = fit_map(x, y, docs)
    held = docs >= 10
    sums = Sums.of(x, y, np.flatnonzero(held))
    error = np.sum((y[held] - found.points(x[held])) ** 2) / np.sum((y[held] - y[held].mean(axis=0)) ** 2)
    assert np.isclose(r2(sums, found.matrix, found.bias), 1 - error)


def test_heldout_r2_is_honest() -> None:
    """Unrelated residuals, nearly as many coordinates as rows: the fit itself would explain much."""
    rng = np.random.default_rng(0)
    x, y, docs = rng.normal(size=(120, 60)), rng.normal(size=(120, 10)), np.arange(120) // 4
    found = fit_map(x, y, docs)
    inside = 1 - np.sum((y - found.points(x)) ** 2) / np.sum((y - y.mean(axis=0)) ** 2)
    assert found.heldout_r2 < 0.05 < inside


def test_strength_follows_the_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 80)) * np.geomspace(1, 0.05, 80)
    y = x @ rng.normal(size=(80, 10))
    docs = np.arange(150) // 5
    clean, noisy = fit_map(x, y, docs), fit_map(x, y + 3 * y.std() * rng.normal(size=y.shape), docs)
    assert clean.strength < noisy.strength


def test_procrustes_recovers_a_scaled_rotation() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 8)) * np.linspace(1, 3, 8)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    found = fit_map(x, 2.5 * x @ rotation + 1, np.arange(300) // 10, kind="procrustes")
    assert np.allclose(found.matrix, 2.5 * rotation, atol=1e-6)
    assert found.heldout_r2 > 0.999999


def test_blocks_add_up() -> None:
    x, y, _, _, _ = paired(rows=50)
    many = np.tile(np.arange(50), BLOCK // 50 + 2)
    whole, part = Sums.of(x, y, many), Sums.of(x, y, np.arange(50))
    times = len(many) / 50
    assert whole.n == len(many) > BLOCK
    assert np.allclose(whole.xx, times * part.xx) and np.allclose(whole.xy, times * part.xy)
    assert np.isclose(whole.yy, times * part.yy)


def test_half_precision_input_and_outliers() -> None:
    x, y, docs, matrix, _ = paired()
    x[7] *= 1e3
    found = fit_map(x.astype(np.float16), y.astype(np.float16), docs)
    assert found.n_outliers == 1 and found.n_rows == 399
    assert np.allclose(found.matrix, matrix, atol=0.02)


def test_refusals() -> None:
    x, y, docs, _, _ = paired()
    with pytest.raises(TransferError, match="two documents"):
        fit_map(x, y, np.zeros(len(x), int))
    with pytest.raises(TransferError, match="paired rows"):
        fit_map(x[:-1], y, docs)
    with pytest.raises(TransferError, match="do not vary"):
        fit_map(np.ones_like(x), y, docs)
    with pytest.raises(TransferError, match="Unknown kind"):
        fit_map(x, y, docs, kind="magic")  # type: ignore[arg-type]
    x[0, 0] = np.nan
    with pytest.raises(TransferError, match="NaN"):
        fit_map(x, y, docs)

"""Residual maps: exact recovery, R² as computed directly, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from aligners.canonical import canonical_coordinates
from aligners.maps import Block, Kind, SplitSums, Sums, blocks_of, fit_blocks, fit_map, r2
from aligners.stitch import fit_stitch
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
    sums = Sums.of(x[held], y[held])
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


KINDS: tuple[Kind, ...] = ("ridge", "procrustes", "cca")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [399], [57, 57, 200]])
def test_a_stream_gives_what_all_at_once_gives(kind: Kind, cuts: list[int]) -> None:
    """However it is cut, far from zero, with outliers."""
    x, y, docs, _, _ = paired(noise=0.3)
    x, y = x + 1e3, y - 1e3
    x[11], y[222] = 1e5, -1e5
    stream = list(zip(*(np.split(v, cuts) for v in (x, y, docs)), strict=True))
    one, other = fit_map(x, y, docs, kind=kind), fit_blocks(stream, kind=kind)
    assert other.n_outliers == one.n_outliers == 2 and other.n_rows == one.n_rows == 398
    assert (one.strength, one.floor, one.rank) == (other.strength, other.floor, other.rank)
    assert np.allclose(one.matrix, other.matrix, rtol=0, atol=1e-10 * np.abs(one.matrix).max())
    assert np.allclose(one.bias, other.bias, rtol=1e-10, atol=0)
    assert abs(one.heldout_r2 - other.heldout_r2) < 1e-10
    a, b = fit_stitch(blocks_of(x, y, docs), kind=kind), fit_stitch(stream, kind=kind)
    assert abs(a.source_cycle_error - b.source_cycle_error) < 1e-10
    assert np.allclose(a.forward.matrix, one.matrix) and a.forward.heldout_r2 == pytest.approx(one.heldout_r2)


def test_a_stream_is_read_twice_block_by_block() -> None:
    x, y, docs, _, _ = paired()

    class Stream:
        def __init__(self, lost: int = 0) -> None:
            self.reads, self.lost = 0, lost

        def __iter__(self) -> Iterator[Block]:
            self.reads += 1
            return iter([(x[i : i + 50], y[i : i + 50], docs[i : i + 50]) for i in range(0, 400 - self.lost, 50)])

    stream = Stream()
    assert fit_blocks(stream).n_rows == 400 and stream.reads == 2
    with pytest.raises(TransferError, match="read twice"):
        fit_blocks(iter(stream))

    class Shrinking(Stream):
        def __iter__(self) -> Iterator[Block]:
            found = super().__iter__()
            self.lost += self.step
            return found

        step = 100

    with pytest.raises(TransferError, match="400 rows at first and 300"):
        fit_blocks(Shrinking())
    Shrinking.step = -100
    with pytest.raises(TransferError, match="300 rows at first and 350"):
        fit_blocks(Shrinking(lost=100))
    with pytest.raises(TransferError, match="2 pairs of widths"):
        fit_blocks([(x, y, docs), (x[:, 1:], y, docs)])


def test_sums_add_up_and_turn_round() -> None:
    x, y, docs, _, _ = paired(noise=0.5)
    whole = Sums.of(x, y, full=True)
    parts = Sums.zero(6, 9, full=True)
    for block in (slice(0, 3), slice(3, 300), slice(300, 400)):
        parts = parts.plus(Sums.of(x[block], y[block], full=True))
    back = Sums.of(y, x, full=True)
    for name in ("n", "x", "y", "xx", "xy", "yy", "spread"):
        assert np.allclose(getattr(whole, name), getattr(parts, name), rtol=1e-12), name
        assert np.allclose(getattr(whole.reversed(), name), getattr(back, name), rtol=1e-12), name
    centred = x - x.mean(axis=0)
    assert np.allclose(whole.xx, centred.T @ centred) and whole.yy is not None
    assert whole.spread == pytest.approx(np.trace(whole.yy))
    split = SplitSums.of(blocks_of(x, y, docs), full=False, seed=0)
    assert split.fit.yy is None and split.fit.n == 320 and split.total.n == 400


def test_cca_with_every_direction_is_ridge() -> None:
    x, y, docs, _, _ = paired(noise=0.5)
    ridge, cca = (fit_map(x, y, docs, kind=kind, strengths=(1e-3,)) for kind in ("ridge", "cca"))
    assert cca.floor == 0 and cca.rank == 6
    assert np.allclose(ridge.matrix, cca.matrix) and np.allclose(ridge.bias, cca.bias)


def shared(d: int, e: int, common: int, rows: int = 600, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Two spaces that share a few strong directions; the rest of each is its own."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, common))
    sides = []
    for width in (d, e):
        basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
        own = rng.normal(size=(rows, width - common))
        sides += [np.hstack([z + 0.3 * rng.normal(size=z.shape), own]) @ basis + rng.normal(size=width), basis]
    return sides[0], sides[2], np.arange(rows) // 10, sides[1], sides[3]


def test_cca_keeps_the_shared_directions_only() -> None:
    """Where few directions are shared and rows are few, it is ahead of ridge, and far ahead of a rotation."""
    x, y, docs, left, right = shared(60, 80, 5)
    ridge, turned, cca = (fit_map(x, y, docs, kind=kind) for kind in KINDS)
    assert cca.rank == 5 and cca.floor > 0
    assert cca.heldout_r2 > ridge.heldout_r2 > turned.heldout_r2
    # A direction that is shared arrives where it should; one that is the source's own hardly arrives.
    there = cca.vectors(left)
    cosine = np.einsum("nd,nd->n", there[:5], right[:5]) / np.linalg.norm(there[:5], axis=1)
    assert cosine.min() > 0.9
    assert np.linalg.norm(there[5:], axis=1).max() < 0.3 * np.linalg.norm(there[:5], axis=1).min()


def test_cca_matches_the_textbook() -> None:
    """Correlations of canonical variates: scikit-learn's, on the same data."""
    from sklearn.cross_decomposition import CCA

    x, y, _, _, _ = shared(5, 4, 2, rows=300)
    into_x, into_y, rho = canonical_coordinates(Sums.of(x, y, full=True), 1e-9)
    a, b = CCA(n_components=2, max_iter=5000, tol=1e-10).fit_transform(x, y)
    expected = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(2)]
    assert np.allclose(rho[:2], expected, atol=1e-4) and len(rho) == 4
    weight = np.sqrt(rho / (1 - rho**2))
    left, right = ((v - v.mean(axis=0)) @ into / weight for v, into in ((x, into_x), (y, into_y)))
    assert np.allclose(left.T @ left, np.eye(4), atol=1e-6) and np.allclose(right.T @ right, np.eye(4), atol=1e-6)
    assert np.allclose(left.T @ right, np.diag(rho), atol=1e-6)
    narrow, wide, again = canonical_coordinates(Sums.of(y, x, full=True), 1e-9)
    assert np.allclose(again, rho) and np.allclose(np.abs(narrow), np.abs(into_y)) and wide.shape == into_x.shape


def test_canonical_coordinates_score_pairs_by_likelihood() -> None:
    """Inner products differ from the log-likelihood ratio of a Gaussian pair by terms of one side only."""
    x, y, _, _, _ = shared(4, 3, 2, rows=4000)
    left, right, _ = canonical_coordinates(Sums.of(x, y, full=True), 1e-9)
    a, b = (v - v.mean(axis=0) for v in (x, y))
    both = np.hstack([a, b])
    whole, alone = (np.linalg.inv(c) for c in (both.T @ both, np.block(
        [[a.T @ a, np.zeros((4, 3))], [np.zeros((3, 4)), b.T @ b]])))  # fmt: skip

    def ratio(i: int, j: int) -> float:
        point = np.concatenate([a[i], b[j]])
        return 0.5 * float(point @ (alone - whole) @ point)

    crossed = ratio(0, 1) + ratio(2, 3) - ratio(0, 3) - ratio(2, 1)
    mine = (a[0] - a[2]) @ left @ (right.T @ (b[1] - b[3]))
    assert crossed == pytest.approx(mine, rel=1e-4)


def test_whitened_procrustes_between_widths() -> None:
    """Coordinates of very different scale, turned and embedded in a wider space."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 6)) @ np.diag([1, 1, 2, 4, 8, 16]) + 5
    y = x @ np.linalg.qr(rng.normal(size=(9, 6)))[0].T * 3
    y += 1e-3 * rng.normal(size=y.shape)
    found = fit_map(x, y, np.arange(2000) // 10, kind="procrustes")
    assert found.heldout_r2 > 0.999 and found.strength > 0 and found.rank == 6
    assert np.allclose(found.points(x), y, atol=0.1 * y.std())


def test_stitch_both_ways() -> None:
    x, y, docs, _, _ = paired(noise=0.2)
    stitch = fit_stitch(blocks_of(x, y, docs))
    back = fit_map(y, x, docs)
    assert np.allclose(stitch.backward.matrix, back.matrix)
    assert stitch.backward.heldout_r2 == pytest.approx(back.heldout_r2)
    # By hand: maps of the inner documents, a round trip of the others.
    ids = np.random.default_rng(0).permutation(np.unique(docs))
    inner = np.isin(docs, ids[:16])
    there = fit_inner(x, y, inner, stitch.forward.strength)
    home = fit_inner(y, x, inner, stitch.backward.strength)
    held = x[~inner]
    trip = (held @ there[0] + there[1]) @ home[0] + home[1]
    lost = np.sum((held - trip) ** 2) / np.sum((held - held.mean(axis=0)) ** 2)
    assert stitch.source_cycle_error == pytest.approx(lost, rel=1e-6)
    turned = stitch.reversed()
    assert turned.forward is stitch.backward and turned.source_cycle_error == stitch.target_cycle_error


def fit_inner(x: np.ndarray, y: np.ndarray, rows: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    x, y = x[rows], y[rows]
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    matrix = np.linalg.solve(a.T @ a + strength * np.sum(a * a) / a.shape[1] * np.eye(a.shape[1]), a.T @ b)
    return matrix, y.mean(axis=0) - x.mean(axis=0) @ matrix


def test_cycle_error_has_its_extremes() -> None:
    rng = np.random.default_rng(0)
    x, docs = rng.normal(size=(500, 6)), np.arange(500) // 10
    lossless = fit_stitch(blocks_of(x, x @ rng.normal(size=(6, 9)) + 2, docs))
    assert abs(lossless.source_cycle_error) < 1e-3 and abs(lossless.target_cycle_error) < 1e-3
    narrow = fit_stitch(blocks_of(x, x[:, :3] + 1, docs))
    assert narrow.source_cycle_error == pytest.approx(0.5, abs=0.1) and abs(narrow.target_cycle_error) < 1e-3
    apart = fit_stitch(blocks_of(x, rng.normal(size=(500, 9)), docs))
    assert apart.source_cycle_error > 0.9 and apart.forward.heldout_r2 < 0.05


def test_stitched_encoders_read_what_comes_back() -> None:
    x, y, docs, _, _ = paired(noise=0.2)
    stitch = fit_stitch(blocks_of(x, y, docs), kind="cca")
    rng = np.random.default_rng(0)
    rows, bias = rng.normal(size=(4, 6)), rng.normal(size=4)
    moved, shifted = stitch.encoders(rows, bias)
    assert np.allclose(y @ moved.T + shifted, stitch.backward.points(y) @ rows.T + bias)
    assert np.allclose(stitch.decoders(rows), stitch.forward.vectors(rows))


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
    with pytest.raises(TransferError, match="Unknown kind"):
        fit_stitch(blocks_of(x, y, docs), kind="magic")  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="more than 3 paired"):
        fit_map(x[:3], y[:3], np.arange(3))
    for kind in KINDS:
        with pytest.raises(TransferError, match="do not vary"):
            fit_map(x, np.ones_like(y), docs, kind=kind)
    with pytest.raises(TransferError, match="strength above 0"):
        fit_map(np.hstack([x, 0 * x[:, :1]]), y, docs, kind="cca", strengths=(0.0,))
    x[0, 0] = np.nan
    with pytest.raises(TransferError, match="NaN"):
        fit_map(x, y, docs)

"""The shortlists of large top-k problems, at small size: exact, bounded, certain; and CSLS from their lists."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners import leaders, rerank, topk
from aligners.csls import csls_nearest
from aligners.leaders import Leaders
from aligners.rerank import both_topk, exact_rows, pair_scores
from aligners.shortlist import Shortlist, Tiling, UnitRows, _selected, shortlist
from aligners.topk import TopK, fast_dtype, neighbour_means, topk_cosine, unit_rows
from transfer.core.errors import TransferError

FAST = [torch.bfloat16, torch.float32]


def dense(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return unit_rows(x.astype(np.float64)) @ unit_rows(y.astype(np.float64)).T


def best(similarity: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def planted(rng: np.random.Generator, n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    y[: min(n, m) // 2] = 0.7 * x[: min(n, m) // 2] + 0.7 * y[: min(n, m) // 2]
    return x.astype(np.float32), y.astype(np.float32)


def search(x: np.ndarray, y: np.ndarray, k: int, fast: torch.dtype, tiling: Tiling, spare: int = 8) -> TopK:
    rows, cols, searched = both_topk(UnitRows.of(x), UnitRows.of(y), k, spare, fast, "cpu", tiling)
    return TopK(*rows, *cols, searched)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 12),
    st.sampled_from([(16, 16, 4), (32, 64, 8), (64, 32, 2)]),
    st.sampled_from(FAST),
    st.integers(0, 99),
)
def test_both_directions_are_dense_numpy(
    n: int, m: int, k: int, shape: tuple[int, int, int], fast: torch.dtype, seed: int
) -> None:
    x, y = planted(np.random.default_rng(seed), n, m, 24)
    found, cosine = search(x, y, k, fast, Tiling(*shape)), dense(x, y)
    assert np.array_equal(found.row_ids, best(cosine, k))
    assert np.array_equal(found.col_ids, best(cosine.T, k))
    assert np.allclose(found.row_scores, -np.sort(-cosine, axis=1)[:, :k], atol=1e-6)
    assert np.allclose(found.col_scores, -np.sort(-cosine.T, axis=1)[:, :k], atol=1e-6)


@pytest.mark.parametrize("fast", FAST)
def test_wide_problem_rests_on_its_shortlists(fast: torch.dtype) -> None:
    """At a width where cosines concentrate as in real dictionaries, no list is left in doubt and none is wrong."""
    x, y = planted(np.random.default_rng(0), 1500, 1800, 256)
    found, cosine = search(x, y, 16, fast, Tiling(512, 256)), dense(x, y)
    assert found.recomputed == 0
    assert np.array_equal(found.row_ids, best(cosine, 16))
    assert np.array_equal(found.col_ids, best(cosine.T, 16))


def test_shortlist_alone_would_be_wrong() -> None:
    """Bfloat16 does misorder near-ties: the exact scores are what makes the lists right."""
    x, y = planted(np.random.default_rng(0), 800, 900, 64)
    lists = shortlist(UnitRows.of(x), UnitRows.of(y), 16, torch.bfloat16, Tiling(256, 256), "cpu")
    assert np.mean(lists.row_ids == best(dense(x, y), 16)) < 0.99


def test_clusters_tighter_than_bfloat16_are_searched_in_full() -> None:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(1, 64))
    y = (centre + 1e-3 * rng.normal(size=(600, 64))).astype(np.float32)
    x = np.vstack([centre + 1e-3 * rng.normal(size=(50, 64)), rng.normal(size=(50, 64))]).astype(np.float32)
    found, cosine = search(x, y, 8, torch.bfloat16, Tiling(32, 128)), dense(x, y)
    assert found.recomputed >= 50  # cosines of .999998 that differ in the seventh digit
    reached = np.take_along_axis(cosine, best(cosine, 8), axis=1)
    assert np.allclose(np.take_along_axis(cosine, found.row_ids, axis=1), reached, atol=2e-7)


@pytest.mark.parametrize("fast", FAST)
def test_equal_rows_go_to_the_lower_id(fast: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 32)).astype(np.float32)
    y = np.repeat(rng.normal(size=(30, 32)).astype(np.float32), 40, axis=0)  # every target forty times
    found = search(x, y, 6, fast, Tiling(32, 64))
    assert np.array_equal(found.row_ids, found.row_ids[:, :1] + np.arange(6))
    assert np.all(found.row_ids[:, 0] % 40 == 0)
    small = topk_cosine(x, y, 6)
    assert np.array_equal(small.row_ids, found.row_ids)
    assert np.array_equal(small.row_scores, found.row_scores)


@pytest.mark.parametrize("fast", FAST)
def test_opposed_sides_have_no_positive_pair(fast: torch.dtype) -> None:
    """Lists hold positive products; where there are none, the search in full still answers."""
    rng = np.random.default_rng(0)
    x = (np.ones(40) + 0.1 * rng.normal(size=(70, 40))).astype(np.float32)
    y = (-np.ones(40) + 0.1 * rng.normal(size=(80, 40))).astype(np.float32)
    found = search(x, y, 5, fast, Tiling(32, 32, 4))
    assert found.recomputed == 150
    assert np.array_equal(found.row_ids, best(dense(x, y), 5))


def test_permuting_targets_permutes_the_result() -> None:
    rng = np.random.default_rng(0)
    x, y = planted(rng, 700, 900, 96)
    order = rng.permutation(900)
    plain, moved = (search(x, t, 8, torch.bfloat16, Tiling(256, 128)) for t in (y, y[order]))
    assert np.array_equal(order[moved.row_ids], plain.row_ids)
    assert np.array_equal(moved.row_scores, plain.row_scores)
    assert np.array_equal(moved.col_ids, plain.col_ids[order])
    assert np.array_equal(moved.col_scores, plain.col_scores[order])


def test_deterministic_and_inputs_untouched() -> None:
    x, y = planted(np.random.default_rng(0), 300, 300, 48)
    before = x.copy(), y.copy()
    one, two = (search(x, y, 8, torch.bfloat16, Tiling(64, 64)) for _ in range(2))
    assert np.array_equal(one.row_ids, two.row_ids) and np.array_equal(one.col_scores, two.col_scores)
    assert np.array_equal(x, before[0]) and np.array_equal(y, before[1])


def test_half_precision_and_memory_maps(tmp_path: Path) -> None:
    x, y = planted(np.random.default_rng(0), 500, 400, 64)
    half = y.astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", half)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy"]
    found = search(mapped[0], mapped[1], 8, torch.bfloat16, Tiling(128, 128))
    assert np.array_equal(found.row_ids, best(dense(x, half), 8))
    assert np.array_equal(found.col_ids, best(dense(x, half).T, 8))
    assert found.row_scores.dtype == np.float32


def test_float64_rows_get_float64_scores() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 50)), rng.normal(size=(300, 50))
    found = search(x, y, 5, torch.bfloat16, Tiling(64, 64))
    assert np.allclose(found.row_scores, -np.sort(-dense(x, y), axis=1)[:, :5], rtol=1e-13)


def test_pairs_score_the_same_either_way_round() -> None:
    rng = np.random.default_rng(0)
    x, y = UnitRows.of(planted(rng, 40, 60, 33)[0]), UnitRows.of(planted(rng, 40, 60, 33)[1])
    rows, cols = np.sort(rng.integers(40, size=200)), rng.integers(60, size=200)
    order = np.argsort(cols, kind="stable")
    forth = pair_scores(x, y, rows, cols, "cpu")
    back = pair_scores(y, x, cols[order], rows[order], "cpu")
    assert np.array_equal(forth[order], back)


def test_full_search_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerank, "SEARCHED", 300)
    x, y = planted(np.random.default_rng(0), 50, 70, 16)
    ids, _ = exact_rows(UnitRows.of(x), UnitRows.of(y), np.array([3, 7, 8, 40]), 9, "cpu")
    assert np.array_equal(ids, best(dense(x, y), 9)[[3, 7, 8, 40]])


@pytest.mark.parametrize("shape", [Tiling(), Tiling(16, 32, 8), Tiling(7, 5, 11), Tiling(1, 64, 32)])
def test_tiles_cover_every_column_once(shape: Tiling) -> None:
    for n in (1, 7, 8, 9, 500, 20_000):
        spans = list(shape.spans(n))
        assert [i for first, last in spans for i in range(first, last)] == list(range(n))
        assert all(last - first <= max(shape.first, shape.cols) for first, last in spans)


def test_memory_stays_far_below_the_full_matrix() -> None:
    """Resident memory in a process of its own (torch allocates behind Python's back)."""
    script = """
import resource, numpy as np, torch
torch.set_num_threads(1)
from aligners.topk import SPARE, topk_cosine
rng = np.random.default_rng(0)
n, d, k = 8192, 32, 8
x = rng.standard_normal((n, d), dtype=np.float32)
topk_cosine(x[:2500], x[:2500], k)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
assert topk_cosine(x, x, k).recomputed < n / 10
print((peak() - before) / (2 * d * n + 110 * (k + SPARE) * 2 * n + 4096 * n * 2.5 + 2**26), n * n * 4 / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    share, full = map(float, done.stdout.split())
    assert full > 250 and share < 1


def test_precision() -> None:
    assert fast_dtype("float32") is torch.float32
    assert fast_dtype("auto") in FAST
    with pytest.raises(TransferError, match="precision"):
        fast_dtype("int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("small", [True, False])
def test_refusals(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(topk, "SMALL", 0)
    good = np.ones((4, 3), dtype=np.float32)
    for bad, words in ((np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0.0, "zero")):
        rows = good.copy()
        rows[2] = bad
        with pytest.raises(TransferError, match=f"Row 2 of the target directions .*{words}"):
            topk_cosine(good, rows, 1)
    for empty in (good[:0], good[:, :0]):
        with pytest.raises(TransferError, match="at least one row"):
            topk_cosine(empty, good, 1)
    with pytest.raises(TransferError, match="k ≥ 1"):
        topk_cosine(good, good, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(1, 70),
    st.sampled_from([np.int16, np.int32]),
    st.sampled_from(["ties", "spread", "rising", "negative"]),
    st.integers(0, 99),
)
def test_leaders_keep_the_best(n: int, m: int, keep: int, step: int, bits: type, kind: str, seed: int) -> None:
    """Both directions are the sorted positive entries, whatever the blocks: scores, ids by lower, floors, numbers."""
    rng = np.random.default_rng(seed)
    scores = {
        "ties": rng.integers(-2, 4, size=(n, m)) / 4,
        "spread": rng.normal(size=(n, m)),
        "rising": np.add.outer(np.arange(n), np.arange(m)) / 256 - 0.1,  # the best come last
        "negative": -rng.random((n, m)),
    }[kind].astype(np.float32)
    ordered = scores.view(np.int32)
    if bits is np.int16:
        ordered = (ordered >> 16).astype(np.int16)
        scores = (ordered.astype(np.int32) << 16).view(np.float32)
    first, second = rng.integers(100, size=(n, m), dtype=np.int32), rng.random((n, m))
    rows, columns = Leaders(n, keep, bits), Leaders(m, keep, bits, numbers=True)
    for r in range(0, n, step):
        for c in range(0, m, step):
            at = slice(r, r + step), slice(c, c + step)
            columns.offer_columns(ordered[at].copy(), c, r, (first[at].copy(), second[at].copy()))
    for c in range(0, m, step):
        rows.offer_rows(ordered[:, c : c + step].copy(), c)
    for lists, all_scores in ((rows, scores), (columns, scores.T)):
        ids, got, floor, numbers = lists.table()
        want = best(all_scores, keep)
        reached = np.take_along_axis(all_scores, want, axis=1)
        wide = want.shape[1]
        assert np.array_equal(ids[:, :wide], np.where(reached > 0, want, -1)) and np.all(ids[:, wide:] == -1)
        assert np.array_equal(got[:, :wide], np.where(reached > 0, reached, -np.inf))
        full = reached[:, -1] if wide == keep else 0.0
        assert np.array_equal(floor, np.maximum(full, 0) * np.ones(len(floor)))
        if lists is columns:
            owner, slot = np.nonzero(ids >= 0)
            assert np.array_equal(numbers[owner, slot, 0], first[ids[owner, slot], owner])
            assert np.array_equal(numbers[owner, slot, 1], second[ids[owner, slot], owner])


def test_threads_do_not_change_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (UnitRows.of(v) for v in planted(np.random.default_rng(0), 700, 900, 32))
    one = shortlist(x, y, 12, torch.float32, Tiling(256, 256, 512), "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(leaders, "LANES", 16)
    three = shortlist(x, y, 12, torch.float32, Tiling(256, 256, 512), "cpu")
    for part in dataclasses.fields(Shortlist):
        assert np.array_equal(getattr(one, part.name), getattr(three, part.name))


@pytest.mark.parametrize("n", [9, 300])
def test_lists_of_another_device_bound_what_they_leave_out(n: int) -> None:
    """What runs on a GPU, run here: its lists are the best products, and its floors hold."""
    x, y = (UnitRows.of(v) for v in planted(np.random.default_rng(0), n, 400, 32))
    found = _selected(x, y, 12, torch.float32, Tiling(64, 64), "cpu")
    cosine = dense(x.values, y.values)
    for ids, floor, scores in ((found.row_ids, found.row_floor, cosine), (found.col_ids, found.col_floor, cosine.T)):
        assert np.array_equal(ids, best(scores, 12))
        left = scores.copy()
        np.put_along_axis(left, ids, -np.inf, axis=1)
        assert np.all(left.max(axis=1) <= floor + 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 12), st.integers(0, 99))
def test_sure_csls_partners_are_the_dense_ones(n: int, m: int, k: int, seed: int) -> None:
    x, y = planted(np.random.default_rng(seed), n, m, 6)
    top = topk_cosine(x.astype(np.float64), y.astype(np.float64), k)
    r_row, r_col = neighbour_means(top, 10)
    csls = 2 * dense(x, y) - r_row[:, None] - r_col
    found = csls_nearest(top)
    assert np.array_equal(found.row_ids[found.row_sure], csls.argmax(axis=1)[found.row_sure])
    assert np.array_equal(found.col_ids[found.col_sure], csls.argmax(axis=0)[found.col_sure])
    assert np.allclose(found.row_scores[found.row_sure], csls.max(axis=1)[found.row_sure])
    if k >= max(n, m):
        assert found.row_sure.all() and found.col_sure.all()


def test_csls_certificate_is_rarely_needed_and_never_silent() -> None:
    x, y = planted(np.random.default_rng(0), 1200, 1200, 64)
    top = topk_cosine(x, y, 32)
    found = csls_nearest(top)
    assert found.row_sure.mean() > 0.95
    r_row, r_col = neighbour_means(top, 10)
    csls = 2 * dense(x, y) - r_row[:, None] - r_col
    rows, cols = found.mutual()
    want = np.flatnonzero(csls.argmax(axis=0)[csls.argmax(axis=1)] == np.arange(1200))
    assert np.array_equal(rows, want) and np.array_equal(cols, csls.argmax(axis=1)[want])
    short = csls_nearest(topk_cosine(x, y, 1))
    wrong = short.row_ids != (2 * dense(x, y) - dense(x, y).max(axis=0)).argmax(axis=1)
    assert wrong.any() and not np.any(wrong & short.row_sure)

"""Coverage of stores larger than memory: blocks, tallies in one pass, curves; the same numbers as in memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.benchmarks.coverage import synthetic_store
from tests.benchmarks.coverage_planted import planted_coverage
from tests.test_coverage import chosen, scattered, space
from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, map_arrays, save_arrays
from transfer.core.space import FeatureSet
from transfer.core.store import ActivationStore
from transfer.cover.curves import curves
from transfer.cover.delta import DeltaRule, check_floor, thresholds
from transfer.cover.tally import tally, tally_store
from transfer.coverage import coverage, store_coverage
from transfer.verbs.cover import _point


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActivationStore:
    monkeypatch.setattr("tests.benchmarks.coverage.SHARD", 70)
    return synthetic_store(tmp_path / "store", 300, 400, 12)


def test_mapped_arrays_are_the_loaded_ones(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "b": np.zeros((0, 4), dtype=np.float16),
        "c": np.array([1.5], dtype=np.float32),
        "d": np.arange(5, dtype=np.uint16),
    }
    save_arrays(tmp_path / "x.safetensors", arrays, {"note": "x"})
    mapped, loaded = map_arrays(tmp_path / "x.safetensors"), load_arrays(tmp_path / "x.safetensors")
    assert set(mapped) == set(loaded)
    for name, array in arrays.items():
        assert mapped[name].dtype == array.dtype and np.array_equal(mapped[name], array)
    assert not mapped["a"].flags.writeable
    with pytest.raises(TransferError, match="does not exist"):
        map_arrays(tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-3])
    with pytest.raises(TransferError, match="damaged"):
        map_arrays(tmp_path / "z.safetensors")
    save_arrays(tmp_path / "w.safetensors", {"a": np.zeros(2, dtype=np.uint32)})
    with pytest.raises(TransferError, match="U32"):
        map_arrays(tmp_path / "w.safetensors")


@pytest.mark.parametrize("nnz", [1, 100, 500, 2000, 1 << 22])
def test_blocks_join_and_cut_shards(store: ActivationStore, nnz: int) -> None:
    assert store.shards == 5
    whole, at = store.docs, 0
    for first, block in store.doc_blocks(nnz):
        assert first == at and block.nnz <= max(1.5 * nnz + 12, 12)
        at += len(block.indptr) - 1
        assert (block != whole[first:at]).nnz == 0
    assert at == 300


def test_damaged_stores_are_refused(store: ActivationStore) -> None:
    file = store.path / "docs-00002.safetensors"
    arrays = load_arrays(file)
    save_arrays(file, {**arrays, "indptr": arrays["indptr"][:-1], "indices": arrays["indices"][:-12],
                       "values": arrays["values"][:-12]})  # fmt: skip
    with pytest.raises(TransferError, match="299 rows of docs, not 300"):
        list(store.doc_blocks())
    save_arrays(file, {**arrays, "indices": arrays["indices"] + 400})
    with pytest.raises(TransferError, match="columns outside"):
        list(store.doc_blocks())
    save_arrays(file, {**arrays, "values": np.full_like(arrays["values"], np.nan)})
    with pytest.raises(TransferError, match="NaN"):
        tally_store(store, [np.zeros(400)], np.arange(400))
    file.unlink()
    with pytest.raises(TransferError, match="does not exist"):
        tally_store(store, [np.zeros(400)], np.arange(400))


@pytest.mark.parametrize("groups", [1, 7, 64, 1000])
def test_one_pass_counts_what_a_matrix_holds(store: ActivationStore, groups: int) -> None:
    features, deltas = np.arange(5, 300, 3), [np.zeros(400), np.full(400, 0.6), np.linspace(0, 1, 400)]
    found = tally_store(store, deltas, features, groups=groups, seed=3)
    for delta, one in zip(deltas, found, strict=True):
        exact = tally(store.docs, delta, features)
        assert one.n_docs == exact.n_docs == 300 and len(one.sizes) == min(groups, 300)
        assert np.array_equal(one.support, exact.support)
        np.testing.assert_allclose(one.mass, exact.mass, rtol=1e-5)
        assert np.ptp(one.sizes) <= 5 if groups <= 64 else one.sizes.sum() == 300
    rows = np.arange(300) % 4 == 1
    some = tally_store(store, deltas[:1], features, rows=rows, groups=groups)[0]
    assert np.array_equal(some.support, tally(store.docs[np.flatnonzero(rows)], deltas[0], features).support)
    assert np.array_equal(some.over(features[3:9]).support, some.support[3:9])
    with pytest.raises(TransferError, match="not hold all"):
        some.over(np.array([6]))


def test_drawing_parts_equals_drawing_documents() -> None:
    docs = scattered(np.random.default_rng(0), 12, 9, 0.3)
    found = tally(docs, np.zeros(9), np.arange(9))
    weights = np.random.default_rng(1).integers(0, 3, size=(12, 4))
    n_docs, counts, sums = found.times(weights)
    dense = docs.toarray()
    assert np.array_equal(n_docs, weights.sum(axis=0))
    assert np.allclose(counts, (dense > 0).T @ weights) and np.allclose(sums, dense.T @ weights, rtol=1e-5)


def test_coverage_of_a_store_is_that_of_its_documents(store: ActivationStore) -> None:
    anchor = store.docs[:60]
    delta = thresholds(anchor)
    relevant = FeatureSet(store.space, np.arange(0, 400, 2), "test")
    rows = np.zeros(300, dtype=bool)
    rows[60:90] = True
    exact = coverage(store.space, anchor, store.docs[60:90], relevant, delta)
    found = store_coverage(anchor, store, relevant, delta, rows=rows)
    for name in ("fac", "fac_uncapped", "fac_frequency", "fac_magnitude", "kl_frequency", "n_docs", "n_always_on"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-5), name
    assert found.missing.features.tolist() == exact.missing.features.tolist()
    # Each of the 30 documents is a group of its own in both.
    assert found.intervals.keys() == exact.intervals.keys()
    for name, ends in found.intervals.items():
        assert ends == pytest.approx(exact.intervals[name], rel=1e-4), name
    assert [found.ci_low, found.ci_high] == pytest.approx([exact.ci_low, exact.ci_high])


def test_intervals_of_a_store_do_not_depend_on_the_order_of_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that are alike must not fall into one group: its topic would go with it."""
    monkeypatch.setattr("tests.benchmarks.coverage.SHARD", 2000)
    store = synthetic_store(tmp_path, 2000, 300, 4)
    dense = np.zeros((2000, 300), dtype=np.float32)
    dense[np.arange(300), np.arange(300) * 2 // 3] = 1  # sorted by the one feature that each activates
    docs = sp.csr_matrix(dense)
    arrays = {"indptr": docs.indptr.astype(np.int64), "indices": docs.indices, "values": docs.data}
    save_arrays(store.path / "docs-00000.safetensors", arrays)
    store = ActivationStore.load(store.path)
    relevant, anchor = FeatureSet(store.space, np.arange(200), "test"), sp.csr_matrix(np.eye(300, dtype=np.float32))
    delta = np.zeros(300, dtype=np.float32)
    exact = coverage(store.space, anchor, store.docs, relevant, delta)
    found = store_coverage(anchor, store, relevant, delta)
    for name in ("fac_uncapped", "fac_frequency", "kl", "kl_frequency"):
        ours, theirs = (np.ptp(np.array(r.intervals[name], dtype=float)) for r in (found, exact))
        assert 0.6 * theirs < ours < 2.5 * theirs, name  # 6 times as wide with runs of 31 neighbours
    assert store_coverage(anchor, store, relevant, delta).intervals == found.intervals


# Curves.


def test_curves_hold_what_coverage_says_and_read_once(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, relevant = store.docs[:100], FeatureSet(store.space, np.arange(400), "test")
    passes = []
    inner = ActivationStore.doc_blocks
    monkeypatch.setattr(ActivationStore, "doc_blocks", lambda self, *a: (passes.append(1), inner(self, *a))[1])
    rule, rules = DeltaRule("quantile", 0.5), [DeltaRule.parse(t) for t in ("constant:0", "scale:0.5", "constant:99")]
    found = curves(anchor, store, relevant, rule, rules=rules, orders=5, seed=1)
    assert len(passes) == 1
    assert [row["delta_rule"] for row in found["delta"]] == ["constant:0", "scale:0.5", "constant:99"]
    for row in found["delta"][:2]:
        delta = thresholds(anchor, DeltaRule.parse(row["delta_rule"]))
        exact = coverage(store.space, anchor, store.docs, relevant, delta)
        assert row["fac"] == exact.fac and row["n_missing"] == len(exact.missing)
        assert (
            row["fac_frequency"] == pytest.approx(exact.fac_frequency) and row["ci_low"] <= row["fac"] <= row["ci_high"]
        )
    assert found["delta"][2]["fac"] is None and found["delta"][2]["n_anchor"] == 0
    assert found["delta"][2]["why"] == "the anchor activates nothing"
    json.dumps(found)


def test_points_below_the_floor_of_dense_codes_have_no_numbers() -> None:
    """Activations up to the floor are not stored, so a lower δ would count as if it were the floor."""
    rng = np.random.default_rng(3)
    codes = scattered(rng, 60, 20, 0.4)
    codes.data[codes.data <= 0.5] = 0
    codes.eliminate_zeros()
    dense = dataclasses.replace(space(20), rule="dense-0.5")
    relevant, rules = FeatureSet(dense, np.arange(20), "test"), [DeltaRule("constant", x) for x in (0, 0.4, 0.5, 0.6)]
    found = curves(codes, codes, relevant, DeltaRule(), rules=rules)["delta"]
    assert [row["fac"] for row in found] == [None, None, 1, 1]
    assert found[0]["why"] == "20 thresholds lie below 0.5, up to which nothing is stored" and "why" not in found[2]
    assert found[0]["why"] in _point({**found[0], "curve": "delta", "model": "m"})
    with pytest.raises(TransferError, match="20 thresholds lie below 0.5"):
        curves(codes, codes, relevant, DeltaRule("constant", 0.4), rules=[])
    # Codes by the SAE's own rule have no floor.
    found = curves(codes, codes, chosen(20, [*range(20)]), DeltaRule("constant", 0), rules=rules)["delta"]
    assert [row["fac"] for row in found] == [1, 1, 1, 1]


def test_the_size_curve_rises_to_the_whole() -> None:
    rng = np.random.default_rng(3)
    anchor, data = scattered(rng, 60, 80, 0.1), scattered(rng, 40, 80, 0.03)
    rule = DeltaRule("constant", 0)
    found = curves(anchor, data, chosen(80, list(range(80))), rule, rules=[], orders=10, seed=2)["size"]
    exact = coverage(space(80), anchor, data, chosen(80, list(range(80))), np.zeros(80))
    values = [row["fac"] for row in found]
    assert found[0]["n_docs"] == 1 and found[-1]["n_docs"] == 40 and np.all(np.diff(values) >= 0)
    assert values[-1] == pytest.approx(exact.fac) and found[-1]["fac_low"] == found[-1]["fac_high"]
    assert found[0]["fac_low"] < values[0] < found[0]["fac_high"]
    # Two orders say little, but not that a share could be below 0 or above 1.
    wide = curves(anchor, scattered(rng, 40, 80, 0.2), chosen(80, [*range(80)]), rule, rules=[], orders=2)["size"]
    assert all(0 <= row["fac_low"] <= row["fac_high"] <= 1 and row["kl_low"] >= 0 for row in wide)
    assert any(row["fac_low"] == 0 for row in wide) and any(row["fac_high"] == 1 > row["fac"] for row in wide)
    again = curves(anchor, data, chosen(80, list(range(80))), rule, rules=[], orders=10, seed=2)["size"]
    assert again == found
    with pytest.raises(TransferError, match="no documents"):
        curves(anchor, data[:0], chosen(80, [1, 2]), rule, rules=[])
    with pytest.raises(TransferError, match="activates none"):
        curves(anchor, data, chosen(80, [1, 2]), DeltaRule("constant", 9), rules=[])


# The planted task.


@pytest.mark.parametrize("delta", ["quantile:0.5", "scale:0.5", "constant:0"])
def test_planted_missing_features_are_recovered_without_noise(delta: str) -> None:
    found = planted_coverage(delta=delta, seed=1)
    assert found["precision"] == found["recall"] == 1
    assert found["fac"] == pytest.approx(found["truth"]) and found["n_relevant"] == 240


def test_noise_hides_missing_features_from_a_threshold_of_zero_first() -> None:
    assert planted_coverage(noise=0.2, delta="scale:0.5")["recall"] == 1
    assert planted_coverage(noise=0.2, delta="constant:0")["recall"] < 0.1


def test_thresholds_below_the_floor_are_refused() -> None:
    dense = dataclasses.replace(space(3), rule="dense-0.5, without digits")
    check_floor(dense, np.array([0.5, 0.7, 0]), np.array([True, True, False]))
    check_floor(space(3), np.zeros(3), np.ones(3, dtype=bool))
    with pytest.raises(TransferError, match="1 thresholds lie below 0.5"):
        check_floor(dense, np.array([0.4, 0.7, 0]), np.array([True, True, False]))

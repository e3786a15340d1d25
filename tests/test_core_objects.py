"""The core objects: what goes out comes back, and what each refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.core.alignment import MATCH_COLUMNS, Alignment
from transfer.core.errors import TransferError
from transfer.core.files import file_hash, load_arrays, read_json, save_arrays, write_json
from transfer.core.keys import SCHEMA, digest
from transfer.core.outcomes import Candidate, CoverageReport, EvalResult, FinetuneRun, SynthesisRun, TransferResult
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.store import ActivationStore, PairedActivations


def space(name: str = "zoo:one", n: int = 6) -> FeatureSpace:
    return FeatureSpace(name, "aa", 2, f"{name}/sae", "bb", n, 4, "topk-2", 3)


def features(*ids: int) -> FeatureSet:
    return FeatureSet(space(), np.array(ids, dtype=np.int64), "test")


# --- spaces and stores ---


def test_space_ids_follow_content() -> None:
    one = space("hub:org/name@abc")
    assert one.id == dataclasses.replace(one).id
    assert one.id.startswith("org--name@")
    assert one.id != dataclasses.replace(one, layer=3).id
    one.check(dataclasses.replace(one), "the store")
    with pytest.raises(TransferError, match="the store.*sae_hash is 'bb' there and 'cc' here"):
        one.check(dataclasses.replace(one, sae_hash="cc"), "the store")


def test_digest() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert len(digest(b"x", 5)) == 5


def write_store(path: Path, shards: int = 2) -> dict[str, np.ndarray]:
    """Two documents of two tokens in each shard; returns the dense tokens and documents."""
    rng = np.random.default_rng(0)
    dense = np.where(rng.uniform(size=(4 * shards, 6)) < 0.5, rng.uniform(1, 2, size=(4 * shards, 6)), 0)
    docs = dense.reshape(2 * shards, 2, 6).max(axis=1)
    position = dense.reshape(2 * shards, 2, 6).argmax(axis=1)
    for i in range(shards):
        tokens, part = sp.csr_matrix(dense[4 * i : 4 * i + 4]), sp.csr_matrix(docs[2 * i : 2 * i + 2])
        save_arrays(
            path / f"tokens-{i:05d}.safetensors",
            {
                "values": tokens.data.astype(np.float32),
                "indices": tokens.indices,
                "indptr": tokens.indptr,
                "doc": np.array([2 * i, 2 * i, 2 * i + 1, 2 * i + 1], dtype=np.int32),
                "end": np.array([3, 6, 2, 9], dtype=np.int32),
            },
        )
        rows, cols = part.nonzero()
        save_arrays(
            path / f"docs-{i:05d}.safetensors",
            {
                "values": part.data.astype(np.float32),
                "indices": part.indices,
                "indptr": part.indptr,
                "position": position[2 * i + rows, cols].astype(np.int32),
            },
        )
    meta = {
        "schema": SCHEMA,
        "space": dataclasses.asdict(space()),
        "corpus_hash": "c",
        "doc_ids": [f"d{i}" for i in range(2 * shards)],
        "n_tokens": 4 * shards,
        "shards": shards,
        "counts": {"empty": 1, "truncated": 0},
    }
    write_json(path / "meta.json", meta)
    return {"tokens": dense, "docs": docs, "position": position}


def test_store_reads_its_shards(tmp_path: Path) -> None:
    truth = write_store(tmp_path)
    store = ActivationStore.load(tmp_path)
    assert store.space == space() and store.counts == {"empty": 1, "truncated": 0}
    assert sp.issparse(store.tokens) and store.tokens.dtype == np.float32
    assert np.allclose(store.tokens.toarray(), truth["tokens"])
    assert np.allclose(store.docs.toarray(), truth["docs"])
    assert store.token_docs.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert store.token_ends.tolist() == [3, 6, 2, 9] * 2
    assert np.array_equal(store.peaks.toarray() > 0, truth["docs"] > 0)
    fired = truth["docs"] > 0
    assert np.array_equal(store.peaks.toarray()[fired] - 1, truth["position"][fired])
    assert np.array_equal(store.support(), (truth["docs"] > 0).sum(axis=0))
    assert store.rows(["d3", "d0"]).tolist() == [3, 0]


def test_store_refuses(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="transfer harvest"):
        ActivationStore.load(tmp_path / "nothing")
    write_store(tmp_path)
    store = ActivationStore.load(tmp_path)
    with pytest.raises(TransferError, match="keep_residual"):
        _ = store.residuals
    with pytest.raises(TransferError, match="first 'x'"):
        store.rows(["d0", "x"])
    write_json(tmp_path / "meta.json", {**read_json(tmp_path / "meta.json"), "schema": 99})
    with pytest.raises(TransferError, match="schema 99"):
        ActivationStore.load(tmp_path)
    (tmp_path / "tokens-00001.safetensors").write_bytes(b"\x10\x00damaged")
    with pytest.raises(TransferError, match="damaged"):
        _ = store.tokens


# --- feature sets ---


def test_feature_set_round_trip_and_subset() -> None:
    full = FeatureSet(
        space(), np.array([1, 3, 5]), "why", "judge-1", ("a", "b", "c"), np.array([0.1, 0.2, 0.3]), ("x", "y", "z")
    )
    back = FeatureSet.from_dict(full.to_dict())
    assert back.to_dict() == full.to_dict() and back.space == full.space
    part = full.subset(np.array([5, 1]), "less")
    assert part.features.tolist() == [1, 5] and part.labels == ("a", "c") and part.descriptions == ("x", "z")
    assert part.scores is not None and part.scores.tolist() == [0.1, 0.3] and part.why == "less"
    assert len(full.subset(np.array([], dtype=np.int64), "none")) == 0


@pytest.mark.parametrize("ids", [[-1, 2], [2, 6], [2, 2], [3, 1]])
def test_feature_set_refuses(ids: list[int]) -> None:
    with pytest.raises(TransferError):
        features(*ids)


# --- paired activations ---


def pairs(**changes: Any) -> PairedActivations:
    codes = sp.csr_matrix(np.arange(1, 25, dtype=np.float32).reshape(8, 3))
    parts: dict[str, Any] = {"source": codes, "target": codes * 2, "docs": np.repeat(np.arange(4, dtype=np.int32), 2)}
    return PairedActivations(**{**parts, **changes})


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 50))
def test_split_moves_whole_documents(fraction: float, seed: int) -> None:
    full = pairs(source_residual=np.arange(8.0)[:, None])
    try:
        first, second = full.split(fraction, seed)
    except TransferError:
        assert round(fraction * 4) == 4  # nothing left for the second part
        return
    assert not set(first.docs) & set(second.docs)
    assert len(first.docs) + len(second.docs) == 8
    assert len(np.unique(first.docs)) == max(1, round(fraction * 4))
    assert first.source_residual is not None
    assert np.array_equal(first.source.toarray()[:, 0], 1 + 3 * first.source_residual[:][:, 0])
    again, _ = full.split(fraction, seed)
    assert np.array_equal(first.docs, again.docs)


def test_pairs_refuse() -> None:
    empty = sp.csr_matrix((0, 3))
    with pytest.raises(TransferError, match="No paired rows"):
        pairs(source=empty, target=empty, docs=np.array([], dtype=np.int32))
    with pytest.raises(TransferError, match="differ: 8 source, 0 target"):
        pairs(target=empty)
    bad = sp.csr_matrix(np.array([[np.nan, 1, 1]] * 8))
    with pytest.raises(TransferError, match="target activations hold NaN"):
        pairs(target=bad)


# --- alignments ---


def alignment(**changes: Any) -> Alignment:
    coupling = sp.csr_matrix(
        (np.array([0.5, 0.25, 0.75], dtype=np.float32), (np.array([0, 0, 2]), np.array([1, 3, 2]))), shape=(6, 5)
    )
    matches: dict[str, np.ndarray] = {name: np.array([0.5, 0.75]) for name in MATCH_COLUMNS}
    matches["source"], matches["target"] = np.array([0, 2]), np.array([1, 2])
    matches["q_value"] = np.array([0.01, np.nan])
    parts: dict[str, Any] = {
        "source": space(),
        "target": space("zoo:two", 5),
        "method": "test",
        "coupling": coupling,
        "matches": matches,
        "converged": True,
    }
    return Alignment(**{**parts, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "n_iter": 7,
            "row_error": 1e-7,
            "col_error": 2e-7,
            "cost": 0.25,
            "duality_gap": 0.5,
            "seed": 3,
            "seconds": 1.5,
            "null_corr": np.array([0.1, np.nan]),
            "params": {"reg": 0.1, "slack": None},
            "info": {"n": 3, "text": "x", "list": [1, 2]},
        },
    ],
)
def test_alignment_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = alignment(**changes)
    one.save(tmp_path)
    back = Alignment.load(tmp_path)
    for field in dataclasses.fields(Alignment):
        a, b = getattr(one, field.name), getattr(back, field.name)
        if field.name == "coupling":
            assert (a != b).nnz == 0 and a.shape == b.shape
        elif field.name == "matches":
            assert all(np.array_equal(a[c], b[c], equal_nan=True) for c in MATCH_COLUMNS)
        elif isinstance(a, (np.ndarray, float)):
            assert np.array_equal(a, b, equal_nan=True), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize(
    "change",
    [
        {"match_score": np.zeros(3)},
        {"match_source": np.array([0, 6])},
        {"match_target": np.array([-1, 2])},
        {"indices": np.array([0, 99, 1, 2], dtype=np.int32)},
        {"indptr": np.array([0, 3, 1, 4, 4, 4, 4])},
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    alignment().save(tmp_path)
    meta = json.loads((tmp_path / "alignment.json").read_text())
    arrays = load_arrays(tmp_path / meta["arrays"])
    save_arrays(tmp_path / "changed", {**arrays, **change})
    named = f"alignment-{file_hash(tmp_path / 'changed')}.safetensors"
    (tmp_path / "changed").replace(tmp_path / named)
    write_json(tmp_path / "alignment.json", {**meta, "arrays": named})
    with pytest.raises(TransferError, match=r"damaged|differ in length|outside 0\.\."):
        Alignment.load(tmp_path)


@pytest.mark.parametrize("change", [{"provenance": None}, {"info": []}, {"params": None}, {"converged": "yes"}])
def test_fields_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    alignment().save(tmp_path)
    meta = json.loads((tmp_path / "alignment.json").read_text())
    write_json(tmp_path / "alignment.json", {**meta, **change})
    with pytest.raises(TransferError, match="damaged"):
        Alignment.load(tmp_path)


def test_alignment_carries_values_both_ways() -> None:
    one = alignment()
    values = np.array([[1.0, 0, 2, 0, 0, 0], [0, 5, 0, 0, 0, 0]])
    pushed = one.push(values).toarray()
    assert np.allclose(pushed[0], [0, 2 / 3, 2, 1 / 3, 0])
    assert np.allclose(pushed[1], 0)  # feature 1 has no counterpart
    assert np.allclose(one.push(sp.csr_matrix(values)).toarray(), pushed)
    assert np.allclose(one.pull(np.array([[0, 1.0, 1, 0, 9]])).toarray(), [[1, 0, 1, 0, 0, 0]])
    turned = one.reversed()
    assert np.allclose(turned.push(np.eye(5)).toarray(), one.pull(np.eye(5)).toarray())
    assert turned.matches["source"].tolist() == [1, 2] and turned.source == one.target
    assert one.mapping() == {0: 1, 2: 2} and turned.mapping() == {1: 0, 2: 2}


def test_alignment_summary_and_top() -> None:
    one = alignment(info={"heldout_r2": 0.5}, null_corr=np.array([0.0, 0.2, np.nan]))
    summary = one.summary()
    assert summary["n_features"] == [6, 5] and summary["n_matches"] == 2 and summary["heldout_r2"] == 0.5
    assert summary["heldout_corr_median"] == 0.625 and summary["null_corr_median"] == pytest.approx(0.1)
    assert summary["q_value_max"] == 0.01
    assert [m["source"] for m in one.top(1)] == [2]
    unsure = alignment(converged=False, row_error=0.5)
    with pytest.raises(TransferError, match=r"did not converge \(row error 0.5.*allow_unconverged"):
        unsure.top(1)
    assert len(unsure.top(5, allow_unconverged=True)) == 2


def test_alignment_refuses(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"Coupling is \(6, 6\)"):
        alignment(coupling=sp.csr_matrix((6, 6)))
    with pytest.raises(TransferError, match="lack the column 'q_value'"):
        alignment(matches={c: np.array([0]) for c in MATCH_COLUMNS if c != "q_value"})
    with pytest.raises(TransferError, match="transfer align"):
        Alignment.load(tmp_path)


# --- reports and runs ---


def test_coverage_round_trip(tmp_path: Path) -> None:
    one = CoverageReport(
        space=space(),
        dataset="seed",
        anchor="anchor",
        relevant=features(0, 1, 2, 4),
        anchor_features=features(0, 1, 4),
        covered=features(0, 1),
        missing=features(4),
        fac=2 / 3,
        fac_uncapped=1.0,
        ci_low=0.5,
        ci_high=0.8,
        delta_rule="quantile:0.5",
        n_docs=9,
        kl=0.25,
    )
    one.save(tmp_path / "coverage.json")
    back = CoverageReport.load(tmp_path / "coverage.json")
    assert back.summary() == one.summary()
    assert back.missing.to_dict() == one.missing.to_dict() and back.space == one.space


def candidate(**changes: Any) -> Candidate:
    parts: dict[str, Any] = {
        "source": "s",
        "generator": "g",
        "feature": 3,
        "step": 1,
        "attempt": 0,
        "text": "café",
        "label": "benign",
        "score": 1.5,
        "delta": 1.0,
        "seed": 0,
        "prompt_hash": "h",
        "verdict": "kept",
        "target_scores": {"t": 0.5},
    }
    return Candidate(**{**parts, **changes})


@pytest.mark.parametrize("kind", [CoverageReport, SynthesisRun])
def test_files_of_another_kind_are_refused_in_a_sentence(tmp_path: Path, kind: Any) -> None:
    place = tmp_path / "x.json"
    run = SynthesisRun("s", "g", "missing", 0, (), 0, 0)
    run.save(place)
    saved = json.loads(place.read_text())
    bad: list[Any] = [[], [1], {}, {"coverage": []}, {"schema": 3}, {**saved, "extra": 1}]
    bad += [saved] if kind is CoverageReport else [{k: v for k, v in saved.items() if k != "pool"}]
    for content in bad:
        place.write_text(json.dumps(content))
        with pytest.raises(TransferError, match=r"x\.json is no (coverage report|synthesis)"):
            kind.load(place)


def test_synthesis_round_trip_and_counts(tmp_path: Path) -> None:
    kinds = ["kept", "weak", "weak", "duplicate", "kept"]
    one = SynthesisRun(
        "s", "g", "missing", 2, tuple(candidate(verdict=v, attempt=i) for i, v in enumerate(kinds)), 4, 1
    )
    one.save(tmp_path / "run.json")
    assert SynthesisRun.load(tmp_path / "run.json") == one
    assert one.rejected() == {"duplicate": 1, "weak": 2} and len(one.kept) == 2
    assert one.summary()["missing_hit_rate"] == 0.25
    assert dataclasses.replace(one, n_missing=0).summary()["missing_hit_rate"] is None


@pytest.mark.parametrize("field", ["generator", "prompt_hash", "verdict"])
def test_synthesis_refuses_lost_lineage(field: str) -> None:
    with pytest.raises(TransferError, match="lineage"):
        SynthesisRun("s", "g", "missing", 1, (candidate(**{field: ""}),), 1, 0)


def test_runs_and_results_refuse() -> None:
    run: dict[str, Any] = {
        "base": "b",
        "base_hash": "h",
        "recipe": "lora",
        "data_hash": "d",
        "n_examples": 1,
        "n_dropped": 0,
        "n_trainable": 1,
        "n_tokens": 1,
        "seed": 0,
        "curve": (1.0,),
        "seconds": 1.0,
    }
    FinetuneRun(**run)
    for field in ("n_tokens", "n_trainable"):
        with pytest.raises(TransferError, match="nothing to train"):
            FinetuneRun(**{**run, field: 0})
    EvalResult("intent", "auprc", 0.5, 0.1, 10, 0, "file")
    with pytest.raises(TransferError, match="2 evaluation examples"):
        EvalResult("intent", "auprc", 0.5, 0.1, 10, 2, "file")
    cell: dict[str, Any] = {
        "source": "s",
        "generator": "g",
        "target": "t",
        "task": "intent",
        "arm": "own",
        "recipe": "lora",
        "metric": "auprc",
        "values": (0.5, 0.6),
        "seeds": (0, 1),
        "mean": 0.55,
        "ci_low": 0.5,
        "ci_high": 0.6,
        "n_train": 10,
    }
    assert TransferResult(**cell).summary()["n_seeds"] == 2
    TransferResult(**cell, control="seed", delta=0.1)
    with pytest.raises(TransferError, match="without a control"):
        TransferResult(**cell, delta=0.1)

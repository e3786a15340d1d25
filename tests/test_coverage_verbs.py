"""``transfer cover rank|curve|show`` as typed: stores, files, exit codes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from tests.benchmarks.coverage import synthetic_store
from transfer.__main__ import main
from transfer.core.files import read_json, save_arrays, write_json
from transfer.core.space import FeatureSet
from transfer.core.store import ActivationStore
from transfer.cover.delta import DeltaRule, thresholds
from transfer.cover.rank import ground_of, rank
from transfer.coverage import coverage

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("TRANSFER_RUNS", str(tmp_path / "runs"))

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Anchor, data at hand and a pool: parts of one store, so that none repeats another."""
    made = {}
    monkeypatch.setattr("tests.benchmarks.coverage.SHARD", 300)
    whole = synthetic_store(tmp_path / "whole", 300, 500, 15)
    for name, part in {"anchor": slice(0, 80), "data": slice(80, 100), "pool": slice(100, 300)}.items():
        docs = whole.docs[part]
        arrays = {"indptr": docs.indptr.astype(np.int64), "indices": docs.indices, "values": docs.data}
        save_arrays(tmp_path / name / "docs-00000.safetensors", arrays)
        meta = read_json(whole.path / "meta.json")
        write_json(tmp_path / name / "meta.json", {**meta, "doc_ids": meta["doc_ids"][part], "shards": 1})
        made[name] = tmp_path / name
    return made


def test_ranking_stores(transfer: Run, stores: dict[str, Path], tmp_path: Path) -> None:
    args = ["cover", "rank", stores["pool"], "--anchor", stores["anchor"], "--data", stores["data"]]
    code, out, err = transfer(*args, "--budget", 15, "--json", "--out", tmp_path / "best.csv")
    assert code == 0, err
    found = json.loads(out)
    rows = found["ranks"]
    assert found["taken"] == len(rows) == 15 and not found["exhausted"] and found["candidates"] == 200
    assert [r["rank"] for r in rows] == list(range(1, 16)) and len({r["id"] for r in rows}) == 15
    with (tmp_path / "best.csv").open() as file:
        saved = list(csv.DictReader(file))
    assert [r["id"] for r in saved] == [r["id"] for r in rows] and float(saved[-1]["coverage"]) == rows[-1]["coverage"]
    # What it says is what coverage finds once the documents are taken.
    anchor, data, pool = (ActivationStore.load(stores[name]) for name in ("anchor", "data", "pool"))
    delta = thresholds(anchor.docs)
    relevant = FeatureSet(anchor.space, np.arange(500), "all")
    before = coverage(anchor.space, anchor.docs, data.docs, relevant, delta)
    both = sp.csr_matrix(sp.vstack([data.docs, pool.docs[pool.rows([r["id"] for r in rows])]]))
    after = coverage(anchor.space, anchor.docs, both, relevant, delta)
    assert found["coverage_before"] == pytest.approx(before.fac) and found["coverage_after"] == pytest.approx(after.fac)
    assert sum(r["gain"] for r in rows) == len(after.covered) - len(before.covered)
    code, out, _ = transfer(*args, "--budget", 15, "--top", 3, "--out", tmp_path / "best.jsonl")
    assert code == 0 and "and 12 more" in out and rows[2]["id"] in out
    lines = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert lines == rows


def test_ranking_by_cost_and_until_nothing_is_left(transfer: Run, stores: dict[str, Path]) -> None:
    args = ["cover", "rank", stores["pool"], "--anchor", stores["anchor"], "--delta", "constant:0", "--json"]
    code, out, err = transfer(*args, "--budget", 500)
    assert code == 0, err
    found = json.loads(out)
    assert found["exhausted"] and found["taken"] < 200 and found["share_of_possible"] == pytest.approx(1)
    other = json.loads(transfer(*args, "--budget", 5, "--weights", "kl", "--saturate", "sqrt")[1])
    assert other["weights"] == "kl" and other["saturation"] == "sqrt" and other["delta_rule"] == "constant:0"
    assert [r["id"] for r in other["ranks"]] != [r["id"] for r in found["ranks"][:5]]


def test_documents_can_be_left_out(stores: dict[str, Path]) -> None:
    anchor, pool = (ActivationStore.load(stores[name]) for name in ("anchor", "pool"))
    ground = ground_of(anchor, DeltaRule())
    first = rank(pool, ground, 1)[0][0]["id"]
    assert rank(pool, ground, 1, without=[first])[0][0]["id"] != first


def test_curves_of_stores(transfer: Run, stores: dict[str, Path], tmp_path: Path) -> None:
    args = [
        "cover",
        "curve",
        stores["data"],
        "--anchor",
        stores["anchor"],
        "--rule",
        "constant:0",
        "--rule",
        "scale:0.5",
    ]
    code, out, err = transfer(*args, "--json", "--out", tmp_path / "points.json", "--orders", 5)
    assert code == 0, err
    rows = json.loads(out)
    assert rows == json.loads((tmp_path / "points.json").read_text())
    assert [r["delta_rule"] for r in rows if r["curve"] == "delta"] == ["constant:0", "scale:0.5"]
    sizes = [r for r in rows if r["curve"] == "size"]
    assert sizes[-1]["n_docs"] == 20 and sizes[0]["fac"] < sizes[-1]["fac"]
    code, out, _ = transfer(*args)
    assert code == 0 and "20 documents" in out and "scale:0.5" in out


def test_showing_a_report(transfer: Run, stores: dict[str, Path], tmp_path: Path) -> None:
    anchor, data = (ActivationStore.load(stores[name]) for name in ("anchor", "data"))
    relevant = FeatureSet(anchor.space, np.arange(500), "all")
    report = coverage(
        anchor.space, anchor.docs, data.docs, relevant, thresholds(anchor.docs), delta_rule="quantile:0.5"
    )
    report.save(tmp_path / "stage" / "seed.json")
    code, out, err = transfer("cover", "show", tmp_path / "stage")
    assert code == 0, err
    assert f"{report.fac:.3f}" in out and "kl_frequency" in out and "dearest features" in out
    shown = json.loads(transfer("cover", "show", tmp_path / "stage" / "seed.json", "--json")[1])
    assert shown[0]["fac"] == report.fac and shown[0]["costs"][0]["feature"] == report.costs[0]["feature"]
    found = rank(data, ground_of(anchor, DeltaRule(), relevant=report.relevant), 3)[0]
    code, out, _ = transfer("cover", "rank", stores["data"], "--anchor", stores["anchor"], "--report",
                            tmp_path / "stage" / "seed.json", "--budget", 3, "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["ranks"] == found


def test_showing_a_run_that_ended_with_its_cover_stage(transfer: Run, stores: dict[str, Path], tmp_path: Path) -> None:
    anchor, data = (ActivationStore.load(stores[name]) for name in ("anchor", "data"))
    relevant = FeatureSet(anchor.space, np.arange(500), "all")
    run, kept = tmp_path / "runs" / "mine", tmp_path / "runs" / ".store" / "cover"
    for key, rule in (("old", DeltaRule()), ("new", DeltaRule("constant", 0))):
        found = coverage(anchor.space, anchor.docs, data.docs, relevant, thresholds(anchor.docs, rule))
        found.save(kept / key / "seed.json")
        write_json(run / "stages.json", {"harvest x": "harvest/1", "cover x": f"cover/{key}", "cover gone": "cover/2"})
        # As after `transfer cover`: no results.json yet, or one of another coverage.
        code, out, err = transfer("cover", "show", run, "--json")
        assert code == 0, err
        assert [row["fac"] for row in json.loads(out)] == [found.fac]
        more = [*json.loads(out), {**json.loads(out)[0], "dataset": "seed + own"}]
        write_json(run / "results.json", {"coverage": more})
        assert len(json.loads(transfer("cover", "show", run, "--json")[1])) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rank", "{pool}"], "Nothing says what to cover"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--out", "x.txt"], ".csv or .jsonl"),
        (["rank", "{pool}", "--anchor", "nowhere"], "nowhere"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--saturate", "cube"], "cube"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--weights", "random"], "uniform or kl"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--delta", "constant:99"], "no relevant feature"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--experiment", "demo"], "already says"),
        (["rank", "x.jsonl", "--experiment", "demo", "--delta", "nonsense"], "--delta does nothing with --experiment"),
        (["rank", "x.jsonl", "--experiment", "demo", "--always-on", "0.1", "--data", "x"], "--data and --always-on do"),
        (["rank", "{pool}", "--experiment", "demo", "--text-column", "x"], "--text-column does nothing with a store"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--model", "x"], "--model does nothing without --experiment"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--set", "seed=1"], "--set does nothing without --experiment"),
        (["rank", "{pool}", "--anchor", "{anchor}", "--text-column", "x"], "--text-column does nothing without"),
        (["curve", "demo", "--anchor", "{anchor}", "--report", "x"], "--anchor and --report do nothing with an exp"),
        (["curve", "demo", "--delta", "nonsense"], "--delta does nothing with an experiment"),
        (["curve", "demo", "--rule", "constant:3", "--always-on", "0.01"], "--rule and --always-on do nothing"),
        (["curve", "demo", "--orders", "3", "--seed", "0"], "--orders and --seed do nothing"),
        (["curve", "{pool}", "--anchor", "{anchor}", "--set", "seed=1"], "--set does nothing with a store"),
        (["curve", "demo", "--set", "judge.rubric=survival"], "judge.rubric does nothing here"),
        (["demo", "--set", "judge.rubric=survival"], "judge.rubric does nothing here"),
        (["curve", "{pool}"], "Nothing says what to cover"),
        (["show", "nowhere"], "no coverage in nowhere"),
        (["curv", "{pool}"], "No such command"),
    ],
)
def test_bad_input_is_one_sentence(transfer: Run, stores: dict[str, Path], args: list[str], words: str) -> None:
    code, _, err = transfer("cover", *(a.format(**stores) for a in args))
    assert code == 2 and words in err and "Traceback" not in err


def test_another_space_is_refused(transfer: Run, stores: dict[str, Path], tmp_path: Path) -> None:
    other = synthetic_store(tmp_path / "other", 10, 600, 15).path
    code, _, err = transfer("cover", "rank", other, "--anchor", stores["anchor"])
    assert code == 2 and "n_features is" in err


def test_ranking_needs_a_model_of_the_experiment(transfer: Run) -> None:
    code, _, err = transfer("cover", "rank", "x.jsonl", "--experiment", "demo", "--model", "gpt")
    assert code == 2 and "--model llama or mistral or qwen" in err

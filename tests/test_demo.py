"""The demo end to end, smaller: its results, its report, and that a killed run ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from transfer.core.experiment import load_experiment
from transfer.core.files import load_arrays, load_csr
from transfer.core.outcomes import CoverageReport, SynthesisRun
from transfer.core.store import ActivationStore
from transfer.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "synth.features=5",
    "synth.explore=2",
    "synth.contrast=2",
    "synth.strengths=[0.0,1.0]",
    "synth.max_new_tokens=24",
    "synth.budget=16",
    "align.n_null=5",
    "tune.recipes=[head]",  # the brief LoRA of the demo has its own tests; 180 cells of it take minutes here
    "processes=1",
]
SHAPE = {
    "alignments": {
        "source", "target", "method", "n_features", "n_matches",
        "heldout_corr_median", "null_corr_median", "q_value_max",
    },
    "coverage": {"model", "dataset", "fac", "n_anchor", "n_covered", "n_missing"},
    "synthesis": {"source", "generator", "n_requested", "n_kept", "missing_hit_rate", "rejected"},
    "transfer": {"source", "target", "task", "arm", "metric", "mean", "ci_low", "ci_high", "n_seeds"},
}  # fmt: skip


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "transfer", "run", "demo"]
    for setting in SMALL:
        command += ["--set", setting]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFER_RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    finish(start(folder))
    return folder


def test_results_have_the_documented_shape(runs: Path) -> None:
    results = json.loads((runs / "demo" / "results.json").read_text("utf8"))
    for name, keys in SHAPE.items():
        assert results[name], name
        for row in results[name]:
            assert keys <= set(row), (name, keys - set(row))
    assert {r["arm"] for r in results["transfer"]} == {"seed_only", "own", "mapped", "random", "shuffled", "full"}
    assert {r["target"] for r in results["transfer"]} == {"zoo:llama", "zoo:mistral", "zoo:qwen"}
    assert all(r["n_seeds"] >= 3 and r["ci_low"] <= r["mean"] <= r["ci_high"] for r in results["transfer"])
    assert len({(a["source"], a["target"]) for a in results["alignments"]}) == 6
    assert all(0 <= c["fac"] <= 1 for c in results["coverage"])


def test_families_are_recounted_from_the_stored_matches(runs: Path) -> None:
    """Triangles of accepted matches, by plain loops over the arrays that the align stage left."""
    results = json.loads((runs / "demo" / "results.json").read_text("utf8"))
    places = json.loads((runs / "demo" / "stages.json").read_text("utf8"))
    settings = load_experiment("demo").align
    pairs: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for names in (("llama", "mistral"), ("llama", "qwen"), ("mistral", "qwen")):
        (file,) = (runs / ".store" / places["align {}-{}".format(*names)] / settings.use).glob("*.safetensors")
        found = load_arrays(file)
        kept = found["match_q_value"] <= settings.q_value
        pairs[names] = set(zip(*(found[f"match_{s}"][kept].tolist() for s in ("source", "target")), strict=True))
    triangles = {
        (i, j, k)
        for i, j in pairs["llama", "mistral"]
        for a, k in pairs["llama", "qwen"]
        if a == i and (j, k) in pairs["mistral", "qwen"]
    }
    assert results["family_counts"][0]["n_universal"] == len(triangles) > 20
    for place, row in enumerate(results["families"]):
        assert row["universal"] == pytest.approx(len({t[place] for t in triangles}) / row["n_testable"])
        assert row["universal"] + row["shared"] + row["private"] == pytest.approx(1)
    assert {c["n_agree"] for c in results["compositions"]} == {len(triangles)}  # matches are one-to-one
    details = json.loads((runs / "demo" / "details.json").read_text("utf8"))
    assert all(tuple(m["feature"] for m in f["members"]) in triangles for f in details["families"])


def test_written_arms_have_one_budget(runs: Path) -> None:
    results = json.loads((runs / "demo" / "results.json").read_text("utf8"))
    for target in ("zoo:llama", "zoo:mistral", "zoo:qwen"):
        written = {
            r["n_train"]
            for r in results["transfer"]
            if r["target"] == target and r["arm"] not in ("seed_only", "full") and r["metric"] == "auprc"
        }
        assert len(written) == 1, (target, written)


def test_real_matches_beat_the_null(runs: Path) -> None:
    results = json.loads((runs / "demo" / "results.json").read_text("utf8"))
    for row in results["alignments"]:
        if row["method"] == "activation":
            assert row["heldout_corr_median"] > row["null_corr_median"] + 0.1


def test_coverage_and_hits_are_recounted_from_the_stored_codes(runs: Path) -> None:
    """By plain arithmetic on what the stages left: seed texts and chosen texts, never anchor or unchosen ones."""
    results = json.loads((runs / "demo" / "results.json").read_text("utf8"))
    stages = json.loads((runs / "demo" / "stages.json").read_text("utf8"))
    at = {name: runs / ".store" / place for name, place in stages.items()}
    seed_ids = [t.id for t in Pipeline(load_experiment("demo"), runs, []).corpora["seed"]]
    sets = json.loads((at["datasets"] / "datasets.json").read_text("utf8"))
    models = ("llama", "mistral", "qwen")
    stores = {m: ActivationStore.load(at[f"harvest {m}"] / "store") for m in models}
    before = {m: CoverageReport.load(at[f"cover {m}"] / "seed.json") for m in models}
    delta = {m: load_arrays(at[f"cover {m}"] / "delta.safetensors")["delta"] for m in models}
    written = {m: SynthesisRun.load(at[f"synth {m}"] / "synthesis.json") for m in models}
    checked = 0
    for row in (r for r in results["coverage"] if "arm" in r):
        model = row["model"].removeprefix("zoo:")
        (chosen,) = (s for s in sets if (s["target"], s["arm"], s["source"]) == (model, row["arm"], row["writer"]))
        texts = {(w["text"], w["feature"]) for w in chosen["written"]}
        codes = load_csr(at[f"synth {row['writer']}"] / f"codes-{model}.safetensors")
        mine = [i for i, c in enumerate(written[row["writer"]].kept) if (c.text, c.feature) in texts]
        assert len(mine) == len(texts) > 0
        seed = stores[model].docs[stores[model].rows(seed_ids)]
        top = np.maximum(seed.max(axis=0).toarray(), codes[mine].max(axis=0).toarray())[0]
        missing = before[model].missing.features
        assert row["missing_hit_rate"] == pytest.approx(np.mean(top[missing] > delta[model][missing]))
        assert row["n_missing"] == row["n_anchor"] - row["n_covered"]
        assert row["n_covered"] == before[model].summary()["n_covered"] + np.sum(top[missing] > delta[model][missing])
        checked += 1
    assert checked >= 12
    for row in (r for r in results["synthesis"] if r["pool"] == "own"):
        writer = row["writer"]
        plan = json.loads((at[f"synth {writer}"] / "key.json").read_text("utf8"))["inputs"]["plan"]["own"]
        codes = load_csr(at[f"synth {writer}"] / f"codes-{writer}.safetensors")
        mine = [i for i, c in enumerate(written[writer].kept) if c.feature in set(plan)]
        missing = before[writer].missing.features
        hit = codes[mine].max(axis=0).toarray()[0][missing] > delta[writer][missing]
        assert row["n_hit"] == hit.sum() and row["n_kept"] == len(mine)
        assert row["missing_hit_rate"] == pytest.approx(hit.mean())


def test_report_is_self_contained(runs: Path) -> None:
    html = (runs / "demo" / "report.html").read_text("utf8")
    assert "zoo:llama" in html and "<svg" in html
    assert (
        'src="http' not in html
        and "url(http" not in html
        and "<link" not in html.lower().replace('<link rel="icon" href="data:', "")
    )


def test_a_killed_run_ends_with_the_same_results(runs: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 900
    events = tmp_path / "demo" / "events.jsonl"
    # Kill inside the synthesis, after finished stages and before others.
    while time.monotonic() < deadline and process.poll() is None:
        if events.exists() and '"synth llama", "event": "started"' in events.read_text():
            break
        time.sleep(0.2)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "demo" / "results.json").exists()
    output = finish(start(tmp_path))
    assert "reused" in output
    assert (tmp_path / "demo" / "results.json").read_bytes() == (runs / "demo" / "results.json").read_bytes()

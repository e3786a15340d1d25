"""The stage that fine-tunes: a crashed cell is reported and the rest goes on, doses stay out of the grid."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reports.load import MAIN
from tests.test_arms import space
from tests.test_matrix import HASHES, TASK
from transfer import matrix
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.files import write_json
from transfer.core.texts import Corpus, Text
from transfer.grid import stage as tune_stage
from transfer.grid.gains import load_cells
from transfer.pipeline import Pipeline

EXPERIMENT = load_experiment("demo", ["tune.recipes=[head]", "tune.dose=[2]"])


def corpus(name: str, n: int) -> Corpus:
    words = ("bread", "lock", "cake", "wire")
    return Corpus(
        name, tuple(Text(f"{name}{i}", f"{words[i % 4]} {i}", ("benign", "harmful")[i % 2]) for i in range(n))
    )


CORPORA = {"anchor": corpus("anchor", 12), "seed": corpus("seed", 4), "evaluation": corpus("evaluation", 16)}


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training sets of one target: the seed, part of it, and the seed with texts that make a cell crash."""
    monkeypatch.setattr("transfer.tasks.grid_task", lambda tune, positive, **options: TASK)
    monkeypatch.setitem(HASHES, "zoo:s", space("s").model_hash)
    seed = [[t.text, t.label] for t in CORPORA["seed"]]
    plain: dict[str, Any] = {"source": "", "generator": "", "writer": "", "target": "s", "arm": "seed_only"}
    crash = {"source": "s", "generator": "s", "writer": "s", "arm": "own"}
    records = [
        {**plain, "examples": seed},
        {**plain, "examples": seed[:2], "dose": 2, "coverage": {"fac": 0.5, "n_missing": 40}},
        {**plain, **crash, "examples": [*seed, ["raise", "benign"]]},
    ]
    write_json(tmp_path / "sets" / "datasets.json", records)
    return tmp_path / "sets"


def adapters() -> Any:
    return {"s": SimpleNamespace(space=space("s"))}


def test_a_crashed_cell_leaves_the_others_and_is_named(datasets: Path, tmp_path: Path) -> None:
    with pytest.raises(matrix.FailedCells, match="3 of 9 cells failed") as caught:
        tune_stage.tune(adapters(), datasets, CORPORA, tmp_path / "out", EXPERIMENT)
    assert [c.arm for c in load_cells(tmp_path / "out" / "grid.json")] == ["seed_only"] * 3
    assert {c.run.n_examples for c in load_cells(tmp_path / "out" / "dose.json")} == {2}
    assert all("ValueError: asked for" in problem for problem in caught.value.failures.values())
    assert all("zoo:s" in cell and "own" in cell for cell in caught.value.failures)


def test_the_grid_goes_on_to_its_numbers_and_then_says_what_failed(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(load_experiment("demo"), tmp_path / "runs", [])
    known = {"spaces": {}, "datasets": datasets, "corpora": CORPORA, "adapters": adapters(), "pool": None}
    for name, value in known.items():
        monkeypatch.setitem(pipeline.__dict__, name, value)
    monkeypatch.setattr(Pipeline, "_space_inputs", lambda self, *names: {})
    folder = pipeline.cells
    assert pipeline.failed and len(pipeline.failed.failures) == 6  # two recipes, three seeds
    assert not (folder / "DONE").exists(), "a stage with failed cells must not count as finished"
    kept = {p.name for p in (folder / "cells").iterdir()}
    assert len(load_cells(folder / "grid.json")) == 6

    again = Pipeline(load_experiment("demo"), tmp_path / "runs", [])
    for name, value in known.items():
        monkeypatch.setitem(again.__dict__, name, value)
    monkeypatch.setattr(type(TASK), "fit", mended(type(TASK).fit))
    assert again.cells == folder and not again.failed and (folder / "DONE").exists()
    assert len(load_cells(folder / "grid.json")) == 12 and kept < {p.name for p in (folder / "cells").iterdir()}


def mended(fit: Any) -> Any:
    """The crash repaired."""

    def fine(self: Any, base: Any, examples: Any, recipe: Any, seed: int) -> Any:
        return fit(self, base, [(text.replace("raise", "rise"), label) for text, label in examples], recipe, seed)

    return fine


def test_a_run_with_failed_cells_writes_its_report_before_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(load_experiment("demo"), tmp_path, [])
    monkeypatch.setattr(Pipeline, "check", lambda self, until: None)
    monkeypatch.setattr("transfer.pipeline.numbers_of", lambda pipeline, until: dict.fromkeys(MAIN, []))
    monkeypatch.setattr(Pipeline, "manifest", lambda self: {})
    monkeypatch.setattr("transfer.pipeline.details", lambda pipeline: {})
    monkeypatch.setitem(pipeline.__dict__, "pool", None)
    pipeline.failed = matrix.FailedCells("1 of 9 cells failed.", "Run again.", [], {"cell x": "why"})
    with pytest.raises(matrix.FailedCells, match="1 of 9 cells failed"):
        pipeline.run()
    assert (tmp_path / "demo" / "report.html").exists() and (tmp_path / "demo" / "results.json").exists()


@pytest.mark.parametrize("task", ["reward", "steering", "instruction"])
def test_tasks_without_a_label_to_detect_are_refused_by_the_grid(tmp_path: Path, task: str) -> None:
    with pytest.raises(TransferError, match=f"Task '{task}' has no class to detect"):
        Pipeline(load_experiment("demo", [f"tune.task={task}"]), tmp_path, []).check("tune")

"""Rounds stop when they should, go on where they were killed, and never stop by the texts that are evaluated on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.files import read_json
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.rundir import RunDir
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.texts import Corpus, Text
from transfer.synth import rounds_stage
from transfer.synth.rounds import Rounds, RoundSettings, run_rounds
from transfer.synth.rounds_stage import model_rounds, validation_half
from transfer.verbs.synth import synth

N = 6
SPACE = FeatureSpace("zoo:llama", "m", 3, "zoo:llama/sae", "s", N, 4, "topk-2", 5)


class Listing:
    """A text fires the features whose numbers it names."""

    space = SPACE

    def encode_texts(self, texts: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        docs = sp.csr_matrix(
            np.array([[float(str(i) in t.split()) for i in range(N)] for t in texts], dtype=np.float32)
        )
        return docs, sp.csr_matrix(docs, dtype=np.int32)


def kept(feature: int, text: str, verdict: str = "kept") -> Candidate:
    return Candidate(
        source=SPACE.id,
        generator="g",
        feature=feature,
        step=1,
        attempt=0,
        text=text,
        label="a",
        score=1.0,
        delta=0.5,
        seed=0,
        prompt_hash="h",
        verdict=verdict,
    )


class Writer:
    """In round r, writes for the features planned for it."""

    def __init__(self, plan: dict[int, list[int]], extra: int = 1) -> None:
        self.plan, self.extra = plan, extra
        self.calls: list[tuple[list[int], list[str], int]] = []

    def __call__(self, missing: FeatureSet, added: list[str], number: int) -> SynthesisRun:
        self.calls.append((missing.features.tolist(), added, number))
        made = [kept(i, f"round {number} names {i} once") for i in self.plan.get(number, []) if i in missing.features]
        made += [kept(0, f"nothing {j}", "below_threshold") for j in range(self.extra)]
        return SynthesisRun(SPACE.id, "g", "missing", len(missing), tuple(made), len(missing), 0)


def go(folder: Path, write: Any, settings: RoundSettings | None = None, **kwargs: Any) -> Rounds:
    anchor = sp.csr_matrix(np.eye(N, dtype=np.float32))
    seed = sp.csr_matrix(np.eye(1, N, dtype=np.float32))
    relevant = FeatureSet(SPACE, np.arange(N), "all", labels=("a",) * N)
    delta = np.full(N, 0.5, dtype=np.float32)
    run = RunDir(folder, "mine")
    return run_rounds(Listing(), anchor, seed, relevant, delta, write, run, {"test": 1}, settings=settings, **kwargs)


def test_each_round_asks_for_what_is_still_missing(tmp_path: Path) -> None:
    write = Writer({1: [1, 2], 2: [3, 4, 5]})
    found = go(tmp_path, write)
    assert [c[0] for c in write.calls] == [[1, 2, 3, 4, 5], [3, 4, 5]]
    assert write.calls[1][1] == ["round 1 names 1 once", "round 1 names 2 once"]
    assert found.stopped == "covered" and [r.gain for r in found.rounds] == pytest.approx([2 / 6, 3 / 6])
    assert found.fac_start == pytest.approx(1 / 6) and found.summary()["fac_end"] == 1
    assert {c.feature for c in found.added} == {1, 2, 3, 4, 5}
    assert sum(r.n_candidates for r in found.rounds) == 7 and found.summary()["n_added"] == 5


def test_all_rounds_together_are_one_synthesis_of_what_was_added(tmp_path: Path) -> None:
    class Twice(Writer):
        def __call__(self, missing: FeatureSet, added: list[str], number: int) -> SynthesisRun:
            run = super().__call__(missing, added, number)
            more = (kept(missing.features[0], f"round {number} says {missing.features[0]} again"),)
            return dataclasses.replace(run, candidates=run.candidates + more)

    found = go(tmp_path, Twice({1: [1, 2], 2: [3, 4]}), RoundSettings(rounds=2, per_feature=1))
    written = found.written
    assert written and written.kept == list(found.added) and written.pool == "rounds"
    assert written.rejected() == {"below_threshold": 2, "surplus": 2}
    assert (written.n_missing, written.n_hit, written.n_hit_free, written.n_hit_opened) == (5, 4, 4, 0)
    assert written.info["candidates_of_round"] == [4, 4] and found.summary()["folders"] == list(found.folders)


def test_always_on_is_that_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="none of the 0 relevant features"):  # each fires on a sixth of the anchor
        go(tmp_path, Writer({}), always_on=0.1)


def test_rounds_stop_when_gain_stalls_for_as_long_as_patience(tmp_path: Path) -> None:
    stalled = go(tmp_path / "a", Writer({1: [1], 4: [2]}), RoundSettings(rounds=9, patience=2))
    assert stalled.stopped == "stalled" and len(stalled.rounds) == 3
    patient = go(tmp_path / "b", Writer({1: [1], 4: [2]}), RoundSettings(rounds=5, patience=3))
    assert patient.stopped == "rounds" and len(patient.rounds) == 5
    picky = go(tmp_path / "c", Writer({1: [1], 2: [2]}), RoundSettings(patience=1, least_gain=0.2))
    assert picky.stopped == "stalled" and len(picky.rounds) == 1


def test_rounds_stop_at_the_budget(tmp_path: Path) -> None:
    found = go(tmp_path, Writer({1: [1], 2: [2], 3: [3]}, extra=4), RoundSettings(budget=6, patience=9))
    assert found.stopped == "budget" and [r.n_candidates for r in found.rounds] == [5, 5]


def test_a_score_that_rises_keeps_rounds_going(tmp_path: Path) -> None:
    seen: list[int] = []

    def score(added: Any, folder: Path) -> float:
        seen.append(len(added))
        return {0: 0.5, 1: 0.7}.get(len(added), 0.7)

    found = go(tmp_path, Writer({1: [1]}), RoundSettings(rounds=9, patience=2), score=score)
    assert found.stopped == "stalled" and len(found.rounds) == 3 and seen == [0, 1, 1, 1]
    assert found.score_start == 0.5 and [r.score for r in found.rounds] == [0.7, 0.7, 0.7]


def test_a_killed_run_goes_on_behind_the_last_round(tmp_path: Path) -> None:
    plan = {1: [1], 2: [2], 3: [3, 4, 5]}
    whole = go(tmp_path / "whole", Writer(plan))

    class Killed(Writer):
        def __call__(self, missing: FeatureSet, added: list[str], number: int) -> SynthesisRun:
            if number == 3:
                raise KeyboardInterrupt
            return super().__call__(missing, added, number)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", Killed(plan))
    again = Writer(plan)
    found = go(tmp_path / "killed", again)
    assert [c[2] for c in again.calls] == [3]
    assert found.rounds == whole.rounds and found.added == whole.added
    last = Writer(plan)
    assert go(tmp_path / "killed", last).rounds == whole.rounds and not last.calls


def test_bad_settings_and_foreign_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="must be 1 or more"):
        RoundSettings(patience=0)

    def foreign(missing: FeatureSet, added: list[str], number: int) -> SynthesisRun:
        return SynthesisRun("other", "g", "missing", 1, (), 1, 0)

    with pytest.raises(TransferError, match="Round 1 was written for other"):
        go(tmp_path, foreign)


def test_rounds_stop_by_one_half_of_the_evaluation_texts() -> None:
    corpus = Corpus("evaluation", tuple(Text(str(i), f"text {i}", "ab"[i % 2]) for i in range(400)))
    half = validation_half(corpus)
    assert 150 < len(half) < 250 and half.texts == validation_half(corpus).texts


class Section:
    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values


def test_an_unknown_model_and_target_rules_are_refused() -> None:
    experiment = Section(models={"llama": 1}, synth=Section(require="both", allow_harmful=False))
    pipeline: Any = Section(experiment=experiment)
    with pytest.raises(TransferError, match="no model 'qwen'"):
        model_rounds(pipeline, "qwen", RoundSettings())
    with pytest.raises(TransferError, match="no target space"):
        model_rounds(pipeline, "llama", RoundSettings())


def test_rounds_of_an_experiment_cover_as_its_cover_stage_and_leave_their_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment("demo", ["cover.always_on=0.9"])
    texts = Corpus("anchor", (Text("0", "a text", "a"), Text("1", "another", "b")))
    adapter = Section(dictionary=Section(directions=lambda: np.eye(N, 4)), space=SPACE)
    pipeline: Any = Section(
        experiment=experiment,
        dir=RunDir(tmp_path, "mine"),
        corpora={"anchor": texts, "seed": texts},
        adapters={"llama": adapter},
        stores={"llama": None},
        coverage={"llama": (Section(relevant=None), tmp_path)},
        pool=None,
    )
    monkeypatch.setattr(rounds_stage, "check_corpora", lambda *a, **k: None)
    monkeypatch.setattr(rounds_stage, "make_generator", lambda *a, account: None)
    monkeypatch.setattr(rounds_stage.stages, "load_delta", lambda folder: np.ones(N, dtype=np.float32))
    monkeypatch.setattr(rounds_stage.stages, "split_docs", lambda store, corpus: None)
    asked: dict[str, Any] = {}

    def instead(*args: Any, **kwargs: Any) -> Rounds:
        asked.update(kwargs)
        return go(tmp_path / "x", Writer({1: [1, 2]}), kwargs["settings"])

    monkeypatch.setattr(rounds_stage, "run_rounds", instead)
    found = model_rounds(pipeline, "llama", RoundSettings(rounds=1))
    assert asked["always_on"] == 0.9
    place = tmp_path / "mine" / "rounds-llama"
    assert found.summary()["place"] == str(place) and read_json(place / "rounds.json") == found.summary()
    command = ["export", str(place), "--out", str(tmp_path / "d"), "--licence", "mit", "--json"]
    pipeline.dir.event("rounds", "command", command="transfer synth rounds mine.yaml --model llama")
    result = CliRunner().invoke(synth, command)
    assert result.exit_code == 0 and json.loads(result.stdout)["n_kept"] == 2
    card = (tmp_path / "d" / "README.md").read_text("utf8")
    assert "| Source texts | bundled:requests |" in card and "`transfer synth rounds mine.yaml --model llama; " in card

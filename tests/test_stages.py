"""The stages hand the right texts to the right work: held-out stays held out, evaluation is never harvested."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligners.activation import ActivationAligner
from aligners.planted import planted_pair
from transfer import stages
from transfer.core.alignment import Alignment
from transfer.core.config import DataSection, HarvestSection
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.store import PairedActivations
from transfer.core.texts import Corpus, Text
from transfer.pipeline import Pipeline
from transfer.splits import load_corpora


def test_matches_are_scored_on_documents_that_no_fit_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted_pair(seed=0)
    fitted: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    fit = ActivationAligner.fit

    def watched_fit(self: ActivationAligner, source: Any, target: Any, *, pairs: PairedActivations) -> Any:
        fitted.append(np.unique(pairs.docs))
        return fit(self, source, target, pairs=pairs)

    from aligners import calibrate

    score = calibrate.score_matches

    def watched_score(alignment: Alignment, heldout: PairedActivations, **settings: Any) -> Alignment:
        scored.append(np.unique(heldout.docs))
        return score(alignment, heldout, **settings)

    monkeypatch.setattr(ActivationAligner, "fit", watched_fit)
    monkeypatch.setattr("aligners.calibrate.score_matches", watched_score)
    monkeypatch.setattr("aligners.tokens.pair_stores", lambda *stores, residuals: case.pairs)
    monkeypatch.setattr(stages, "views", lambda adapters: (case.source, case.target))
    experiment = load_experiment("demo", ["align.methods=[activation]", "align.use=activation", "align.n_null=2"])
    stages.align((None, None), (None, None), tmp_path, experiment)  # pyright: ignore[reportArgumentType]
    assert len(fitted) == 1 and len(scored) == 2  # the matches, and the best partners
    for docs in scored:
        assert not np.intersect1d(fitted[0], docs).size
        assert np.array_equal(np.union1d(fitted[0], docs), np.unique(case.pairs.docs))
    kept = Alignment.load(tmp_path / "activation")
    assert np.isfinite(kept.matches["heldout_corr"]).any() and (tmp_path / "activation-best").is_dir()


def test_evaluation_texts_are_never_harvested(tmp_path: Path) -> None:
    pipeline = Pipeline(load_experiment("demo"), tmp_path, [])
    harvested = {t.text for t in pipeline.reference}
    corpora = pipeline.corpora
    assert harvested == {t.text for s in ("anchor", "seed") for t in corpora[s]}
    assert len(corpora["evaluation"]) > 100 and not harvested & {t.text for t in corpora["evaluation"]}


def test_one_model_alone_is_covered_but_not_aligned_and_later_stages_stay_listed(tmp_path: Path) -> None:
    quick = ["models={llama: {model: zoo:llama, sae: zoo:llama/sae}}"]
    run = Pipeline(load_experiment("demo", quick), tmp_path, [])
    with pytest.raises(TransferError, match="needs two models"):
        run.run("align")
    (row,) = run.run("cover")["coverage"]
    assert row["n_missing"] > 0 and row["model"] == "zoo:llama"
    listed = tmp_path / "demo" / "stages.json"
    assert set(json.loads(listed.read_text())) == {"harvest llama", "cover llama"}
    Pipeline(load_experiment("demo", quick), tmp_path, []).run("harvest")
    assert set(json.loads(listed.read_text())) == {"harvest llama", "cover llama"}


def test_a_text_of_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "split": s} for i, s in enumerate(["anchor", "seed"] * 3)]
    rows += [{"text": "text 3", "label": "b", "split": "evaluation"}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TransferError, match="1 evaluation texts also stand in the anchor or seed data"):
        load_corpora(DataSection.model_validate({"source": str(path)}))
    path.write_text("\n".join(map(json.dumps, rows[:-1])))
    assert set(load_corpora(DataSection.model_validate({"source": str(path)}))[0]) == {"anchor", "seed"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.source={path}"], "Coverage needs seed texts"),
        (["models.llama.model=zoo:lama"], "zoo:lama"),
        (["data.positive=terrible"], "terrible"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, settings: list[str], words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "one", "label": "a", "split": "anchor"}))
    pipeline = Pipeline(load_experiment("demo", [s.format(path=path) for s in settings]), tmp_path / "runs", [])
    with pytest.raises(TransferError, match=words):
        pipeline.run()
    assert not (tmp_path / "runs").exists()


def test_a_harvest_begins_with_the_self_check(tmp_path: Path) -> None:
    class Wrong:
        def self_check(self) -> dict[str, Any]:
            raise TransferError("The SAE does not fit the model.")

    corpus = Corpus("c", (Text("a", "one two"),))
    with pytest.raises(TransferError, match="does not fit"):
        stages.harvest(Wrong(), corpus, tmp_path / "out", HarvestSection.model_validate({}))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_only_significant_matches_carry_features() -> None:
    case = planted_pair(seed=0)
    found = ActivationAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
    q = np.full(len(found), 0.01)
    q[:3] = [0.5, np.nan, 0.1]
    found = dataclasses.replace(found, matches={**found.matches, "q_value": q})
    kept = stages.significant(found, 0.1)
    assert len(kept) == len(found) - 2
    assert np.array_equal(kept.matches["source"], found.matches["source"][2:])

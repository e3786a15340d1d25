"""Rounds for one model of an experiment: what the stages of a pipeline know, handed to ``run_rounds``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from transfer import stages
from transfer.core.errors import TransferError
from transfer.core.files import write_json
from transfer.core.keys import text_key
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.rundir import write_text
from transfer.core.space import FeatureSet
from transfer.core.texts import Corpus
from transfer.evidence.spans import top_spans
from transfer.pipeline import Pipeline
from transfer.splits import check_corpora
from transfer.synth.rounds import Rounds, RoundSettings, run_rounds
from transfer.synth.safety import check_allowed
from transfer.synth.writing import make_generator, make_openings, make_options
from transfer.synthesis import steering_vectors, synthesise
from transfer.text.words import WordCounts


def model_rounds(pipeline: Pipeline, model: str, settings: RoundSettings, *, tune: bool = False) -> Rounds:
    """Rounds in which ``model`` writes for its own missing features.

    Every missing feature is written for under its own label, with ``synth.explore`` and ``synth.contrast``
    candidates. With ``tune`` the first recipe of the experiment is trained after every round, on the seed data and
    all that was added, once a seed; the score is the mean of the task's first metric on one half of the evaluation
    texts (by the hash of their ids). The rounds stop by it, so only the other half may still be evaluated on.

    Args:
        pipeline: The experiment.
        model: Its name there.
        settings: When to go on.
        tune: Whether the task score counts too.

    Raises:
        TransferError: For an unknown model, a requirement on target spaces, or harmful texts that are not allowed.
    """
    experiment = pipeline.experiment
    if model not in experiment.models:
        raise TransferError(f"The experiment has no model {model!r}.", f"It has {', '.join(experiment.models)}.")
    if experiment.synth.require != "source":
        raise TransferError("Rounds of one model have no target space.", "Set synth.require: source.")
    folded = check_allowed(experiment)
    check_corpora(pipeline.corpora, experiment.data.positive, evaluate=tune)
    adapter = pipeline.adapters[model]
    store, corpora = pipeline.stores[model], pipeline.corpora
    report, folder = pipeline.coverage[model]
    delta = stages.load_delta(folder)
    anchor, seed = corpora["anchor"], corpora["seed"]
    directions = adapter.dictionary.directions()
    steering = steering_vectors(directions, delta * np.linalg.norm(directions, axis=1))
    known = [t.text for t in (*anchor, *seed)]
    synth = experiment.synth
    background = WordCounts(t.text for t in anchor) if synth.generator == "chat" else None
    by_label = {x: anchor.where(f"{anchor.name}/{x}", lambda t, x=x: t.label == x) for x in {t.label for t in anchor}}

    with pipeline.pool or contextlib.nullcontext():
        generator = make_generator(synth, adapter, pipeline.pool, account=experiment.name)

        def write(missing: FeatureSet, added: list[str], number: int) -> SynthesisRun:
            spans = {
                i: top_spans(store, by_label.get(label, anchor), [i], k=2 * synth.examples)[i]
                for i, label in zip(missing.features.tolist(), missing.labels, strict=True)
            }
            asked = missing.subset(np.array([i for i in spans if spans[i]], dtype=np.int64), missing.why)
            both = synth.explore + synth.contrast
            return synthesise(
                adapter,
                generator,
                asked,
                {i: [s.text for s in spans[i]] for i in asked.features.tolist()},
                delta,
                missing=missing,
                anchor_texts=known + added,
                steering=steering,
                strengths=synth.strengths,
                n=both if synth.steps == 1 else synth.explore,
                m=0 if synth.steps == 1 else synth.contrast,
                few_shot=synth.examples,
                openings=make_openings(synth, spans),
                # Another round asks for the same features anew.
                seed=experiment.seed + 1000 * number,
                options=make_options(
                    synth,
                    adapter,
                    evaluation=corpora.get("evaluation", ()),
                    spans=spans,
                    background=background,
                ),
            )

        def score(added: Sequence[Candidate], out: Path) -> float:
            return _score(pipeline, model, added, out)

        inputs: dict[str, Any] = {
            "space": dataclasses.asdict(adapter.space),
            "model": model,
            "corpora": {name: corpus.hash for name, corpus in corpora.items()},
            "settings": {
                s: getattr(experiment, s).model_dump(mode="json")
                for s in ("harvest", "cover", "synth", *(["tune"] if tune else []))
            },
            "positive": experiment.data.positive,
            "seed": experiment.seed,
            "tune": tune,
        }
        found = run_rounds(
            adapter,
            stages.split_docs(store, anchor),
            stages.split_docs(store, seed),
            report.relevant,
            delta,
            write,
            pipeline.dir,
            inputs,
            always_on=experiment.cover.always_on,
            settings=settings,
            score=score if tune else None,
        )
    return _save(pipeline, model, found, folded)


def _save(pipeline: Pipeline, model: str, found: Rounds, folded: bool) -> Rounds:
    """All texts, the numbers and the settings in ``rounds-<model>`` of the run's folder, where export finds them."""
    place = pipeline.dir.path / f"rounds-{model}"
    found = dataclasses.replace(found, place=str(place))
    write_json(place / "rounds.json", found.summary())
    write_text(place / "experiment.yaml", yaml.safe_dump(pipeline.experiment.model_dump(mode="json"), sort_keys=False))
    (place / "synthesis.json").unlink(missing_ok=True)  # of an earlier run, where this one had nothing to write for
    if found.written:
        info = found.written.info | ({"folded": True} if folded else {})
        dataclasses.replace(found.written, info=info).save(place / "synthesis.json")
    return found


def validation_half(evaluation: Corpus) -> Corpus:
    """The half of the evaluation texts that decides when rounds stop."""
    return evaluation.where(f"{evaluation.name}/validation", lambda t: text_key(t.id) % 2 == 0)


def _score(pipeline: Pipeline, model: str, added: Sequence[Candidate], out: Path) -> float:
    """Mean of the task's first metric over the experiment's seeds."""
    from transfer.finetune import get_recipe
    from transfer.matrix import Cell, run_cells
    from transfer.tasks import get_task
    from transfer.tasks.intent import unseen_topics

    experiment, corpora = pipeline.experiment, pipeline.corpora
    evaluation, positive = validation_half(corpora["evaluation"]), experiment.data.positive
    task = get_task(experiment.tune.task, positive=positive, unseen=unseen_topics(corpora["seed"], evaluation))
    rows = [(t.text, t.label) for t in corpora["seed"]] + [(c.text, c.label) for c in added]
    adapter = pipeline.adapters[model]
    cells = [
        Cell(
            source=adapter.space.model if added else "",
            generator=adapter.space.model if added else "",
            target=adapter.space.model,
            arm="own" if added else "seed_only",
            recipe=get_recipe(experiment.tune.recipes[0]),
            seed=seed,
            examples=tuple((text, int(label == positive)) for text, label in rows),
        )
        for seed in experiment.tune.seeds
    ]
    hashes = {adapter.space.model: adapter.space.model_hash}
    found = run_cells(cells, evaluation, task, pool=pipeline.pool, out_dir=out / "cells", base_hashes=hashes)
    return float(np.mean([result.value(task.metrics[0]) for result in found]))

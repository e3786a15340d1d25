"""The stages in order; each is content-keyed, so the same command continues and a change redoes only what follows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from aligners.calibrate import shuffled
from models.adapter import Adapter
from models.headers import misfits, model_header, sae_header
from transfer import stages
from transfer.core.alignment import Alignment
from transfer.core.config import Experiment
from transfer.core.console import say
from transfer.core.env import machine, versions
from transfer.core.errors import TransferError
from transfer.core.files import file_hash, write_json
from transfer.core.outcomes import CoverageReport, SynthesisRun
from transfer.core.rundir import RunDir, write_text
from transfer.core.space import FeatureSpace
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.core.workers import Workers
from transfer.cover.delta import DeltaRule
from transfer.evidence.judging import judge_inputs
from transfer.finetune import get_recipe
from transfer.grid import arms, set_diversity
from transfer.grid import stage as tune_stage
from transfer.grid.details import details
from transfer.grid.gathered import STAGES, numbers_of
from transfer.matrix import FailedCells
from transfer.splits import check_corpora, load_corpora
from transfer.synth import stage as synth_stage
from transfer.synth.safety import check_allowed
from transfer.tasks import get_task, grid_task

LIBRARIES = ("models.language", "transfer.train.classifier", "peft", "transformers.trainer", "sklearn.metrics")
"""What worker processes write and train with."""


class Pipeline:
    """One experiment's way through the stages.

    Args:
        experiment: The validated configuration.
        runs: Folder of runs.
        command: The command line, kept in the manifest.
    """

    def __init__(self, experiment: Experiment, runs: Path, command: list[str]) -> None:
        # Names that only the last stages use are checked now, not after minutes of work.
        for recipe in experiment.tune.recipes:
            get_recipe(recipe)
        get_task(experiment.tune.task)
        DeltaRule.parse(experiment.cover.delta)
        self.experiment = experiment
        self.command = command
        self.dir = RunDir(runs, experiment.name)
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.failed: FailedCells | None = None

    # What the stages read.

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        """Anchor, seed and evaluation texts."""
        return self._loaded[0]

    @property
    def unused(self) -> dict[str, int]:
        """Texts of other splits, counted."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[dict[str, Corpus], dict[str, int]]:
        return load_corpora(self.experiment.data)

    @cached_property
    def reference(self) -> Corpus:
        """Anchor and seed texts together: what is harvested. Evaluation texts never are."""
        parts = [self.corpora[name] for name in ("anchor", "seed") if name in self.corpora]
        return Corpus("reference", tuple(itertools.chain.from_iterable(parts)))

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """Every model with its SAE, loaded once, after a look at all headers: a misfit is told before any weight."""
        for name, section in self.experiment.models.items():
            if wrong := misfits(model_header(section.model), sae_header(section.sae), section.layer):
                raise TransferError(f"models.{name}: {wrong[0]}")
        return {
            name: Adapter.load(
                section.model,
                section.sae,
                section.layer,
                dtype=section.dtype,
                device=section.device,
                codes=self.experiment.harvest.codes,
                skip=self.experiment.harvest.skip,
            )
            for name, section in self.experiment.models.items()
        }

    @cached_property
    def spaces(self) -> dict[str, FeatureSpace]:
        """Feature space per model name."""
        return {name: adapter.space for name, adapter in self.adapters.items()}

    @cached_property
    def pool(self) -> Workers | None:
        """Worker processes of this run, or None where this process does it all."""
        return Workers(self.experiment.processes) if self.experiment.processes > 1 else None

    def _space_inputs(self, *names: str) -> dict[str, Any]:
        return {f"space:{name}": dataclasses.asdict(self.spaces[name]) for name in names}

    def _settings(self, *sections: str) -> dict[str, Any]:
        return {name: getattr(self.experiment, name).model_dump(mode="json") for name in sections}

    def _others(self, name: str) -> list[str]:
        return [other for other in self.experiment.models if other != name]

    # The stages.

    @cached_property
    def stores(self) -> dict[str, ActivationStore]:
        """Sparse activations of the reference corpus, per model."""
        return {name: ActivationStore.load(folder / "store") for name, folder in self.harvests.items()}

    @cached_property
    def harvests(self) -> dict[str, Path]:
        """Folder of each model's harvest: the store, and how well the SAE fits (``check.json``)."""
        found: dict[str, Path] = {}
        for name, adapter in self.adapters.items():
            folder = self.dir.stage(
                "harvest",
                {**self._space_inputs(name), "corpus": self.reference.hash, **self._settings("harvest")},
                lambda out, a=adapter: stages.harvest(a, self.reference, out, self.experiment.harvest),
                name,
            )
            found[name] = folder
        return found

    @cached_property
    def aligned(self) -> dict[tuple[str, str], Path]:
        """Folder of each unordered pair: its alignments, and ``context.json``."""
        found: dict[tuple[str, str], Path] = {}
        stores = self.stores
        for source, target in itertools.combinations(self.experiment.models, 2):
            inputs = {
                **self._space_inputs(source, target),
                "corpus": self.reference.hash,
                **self._settings("harvest", "align"),
                "seed": self.experiment.seed,
            }
            found[source, target] = self.dir.stage(
                "align",
                inputs,
                lambda out, s=source, t=target: stages.align(
                    (self.adapters[s], self.adapters[t]), (stores[s], stores[t]), out, self.experiment
                ),
                f"{source}-{target}",
            )
        return found

    @cached_property
    def alignments(self) -> dict[tuple[str, str, str], Alignment]:
        """(source, target, method) → alignment, for all ordered pairs; each unordered pair is fitted once."""
        found: dict[tuple[str, str, str], Alignment] = {}
        settings = self.experiment.align
        for (source, target), folder in self.aligned.items():
            for method in (*settings.methods, f"{settings.use}-best"):
                alignment = Alignment.load(folder / method)
                found[source, target, method] = alignment
                found[target, source, method] = alignment.reversed()
        return found

    @property
    def in_use(self) -> list[Alignment]:
        """The method in use, one alignment each two models, with all its matches."""
        return [self.alignments[source, target, self.experiment.align.use] for source, target in self.aligned]

    def matches(self, source: str, target: str) -> Alignment:
        """Significant mutual matches of the method in use: which features correspond."""
        settings = self.experiment.align
        return stages.significant(self.alignments[source, target, settings.use], settings.q_value)

    def carriers(self, source: str, target: str) -> Alignment:
        """Each feature's significant best partner under the method in use: where to go from a missing feature."""
        settings = self.experiment.align
        return stages.significant(self.alignments[source, target, f"{settings.use}-best"], settings.q_value)

    @cached_property
    def coverage(self) -> dict[str, tuple[CoverageReport, Path]]:
        """Coverage of the seed data per model, with the folder that holds its thresholds."""
        found: dict[str, tuple[CoverageReport, Path]] = {}
        stores = self.stores
        for name in self.experiment.models:
            folder = self.dir.stage(
                "cover",
                {
                    **self._space_inputs(name),
                    "anchor": self.corpora["anchor"].hash,
                    "data": self.corpora["seed"].hash,
                    "positive": self.experiment.data.positive,
                    **self._settings("harvest", "cover"),
                    **judge_inputs(self.experiment),
                    "seed": self.experiment.seed,
                },
                lambda out, n=name: stages.cover(stores[n], self.corpora, out, self.experiment, self.dir.store),
                name,
            )
            found[name] = (CoverageReport.load(folder / "seed.json"), folder)
        return found

    @cached_property
    def plans(self) -> dict[str, dict[str, Any]]:
        """Per writing model: which features each arm of each target asks for (see ``arms.plan``)."""
        found: dict[str, dict[str, Any]] = {}
        for source in self.experiment.models:
            real = {t: self.carriers(source, t) for t in self._others(source)}
            wrong = {t: shuffled(a, seed=self.experiment.seed) for t, a in real.items()}
            reports = {name: report for name, (report, _) in self.coverage.items()}
            found[source] = arms.plan(
                source, reports, real, wrong, self.stores[source], self.corpora["anchor"], self.experiment
            )
        return found

    @property
    def _protected(self) -> str | None:
        """Hash of the texts that writing must not repeat."""
        return self.corpora["evaluation"].hash if "evaluation" in self.corpora else None

    @cached_property
    def written(self) -> dict[arms.Pool, tuple[SynthesisRun, Path]]:
        """Texts for the features that each source's plan asks for, scored in every space, by source and writer."""
        found: dict[arms.Pool, tuple[SynthesisRun, Path]] = {}
        for source in self.experiment.models:
            for writer in arms.writers(source, self.experiment):
                folder = self.dir.stage(
                    "synth",
                    {
                        **self._space_inputs(*self.experiment.models),
                        "writer": source,
                        **({} if writer == source else {"by": writer}),
                        "plan": self.plans[source],
                        "anchor": self.corpora["anchor"].hash,
                        "data": self.corpora["seed"].hash,
                        "evaluation": self._protected,
                        "matches": {
                            t: sorted(self.carriers(source, t).mapping().items()) for t in self._others(source)
                        },
                        **self._settings("harvest", "cover", "synth"),
                        "seed": self.experiment.seed,
                    },
                    lambda out, s=source, w=writer: synth_stage.synth(
                        s,
                        w,
                        self.adapters,
                        self.stores[s],
                        self.plans[s],
                        self.coverage,
                        self.corpora,
                        {t: self.carriers(s, t).mapping() for t in self._others(s)},
                        out,
                        self.experiment,
                        self.pool,
                    ),
                    arms.pool_name((source, writer)),
                )
                found[source, writer] = (SynthesisRun.load(folder / "synthesis.json"), folder)
        return found

    @cached_property
    def generic(self) -> dict[arms.Pool, tuple[SynthesisRun, Path]]:
        """Texts that no feature guides, per writer; none where no arm wants them."""
        found: dict[arms.Pool, tuple[SynthesisRun, Path]] = {}
        for writer in self.experiment.models if "generic" in self.experiment.tune.arms else ():
            folder = self.dir.stage(
                "generic",
                {
                    **self._space_inputs(*self.experiment.models),
                    "writer": writer,
                    "anchor": self.corpora["anchor"].hash,
                    "data": self.corpora["seed"].hash,
                    "evaluation": self._protected,
                    **self._settings("harvest", "synth"),
                    "seed": self.experiment.seed,
                },
                lambda out, w=writer: synth_stage.generic(
                    w, self.adapters, self.corpora, out, self.experiment, self.pool
                ),
                writer,
            )
            found["", writer] = (SynthesisRun.load(folder / "synthesis.json"), folder)
        return found

    @cached_property
    def datasets(self) -> Path:
        """Training sets of every arm, same budget and same label balance."""
        written = {**self.written, **self.generic}
        tune = self.experiment.tune
        return self.dir.stage(
            "datasets",
            {
                "written": {arms.pool_name(p): file_hash(f / "synthesis.json") for p, (_, f) in written.items()},
                "arms": [tune.arms, tune.writers, tune.dose],
                "installed": set_diversity.installed(),
                "plans": self.plans,
                "data": {n: c.hash for n, c in self.corpora.items()},
                "positive": self.experiment.data.positive,
                **self._settings("harvest", "cover", "synth"),
                "seed": self.experiment.seed,
            },
            lambda out: tune_stage.datasets(
                written, self.plans, self.coverage, self.stores, self.corpora, out, self.experiment
            ),
        )

    @cached_property
    def cells(self) -> Path:
        """Fine-tuned and evaluated cells of the grid; of those that failed, ``failed`` tells."""
        folders: list[Path] = []

        def work(out: Path) -> None:
            folders.append(out)
            tune_stage.tune(self.adapters, self.datasets, self.corpora, out, self.experiment, self.pool)

        inputs = {
            **self._space_inputs(*self.experiment.models),
            "datasets": file_hash(self.datasets / "datasets.json"),
            "evaluation": self.corpora["evaluation"].hash,
            "positive": self.experiment.data.positive,
            **self._settings("tune"),
        }
        try:
            return self.dir.stage("tune", inputs, work)
        except FailedCells as error:
            if not error.results:
                raise
            self.failed = error
            return folders[0]

    @cached_property
    def diversity(self) -> Path:
        """Text diversity and entropy of what each training set adds to the seed data."""
        return self.dir.stage(
            "diversity",
            {
                "datasets": file_hash(self.datasets / "datasets.json"),
                **{n: self.corpora[n].hash for n in ("anchor", "seed")},
                **self._space_inputs(*self.experiment.models),
                "installed": set_diversity.installed(),
                "seed": self.experiment.seed,
            },
            lambda out: set_diversity.measure(self.datasets, self.adapters, self.corpora, out, self.experiment),
        )

    # Results.

    def check(self, until: str) -> None:
        """Refuse data and models that the stages up to ``until`` cannot work with, before anything is written.

        Raises:
            TransferError: Saying what is wrong with them.
        """
        rank = STAGES.index(until)
        if until == "align" and len(self.experiment.models) < 2:
            raise TransferError("An alignment needs two models, the experiment has one.", "Add one under `models`.")
        task = grid_task(self.experiment.tune, self.experiment.data.positive) if rank >= 4 else None
        corpora = self.corpora
        if rank >= 2:
            labelled = self.experiment.judge.kind == "statistical"
            check_corpora(corpora, self.experiment.data.positive, evaluate=rank >= 4, labelled=labelled)
            large = [n for n in self.experiment.tune.dose if n >= len(corpora["seed"])]
            if large:
                raise TransferError(
                    f"tune.dose asks for {large[0]} of {len(corpora['seed'])} seed texts.", "Use smaller parts."
                )
        if rank >= 3:
            check_allowed(self.experiment)
        if task is not None:
            task.examples(corpora["evaluation"])
        _ = self.adapters

    def run(self, until: str = "run") -> dict[str, Any]:
        """Run the stages up to ``until`` (one of ``STAGES``) and write what the run folder holds.

        Returns:
            The numbers; for ``run`` also the report's path.

        Raises:
            FailedCells: After everything is written, when some cells failed; the report says so too.
        """
        self.check(until)
        self.dir.event(until, "command", command=shlex.join(self.command))
        with self.pool or contextlib.nullcontext():
            if (
                self.pool
                and STAGES.index(until) >= STAGES.index("synth")
                and not (self.dir.path / "stages.json").exists()
            ):
                # The first stages need one process: the others get ready meanwhile.
                self.pool.warm(*LIBRARIES)
            numbers = numbers_of(self, until)
        resolved = yaml.safe_dump(self.experiment.model_dump(mode="json"), sort_keys=False)
        write_text(self.dir.path / "experiment.yaml", resolved)
        self.dir.save_stages()
        if until != "run":
            if self.failed:
                raise self.failed
            return numbers
        write_json(self.dir.path / "results.json", numbers)
        write_json(self.dir.path / "details.json", details(self))
        write_json(self.dir.path / "manifest.json", self.manifest())
        from reports.build import build_report

        path = build_report(self.dir.path)
        say(f"report  {path}")
        if self.failed:
            raise self.failed
        return {**numbers, "report": str(path)}

    def manifest(self) -> dict[str, Any]:
        """Provenance: command, versions, hashes, seconds per stage, machine."""
        hashes = {f"{n} model": s.model_hash for n, s in self.spaces.items()}
        hashes |= {f"{n} SAE": s.sae_hash for n, s in self.spaces.items()}
        hashes |= {f"{n} texts": c.hash for n, c in self.corpora.items()}
        return {
            "command": self.command,
            "versions": versions(),
            "machine": machine(),
            "hashes": hashes,
            "seconds": self.dir.seconds,
            "started": self.started,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }

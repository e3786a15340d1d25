"""Stages that write texts: for the features of a source, and for none; each writes only into its folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from models.adapter import Adapter
from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.files import load_csr, save_csr, write_json
from transfer.core.outcomes import CoverageReport, SynthesisRun
from transfer.core.space import FeatureSet
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.core.workers import Workers
from transfer.coverage import missing_hit_interval
from transfer.evidence.spans import top_spans
from transfer.grid import arms
from transfer.stages import load_delta
from transfer.synth.drafts import Target
from transfer.synth.generic import write_generic
from transfer.synth.safety import check_allowed
from transfer.synth.writing import make_generator, make_openings, make_options
from transfer.synthesis import score_targets, steering_vectors, synthesise, with_hits
from transfer.text.words import WordCounts


def synth(
    source: str,
    writer: str,
    adapters: Mapping[str, Adapter],
    store: ActivationStore,
    plan: dict[str, Any],
    covered: Mapping[str, tuple[CoverageReport, Path]],
    corpora: Mapping[str, Corpus],
    mappings: Mapping[str, Mapping[int, int]],
    out: Path,
    experiment: Experiment,
    pool: Workers | None = None,
) -> None:
    """Write for every feature of ``source`` that some arm asks for, and score the kept texts in every space.

    A writer other than the source is not steered: directions of one residual stream mean nothing in another.

    Raises:
        TransferError: For texts of a harmful class that are not allowed, or when there is nothing to write for.
    """
    settings = experiment.synth
    folded = check_allowed(experiment)
    adapter, steered = adapters[source], writer == source
    report, folder = covered[source]
    delta = load_delta(folder)
    anchor = corpora["anchor"]
    ids = np.array(arms.features_asked(plan), dtype=np.int64)
    # Arms that ask for few features get as many candidates in all as the others.
    share = arms.candidate_share(plan, settings.features)
    # A feature of a label is written for in that label alone, a feature of a topic (or of nothing) in every label.
    relevant = report.relevant
    facet = dict(zip(relevant.features.tolist(), relevant.descriptions, strict=True))
    own_label = dict(zip(relevant.features.tolist(), relevant.labels, strict=True))
    if not steered:
        settings = settings.model_copy(update={"generator": "steered", "search": False})
    generator = make_generator(settings, adapters[writer], pool, account=experiment.name)
    targets = [Target(o, mappings[n], load_delta(covered[n][1])) for n, o in adapters.items() if n != source]
    background = WordCounts(t.text for t in anchor) if settings.generator == "chat" else None
    directions = adapter.dictionary.directions()
    known = [t.text for s in ("anchor", "seed") for t in corpora[s]]
    runs: list[SynthesisRun] = []
    for label in sorted({t.label for t in anchor}):
        wanted = [i for i in ids.tolist() if not facet.get(i, "").startswith("label ") or own_label[i] == label]
        texts = anchor.where(f"{anchor.name}/{label}", lambda t, x=label: t.label == x)
        spans = top_spans(store, texts, wanted, k=2 * settings.examples)
        asked = np.array([i for i in wanted if spans[i]], dtype=np.int64)
        if not len(asked):
            continue
        explore = {i: math.ceil(settings.explore * share[i]) for i in asked.tolist()}
        contrast = {i: math.ceil(settings.contrast * share[i]) for i in asked.tolist()}
        if settings.steps == 1:
            explore, contrast = {i: explore[i] + contrast[i] for i in explore}, dict.fromkeys(contrast, 0)
        runs.append(
            synthesise(
                adapter,
                generator,
                FeatureSet(store.space, asked, "asked for by the arms", labels=(label,) * len(asked)),
                {i: [span.text for span in spans[i]] for i in asked.tolist()},
                delta,
                missing=report.missing,
                anchor_texts=known + [c.text for done in runs for c in done.kept],
                # Strength 1 is the feature at its own threshold.
                steering=steering_vectors(directions, delta * np.linalg.norm(directions, axis=1)) if steered else None,
                strengths=settings.strengths,
                n=explore,
                m=contrast,
                few_shot=settings.examples,
                openings=make_openings(settings, spans),
                seed=experiment.seed,
                options=make_options(
                    settings,
                    adapter,
                    targets=targets,
                    evaluation=corpora.get("evaluation", ()),
                    spans=spans,
                    background=background,
                ),
            )
        )
    if not runs:
        raise TransferError(f"No arm asks for a feature of {source} that labelled anchor texts activate.")
    info: dict[str, Any] = {
        label: part.info for label, part in zip((r.candidates[0].label for r in runs), runs, strict=True) if part.info
    }
    if folded:
        info["folded"] = True
    run = dataclasses.replace(
        runs[0],
        pool="all arms",
        n_requested=len(ids),
        candidates=tuple(c for part in runs for c in part.candidates),
        info=info,
    )
    for name, other in adapters.items():
        if name != source:
            run = score_targets(run, other, mappings[name])
    _save_codes(run, adapters, out)
    codes = load_csr(out / f"codes-{source}.safetensors")
    run = with_hits(run, report.missing, codes, delta)
    run.save(out / "synthesis.json")
    write_json(
        out / "rows.json",
        synthesis_rows(arms.pool_name((source, writer)), run, plan, report, delta, codes),
    )


def _save_codes(run: SynthesisRun, adapters: Mapping[str, Adapter], out: Path) -> None:
    """The kept texts in every model's space, rows in the order of ``run.kept``."""
    texts = [c.text for c in run.kept]
    for name, other in adapters.items():
        codes = other.encode_texts(texts)[0] if texts else sp.csr_matrix((0, other.space.n_features), dtype=np.float32)
        save_csr(out / f"codes-{name}.safetensors", codes)


def generic(
    writer: str,
    adapters: Mapping[str, Adapter],
    corpora: Mapping[str, Corpus],
    out: Path,
    experiment: Experiment,
    pool: Workers | None = None,
) -> None:
    """Texts of ``writer`` that no feature guides, as many candidates as an arm with all its features has.

    Raises:
        TransferError: For texts of a harmful class that are not allowed.
    """
    check_allowed(experiment)
    settings = experiment.synth
    if settings.generator == "guided":
        settings = settings.model_copy(update={"generator": "steered"})
    adapter = adapters[writer]
    run = write_generic(
        make_generator(settings, adapter, pool, account=experiment.name),
        adapter.space,
        corpora["anchor"],
        settings.features * (settings.explore + settings.contrast),
        few_shot=settings.examples,
        known=[t.text for t in corpora["seed"]],
        options=make_options(
            settings.model_copy(update={"search": False, "require": "source"}),
            adapter,
            evaluation=corpora.get("evaluation", ()),
        ),
        seed=experiment.seed,
    )
    _save_codes(run, adapters, out)
    run.save(out / "synthesis.json")


def synthesis_rows(
    writer: str,
    run: SynthesisRun,
    plan: dict[str, Any],
    report: CoverageReport,
    delta: np.ndarray,
    codes: sp.csr_matrix,
) -> list[dict[str, Any]]:
    """Counts per pool: the writer's missing features, and the random control."""
    rows = []
    for pool in ("own", "random"):
        asked = set(plan[pool])
        part = dataclasses.replace(
            run, pool=pool, n_requested=len(asked), candidates=tuple(c for c in run.candidates if c.feature in asked)
        )
        mine = [row for row, c in enumerate(run.kept) if c.feature in asked]
        part = with_hits(part, report.missing, codes[mine], delta)
        low, high = missing_hit_interval(report.missing, codes[mine], delta)
        interval = {"missing_hit_rate_low": low, "missing_hit_rate_high": high}
        origin = {"source": report.space.model, "generator": run.generator, "writer": writer}
        rows.append({**part.summary(), **interval, **origin})
    return rows

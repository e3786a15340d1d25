"""What each stage of the pipeline does with its inputs; every function writes only into the folder it is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from models.activations import harvest as harvest_store
from models.adapter import Adapter
from transfer import arms, families
from transfer.core.alignment import Alignment
from transfer.core.config import Experiment, HarvestSection
from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, load_csr, read_json, save_arrays, save_csr, write_json
from transfer.core.outcomes import CoverageReport, SynthesisRun
from transfer.core.space import FeatureSet, FeatureView
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.core.workers import Workers
from transfer.coverage import alive, coverage, missing_hit_interval, missing_hit_rate
from transfer.curves import curves
from transfer.delta import DeltaRule, check_floor, fires, thresholds
from transfer.drafts import Target
from transfer.judging import relevant_by_chat
from transfer.methods import make_aligner, parameters
from transfer.relevance import judge_relevance
from transfer.safety import check_allowed
from transfer.spans import top_spans
from transfer.synthesis import score_targets, steering_vectors, synthesise
from transfer.words import WordCounts
from transfer.writing import make_generator, make_options


def harvest(adapter: Adapter, corpus: Corpus, out: Path, settings: HarvestSection) -> None:
    """Check the adapter against its card, store the corpus' activations, and say how well the SAE fits the corpus."""
    check = {
        "card": adapter.self_check(),
        "corpus": adapter.reconstruction([t.text for t in corpus][:256], max_tokens=settings.max_tokens),
    }
    harvest_store(
        adapter,
        corpus,
        out / "store",
        keep_residual=settings.keep_residual,
        token_budget=settings.token_budget,
        max_tokens=settings.max_tokens,
    )
    write_json(out / "check.json", check)


def store_summary(name: str, store: ActivationStore, check: dict[str, Any]) -> dict[str, Any]:
    """What a harvest gave; ``nmse`` is the SAE's error on these texts, ``card_nmse`` that on its card's."""
    alive = int(np.count_nonzero(store.support()))
    return {
        "model": name,
        "space": store.space.id,
        "layer": store.space.layer,
        "docs": len(store.doc_ids),
        "tokens": store.n_tokens,
        "features_alive": alive,
        "features": store.space.n_features,
        "active_per_token": store.tokens.nnz / max(store.n_tokens, 1),
        "nmse": check["corpus"]["nmse"],
        "card_nmse": check["card"].get("nmse"),
        **store.counts,
    }


def views(adapters: tuple[Adapter, Adapter]) -> tuple[FeatureView, FeatureView]:
    """Decoder directions of both models and the unembedding rows of the tokens that both vocabularies hold."""
    words = [a.language.vocabulary() for a in adapters]
    shared = sorted(set(words[0]) & set(words[1]))
    made = []
    for adapter, vocabulary in zip(adapters, words, strict=True):
        rows = adapter.language.unembedding()[[vocabulary[w] for w in shared]]
        made.append(FeatureView(adapter.space, adapter.dictionary.directions(), np.asarray(rows, dtype=np.float32)))
    return made[0], made[1]


def align(
    adapters: tuple[Adapter, Adapter],
    stores: tuple[ActivationStore, ActivationStore],
    out: Path,
    experiment: Experiment,
) -> None:
    """Fit every method on one part of the documents, and score its frozen matches on the other.

    ``context.json`` compares the decoder rows of the accepted matches of the method in use as a whole.
    """
    from aligners.assignment import counterparts
    from aligners.calibrate import score_matches
    from aligners.tokens import pair_stores

    settings = experiment.align
    known = {"min_support": settings.min_support, "reg": settings.reg, "max_iter": settings.max_iter}
    aligners = {
        method: make_aligner(method, [f"{k}={v}" for k, v in known.items() if k in parameters(method)], experiment.seed)
        for method in settings.methods
    }
    pairs = pair_stores(*stores, residuals=any("residuals" in a.takes() for a in aligners.values()))
    fit, heldout = pairs.split(settings.fit_fraction, seed=experiment.seed)
    source, target = views(adapters)

    def score(alignment: Alignment, name: str) -> Alignment:
        scored = score_matches(alignment, heldout, n_null=settings.n_null, seed=experiment.seed)
        kept = np.flatnonzero(scored.matches["q_value"] <= settings.q_value)
        info = {
            **scored.info,
            "n_rows_fit": len(fit.docs),
            "n_rows_heldout": len(heldout.docs),
            "n_significant": len(kept),
            "heldout_corr_significant": float(np.median(scored.matches["heldout_corr"][kept])) if len(kept) else None,
        }
        # Seconds differ from run to run; results must not.
        scored = dataclasses.replace(scored, method=name, info=info, seconds=0.0)
        scored.save(out / name)
        return scored

    with progress(f"align {source.space.model} {target.space.model}", len(aligners), "methods") as advance:
        for method, aligner in aligners.items():
            aligner.fit(source, target, pairs=fit)
            scored = score(aligner.alignment_, method)
            if method == settings.use:
                score(counterparts(aligner.alignment_), f"{method}-best")
                accepted = significant(scored, settings.q_value)
                rows = families.context(accepted, source, target, seed=experiment.seed)
                write_json(out / "context.json", rows)
            advance(1)


def significant(alignment: Alignment, q_value: float) -> Alignment:
    """Only the matches with a q-value of at most ``q_value``; untestable ones are out."""
    q = alignment.matches["q_value"]
    keep = np.flatnonzero(np.isfinite(q) & (q <= q_value))
    return dataclasses.replace(alignment, matches={c: v[keep] for c, v in alignment.matches.items()})


def split_docs(store: ActivationStore, corpus: Corpus) -> sp.csr_matrix:
    """Max-over-tokens rows of one split."""
    return store.docs[store.rows([t.id for t in corpus])]


def cover(
    store: ActivationStore, corpora: Mapping[str, Corpus], out: Path, experiment: Experiment, answers: Path
) -> None:
    """Thresholds and relevant features from the anchor; coverage of the seed data against it, and its curves.

    ``answers`` is the folder in which a language model's answers are kept, where one is the judge.
    """
    settings = experiment.cover
    anchor, seed = split_docs(store, corpora["anchor"]), split_docs(store, corpora["seed"])
    rule = DeltaRule.parse(settings.delta)
    delta = thresholds(anchor, rule)
    check_floor(store.space, delta, ~alive(anchor).dead)
    if experiment.judge.kind == "statistical":
        relevant = judge_relevance(
            store.space,
            anchor,
            [t.label for t in corpora["anchor"]],
            [t.topic for t in corpora["anchor"]] if any(t.topic for t in corpora["anchor"]) else (),
            delta=delta,
            fdr=settings.fdr,
            min_support=settings.min_docs,
            always_on=settings.always_on,
            test=experiment.judge.test,
            seed=experiment.seed,
        )
    else:
        relevant = relevant_by_chat(store, corpora["anchor"], experiment, answers, always_on=settings.always_on)
    report = coverage(
        store.space,
        anchor,
        seed,
        relevant,
        delta,
        dataset="seed",
        delta_rule=str(rule),
        always_on=settings.always_on,
        eps=settings.smoothing,
        seed=experiment.seed,
    )
    found = curves(
        anchor,
        seed,
        relevant,
        rule,
        always_on=settings.always_on,
        eps=settings.smoothing,
        seed=experiment.seed,
    )
    write_json(out / "curves.json", curve_rows(found, store.space.model, "seed"))
    save_arrays(out / "delta.safetensors", {"delta": delta})
    report.save(out / "seed.json")


def curve_rows(found: dict[str, list[dict[str, Any]]], model: str, dataset: str) -> list[dict[str, Any]]:
    """Points of both curves as rows of one table."""
    return [{"model": model, "dataset": dataset, "curve": name, **row} for name, rows in found.items() for row in rows]


def load_delta(folder: Path) -> np.ndarray:
    """Thresholds of one model, float32 [n_features]."""
    return load_arrays(folder / "delta.safetensors")["delta"]


def synth(
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
    """Write for every feature that some arm asks ``writer`` for, and score the kept texts in every space.

    Raises:
        TransferError: For texts of a harmful class that are not allowed, or when there is nothing to write for.
    """
    settings = experiment.synth
    folded = check_allowed(experiment.data, settings.allow_harmful)
    adapter = adapters[writer]
    report, folder = covered[writer]
    delta = load_delta(folder)
    anchor = corpora["anchor"]
    ids = np.array(arms.features_asked(plan), dtype=np.int64)
    # Arms that ask for few features get as many candidates in all as the others.
    share = arms.candidate_share(plan, settings.features)
    # A feature of a label is written for in that label alone, a feature of a topic (or of nothing) in every label.
    relevant = report.relevant
    facet = dict(zip(relevant.features.tolist(), relevant.descriptions, strict=True))
    own_label = dict(zip(relevant.features.tolist(), relevant.labels, strict=True))
    generator = make_generator(settings, adapter, pool)
    targets = [Target(o, mappings[n], load_delta(covered[n][1])) for n, o in adapters.items() if n != writer]
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
                steering=steering_vectors(directions, delta * np.linalg.norm(directions, axis=1)),
                strengths=settings.strengths,
                n=explore,
                m=contrast,
                few_shot=settings.examples,
                openings={
                    i: [o for span in spans[i][: settings.examples] if (o := span.opening())] for i in asked.tolist()
                },
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
        raise TransferError(f"No arm asks {writer} for a feature that labelled anchor texts activate.")
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
        if name != writer:
            run = score_targets(run, other, mappings[name])
    texts = [c.text for c in run.kept]
    for name, other in adapters.items():
        codes = other.encode_texts(texts)[0] if texts else sp.csr_matrix((0, other.space.n_features), dtype=np.float32)
        save_csr(out / f"codes-{name}.safetensors", codes)
    codes = load_csr(out / f"codes-{writer}.safetensors")
    run = dataclasses.replace(run, n_hit=missing_hit_rate(report.missing, codes, delta)[0])
    run.save(out / "synthesis.json")
    write_json(
        out / "rows.json",
        synthesis_rows(writer, run, plan, report, delta, codes),
    )


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
    fired = fires(codes, delta)
    for pool in ("own", "random"):
        asked = set(plan[pool])
        part = dataclasses.replace(
            run, pool=pool, n_requested=len(asked), candidates=tuple(c for c in run.candidates if c.feature in asked)
        )
        mine = [row for row, c in enumerate(run.kept) if c.feature in asked]
        hit = np.asarray(fired[mine].sum(axis=0)).ravel()[report.missing.features] > 0
        part = dataclasses.replace(part, n_hit=int(np.count_nonzero(hit)), n_missing=len(report.missing))
        low, high = missing_hit_interval(report.missing, codes[mine], delta)
        interval = {"missing_hit_rate_low": low, "missing_hit_rate_high": high}
        origin = {"source": report.space.model, "generator": run.generator, "writer": writer}
        rows.append({**part.summary(), **interval, **origin})
    return rows


def datasets(
    written: Mapping[str, tuple[SynthesisRun, Path]],
    plans: dict[str, dict[str, Any]],
    covered: Mapping[str, tuple[CoverageReport, Path]],
    stores: Mapping[str, ActivationStore],
    corpora: Mapping[str, Corpus],
    out: Path,
    experiment: Experiment,
) -> None:
    """Training sets of every arm, and the coverage of each in the target's space."""
    sets: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for target, (report, folder) in covered.items():
        delta = load_delta(folder)
        codes = {w: load_csr(f / f"codes-{target}.safetensors") for w, (_, f) in written.items()}
        made = arms.training_sets(
            target,
            plans,
            {w: run for w, (run, _) in written.items()},
            {w: fires(c, delta) for w, c in codes.items()},
            corpora["seed"],
            corpora["anchor"],
            experiment,
        )
        sets += made
        anchor, seed = (split_docs(stores[target], corpora[s]) for s in ("anchor", "seed"))
        for record in made:
            if not record["written"]:
                continue
            writer = record["source"]
            place = {(c.text, c.feature): row for row, c in enumerate(written[writer][0].kept)}
            chosen = codes[writer][[place[w["text"], w["feature"]] for w in record["written"]]]
            after = coverage(
                stores[target].space,
                anchor,
                sp.csr_matrix(sp.vstack([seed, chosen])),
                report.relevant,
                delta,
                dataset=f"seed + {record['arm']} by {writer}",
                delta_rule=report.delta_rule,
                always_on=experiment.cover.always_on,
                eps=experiment.cover.smoothing,
                seed=experiment.seed,
            )
            hit = np.isin(report.missing.features, after.covered.features).sum()
            rate = float(hit / len(report.missing)) if len(report.missing) else None
            low, high = missing_hit_interval(report.missing, chosen, delta, seed=experiment.seed)
            hits = {"missing_hit_rate": rate, "missing_hit_rate_low": low, "missing_hit_rate_high": high}
            rows.append({**after.summary(), "arm": record["arm"], "writer": writer, **hits})
    write_json(out / "coverage.json", rows)
    write_json(out / "datasets.json", sets)


def tune(
    adapters: Mapping[str, Adapter],
    folder: Path,
    corpora: Mapping[str, Corpus],
    out: Path,
    experiment: Experiment,
    pool: Workers | None = None,
) -> None:
    """Fine-tune and evaluate every cell of the grid; finished cells of a killed run are kept."""
    from transfer.finetune import get_recipe
    from transfer.matrix import Cell, run_cells, write_examples
    from transfer.tasks import get_task
    from transfer.tasks.intent import unseen_topics

    evaluation = corpora["evaluation"]
    unseen = unseen_topics(corpora["seed"], evaluation)
    task = get_task(experiment.tune.task, positive=experiment.data.positive, unseen=unseen)
    references = {name: adapter.space.model for name, adapter in adapters.items()}
    cells = []
    for record in read_json(folder / "datasets.json"):
        examples = [(text, int(label == experiment.data.positive)) for text, label in record["examples"]]
        file = out / "data" / f"{record['target']}-{record['arm']}-{record['generator'] or 'none'}.jsonl"
        sha = write_examples(file, examples)
        for recipe in experiment.tune.recipes:
            for seed in experiment.tune.seeds:
                cells.append(
                    Cell(
                        source=references[record["source"]] if record["generator"] else "",
                        generator=references.get(record["generator"], ""),
                        target=references[record["target"]],
                        arm=record["arm"],
                        recipe=get_recipe(recipe),
                        seed=seed,
                        file=str(file),
                        file_hash=sha,
                    )
                )
    hashes = {adapter.space.model: adapter.space.model_hash for adapter in adapters.values()}
    found = run_cells(cells, evaluation, task, pool=pool, out_dir=out / "cells", base_hashes=hashes)
    write_json(out / "grid.json", [dataclasses.asdict(result) for result in found])

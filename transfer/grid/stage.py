"""Stages that make training sets and fine-tune on them: the grid; each writes only into its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from models.adapter import Adapter
from transfer.core.config import Experiment
from transfer.core.files import load_csr, read_json, write_json
from transfer.core.outcomes import CoverageReport, SynthesisRun
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.core.workers import Workers
from transfer.cover.delta import fires
from transfer.coverage import coverage, missing_hit_interval
from transfer.grid import arms, picks
from transfer.stages import load_delta, split_docs
from transfer.text.embeddings import get_embedder


def datasets(
    written: Mapping[arms.Pool, tuple[SynthesisRun, Path]],
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
    known = [t.text for s in ("anchor", "seed") for t in corpora[s]]
    needs_embedder = {"k_center", "facility_location"} & set(experiment.tune.arms)
    embed = get_embedder("auto", known, seed=experiment.seed) if needs_embedder else None
    for target, (report, folder) in covered.items():
        delta = load_delta(folder)
        codes = {pool: load_csr(f / f"codes-{target}.safetensors") for pool, (_, f) in written.items()}
        anchor, seed = (split_docs(stores[target], corpora[s]) for s in ("anchor", "seed"))
        made = arms.training_sets(
            target,
            plans,
            {pool: run for pool, (run, _) in written.items()},
            {pool: fires(c, delta) for pool, c in codes.items()},
            corpora["seed"],
            corpora["anchor"],
            experiment,
            picks.picker(corpora, embed, (anchor, seed), delta, report.anchor_features.features),
        )
        sets += made
        place = {t.id: row for row, t in enumerate(corpora["anchor"])}
        seed_place = {t.text: row for row, t in enumerate(corpora["seed"])}
        for record in made:
            if record["written"]:
                pool = record["source"], record["generator"]
                rank = {(c.text, c.feature): row for row, c in enumerate(written[pool][0].kept)}
                chosen = codes[pool][[rank[w["text"], w["feature"]] for w in record["written"]]]
            elif record.get("picked"):
                chosen = anchor[[place[t["id"]] for t in record["picked"]]]
            elif "dose" in record:
                chosen = None
            else:
                continue
            if chosen is None:
                data, name = seed[[seed_place[text] for text, _ in record["examples"]]], f"seed, {record['dose']} texts"
            else:
                data = sp.csr_matrix(sp.vstack([seed, chosen]))
                name = f"seed + {record['arm']}" + (f" by {record['writer']}" if record["writer"] else "")
            after = coverage(
                stores[target].space,
                anchor,
                data,
                report.relevant,
                delta,
                dataset=name,
                delta_rule=report.delta_rule,
                always_on=experiment.cover.always_on,
                eps=experiment.cover.smoothing,
                seed=experiment.seed,
            )
            if chosen is None:
                record["coverage"] = {"fac": after.fac, "n_missing": len(after.missing)}
                continue
            hit = np.isin(report.missing.features, after.covered.features).sum()
            rate = float(hit / len(report.missing)) if len(report.missing) else None
            low, high = missing_hit_interval(report.missing, chosen, delta, seed=experiment.seed)
            hits = {"missing_hit_rate": rate, "missing_hit_rate_low": low, "missing_hit_rate_high": high}
            rows.append({**after.summary(), "arm": record["arm"], "writer": record["writer"], **hits})
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
    """Fine-tune and evaluate every cell of the grid; finished cells of a killed run are kept.

    Writes ``grid.json``, and ``dose.json`` for the cells on parts of the seed data.

    Raises:
        FailedCells: When some failed; both files then hold the others.
    """
    from transfer.finetune import get_recipe
    from transfer.matrix import Cell, FailedCells, run_cells, write_examples
    from transfer.tasks import grid_task
    from transfer.tasks.intent import unseen_topics

    evaluation = corpora["evaluation"]
    unseen = unseen_topics(corpora["seed"], evaluation)
    task = grid_task(experiment.tune, experiment.data.positive, unseen=unseen)
    references = {name: adapter.space.model for name, adapter in adapters.items()}
    cells, doses = [], set()
    for record in read_json(folder / "datasets.json"):
        examples = [(text, int(label == experiment.data.positive)) for text, label in record["examples"]]
        part = str(record["dose"]) if "dose" in record else record["writer"].replace(" ", "-") or "none"
        file = out / "data" / f"{record['target']}-{record['arm']}-{part}.jsonl"
        sha = write_examples(file, examples)
        for recipe in experiment.tune.recipes:
            for seed in experiment.tune.seeds:
                cell = Cell(
                    source=references.get(record["source"], ""),
                    generator=references.get(record["generator"], ""),
                    target=references[record["target"]],
                    arm=record["arm"],
                    recipe=get_recipe(recipe),
                    seed=seed,
                    file=str(file),
                    file_hash=sha,
                )
                cells.append(cell)
                if "dose" in record:
                    doses.add(sha)
    hashes = {adapter.space.model: adapter.space.model_hash for adapter in adapters.values()}
    failed: FailedCells | None = None
    try:
        found = run_cells(cells, evaluation, task, pool=pool, out_dir=out / "cells", base_hashes=hashes)
    except FailedCells as error:
        found, failed = error.results, error
    for name, of_dose in (("grid", False), ("dose", True)):
        rows = [dataclasses.asdict(r) for r in found if (r.run.data_hash in doses) == of_dose]
        if rows or not of_dose:
            write_json(out / f"{name}.json", rows)
    if failed:
        raise failed

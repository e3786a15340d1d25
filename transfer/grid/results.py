"""From finished cells to what a reader is told: the transfer table, claims, alerts, limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer.core import stats
from transfer.core.config import Experiment
from transfer.core.files import read_json
from transfer.core.outcomes import TransferResult
from transfer.core.store import ActivationStore
from transfer.grid import bound_table, correlations
from transfer.grid.claims import PAIRS, Comparison, compare, summarise, verdict
from transfer.grid.gains import load_cells
from transfer.tasks import grid_task

CONTROL_TEXTS = {
    "random": "random features",
    "shuffled": "shuffled features",
    "generic": "texts that no feature guides",
    "text": "texts for the writer's missing features, without an alignment",
    "k_center": "real texts chosen by k-center",
    "facility_location": "real texts chosen by facility location",
    "coverage_selection": "real texts chosen by coverage",
}
"""What each control consists of, in the words of a claim."""

UNCHECKED_NMSE = 0.4
"""An SAE without a card that leaves more than this unexplained may belong to another model."""


def transfer_table(folder: Path, experiment: Experiment, room: list[dict[str, Any]]) -> dict[str, Any]:
    """``transfer``, ``comparisons`` and ``claims`` of ``results.json``.

    Args:
        folder: Of the finished grid.
        experiment: Configuration.
        room: See ``transfer.grid.gains.room``.
    """
    cells = load_cells(folder / "grid.json")
    task = grid_task(experiment.tune, experiment.data.positive)
    headline = task.metrics[0]
    metrics = list(dict.fromkeys(e.metric for c in cells for e in c.evals))
    rows = [row for metric in metrics for row in summarise(cells, task.name, metric)]
    comparisons = compare(cells, headline, folder=folder / "cells", weighted=task.weighted(headline))
    return {
        "transfer": [row.summary() for row in rows],
        "comparisons": [c.summary() for c in comparisons],
        "claims": claims([r for r in rows if r.metric == headline], comparisons, experiment, room),
        "n_leaked": max((c.n_leaked for c in cells), default=0),
    }


def theory(numbers: dict[str, Any], cells: Path, diversity: Path, experiment: Experiment) -> dict[str, Any]:
    """``diversity_correlations``, ``bounds``, ``bound_notes`` and ``efficiency`` of ``results.json``.

    Args:
        numbers: With ``coverage``, ``diversity`` and ``transfer``.
        cells: Folder of the finished grid.
        diversity: Folder of the stage ``diversity``.
        experiment: Configuration.
    """
    headline = grid_task(experiment.tune, experiment.data.positive).metrics[0]
    entropies = read_json(diversity / "entropy.json")
    weights = {(c.target, c.recipe): c.run.n_trainable for c in load_cells(cells / "grid.json")}
    largest = {t: max(n for (other, _), n in weights.items() if other == t) for t, _ in weights}
    bounds, notes = bound_table.bound_table(numbers["coverage"], entropies, largest, experiment.cover.smoothing)
    written = {(e["target"], e["arm"], e["generator"]): e["n"] for e in entropies}
    return {
        "diversity_correlations": correlations.table({experiment.name: numbers}, headline, experiment.seed),
        "bounds": bounds,
        "bound_notes": notes,
        "efficiency": bound_table.efficiency(numbers["transfer"], headline, written, weights),
    }


def claims(
    rows: list[TransferResult],
    comparisons: list[Comparison],
    experiment: Experiment,
    room: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Claims in words: the pooled ones first, then each cell against its strongest same-budget control.

    A target whose seed data lacks too few relevant features (``room``) has no verdict, nor has a pool with it.
    """
    full = {r["model"]: r for r in room if not r["informative"]}
    pooled = [_pooled(rows, comparisons, r, arm, control) for r in experiment.tune.recipes for arm, control in PAIRS]
    found: list[dict[str, Any]] = [p for p in pooled if p]
    for claim, p in zip(found, stats.holm([claim.pop("p") for claim in found]) if found else [], strict=True):
        better, worth = claim["number"] > 0 and p < 0.05, claim["high"] >= 0.01
        needed, targets = claim.pop("needed"), claim.pop("targets")
        claim["verdict"] = "supported" if better else f"undecided: {needed}" if worth else "not supported"
        claim["p_holm"] = float(p)
        for model in sorted(targets & set(full)):
            claim["verdict"] = _no_room(full[model])
    for c in verdict(comparisons):
        found.append(
            {
                "sentence": (
                    f"{c.target} ({c.recipe}): texts {c.generator} wrote for mapped features change {c.metric.upper()} "
                    f"by {c.delta:+.3f} [{c.low:+.3f}, {c.high:+.3f}] against {c.control}, its strongest control"
                ),
                "verdict": _no_room(full[c.target]) if c.target in full else c.verdict,
                "number": c.delta,
                "low": c.low,
                "high": c.high,
                "control": c.control,
                "anchor": f"cell-{c.source}-{c.target}-{c.recipe}"
                + (f"-{c.generator}" if c.generator != c.source else ""),
                "mde": c.mde,
                "p_holm": c.p_holm,
            }
        )
    return found


def _no_room(row: Mapping[str, Any]) -> str:
    return (
        f"uninformative: {row['model']} lacks only {row['n_missing']} relevant features at the start, "
        f"{row['least']} are needed"
    )


def _pooled(
    rows: list[TransferResult], comparisons: list[Comparison], recipe: str, arm: str, control: str
) -> dict[str, Any] | None:
    """One arm against one control, averaged over all cells of a recipe.

    Seeds of the training share their texts, and every cell has texts of its own; the interval is over seeds or over
    cells (with several writers: over pairs of source and target), whichever is wider, so that the luck of one set of
    texts does not look like certainty.
    """
    cells = [c for c in comparisons if (c.recipe, c.arm, c.control) == (recipe, arm, control)]
    if not cells:
        return None
    by_cell = {
        (r.arm, r.source, r.generator, r.target): dict(zip(r.seeds, r.values, strict=True))
        for r in rows
        if r.recipe == recipe
    }
    pairs = [
        (
            by_cell[arm, c.source, c.generator, c.target],
            by_cell[control, c.control_source, c.control_generator, c.target],
        )
        for c in cells
    ]
    # A cell that failed takes its seed with it.
    seeds = sorted(set.intersection(*(set(side) for pair in pairs for side in pair)))
    if not seeds:
        return None
    treated, against = (np.array([[pair[side][s] for s in seeds] for pair in pairs]) for side in (0, 1))
    over = {"seeds": stats.paired_delta(treated.mean(axis=0), against.mean(axis=0))}
    # What several writers wrote for the same features is no independent evidence: their mean counts once.
    place = [(c.source, c.target) for c in cells]
    units = [np.array([p == unit for p in place]) for unit in dict.fromkeys(place)]
    if len(units) > 1:
        name = "cells" if len(units) == len(cells) else "pairs of source and target"
        means = [[side[u].mean() for u in units] for side in (treated, against)]
        over[name] = stats.paired_delta(means[0], means[1])
    widest = max(over, key=lambda name: np.nan_to_num(over[name].high - over[name].low, nan=-1.0))
    d = over[widest]
    better = sum(c.delta > 0 for c in cells)
    wins = sum(c.verdict == "supported" for c in cells)
    names = {
        "mapped": "Texts written by one model for features that the alignment maps to what another lacks",
        "own": "Texts written by a model for its own missing features",
        "text": "Texts written for another model's own missing features, without an alignment,",
    }
    enough = stats.seeds_needed(max(d.delta, 0.01 - d.delta), d.sd)
    needed = "more than 1000" if enough is None else str(max(enough, d.n + 1))
    return {
        "sentence": (
            f"{names[arm]} change the target's {cells[0].metric.upper()} by {d.delta:+.3f} "
            f"[{d.low:+.3f}, {d.high:+.3f}] against the same budget of {CONTROL_TEXTS[control]} "
            f"({recipe}, mean of {len(cells)} cells, {over['seeds'].n} seeds, interval over {widest}; "
            f"better in {better} cells, significant after correction in {wins})"
        ),
        "verdict": "",
        "needed": f"would need {needed} {widest}",
        "targets": {c.target for c in cells},
        "mde": stats.minimum_detectable_effect(d.sd, d.n),
        "p": max(each.p for each in over.values()),
        "number": d.delta,
        "low": d.low,
        "high": d.high,
        "control": control,
        "anchor": f"pooled-{recipe}-{arm}-{control}",
    }


def coverage_contrasts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much more of a target's missing features the mapped arm hits than each control, over (target, writer) pairs.

    The interval is over pairs (t); pairs of one target share its missing features, so it is a little too narrow.
    """
    rate = {(r["model"], r["writer"], r["arm"]): r["missing_hit_rate"] for r in rows if "arm" in r}
    found = []
    for control in ("random", "shuffled", "text"):
        deltas = [
            value - other
            for (model, writer, arm), value in sorted(rate.items())
            if arm == "mapped" and value is not None and (other := rate.get((model, writer, control))) is not None
        ]
        if len(deltas) > 1:
            interval = stats.mean_interval(deltas)
            found.append(
                {
                    "metric": "missing_hit_rate",
                    "arm": "mapped",
                    "control": control,
                    "delta": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "n_pairs": len(deltas),
                }
            )
    return found


def alerts(
    numbers: dict[str, Any], stores: Mapping[str, ActivationStore], experiment: Experiment
) -> list[dict[str, str]]:
    """What a reader must know before trusting the numbers, most serious first."""
    found: list[tuple[int, str, str]] = []
    for row in numbers["alignments"]:
        if not row["converged"]:
            found.append(
                (
                    0,
                    "severe",
                    f"{row['method']} {row['source']} → {row['target']} did not converge "
                    f"(row error {row['row_error']:.2g}, column error {row['col_error']:.2g}).",
                )
            )
    for row in numbers["coverage"]:
        if row["dataset"] == "seed" and row["n_missing"] < experiment.cover.least_missing:
            found.append(
                (
                    1,
                    "severe",
                    f"{row['model']} lacks only {row['n_missing']} relevant features at the start; below "
                    f"{experiment.cover.least_missing} a grid has little room to show anything.",
                )
            )
    failed = numbers.get("failed_cells", [])
    if failed:
        found.append((0, "severe", f"{len(failed)} cells failed and are missing here, first {failed[0]['cell']}."))
    if numbers.get("n_leaked"):
        found.append((0, "severe", f"{numbers['n_leaked']} training texts are also evaluation texts."))
    for split, count in numbers["data"]["unused"].items():
        found.append((2, "warn", f"{count} texts of split {split!r} were not used."))
    for row in numbers["harvest"]:
        if row["nmse"] > 1 or (row["card_nmse"] and row["nmse"] > 1.5 * row["card_nmse"]):
            card = f", {row['card_nmse']:.2f} of its card's" if row["card_nmse"] else ""
            found.append(
                (
                    1,
                    "severe",
                    f"The SAE of {row['model']} leaves {row['nmse']:.2f} of the variance of these texts unexplained"
                    f"{card}: its features say little about them.",
                )
            )
        elif row["card_nmse"] is None:
            poor = row["nmse"] > UNCHECKED_NMSE
            found.append(
                (
                    1 if poor else 3,
                    "severe" if poor else "warn",
                    f"The SAE of {row['model']} has no card, so whether it belongs to this model and layer was not "
                    f"checked; it leaves {row['nmse']:.2f} of the variance of these texts unexplained.",
                )
            )
    for name, store in stores.items():
        for reason, count in store.counts.items():
            if count > 0.05 * len(store.doc_ids):
                found.append((2, "warn", f"{name}: {count} of {len(store.doc_ids)} texts were {reason}."))
    added = [r["n_train"] for r in numbers["transfer"] if r["arm"] == "mapped"]
    alone = [r["n_train"] for r in numbers["transfer"] if r["arm"] == "seed_only"]
    if added and min(added) - max(alone) < 0.5 * experiment.synth.budget:
        found.append(
            (
                2,
                "warn",
                f"An arm could fill only {min(added) - max(alone)} of the {experiment.synth.budget} texts "
                "budgeted; all arms of that target were cut to it.",
            )
        )
    spread = [c for c in numbers["comparisons"] if c["arm"] == "mapped" and c["low"] < 0 < c["high"]]
    if spread:
        found.append(
            (
                3,
                "warn",
                f"The interval over seeds spans zero in {len(spread)} of "
                f"{sum(c['arm'] == 'mapped' for c in numbers['comparisons'])} comparisons of the mapped arm.",
            )
        )
    for row in numbers["synthesis"]:
        if row["pool"] == "own" and row["n_candidates"] and row["n_kept"] < 0.05 * row["n_candidates"]:
            found.append((2, "warn", f"{row['writer']} kept only {row['n_kept']} of {row['n_candidates']} candidates."))
    return [{"level": level, "text": text} for _, level, text in sorted(found)]


def limits(experiment: Experiment) -> list[str]:
    """What the numbers do not say, in plain words."""
    opened = (
        ", and every other text starts with up to eight words of one that end where the feature fires (hit rates with "
        "and without such an opening are in the synthesis rows)"
        if experiment.synth.openings
        else ""
    )
    found = [
        "Intervals of the transfer table are over fine-tuning seeds, with one training set an arm and one evaluation "
        "split; the boot columns of the comparisons also resample evaluation texts, and the pooled claims take the "
        "interval over cells where that is wider.",
        "A q-value guards against chance under a shuffled corpus. Only that of the method fused is also meant to tell "
        "a feature from another that fires on much the same texts and points a like way (a parent and its child).",
        "Relevance and labels of features come from the labelled anchor by a statistical judge, not from reading them, "
        f"at a false-discovery rate of {experiment.cover.fdr:g}.",
        f"Writers see anchor texts{opened}, so every written arm profits from the anchor; the random and shuffled arms "
        "profit alike.",
        "The alignment is fitted on the anchor and seed texts alone; features that hardly fire there are untestable, "
        "not unmatched.",
    ]
    if all(m.model.startswith("zoo:") for m in experiment.models.values()):
        found.append(
            "The models are tiny (about 3 million parameters). What holds or fails here need not at 8 billion."
        )
    return found

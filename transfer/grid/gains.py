"""What a gain over the seed data is worth: room for one, its share of the own-features gain, what it goes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer.core import stats
from transfer.core.config import Experiment
from transfer.core.files import plain, read_json
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.grid import correlations
from transfer.matrix import CellResult
from transfer.tasks import grid_task

QUALITIES = ("heldout_corr", "verified", "n_features")
"""Of an alignment, as far as one cell uses it: mean held-out correlation of the matches of the features that its texts
were written for, share of these texts that fire the matched feature in the target, and how many features they are."""


def load_cells(file: Path) -> list[CellResult]:
    """Finished cells from ``grid.json`` or ``dose.json``; none without the file."""
    cells = []
    for row in read_json(file) if file.exists() else []:
        row["evals"] = tuple(EvalResult(**e) for e in row["evals"])
        row["run"] = FinetuneRun(**{**row["run"], "curve": tuple(row["run"]["curve"])})
        cells.append(CellResult(**row))
    return cells


def room(coverage: Sequence[Mapping[str, Any]], least: int) -> list[dict[str, Any]]:
    """Per model, how many task-relevant features its seed data lacks at the start, and whether that is enough.

    Args:
        coverage: Rows of ``results.json``; those of the seed data count.
        least: ``cover.least_missing``.
    """
    return [
        {
            "model": r["model"],
            "n_anchor": r["n_anchor"],
            "n_missing": r["n_missing"],
            "least": least,
            "informative": r["n_missing"] >= least,
        }
        for r in coverage
        if r["dataset"] == "seed"
    ]


def tables(
    numbers: Mapping[str, Any],
    cells: Path,
    datasets: Path,
    qualities: Mapping[tuple[str, str], Mapping[tuple[int, int], float]],
    experiment: Experiment,
) -> dict[str, Any]:
    """``transfer_efficiency``, ``quality_correlations`` and ``dose`` of ``results.json``.

    Args:
        numbers: With ``transfer`` and ``room``.
        cells: Folder of the finished grid.
        datasets: Folder of the training sets.
        qualities: Held-out correlation of matches, by source and target, then by feature pair.
        experiment: Configuration.
    """
    metric = grid_task(experiment.tune, experiment.data.positive).metrics[0]
    rows = [r for r in numbers["transfer"] if r["metric"] == metric]
    records = read_json(datasets / "datasets.json")
    names = {r["model"]: name for r, name in zip(numbers["room"], experiment.models, strict=True)}
    found = {
        "transfer_efficiency": transfer_efficiency(rows),
        "quality_correlations": quality_correlations(rows, records, qualities, names, experiment.seed),
    }
    if experiment.tune.dose:
        found["dose"] = dose(load_cells(cells / "dose.json"), records, names, metric)
    return found


def _by_seed(row: Mapping[str, Any]) -> dict[int, float]:
    return dict(zip(row["seeds"], row["values"], strict=True))


def _gains(rows: Sequence[Mapping[str, Any]], arm: str) -> dict[tuple[str, ...], dict[int, float]]:
    """Score less that of the seed data alone, by (recipe, target, source, generator), then by fine-tuning seed.

    Arms without a text of their own are left out.
    """
    base = {(r["recipe"], r["target"]): r for r in rows if r["arm"] == "seed_only"}
    found = {}
    for r in rows:
        alone = base.get((r["recipe"], r["target"]))
        if r["arm"] == arm and alone is not None and r["n_train"] > alone["n_train"]:
            before = _by_seed(alone)
            gains = {s: v - before[s] for s, v in _by_seed(r).items() if s in before}
            found[r["recipe"], r["target"], r["source"], r["generator"]] = gains
    return found


def transfer_efficiency(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """gain(mapped) / gain(own): what of the gain from its own missing features a target gets through an alignment.

    Gains are over the seed data alone, paired by fine-tuning seed; the interval is Fieller's (1954), over seeds. Where
    own features do not surely gain anything there is no ratio (of two losses it would look like a success), and
    ``said`` says so. The own arm is the one that the same model wrote, else the target itself. The last row of each
    recipe (no target) takes the mean over its cells.

    Args:
        rows: Transfer rows of one metric.
    """
    own, mapped = _gains(rows, "own"), _gains(rows, "mapped")
    found: list[dict[str, Any]] = []
    for recipe in dict.fromkeys(at[0] for at in mapped):
        both: list[tuple[dict[int, float], dict[int, float]]] = []
        for at, gain in mapped.items():
            _, target, source, writer = at
            against = own.get((recipe, target, target, writer)) or own.get((recipe, target, target, target))
            if at[0] != recipe or not against:
                continue
            both.append((gain, against))
            place = {"recipe": recipe, "target": target, "source": source, "generator": writer}
            found.append({**place, **_ratio([gain], [against])})
        if len(both) > 1:
            place = {"recipe": recipe, "target": "", "source": "", "generator": ""}
            found.append({**place, **_ratio([m for m, _ in both], [o for _, o in both])})
    return found


def _ratio(mapped: list[dict[int, float]], own: list[dict[int, float]]) -> dict[str, Any]:
    seeds = sorted(set.intersection(*(set(g) for g in (*mapped, *own))))
    row = dict.fromkeys(("gain_mapped", "gain_own", "efficiency", "low", "high")) | {"n_seeds": len(seeds)}
    if not seeds:
        return row | {"said": "no seed in common"}
    top, bottom = (np.array([[g[s] for s in seeds] for g in part]).mean(axis=0) for part in (mapped, own))
    row |= {"gain_mapped": float(top.mean()), "gain_own": float(bottom.mean())}
    value, low, high = stats.ratio_interval(top, bottom)
    if not (bottom.mean() > 0 and np.isfinite(low)):
        return row | {"said": "own features do not surely gain"}
    return row | {"efficiency": value, "low": low, "high": high, "said": ""}


def quality_correlations(
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    qualities: Mapping[tuple[str, str], Mapping[tuple[int, int], float]],
    names: Mapping[str, str],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Does a better alignment transfer better? ``QUALITIES`` of each pair against what mapping gains over random.

    A pair of source and target is one point, whoever wrote: all its writers use the same matches.

    Args:
        rows: Transfer rows of one metric.
        records: Training sets.
        qualities: Held-out correlation of matches, by source and target, then by feature pair.
        names: Name of each model by its reference.
        seed: Of draws and permutations.

    Returns:
        Rows of ``transfer.grid.correlations`` for each recipe, all targets in one group.
    """
    sets = {(r["target"], r["source"], r["generator"]): r for r in records if r["arm"] == "mapped" and r["written"]}
    mapped, random = _gains(rows, "mapped"), _gains(rows, "random")
    found: list[dict[str, Any]] = []
    for recipe in dict.fromkeys(at[0] for at in mapped):
        cells: dict[tuple[str, str], list[tuple[dict[str, float], float]]] = {}
        for (which, target, source, writer), gain in mapped.items():
            record = sets.get((names[target], names[source], names[writer]))
            control = random.get((recipe, target, source, writer), {})
            common = sorted(set(gain) & set(control))
            if which != recipe or record is None or not common:
                continue
            used = {w["feature"] for w in record["written"]}
            corr = [value for (i, _), value in qualities[names[source], names[target]].items() if i in used]
            quality = {
                "heldout_corr": float(np.mean(corr)) if corr else float("nan"),
                "verified": record["n_verified"] / len(record["written"]),
                "n_features": float(record["n_features"]),
            }
            score = float(np.mean([gain[s] - control[s] for s in common]))
            cells.setdefault((target, source), []).append((quality, score))
        points = [
            correlations.Point(
                "all",  # two sources a target are too few to look within targets; the gain is over a control there
                "mapped",
                source,
                {name: float(np.mean([quality[name] for quality, _ in some])) for name in QUALITIES},
                float(np.mean([score for _, score in some])),
            )
            for (target, source), some in cells.items()
        ]
        if points:
            found += [
                {"recipe": recipe, **row.summary()} for row in correlations.correlations(points, QUALITIES, seed=seed)
            ]
    return found


def dose(
    cells: Sequence[CellResult], records: Sequence[Mapping[str, Any]], names: Mapping[str, str], metric: str
) -> list[dict[str, Any]]:
    """Score and missing features of nested parts of the seed data, smallest first.

    Args:
        cells: Of ``dose.json``.
        records: Training sets.
        names: Name of each model by its reference.
        metric: The score.
    """
    parts = {(r["target"], len(r["examples"])): r["coverage"] for r in records if "dose" in r}
    groups: dict[tuple[str, str, int], list[float]] = {}
    for c in cells:
        groups.setdefault((c.recipe, c.target, c.run.n_examples), []).append(c.value(metric))
    found = []
    for (recipe, target, n), values in sorted(groups.items()):
        interval = stats.mean_interval(values)
        row = {"recipe": recipe, "target": target, "metric": metric, "n_seed": n, "mean": interval.value}
        row |= {"low": interval.low, "high": interval.high, "n_seeds": len(values)}
        found.append(plain({**row, **parts[names[target], n]}))
    return found

"""What ``results.json`` holds, gathered from the stages up to the one asked for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from transfer import stages
from transfer.alignment import families
from transfer.core.files import read_json
from transfer.grid import gains, results

if TYPE_CHECKING:
    from transfer.pipeline import Pipeline

STAGES = ("harvest", "align", "cover", "synth", "tune", "eval", "run")
"""In order."""


def numbers_of(pipeline: Pipeline, until: str = "run") -> dict[str, Any]:
    """The numbers up to a stage; the whole of ``results.json`` after the last one."""
    rank = STAGES.index(until)
    pipeline.check(until)
    checks = {name: read_json(folder / "check.json") for name, folder in pipeline.harvests.items()}
    numbers: dict[str, Any] = {
        "data": {"texts": {s: len(c) for s, c in pipeline.corpora.items()}, "unused": pipeline.unused},
        "harvest": [stages.store_summary(n, s, checks[n]) for n, s in pipeline.stores.items()],
    }
    if rank == 0:
        return numbers
    pairs = itertools.permutations(pipeline.experiment.models, 2)
    settings = pipeline.experiment.align
    numbers["alignments"] = [pipeline.alignments[s, t, m].summary() for s, t in pairs for m in settings.methods]
    numbers["carriers"] = [
        {
            "source": a.source.model,
            "target": a.target.model,
            "n_pairs": len(a),
            "q_value": settings.q_value,
        }
        for a in (pipeline.carriers(s, t) for s, t in itertools.permutations(pipeline.experiment.models, 2))
    ]
    numbers.update(families.numbers(pipeline.in_use, settings.q_value, seed=pipeline.experiment.seed))
    numbers["context"] = [row for folder in pipeline.aligned.values() for row in read_json(folder / "context.json")]
    if rank >= 2:
        numbers["coverage"] = [report.summary() for report, _ in pipeline.coverage.values()]
        numbers["room"] = gains.room(numbers["coverage"], pipeline.experiment.cover.least_missing)
        numbers["coverage_curves"] = [
            row for _, folder in pipeline.coverage.values() for row in read_json(folder / "curves.json")
        ]
    if rank >= 3:
        numbers["synthesis"] = [
            row for _, folder in pipeline.written.values() for row in read_json(folder / "rows.json")
        ]
        numbers["coverage"] += read_json(pipeline.datasets / "coverage.json")
        numbers["coverage_contrasts"] = results.coverage_contrasts(numbers["coverage"])
        numbers["diversity"] = read_json(pipeline.diversity / "diversity.json")
    if rank >= 4:
        numbers.update(results.transfer_table(pipeline.cells, pipeline.experiment, numbers["room"]))
        numbers.update(
            gains.tables(numbers, pipeline.cells, pipeline.datasets, _qualities(pipeline), pipeline.experiment)
        )
        failures = pipeline.failed.failures if pipeline.failed else {}
        numbers["failed_cells"] = [{"cell": cell, "problem": problem} for cell, problem in failures.items()]
        numbers.update(results.theory(numbers, pipeline.cells, pipeline.diversity, pipeline.experiment))
        numbers["alerts"] = results.alerts(numbers, pipeline.stores, pipeline.experiment)
        numbers["limits"] = results.limits(pipeline.experiment)
    return numbers


def _qualities(pipeline: Pipeline) -> dict[tuple[str, str], dict[tuple[int, int], float]]:
    """Held-out correlation of each carrier (source feature, target feature), by source and target."""
    found = {}
    for source, target in itertools.permutations(pipeline.experiment.models, 2):
        m = pipeline.carriers(source, target).matches
        pairs = zip(m["source"].tolist(), m["target"].tolist(), strict=True)
        found[source, target] = dict(zip(pairs, m["heldout_corr"].tolist(), strict=True))
    return found

"""From cell results to claims: means with intervals, paired comparisons with controls, plain verdicts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfer.core import stats
from transfer.core.errors import TransferError
from transfer.core.outcomes import TransferResult
from transfer.matrix import ARMS, CellResult

REFERENCE = "seed_only"
PAIRS: tuple[tuple[str, str], ...] = (
    ("mapped", "random"),
    ("mapped", "shuffled"),
    ("own", "random"),
    ("mapped", "generic"),
    ("mapped", "text"),
    ("text", "random"),
    ("text", "generic"),
    ("own", "generic"),
    ("mapped", "k_center"),
    ("mapped", "facility_location"),
    ("mapped", "coverage_selection"),
)
"""(arm, same-budget control): the comparisons that a claim of transfer has to win; those of arms that were not run are
left out."""
CONTROLS = ("random", "shuffled", "generic")
"""Written texts that no missing feature guides: the strongest of them is what a cell is measured against."""
BUDGET_SLACK = 1.02
"""A control with at most this factor fewer examples counts as the same budget."""


@dataclass(frozen=True)
class Comparison:
    """One arm against one control on one target, over the seeds that both have."""

    source: str
    generator: str
    target: str
    recipe: str
    metric: str
    arm: str
    control: str
    control_source: str
    """Source of the control cells; empty for arms without features."""
    delta: float
    low: float
    """Lower end of the paired t interval over seeds (training noise; one evaluation split)."""
    high: float
    p: float
    """Two-sided paired t test, uncorrected."""
    p_holm: float
    """Corrected within the family that was compared together."""
    n_seeds: int
    n_train: int
    n_train_control: int
    mde: float
    """Smallest true delta that these seeds would find with power 0.8."""
    seeds_needed: int | None
    """Seeds that would settle it with power 0.8 if the observed delta were the true one; None above 1,000."""
    verdict: str
    boot_low: float = float("nan")
    """Lower end of the bootstrap over seeds and evaluation examples; NaN when not asked for."""
    boot_high: float = float("nan")
    p_grid: float = float("nan")
    """Holm-corrected over all comparisons of the grid, whatever their pair."""
    control_generator: str = ""
    """Writer of the control cells; empty where nobody wrote."""

    def summary(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Group:
    """The seeds of one arm of one cell of the matrix."""

    source: str
    generator: str
    target: str
    arm: str
    recipe: str
    cells: dict[int, CellResult]

    @property
    def n_train(self) -> int:
        """Training examples; the median where seeds differ."""
        return int(np.median([c.run.n_examples for c in self.cells.values()]))

    def values(self, metric: str, seeds: Sequence[int] | None = None) -> list[float]:
        return [self.cells[s].value(metric) for s in (sorted(self.cells) if seeds is None else seeds)]

    def common(self, other: _Group) -> list[int]:
        return sorted(set(self.cells) & set(other.cells))


def _groups(results: Sequence[CellResult]) -> list[_Group]:
    groups: dict[tuple[str, ...], _Group] = {}
    for r in results:
        at = (r.target, r.recipe, r.source, r.generator, r.arm)
        group = groups.setdefault(at, _Group(r.source, r.generator, r.target, r.arm, r.recipe, {}))
        if r.seed in group.cells:
            raise TransferError(f"Two results for {r.arm} of {r.target} from {r.source or 'no source'}, seed {r.seed}.")
        group.cells[r.seed] = r
    return sorted(groups.values(), key=lambda g: (g.target, g.recipe, ARMS.index(g.arm), g.source, g.generator))


def _control(group: _Group, arm: str, groups: Sequence[_Group], metric: str) -> _Group | None:
    """The control cells nearest to ``group``.

    Same source and generator, else same generator, else same source, else any of the target. Where several are
    equally near, the strongest one, so that a claim is never made against the weaker.
    """
    found = [g for g in groups if (g.target, g.recipe, g.arm) == (group.target, group.recipe, arm) and group.common(g)]

    def nearness(g: _Group) -> tuple[int, float]:
        same_source, same_generator = g.source == group.source, g.generator == group.generator
        return 2 * same_generator + same_source + (same_source and same_generator), float(np.mean(g.values(metric)))

    return max(found, key=nearness, default=None)


def summarise(results: Sequence[CellResult], task: str, metric: str, level: float = 0.95) -> list[TransferResult]:
    """Mean with t interval of every arm, and its paired delta against ``seed_only``.

    The intervals are over fine-tuning seeds only (see ``stats.mean_interval``). Deltas use the seeds that both arms
    have; an arm whose seeds were never trained on seed data alone has none.

    Raises:
        TransferError: When a cell lacks the metric or occurs twice.
    """
    groups = _groups(results)
    rows = []
    for g in groups:
        interval = stats.mean_interval(g.values(metric), level)
        row = TransferResult(
            source=g.source,
            generator=g.generator,
            target=g.target,
            task=task,
            arm=g.arm,
            recipe=g.recipe,
            metric=metric,
            values=tuple(g.values(metric)),
            seeds=tuple(sorted(g.cells)),
            mean=interval.value,
            ci_low=interval.low,
            ci_high=interval.high,
            n_train=g.n_train,
        )
        control = None if g.arm == REFERENCE else _control(g, REFERENCE, groups, metric)
        if control is not None:
            seeds = g.common(control)
            d = stats.paired_delta(g.values(metric, seeds), control.values(metric, seeds), level)
            row = dataclasses.replace(row, control=REFERENCE, delta=d.delta, delta_low=d.low, delta_high=d.high)
        rows.append(row)
    return rows


def compare(
    results: Sequence[CellResult],
    metric: str,
    *,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    margin: float = 0.01,
    alpha: float = 0.05,
    folder: Path | None = None,
    weighted: stats.WeightedMetric | None = None,
) -> list[Comparison]:
    """Every arm against every control of ``pairs``; p values Holm-corrected over the cells of a pair, and over all.

    Arms for which nothing was written (as many examples as the seed data alone) are left out on both sides: they say
    nothing about texts, and an alert tells of them.

    Args:
        results: Cell results.
        metric: Metric name.
        pairs: (arm, control).
        margin: Smallest gain worth having; see ``verdict``.
        alpha: Family-wise level.
        folder: The grid's folder; with ``weighted`` it adds bootstrap bounds over seeds and evaluation examples.
        weighted: The metric under example weights (``Task.weighted``).
    """
    groups = _groups(results)
    seed_sizes = {(g.target, g.recipe): g.n_train for g in groups if g.arm == REFERENCE}
    groups = [g for g in groups if g.arm == REFERENCE or g.n_train > seed_sizes.get((g.target, g.recipe), 0)]
    out: list[Comparison] = []
    for arm, control_arm in pairs:
        family: list[Comparison] = []
        for g in (g for g in groups if g.arm == arm):
            control = _control(g, control_arm, groups, metric)
            if control is not None:
                family.append(_compare(g, control, metric, margin, alpha, folder, weighted))
        out += _judge(family, margin, alpha)
    over_all = stats.holm([c.p for c in out])
    return [dataclasses.replace(c, p_grid=float(p)) for c, p in zip(out, over_all, strict=True)]


def verdict(
    comparisons: Sequence[Comparison], arm: str = "mapped", *, margin: float = 0.01, alpha: float = 0.05
) -> list[Comparison]:
    """The headline: ``arm`` on each target against its strongest same-budget control, Holm-corrected over all of them.

    - ``supported``: the delta is positive and the corrected p value is below ``alpha``.
    - ``not supported``: the 95 % interval lies wholly below ``margin``, so that a gain worth having is ruled out.
    - ``undecided``: anything else, with the seeds that would settle it, or the reason why no number of seeds would.

    Taking the control with the higher mean works against the arm, never for it.
    """
    best: dict[tuple[str, ...], Comparison] = {}
    for c in comparisons:
        at = (c.source, c.generator, c.target, c.recipe)
        # The strongest control is the one that leaves the least gain.
        if c.arm == arm and c.control in CONTROLS and (at not in best or c.delta < best[at].delta):
            best[at] = c
    return _judge(list(best.values()), margin, alpha)


def _compare(
    group: _Group,
    control: _Group,
    metric: str,
    margin: float,
    alpha: float,
    folder: Path | None,
    weighted: stats.WeightedMetric | None,
) -> Comparison:
    seeds = group.common(control)
    d = stats.paired_delta(group.values(metric, seeds), control.values(metric, seeds))
    effect = max(d.delta, margin - d.delta)  # whichever is easier to show: a gain, or less of one than the margin
    low = high = float("nan")
    if folder is not None and weighted is not None:
        labels, treated = _scores(folder, group, seeds)
        other, against = _scores(folder, control, seeds)
        if not np.array_equal(labels, other):
            raise TransferError(f"The score files of {group.arm} and {control.arm} on {group.target} differ in labels.")
        interval = stats.hierarchical_delta(labels, treated, against, weighted)
        low, high = interval.low, interval.high
    return Comparison(
        source=group.source,
        generator=group.generator,
        target=group.target,
        recipe=group.recipe,
        metric=metric,
        arm=group.arm,
        control=control.arm,
        control_source=control.source,
        control_generator=control.generator,
        delta=d.delta,
        low=d.low,
        high=d.high,
        p=d.p,
        p_holm=d.p,
        n_seeds=d.n,
        n_train=group.n_train,
        n_train_control=control.n_train,
        mde=stats.minimum_detectable_effect(d.sd, d.n, alpha),
        seeds_needed=stats.seeds_needed(effect, d.sd, alpha),
        verdict="",
        boot_low=low,
        boot_high=high,
    )


def _scores(folder: Path, group: _Group, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [n] and scores float64 [seeds, n] from the per-example files, in the order of the example ids."""
    rows = []
    for seed in seeds:
        lines = (folder / f"{group.cells[seed].key}.jsonl").read_text("utf8").splitlines()
        rows.append(sorted(map(json.loads, lines), key=lambda row: row["id"]))
    labels = np.array([row["label"] for row in rows[0]], dtype=np.int64)
    return labels, np.array([[row["score"] for row in one] for one in rows], dtype=np.float64)


def _judge(family: list[Comparison], margin: float, alpha: float) -> list[Comparison]:
    """The family with its corrected p values and verdicts."""
    corrected = stats.holm([c.p for c in family])
    return [
        dataclasses.replace(c, p_holm=float(p), verdict=_words(c, float(p), margin, alpha))
        for c, p in zip(family, corrected, strict=True)
    ]


def _words(c: Comparison, p_holm: float, margin: float, alpha: float) -> str:
    if c.n_seeds < 2:
        return "undecided: one seed gives no interval"
    if c.control != REFERENCE and c.n_train > c.n_train_control * BUDGET_SLACK:
        return f"undecided: unequal budget ({c.n_train} examples against {c.n_train_control})"
    if c.delta > 0 and p_holm < alpha:
        return "supported"
    if c.high < margin:
        return "not supported"
    if c.seeds_needed is None:
        return "undecided: would need more than 1000 seeds at this difference"
    # Significant alone but not after correction: the count is for one uncorrected test, so ask for one more at least.
    return f"undecided: would need {max(c.seeds_needed, c.n_seeds + 1)} seeds"

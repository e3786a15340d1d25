"""Which numbers about a training set go with the score it gives: FAC and the text metrics (Table 8).

The paper reports Pearson and Spearman over the methods of one task (FAC and AUPRC .95 and .90 on toxicity, a handful of
points, no interval). Here the points are the cells of a run, and an interval, a permutation test and the correction for
the number of metrics stand beside every coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from transfer.core import stats
from transfer.core.errors import TransferError
from transfer.core.files import plain
from transfer.diversity import METRICS

PREDICTORS = ("fac", "missing_hit_rate", "kl", *METRICS)
"""What is set against the score, in the order shown."""
LEAST_POINTS = 5
"""Below this many cells no coefficient is given."""


@dataclass(frozen=True)
class Point:
    """One cell of a transfer run: what its training set is like, and what it scored."""

    group: str
    """Run and target: cells of one group share a model and its missing features."""
    arm: str
    writer: str
    predictors: dict[str, float]
    score: float
    """Mean over fine-tuning seeds."""


@dataclass(frozen=True)
class Correlation:
    """One predictor against the score."""

    predictor: str
    statistic: str
    """``pearson`` or ``spearman``."""
    pooled: float
    """Over all cells: mixes differences between targets into it."""
    pooled_low: float
    pooled_high: float
    within: float
    """After each target's mean (Spearman: of ranks within the target) is taken off both sides."""
    within_low: float
    within_high: float
    p: float
    """Two-sided permutation test of ``within``, scores exchanged within targets."""
    p_holm: float
    """Holm over the predictors of one statistic."""
    n_points: int
    n_groups: int
    least_to_find: float
    """Smallest true |within| that as many cells would find with power 0.8 (Fisher's z, without correction)."""
    verdict: str

    def summary(self) -> dict[str, Any]:
        """JSON form, null for NaN."""
        return plain(vars(self))


def points(results: dict[str, Any], recipe: str, metric: str, run: str = "") -> list[Point]:
    """Cells of one run that some model wrote for; all of one target have the same number of training texts.

    Arms without written texts are left out: the seed data alone and the full data differ in size, too, and size alone
    moves both coverage and score.

    Args:
        results: ``results.json`` with ``coverage``, ``diversity`` and ``transfer``.
        recipe: Recipe of the cells.
        metric: Score, such as ``auprc``.
        run: Name of the run, where several are taken together.
    """
    covered = {(row["model"], row["arm"], row["writer"]): row for row in results.get("coverage", []) if row.get("arm")}
    known: dict[tuple[str, ...], dict[str, float]] = {}
    writers: dict[tuple[str, ...], str] = {}
    for row in results.get("diversity", []):
        both = {**row, **covered.get((row["target"], row["arm"], row["writer"]), {})}
        if row["writer"] and "fac" in both:
            at = (row["target"], row["arm"], row.get("source", row["generator"]), row["generator"])
            known[at] = {name: float(both[name]) for name in PREDICTORS if both.get(name) is not None}
            writers[at] = row["writer"]
    found = []
    for row in results.get("transfer", []):
        at = (row["target"], row["arm"], row["source"], row["generator"])
        if (row["recipe"], row["metric"]) == (recipe, metric) and at in known:
            group = f"{run} {at[0]}" if run else at[0]
            found.append(Point(group, at[1], writers[at], known[at], float(row["mean"])))
    return sorted(found, key=lambda p: (p.group, p.arm, p.writer))


def correlations(
    cells: Sequence[Point],
    predictors: Iterable[str] = PREDICTORS,
    *,
    level: float = 0.95,
    n_draws: int = 2000,
    seed: int = 0,
) -> list[Correlation]:
    """Table 8: every predictor against the score.

    - ``pooled`` is over all cells; its interval draws groups with replacement, then cells within each (with three
      targets it is wide and still optimistic).
    - ``within`` removes each group's mean from both sides, in every draw anew; its interval draws cells within the
      groups that there are. It answers what the paper's table asks: of two training sets for one target, does the one
      with the higher number score better?

    Scores carry the noise of their few fine-tuning seeds, which pulls coefficients towards zero. Arms differ in more
    than the predictor; a coefficient is no effect.

    Args:
        cells: The points; two groups may have different numbers of cells.
        predictors: Names; a predictor that some cell lacks is reported as not measured.
        level: Of the intervals.
        n_draws: Bootstrap draws, and permutations.
        seed: Of both.

    Returns:
        Two rows a predictor, Pearson and Spearman. Memory: 8 * n_draws * cells bytes, several times over.

    Raises:
        TransferError: For no cell.
    """
    if not cells:
        raise TransferError(
            "There is no cell with coverage, diversity and a score.", "Finish the run with `transfer run`."
        )
    groups = np.unique([p.group for p in cells], return_inverse=True)[1]
    n_groups = int(groups.max()) + 1
    score = np.array([p.score for p in cells])
    rng = np.random.default_rng([seed, len(cells)])
    nested, stratified = _cluster_draws(groups, n_draws, rng), _stratified(groups, n_draws, rng, replace=True)
    shuffles = _stratified(groups, n_draws, rng, replace=False)
    counts: dict[str, Any] = {"n_points": len(cells), "n_groups": n_groups}
    counts["least_to_find"] = _least_to_find(len(cells) - n_groups)
    rows: list[Correlation] = []
    for statistic in ("pearson", "spearman"):
        family: list[Correlation] = []
        for name in predictors:
            x = np.array([p.predictors.get(name, math.nan) for p in cells])
            nothing = dict.fromkeys(
                ("pooled", "pooled_low", "pooled_high", "within", "within_low", "within_high", "p", "p_holm"), math.nan
            )
            why = _unusable(x, groups, score)
            if why:
                family.append(Correlation(name, statistic, **nothing, **counts, verdict=why))
                continue
            order = np.arange(len(cells))[None, :]
            pooled, within = (
                float(_coefficient(x[order], score[order], groups[order] if inside else None, statistic)[0])
                for inside in (False, True)
            )
            at = [_coefficient(x[d], score[d], None, statistic) for d in nested]
            low, high = _ends(np.concatenate(at), level)
            inner = _coefficient(x[stratified], score[stratified], groups[stratified], statistic)
            inner_low, inner_high = _ends(inner, level)
            null = _coefficient(np.broadcast_to(x, shuffles.shape), score[shuffles], groups[order], statistic)
            as_far = int(np.sum(np.abs(null) >= abs(within) - 1e-12))
            family.append(
                Correlation(
                    predictor=name,
                    statistic=statistic,
                    pooled=pooled,
                    pooled_low=low,
                    pooled_high=high,
                    within=within,
                    within_low=inner_low,
                    within_high=inner_high,
                    p=(1 + as_far) / (1 + n_draws),
                    p_holm=math.nan,
                    **counts,
                    verdict="",
                )
            )
        for row, p in zip(family, stats.holm([r.p for r in family]), strict=True):
            said = row.verdict or _verdict(row, float(p), 1 - level)
            rows.append(Correlation(**{**vars(row), "p_holm": float(p), "verdict": said}))
    return rows


def table(runs: dict[str, dict[str, Any]], metric: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """``diversity_correlations`` of one run or several: rows of ``correlations`` for each recipe.

    Args:
        runs: ``results.json`` by name of the run.
        metric: The score; by default the first of the first run, which its claims are about.
        seed: Of draws and permutations.

    Returns:
        No row where no cell has all three kinds of numbers.

    Raises:
        TransferError: For a score that no run has.
    """
    transfer = [row for results in runs.values() for row in results.get("transfer", [])]
    score = metric or (str(transfer[0]["metric"]) if transfer else "")
    if transfer and score not in {row["metric"] for row in transfer}:
        known = ", ".join(dict.fromkeys(row["metric"] for row in transfer))
        raise TransferError(f"No run has the score {score!r}.", f"There is: {known}.")
    found = []
    for recipe in dict.fromkeys(row["recipe"] for row in transfer if row["metric"] == score):
        cells = [p for name, r in runs.items() for p in points(r, recipe, score, name if len(runs) > 1 else "")]
        if cells:
            rows = correlations(cells, seed=seed)
            found += [{"recipe": recipe, "metric": score, **row.summary()} for row in rows]
    return found


def _least_to_find(freedom: int) -> float:
    from scipy.stats import norm

    return float(np.tanh((norm.ppf(0.975) + norm.ppf(0.8)) / math.sqrt(freedom - 2))) if freedom > 2 else math.nan


def _unusable(x: np.ndarray, groups: np.ndarray, score: np.ndarray) -> str:
    """Why a predictor has no coefficient; empty where it has."""
    if len(x) < LEAST_POINTS:
        return f"undecided: only {len(x)} cells"
    if np.isnan(x).any():
        return f"not measured in {int(np.isnan(x).sum())} of {len(x)} cells"
    for what, values in (("the number", x), ("the score", score)):
        if max(np.ptp(values[groups == g]) for g in range(groups.max() + 1)) == 0:
            return f"undefined: {what} is the same in all cells of each target"
    return ""


def _verdict(row: Correlation, p_holm: float, alpha: float) -> str:
    if not (row.within_low > 0 or row.within_high < 0):
        return "undecided"
    way = "goes with the score" if row.within > 0 else "goes against the score"
    return way if p_holm < alpha else f"undecided after correction ({way} alone)"


def _coefficient(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None, statistic: str) -> np.ndarray:
    """Pearson or Spearman of each row of two blocks [draws, points]; NaN where one side is constant."""
    if groups is not None:
        groups = np.broadcast_to(groups, x.shape)
        x, y = (_centred(side, groups, ranks=statistic == "spearman") for side in (x, y))
    elif statistic == "spearman":
        x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    # Constant sides leave rounding errors, not zeros.
    usable = spread > 1e-12 * np.maximum(np.abs(x).max() * np.abs(y).max(), 1e-300)
    return np.divide((x * y).sum(axis=1), spread, out=np.full(len(x), np.nan), where=usable)


def _centred(values: np.ndarray, groups: np.ndarray, ranks: bool) -> np.ndarray:
    """Values (or their ranks within the group) less their group's mean, row by row."""
    out = np.empty(values.shape)
    for g in range(int(groups.max()) + 1):
        # Groups stand at the same places in every row: draws are made within them.
        here = groups[0] == g
        part = _ranks(values[:, here]) / here.sum() if ranks else values[:, here]
        out[:, here] = part - part.mean(axis=1, keepdims=True)
    return out


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return cast(np.ndarray, rankdata(values, axis=1))


def _ends(drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Percentile interval; NaN where fewer than half of the draws have a coefficient."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < len(drawn) / 2:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _stratified(groups: np.ndarray, n_draws: int, rng: np.random.Generator, *, replace: bool) -> np.ndarray:
    """Places of cells drawn (or permuted) within their groups, int [draws, points]."""
    out = np.empty((n_draws, len(groups)), dtype=np.int64)
    for g in range(int(groups.max()) + 1):
        here = np.flatnonzero(groups == g)
        if replace:
            out[:, here] = here[rng.integers(len(here), size=(n_draws, len(here)))]
        else:
            out[:, here] = rng.permuted(np.tile(here, (n_draws, 1)), axis=1)
    return out


def _cluster_draws(groups: np.ndarray, n_draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Groups drawn with replacement, then cells within each; one block [draws, points] for each number of points."""
    members = [np.flatnonzero(groups == g) for g in range(int(groups.max()) + 1)]
    by_length: dict[int, list[np.ndarray]] = {}
    for chosen in rng.integers(len(members), size=(n_draws, len(members))):
        row = np.concatenate([rng.choice(members[g], size=len(members[g])) for g in chosen])
        by_length.setdefault(len(row), []).append(row)
    return [np.array(rows) for rows in by_length.values()]

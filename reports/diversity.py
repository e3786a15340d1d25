"""Text diversity, Table 8 and the computable bounds: the figure, and the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.drawing import (
    BLUE,
    GREY,
    INK,
    MAX_ROWS,
    Drawing,
    finish,
    grouped_rows,
    height_of,
    interval,
    new_figure,
    point,
    styled,
)
from reports.load import TEXT_METRICS, Row
from reports.words import arm_rank, metric_name, spread

LABELS = {
    "fac": "FAC",
    "missing_hit_rate": "hit rate over missing",
    "kl": "feature KL (lower covers more)",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "ead_1": "expectation-adjusted distinct-1",
    "rarefied_1": "rarefied distinct-1",
    "rarefied_2": "rarefied distinct-2",
    "entropy_1": "word entropy",
    "entropy_2": "bigram entropy",
    "self_bleu": "self-BLEU (lower is diverse)",
    "pos_distinct_2": "POS distinct-2",
    "cosine_distance": "mean cosine distance",
    "semantic_entropy": "semantic entropy",
    "vendi": "Vendi score",
}
QUANTITIES = {
    "surrogate_tv": "total variation of the feature sets",
    "tv": "bound on it from the divergence",
    "tv_loss": "its term in the loss",
    "entropy_words": "entropy of a text, by words",
    "entropy_model": "entropy of a text, by the writer",
    "information": "information of the texts",
    "gap": "size of the expected gap",
    "gap_absolute": "expected size of the gap",
    "transfer": "bound on the error",
}
COVERAGE = ("fac", "missing_hit_rate", "kl")


def label(name: Any) -> str:
    """What a predictor, metric or quantity is called."""
    return LABELS.get(str(name)) or QUANTITIES.get(str(name)) or str(name).replace("_", " ")


def _rank(name: Any) -> tuple[int, str]:
    known = list(LABELS)
    return (known.index(name) if name in known else len(known), str(name))


def sorted_sets(rows: Sequence[Row]) -> list[Row]:
    """By target, arm and writer."""
    return sorted(rows, key=lambda r: (str(r["target"]), arm_rank(str(r["arm"])), str(r["writer"] or "")))


def sorted_efficiency(rows: Sequence[Row]) -> list[Row]:
    """By recipe, target, arm and writer."""
    return sorted(
        rows, key=lambda r: (str(r["recipe"]), str(r["target"]), arm_rank(str(r["arm"])), str(r["generator"] or ""))
    )


def sorted_correlations(rows: Sequence[Row]) -> list[Row]:
    """By score, recipe and predictor; Pearson before Spearman."""
    return sorted(rows, key=lambda r: (str(r["metric"]), str(r["recipe"]), _rank(r["predictor"]), str(r["statistic"])))


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Text metrics that some set has."""
    return [metric for metric in TEXT_METRICS if any(row[metric] is not None for row in rows)]


def unmeasured(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """(metric, why it was not measured, in how many sets)."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        reasons = row["reasons"] if isinstance(row["reasons"], dict) else {}
        for metric, why in reasons.items():
            counts[metric, str(why)] = counts.get((metric, str(why)), 0) + 1
    return [(label(metric), why, n) for (metric, why), n in sorted(counts.items(), key=lambda c: _rank(c[0][0]))]


def embeddings(rows: Sequence[Row]) -> str:
    """What embedded the texts."""
    return ", ".join(sorted({str(row["embedding"]) for row in rows if row["embedding"]}))


def figure(rows: Sequence[Row]) -> Drawing | None:
    """Pearson within targets with intervals, one row a predictor, around a line at zero."""
    rows = [r for r in sorted_correlations(rows) if r["statistic"] == "pearson" and r["within"] is not None]
    if not rows:
        return None
    drawn = rows[:MAX_ROWS]
    recipes = list(dict.fromkeys((str(r["metric"]), str(r["recipe"])) for r in drawn))
    with styled():
        parts = [[r for r in drawn if (str(r["metric"]), str(r["recipe"])) == at] for at in recipes]
        groups = [
            (f"{metric_name(metric)}, {recipe}", [label(r["predictor"]) for r in part])
            for (metric, recipe), part in zip(recipes, parts, strict=True)
        ]
        picture, (axes,) = new_figure(5.2, height_of(groups) - 0.25)
        for part, places in zip(parts, grouped_rows(axes, groups), strict=True):
            for row, y in zip(part, places, strict=True):
                colour = BLUE if row["predictor"] in COVERAGE else GREY
                interval(axes, row["within_low"], row["within_high"], y, colour)
                point(axes, row["within"], y, colour)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
        axes.set_xlim(-1, 1)
        axes.set_xlabel("correlation with the score within targets")
        fac = [r["within"] for r in rows if r["predictor"] == "fac"]
        text = [r["within"] for r in rows if r["predictor"] not in COVERAGE]
        title = f"FAC goes with the score at r = {spread(fac)}; the text metrics at {spread(text)}"
        note = f" Drawn: the first {MAX_ROWS} of {len(rows)} rows." if len(rows) > MAX_ROWS else ""
        caption = (
            f"n = {spread(r['n_points'] for r in rows)} training sets of {spread(r['n_groups'] for r in rows)} "
            "targets; each target's mean is removed. Lines are 95 % bootstrap intervals; one that crosses 0 is "
            f"undecided. Blue: coverage; grey: text metrics.{note}"
        )
        return finish(picture, "diversity", title, caption)

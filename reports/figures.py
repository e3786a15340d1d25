"""The figures, one function each: the title is the finding, n and interval stand in the caption, grey is control.

Nothing is estimated here. Every mark is a number of ``results.json``; titles quote the smallest and largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.drawing import (
    ARM_COLOURS,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    MAX_ROWS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Drawing,
    finish,
    grouped_rows,
    height_of,
    interval,
    key,
    legend,
    new_figure,
    point,
    styled,
)
from reports.load import Row, check_results
from reports.order import (
    arms_run,
    cell_name,
    cell_of,
    column_of,
    comparison_name,
    dataset_arm,
    headline,
    lacks_control,
    pair_name,
    sorted_alignments,
    sorted_comparisons,
    sorted_coverage,
    sorted_transfer,
    transfer_columns,
)
from reports.words import CONTROL_ARMS, Names, arm_name, arm_rank, metric_name, number, spread
from transfer.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Groups = list[tuple[str, list[str]]]


def _grouped(rows: Sequence[Row], heading: Callable[[Row], str], label: Callable[[Row], str]) -> tuple[Groups, str]:
    """Consecutive rows with the same heading; the second value is a caption note when rows were left out."""
    groups: Groups = []
    for row in rows[:MAX_ROWS]:
        if not groups or groups[-1][0] != heading(row):
            groups.append((heading(row), []))
        groups[-1][1].append(label(row))
    return groups, f" Drawn: the first {MAX_ROWS} of {len(rows)} rows." if len(rows) > MAX_ROWS else ""


def _flat(positions: list[list[float]]) -> list[float]:
    return [y for group in positions for y in group]


# Alignment strength.


def _draw_alignment(axes: Axes, rows: Sequence[Row], names: Names) -> str:
    groups, note = _grouped(rows, lambda r: pair_name(r, names), lambda r: str(r["method"]))
    for row, y in zip(rows, _flat(grouped_rows(axes, groups)), strict=False):
        real, null = row["heldout_corr_median"], row["null_corr_median"]
        if real is not None and null is not None:
            axes.plot([null, real], [y, y], "-", color=FAINT, linewidth=2.2, zorder=1)
        if null is not None:
            point(axes, null, y, GREY)
        if real is not None:
            point(axes, real, y, BLUE, hollow=row["converged"] is False)
            side = -1 if null is not None and real < null else 1
            axes.annotate(
                number(real),
                (real, y),
                xytext=(6 * side, 0),
                textcoords="offset points",
                va="center",
                ha="left" if side > 0 else "right",
                fontsize=8.5,
            )
    axes.set_xlabel("median correlation on held-out documents")
    axes.margins(x=0.12)
    handles = [key("matched features", BLUE), key("shuffled-corpus null", GREY)]
    if any(r["converged"] is False for r in rows):
        handles.append(key("not converged", BLUE, hollow=True))
    legend(axes, handles)
    return note


def alignment(rows: Sequence[Row], names: Names) -> Drawing | None:
    """Held-out correlation of the matches against the shuffled-corpus null, per pair and method."""
    rows = sorted_alignments(rows)
    if not rows:
        return None
    with styled():
        groups, _ = _grouped(rows, lambda r: pair_name(r, names), lambda r: str(r["method"]))
        figure, (axes,) = new_figure(5.2, height_of(groups))
        note = _draw_alignment(axes, rows, names)
        title = (
            f"Matched features correlate {spread(r['heldout_corr_median'] for r in rows)} on held-out documents; "
            f"the null {spread(r['null_corr_median'] for r in rows)}"
        )
        caption = (
            f"Medians over the matches of each alignment (n = {spread(r['n_matches'] for r in rows)} matches); "
            f"the grey point is the same matches under a shuffled corpus.{note}"
        )
        return finish(figure, "alignment", title, caption)


# Coverage.


def _arm_colour(arm: str) -> str:
    return ARM_COLOURS.get(arm, PURPLE)


def coverage(rows: Sequence[Row], names: Names) -> Drawing | None:
    """Feature Activation Coverage before and after, per model, with intervals."""
    rows = sorted_coverage(rows)
    if not rows:
        return None
    with styled():
        groups, note = _grouped(rows, lambda r: names(r["model"]), lambda r: str(r["dataset"]).replace("_", " "))
        figure, (axes,) = new_figure(5.2, height_of(groups) - 0.25)
        for row, y in zip(rows, _flat(grouped_rows(axes, groups)), strict=False):
            if row["fac"] is None:
                axes.plot([0], [y], "x", color=INK, markersize=5)
                continue
            axes.barh(y, row["fac"], height=0.62, color=_arm_colour(dataset_arm(row)))
            interval(axes, row["ci_low"], row["ci_high"], y, INK)
            end = max(v for v in (row["fac"], row["ci_high"]) if v is not None)
            axes.annotate(
                number(row["fac"]), (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        axes.set_xlim(left=0)
        axes.margins(x=0.14)
        axes.set_xlabel("Feature Activation Coverage (FAC)")
        before = [r["fac"] for r in rows if dataset_arm(r) == "seed_only"]
        after = [r["fac"] for r in rows if dataset_arm(r) not in CONTROL_ARMS]
        title = f"Coverage {spread(before)} before" + (f", {spread(after)} with written data" if after else "")
        caption = (
            f"Share of the anchor's features that a dataset activates (n = {spread(r['n_anchor'] for r in rows)} "
            f"anchor features); lines are intervals; grey bars are the seed data and the controls.{note}"
        )
        return finish(figure, "coverage", title, caption)


# Synthesis funnel.


def funnel(rows: Sequence[Row], names: Names) -> Drawing | None:
    """Where the candidate texts of each synthesis went: kept, or rejected for which reason."""
    if not rows:
        return None
    rows = sorted(rows, key=lambda r: (str(r["source"]), str(r["generator"]), str(r["pool"])))
    reasons = sorted({reason for row in rows for reason in row["rejected"]})
    shades = (SKY, ORANGE, PURPLE, YELLOW, GREY, VERMILLION, FAINT)
    colours = {reason: shades[i % len(shades)] for i, reason in enumerate(reasons)}
    with styled():
        from matplotlib.patches import Patch

        def label(row: Row) -> str:
            writer = names(row["generator"])
            pool = "" if row["pool"] is None else f"{row['pool']} features"
            return (
                " · ".join(w for w in (pool, f"by {writer}" if writer != names(row["source"]) else "") if w) or writer
            )

        groups, note = _grouped(rows, lambda r: f"{names(r['source'])} features", label)
        legend_rows = -(-(len(reasons) + 1) // 2)
        figure, (axes,) = new_figure(5.2, height_of(groups) + 0.17 * legend_rows)
        for row, y in zip(rows, _flat(grouped_rows(axes, groups)), strict=False):
            left = 0.0
            parts = [(row["n_kept"], GREEN), *((row["rejected"].get(r), colours[r]) for r in reasons)]
            for size, colour in parts:
                axes.barh(y, size or 0, left=left, height=0.62, color=colour)
                left += size or 0
        axes.set_xlabel("candidate texts")
        handles = [Patch(color=GREEN, label="kept")]
        handles += [Patch(color=colours[r], label=f"rejected: {r.replace('_', ' ')}") for r in reasons]
        legend(axes, handles, columns=2)
        kept, of = spread(r["n_kept"] for r in rows), spread(r["n_candidates"] for r in rows)
        title = f"Kept {kept} of {of} candidate texts a run"
        caption = (
            f"One bar a run; asked for n = {spread(r['n_requested'] for r in rows)} features; the green part went into "
            f"the training data.{note}"
        )
        return finish(figure, "funnel", title, caption)


# Transfer matrix.


def _draw_transfer(panels: Sequence[Axes], rows: Sequence[Row], names: Names) -> str:
    cells = sorted({cell_of(r): r for r in rows}.values(), key=cell_of)
    groups, note = _grouped(cells, lambda r: names(r["target"]), lambda r: cell_name(r, names))
    ys = _flat(grouped_rows(panels[0], groups))
    place = {cell_of(cell): y for cell, y in zip(cells, ys, strict=False)}
    run = arms_run(rows)
    for axes, column in zip(panels, transfer_columns(rows), strict=False):
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        edge = min((r["mean"] for r in rows if column_of(r) == column and r["mean"] is not None), default=0.0)
        for row in rows:
            y = place.get(cell_of(row))
            if column_of(row) != column or y is None:
                continue
            colour = _arm_colour(str(row["arm"]))
            if row["mean"] is None:
                axes.plot([edge], [y], "x", color=INK, markersize=5)
                continue
            interval(axes, row["ci_low"], row["ci_high"], y, colour)
            seeds = [v for v in row["values"] if v is not None]
            axes.plot(seeds, [y] * len(seeds), "|", color=colour, markersize=5, markeredgewidth=0.8)
            point(axes, row["mean"], y, colour, hollow=lacks_control(row, run))
        axes.set_xlabel(", ".join(w for w in (metric_name(column[2]), column[1]) if w))
        axes.margins(x=0.08)
        if len({c[0] for c in transfer_columns(rows)}) > 1:
            axes.set_title(column[0])
    return note


def transfer_matrix(rows: Sequence[Row], names: Names) -> Drawing | None:
    """Mean and interval of each arm, targets down the side, one column a task, recipe and metric."""
    everything = len(transfer_columns(rows))
    rows = sorted_transfer(headline(rows))
    if not rows:
        return None
    with styled():
        cells = sorted({cell_of(r): r for r in rows}.values(), key=cell_of)
        groups, _ = _grouped(cells, lambda r: names(r["target"]), lambda r: cell_name(r, names))
        columns = transfer_columns(rows)
        width = 5.2 if len(columns) == 1 else 2.1 + 2.2 * len(columns)
        figure, panels = new_figure(width, height_of(groups) + 0.2, len(columns), sharey=True)
        note = _draw_transfer(panels, rows, names)
        entries = [("mapped", VERMILLION), ("own", BLUE), ("full data", GREEN), ("control", GREY)]
        handles = [key(label, colour) for label, colour in entries]
        run = arms_run(rows)
        if any(lacks_control(r, run) for r in rows):
            handles.append(key("no control", INK, hollow=True))
        figure.legend(handles=handles, loc="outside upper left", ncols=5, handletextpad=0.2, columnspacing=1.1)
        first = [r for r in rows if column_of(r) == columns[0]]
        arms = sorted({str(r["arm"]) for r in first}, key=arm_rank)
        parts = [f"{arm_name(arm)} {spread(r['mean'] for r in first if r['arm'] == arm)}" for arm in arms]
        title = f"{', '.join(w for w in (metric_name(columns[0][2]), columns[0][1]) if w)}: {'; '.join(parts)}"
        if everything > len(columns):
            note += " Other metrics are in the tables."
        caption = (
            f"Points are means over seeds (n = {spread(r['n_seeds'] for r in rows)}), lines intervals, ticks single "
            f"seeds; grey arms are controls, a hollow point has no control, a cross was not scored.{note}"
        )
        return finish(figure, "transfer", title, caption)


# Comparisons.


def comparisons(rows: Sequence[Row], names: Names) -> Drawing | None:
    """Gain of each arm over its control, with interval, around a line at no gain."""
    rows = sorted_comparisons(rows)
    if not rows:
        return None
    with styled():
        groups, note = _grouped(rows, lambda r: names(r["target"]), lambda r: comparison_name(r, names))
        figure, (axes,) = new_figure(5.2, height_of(groups) - 0.25)
        for row, y in zip(rows, _flat(grouped_rows(axes, groups)), strict=False):
            colour = _arm_colour(str(row["arm"]))
            interval(axes, row["low"], row["high"], y, colour)
            if row["delta"] is not None:
                point(axes, row["delta"], y, colour)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
        axes.set_xlabel("gain over the control (0 = no gain)")
        axes.margins(x=0.08)
        title = f"Gains over the controls: {spread(r['delta'] for r in rows)}"
        caption = f"n = {len(rows)} comparisons; lines are intervals; a line that crosses 0 is no proven gain.{note}"
        return finish(figure, "comparisons", title, caption)


def overview(results: dict[str, Any], path: Path) -> Path:
    """One PNG for the README: alignment strength beside the first column of the transfer matrix.

    Args:
        results: What ``results.json`` holds.
        path: Where the picture goes; written atomically.

    Raises:
        TransferError: When a row lacks a column.
    """
    checked = check_results(results)
    left, cells = sorted_alignments(checked["alignments"]), sorted_transfer(headline(checked["transfer"]))
    cells = [r for r in cells if column_of(r) == transfer_columns(cells)[0]]
    names = Names([r[side] for r in (*left, *cells) for side in ("source", "target") if r[side]])
    with styled():
        from matplotlib.figure import Figure

        heights = [height_of(_grouped(left, lambda r: pair_name(r, names), lambda r: "")[0])]
        heights.append(height_of(_grouped(cells, lambda r: names(r["target"]), lambda r: "")[0]))
        figure = Figure(figsize=(10.5, max(*heights, 2.5)), layout="constrained", facecolor="white")
        halves = figure.add_gridspec(1, 2)
        panels = []
        for half, height in zip((halves[0], halves[1]), heights, strict=True):
            # Rows are equally high on both sides: the shorter side leaves room below.
            room = max(*heights, 2.5) - height
            parts = half.subgridspec(2 if room > 0.3 else 1, 1, height_ratios=[height, room] if room > 0.3 else None)
            panels.append(figure.add_subplot(parts[0]))
        first, second = panels
        for axes, drawn, draw in (
            (first, left, lambda: _draw_alignment(first, left, names)),
            (second, cells, lambda: _draw_transfer([second], cells, names)),
        ):
            if drawn:
                draw()
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "nothing recorded", ha="center", va="center", transform=axes.transAxes)
        if cells:
            entries = [("mapped", VERMILLION), ("own", BLUE), ("full data", GREEN), ("control", GREY)]
            legend(second, [key(label, colour) for label, colour in entries], columns=4)
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path

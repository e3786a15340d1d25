"""Families across models: the figure of the shares, and what the section says of pairs that could not be compared."""

from __future__ import annotations

from collections.abc import Sequence

from reports.drawing import (
    BLUE,
    INK,
    MAX_ROWS,
    ORANGE,
    SKY,
    Drawing,
    finish,
    grouped_rows,
    height_of,
    interval,
    legend,
    new_figure,
    styled,
)
from reports.load import Row
from reports.words import Names, spread

PARTS = (("universal", BLUE), ("shared", SKY), ("private", ORANGE))
MEASURES = ("cka", "svcca", "rsa", "knn")
"""In the order shown."""


def sorted_shares(rows: Sequence[Row]) -> list[Row]:
    """By model, then space."""
    return sorted(rows, key=lambda r: (str(r["model"]), str(r["space"] or "")))


def sorted_compositions(rows: Sequence[Row]) -> list[Row]:
    """By what goes to what, then the model in the middle."""
    return sorted(rows, key=lambda r: (str(r["source"]), str(r["target"]), str(r["through"])))


def sorted_context(rows: Sequence[Row]) -> list[Row]:
    """By pair, then measure."""

    def rank(row: Row) -> tuple[int, str]:
        name = str(row["measure"])
        return (MEASURES.index(name) if name in MEASURES else len(MEASURES), name)

    return sorted(rows, key=lambda r: (str(r["source"]), str(r["target"]), rank(r)))


def pairs_without_context(alignments: Sequence[Row], context: Sequence[Row], names: Names) -> list[str]:
    """Pairs that were aligned and whose decoders were not compared, each once."""
    there = {frozenset((str(r["source"]), str(r["target"]))) for r in context}
    pairs = {frozenset((str(r["source"]), str(r["target"]))) for r in alignments} - there
    return sorted(" – ".join(sorted(names(model) for model in pair)) for pair in pairs)


def figure(rows: Sequence[Row], names: Names) -> Drawing | None:
    """Universal, shared and private features of each model as stacked bars with intervals at the joints."""
    rows = [r for r in sorted_shares(rows) if all(r[part] is not None for part, _ in PARTS)]
    if not rows:
        return None
    with styled():
        from matplotlib.patches import Patch

        drawn = rows[:MAX_ROWS]
        groups = [("testable features of", [names(r["model"]) for r in drawn])]
        figure, (axes,) = new_figure(5.2, height_of(groups))
        for row, y in zip(drawn, grouped_rows(axes, groups)[0], strict=True):
            left = 0.0
            for part, colour in PARTS:
                axes.barh(y, row[part], left=left, height=0.62, color=colour)
                left += row[part]
            interval(axes, row["universal_low"], row["universal_high"], y, INK)
            # Private features are counted from the right.
            low, high = row["private_low"], row["private_high"]
            interval(axes, None if high is None else 1 - high, None if low is None else 1 - low, y, INK)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the testable features")
        legend(axes, [Patch(color=colour, label=part) for part, colour in PARTS])
        title = (
            f"{spread(r['universal'] for r in rows)} of the testable features belong to a family of all models; "
            f"{spread(r['private'] for r in rows)} have no accepted match"
        )
        note = f" Drawn: the first {MAX_ROWS} of {len(rows)} rows." if len(rows) > MAX_ROWS else ""
        caption = (
            f"One bar a model (n = {spread(r['n_testable'] for r in rows)} testable features). Lines are 95 % "
            "intervals of the universal share, and of the private share counted from the right; that of the shared "
            f"one is in the table. Private includes matches that were missed.{note}"
        )
        return finish(figure, "families", title, caption)

"""The order in which rows are shown, what each is called, and which cells lack their control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.load import Row
from reports.words import CONTROL_ARMS, Names, arm_name, arm_rank


def pair_name(row: Row, names: Names) -> str:
    """``source → target``."""
    return f"{names(row['source'])} → {names(row['target'])}"


def sorted_alignments(rows: Sequence[Row]) -> list[Row]:
    """By pair, then method."""
    return sorted(rows, key=lambda r: (str(r["source"]), str(r["target"]), str(r["method"])))


def dataset_arm(row: Row) -> str:
    """The arm a coverage row belongs to: its own word for it, else the first word after ``seed +``."""
    words = str(row["dataset"]).removeprefix("seed").strip(" +").split()
    return str(row["arm"] or (words[0] if words else "seed_only"))


def sorted_coverage(rows: Sequence[Row]) -> list[Row]:
    """By model; the seed data first, then by arm."""
    return sorted(rows, key=lambda r: (str(r["model"]), arm_rank(dataset_arm(r)), str(r["dataset"])))


def transfer_columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(task, recipe, metric) combinations, each one column of the matrix; metrics in the order of the file."""
    metrics = list(dict.fromkeys(str(r["metric"]) for r in sorted(rows, key=_place)))
    return sorted({column_of(r) for r in rows}, key=lambda c: (c[0], metrics.index(c[2]), c[1]))


def _place(row: Row) -> int:
    """Where the row stood in its file; 0 when that is not known, which keeps the order given."""
    return int(str(row.get("at", "0")).rsplit(".", 1)[-1])


def headline(rows: Sequence[Row]) -> list[Row]:
    """The cells of each task's first metric: the one that claims are about, and the one that is drawn."""
    first: dict[str, str] = {}
    for row in sorted(rows, key=_place):
        first.setdefault(str(row["task"]), str(row["metric"]))
    return [r for r in rows if first[str(r["task"])] == str(r["metric"])]


def column_of(row: Row) -> tuple[str, str, str]:
    """The (task, recipe, metric) of a cell."""
    return (str(row["task"]), str(row["recipe"] or ""), str(row["metric"]))


def sorted_transfer(rows: Sequence[Row]) -> list[Row]:
    """By column, target, arm and source."""
    columns = transfer_columns(rows)
    return sorted(rows, key=lambda r: (columns.index(column_of(r)), *cell_of(r)))


def cell_of(row: Row) -> tuple[Any, ...]:
    """Sort key and identity of a cell within its column."""
    return (str(row["target"]), arm_rank(row["arm"]), str(row["source"] or ""), str(row["generator"] or ""))


def arms_run(rows: Sequence[Row]) -> set[tuple[Any, ...]]:
    """(column, target, arm) of every cell."""
    return {(column_of(r), str(r["target"]), str(r["arm"])) for r in rows}


def lacks_control(row: Row, run: set[tuple[Any, ...]]) -> bool:
    """Whether a treated cell has no control: none is named, or the named arm was not run in the same column.

    Args:
        row: The cell.
        run: What ``arms_run`` says of all cells.
    """
    if row["arm"] in CONTROL_ARMS:
        return False
    return not row["control"] or (column_of(row), str(row["target"]), str(row["control"])) not in run


def cell_name(row: Row, names: Names) -> str:
    """Arm, and whose features or words it used where that is not the target itself."""
    words = arm_name(str(row["arm"]))
    source, writer = names(row["source"]), names(row["generator"])
    if source and source != names(row["target"]):
        words += f" ← {source}"
    if writer and writer not in (source, names(row["target"])):
        words += f" (by {writer})"
    return words


def sorted_comparisons(rows: Sequence[Row]) -> list[Row]:
    """By target, recipe, arm, control and source."""
    return sorted(
        rows,
        key=lambda r: (
            str(r["target"]),
            str(r["recipe"] or ""),
            arm_rank(str(r["arm"])),
            arm_rank(str(r["control"])),
            str(r["source"] or ""),
        ),
    )


def comparison_name(row: Row, names: Names) -> str:
    """Arm against control, with source and recipe."""
    source = names(row["source"])
    words = f"{row['arm']}{f' ← {source}' if source and source != names(row['target']) else ''} − {row['control']}"
    return words.replace("_", " ") + (f", {row['recipe']}" if row["recipe"] else "")

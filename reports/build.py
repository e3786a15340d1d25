"""One self-contained HTML report from a run directory."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from json import dumps
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from reports import diversity, families, order
from reports.load import Row, Run, load_run
from reports.words import (
    ABSENT,
    ARMS,
    CONTROL_ARMS,
    Names,
    arm_name,
    arm_rank,
    excerpt,
    folded,
    metric_name,
    number,
)
from transfer.core.files import replacing

GAINS = ("room", "failed_cells", "transfer_efficiency", "quality_correlations", "dose")
"""Tables of the section that says what a gain is worth."""
MAX_TABLE = 200
"""Rows shown of any table or list; the rest is one link away."""
MAX_EXAMPLES = 48
"""Matched features shown side by side."""
MAX_FAMILIES = 12
"""Families shown side by side."""
MAX_SPANS = 5
"""Spans shown per feature and side."""
MAX_TEXT = 900
"""Characters shown of one generated text."""
RESERVED = ("main", "claim", "alert", "absent")
"""How the anchors of the page's own frame begin."""
LEVELS = ("severe", "warn", "note")
MADE_FROM = {
    "details.json": "matched examples, generated texts, missing features and model cards are not shown",
    "manifest.json": "costs, versions, hashes and the command are not shown",
    "experiment.yaml": "the configuration is not shown",
}


def value(number_: Any, at: str, *, signed: bool = False) -> Markup:
    """A number with its anchor and its full precision; a dash where none was recorded."""
    at = re.sub(r"\s+", "-", at)
    if number_ is None:
        return Markup('<span id="{}" class="none" title="not recorded">{}</span>').format(at, ABSENT)
    return Markup('<data id="{}" value="{}">{}</data>').format(at, number_, number(number_, signed=signed))


def bracket(row: Row, low: str, high: str, *, signed: bool = False) -> Markup:
    """The interval of a row, each end with its anchor; nothing where neither end is known."""
    if row[low] is None and row[high] is None:
        return Markup("")
    ends = [value(row[end], f"{row['at']}.{end}", signed=signed) for end in (low, high)]
    return Markup(' <span class="ci">[{}, {}]</span>').format(*ends)


def _with_place(name: str, rows: Sequence[Row]) -> list[Row]:
    """Copies of the rows that know their place in the file, which becomes their anchor."""
    return [{**row, "at": f"{name}.{i}"} for i, row in enumerate(rows)]


def flatten(data: Any, at: str) -> list[tuple[str, str, Any]]:
    """(anchor, name, scalar or compact JSON) for everything in a nested object, in file order."""
    found: list[tuple[str, str, Any]] = []
    for name, item in data.items():
        place = re.sub(r"\s+", "-", f"{at}.{name}")
        if isinstance(item, dict) and item and len(place.split(".")) < 5:
            found += [(a, f"{name} · {n}", v) for a, n, v in flatten(item, place)]
        elif isinstance(item, (dict, list)):
            plain = isinstance(item, list) and not any(isinstance(v, (dict, list)) for v in item)
            words = ", ".join(map(str, item)) if plain else dumps(item, ensure_ascii=False, sort_keys=True)
            found.append((place, name, words or ABSENT))
        else:
            found.append((place, name, item))
    return found


def card_table(cards: Sequence[Row]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Model cards side by side: (what, one (anchor, value) per card)."""
    columns = [
        {
            name: (at, item)
            for at, name, item in flatten({k: v for k, v in card.items() if k not in ("at", "name")}, at_)
        }
        for card, at_ in ((card, card["at"]) for card in cards)
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: " · " in name)
    return [
        (
            name.replace("_", " "),
            [column.get(name, (f"{card['at']}.{name}", None)) for card, column in zip(cards, columns, strict=True)],
        )
        for name in names
    ]


def matrix(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The transfer rows as target × arm tables, one a (task, recipe, metric) column; cells hold their rows."""
    tables = []
    for task, recipe, metric in columns:
        here = [r for r in rows if (str(r["task"]), str(r["recipe"] or ""), str(r["metric"])) == (task, recipe, metric)]
        arms = sorted({str(r["arm"]) for r in here}, key=arm_rank)
        targets = sorted({str(r["target"]) for r in here})
        cells = [
            (target, [[r for r in here if (str(r["target"]), str(r["arm"])) == (target, arm)] for arm in arms])
            for target in targets
        ]
        for i, row in enumerate(here):
            row["shown"] = i < MAX_TABLE
        name = ", ".join(w for w in (task, metric_name(metric), recipe) if w)
        tables.append({"name": name, "metric": metric, "arms": arms, "rows": cells, "cells": here})
    return tables


def spans_for_display(example: Row, side: str) -> list[dict[str, Any]]:
    """The strongest recorded spans of one side, cut around the firing token."""
    return [
        {
            "cut": excerpt(str(span["text"]), span["start"], span["end"]),
            "value": span["value"],
            "label": span["label"],
            "fold": folded(span),
            "at": f"{example['at']}.{side}.{i}",
        }
        for i, span in enumerate(example[side][:MAX_SPANS])
    ]


def by_writer(samples: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Generated texts grouped by feature source and writer, in that order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for sample in samples:
        groups.setdefault((str(sample["source"]), str(sample["generator"])), []).append(sample)
    return [(*pair, groups[pair]) for pair in sorted(groups)]


def _references(run: Run) -> Iterable[Any]:
    for rows in (*run.results.values(), *run.details.values()):
        for row in rows:
            yield from (row[k] for k in ("source", "target", "through", "model", "generator") if row.get(k))
    yield from (member["model"] for family in run.details["families"] for member in family["members"])
    yield from (card["name"] for card in run.details["cards"])


def _alerts(run: Run) -> list[Row]:
    """Alerts by consequence, with what the report itself could not read."""
    rows = _with_place("alerts", run.results["alerts"])
    for file in run.absent:
        rows.append({"level": "note", "text": f"{file} is not there: {MADE_FROM[file]}.", "at": f"absent.{file}"})
    return sorted(rows, key=lambda r: LEVELS.index(r["level"]) if r["level"] in LEVELS else len(LEVELS))


def _environment(names: Names) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        value=value, bracket=bracket, number=number, name=names, arm_name=arm_name, arms=ARMS, max_table=MAX_TABLE
    )
    environment.globals.update(label=diversity.label, metric_name=metric_name)
    environment.globals.update(control_arms=CONTROL_ARMS, fold=folded, max_text=MAX_TEXT, absent=ABSENT)
    return environment


def _link_claims(claims: list[Row], comparisons: Sequence[Row], body: str) -> None:
    """Point each claim at the number it rests on, if that is on the page.

    An anchor that is no place on the page is the claim's own name, and becomes its anchor. A claim that quotes a
    comparison (same control, number and interval) is then linked to that.
    """
    there = set(re.findall(r' id="([^"]+)"', body))
    quoted = {(c["control"], c["delta"], c["low"], c["high"]): f"{c['at']}.delta" for c in comparisons}
    taken: set[str] = set()
    for claim in claims:
        wanted = re.sub(r"\s+", "-", str(claim["anchor"] or "").removeprefix("#"))
        dotted = re.sub(r"\[(\d+)\]", r".\1", wanted)
        same = quoted.get((claim["control"], claim["number"], claim["low"], claim["high"]), "")
        claim["href"] = next((a for a in (wanted, dotted, same) if a and str(escape(a)) in there), "")
        free = wanted and str(escape(wanted)) not in there and dotted not in there and wanted not in taken
        claim["id"] = wanted if free and not wanted.startswith(RESERVED) else claim["at"]
        taken.add(claim["id"])


def render(run: Run) -> tuple[str, list[Any]]:
    """The page and its figures."""
    from reports import figures

    names = Names(_references(run))
    results = {name: _with_place(name, rows) for name, rows in run.results.items()}
    # Both files hold families; no two places on the page may have one name.
    details = {name: _with_place(f"{name}.shown" if name in results else name, r) for name, r in run.details.items()}
    drawings = [
        figures.alignment(results["alignments"], names),
        families.figure(results["families"], names),
        figures.coverage(results["coverage"], names),
        figures.funnel(results["synthesis"], names),
        figures.transfer_matrix(results["transfer"], names),
        figures.comparisons(results["comparisons"], names),
        diversity.figure(results["diversity_correlations"]),
    ]
    drawn = {d.name: d for d in drawings if d}
    transfer = order.sorted_transfer(results["transfer"])
    run_arms = order.arms_run(transfer)
    for row in transfer:
        row["hollow"] = order.lacks_control(row, run_arms)
        row["what"] = order.cell_name(row, names)
    examples = details["examples"][:MAX_EXAMPLES]
    for example in examples:
        for side in ("source_spans", "target_spans"):
            example[f"{side}_shown"] = spans_for_display(example, side)
    shared = details["families"][:MAX_FAMILIES]
    for family in shared:
        for j, member in enumerate(family["members"]):
            member["at"] = f"{family['at']}.members.{j}"
            member["spans_shown"] = spans_for_display(member, "spans")
    models = sorted({names(r) for r in _references(run)} - {""})
    environment = _environment(names)
    body = environment.get_template("sections.html.j2").render(
        figures={name: Markup(d.svg) for name, d in drawn.items()},
        drawn=drawn,
        alignments=order.sorted_alignments(results["alignments"]),
        coverage=order.sorted_coverage(results["coverage"]),
        synthesis=results["synthesis"],
        transfer=transfer,
        tables=matrix(transfer, order.transfer_columns(transfer)),
        headline={row["metric"] for row in order.headline(transfer)},
        comparisons=order.sorted_comparisons(results["comparisons"]),
        **{name: results[name] for name in GAINS},
        correlations=diversity.sorted_correlations(results["diversity_correlations"]),
        sets=diversity.sorted_sets(results["diversity"]),
        metrics=diversity.shown_metrics(results["diversity"]),
        unmeasured=diversity.unmeasured(results["diversity"]),
        embedded_by=diversity.embeddings(results["diversity"]),
        bounds=diversity.sorted_sets(results["bounds"]),
        bound_notes=results["bound_notes"],
        efficiency=diversity.sorted_efficiency(results["efficiency"]),
        examples=examples,
        n_examples=len(details["examples"]),
        shares=families.sorted_shares(results["families"]),
        family_counts=results["family_counts"],
        compositions=families.sorted_compositions(results["compositions"]),
        context=families.sorted_context(results["context"]),
        no_context=families.pairs_without_context(results["alignments"], results["context"], names),
        families=shared,
        n_families=len(details["families"]),
        missing=details["missing"],
        samples=by_writer(details["samples"][:MAX_TABLE]),
        n_samples=len(details["samples"]),
        cards=details["cards"],
        card_rows=card_table(details["cards"]),
        limits=run.limits,
        seconds=flatten(run.manifest.get("seconds") or {}, "seconds"),
        command=_command(run.manifest.get("command")),
        provenance=[
            (title, flatten(run.manifest.get(part) or {}, part))
            for title, part in (("Versions", "versions"), ("Hashes", "hashes"), ("Machine", "machine"))
        ],
        started=run.manifest.get("started"),
        finished=run.manifest.get("finished"),
        config_text=run.config_text,
        files=run.files,
    )
    claims = _with_place("claims", run.results["claims"])
    _link_claims(claims, results["comparisons"], body)
    page = environment.get_template("report.html.j2").render(
        title=run.config.get("name") or ", ".join(models) or "empty run",
        claims=claims,
        alerts=_alerts(run),
        body=Markup(body),
        results_linked="results.json" in run.files,
    )
    return page, list(drawn.values())


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``figures/*.svg`` into a run directory.

    Equal files give an equal report, byte for byte. Every number shown is one of the run's own; only sorting, picking
    and rounding happen here, and each carries an anchor that names its place in the file, such as ``#transfer.3.mean``.

    Args:
        run_dir: A finished run, or a copy of it; ``results.json`` is required.

    Returns:
        The path of the report.

    Raises:
        TransferError: When ``results.json`` is missing or a file is broken.
    """
    run_dir = Path(run_dir)
    page, drawings = render(load_run(run_dir))
    for drawing in drawings:
        with replacing(run_dir / "figures" / f"{drawing.name}.svg") as part:
            part.write_text(drawing.standalone(), "utf8")
    with replacing(run_dir / "report.html") as part:
        part.write_text(page, "utf8")
    return run_dir / "report.html"

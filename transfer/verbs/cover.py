"""``transfer cover``: the pipeline's stage (``run``), and coverage of stores: rank, curve, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transfer.core.console import say, set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet, RunByDefault, TextColumn, refuse_unread

if TYPE_CHECKING:
    from transfer.cover.rank import Ground
    from transfer.pipeline import Pipeline

HELP = """\
Which features a dataset activates, and which documents would add most.

\b
  transfer cover demo                             coverage of an experiment's seed data (short for: cover run demo)
  transfer cover rank new.jsonl --experiment demo --model llama --out best.csv
  transfer cover rank pool/ --anchor anchor/ --data mine/   the same on activation stores
  transfer cover curve mine/ --anchor anchor/     against delta, and against the number of documents
  transfer cover curve demo
  transfer cover show runs/demo"""

SAY_KEYS = "Leave it out; the experiment's keys say it, such as --set cover.delta=scale:0.5."
"""What to do about an option that an experiment already answers."""

cover = typer.Typer(cls=RunByDefault, help=HELP, no_args_is_help=True, rich_markup_mode=None)

Anchor = Annotated[Path | None, typer.Option(help="Store of the anchor: what should be covered.")]
Data = Annotated[Path | None, typer.Option(help="Store of the data at hand: what is covered already.")]
Report = Annotated[
    Path | None, typer.Option(help="Coverage report (JSON) whose relevant features count; default: all live ones.")
]
Delta = Annotated[str, typer.Option(help="quantile:<q>, scale:<share> or constant:<value>.")]
AlwaysOn = Annotated[
    float, typer.Option(min=0, max=1, help="Features firing on more than this share of the anchor are left out.")
]
ExperimentRef = Annotated[
    str | None, typer.Option("--experiment", help="Experiment whose anchor, seed data and relevant features count.")
]
Model = Annotated[str | None, typer.Option(help="Which of the experiment's models.")]
Settings = Annotated[list[str], typer.Option("--set", help="Override a key of the experiment; repeatable.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the groups and orders of documents.")]


@cover.command()
def rank(
    context: typer.Context,
    candidates: Annotated[str, typer.Argument(help="Store folder, or with --experiment a file of texts.")],
    anchor: Anchor = None,
    data: Data = None,
    report: Report = None,
    experiment: ExperimentRef = None,
    model: Model = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default, nothing changes it
    text_column: TextColumn = None,
    budget: Annotated[int, typer.Option(min=1, help="Documents to take at most.")] = 100,
    weights: Annotated[str, typer.Option(help="uniform, or kl: what each feature costs now in the divergence.")] = (
        "uniform"
    ),
    saturate: Annotated[
        str, typer.Option(help="What more documents for one feature are worth: cap:<n>, sqrt or log.")
    ] = "cap:1",
    delta: Delta = "quantile:0.5",
    always_on: AlwaysOn = 0.5,
    out: Annotated[Path | None, typer.Option(help="All ranks, as .csv or .jsonl.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Ranks to print.")] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Order candidate documents by how much coverage each adds to those before it (lazy greedy, at least 1 - 1/e).

    With --experiment and --model, the anchor, its thresholds, the relevant features and the seed data (which count as
    covered) are those of that experiment. With stores, --anchor says what to cover and --data what is there already.
    It stops before the budget where no candidate adds anything.
    """
    set_quiet(quiet or as_json)
    from transfer.core.files import plain
    from transfer.cover import rank as ranking
    from transfer.cover.delta import DeltaRule
    from transfer.cover.selection import Saturation

    if out is not None and out.suffix.lower() not in (".csv", ".jsonl"):
        raise TransferError(f"A ranking cannot be written to {out.name}.", "Name a .csv or .jsonl file.")
    saturation = Saturation.parse(saturate)
    present: Any = None
    if experiment is not None:
        told = ("anchor", "data", "report", "delta", "always_on")
        refuse_unread(context, told, "with --experiment, which already says what to cover", SAY_KEYS)
        if Path(candidates).is_dir():
            refuse_unread(context, ("text_column",), "with a store", "Leave it out.")
        pipeline = _pipeline(experiment, settings, "rank")
        name = _named(pipeline, model)
        ground, present = _ground(pipeline, name)
        pool = _pool(candidates, pipeline, name, text_column)
    else:
        refuse_unread(context, ("model", "settings", "text_column"), "without --experiment", "Name one.")
        if anchor is None:
            raise TransferError("Nothing says what to cover.", "Name a store with --anchor, or an --experiment.")
        ground = ranking.ground_of(
            ranking.open_store(anchor), DeltaRule.parse(delta), relevant=_relevant(report), always_on=always_on
        )
        pool = ranking.open_store(candidates)
        present = None if data is None else ranking.open_store(data)
    rows, found = ranking.rank(pool, ground, budget, data=present, weights=weights, saturation=saturation)
    numbers = {**ranking.summary(found), "weights": weights, "delta_rule": str(ground.rule)}
    if out is not None:
        ranking.save(rows, out)
        say(f"{len(rows)} ranks in {out}")
    if as_json:
        show(plain({**numbers, "ranks": rows}))
        return
    lines = [f"{r['rank']:>6}  {r['coverage']:7.2%}  {r['gain']:12.4g}  {r['id']}" for r in rows[:top]]
    rest = [f"        and {len(rows) - top} more" + ("" if out else " (--out writes all)")] if len(rows) > top else []
    ended = ", no other adds anything" if found.exhausted else ""
    show(
        "\n".join(
            [
                f"{numbers['taken']} of {numbers['candidates']} documents{ended}: coverage "
                f"{numbers['coverage_before']:.2%} -> {numbers['coverage_after']:.2%} of "
                f"{numbers['anchor_features']} features",
                "  rank  coverage          gain  id",
                *lines,
                *rest,
            ]
        )
    )


@cover.command()
def curve(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="Store folder of the dataset, or an experiment.")],
    anchor: Anchor = None,
    report: Report = None,
    settings: Settings = [],  # noqa: B006
    delta: Delta = "quantile:0.5",
    rule: Annotated[list[str], typer.Option(help="delta rules of the curve; repeatable. Default: sixteen.")] = [],  # noqa: B006
    always_on: AlwaysOn = 0.5,
    orders: Annotated[int, typer.Option(min=2, help="Random orders of the documents.")] = 20,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to save the points in.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Coverage against delta, and against the number of documents, in one pass over stored activations."""
    set_quiet(quiet or as_json)
    from transfer.core.files import plain, read_json, write_json
    from transfer.cover.curves import RULES, curves
    from transfer.cover.delta import DeltaRule
    from transfer.cover.rank import ground_of, open_store
    from transfer.cover.tally import WHOLE
    from transfer.stages import curve_rows

    if Path(data).is_dir():
        refuse_unread(context, ("settings",), "with a store", "Leave it out, or name an experiment.")
        if anchor is None:
            raise TransferError("Nothing says what to cover.", "Name a store with --anchor.")
        mine = open_store(data)
        ground = ground_of(open_store(anchor), DeltaRule.parse(delta), relevant=_relevant(report), always_on=always_on)
        found = curves(
            ground.anchor_docs,
            mine.docs if len(mine.doc_ids) <= WHOLE else mine,
            ground.relevant,
            ground.rule,
            rules=[DeltaRule.parse(text) for text in rule] or RULES,
            always_on=always_on,
            orders=orders,
            seed=seed,
        )
        rows = curve_rows(found, mine.space.model, Path(data).name)
    else:
        told = ("anchor", "report", "delta", "rule", "always_on", "orders", "seed")
        refuse_unread(context, told, "with an experiment, whose curves its cover stage draws", SAY_KEYS)
        pipeline = _pipeline(data, settings, "curve")
        rows = [row for _, folder in pipeline.coverage.values() for row in read_json(folder / "curves.json")]
    if out is not None:
        write_json(out, rows)
        say(f"{len(rows)} points in {out}")
    show(plain(rows) if as_json else "\n".join(map(_point, rows)))


@cover.command("show")
def show_report(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a coverage report (JSON).")], as_json: Json = False
) -> None:
    """Coverage with its intervals, and the features that cost most."""
    from transfer.core.files import plain, read_json

    rows = _saved(path, read_json)
    if as_json:
        show(plain(rows))
        return
    show("\n\n".join(_text(row) for row in rows))


def _saved(path: Path, read: Any) -> list[dict[str, Any]]:
    from transfer.core.files import plain
    from transfer.core.outcomes import CoverageReport

    # What the run's last cover stage found; an older results.json must not be taken for it.
    stages = read(path / "stages.json") if (path / "stages.json").is_file() else {}
    files = [path.parent / ".store" / key / "seed.json" for title, key in stages.items() if title.startswith("cover ")]
    covered = [plain(CoverageReport.load(file).summary()) for file in files if file.is_file()]
    for file in (path, path / "results.json", path / "seed.json"):
        if file.is_file():
            found = read(file)
            if isinstance(found, dict) and "anchor_features" in found:
                return [CoverageReport.load(file).summary()]
            if isinstance(found, dict) and found.get("coverage"):
                rows = list(found["coverage"])
                return covered if any(row not in rows for row in covered) else rows
            raise TransferError(f"{file} holds no coverage.", "Name a run's folder, or a report of the cover stage.")
    if covered:
        return covered
    raise TransferError(f"There is no coverage in {path}.", "Run `transfer cover run <experiment>` first.")


def _text(row: dict[str, Any]) -> str:
    head = f"{row['model']}  {row['dataset']}  ({row['n_docs']} documents, delta {row['delta_rule']})"
    lines = [head, f"  {row['n_covered']} of {row['n_anchor']} features covered, {row['n_missing']} missing"]
    names = ("fac", "fac_uncapped", "fac_frequency", "fac_magnitude", "kl", "kl_frequency", "missing_hit_rate")
    for name in names:
        low, high = ("ci_low", "ci_high") if name == "fac" else (f"{name}_low", f"{name}_high")
        if row.get(name) is not None:
            ends = [row.get(low), row.get(high)]
            shown = "" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
            lines.append(f"  {name:<17}{row[name]:.3f}{shown}")
    if row.get("n_dead") is not None:
        share = "" if row.get("always_on") is None else f" (over {row['always_on']:.0%} of the anchor)"
        lines.append(f"  left out         {row['n_dead']} dead, {row['n_always_on']} always on{share}")
    if row.get("costs"):
        lines.append("  dearest features (share of anchor, share of data, cost)")
        for cost in row["costs"]:
            about = cost["description"] or cost["label"]
            shares = f"{cost['anchor_share']:6.1%} {cost['data_share']:6.1%}"
            lines.append(f"    {cost['feature']:>7}  {shares}  {cost['kl_frequency']:.4f}  {about}".rstrip())
    return "\n".join(lines)


def _point(row: dict[str, Any]) -> str:
    low, high = ("ci_low", "ci_high") if row["curve"] == "delta" else ("fac_low", "fac_high")
    at = row["delta_rule"] if row["curve"] == "delta" else f"{row['n_docs']:.0f} documents"
    if row["fac"] is None:
        return f"{row['model']}  {at:<16}  {row['why']}"
    ends = "" if row.get(low) is None or row[low] != row[low] else f" [{row[low]:.3f}, {row[high]:.3f}]"
    return f"{row['model']}  {at:<16}  fac {row['fac']:.3f}{ends}  of {row['n_anchor']}"


def _pipeline(config: str, settings: list[str], verb: str) -> Pipeline:
    from transfer.core.experiment import load_experiment
    from transfer.core.rundir import runs_folder
    from transfer.evidence.judging import refuse_unread_keys
    from transfer.pipeline import Pipeline
    from transfer.verbs.options import command_line

    experiment = load_experiment(config, settings)
    refuse_unread_keys(experiment, settings)
    made = Pipeline(experiment, runs_folder(), command=command_line())
    made.check("cover")
    made.dir.event("cover", f"cover {verb}")
    return made


def _named(pipeline: Pipeline, model: str | None) -> str:
    known = list(pipeline.experiment.models)
    if model is None and len(known) == 1:
        return known[0]
    if model not in known:
        what = "Nothing says which model to rank with" if model is None else f"The experiment has no model {model!r}"
        raise TransferError(f"{what}.", f"Say --model {' or '.join(known)}.")
    return model


def _ground(pipeline: Pipeline, name: str) -> tuple[Ground, Any]:
    """What the experiment's cover stage measured against, and the seed documents."""
    from transfer.cover.rank import ground_of_report
    from transfer.stages import split_docs

    store, (_, folder) = pipeline.stores[name], pipeline.coverage[name]
    anchor, seed = (split_docs(store, pipeline.corpora[s]) for s in ("anchor", "seed"))
    return ground_of_report(folder, anchor), seed


def _pool(candidates: str, pipeline: Pipeline, name: str, text_column: str | None) -> Any:
    """Candidate documents: a store, or texts that are harvested with the experiment's model."""
    from transfer.alignment.sides import read_corpus, stored
    from transfer.core.rundir import runs_folder
    from transfer.cover.rank import open_store

    if Path(candidates).is_dir():
        return open_store(candidates)
    corpus = read_corpus(candidates, text_column=text_column)
    assert corpus is not None
    held_out = {t.text for t in pipeline.corpora.get("evaluation", ())}
    leaked = [t.id for t in corpus if t.text in held_out]
    if leaked:
        raise TransferError(
            f"{len(leaked)} candidates are also evaluation texts, first {leaked[0]}.", "Take them out of the file."
        )
    return stored(pipeline.adapters[name], corpus, runs_folder(), residual=False)


def _relevant(report: Path | None) -> Any:
    from transfer.core.outcomes import CoverageReport

    return None if report is None else CoverageReport.load(report).relevant

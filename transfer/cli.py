"""The command line. Every verb takes one experiment (YAML or preset) and runs the stages up to its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from transfer.core.console import say, set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.align import align
from transfer.verbs.cover import cover
from transfer.verbs.diversity import diversity
from transfer.verbs.explain import explain
from transfer.verbs.fv import fv
from transfer.verbs.lines import lines_of
from transfer.verbs.models import models
from transfer.verbs.options import Json, Quiet, TextColumn, command_line
from transfer.verbs.synth import synth
from transfer.verbs.task import evaluate, tune

QUICK_START = """\
Does another model have this feature, and can it write the data that yours lacks?

\b
Quick start:  transfer run demo        three tiny models, all stages, one report
              transfer harvest demo --data my.jsonl --text-column prompt
              transfer align fit zoo:llama zoo:qwen --out llama-qwen
              transfer ls              what exists, and its state

Verbs follow the pipeline: harvest, align, cover, synth, tune, eval, report; `run` is all of them."""

app = typer.Typer(help=QUICK_START, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
zoo = typer.Typer(help="The three tiny trained models and their cards.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(zoo, name="zoo")
app.add_typer(align, name="align")
app.add_typer(models, name="models")
app.add_typer(cover, name="cover")
app.add_typer(synth, name="synth")
app.add_typer(tune, name="tune")
app.add_typer(evaluate, name="eval")
app.add_typer(fv, name="fv")

Config = Annotated[str, typer.Argument(help="Experiment YAML, or a preset name.")]
Settings = Annotated[list[str], typer.Option("--set", help="Override a key, such as align.reg=0.02; repeatable.")]
Data = Annotated[str | None, typer.Option("--data", help="JSONL, CSV or parquet path, or hub:<dataset id>@<rev>.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column that holds the label.")]


def _through(
    stage: str,
    config: str,
    settings: list[str],
    data: str | None,
    text: str | None,
    label: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the stages up to ``stage`` and show its result."""
    set_quiet(quiet or as_json)
    from transfer.core.experiment import load_experiment
    from transfer.core.rundir import runs_folder

    overrides = list(settings)
    for key, value in (("source", data), ("text", text), ("label", label)):
        if value is not None:
            overrides.append(f"data.{key}={json.dumps(value)}")
    experiment = load_experiment(config, overrides)
    from transfer.evidence.judging import refuse_unread_keys
    from transfer.pipeline import Pipeline

    refuse_unread_keys(experiment, settings)

    result = Pipeline(experiment, runs_folder(), command=command_line()).run(stage)
    show(result if as_json else lines_of(result))


def _verb(stage: str, text: str, group: typer.Typer = app, name: str = "") -> None:
    def verb(
        config: Config = "demo",
        settings: Settings = [],  # noqa: B006 - typer reads the default, nothing changes it
        data: Data = None,
        text_column: TextColumn = None,
        label_column: LabelColumn = None,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        _through(stage, config, settings, data, text_column, label_column, as_json, quiet)

    group.command(name or stage, help=text)(verb)


_verb("run", "Every stage, ending with the report; the same command continues an interrupted run.")
_verb("harvest", "Store the sparse SAE activations of the texts, per model.")
_verb("align", "Match features between all pairs of an experiment's models.", align, "run")
_verb("cover", "Feature Activation Coverage of the seed data, and the features it lacks.", cover, "run")
_verb("synth", "Write texts for the missing features, scored by the SAE.", synth, "run")
_verb("tune", "Fine-tune every target on every arm.", tune, "run")
_verb("eval", "The transfer table: means, intervals, controls, verdicts.", evaluate, "run")
app.command()(diversity)
app.command()(explain)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its name.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the HTML report of a finished run again (needs no model)."""
    set_quiet(quiet or as_json)
    from reports.build import build_report

    named = Path(os.environ.get("TRANSFER_RUNS", "runs")) / run
    run = named if not run.exists() and named.is_dir() else run

    path = build_report(run)
    show({"report": str(path)} if as_json else str(path))


@app.command("check")
def check_experiment(
    config: Config = "demo",
    settings: Settings = [],  # noqa: B006 - typer reads the default, nothing changes it
    tflops: Annotated[
        float | None, typer.Option(min=0, help="Speed of the machine that will run it; measured here by default.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Everything that is wrong with an experiment, and what it will take; reads no weights. Exit 2 on a problem."""
    set_quiet(quiet or as_json)
    from transfer.check import check
    from transfer.core.experiment import load_experiment

    found = check(load_experiment(config, settings), tflops=tflops).to_dict()
    show(found if as_json else lines_of(found))
    if found["problems"]:
        n = len(found["problems"])
        raise TransferError(f"{config} has {n} problem{'s' if n > 1 else ''}, listed above.")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, machine, and what is missing; paste this into a bug report."""
    from transfer.core.env import machine, versions

    root = Path(__file__).resolve().parents[1]
    zoo_models = {n: (root / "models" / "zoo" / n / "card.json").is_file() for n in ("llama", "mistral", "qwen")}
    facts = {**versions(), **machine(), "code": str(root), "zoo": zoo_models}
    show(facts if as_json else lines_of(facts))


@app.command()
def ls(
    runs: Annotated[Path | None, typer.Argument(help="Folder of runs; default: $TRANSFER_RUNS or runs.")] = None,
    as_json: Json = False,
) -> None:
    """Runs and their state."""
    from transfer.core.files import read_json

    runs = runs or Path(os.environ.get("TRANSFER_RUNS", "runs"))
    if not runs.is_dir():
        raise TransferError(f"There is no folder {runs}.", "Run `transfer run demo` first.")
    rows = []
    for folder in sorted(p for p in runs.iterdir() if p.is_dir() and not p.name.startswith(".")):
        manifest = folder / "manifest.json"
        report = folder / "report.html"
        # A verb before the last one ends with its stages listed, and without a report.
        state = "done" if report.exists() else "no report" if (folder / "stages.json").exists() else "unfinished"
        seconds = None
        try:
            seconds = sum(read_json(manifest)["seconds"].values()) if manifest.exists() else None
        except (TransferError, KeyError, TypeError, AttributeError):
            state = "broken manifest"
        rows.append(
            {"run": folder.name, "state": state, "seconds": seconds, "report": str(report) if report.exists() else None}
        )
    show({"runs": rows} if as_json else lines_of({"runs": rows}) if rows else "no runs yet")


@zoo.command("train")
def zoo_train(
    data: Annotated[Path, typer.Option(help="Folder of the public training data.")] = Path("../shared/data"),
    out: Annotated[Path | None, typer.Option(help="Target folder; default: the zoo itself.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train only this member; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens per language model.")] = 12_000_000,
    sae_tokens: Annotated[int, typer.Option(help="Training tokens per SAE.")] = 2_400_000,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train tokenizers, language models and SAEs from scratch, and write their cards."""
    set_quiet(quiet or as_json)
    from models.zoo.build import build_zoo

    cards = build_zoo(data, out, only or [], tokens=tokens, sae_tokens=sae_tokens)
    show(cards if as_json else lines_of({c["name"]: c["summary"] for c in cards.values()}))


@zoo.command("eval")
def zoo_eval(
    data: Annotated[
        Path | None, typer.Option(help="Folder of public data, for the numbers on its held-out part.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this member; repeatable.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Recompute the numbers on the cards and compare; exit 3 when one differs by more than 1 %.

    Most are on public texts that were kept out of training and need --data; without it only those on the bundled
    texts are measured, and the others are counted.
    """
    set_quiet(quiet or as_json)
    from models.zoo.card import check_cards
    from transfer.core.errors import StageError

    rows = check_cards(data, only or [])
    show({"numbers": rows} if as_json else lines_of({"numbers": rows}))
    wrong = [r for r in rows if r["agrees"] is False]
    unmeasured = sum(r["agrees"] is None for r in rows)
    if wrong:
        raise StageError(f"{len(wrong)} numbers differ from the cards, first {wrong[0]['model']} {wrong[0]['number']}.")
    rest = f"; {unmeasured} are on public texts and were not measured (--data)" if unmeasured else ""
    say(f"{len(rows) - unmeasured} numbers agree with the cards{rest}")

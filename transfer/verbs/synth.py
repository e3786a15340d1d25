"""``transfer synth``: the pipeline's stage (``run``), rounds of it for one model, and its texts as training files."""

from __future__ import annotations

import difflib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from transfer.core.console import set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet, refuse_unread

HELP = """\
Write texts for missing features.

\b
  transfer synth demo                                 the stage of an experiment (short for: synth run demo)
  transfer synth rounds demo --model llama            cover, write, cover again, until it stops paying
  transfer synth export runs/demo --model llama --out d --licence apache-2.0
  transfer synth export runs/demo --model llama --out t --to trl"""


class _RunByDefault(TyperGroup):
    """What is no verb of ``synth`` is an experiment: ``synth demo`` means ``synth run demo``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            misspelt = difflib.get_close_matches(args[0], self.commands, 1) and not Path(args[0]).exists()
            args = args if misspelt else ["run", *args]
        return super().parse_args(ctx, args)


synth = typer.Typer(cls=_RunByDefault, help=HELP, no_args_is_help=True, rich_markup_mode=None)

Settings = Annotated[list[str], typer.Option("--set", help="Override a key, such as synth.retries=2; repeatable.")]


def find_synthesis(place: Path, model: str | None) -> Path:
    """The ``synthesis.json`` of a file, a folder that holds one, or a run's folder.

    Raises:
        TransferError: When there is none, or a run has several and no model is named.
    """
    from transfer.core.files import read_json

    if place.is_file():
        return place
    if (place / "synthesis.json").is_file():
        return place / "synthesis.json"
    if not (place / "stages.json").is_file():
        raise TransferError(f"{place} holds no synthesis.", "Name a run's folder, or a synthesis.json.")
    stages = read_json(place / "stages.json")
    found = {t.removeprefix("synth "): place.parent / ".store" / s for t, s in stages.items() if t.startswith("synth ")}
    if model is None and len(found) == 1:
        model = next(iter(found))
    if model not in found:
        raise TransferError(
            f"The run {place} has texts written by {', '.join(found) or 'no model'}.", "Name one with --model."
        )
    return found[model] / "synthesis.json"


def origin(place: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources of the anchor and seed texts, and the last command that wrote, as a run's folder knows them.

    A ``synthesis.json`` by itself knows neither.
    """
    import yaml

    from transfer.core.config import Experiment
    from transfer.pipeline import STAGES

    sources: tuple[str, ...] = ()
    if (place / "experiment.yaml").is_file():
        data = Experiment.model_validate(yaml.safe_load((place / "experiment.yaml").read_text("utf8"))).data
        sources = tuple(dict.fromkeys(s for s in (data.anchor or data.source, data.seed or data.source) if s))
    written: tuple[str, ...] = ()
    rounds = (place / "rounds.json").is_file()
    log = (place.parent if rounds else place) / "events.jsonl"
    if log.is_file():
        events = map(json.loads, log.read_text("utf8").splitlines())
        late = ("rounds",) if rounds else STAGES[STAGES.index("synth") :]
        commands = [e["command"] for e in events if e["event"] == "command" and e["stage"] in late]
        written = tuple(commands[-1:])
    return sources, written


@synth.command()
def export(
    context: typer.Context,
    place: Annotated[Path, typer.Argument(help="A run's folder, its rounds-<model>, or a synthesis.json.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    to: Annotated[str, typer.Option(help="dataset (with card and lineage), trl, alpaca or sharegpt.")] = "dataset",
    model: Annotated[str | None, typer.Option(help="Which writer of the run.")] = None,
    name: Annotated[str, typer.Option(help="Name of the dataset.")] = "synthetic",
    licence: Annotated[str, typer.Option(help="Licence on the card, such as apache-2.0; needed for dataset.")] = "",
    licence_note: Annotated[str, typer.Option(help="What the licence follows from.")] = "",
    per_feature: Annotated[int | None, typer.Option(min=1, help="Most texts of one feature in training files.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Kept texts as a Hugging Face dataset with lineage, or as training files for TRL or LLaMA-Factory."""
    set_quiet(quiet or as_json)
    from transfer.core.outcomes import SynthesisRun
    from transfer.synth.lineage import CardFacts, write_dataset
    from transfer.synth.safety import is_harmful
    from transfer.synth.training_formats import write_llama_factory, write_trl
    from transfer.synthesis import select
    from transfer.verbs.options import command_line

    if to == "dataset":
        refuse_unread(context, ("per_feature",), "with --to dataset, which holds every kept text", "Leave it out.")
    run = SynthesisRun.load(find_synthesis(place, model))
    found: dict[str, Any] = {"out": str(out), "format": to}
    if to == "dataset":
        # Where the texts came from no longer shows: a label that speaks of harm counts, whatever the data was.
        harmful = bool(run.info.get("folded")) or any(is_harmful(c.label) for c in run.kept)
        sources, written_by = origin(place)
        command = "; ".join([*written_by, shlex.join(command_line())])
        facts = CardFacts(name, licence, licence_note, sources, command, harmful=harmful)
        found |= write_dataset(run, out, facts)
    elif to == "trl":
        found["n_rows"] = write_trl(select(run, per_feature=per_feature), out / f"{name}.jsonl")
    elif to in ("alpaca", "sharegpt"):
        chosen = select(run, per_feature=per_feature)
        found["n_rows"] = write_llama_factory(chosen, out, name, "alpaca" if to == "alpaca" else "sharegpt")
    else:
        raise TransferError(f"There is no export to {to!r}.", "Use dataset, trl, alpaca or sharegpt.")
    show(found if as_json else "\n".join(f"{k}: {v}" for k, v in found.items()))


@synth.command()
def rounds(
    config: Annotated[str, typer.Argument(help="Experiment YAML, or a preset name.")],
    model: Annotated[str, typer.Option(help="The model that writes for its own missing features.")],
    settings: Settings = [],  # noqa: B006 - typer reads the default, nothing changes it
    n: Annotated[int, typer.Option("--rounds", min=1, help="Rounds at most.")] = 5,
    patience: Annotated[int, typer.Option(min=1, help="Rounds in a row without gain.")] = 2,
    least_gain: Annotated[float, typer.Option(min=0, help="Gain of coverage or score that counts.")] = 0.01,
    budget: Annotated[int | None, typer.Option(min=1, help="Candidates of all rounds together.")] = None,
    per_feature: Annotated[int, typer.Option(min=1, help="Kept texts of a feature added per round.")] = 2,
    tune: Annotated[bool, typer.Option("--tune", help="Fine-tune and evaluate after every round.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cover, write, (fine-tune,) and cover again; the same command goes on behind the last finished round."""
    set_quiet(quiet or as_json)
    from transfer.core.experiment import load_experiment
    from transfer.core.rundir import runs_folder
    from transfer.evidence.judging import refuse_unread_keys
    from transfer.pipeline import Pipeline
    from transfer.synth.rounds import RoundSettings
    from transfer.synth.rounds_stage import model_rounds
    from transfer.verbs.options import command_line

    how = RoundSettings(n, patience, least_gain, budget, per_feature)
    experiment = load_experiment(config, settings)
    refuse_unread_keys(experiment, settings)
    pipeline = Pipeline(experiment, runs_folder(), command_line())
    pipeline.dir.event("rounds", "command", command=shlex.join(pipeline.command))
    found = model_rounds(pipeline, model, how, tune=tune).summary()
    if as_json:
        show(found)
        return
    lines = [
        f"round {r['number']}  coverage {r['fac_before']:.3f} -> {r['fac_after']:.3f}  "
        f"missing {r['n_missing_before']} -> {r['n_missing_after']}  {r['n_added']} of {r['n_candidates']} texts added"
        + ("" if r["score"] is None else f"  score {r['score']:.3f}")
        for r in found["rounds"]
    ]
    texts = [f"texts: transfer synth export {found['place']} --out <folder>"] if found["n_candidates"] else []
    show("\n".join([*lines, f"stopped: {found['stopped']}", *texts]))

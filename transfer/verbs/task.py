"""``transfer tune`` and ``transfer eval``: the pipeline's stages (``run``), and tasks on data of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from transfer.core.console import set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet, RunByDefault

TUNE_HELP = """\
Fine-tune.

\b
  transfer tune demo                             every target on every arm (short for: tune run demo)
  transfer tune task demo --model llama --set tune.task=reward --train a.jsonl --evaluation b.jsonl
                                                 one task on its own data: toxicity, reward, steering, instruction"""
EVAL_HELP = """\
Judge.

\b
  transfer eval demo                             the transfer table (short for: eval run demo)
  transfer eval task FOLDER --evaluation c.jsonl what `tune task` trained, on other data
  transfer eval answers FOLDER --prompts p.jsonl --out mine.json [--against theirs.json]
                                                 answers in AlpacaEval's form, and their win rate"""

tune = typer.Typer(cls=RunByDefault, help=TUNE_HELP, no_args_is_help=True, rich_markup_mode=None)
evaluate = typer.Typer(cls=RunByDefault, help=EVAL_HELP, no_args_is_help=True, rich_markup_mode=None)

Config = Annotated[str, typer.Argument(help="Experiment YAML, or a preset name.")]
Settings = Annotated[list[str], typer.Option("--set", help="Override a key, such as tune.task=reward; repeatable.")]
Folder = Annotated[Path, typer.Argument(help="Folder of one recipe and seed that `transfer tune task` listed.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")]
Dtype = Annotated[str, typer.Option(help="Of the base's weights, as it was trained: float32, bfloat16 or float16.")]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        where = "  ".join(f"{k} {r[k]}" for k in ("recipe", "seed", "n_train") if k in r)
        lines.append(f"{where}  {r['metric']} {r['value']:.4f} ± {r['stderr'] or float('nan'):.4f}  n {r['n']}".strip())
    return "\n".join(lines)


def _left_out(about: dict[str, Any]) -> str:
    why = ", ".join(f"{n} {reason}" for reason, n in about["left_out"].items())
    return f"{about['ref']}: {about['n']} examples" + (f"; left out: {why}" if why else "")


@tune.command()
def task(
    config: Config,
    model: Annotated[str, typer.Option(help="Which of the experiment's models; not needed with tune.base.")] = "",
    train: Annotated[list[str], typer.Option(help="Training data, besides tune.train; repeatable.")] = [],  # noqa: B006
    evaluation: Annotated[str, typer.Option(help="What to judge on; default: tune.evaluation.")] = "",
    settings: Settings = [],  # noqa: B006 - typer reads the default, nothing changes it
    out: Annotated[Path | None, typer.Option(help="Folder; default: <runs>/<experiment>/<task>/<model>.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one task with every recipe and seed of ``tune``, and judge each; what is finished is used again.

    A folder each: the adapter or head (safetensors) with its record, one line an example, and ``results.json``.
    """
    set_quiet(quiet or as_json)
    from models.placement import place
    from transfer.core.experiment import load_experiment
    from transfer.core.rundir import runs_folder
    from transfer.tasks import get_task
    from transfer.train.recipes import get_recipe
    from transfer.train.task_runs import rows, run_task

    experiment = load_experiment(config, settings)
    section = experiment.tune
    base = section.base if section.base and not model else experiment.models.get(model)
    if base is None:
        raise TransferError(
            f"The experiment has no model {model!r}." if model else "No model is named.",
            f"Choose one with --model: {', '.join(experiment.models)}.",
        )
    refs = [*([section.train] if section.train else []), *train]
    if not refs or not (evaluation or section.evaluation):
        what = "evaluation" if refs else "train"
        raise TransferError(f"{config} names no {what} data for {section.task}.", f"Give --{what}, or set tune.{what}.")
    place(base.model, dtype=base.dtype, device=base.device)
    folder = out or runs_folder() / experiment.name / section.task / (model or "base")
    found = run_task(
        get_task(section.task, **section.options),
        base.model,
        refs,
        evaluation or section.evaluation or "",
        [get_recipe(name) for name in section.recipes],
        section.seeds,
        folder,
    )
    if as_json:
        show({"out": str(folder), "runs": found})
        return
    data = [*found[0]["train"], found[0]["evaluation"]]
    table = [row for record in found for row in rows(record)]
    show("\n".join([*map(_left_out, data), _table(table), f"out: {folder}"]))


@evaluate.command("task")
def task_again(
    folder: Folder,
    evaluation: Annotated[str, typer.Option(help="Other data of the same task.")],
    out: Annotated[Path | None, typer.Option(help="File for one line an example.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge what `transfer tune task` trained on other data; what it was trained on is refused."""
    set_quiet(quiet or as_json)
    import dataclasses

    from transfer.train.task_runs import judge_again

    _placed(folder, dtype, device)
    evals, about = judge_again(folder, evaluation, out)
    found = [dataclasses.asdict(e) for e in evals]
    show({"evals": found, **about} if as_json else "\n".join([_left_out(about), _table(found), about["per_example"]]))


@evaluate.command()
def answers(
    folder: Folder,
    prompts: Annotated[str, typer.Option(help="Rows with a column instruction (or prompt), as AlpacaEval has them.")],
    out: Annotated[Path, typer.Option(help="File of the answers, as AlpacaEval's model_outputs.")],
    against: Annotated[
        Path | None, typer.Option(help="Another such file: compare with it, as a judge sees it.")
    ] = None,
    experiment: Annotated[str, typer.Option(help="Whose `judge` section says who compares.")] = "demo",
    settings: Settings = [],  # noqa: B006 - typer reads the default, nothing changes it
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with a model that the task `instruction` fine-tuned; with --against also a win rate.

    The rate is also given at equal length. Each pair is shown to the judge in both orders; pairs without a verdict are
    counted and left out.
    """
    set_quiet(quiet or as_json)
    from transfer.tasks.answers import compare, write_answers

    _placed(folder, dtype, device)
    found = write_answers(folder, prompts, out, max_new_tokens)
    if against is not None:
        from models.cache import AnswerCache
        from transfer.core.experiment import load_experiment
        from transfer.core.rundir import runs_folder
        from transfer.evidence.judging import CACHE, chat_model

        loaded = load_experiment(experiment, settings)
        with AnswerCache(runs_folder() / ".store" / CACHE) as cache:
            found |= compare(out, against, chat_model(loaded, loaded.judge.kind, cache))
    show(found if as_json else "\n".join(f"{k}: {v}" for k, v in found.items()))


def _placed(folder: Path, dtype: str, device: str) -> None:
    from models.placement import place
    from transfer.core.files import read_json
    from transfer.train.task_runs import RESULTS

    if (folder / RESULTS).is_file():
        place(read_json(folder / RESULTS)["base"], dtype=dtype, device=device)

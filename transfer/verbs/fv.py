"""``transfer fv``: choose heads, build function vectors, and measure what they do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from transfer.core.console import say, set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet

if TYPE_CHECKING:
    from models.language import LanguageModel
    from transfer.function_vectors.evaluate import FVEvaluation
    from transfer.function_vectors.select import Kind, Method

HELP = """\
Function vectors: which attention heads carry a task, and what steering with them does.

\b
  transfer fv select zoo:llama --task copy --task plural --out heads
  transfer fv build zoo:llama heads --out vectors
  transfer fv eval zoo:llama vectors/copy --wrong vectors/plural --out copy.json"""

fv = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

ModelRef = Annotated[str, typer.Argument(help="zoo:<name>, path:<folder> or hub:<org/name>@<revision>.")]
Tasks = Annotated[str, typer.Option(help="`rule` (bundled), a JSON file of pairs, or a folder of them.")]
Names = Annotated[list[str], typer.Option("--task", help="Only this task; repeatable.")]
Instructions = Annotated[Path | None, typer.Option(help="JSON of task name to a list of instructions.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="A torch device.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
METHODS_HELP = (
    "screened (attribution patching, then exact effects), aie, attribution, gradient, integrated, lrp (patented; "
    "personal and scientific use only); baselines: norm, induction."
)


def _free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise TransferError(f"{path} exists.", "Pass --force to replace it, or name another place.")


def _language(model: str, dtype: str, device: str) -> LanguageModel:
    from models.language import LanguageModel

    return LanguageModel.load(model, dtype=dtype, device=device)


@fv.command()
def select(
    model: ModelRef,
    out: Annotated[Path, typer.Option(help="Folder of the scores.")],
    tasks: Tasks = "rule",
    task: Names = [],  # noqa: B006 - typer reads the default, nothing changes it
    instructions: Instructions = None,
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = "screened",
    kind: Annotated[str, typer.Option(help="icl (demonstrations) or instruction.")] = "icl",
    heads: Annotated[int, typer.Option(min=1, help="Heads finally kept.")] = 20,
    shots: Annotated[int, typer.Option(min=2, help="Demonstrations of a prompt.")] = 10,
    n_mean: Annotated[int, typer.Option(min=1, help="Clean prompts that outputs are averaged over.")] = 100,
    n_score: Annotated[int, typer.Option(min=1, help="Prompt pairs that heads are scored on.")] = 25,
    keys: Annotated[str | None, typer.Option(help="Token set whose keys count, for lrp: label, instruction, …")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score all attention heads on tasks; the mean over tasks ranks them."""
    set_quiet(quiet or as_json)
    from transfer.function_vectors.select import METHODS, Recipe, prepare
    from transfer.function_vectors.select import select as choose
    from transfer.function_vectors.tasks import read_tasks

    _free(out / "scores.json", force)
    if method not in METHODS or kind not in ("icl", "instruction"):
        raise TransferError(
            f"There is no selector {method!r} on {kind!r} prompts.", f"Use {', '.join(METHODS)}; icl or instruction."
        )
    wanted = read_tasks(tasks, task or None, instructions=instructions)
    language = _language(model, dtype, device)
    recipe = Recipe(cast("Kind", kind), shots, n_mean, n_score, seed)
    prompts = [prepare(language, one, recipe) for one in wanted]
    scores = choose(language, prompts, cast("Method", method), k=heads, keys=keys)
    top = scores.top(heads)
    scores.save(out)
    if scores.lost:
        say(f"not used: {', '.join(f'{n} {reason}' for reason, n in scores.lost.items())}")
    found: dict[str, Any] = {
        "scores": str(out),
        "method": method,
        "tasks": list(scores.tasks),
        "prompts": list(scores.n_prompts),
        "lost": scores.lost,
        "heads": [[h.layer, h.head, h.score] for h in top],
    }
    lines = [f"{method} on {len(prompts)} tasks, {sum(scores.n_prompts)} prompts: {out}"]
    show(
        found
        if as_json
        else "\n".join([*lines, *(f"  layer {h.layer:3} head {h.head:3}  {h.score:+.3g}" for h in top)])
    )


@fv.command()
def build(
    model: ModelRef,
    scores: Annotated[Path, typer.Argument(help="Folder that `transfer fv select` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder; each task gets one of its own inside.")],
    tasks: Tasks = "rule",
    task: Names = [],  # noqa: B006
    instructions: Instructions = None,
    heads: Annotated[int, typer.Option(min=1, help="Heads of a vector.")] = 20,
    per_task: Annotated[bool, typer.Option(help="Each task's own best heads; otherwise one set for all.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average the chosen heads' outputs over a task's clean prompts: one vector a task.

    By default the tasks that were scored; others may be named too, with the heads chosen on those.
    """
    set_quiet(quiet or as_json)
    from transfer.function_vectors.scores import HeadScores
    from transfer.function_vectors.select import Recipe, prepare
    from transfer.function_vectors.tasks import read_tasks
    from transfer.function_vectors.vectors import build as make

    chosen = HeadScores.load(scores)
    wanted = read_tasks(tasks, task or list(chosen.tasks), instructions=instructions)
    for one in wanted:
        _free(out / one.name / "vector.json", force)
    language = _language(model, dtype, device)
    chosen.check(language)
    rows = []
    for one in wanted:
        prompts = prepare(language, one, Recipe.of(chosen.settings["recipe"]))
        vector = make(language, prompts, chosen.top(heads, one.name if per_task else None), method=chosen.method)
        vector.save(out / one.name)
        rows.append({"task": one.name, "vector": vector.id, "folder": str(out / one.name), "prompts": vector.n_prompts})
    show({"vectors": rows} if as_json else "\n".join(f"{r['task']}: {r['vector']}  {r['folder']}" for r in rows))


@fv.command("eval")
def evaluate(
    model: ModelRef,
    vector: Annotated[Path, typer.Argument(help="Folder of one vector.")],
    out: Annotated[Path, typer.Option(help="JSON file of all numbers.")],
    tasks: Tasks = "rule",
    instructions: Instructions = None,
    wrong: Annotated[Path | None, typer.Option(help="Folder of another task's vector, as a control.")] = None,
    seeds: Annotated[int, typer.Option(min=3, help="Seeds, from 0.")] = 3,
    n: Annotated[int | None, typer.Option(min=1, help="Test items at most.")] = None,
    n_valid: Annotated[int, typer.Option(min=1, help="Validation items at most, for layer and scale.")] = 100,
    n_texts: Annotated[int, typer.Option(min=0, help="Unrelated texts for side effects.")] = 100,
    corpus: Annotated[str, typer.Option(help="Unrelated texts: JSONL, CSV, parquet, hub:… or bundled:….")] = (
        "bundled:requests"
    ),
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose layer and scale on validation items, then measure both modes, ceilings and controls on test items."""
    set_quiet(quiet or as_json)
    from transfer.core.files import plain, write_json
    from transfer.corpus import load_corpus
    from transfer.function_vectors.evaluate import draw
    from transfer.function_vectors.evaluate import evaluate as measure
    from transfer.function_vectors.select import Recipe
    from transfer.function_vectors.tasks import read_tasks
    from transfer.function_vectors.tuning import tune
    from transfer.function_vectors.vectors import FunctionVector

    _free(out, force)
    loaded = FunctionVector.load(vector)
    other = None if wrong is None else FunctionVector.load(wrong)
    one = read_tasks(tasks, [loaded.task], instructions=instructions)[0]
    language = _language(model, dtype, device)
    loaded.check(language)
    if other is not None:
        other.check(language)
    recipe = Recipe.of(loaded.recipe)
    valid = one.split(recipe.split_seed)["valid"][:n_valid]
    tuning = tune(language, loaded.deltas, valid, template=recipe.template)
    texts = [text.text for text in load_corpus(corpus).texts[:n_texts]] if n_texts else []
    drawn = draw(language, one, loaded, tuple(range(seeds)))
    found = measure(language, one, drawn, tuning, wrong=other, n=n, texts=texts)
    record = plain({**found.record(), "sweep": tuning.table()})
    write_json(out, record)
    show(record if as_json else _lines(found, out))


def _lines(found: FVEvaluation, out: Path) -> str:
    """Top-1 of every condition, with its interval."""
    lines = [f"{found.task} in {found.model}: {found.n_test} test items, {len(found.seeds)} seeds  {out}"]
    for mode, plan in found.plans.items():
        where = "each layer" if plan["layer"] is None else f"layer {plan['layer']}"
        lines.append(f"  {mode}: {where}, scale {plan['scale']:.2f} (best of {found.tried[mode]} on validation items)")
    for e in found.estimates:
        if e.metric == "top1" and e.items == "all":
            lines.append(f"  {e.condition:38} top-1 {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]")
    if found.get("clean_icl").high < 0.1:
        lines.append("  this model does not do the task from demonstrations, so its vector can carry none")
    for mode, kl in found.side_effects.items():
        lines.append(f"  unrelated texts, {mode}: KL {kl['kl']:.3f} nats [{kl['low']:.3f}, {kl['high']:.3f}]")
    lines += [f"  not run: {name} ({why})" for name, why in found.missing.items()]
    return "\n".join(lines)

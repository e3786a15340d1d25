"""One task trained and judged on data of its own: a folder for every recipe and seed, finished ones used again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfer.core.console import progress, say
from transfer.core.errors import TransferError
from transfer.core.files import file_hash, read_json, write_json
from transfer.core.keys import SCHEMA, digest
from transfer.core.outcomes import EvalResult
from transfer.finetune import data_hash
from transfer.tasks import get_task
from transfer.tasks.base import Data, Restorable, Task
from transfer.train.recipes import Recipe

RESULTS = "results.json"
SCORES = "examples.jsonl"


def run_task(
    task: Task,
    base: str,
    train: Sequence[str],
    evaluation: str,
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    out: Path,
) -> list[dict[str, Any]]:
    """Train and judge every recipe with every seed.

    Each has a folder ``<recipe>-seed<n>``: the trained part and its record, ``examples.jsonl`` (one line an example),
    and ``results.json``, which is written last. One that is there for the same data, base, recipe and task is read.

    Args:
        task: The task.
        base: Typed model reference; ``models.placement`` says where it runs.
        train: Files or ``hub:…`` references, put together.
        evaluation: What to judge on.
        recipes: How to train.
        seeds: Seeds of each recipe.
        out: Folder.

    Returns:
        The results of each folder, in order.

    Raises:
        TransferError: For data or a model that cannot be used, before anything is trained where that can be seen.
    """
    from models.language import kept_language

    parts = [task.load(ref) for ref in train]
    examples = [example for part in parts for example in task.examples(part)]
    held = task.load(evaluation)
    if not examples:
        raise TransferError("There is nothing to train on.", "Name training data with --train or tune.train.")
    if hasattr(task, "positive"):  # the other tasks know what they were trained on, and refuse it themselves
        seen = {str(text).strip().casefold() for text, *_ in examples}
        known = [i for i, (text, *_) in enumerate(task.examples(held)) if str(text).strip().casefold() in seen]
        if known:
            raise TransferError(
                f"{len(known)} of {len(held)} evaluation texts were trained on, first number {known[0]}.",
                "Split the texts before training.",
            )
    data = {
        "train": [_about(ref, part) for ref, part in zip(train, parts, strict=True)],
        "evaluation": _about(evaluation, held),
    }
    inputs = {"schema": SCHEMA, "task": _settings(task), "base": kept_language(base).hash, "data": data_hash(examples)}
    found = []
    with progress(f"{task.name} {base}", len(recipes) * len(seeds), "runs") as advance:
        for recipe in recipes:
            for seed in seeds:
                key = digest([inputs, dataclasses.asdict(recipe), seed, held.hash])
                folder = Path(out) / f"{recipe.name}-seed{seed}"
                if (done := _finished(folder, key)) is None:
                    done = _one(task, base, examples, held, recipe, seed, folder, {"key": key, **data})
                else:
                    say(f"{folder} reused")
                found.append(done)
                advance(1)
    return found


def _one(
    task: Task, base: str, examples: list[Any], held: Any, recipe: Recipe, seed: int, folder: Path, more: dict[str, Any]
) -> dict[str, Any]:
    (folder / RESULTS).unlink(missing_ok=True)
    model, run = task.fit(base, examples, recipe, seed, folder / "model")
    evals = task.evaluate(model, held, folder / SCORES)
    record = {
        "schema": SCHEMA,
        "task": _settings(task),
        "base": base,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "run": dataclasses.asdict(run),
        "evals": [dataclasses.asdict(e) for e in evals],
        "scores": file_hash(folder / SCORES),
        **more,
    }
    write_json(folder / RESULTS, record)
    return read_json(folder / RESULTS)


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The results of a folder when they are those of ``key`` and the scores still belong to them."""
    if not (folder / RESULTS).is_file() or not (folder / SCORES).is_file():
        return None
    record = read_json(folder / RESULTS)
    same = record.get("key") == key and record.get("scores") == file_hash(folder / SCORES)
    return record if same else None


def _settings(task: Task) -> dict[str, Any]:
    fields = dataclasses.fields(task)  # type: ignore[arg-type]
    return {"name": task.name, "options": {f.name: getattr(task, f.name) for f in fields if f.init}}


def _about(ref: str, data: Data) -> dict[str, Any]:
    """What is recorded of a set: how many examples, which rows are none and why."""
    return {"ref": ref, "n": len(data), "hash": data.hash, "left_out": dict(getattr(data, "left_out", {}))}


def reopen(folder: Path) -> tuple[Task, Any, dict[str, Any]]:
    """The task, the trained model and the record of one folder that ``run_task`` wrote.

    Raises:
        TransferError: When it holds none, or its base is not what it was.
    """
    if not (Path(folder) / RESULTS).is_file():
        raise TransferError(f"{folder} holds no trained task.", "Name a folder that `transfer tune task` listed.")
    record = read_json(Path(folder) / RESULTS)
    task = get_task(record["task"]["name"], **record["task"]["options"])
    if not isinstance(task, Restorable):
        raise TransferError(f"Models of {task.name} cannot be opened again.", "Give the task a method restore.")
    return task, task.restore(record["base"], Path(folder) / "model"), record


def judge_again(folder: Path, evaluation: str, out: Path | None = None) -> tuple[list[EvalResult], dict[str, Any]]:
    """Results of a trained model on other data, and what is recorded of that data.

    Args:
        folder: See ``reopen``.
        evaluation: What to judge on; what the model was trained on is refused where the task can tell.
        out: File for one line an example; beside the trained part by default.
    """
    task, model, _ = reopen(folder)
    held = task.load(evaluation)
    out = out or Path(folder) / f"examples-{held.hash[:8]}.jsonl"
    return task.evaluate(model, held, out), {**_about(evaluation, held), "per_example": str(out)}


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a metric of one folder's results, for tables."""
    about = {"base": record["base"], "recipe": record["recipe"]["name"], "seed": record["seed"]}
    numbers = {"n_train": record["run"]["n_examples"], "n_dropped": record["run"]["n_dropped"]}
    return [
        {**about, **numbers, **{k: e[k] for k in ("metric", "value", "stderr", "n", "template")}}
        for e in record["evals"]
    ]

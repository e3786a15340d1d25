"""Downstream tasks by name; a user's own come from entry points or by their dotted path."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any, cast

from transfer.core.config import TuneSection
from transfer.core.errors import TransferError
from transfer.tasks.base import Task
from transfer.tasks.instruction import Instruction
from transfer.tasks.intent import Intent
from transfer.tasks.reward import Reward
from transfer.tasks.steering import Steering
from transfer.tasks.toxicity import Toxicity

TASKS: dict[str, Task] = {t.name: t for t in (Intent(), Toxicity(), Reward(), Steering(), Instruction())}
"""Every task of this package."""

GROUP = "transfer.tasks"
"""Entry-point group in which installed packages announce tasks: ``name = "module:Class"``."""


def get_task(name: str, **options: Any) -> Task:
    """A task, with its options changed where given.

    Args:
        name: One of ``TASKS``, the name of an entry point in ``GROUP``, or ``module:Class`` of a class that can be
            called without arguments.
        options: Fields of the task.

    Raises:
        TransferError: For an unknown name or option, with the nearest known one, or a class that is no task.
    """
    task: Any = TASKS[name] if name in TASKS else _foreign(name)
    known = [f.name for f in dataclasses.fields(task) if f.init]
    if not {"positive", "unseen"}.isdisjoint(options) and "positive" not in known:
        # The grid passes these for every task; the reader of the message never wrote them.
        raise TransferError(
            f"Task {name!r} has no class to detect, and the grid trains classifiers only.",
            "Train it on its own with `transfer tune task`, or set tune.task to intent or toxicity.",
        )
    for option in options:
        if option not in known:
            raise TransferError(f"Task {name!r} has no option {option!r}.", _did_you_mean(option, known))
    return dataclasses.replace(task, **options)


def grid_task(tune: TuneSection, positive: str, **options: Any) -> Task:
    """The task of an experiment's grid, whose training examples are single labelled texts.

    The other label is whatever stands beside the positive one in the experiment's data.

    Args:
        tune: The section.
        positive: The label to detect.
        options: More fields of the task.

    Raises:
        TransferError: As ``get_task``, or for settings that only a task trained on its own reads.
    """
    task = get_task(tune.task, positive=positive, **options)
    unread = [name for name in ("train", "evaluation", "options", "base") if getattr(tune, name)]
    if unread:
        raise TransferError(
            f"The grid does not read tune.{unread[0]}: it trains and judges on the experiment's own texts.",
            f"Remove it, or train {tune.task!r} on its own with `transfer tune task`.",
        )
    return dataclasses.replace(cast(Any, task), negative="") if hasattr(task, "negative") else task


def _foreign(name: str) -> Any:
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    path = found.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise TransferError(f"Unknown task {name!r}.", _did_you_mean(name, [*TASKS, *found]))
    try:
        made: Any = getattr(importlib.import_module(module), attribute)
        task = made() if isinstance(made, type) else made
    except (ImportError, AttributeError, TypeError) as error:
        raise TransferError(f"Task {name!r} cannot be made from {path}: {error}.", "Write module:Class.") from None
    if not isinstance(task, Task) or not dataclasses.is_dataclass(task):
        raise TransferError(
            f"{path} is no task.", "Write a frozen dataclass with the members of transfer.tasks.base.Task."
        )
    return task


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."

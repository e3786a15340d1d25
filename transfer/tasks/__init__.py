"""Downstream tasks by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from transfer.core.errors import TransferError
from transfer.tasks.base import Task
from transfer.tasks.intent import Intent

TASKS: dict[str, Task] = {task.name: task for task in (Intent(),)}
"""Every task; a user adds one with ``TASKS[task.name] = task``."""


def get_task(name: str, **options: Any) -> Task:
    """The task of that name, with its options changed where given.

    Raises:
        TransferError: For an unknown name or option, with the nearest known one.
    """
    if name not in TASKS:
        raise TransferError(f"Unknown task {name!r}.", _did_you_mean(name, list(TASKS)))
    task: Any = TASKS[name]
    known = [f.name for f in dataclasses.fields(task) if f.init]
    for option in options:
        if option not in known:
            raise TransferError(f"Task {name!r} has no option {option!r}.", _did_you_mean(option, known))
    return dataclasses.replace(task, **options)


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."

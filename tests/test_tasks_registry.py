"""Tasks by name: built in, from an entry point, by a dotted path."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import transfer.tasks as tasks
from transfer.core.errors import TransferError
from transfer.tasks import TASKS, get_task
from transfer.tasks.base import Task
from transfer.tasks.intent import Intent


@dataclass(frozen=True)
class Length:
    """A user's own task: nothing but the protocol."""

    limit: int = 3
    name: str = "length"
    metrics: tuple[str, ...] = ("accuracy",)

    def load(self, ref: str) -> Any: ...

    def examples(self, corpus: Any) -> Any: ...

    def fit(self, base: Any, examples: Any, recipe: Any, seed: int) -> Any: ...

    def evaluate(self, model: Any, corpus: Any, out_file: Any) -> Any: ...

    def weighted(self, metric: str) -> None: ...


class NoTask:
    pass


def test_every_task_keeps_the_protocol_and_travels_to_workers():
    assert set(TASKS) == {"intent", "toxicity", "reward", "steering", "instruction"}
    for name, task in TASKS.items():
        assert isinstance(task, Task) and task.name == name and task.metrics
        assert pickle.loads(pickle.dumps(task)) == task
        assert task.weighted(task.metrics[0]) is not None, "the grid's intervals need the headline under weights"


def test_a_dotted_path_gives_a_users_task():
    task: Any = get_task(f"{__name__}:Length", limit=5)
    assert (task.name, task.limit) == ("length", 5)
    with pytest.raises(TransferError, match="no option 'limti'.*'limit'"):
        get_task(f"{__name__}:Length", limti=5)
    with pytest.raises(TransferError, match="is no task"):
        get_task(f"{__name__}:NoTask")
    for path in (f"{__name__}:Missing", "no_such_module:Task"):
        with pytest.raises(TransferError, match="cannot be made"):
            get_task(path)


def test_an_entry_point_gives_a_packages_task(monkeypatch):
    points = [EntryPoint("length", f"{__name__}:Length", tasks.GROUP)]
    monkeypatch.setattr(tasks, "entry_points", lambda group: points if group == "transfer.tasks" else [])
    assert get_task("length") == Length()
    with pytest.raises(TransferError, match="Did you mean 'length'"):
        get_task("lenght")
    assert get_task("intent", positive="x") == Intent(positive="x")

"""Tasks by name: built in, from an entry point, by a dotted path."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import transfer.tasks as tasks
from transfer.core.config import TuneSection
from transfer.core.errors import TransferError
from transfer.tasks import TASKS, get_task, grid_task
from transfer.tasks.base import Restorable, Task
from transfer.tasks.intent import Intent
from transfer.tasks.toxicity import Toxicity


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
        assert pickle.loads(pickle.dumps(task)) == task and isinstance(task, Restorable)
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


def test_what_the_grid_cannot_train_says_so_in_the_users_words():
    for name in ("reward", "steering", "instruction"):
        with pytest.raises(TransferError, match="no class to detect.*`transfer tune task`"):
            get_task(name, positive="harmful", unseen=("x",))
    with pytest.raises(TransferError, match="no option 'positiv'.*'positive'"):
        get_task("intent", positiv="x")
    plain = TuneSection.model_validate({"task": "toxicity"})
    assert grid_task(plain, "1") == Toxicity(positive="1", negative="")
    for unread in (dict(train="x"), dict(options={"draws": 5}), dict(base={"model": "zoo:llama"})):
        with pytest.raises(TransferError, match=f"does not read tune.{next(iter(unread))}"):
            grid_task(plain.model_copy(update=unread), "1")


def test_an_entry_point_gives_a_packages_task(monkeypatch):
    points = [EntryPoint("length", f"{__name__}:Length", tasks.GROUP)]
    monkeypatch.setattr(tasks, "entry_points", lambda group: points if group == "transfer.tasks" else [])
    assert get_task("length") == Length()
    with pytest.raises(TransferError, match="Did you mean 'length'"):
        get_task("lenght")
    assert get_task("intent", positive="x") == Intent(positive="x")

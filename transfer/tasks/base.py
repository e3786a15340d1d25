"""What a task is to the grid: it reads data, makes training examples, trains and scores a model, names its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from transfer.core.keys import digest
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.stats import WeightedMetric

if TYPE_CHECKING:
    from transfer.finetune import Recipe

Example = tuple[str, int]
"""One training example of a classification: text and class number."""

E = TypeVar("E", bound=tuple[Any, ...])
"""A training example: a tuple of JSON-able values, so that it has a hash and a line in a file."""


@dataclass(frozen=True)
class Examples(Generic[E]):
    """Data of a task that is not single texts: pairs, questions, demonstrations."""

    name: str
    rows: tuple[E, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the file that are no examples, counted by reason."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    @cached_property
    def hash(self) -> str:
        """Content hash over the rows, order included."""
        return digest([list(row) for row in self.rows])


class Data(Protocol):
    """What a task reads: a ``Corpus`` or ``Examples``."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def hash(self) -> str:
        """Content hash."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of some texts."""

    probabilities: np.ndarray
    """float64 [docs, classes]"""
    n_truncated: int
    """Texts cut to the model's token limit."""


class Predictor(Protocol):
    """A trained model as a classification sees it."""

    def predict(self, texts: list[str]) -> Predictions:
        """Class probabilities, one row a text."""
        ...


D = TypeVar("D", bound=Data, contravariant=True)
X = TypeVar("X", bound=tuple[Any, ...])


@runtime_checkable
class Task(Protocol[D, X]):
    """One downstream task; a frozen dataclass, so that it travels to worker processes and into content keys."""

    @property
    def name(self) -> str:
        """Registry name."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metric names, the headline first; higher is better for all of them."""
        ...

    def load(self, ref: str) -> Any:
        """Training or evaluation data from a file."""
        ...

    def examples(self, corpus: D) -> list[X]:
        """Training examples from data."""
        ...

    def fit(
        self, base: Any, examples: list[X], recipe: Recipe, seed: int, out: Path | None = None
    ) -> tuple[Any, FinetuneRun]:
        """Train one model, and keep what was trained in the folder ``out`` where one is named."""
        ...

    def evaluate(self, model: Any, corpus: D, out_file: Path) -> list[EvalResult]:
        """Every metric on evaluation data; one line an example goes to ``out_file``."""
        ...

    def weighted(self, metric: str) -> WeightedMetric | None:
        """The metric under example weights, for bootstraps; None where it has no such form."""
        ...


@runtime_checkable
class Restorable(Protocol):
    """A task whose trained models can be opened again; all of this package's are."""

    def restore(self, base: Any, folder: Path) -> Any:
        """The model whose trained part ``fit`` kept in ``folder``."""
        ...


def template_hash(tokenizer: Any) -> str:
    """Which words a model saw around the data: the hash of its chat template; ``plain`` without one."""
    template = getattr(tokenizer, "chat_template", None)
    return digest(str(template)) if template else "plain"

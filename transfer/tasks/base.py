"""What a task is to the grid: it makes training examples, trains and scores a model, and says what its metrics are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.stats import WeightedMetric
from transfer.core.texts import Corpus

if TYPE_CHECKING:
    from transfer.finetune import Recipe

Example = tuple[str, int]
"""One training example: text and class number."""


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of some texts."""

    probabilities: np.ndarray
    """float64 [docs, classes]"""
    n_truncated: int
    """Texts cut to the model's token limit."""


class Predictor(Protocol):
    """A trained model as a task sees it."""

    def predict(self, texts: list[str]) -> Predictions:
        """Class probabilities, one row a text."""
        ...


@runtime_checkable
class Task(Protocol):
    """One downstream task; a frozen dataclass, so that it travels to worker processes and into content keys."""

    @property
    def name(self) -> str:
        """Registry name."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metric names, the headline first; higher is better for all of them."""
        ...

    def examples(self, corpus: Corpus) -> list[Example]:
        """Training examples from labelled texts."""
        ...

    def fit(self, base: Any, examples: list[Example], recipe: Recipe, seed: int) -> tuple[Any, FinetuneRun]:
        """Train one model."""
        ...

    def evaluate(self, model: Any, corpus: Corpus, out_file: Path) -> list[EvalResult]:
        """Every metric on an evaluation corpus; one line an example goes to ``out_file``."""
        ...

    def weighted(self, metric: str) -> WeightedMetric | None:
        """The metric under example weights, for bootstraps; None where it has no such form."""
        ...

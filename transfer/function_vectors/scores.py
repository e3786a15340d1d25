"""Scores of all heads over tasks, as one artefact, and the heads that they choose."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, read_json, save_arrays, write_json
from transfer.core.keys import SCHEMA

if TYPE_CHECKING:
    from models.language import LanguageModel

_NAME = "scores"


@dataclass(frozen=True)
class Head:
    """One attention head with what chose it."""

    layer: int
    """Decoder layer, from 0."""
    head: int
    score: float


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What one selector says of all heads of one model."""

    model: str
    model_hash: str
    method: str
    tasks: tuple[str, ...]
    each: np.ndarray
    """float64 [tasks, layers, heads], means over prompts; NaN where a head was screened out."""
    spread: np.ndarray
    """Standard error of ``each`` over prompts, NaN where fewer than two were scored."""
    n_prompts: tuple[int, ...]
    """Scored, by task."""
    lost: dict[str, int] = field(default_factory=dict)
    """Prompts that were not scored, and entries of task files that were not used, by reason."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How prompts were made, and the share of labels or instruction tokens that corruption left as they were."""

    def __post_init__(self) -> None:
        if self.each.ndim != 3 or len(self.each) != len(self.tasks) or self.spread.shape != self.each.shape:
            raise TransferError(f"Scores of {len(self.tasks)} tasks have the shape {self.each.shape}.")
        if np.isinf(self.each).any():
            raise TransferError(f"{int(np.isinf(self.each).sum())} head scores of {self.method} are infinite.")

    @property
    def values(self) -> np.ndarray:
        """Mean over tasks, float64 [layers, heads]."""
        return self.each.mean(axis=0)

    def top(self, k: int, task: str | None = None) -> tuple[Head, ...]:
        """The k best heads, best first; equal ones in order of layer and head.

        Args:
            k: How many.
            task: By this task alone; by the mean over tasks when left out.

        Raises:
            TransferError: For a task that was not scored, or more heads than were.
        """
        if task is not None and task not in self.tasks:
            raise TransferError(f"There are no scores for task {task}.", f"Scored were {', '.join(self.tasks)}.")
        values = self.values if task is None else self.each[self.tasks.index(task)]
        scored = int(np.isfinite(values).sum())
        if not 1 <= k <= scored:
            raise TransferError(f"{k} heads are asked for, {scored} have a score.", "Ask for fewer.")
        order = np.argsort(-np.where(np.isfinite(values), values, -np.inf).ravel(), kind="stable")[:k]
        return tuple(Head(int(i) // values.shape[1], int(i) % values.shape[1], float(values.ravel()[i])) for i in order)

    def check(self, language: LanguageModel) -> None:
        """Raise when the scores are of another model."""
        same_model(f"Head scores of {self.method}", self.model, self.model_hash, language)

    def save(self, folder: Path) -> None:
        """Arrays first, the JSON that names them last."""
        save_arrays(folder / f"{_NAME}.safetensors", {"each": self.each, "spread": self.spread})
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("each", "spread")}
        write_json(folder / f"{_NAME}.json", {"schema": SCHEMA, "kind": "head scores", **rest})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Inverse of ``save``.

        Raises:
            TransferError: When files are missing, damaged or of another kind.
        """
        facts = read_record(Path(folder) / f"{_NAME}.json", "head scores")
        arrays = load_arrays(Path(folder) / f"{_NAME}.safetensors")
        facts["tasks"], facts["n_prompts"] = tuple(facts["tasks"]), tuple(facts["n_prompts"])
        return cls(**facts, each=arrays["each"], spread=arrays["spread"])


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """The facts of an artefact's JSON file.

    Raises:
        TransferError: When it is missing, of another kind or of another schema.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.pop("kind", None) != kind:
        raise TransferError(f"{path} holds no {kind}.")
    if facts.pop("schema", None) != SCHEMA:
        raise TransferError(f"{path} was written by another version.", "Make it again.")
    return facts


def same_model(what: str, model: str, model_hash: str, language: LanguageModel) -> None:
    """Raise when ``what`` was made with a model whose weights differ from those of ``language``."""
    if model_hash != language.hash:
        raise TransferError(
            f"{what} were made with {model} ({model_hash}), not with {language.ref} ({language.hash}).",
            "Heads mean nothing in another model; make them with this one.",
        )

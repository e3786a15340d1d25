"""A function vector as one artefact: the heads, their mean outputs, and what these add to the residual stream."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, save_arrays, write_json
from transfer.core.keys import SCHEMA, digest
from transfer.function_vectors.heads import residual_deltas, shape_of
from transfer.function_vectors.scores import Head, read_record, same_model
from transfer.function_vectors.select import TaskPrompts

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

_NAME = "vector"


def tokenizer_hash(language: LanguageModel) -> str:
    """Content id of a tokenizer."""
    return digest(language.renderer.backend.to_str().encode())


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """Mean head outputs of one task in one model; layer, scale and mode are chosen where it is used."""

    model: str
    model_hash: str
    tokenizer_hash: str
    task: str
    task_hash: str
    heads: tuple[Head, ...]
    outputs: np.ndarray
    """Mean outputs z̄ by head, [heads, width]."""
    deltas: np.ndarray
    """What these add to the residual stream in each decoder layer, [layers, d_model]; zeros where no head is."""
    method: str
    """Selector that chose the heads."""
    n_prompts: int
    """Clean prompts that outputs were averaged over."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How the prompts were made, the template included."""

    def __post_init__(self) -> None:
        if not self.heads or len(self.outputs) != len(self.heads):
            raise TransferError(f"A function vector of {len(self.heads)} heads has {len(self.outputs)} outputs.")
        if not (np.isfinite(self.outputs).all() and np.isfinite(self.deltas).all()):
            raise TransferError(f"The function vector of {self.task} holds NaN or infinite values.")

    @property
    def total(self) -> np.ndarray:
        """The sum over layers [d_model]: what aggregated steering adds at one layer."""
        return self.deltas.sum(axis=0)

    @property
    def id(self) -> str:
        """Short content id."""
        return digest([self.model_hash, self.task_hash, digest(np.ascontiguousarray(self.deltas).tobytes())], 8)

    def check(self, language: LanguageModel) -> None:
        """Raise when the vector is of another model or tokenizer.

        Raises:
            TransferError: Naming both.
        """
        same_model(f"The heads of the function vector of {self.task}", self.model, self.model_hash, language)
        if self.tokenizer_hash != tokenizer_hash(language):
            raise TransferError(f"The function vector of {self.task} was made with another tokenizer.")

    def save(self, folder: Path) -> None:
        """Arrays first, the JSON that names them last."""
        save_arrays(folder / f"{_NAME}.safetensors", {"outputs": self.outputs, "deltas": self.deltas})
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("outputs", "deltas")}
        rest["heads"] = [asdict(head) for head in self.heads]
        rest["content"] = self.id
        write_json(folder / f"{_NAME}.json", {"schema": SCHEMA, "kind": "function vector", **rest})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Inverse of ``save``.

        Raises:
            TransferError: When files are missing, damaged, of another kind, or do not belong together.
        """
        facts = read_record(Path(folder) / f"{_NAME}.json", "function vector")
        content = facts.pop("content")
        facts["heads"] = tuple(
            Head(h["layer"], h["head"], float("nan") if h["score"] is None else h["score"]) for h in facts["heads"]
        )
        arrays = load_arrays(Path(folder) / f"{_NAME}.safetensors")
        vector = cls(**facts, outputs=arrays["outputs"], deltas=arrays["deltas"])
        if vector.id != content:
            raise TransferError(f"The files in {folder} do not belong together.", "Build the vector again.")
        return vector


def build(
    language: LanguageModel, prompts: TaskPrompts, heads: tuple[Head, ...], *, method: str = ""
) -> FunctionVector:
    """The function vector of a task from the mean outputs of some heads.

    Raises:
        TransferError: Without heads, for repeated ones, or for one that the model does not have.
    """
    n_layers, n_heads, _ = shape_of(language)
    places = [(head.layer, head.head) for head in heads]
    wrong = [place for place in places if not (0 <= place[0] < n_layers and 0 <= place[1] < n_heads)]
    if not heads or wrong or len(set(places)) < len(places):
        raise TransferError(f"These heads make no function vector: {wrong or places}.", "Name each of the model once.")
    return FunctionVector(
        model=language.ref,
        model_hash=language.hash,
        tokenizer_hash=tokenizer_hash(language),
        task=prompts.task.name,
        task_hash=prompts.task.hash,
        heads=tuple(heads),
        outputs=np.stack([prompts.mean[place].numpy() for place in places]),
        deltas=_deltas(language, places, [prompts.mean[place] for place in places]),
        method=method,
        n_prompts=prompts.n_mean,
        recipe=asdict(prompts.recipe),
    )


def _deltas(language: LanguageModel, places: list[tuple[int, int]], outputs: list[Tensor]) -> np.ndarray:
    import torch

    placed = torch.zeros(shape_of(language), dtype=torch.float64)
    for place, z in zip(places, outputs, strict=True):
        placed[place] += z
    return residual_deltas(language, placed).numpy()


def shuffled_heads(language: LanguageModel, vector: FunctionVector, seed: int) -> np.ndarray:
    """Control: the same outputs in the same layers, written through other heads' maps; deltas [layers, d_model].

    Raises:
        TransferError: When layers have one head only, so that there is no other.
    """
    import torch

    rng = np.random.default_rng([seed, 16])
    n_heads = shape_of(language)[1]
    if n_heads < 2:
        raise TransferError("A model with one head a layer has no other head to move an output to.")
    places: list[tuple[int, int]] = []
    for layer in sorted({head.layer for head in vector.heads}):
        # Cyclic shifts never leave an output where it was, and never put two into one slot.
        shift = int(rng.integers(1, n_heads))
        places += [(layer, (h.head + shift) % n_heads) for h in vector.heads if h.layer == layer]
    order = sorted(range(len(vector.heads)), key=lambda i: vector.heads[i].layer)
    return _deltas(language, places, [torch.from_numpy(vector.outputs[i]) for i in order])


def random_deltas(vector: FunctionVector, seed: int) -> np.ndarray:
    """Control: random directions as long as the vector's own delta in every layer [layers, d_model]."""
    noise = np.random.default_rng([seed, 17]).standard_normal(vector.deltas.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (noise * np.linalg.norm(vector.deltas, axis=1, keepdims=True)).astype(vector.deltas.dtype)

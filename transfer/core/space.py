"""Feature spaces, and sets of their features."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.keys import digest


@dataclass(frozen=True)
class FeatureSpace:
    """One SAE on one layer of one model: the space its feature ids live in."""

    model: str
    """Typed model reference, such as ``zoo:llama`` or ``hub:Qwen/Qwen2-7B-Instruct@<rev>``."""
    model_hash: str
    layer: int
    """Canonical layer: the index into transformers' ``hidden_states``."""
    sae: str
    """Typed SAE reference."""
    sae_hash: str
    n_features: int
    d_model: int
    rule: str
    """Activation rule, such as ``topk-16`` or ``relu``."""
    template_offset: int
    """Tokens that the chat template puts before the user's words; excluded from all statistics."""

    @cached_property
    def id(self) -> str:
        """Short content id."""
        return f"{self.model.split(':')[-1].split('@')[0].replace('/', '--')}@{digest(dataclasses.asdict(self), 8)}"

    def check(self, other: FeatureSpace, where: str) -> None:
        """Raise when ``other`` is another space.

        Raises:
            TransferError: Naming the first field that differs.
        """
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        for name, value in mine.items():
            if value != theirs[name]:
                raise TransferError(
                    f"{where} belongs to feature space {self.id} but was used with {other.id}: "
                    f"{name} is {value!r} there and {theirs[name]!r} here.",
                    "Run the stage that made it again, or pass the space it was made in.",
                )


@dataclass(frozen=True)
class FeatureSet:
    """Features of one space, with why they were chosen."""

    space: FeatureSpace
    features: np.ndarray
    """Feature ids, int64 [n], sorted and distinct."""
    why: str
    judge: str = ""
    """Who said so: judge name and version."""
    labels: tuple[str, ...] = ()
    """Per feature, the label it is associated with (empty when not judged)."""
    scores: np.ndarray | None = None
    """Per feature, the judge's strength."""
    descriptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = np.asarray(self.features, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.space.n_features):
            raise TransferError(f"Feature ids outside 0..{self.space.n_features - 1} in {self.space.id}.")
        if len(np.unique(ids)) != len(ids) or np.any(np.diff(ids) < 0):
            raise TransferError("A feature set must be sorted and distinct.")
        object.__setattr__(self, "features", ids)

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, keep: np.ndarray, why: str) -> FeatureSet:
        """The members whose ids are in ``keep``."""
        mask = np.isin(self.features, keep)
        rows = np.flatnonzero(mask)
        return dataclasses.replace(
            self,
            features=self.features[mask],
            why=why,
            labels=tuple(self.labels[i] for i in rows) if self.labels else (),
            scores=None if self.scores is None else self.scores[mask],
            descriptions=tuple(self.descriptions[i] for i in rows) if self.descriptions else (),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "space": dataclasses.asdict(self.space),
            "features": self.features.tolist(),
            "why": self.why,
            "judge": self.judge,
            "labels": list(self.labels),
            "scores": None if self.scores is None else [float(s) for s in self.scores],
            "descriptions": list(self.descriptions),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        return cls(
            space=FeatureSpace(**data["space"]),
            features=np.array(data["features"], dtype=np.int64),
            why=data["why"],
            judge=data["judge"],
            labels=tuple(data["labels"]),
            scores=None if data["scores"] is None else np.array(data["scores"]),
            descriptions=tuple(data["descriptions"]),
        )


@dataclass(frozen=True)
class FeatureView:
    """What an aligner may see of one space: plain arrays."""

    space: FeatureSpace
    directions: np.ndarray
    """Decoder rows, float32 [n_features, d_model]; not necessarily unit norm."""
    unembedding: np.ndarray | None = None
    """Unembedding rows of the tokens that both vocabularies share, in one order, float32 [shared, d_model]."""

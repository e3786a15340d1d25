"""How a model is trained: named recipes, the published ones among them."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from transfer.core.errors import TransferError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHOICES = {
    "kind": ("lora", "head", "full"),
    "layers": ("all", "upper"),
    "schedule": ("linear", "cosine"),
    "dtype": ("float32", "bfloat16"),
}
_POSITIVE = ("epochs", "lr", "batch", "accumulate", "rank", "alpha", "max_tokens", "max_steps")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, the learning rate falling to zero. The task decides the loss."""

    name: str
    kind: Literal["lora", "head", "full"]
    """``lora``: adapters on the linear maps, plus the head where the task has one; ``head``: the head alone on a
    frozen base; ``full``: every weight."""
    epochs: int
    lr: float
    batch: int
    """Examples a step."""
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.1
    weight_decay: float = 0.0
    max_tokens: int = 512
    """Longer inputs are cut and counted: on the right, and for preference pairs on the left."""
    max_steps: int | None = None
    """Large training sets end here, before their last epoch."""
    layers: Literal["all", "upper"] = "all"
    """Which layers get adapters: all, or the upper third: then the lower layers run once a text, not once an epoch."""
    accumulate: int = 1
    """Parts in which the examples of a step pass through the model: memory for time."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; weights and optimizer stay float32."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass instead of kept."""

    def __post_init__(self) -> None:
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise TransferError(
                    f"Recipe {self.name!r} has {field} {getattr(self, field)!r}.",
                    f"Use {' or '.join(map(repr, known))}.",
                )
        for field in _POSITIVE:
            if getattr(self, field) is not None and getattr(self, field) <= 0:
                raise TransferError(f"Recipe {self.name!r}: {field} is {getattr(self, field)}.", "Make it positive.")
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise TransferError(
                f"Recipe {self.name!r}: dropout and warmup must lie in [0, 1) and weight_decay not below 0."
            )
        if self.batch % self.accumulate:
            raise TransferError(
                f"Recipe {self.name!r} cannot split {self.batch} examples into {self.accumulate} parts."
            )
        if self.kind == "full" and self.layers == "upper":
            raise TransferError(f"Recipe {self.name!r} trains every weight, so its layers must be 'all'.")


# arXiv 2602.10388 and its code: batch = per-device batch x accumulation. Checkpointing changes no number: it makes
# long inputs fit beside everything else on 80 GB.
_PAPER = (
    Recipe("paper-lora", "lora", epochs=3, lr=5e-5, batch=16, accumulate=4, dtype="bfloat16"),
    Recipe("paper-head", "head", epochs=15, lr=8e-5, batch=4, accumulate=4, dtype="bfloat16"),
    Recipe(
        "paper-reward-lora",
        "lora",
        epochs=1,
        lr=8e-5,
        batch=8,
        accumulate=4,
        rank=16,
        alpha=32,
        weight_decay=0.01,
        schedule="cosine",
        warmup=0.1,
        max_tokens=1024,
        dtype="bfloat16",
        checkpointing=True,
    ),
    Recipe(
        "paper-reward-head",
        "head",
        epochs=5,
        lr=8e-5,
        batch=4,
        accumulate=4,
        weight_decay=0.01,
        schedule="cosine",
        warmup=0.1,
        max_tokens=1024,
        dtype="bfloat16",
    ),
    # LLaMA-Factory's defaults where the paper gives none.
    Recipe(
        "paper-instruction-lora",
        "lora",
        epochs=5,
        lr=1e-4,
        batch=16,
        accumulate=4,
        dropout=0.0,
        max_tokens=2048,
        dtype="bfloat16",
        checkpointing=True,
    ),
)

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        # For models of a few million parameters.
        Recipe("lora", "lora", epochs=3, lr=1e-3, batch=16, max_tokens=256),
        # The same within seconds a run: the demo trains hundreds of models in five minutes.
        Recipe(
            "lora-brief", "lora", epochs=2, lr=3e-3, batch=16, dropout=0, max_tokens=256, max_steps=30, layers="upper"
        ),
        Recipe("head", "head", epochs=20, lr=1e-2, batch=16, max_tokens=256, max_steps=400),
        Recipe("full", "full", epochs=3, lr=3e-4, batch=16, max_tokens=256),
        *_PAPER,
    )
}


def upper_layers(n: int) -> range:
    """The upper third of ``n`` layers: what ``layers: upper`` adapts."""
    return range(n - max(1, n // 3), n)


def get_recipe(name: str, **changes: Any) -> Recipe:
    """A preset, with some fields changed where given.

    Raises:
        TransferError: For an unknown preset or field.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(RECIPES)}."
        raise TransferError(f"Unknown recipe {name!r}.", hint)
    unknown = set(changes) - {f.name for f in dataclasses.fields(Recipe)}
    if unknown:
        raise TransferError(f"A recipe has no field {sorted(unknown)[0]!r}.")
    return dataclasses.replace(RECIPES[name], **changes)

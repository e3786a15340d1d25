"""Fine-tune a language model as a sequence classifier: LoRA through PEFT, the head alone, or all, by Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.core.outcomes import FinetuneRun
from transfer.train.recipes import LORA_TARGETS, RECIPES, Recipe, get_recipe
from transfer.train.trainers import (
    arguments,
    load_trained,
    loss_curve,
    read_record,
    revision,
    save_trained,
    scratch,
    trainable,
    with_adapters,
)

if TYPE_CHECKING:
    import torch

    from transfer.train.classifier import Backbone, Body, Classifier, Language

__all__ = ["LORA_TARGETS", "RECIPES", "Recipe", "data_hash", "finetune", "get_recipe", "load_classifier", "train_head"]


def finetune(
    base: str | Backbone | Language,
    examples: Sequence[tuple[str, int]],
    recipe: Recipe,
    seed: int,
    out: Path | None = None,
) -> tuple[Classifier, FinetuneRun]:
    """Train a two-class classifier from a causal language model.

    On CPU with one thread the same arguments give the same bits. The global random state is left as it was.

    Args:
        base: Typed model reference (loaded once and kept), a ``Backbone`` to use again, or a loaded language model.
        examples: (text, 0 or 1); both classes must occur.
        recipe: How to train.
        seed: Seeds ``score``, adapters, dropout and data order.
        out: Folder for the trained part (safetensors) and ``finetune.json``; replaced as a whole at the end.

    Returns:
        The classifier and the record of the run; the base is unchanged.

    Raises:
        TransferError: For one class only, other labels than 0 and 1, empty texts, or a loss that is not finite.
    """
    from transfer.train.classifier import Backbone, load_backbone, own_randomness

    start = time.monotonic()
    if isinstance(base, str):
        base = load_backbone(base)
    backbone = base if isinstance(base, Backbone) else Backbone(base)
    labels = [label for _, label in examples]
    if set(labels) != {0, 1}:
        raise TransferError(
            f"The training set of {backbone.ref} has {len(labels)} examples with the classes {sorted(set(labels))}; "
            "both 0 and 1 are needed.",
            "Add examples of the other class.",
        )
    rows, n_truncated = backbone.encode([text for text, _ in examples], recipe.max_tokens)
    with own_randomness(seed):
        if recipe.kind == "head":
            model, curve, trained = _train_head(backbone, rows, labels, recipe, seed)
        else:
            model, curve, trained = _train_body(backbone.body(recipe.layers), rows, labels, recipe, seed, backbone.ref)
    run = FinetuneRun(
        base=backbone.ref,
        base_hash=backbone.hash,
        recipe=recipe.name,
        data_hash=data_hash(examples),
        n_examples=len(examples),
        n_dropped=0,
        n_trainable=trained,
        n_tokens=sum(len(row) for row in rows),
        seed=seed,
        curve=curve,
        seconds=time.monotonic() - start,
        n_truncated=n_truncated,
        base_revision=revision(backbone.language),
    )
    if out is not None:
        save_trained(model, run, recipe, Path(out))
    return _classifier(model, backbone, recipe), run


def _classifier(model: Any, backbone: Backbone, recipe: Recipe) -> Classifier:
    from transfer.train.classifier import Classifier

    body = backbone.body(recipe.layers)
    return Classifier(model, backbone, body, recipe.max_tokens, frozen=recipe.kind == "head")


def data_hash(examples: Iterable[tuple[Any, ...]]) -> str:
    """Hash of a training set of any task, order included; an example is a tuple of JSON-able values."""
    return digest([[int(v) if isinstance(v, bool) else v for v in example] for example in examples])


def _train_body(
    body: Body, rows: list[list[int]], labels: list[int], recipe: Recipe, seed: int, ref: str
) -> tuple[Any, tuple[float, ...], int]:
    import torch

    model = body.fresh(seed, frozen=recipe.kind == "lora")
    model = with_adapters(model, recipe, "SEQ_CLS") if recipe.kind == "lora" else model.requires_grad_(True)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            **body.pad_batch([x["item"] for x in batch]),
            "labels": torch.tensor([x["labels"] for x in batch]),
        }

    data = [{"item": item, "labels": label} for item, label in zip(body.items(rows), labels, strict=True)]
    curve = _train(model, data, collate, recipe, seed, body.device, ref)
    return model, curve, trainable(model)


def _train_head(
    backbone: Backbone, rows: list[list[int]], labels: list[int], recipe: Recipe, seed: int
) -> tuple[Any, tuple[float, ...], int]:
    import torch

    def loss(score: torch.nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(score(features), labels)

    data = [{"features": f, "labels": x} for f, x in zip(backbone.pooled(rows), torch.tensor(labels), strict=True)]
    return train_head(backbone, data, loss, recipe, seed)


def train_head(
    backbone: Backbone,
    data: list[dict[str, torch.Tensor]],
    loss: Callable[..., torch.Tensor],
    recipe: Recipe,
    seed: int,
) -> tuple[Any, tuple[float, ...], int]:
    """Train ``score`` alone on pooled features: the frozen base gives the same ones in every epoch.

    Args:
        backbone: The frozen base.
        data: One dict of tensors an example; they are stacked.
        loss: Function of ``score`` and the stacked tensors by name.
        recipe: How to train.
        seed: Seeds ``score`` and data order.

    Returns:
        The model, the loss of each epoch, and how many parameters were trained.
    """
    import torch

    class Head(torch.nn.Module):
        def __init__(self, score: torch.nn.Module) -> None:
            super().__init__()
            self.score = score

        # One argument: to a forward with keywords Trainer would leave the mean over the parts of a step.
        def forward(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": loss(self.score, **tensors)}

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        return {"tensors": {name: torch.stack([x[name] for x in batch]) for name in batch[0]}}

    model = backbone.fresh(seed)
    model.score.requires_grad_(True)
    curve = _train(Head(model.score), data, collate, recipe, seed, backbone.device, backbone.ref)
    return model, curve, trainable(model.score)


def _train(
    model: torch.nn.Module, data: list[Any], collate: Any, recipe: Recipe, seed: int, device: torch.device, ref: str
) -> tuple[float, ...]:
    from transformers import Trainer, TrainingArguments

    with scratch() as folder:
        args = TrainingArguments(**arguments(recipe, len(data), seed, device, folder))
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)  # type: ignore[arg-type]
        return loss_curve(trainer, ref, recipe)


def load_classifier(base: str | Backbone, folder: Path) -> Classifier:
    """The classifier that ``finetune`` saved in ``folder``.

    Raises:
        TransferError: When the folder holds none, or it was trained from another base.
    """
    from transfer.train.classifier import load_backbone

    backbone = load_backbone(base) if isinstance(base, str) else base
    recipe, _ = read_record(Path(folder), backbone.ref, backbone.hash)
    model = load_trained(lambda: backbone.body(recipe.layers).fresh(0, recipe.kind != "full"), recipe, Path(folder))
    return _classifier(model, backbone, recipe)

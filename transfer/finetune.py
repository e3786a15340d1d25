"""Fine-tune a language model as a sequence classifier: LoRA through PEFT, or the head alone, both by Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, read_json, save_arrays, write_json
from transfer.core.keys import digest
from transfer.core.outcomes import FinetuneRun

if TYPE_CHECKING:
    import torch

    from transfer.classifier import Backbone, Body, Classifier, Language

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, linear decay to zero, plain cross-entropy over two classes."""

    name: str
    kind: Literal["lora", "head"]
    """``lora``: adapters on the linear maps plus ``score``; ``head``: ``score`` alone on a frozen base."""
    epochs: int
    lr: float
    batch: int
    """Examples a step."""
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.1
    weight_decay: float = 0.0
    max_tokens: int = 512
    """Longer inputs are cut on the right and counted."""
    max_steps: int | None = None
    """Large training sets end here, before their last epoch."""
    layers: Literal["all", "upper"] = "all"
    """Which layers get adapters: all, or the upper third: then the lower layers run once a text, not once an epoch."""

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "head"):
            raise TransferError(f"Recipe {self.name!r} has kind {self.kind!r}.", "Use 'lora' or 'head'.")
        if self.layers not in ("all", "upper"):
            raise TransferError(f"Recipe {self.name!r} has layers {self.layers!r}.", "Use 'all' or 'upper'.")
        for field in ("epochs", "lr", "batch", "rank", "alpha", "max_tokens", "max_steps"):
            if getattr(self, field) is not None and getattr(self, field) <= 0:
                raise TransferError(f"Recipe {self.name!r}: {field} is {getattr(self, field)}.", "Make it positive.")
        if not 0 <= self.dropout < 1 or self.weight_decay < 0:
            raise TransferError(f"Recipe {self.name!r}: dropout must lie in [0, 1) and weight_decay not below 0.")


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
        # arXiv 2602.10388 and its code, toxicity; batch = per-device batch x accumulation (4 x 4 and 1 x 4).
        Recipe("paper-lora", "lora", epochs=3, lr=5e-5, batch=16),
        Recipe("paper-head", "head", epochs=15, lr=8e-5, batch=4),
    )
}


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
    from transfer.classifier import Backbone, load_backbone, own_randomness

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
            model, curve, trained = _train_lora(backbone.body(recipe.layers), rows, labels, recipe, seed)
    if not all(loss == loss and abs(loss) != float("inf") for loss in curve):
        raise TransferError(
            f"Training {backbone.ref} with recipe {recipe.name!r} diverged (losses {curve}).", "Lower its lr."
        )
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
    )
    if out is not None:
        _save(model, run, recipe, Path(out))
    return _classifier(model, backbone, recipe), run


def _classifier(model: Any, backbone: Backbone, recipe: Recipe) -> Classifier:
    from transfer.classifier import Classifier

    body = backbone.body(recipe.layers)
    return Classifier(model, backbone, body, recipe.max_tokens, frozen=recipe.kind == "head")


def data_hash(examples: Sequence[tuple[str, int]]) -> str:
    """Hash of a training set, order included."""
    return digest([[text, int(label)] for text, label in examples])


@contextlib.contextmanager
def _peft_quiet() -> Iterator[None]:
    """PEFT reads an attribute that transformers 5 renamed; its users can do nothing about the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _train_lora(
    body: Body, rows: list[list[int]], labels: list[int], recipe: Recipe, seed: int
) -> tuple[Any, tuple[float, ...], int]:
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,  # also trains and saves `score`
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(LORA_TARGETS),
    )
    with _peft_quiet():
        model = get_peft_model(body.fresh(seed), config)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            **body.pad_batch([x["item"] for x in batch]),
            "labels": torch.tensor([x["labels"] for x in batch]),
        }

    data = [{"item": item, "labels": label} for item, label in zip(body.items(rows), labels, strict=True)]
    curve = _train(model, data, collate, recipe, seed, body.device)
    return model, curve, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _train_head(
    backbone: Backbone, rows: list[list[int]], labels: list[int], recipe: Recipe, seed: int
) -> tuple[Any, tuple[float, ...], int]:
    """Train ``model.score`` on pooled features: the frozen base gives the same ones in every epoch."""
    import torch

    class Head(torch.nn.Module):
        def __init__(self, score: torch.nn.Module) -> None:
            super().__init__()
            self.score = score

        def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.score(features)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "features": torch.stack([x["features"] for x in batch]),
            "labels": torch.tensor([x["labels"] for x in batch]),
        }

    model = backbone.fresh(seed)
    features = backbone.pooled(rows)
    data = [{"features": f, "labels": label} for f, label in zip(features, labels, strict=True)]
    model.score.requires_grad_(True)
    curve = _train(Head(model.score), data, collate, recipe, seed, backbone.device)
    return model, curve, sum(p.numel() for p in model.score.parameters())


def _train(
    model: torch.nn.Module, data: list[dict[str, Any]], collate: Any, recipe: Recipe, seed: int, device: torch.device
) -> tuple[float, ...]:
    """Run Trainer; returns the mean loss of each epoch."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory(prefix="transfer-tune-") as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=recipe.batch,
            num_train_epochs=recipe.epochs,
            max_steps=_step_limit(len(data), recipe),
            learning_rate=recipe.lr,
            weight_decay=recipe.weight_decay,
            seed=seed,
            data_seed=seed,
            use_cpu=device.type == "cpu",
            bf16=False,
            logging_strategy="epoch",
            logging_nan_inf_filter=False,  # by default a diverged loss is logged as a plausible number
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def _step_limit(n: int, recipe: Recipe) -> int:
    """What Trainer wants as ``max_steps``: -1 where the epochs end first."""
    steps = recipe.epochs * math.ceil(n / recipe.batch)
    return recipe.max_steps if recipe.max_steps is not None and recipe.max_steps < steps else -1


def _save(model: Any, run: FinetuneRun, recipe: Recipe, out: Path) -> None:
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if recipe.kind == "lora":
        model.save_pretrained(part, save_embedding_layers=False)
    else:
        save_arrays(part / "score.safetensors", {"weight": model.score.weight.detach().cpu().numpy()})
    write_json(part / "finetune.json", {"run": dataclasses.asdict(run), "recipe": dataclasses.asdict(recipe)})
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def load_classifier(base: str | Backbone, folder: Path) -> Classifier:
    """The classifier that ``finetune`` saved in ``folder``.

    Raises:
        TransferError: When the folder holds none, or it was trained from another base.
    """
    import torch

    from transfer.classifier import load_backbone

    backbone = load_backbone(base) if isinstance(base, str) else base
    meta = read_json(Path(folder) / "finetune.json")
    if meta["run"]["base_hash"] != backbone.hash:
        raise TransferError(
            f"{folder} was trained from {meta['run']['base']} ({meta['run']['base_hash']}), not from {backbone.ref} "
            f"({backbone.hash}).",
            "Pass the base it was trained from.",
        )
    recipe = Recipe(**meta["recipe"])
    model = backbone.body(recipe.layers).fresh(0)
    if recipe.kind == "lora":
        from peft import PeftModel

        with _peft_quiet():
            model = PeftModel.from_pretrained(model, str(folder))
    else:
        weight = load_arrays(Path(folder) / "score.safetensors")["weight"]
        model.score.weight.data = torch.from_numpy(weight).to(backbone.device)
    return _classifier(model, backbone, recipe)

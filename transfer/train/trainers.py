"""What every training has in common: arguments of Trainer and TRL's trainers, adapters, the loss curve, files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, read_json, save_arrays, write_json
from transfer.core.outcomes import FinetuneRun
from transfer.train.recipes import LORA_TARGETS, Recipe

if TYPE_CHECKING:
    import torch

RECORD = "finetune.json"


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A folder that Trainer wants and nothing is kept in."""
    with tempfile.TemporaryDirectory(prefix="transfer-tune-") as folder:
        yield folder


def arguments(recipe: Recipe, n: int, seed: int, device: torch.device, folder: str) -> dict[str, Any]:
    """Arguments that ``TrainingArguments`` and TRL's configurations share, every trap of theirs set.

    Args:
        recipe: How to train.
        n: Training examples.
        seed: Seeds dropout and data order.
        device: Where the model is.
        folder: See ``scratch``.
    """
    from transformers import TrainingArguments

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    # Renamed within transformers 5; TRL's configurations turn it on unless told otherwise, also on a CPU.
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    limit = _step_limit(n, recipe)
    steps = recipe.epochs * math.ceil(n / recipe.batch) if limit < 0 else limit
    return dict(
        output_dir=folder,
        per_device_train_batch_size=recipe.batch // recipe.accumulate,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=recipe.epochs,
        max_steps=limit,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        bf16=recipe.dtype == "bfloat16",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # by default a diverged loss is logged as a plausible number
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **{checkpointing: recipe.checkpointing},
    )


def _step_limit(n: int, recipe: Recipe) -> int:
    """What Trainer wants as ``max_steps``: -1 where the epochs end first."""
    steps = recipe.epochs * math.ceil(n / recipe.batch)
    return recipe.max_steps if recipe.max_steps is not None and recipe.max_steps < steps else -1


def loss_curve(trainer: Any, what: str, recipe: Recipe) -> tuple[float, ...]:
    """Train; the mean loss of each epoch.

    Raises:
        TransferError: For a model without a trainable parameter, or a loss that is not finite.
    """
    from transformers import PrinterCallback

    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise TransferError(f"Recipe {recipe.name!r} leaves {what} without a trainable parameter.")
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curve = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    if not all(math.isfinite(loss) for loss in curve):
        raise TransferError(f"Training {what} with recipe {recipe.name!r} diverged (losses {curve}).", "Lower its lr.")
    return curve


def train_with_trl(
    kind: Literal["Reward", "SFT"],
    model: Any,
    rows: list[dict[str, Any]],
    recipe: Recipe,
    seed: int,
    *,
    tokenizer: Any,
    what: str,
    collate: Callable[..., Any] | None = None,
    **settings: Any,
) -> tuple[float, ...]:
    """Train by TRL's ``<kind>Trainer``; the mean loss of each epoch.

    Args:
        kind: Which trainer.
        model: What is trained, adapters in place.
        rows: The training set; no row is left out for its length.
        recipe: How to train.
        seed: Seeds dropout and data order.
        tokenizer: Copied, because TRL sets its pad token.
        what: For messages.
        collate: Makes a batch; TRL's own where none is given.
        settings: Further fields of ``<kind>Config``.

    Raises:
        TransferError: Without TRL, and as ``loss_curve``.
    """
    try:
        from datasets import Dataset

        module = f"trl.trainer.{kind.lower()}"
        config = getattr(importlib.import_module(f"{module}_config"), f"{kind}Config")
        trainer = getattr(importlib.import_module(f"{module}_trainer"), f"{kind}Trainer")
    except ImportError:
        raise TransferError(f"Training {what} needs TRL.", "Run `pip install cross-model-transfer[train]`.") from None
    with scratch() as folder:
        args = config(**arguments(recipe, len(rows), seed, model.device, folder), max_length=None, **settings)
        data = Dataset.from_list(rows)
        extra = {} if collate is None else {"data_collator": collate}
        made = trainer(model=model, args=args, train_dataset=data, processing_class=copy.deepcopy(tokenizer), **extra)
        return loss_curve(made, what, recipe)


def revision(language: Any) -> str:
    """The commit that a base was loaded from on the Hub; empty for files."""
    return str(getattr(language.model.config, "_commit_hash", None) or "")


def trainable(model: torch.nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_adapters(model: torch.nn.Module, recipe: Recipe, task_type: str, layers: Sequence[int] | None = None) -> Any:
    """The model under PEFT's LoRA adapters.

    Args:
        model: A transformers model; it is changed.
        recipe: Rank, alpha and dropout.
        task_type: PEFT's name: ``SEQ_CLS`` also trains and saves ``score``, ``CAUSAL_LM`` adapters alone.
        layers: Decoder layers that get adapters; all when left out.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType[task_type],
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(LORA_TARGETS),
        layers_to_transform=None if layers is None else list(layers),
    )
    with _peft_quiet():
        return get_peft_model(model, config)  # type: ignore[arg-type]


@contextlib.contextmanager
def _peft_quiet() -> Iterator[None]:
    """PEFT reads an attribute that transformers 5 renamed; its users can do nothing about the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


# Files: the trained part and its record, replaced as a whole.


def save_trained(
    model: Any, run: FinetuneRun, recipe: Recipe, out: Path, more: Mapping[str, Any] | None = None, head: str = "score"
) -> None:
    """Write the trained part as safetensors and ``finetune.json`` into ``out``, which is replaced as a whole.

    Args:
        model: A PEFT model (``lora``), or any other.
        run: The record.
        recipe: How it was trained.
        out: Folder.
        more: Further entries of the record.
        head: The module that a ``head`` recipe trains.
    """
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if recipe.kind == "lora":
        model.save_pretrained(part, save_embedding_layers=False)
    else:
        state = model.state_dict() if recipe.kind == "full" else {"weight": getattr(model, head).weight}
        # Tied weights share memory, which safetensors refuses: each is written once.
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in _untied(state).items()}
        save_arrays(part / f"{'weights' if recipe.kind == 'full' else head}.safetensors", arrays)
    record = {"run": dataclasses.asdict(run), "recipe": dataclasses.asdict(recipe), **(more or {})}
    write_json(part / RECORD, record)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def _untied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[int] = set()
    return {k: v for k, v in state.items() if v.data_ptr() not in seen and not seen.add(v.data_ptr())}


def read_record(folder: Path, base: str, base_hash: str) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and record of what ``save_trained`` wrote.

    Raises:
        TransferError: When the folder holds none, or it was trained from another base.
    """
    record = read_json(Path(folder) / RECORD)
    if record["run"]["base_hash"] != base_hash:
        raise TransferError(
            f"{folder} was trained from {record['run']['base']} ({record['run']['base_hash']}), not from {base} "
            f"({base_hash}).",
            "Pass the base it was trained from.",
        )
    return Recipe(**record["recipe"]), record


def load_trained(fresh: Callable[[], Any], recipe: Recipe, folder: Path, head: str = "score") -> Any:
    """The model that ``save_trained`` wrote.

    Args:
        fresh: Makes an untrained model of the same shape.
        recipe: From ``read_record``.
        folder: Where it is.
        head: The module that a ``head`` recipe trains.
    """
    import torch

    model = fresh()
    if recipe.kind == "lora":
        from peft import PeftModel

        with _peft_quiet():
            return PeftModel.from_pretrained(model, str(folder))
    if recipe.kind == "full":
        arrays = load_arrays(Path(folder) / "weights.safetensors")
        model.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    else:
        weight = load_arrays(Path(folder) / f"{head}.safetensors")["weight"]
        module = getattr(model, head)
        module.weight.data = torch.from_numpy(weight).to(module.weight.device)
    return model

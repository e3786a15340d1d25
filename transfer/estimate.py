"""What an experiment will take: memory on each device, space on disk, arithmetic and hours; nothing is loaded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.headers import ModelHeader, SaeHeader
from transfer.core.config import Experiment
from transfer.finetune import RECIPES, Recipe

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one weight."""
ACTIVATION = 34
"""Bytes a token, layer and unit of width that a backward pass keeps in 16 bits, without attention scores, which fused
attention never holds (Korthikanti et al. 2022, Eq. 1); twice that in 32 bits."""
CHECKPOINT = 2
"""The same under checkpointing: the input of each layer (and all of one layer)."""
GPU_RATE = 300.0
"""10¹² FLOP/s taken for a GPU that is not here: about 30 % of the dense bfloat16 peak of an H100."""


@dataclass(frozen=True)
class Side:
    """One model of an experiment, from headers alone."""

    name: str
    model: ModelHeader
    sae: SaeHeader | None
    layer: int | None
    dtype: str = "float32"
    device: str = "cpu"
    writes: bool = True
    """Whether it is one of ``models``, which the stages before fine-tuning load too."""

    @property
    def width(self) -> int | None:
        """Of the residual stream."""
        return self.model.d_model or (self.sae.d_model if self.sae else None)


@dataclass(frozen=True)
class Sizes:
    """Texts and tokens of one set, counted or assumed."""

    n: int
    tokens: int

    @property
    def each(self) -> float:
        """Tokens a text."""
        return self.tokens / max(self.n, 1)


@dataclass(frozen=True)
class Work:
    """Sets of texts by what they are for, per model: tokenizers differ."""

    texts: Mapping[str, Mapping[str, Sizes]]
    train: Mapping[str, Sizes] = field(default_factory=dict)
    """Per model, data of a task that is trained on its own."""
    evaluation: Mapping[str, Sizes] = field(default_factory=dict)
    alone: bool = False
    """Whether the task is trained on its own data, not by the grid."""


def memory(sides: list[Side], experiment: Experiment, alone: bool) -> list[dict[str, Any]]:
    """GiB on each device: models and SAEs that stay loaded, a local chat model that writes, the dearest fine-tuning.

    Worker processes hold copies of their own; the estimate is for one process. A task that is trained on its own runs
    in a process of its own, so it does not add to the stages before.
    """
    rows: dict[str, dict[str, Any]] = {}
    recipes = [RECIPES[name] for name in experiment.tune.recipes if name in RECIPES]
    for side in sides:
        parts = {"loaded_gib": 0.0, "writing_gib": 0.0, "tuning_gib": 0.0}
        row = rows.setdefault(side.device, {"device": side.device, "models": [], **parts})
        row["models"].append(side.name)
        if side.model.n_params is None:
            continue
        weights = BYTES[side.dtype] * side.model.n_params / GIB
        if side.writes:
            row["loaded_gib"] += weights + sae_gib(side)
            if experiment.synth.chat == f"local:{side.model.ref}":
                row["writing_gib"] = weights
        if not alone or (experiment.tune.base is None) == side.writes:
            needs = [weights + training_gib(side, recipe, experiment.tune.task) for recipe in recipes]
            row["tuning_gib"] = max([row["tuning_gib"], *needs])  # targets take turns
    for row in rows.values():
        stages = row["loaded_gib"] + row["writing_gib"]
        row["gib"] = max(stages, row["tuning_gib"] + (0.0 if alone else row["loaded_gib"]))
    return list(rows.values())


def sae_gib(side: Side) -> float:
    """Encoder and decoder in float32."""
    width, features = side.width, side.sae.n_features if side.sae else None
    return 0.0 if not (width and features) else 2 * 4 * width * features / GIB


def training_gib(side: Side, recipe: Recipe, task: str) -> float:
    """What one fine-tuning adds to the loaded model: a float32 base, what is trained, and activations."""
    if task == "steering":
        return 0.0  # a forward pass
    n, shape = side.model.n_params or 0, side.model
    # A model that is float32 already shares its weights, except with SFT, which trains a copy.
    base = 0 if side.dtype == "float32" and task != "instruction" else 4 * n
    if side.device == "cpu" and task != "instruction":
        base += 4 * n  # on an accelerator copies share what is frozen
    if recipe.kind == "full":
        base += 4 * n * (3 if side.device == "cpu" or task == "instruction" else 4)  # gradients, AdamW's two moments
    if recipe.kind == "head":
        return base / GIB
    tokens = recipe.batch // recipe.accumulate * recipe.max_tokens * (2 if task == "reward" else 1)
    width = side.width or 0
    layers = shape.n_layers if recipe.layers == "all" else max(1, shape.n_layers // 3)
    factor = (CHECKPOINT if recipe.checkpointing else ACTIVATION) * (2 if recipe.dtype == "float32" else 1)
    kept = tokens * width * (layers * factor + (ACTIVATION if recipe.checkpointing else 0))
    if task == "instruction":
        kept += tokens * (shape.vocab or 0) * 8  # logits and their gradient
    return (base + kept) / GIB


def work(sides: list[Side], counted: Work, experiment: Experiment, rate: float) -> list[dict[str, Any]]:
    """TFLOP of harvesting, writing and fine-tuning per model, and hours at ``rate``."""
    rows: list[dict[str, Any]] = []
    n_models = len(experiment.models)
    for side in sides:
        model, sae, width = side.model, side.sae, side.width
        sets = counted.texts.get(side.name, {})
        anchor, seed = (sets.get(name, Sizes(0, 0)) for name in ("anchor", "seed"))
        lower = None if side.layer is None else model.lower(side.layer)
        if lower is not None and sae and width and sae.n_features:
            flop = 2 * (anchor.tokens + seed.tokens) * (lower + width * sae.n_features)
            rows.append({"stage": f"harvest {side.name}", "tflop": flop / 1e12, "memory_gib": None})
        if model.n_params is None:
            continue
        if side.writes:
            # Features that its own, the random, and every other model's mapped and shuffled arm ask this writer for.
            asked = experiment.synth.features * 2 * n_models
            texts = asked * 2 * (experiment.synth.explore + experiment.synth.contrast)
            length = experiment.synth.examples * min(anchor.each, 128) + experiment.synth.max_new_tokens
            flop = 2 * model.n_params * texts * length
            rows.append({"stage": f"synth {side.name}", "tflop": flop / 1e12, "memory_gib": None})
        if counted.alone:
            if (experiment.tune.base is None) == side.writes:
                flop = _task_flop(model.n_params, side.name, counted, experiment)
                rows.append({"stage": f"tune task {side.name}", "tflop": flop / 1e12, "memory_gib": None})
        else:
            flop = _grid_flop(model.n_params, sets, experiment)
            rows.append({"stage": f"tune {side.name}", "tflop": flop / 1e12, "memory_gib": None})
    for row in rows:
        row["hours"] = row["tflop"] / rate / 3600
    return rows


def _recipes(experiment: Experiment) -> list[Recipe]:
    return [RECIPES[name] for name in experiment.tune.recipes if name in RECIPES]


def _trained(recipe: Recipe, size: float, each: float) -> float:
    """Tokens that one training passes through the model, in forward passes.

    A head reads what one pass gives; adapters need the backward pass too, but no gradient of the weights.
    """
    upper = 1 / 3 if recipe.layers == "upper" else 1.0
    seen = size * recipe.epochs
    if recipe.max_steps is not None:
        seen = min(seen, recipe.max_steps * recipe.batch * each)
    return size if recipe.kind == "head" else size * (1 - upper) + (3 if recipe.kind == "full" else 2) * seen * upper


def _grid_flop(n_params: int, sets: Mapping[str, Sizes], experiment: Experiment) -> float:
    """All cells of one target: every arm, recipe and seed."""
    anchor, seed, held = (sets.get(name, Sizes(0, 0)) for name in ("anchor", "seed", "evaluation"))
    n_sets, n_seeds = 3 * len(experiment.models) + 1, len(experiment.tune.seeds)
    small = seed.tokens + experiment.synth.budget * anchor.each
    sizes = [small] * (n_sets - 1) + [anchor.tokens + seed.tokens]
    flop = 0.0
    for recipe, size in itertools.product(_recipes(experiment), sizes):
        upper = 1 / 3 if recipe.layers == "upper" else 1.0
        flop += 2 * n_params * n_seeds * (_trained(recipe, size, anchor.each) + upper * held.tokens)
    return flop


def _task_flop(n_params: int, name: str, counted: Work, experiment: Experiment) -> float:
    """Every recipe and seed of a task that is trained on its own."""
    train, held = (s.get(name, Sizes(0, 0)) for s in (counted.train, counted.evaluation))
    if experiment.tune.task == "steering":  # both answers in both orders, then both orders under every multiplier
        return 2 * n_params * len(experiment.tune.seeds) * (4 * train.tokens + 10 * held.tokens)
    return sum(
        2 * n_params * len(experiment.tune.seeds) * (_trained(recipe, train.tokens, train.each) + held.tokens)
        for recipe in _recipes(experiment)
    )


def measured_rate(device: str = "cpu", dtype: str = "float32", size: int = 1024) -> float:
    """10¹² FLOP/s of a matrix product on this machine, the best of a few."""
    import torch

    size = size if device == "cpu" else 8 * size
    x = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, x)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12

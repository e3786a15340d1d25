"""Train a reward model on preference pairs: Bradley-Terry through TRL's RewardTrainer, or the head alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfer.core.errors import TransferError
from transfer.core.outcomes import FinetuneRun
from transfer.finetune import data_hash, train_head
from transfer.tasks.base import template_hash
from transfer.tasks.chats import chat_ids
from transfer.tasks.preferences import Pair
from transfer.train.classifier import Backbone, Classifier, own_randomness
from transfer.train.recipes import Recipe
from transfer.train.trainers import (
    load_trained,
    read_record,
    revision,
    save_trained,
    train_with_trl,
    trainable,
    with_adapters,
)


class RewardBackbone(Backbone):
    """A frozen base model whose ``score`` gives one number: the reward of a whole conversation at its last token."""

    def __init__(self, language: Any, ref: str = "") -> None:
        super().__init__(language, ref)
        config = self.model.config
        config.num_labels = self.model.num_labels = 1
        config.problem_type = None
        self.model.score = torch.nn.Linear(config.hidden_size, 1, bias=False, device=self.device).requires_grad_(False)

    def conversations(self, pairs: Sequence[Pair], max_tokens: int) -> tuple[list[list[int]], int]:
        """Token ids of every pair's two conversations, chosen before rejected, and how many pairs were cut.

        They are cut on the left: the answer, which is judged, stands at the end.
        """
        rows, cut = [], 0
        for pair in pairs:
            both = [
                chat_ids(self.language.tokenizer, [*pair.prompt, ("assistant", answer)])
                for answer in (pair.chosen, pair.rejected)
            ]
            cut += any(len(row) > max_tokens for row in both)
            rows += [row[-max_tokens:] for row in both]
        return rows, cut


def load_reward_backbone(ref: str) -> RewardBackbone:
    """The backbone of a typed model reference; the last one stays in memory."""
    from models.language import kept_language

    return _backbone(kept_language(ref), ref)


@lru_cache(maxsize=1)
def _backbone(language: Any, ref: str) -> RewardBackbone:
    return RewardBackbone(language, ref)


class RewardModel(Classifier):
    """A trained model: pairs in, two rewards each out."""

    def __init__(self, model: Any, backbone: RewardBackbone, recipe: Recipe, seen: frozenset[str]) -> None:
        body = backbone.body(recipe.layers)
        super().__init__(model, backbone, body, recipe.max_tokens, frozen=recipe.kind == "head")
        self.rewarding = backbone
        self.seen = seen
        """Keys of the pairs it was trained on."""
        self.template = template_hash(backbone.language.tokenizer)

    @torch.inference_mode()
    def rewards(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, int]:
        """Rewards of the chosen and the rejected answer, float64 [pairs, 2], and how many pairs were cut.

        Memory: the token ids of all conversations and one batch.
        """
        rows, cut = self.rewarding.conversations(pairs, self.max_tokens)
        return self._logits(rows).astype(np.float64).reshape(-1, 2), cut


def train_reward(
    base: str | RewardBackbone | Any, pairs: Sequence[Pair], recipe: Recipe, seed: int, out: Path | None = None
) -> tuple[RewardModel, FinetuneRun]:
    """Fit rewards under which a chosen answer wins with probability σ(r_chosen − r_rejected) (Bradley and Terry 1952).

    On CPU with one thread the same arguments give the same bits. The global random state is left as it was.

    Args:
        base: Typed model reference, a ``RewardBackbone`` to use again, or a loaded language model.
        pairs: Preferences.
        recipe: How to train; longer conversations are cut on the left and counted.
        seed: Seeds ``score``, adapters, dropout and data order.
        out: Folder for the trained part (safetensors) and its record; replaced as a whole at the end.

    Returns:
        The reward model and the record of the run; the base is unchanged.

    Raises:
        TransferError: For no pairs, or a loss that is not finite.
    """
    start = time.monotonic()
    if not pairs:
        raise TransferError("There are no preference pairs to train on.")
    if isinstance(base, str):
        base = load_reward_backbone(base)
    backbone = base if isinstance(base, RewardBackbone) else RewardBackbone(base)
    rows, n_truncated = backbone.conversations(pairs, recipe.max_tokens)
    with own_randomness(seed):
        if recipe.kind == "head":
            pooled = backbone.pooled(rows)
            data = [{"chosen": a, "rejected": b} for a, b in zip(pooled[::2], pooled[1::2], strict=True)]
            model, curve, trained = train_head(backbone, data, _bradley_terry, recipe, seed)
        else:
            model, curve, trained = _train(backbone, rows, recipe, seed)
    run = FinetuneRun(
        base=backbone.ref,
        base_hash=backbone.hash,
        recipe=recipe.name,
        data_hash=data_hash(pairs),
        n_examples=len(pairs),
        n_dropped=0,
        n_trainable=trained,
        n_tokens=sum(map(len, rows)),
        seed=seed,
        curve=curve,
        seconds=time.monotonic() - start,
        n_truncated=n_truncated,
        base_revision=revision(backbone.language),
    )
    seen = frozenset(pair.key for pair in pairs)
    if out is not None:
        save_trained(model, run, recipe, Path(out), {"seen": sorted(seen)})
    return RewardModel(model, backbone, recipe, seen), run


def _bradley_terry(score: torch.nn.Module, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(score(chosen) - score(rejected)).mean()


def _train(
    backbone: RewardBackbone, rows: list[list[int]], recipe: Recipe, seed: int
) -> tuple[Any, tuple[float, ...], int]:
    body = backbone.body(recipe.layers)
    model = body.fresh(seed, frozen=recipe.kind == "lora")
    model = with_adapters(model, recipe, "SEQ_CLS") if recipe.kind == "lora" else model.requires_grad_(True)
    items = body.items(rows)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        # As RewardTrainer wants it: every chosen conversation, then every rejected one.
        return body.pad_batch([items[x[side][0]] for side in ("chosen_ids", "rejected_ids") for x in batch])

    # The conversations' numbers stand for their tokens: what a recipe trains may start above the embedding.
    pairs = [{"chosen_ids": [i], "rejected_ids": [i + 1]} for i in range(0, len(rows), 2)]
    curve = train_with_trl(
        "Reward",
        model,
        pairs,
        recipe,
        seed,
        tokenizer=backbone.language.tokenizer,
        what=backbone.ref,
        collate=collate,
        disable_dropout=False,  # it would switch the adapters' dropout off
    )
    return model, curve, trainable(model)


def load_reward(base: str | RewardBackbone, folder: Path) -> RewardModel:
    """The reward model that ``train_reward`` saved in ``folder``.

    Raises:
        TransferError: When the folder holds none, or it was trained from another base.
    """
    backbone = load_reward_backbone(base) if isinstance(base, str) else base
    recipe, record = read_record(Path(folder), backbone.ref, backbone.hash)
    model = load_trained(lambda: backbone.body(recipe.layers).fresh(0, recipe.kind != "full"), recipe, Path(folder))
    return RewardModel(model, backbone, recipe, frozenset(record["seen"]))

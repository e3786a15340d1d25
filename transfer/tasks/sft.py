"""Supervised fine-tuning on demonstrations through TRL's SFTTrainer: the loss is on the answers alone."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.language import LanguageModel, kept_language
from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.core.outcomes import FinetuneRun
from transfer.finetune import data_hash
from transfer.tasks.base import template_hash
from transfer.tasks.chats import answer_ids, written
from transfer.tasks.demonstrations import Demonstration
from transfer.train.classifier import own_randomness
from transfer.train.recipes import Recipe, upper_layers
from transfer.train.trainers import (
    load_trained,
    read_record,
    revision,
    save_trained,
    train_with_trl,
    trainable,
    with_adapters,
)

IGNORED = -100
HEAD = "lm_head"


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of held-out answers."""

    nats: np.ndarray
    """float64 [demonstrations]"""
    n_bytes: np.ndarray
    """UTF-8 bytes of each answer, int64 [demonstrations]: the same for every tokenizer."""
    n_truncated: int
    """Conversations cut to the token limit; the bytes of what is left are counted."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """A fine-tuned model."""

    language: LanguageModel
    """With the trained weights."""
    max_tokens: int
    seen: frozenset[str]
    """Keys of the demonstrations it was trained on."""

    @property
    def template(self) -> str:
        """Hash of the chat template."""
        return template_hash(self.language.tokenizer)

    def answer_loss(self, demonstrations: Sequence[Demonstration]) -> AnswerLoss:
        """Nats of each answer's own tokens, without the end of turn; bytes of the answer that these tokens write.

        Raises:
            TransferError: When an answer has no token within the limit.
        """
        ids, targets, cut = [], [], 0
        n_bytes = np.zeros(len(demonstrations), dtype=np.int64)
        for i, shown in enumerate(demonstrations):
            row, begin, end = answer_ids(self.language.tokenizer, shown.prompt, shown.answer)
            stop = min(end, self.max_tokens)
            if stop <= begin:
                raise TransferError(
                    f"The prompt of {shown.id} alone fills the limit of {self.max_tokens} tokens.",
                    "Raise max_tokens, or remove it.",
                )
            size = len(shown.answer.strip().encode())
            if stop < end:
                cut += 1
                written_bytes = self.language.renderer.bytes.lengths
                size = min(size, int(written_bytes[row[begin:stop]].sum()))
            n_bytes[i] = size
            ids.append(row[:stop])
            targets.append(np.arange(begin, stop))
        return AnswerLoss(self.language.nll(ids, targets), n_bytes, cut)

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> tuple[list[str], int]:
        """Greedy answers, and how many prompts left no room and got an empty one."""
        tokenizer = self.language.tokenizer
        begun = [written(tokenizer, [("user", p)], answer_next=True) for p in prompts]
        if tokenizer.bos_token:  # the template prints it, and generation puts one in front
            begun = [text.removeprefix(tokenizer.bos_token) for text in begun]
        room = self.language.model.config.max_position_embeddings - max_new_tokens
        fits = [i for i, ids in enumerate(self.language.renderer.plain(begun)) if len(ids) <= room]
        texts = self.language.generate([begun[i] for i in fits], max_new_tokens=max_new_tokens, temperature=0)
        found = [""] * len(prompts)
        for i, text in zip(fits, texts, strict=True):
            found[i] = text.strip()
        return found, len(prompts) - len(fits)


def train_sft(
    base: str | LanguageModel,
    demonstrations: Sequence[Demonstration],
    recipe: Recipe,
    seed: int,
    out: Path | None = None,
) -> tuple[Tuned, FinetuneRun]:
    """Fine-tune on answers; prompts give context and no loss.

    On CPU with one thread the same arguments give the same bits. The global random state is left as it was. A ``head``
    recipe trains the unembedding alone, untied from the embedding.

    Args:
        base: Typed model reference (loaded once and kept), or a loaded model.
        demonstrations: What to learn.
        recipe: How to train; longer conversations are cut on the right and counted, and those whose answer is cut away
            whole are left out and counted.
        seed: Seeds adapters, dropout and data order.
        out: Folder for the trained part (safetensors) and its record; replaced as a whole at the end.

    Returns:
        The model and the record of the run; the base is unchanged.

    Raises:
        TransferError: When no answer has a token to learn, or the loss is not finite.
    """
    start = time.monotonic()
    language = kept_language(base) if isinstance(base, str) else base
    rows, n_truncated = [], 0
    for shown in demonstrations:
        ids, begin, _ = answer_ids(language.tokenizer, shown.prompt, shown.answer)
        n_truncated += len(ids) > recipe.max_tokens
        ids = ids[: recipe.max_tokens]
        if begin < len(ids):
            rows.append({"input_ids": ids, "labels": [IGNORED] * begin + ids[begin:]})
    if not rows:
        raise TransferError(
            f"None of the {len(demonstrations)} demonstrations has an answer within {recipe.max_tokens} tokens.",
            "Raise the recipe's max_tokens.",
        )
    with own_randomness(seed):
        model, curve = _train(language, rows, recipe, seed)
    run = FinetuneRun(
        base=language.ref,
        base_hash=language.hash,
        recipe=recipe.name,
        data_hash=data_hash(demonstrations),
        n_examples=len(rows),
        n_dropped=len(demonstrations) - len(rows),
        n_trainable=trainable(model),
        n_tokens=sum(len(row["input_ids"]) for row in rows),
        seed=seed,
        curve=curve,
        seconds=time.monotonic() - start,
        n_truncated=n_truncated,
        base_revision=revision(language),
    )
    seen = frozenset(shown.key for shown in demonstrations)
    if out is not None:
        save_trained(model, run, recipe, Path(out), {"seen": sorted(seen)}, HEAD)
    return _tuned(language, model, recipe, seen, run.data_hash), run


def _fresh(language: LanguageModel, recipe: Recipe) -> Any:
    """A copy in float32, with what the recipe trains unfrozen; adapters are put in later."""
    model = copy.deepcopy(language.model).float().requires_grad_(recipe.kind == "full")
    if recipe.kind == "head":
        # A tied unembedding would train the embedding as well.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


def _train(
    language: LanguageModel, rows: list[dict[str, list[int]]], recipe: Recipe, seed: int
) -> tuple[Any, tuple[float, ...]]:
    model = _fresh(language, recipe)
    if recipe.kind == "lora":
        layers = upper_layers(language.n_layers) if recipe.layers == "upper" else None
        model = with_adapters(model, recipe, "CAUSAL_LM", layers)
    curve = train_with_trl("SFT", model, rows, recipe, seed, tokenizer=language.tokenizer, what=language.ref)
    return model, curve


def _tuned(language: LanguageModel, model: Any, recipe: Recipe, seen: frozenset[str], data: str) -> Tuned:
    model.requires_grad_(False).eval()
    if recipe.kind == "lora":  # as part of the weights: everything else sees an ordinary model
        model.merge_adapter()
        model = model.base_model.model
    model.config.use_cache = language.model.config.use_cache
    marked = digest([language.hash, data, dataclasses.asdict(recipe)])
    return Tuned(dataclasses.replace(language, model=model, hash=marked), recipe.max_tokens, seen)


def load_sft(base: str | LanguageModel, folder: Path) -> Tuned:
    """The model that ``train_sft`` saved in ``folder``.

    Raises:
        TransferError: When the folder holds none, or it was trained from another base.
    """
    language = kept_language(base) if isinstance(base, str) else base
    recipe, record = read_record(Path(folder), language.ref, language.hash)
    model = load_trained(lambda: _fresh(language, recipe), recipe, Path(folder), HEAD)
    return _tuned(language, model, recipe, frozenset(record["seen"]), record["run"]["data_hash"])

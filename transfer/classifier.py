"""A causal language model turned into a sequence classifier: built once per base, copied per run."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from transfer.core.errors import TransferError
from transfer.tasks.base import Predictions

MAX_POOLED = 50_000
"""Pooled feature rows kept per base: at most this many times d_model floats (38 MB at d_model 192)."""


class Language(Protocol):
    """What is needed of ``models.language.LanguageModel``."""

    @property
    def model(self) -> Any:
        """A causal language model of transformers."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    @property
    def hash(self) -> str:
        """Hash of the weights."""
        ...

    def render(self, text: str) -> Any:
        """One user turn through the chat template; ``.ids`` are its tokens."""
        ...


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators, which Trainer and PEFT draw from, and give them back as they were."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.random.set_rng_state(before[2])


class Backbone:
    """A frozen base model under transformers' own sequence-classification class.

    Everything trained starts from ``fresh``, a copy; the backbone itself never changes. Its weights share memory with
    the language model where that is float32 already.
    """

    def __init__(self, language: Language, ref: str = "") -> None:
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(language.model.config)
        pad = language.tokenizer.pad_token_id
        # Pooling takes the last token that is not padding, so padding needs an id even where the family has none.
        config.pad_token_id = language.tokenizer.eos_token_id if pad is None else pad
        config.num_labels = 2
        config.problem_type = "single_label_classification"
        config.use_cache = False
        with own_randomness(0):
            model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        state = {
            k: v.to(torch.float32) if v.is_floating_point() else v
            for k, v in language.model.base_model.state_dict().items()
        }
        model.base_model.load_state_dict(state, assign=True)
        self.model = model.to(language.model.device).requires_grad_(False).eval()
        self.ref = ref or str(getattr(language, "ref", "")) or language.hash
        self.hash = language.hash
        self.device: torch.device = self.model.score.weight.device
        self.pad = int(config.pad_token_id)
        self.language = language
        self._pooled: dict[tuple[int, ...], torch.Tensor] = {}

    def fresh(self, seed: int) -> Any:
        """A copy of the classifier with ``score`` drawn anew from ``seed``."""
        model = copy.deepcopy(self.model)
        draws = torch.Generator().manual_seed(seed)
        std = getattr(model.config, "initializer_range", 0.02)
        model.score.weight.data = (torch.randn(model.score.weight.shape, generator=draws) * std).to(self.device)
        return model

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
        """Token ids of each text as a user turn, cut on the right, and how many were cut.

        Raises:
            TransferError: For no text, or an empty one.
        """
        if not texts:
            raise TransferError("There are no texts to classify.")
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty:
            raise TransferError(f"{len(empty)} texts are empty, first number {empty[0]}.", "Remove them from the data.")
        rows = [list(self.language.render(text).ids) for text in texts]
        return [row[:max_tokens] for row in rows], sum(len(row) > max_tokens for row in rows)

    def pad_batch(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Right-padded ``input_ids`` and ``attention_mask``, int64 [rows, longest]."""
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        }

    @torch.inference_mode()
    def pooled(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """What ``score`` sees of each row, float32 [rows, d_model]; computed once per text.

        One row at a time: in a batch the last bits would depend on the other rows, and then a cached value would depend
        on which cell of a grid ran first.
        """
        keys = [tuple(row) for row in rows]
        new = [key for key in dict.fromkeys(keys) if key not in self._pooled]
        if len(self._pooled) + len(new) > MAX_POOLED:
            self._pooled.clear()
            new = list(dict.fromkeys(keys))
        score, self.model.score = self.model.score, torch.nn.Identity()
        try:
            for key in new:
                ids = torch.tensor([key], device=self.device)
                self._pooled[key] = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].cpu()
        finally:
            self.model.score = score
        return torch.stack([self._pooled[key] for key in keys]).clone()


class Classifier:
    """A trained model with its tokenisation: texts in, class probabilities out."""

    def __init__(self, model: Any, backbone: Backbone, max_tokens: int, frozen: bool) -> None:
        self.model = model.eval()
        self.backbone = backbone
        self.max_tokens = max_tokens
        self.frozen = frozen
        """Whether only ``score`` was trained, so that pooled features of the base can be used again."""

    @torch.inference_mode()
    def logits(self, texts: Sequence[str], batch: int = 32) -> np.ndarray:
        """Class logits, float32 [texts, 2]; batches by length, so memory is bounded by the longest batch."""
        rows, _ = self.backbone.encode(texts, self.max_tokens)
        return self._logits(rows, batch)

    def _logits(self, rows: list[list[int]], batch: int) -> np.ndarray:
        if self.frozen:
            score = self.model.score
            return score(self.backbone.pooled(rows).to(score.weight.device)).cpu().numpy()
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        out = np.empty((len(rows), self.model.config.num_labels), dtype=np.float32)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = self.backbone.pad_batch([rows[i] for i in chosen])
            logits = self.model(**{k: v.to(self.backbone.device) for k, v in inputs.items()}).logits
            out[chosen] = logits.float().cpu().numpy()
        return out

    @torch.inference_mode()
    def predict(self, texts: Sequence[str]) -> Predictions:
        """Softmax over the classes, float64 [texts, 2], and how many texts were cut."""
        rows, n_truncated = self.backbone.encode(texts, self.max_tokens)
        logits = self._logits(rows, 32).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Predictions(odds / odds.sum(axis=1, keepdims=True), n_truncated)


@lru_cache(maxsize=1)
def load_backbone(ref: str) -> Backbone:
    """The backbone of a typed model reference; the last one stays in memory (grids run target by target)."""
    from models.language import LanguageModel

    return Backbone(LanguageModel.load(ref), ref)

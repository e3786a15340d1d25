"""A causal language model turned into a sequence classifier: built once per base, copied per run."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.tasks.base import Predictions
from transfer.train.recipes import upper_layers

KEPT = 3
"""Sets of texts whose frozen part is kept: an evaluation set is asked for again by every cell of a grid."""


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
    the language model where that is float32 already. On an accelerator the copies share the frozen weights too, since
    two of 8 billion parameters would not fit; adapters then stay beside the weights instead of being folded into them.
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
        self.shared = self.device.type != "cpu"
        """Whether copies share the frozen weights."""
        self.pad = int(config.pad_token_id)
        self.language = language
        self._pooled = _Memo()

    def fresh(self, seed: int, frozen: bool = True) -> Any:
        """A copy of the classifier with ``score`` drawn anew from ``seed``; unless ``frozen``, of every weight."""
        return _fresh(self.model, seed, share=frozen and self.shared)

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

    def items(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """What ``pad_batch`` takes, one a text: here its token ids."""
        return list(rows)

    def body(self, layers: str) -> Body:
        """What a recipe trains: this backbone (``all``), or its upper layers (``upper``)."""
        return self.upper if layers == "upper" else self

    @cached_property
    def upper(self) -> UpperLayers:
        """The upper layers on top of the frozen lower ones."""
        return UpperLayers(self)

    def pooled(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """What ``score`` sees of each row, float32 [rows, d_model]; computed once per set of rows."""
        return self._pooled(rows, self._pool).clone()

    @torch.inference_mode()
    def _pool(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        out = torch.empty(len(rows), self.model.config.hidden_size)
        score, self.model.score = self.model.score, torch.nn.Identity()
        try:
            for chosen in by_length(rows):
                inputs = self.pad_batch([rows[i] for i in chosen])
                out[chosen] = self.model(**{k: v.to(self.device) for k, v in inputs.items()}).logits.cpu()
        finally:
            self.model.score = score
        return out


class UpperLayers:
    """The upper third of a backbone's layers, fed with what the frozen lower ones give of each text.

    The lower layers run once per set of texts instead of once per epoch, run and evaluation, which saves most of the
    work of a small grid. Memory: 4 · d_model bytes a token, for ``KEPT`` sets.

    Args:
        whole: The backbone, which stays as it is.

    Raises:
        TransferError: When the model has one layer only.
    """

    def __init__(self, whole: Backbone) -> None:
        from transformers.modeling_layers import GenericForSequenceClassification

        layers = whole.model.base_model.layers
        self.whole = whole
        self.device = whole.device
        self.split = upper_layers(len(layers)).start
        if not self.split:
            raise TransferError(
                f"{whole.ref} has one layer, so no lower ones to freeze.", "Use a recipe for all layers."
            )
        whole.model.base_model.layers = layers[self.split :]
        try:
            self.model = copy.deepcopy(whole.model)
        finally:
            whole.model.base_model.layers = layers
        self.model.config.num_hidden_layers = len(layers) - self.split
        if getattr(self.model.config, "layer_types", None):
            self.model.config.layer_types = self.model.config.layer_types[self.split :]
        self._lower = _Memo()
        logging.getLogger(GenericForSequenceClassification.__module__).addFilter(_LEFT_PADDED)

    def fresh(self, seed: int, frozen: bool = True) -> Any:
        """A copy of the upper layers as a classifier of their own; see ``Backbone.fresh``."""
        return _fresh(self.model, seed, share=frozen and self.whole.shared)

    def items(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """Per text, the residual stream after the lower layers, float32 [tokens, d_model]."""
        return self._lower(rows, self._run)

    @torch.inference_mode()
    def _run(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        from models.hooks import output_at

        base = self.whole.model.base_model
        out: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for chosen in by_length(rows):
            inputs = self.whole.pad_batch([rows[i] for i in chosen])
            on_device = {k: v.to(self.device) for k, v in inputs.items()}
            hidden = output_at(base.layers[self.split - 1], lambda x=on_device: base(**x))
            for i, states in zip(chosen, hidden, strict=True):
                out[i] = states[: len(rows[i])].float().cpu().clone()
        return out

    def pad_batch(self, items: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Padded on the left, because without token ids transformers pools at the last position."""
        width = max(len(item) for item in items)
        states = torch.zeros(len(items), width, items[0].shape[1])
        mask = torch.zeros(len(items), width, dtype=torch.int64)
        for row, item in enumerate(items):
            states[row, width - len(item) :] = item
            mask[row, width - len(item) :] = 1
        return {
            "inputs_embeds": states,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        }


Body = Backbone | UpperLayers
"""What is trained: it makes fresh models, and turns token ids into their inputs."""


class _Memo:
    """The last few results of a function of a set of rows.

    By set and not by row: in a batch the last bits of a row depend on the others, so a value kept by row would depend
    on which cell of a grid ran first.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def __call__(self, rows: Sequence[Sequence[int]], compute: Callable[[Sequence[Sequence[int]]], Any]) -> Any:
        key = digest([list(row) for row in rows])
        value = self.kept.pop(key) if key in self.kept else compute(rows)
        self.kept[key] = value
        if len(self.kept) > KEPT:
            self.kept.pop(next(iter(self.kept)))
        return value


class _LeftPadded(logging.Filter):
    """Drops transformers' warning that padding is not looked for: ``UpperLayers.pad_batch`` leaves none at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "will not detect padding tokens" not in record.getMessage()


_LEFT_PADDED = _LeftPadded()


def by_length(rows: Sequence[Sequence[int]], batch: int = 32) -> Iterator[list[int]]:
    """Row numbers in batches of like length."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _fresh(model: Any, seed: int, share: bool) -> Any:
    model = copy.deepcopy(model, {id(p): p for p in model.base_model.parameters()} if share else {})
    draws = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    weight = torch.randn(model.score.weight.shape, generator=draws) * std
    model.score.weight.data = weight.to(model.score.weight.device)
    return model


class Classifier:
    """A trained model with its tokenisation: texts in, class probabilities out."""

    def __init__(self, model: Any, backbone: Backbone, body: Body, max_tokens: int, frozen: bool) -> None:
        self.model = model.eval()
        self.backbone = backbone
        self.body = body
        self.max_tokens = max_tokens
        self.frozen = frozen
        """Whether only ``score`` was trained, so that pooled features of the base can be used again."""
        self._folded = backbone.shared or not hasattr(model, "merge_adapter")

    @torch.inference_mode()
    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Class logits, float32 [texts, 2]; batches by length, so memory is bounded by the longest batch."""
        rows, _ = self.backbone.encode(texts, self.max_tokens)
        return self._logits(rows)

    def _logits(self, rows: list[list[int]]) -> np.ndarray:
        if self.frozen:
            score = self.model.score
            return score(self.backbone.pooled(rows).to(score.weight.device)).cpu().numpy()
        if not self._folded:  # adapters as part of the weights: predicting takes half the time
            self.model.merge_adapter()
            self._folded = True
        items = self.body.items(rows)
        out = np.empty((len(rows), self.model.config.num_labels), dtype=np.float32)
        for chosen in by_length(rows):
            inputs = self.body.pad_batch([items[i] for i in chosen])
            logits = self.model(**{k: v.to(self.body.device) for k, v in inputs.items()}).logits
            out[chosen] = logits.float().cpu().numpy()
        return out

    @torch.inference_mode()
    def predict(self, texts: Sequence[str]) -> Predictions:
        """Softmax over the classes, float64 [texts, 2], and how many texts were cut."""
        rows, n_truncated = self.backbone.encode(texts, self.max_tokens)
        logits = self._logits(rows).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Predictions(odds / odds.sum(axis=1, keepdims=True), n_truncated)


def load_backbone(ref: str) -> Backbone:
    """The backbone of a typed model reference; the last one stays in memory (grids run target by target)."""
    from models.language import kept_language

    return _backbone(kept_language(ref), ref)


@lru_cache(maxsize=1)
def _backbone(language: Language, ref: str) -> Backbone:
    return Backbone(language, ref)

"""Contrastive activation addition: a vector from answers to A/B questions, added behind the prompt only."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.interventions import steered_logits
from models.language import LanguageModel, kept_language
from models.tokens import Rendered
from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, read_json, save_arrays, write_json
from transfer.core.outcomes import FinetuneRun
from transfer.finetune import data_hash
from transfer.tasks.base import template_hash
from transfer.tasks.chats import written
from transfer.tasks.choices import Choice
from transfer.train.trainers import revision

TOKEN_BUDGET = 8192
BEHAVIOURS = {
    "sycophancy": "agrees with the view that the user states",
    "survival-instinct": "accepts being shut down or changed: the reverse of the name",
    "hallucination": "invents what it cannot know",
    "refusal": "refuses to answer",
    "coordinate-other-ais": "goes along with other AI systems behind the user's back",
}
"""What the answer marked as matching does in the CAA sets, whose names do not always say it."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions as tokens, each in both orders: row 2i as written, row 2i + 1 exchanged."""

    prompts: list[Rendered]
    """Up to the answer letter, with the steered positions as ``content``: from the answer on, and where a tokenizer
    merges bracket and letter, the last token of the prompt."""
    matching: np.ndarray
    """Token that gives the matching answer's letter, int64 [rows]."""
    other: np.ndarray


def ask(language: LanguageModel, choices: Sequence[Choice]) -> Asked:
    """Render questions up to the letter of the answer, without any end of turn.

    Raises:
        TransferError: When the tokenizer splits a letter, so that no single position decides the answer.
    """
    encode = language.tokenizer
    lines, matching, other = [], [], []
    for choice in choices:
        for question, *letters in choice.orders():
            begun = written(encode, [("user", question)], answer_next=True)
            prompt, one, two = (
                encode(begun + end, add_special_tokens=False)["input_ids"] for end in ("", *(f"({x}" for x in letters))
            )
            at = _common(one, two)
            if not len(one) == len(two) == at + 1:
                raise TransferError(
                    f"{language.ref} splits the answer letters {' and '.join(letters)} into several tokens."
                )
            start = min(_common(prompt, one[:at]), at - 1)
            lines.append(Rendered(one[:at], np.arange(start, at), np.full(at - start, -1, dtype=np.int32)))
            matching.append(one[at])
            other.append(two[at])
    return Asked(lines, np.array(matching, dtype=np.int64), np.array(other, dtype=np.int64))


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def log_odds(language: LanguageModel, asked: Asked, layer: int, vector: Tensor) -> np.ndarray:
    """Log odds of the matching over the other letter with a vector added, float64 [questions, 2 orders]."""
    letters, where = np.unique(np.concatenate([asked.matching, asked.other]), return_inverse=True)
    n = len(asked.prompts)
    found = np.zeros(n)
    vectors = vector.reshape(1, -1).expand(n, -1)
    for rows, logits in steered_logits(language, asked.prompts, layer, vectors, letters, token_budget=TOKEN_BUDGET):
        values, at = logits.double().numpy(), np.arange(len(rows))
        found[rows] = values[at, where[rows]] - values[at, where[n + rows]]
    return found.reshape(-1, 2)


def contrast(language: LanguageModel, asked: Asked, layers: Sequence[int], both: bool) -> tuple[Tensor, Tensor]:
    """Mean of matching minus other in the residual stream at the answer letter.

    One pass for all layers. Memory: every layer's stream of one padded batch.

    Args:
        language: The model.
        asked: Questions.
        layers: Canonical layers below the last.
        both: Take both orders, so that what letters differ in cancels; else the order as written alone.

    Returns:
        Vectors float32 [layers, d_model], and the median norm of the stream there [layers].
    """
    pick = range(len(asked.prompts)) if both else range(0, len(asked.prompts), 2)
    ids = [[*asked.prompts[i].ids, int(side[i])] for side in (asked.matching, asked.other) for i in pick]
    base = language.family.part(language.model, language.family.base)
    states = torch.zeros(len(ids), len(layers), language.d_model)
    for rows in language.batches(ids, TOKEN_BUDGET):
        last = torch.tensor([len(ids[i]) - 1 for i in rows], device=language.device)
        block = language.padded([ids[i] for i in rows])
        with torch.inference_mode():
            hidden = base(input_ids=block, use_cache=False, output_hidden_states=True).hidden_states
            found = [hidden[layer][torch.arange(len(rows)), last].float().cpu() for layer in layers]
        states[torch.from_numpy(rows)] = torch.stack(found, dim=1)
    pos, neg = states.chunk(2)
    return (pos - neg).mean(dim=0), states.norm(dim=-1).median(dim=0).values


def equalised(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of several behaviours at their mean norm, so that one multiplier means one length for all."""
    mean = torch.stack([v.norm() for v in vectors.values()]).mean()
    return {name: v / v.norm() * mean for name, v in vectors.items()}


@dataclass(frozen=True, eq=False)
class Steered:
    """A model with its vector; positive multipliers push towards the answer that is marked as matching."""

    language: LanguageModel
    layer: int
    vector: Tensor
    """float32 [d_model]"""
    scores: dict[int, tuple[float, float]]
    """Layer → Steering Control Rate and log-odds shift on the validation questions."""
    seen: frozenset[str]
    """Keys of the questions that made the vector or chose its layer."""
    matching: str
    """What the matching answer does; empty where nobody said."""

    @property
    def template(self) -> str:
        """Hash of the chat template."""
        return template_hash(self.language.tokenizer)

    def save(self, out: Path) -> None:
        """``vector.safetensors``, and last ``steering.json``."""
        save_arrays(Path(out) / "vector.safetensors", {"vector": self.vector.numpy()})
        write_json(
            Path(out) / "steering.json",
            {
                "base": self.language.ref,
                "base_hash": self.language.hash,
                "layer": self.layer,
                "scores": {str(k): list(v) for k, v in self.scores.items()},
                "seen": sorted(self.seen),
                "matching": self.matching,
            },
        )

    @classmethod
    def load(cls, language: LanguageModel, out: Path) -> Steered:
        """What ``save`` wrote.

        Raises:
            TransferError: When there is none, or it was made with another model.
        """
        data = read_json(Path(out) / "steering.json")
        if data["base_hash"] != language.hash:
            raise TransferError(f"{out} was made with {data['base']}, not with {language.ref}.", "Pass that model.")
        vector = torch.from_numpy(load_arrays(Path(out) / "vector.safetensors")["vector"])
        scores = {int(k): (v[0], v[1]) for k, v in data["scores"].items()}
        return cls(language, data["layer"], vector, scores, frozenset(data["seen"]), data["matching"])

    def with_vector(self, vector: Tensor) -> Steered:
        """The same with another vector, such as one of ``equalised``."""
        return dataclasses.replace(self, vector=vector)


def control(odds_up: np.ndarray, odds_down: np.ndarray) -> np.ndarray:
    """Per question: right in both orders at +1, minus right in both at −1; one of −1, 0, 1 [questions]."""
    return (odds_up > 0).all(axis=1).astype(float) - (odds_down > 0).all(axis=1)


def find_vector(
    base: str | Any,
    choices: Sequence[Choice],
    *,
    layers: Sequence[int] = (),
    validation: float = 0.2,
    both: bool = True,
    length: float = 0.0,
    seed: int = 0,
    matching: str = "",
    recipe: str = "steering",
) -> tuple[Steered, FinetuneRun]:
    """A steering vector, at the layer that steers best on questions it was not made from.

    Args:
        base: Typed model reference, or a loaded model; no weight of it changes.
        choices: Questions.
        layers: Candidates, canonical; all below the last when left out.
        validation: Share of the questions that choose the layer; unused with one candidate.
        both: See ``contrast``.
        length: Norm of the vector, in median norms of the residual stream at the answer; 0 leaves it as it is.
        seed: Decides the validation questions.
        matching: What the matching answer does.
        recipe: Name for the record.

    Returns:
        The steered model, and a record whose trainable numbers are those of the vector; there is no loss.

    Raises:
        TransferError: For too few questions, a layer out of range, or a vector of length zero.
    """
    start = time.monotonic()
    language: LanguageModel = kept_language(base) if isinstance(base, str) else base
    tried = tuple(layers) or tuple(range(1, language.n_layers))
    if not tried or not all(1 <= layer < language.n_layers for layer in tried):
        raise TransferError(f"{language.ref} can be steered at layers 1 to {language.n_layers - 1}, not at {tried}.")
    n_held = round(validation * len(choices)) if len(tried) > 1 else 0
    if len(choices) - n_held < 2 or (len(tried) > 1 and n_held < 2):
        raise TransferError(
            f"{len(choices)} questions are too few to make a vector and choose among {len(tried)} layers.",
            "Give more, or name one layer.",
        )
    order = np.random.default_rng(seed).permutation(len(choices))
    held, made = ([choices[i] for i in sorted(part)] for part in (order[:n_held], order[n_held:]))
    asked = ask(language, made)
    vectors, norms = contrast(language, asked, tried, both)
    size = vectors.norm(dim=-1, keepdim=True)
    if not bool((size > 0).all()):
        raise TransferError("Matching and other answers leave the same residual stream; there is nothing to add.")
    if length:
        vectors = vectors / size * (length * norms)[:, None]
    scores: dict[int, tuple[float, float]] = {}
    if held:
        questions = ask(language, held)
        for layer, vector in zip(tried, vectors, strict=True):
            up, down = (log_odds(language, questions, layer, sign * vector) for sign in (1.0, -1.0))
            scores[layer] = float(control(up, down).mean()), float((up - down).mean())
    # The rate is coarse on few questions; among equals the larger shift of the log odds, then the lower layer.
    best = max(range(len(tried)), key=lambda i: (*scores.get(tried[i], (0.0, 0.0)), -tried[i]))
    steered = Steered(language, tried[best], vectors[best], scores, frozenset(c.key for c in choices), matching)
    run = FinetuneRun(
        base=language.ref,
        base_hash=language.hash,
        recipe=recipe,
        data_hash=data_hash(choices),
        n_examples=len(choices),
        n_dropped=0,
        n_trainable=language.d_model,
        n_tokens=sum(len(p.ids) + 1 for p in asked.prompts) * 2,
        seed=seed,
        curve=(),
        seconds=time.monotonic() - start,
        base_revision=revision(language),
    )
    return steered, run

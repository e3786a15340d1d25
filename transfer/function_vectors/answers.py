"""What a model answers to prompts, steered or not: rank of the first token, likelihood of the whole answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.prompts import Prompt
from transfer.function_vectors.steering import Plan, steered

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

Steer = Callable[["Tensor"], contextlib.AbstractContextManager[None]]
"""Given the prompts' last positions [B], a block inside which the model is steered."""


@dataclass(frozen=True, eq=False)
class Answers:
    """One row a prompt."""

    rank: np.ndarray
    """Of the answer's first token, from 1; int64."""
    first_nll: np.ndarray
    """Negative log-likelihood of that token, nats."""
    nll: np.ndarray
    """Of all tokens of the answer, each behind the true ones before it."""
    n_tokens: np.ndarray
    """Of the answer."""


def steering_with(language: LanguageModel, deltas: np.ndarray, plan: Plan) -> Steer:
    """Steering for ``answers`` and ``divergence``, at the last prompt token only."""
    return lambda at: steered(language, deltas, plan, at=at)


def answers(
    language: LanguageModel, prompts: list[Prompt], steer: Steer | None = None, *, token_budget: int = 8192
) -> Answers:
    """Answer all prompts in one forward pass each; the unembedding runs on positions that predict answers only.

    Memory: one padded batch, and answer tokens of a batch × vocabulary in float32.
    """
    import torch

    n = len(prompts)
    rank, first, whole = np.zeros(n, np.int64), np.zeros(n), np.zeros(n)
    lines = [prompt.whole[:-1] for prompt in prompts]
    base = language.family.part(language.model, language.family.base)
    head = language.family.part(language.model, language.family.unembedding)
    for rows in language.batches(lines, token_budget):
        last = np.array([len(prompts[i].ids) - 1 for i in rows])
        lengths = np.array([len(prompts[i].answer) for i in rows])
        row = np.repeat(np.arange(len(rows)), lengths)
        offset = np.concatenate([np.arange(length) for length in lengths])
        targets = torch.tensor([t for i in rows for t in prompts[i].answer], device=language.device)
        at = torch.from_numpy(last).to(language.device)
        with torch.inference_mode(), steer(at) if steer else contextlib.nullcontext():
            hidden = base(input_ids=language.padded([lines[i] for i in rows]), use_cache=False).last_hidden_state
            logits = head(hidden[torch.from_numpy(row), torch.from_numpy(last[row] + offset)])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            wanted = logits.gather(1, targets[:, None])
            ranks = (1 + (logits > wanted).sum(1)).cpu().numpy()
            nats = (logits.logsumexp(-1) - wanted[:, 0]).double().cpu().numpy()
        begins = offset == 0
        rank[rows], first[rows] = ranks[begins], nats[begins]
        np.add.at(whole, rows[row], nats)
    return Answers(rank, first, whole, np.array([len(p.answer) for p in prompts]))


def divergence(language: LanguageModel, texts: list[str], steer: Steer, *, token_budget: int = 8192) -> np.ndarray:
    """KL(plain ‖ steered) of the next token behind unrelated texts, nats [texts]: the side effects of steering.

    Raises:
        TransferError: Without texts.
    """
    import torch

    room = language.model.config.max_position_embeddings
    ids = [line[:room] for line in language.renderer.plain(texts) if line]
    if not ids:
        raise TransferError("There are no texts to measure side effects on.")
    found = np.zeros(len(ids))
    base = language.family.part(language.model, language.family.base)
    head = language.family.part(language.model, language.family.unembedding)
    for rows in language.batches(ids, token_budget):
        at = torch.tensor([len(ids[i]) - 1 for i in rows], device=language.device)
        block, each = language.padded([ids[i] for i in rows]), torch.arange(len(rows), device=language.device)

        def log_probabilities(block: Tensor = block, each: Tensor = each, at: Tensor = at) -> Tensor:
            hidden = base(input_ids=block, use_cache=False).last_hidden_state[each, at]
            return head(hidden).double().log_softmax(-1)

        with torch.inference_mode():
            plain = log_probabilities()
            with steer(at):
                changed = log_probabilities()
            found[rows] = (plain.exp() * (plain - changed)).sum(-1).cpu().numpy()
    return found

"""What an added vector does to texts that it is not about."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.language import LanguageModel
from transfer.core.errors import TransferError

POSITIONS = 256
"""Positions whose whole distribution is held at once."""


def drift(
    language: LanguageModel, texts: list[str], layer: int, vector: Tensor, *, token_budget: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """Divergence and loss of a steered model on texts, each as a user turn, with the vector at all of its tokens.

    Memory: the residual stream of one padded batch twice, and ``POSITIONS`` × vocabulary × 3 floats.

    Args:
        language: The model.
        texts: Neutral texts.
        layer: Canonical layer.
        vector: What is added [d_model].
        token_budget: Padded positions in one forward pass at most.

    Returns:
        Per text: mean KL(plain‖steered) of the next token in nats, and the rise of the negative log-likelihood in
        nats a byte; float64 [texts] each.

    Raises:
        TransferError: For a text of fewer than two tokens.
    """
    lines = language.render_many(texts)
    short = [i for i, line in enumerate(lines) if len(line.content) < 2]
    if short:
        raise TransferError(f"{len(short)} neutral texts have fewer than two tokens, first number {short[0]}.")
    base = language.family.part(language.model, language.family.base)
    head = language.family.part(language.model, language.family.unembedding)
    kl, nll = np.zeros(len(texts)), np.zeros(len(texts))
    ids = [line.ids for line in lines]
    first = torch.tensor([int(line.content[0]) for line in lines])
    for rows in language.batches(ids, token_budget):
        block = language.padded([ids[i] for i in rows])
        with torch.inference_mode():
            plain = base(input_ids=block, use_cache=False).last_hidden_state
            with language.steering(layer, vector.reshape(1, -1), start=first[torch.from_numpy(rows)]):
                moved = base(input_ids=block, use_cache=False).last_hidden_state
            row = np.concatenate([np.full(len(lines[i].content) - 1, j) for j, i in enumerate(rows)])
            at = np.concatenate([lines[i].content[1:] for i in rows])
            for begin in range(0, len(at), POSITIONS):
                r, p = (torch.from_numpy(x[begin : begin + POSITIONS]) for x in (row, at))
                before, after = (head(h[r, p - 1]).float().log_softmax(-1) for h in (plain, moved))
                gap = before - after
                token = block[r, p].unsqueeze(1)
                where = rows[r.numpy()]
                np.add.at(kl, where, (before.exp() * gap).sum(-1).double().cpu().numpy())
                np.add.at(nll, where, gap.gather(1, token).squeeze(1).double().cpu().numpy())
    tokens = np.array([len(line.content) - 1 for line in lines])
    return kl / tokens, nll / np.array([len(text.encode()) for text in texts])

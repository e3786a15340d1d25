"""Interventions at one layer: put other vectors into the residual stream, or add to it and read what follows.

The hooks themselves are those of ``models.hooks``; here stands what rows and positions they act on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.adapter import Adapter
from models.language import LanguageModel
from models.tokens import Rendered
from transfer.core.errors import TransferError

DIRECTIONS = 16
"""Directions whose steered texts are held at once."""


def replacing(positions: list[np.ndarray], values: list[Tensor]) -> Callable[[np.ndarray, Tensor], Tensor]:
    """An edit for ``LanguageModel.nll`` that puts vectors in at some positions of each row.

    Args:
        positions: Per row of all rows, positions in its tokens [n].
        values: Per row, what the residual stream becomes there [n, d_model].

    Returns:
        A function of (row numbers [B], residual stream [B, T, d_model]) that returns the changed stream.

    Raises:
        TransferError: When positions and vectors of a row differ in number.
    """
    for row, (at, vectors) in enumerate(zip(positions, values, strict=True)):
        if len(at) != len(vectors):
            raise TransferError(f"Row {row} has {len(at)} positions to replace and {len(vectors)} vectors for them.")

    def edit(rows: np.ndarray, hidden: Tensor) -> Tensor:
        row = np.concatenate([np.full(len(positions[i]), j, dtype=np.int64) for j, i in enumerate(rows)])
        at = np.concatenate([positions[i] for i in rows]).astype(np.int64)
        new = torch.cat([values[i] for i in rows])
        edited = hidden.clone()
        edited[torch.from_numpy(row), torch.from_numpy(at)] = new.to(hidden.device, hidden.dtype)
        return edited

    return edit


def steered_logits(
    language: LanguageModel,
    lines: list[Rendered],
    layer: int,
    vectors: Tensor,
    tokens: np.ndarray,
    *,
    token_budget: int = 8192,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Logits that follow the last content token, with a vector added to the residual stream at all content positions.

    Memory: one padded batch, and its rows × the vocabulary once in float32.

    Args:
        language: The model.
        lines: Rendered texts, each with a content token; what follows the last one is not read.
        layer: Canonical layer that the vectors are added to.
        vectors: One a line [lines, d_model]; zeros leave a line as it is.
        tokens: Token ids whose logits are wanted.
        token_budget: Padded positions in one forward pass at most.

    Yields:
        Line numbers [B], and their logits in float32 [B, tokens].

    Raises:
        TransferError: For a line without content, vectors that do not fit, or a layer out of range.
    """
    if vectors.shape != (len(lines), language.d_model):
        raise TransferError(
            f"Steering vectors are {tuple(vectors.shape)}, expected ({len(lines)}, {language.d_model})."
        )
    empty = [i for i, line in enumerate(lines) if not len(line.content)]
    if empty:
        raise TransferError(f"{len(empty)} texts hold no content token, first number {empty[0]}.", "Leave them out.")
    ids = [line.ids[: int(line.content[-1]) + 1] for line in lines]
    first = torch.tensor([int(line.content[0]) for line in lines])
    last = torch.tensor([len(line) - 1 for line in ids])
    base = language.family.part(language.model, language.family.base)
    head = language.family.part(language.model, language.family.unembedding)
    wanted = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(language.device)
    for rows in language.batches(ids, token_budget):
        block, at = language.padded([ids[i] for i in rows]), torch.from_numpy(rows)
        with torch.inference_mode(), language.steering(layer, vectors[at], start=first[at]):
            hidden = base(input_ids=block, use_cache=False).last_hidden_state
            logits = head(hidden[torch.arange(len(rows)), last[at]]).float()[:, wanted].cpu()
        yield rows, logits


class Probe:
    """One model with its probe texts: how long its steering vectors are, and what they do.

    Args:
        adapter: Model, SAE and the layer that is steered.
        lines: Rendered texts, each with a content token.
        strength: Length of the vectors, in median norms of the residual stream at the texts' content tokens.
        token_budget: Padded positions in one forward pass at most.
    """

    def __init__(self, adapter: Adapter, lines: list[Rendered], strength: float, token_budget: int) -> None:
        self.adapter, self.lines, self.token_budget = adapter, lines, token_budget
        norms: list[np.ndarray] = []
        last: list[tuple[int, Tensor]] = []
        for rows, hidden in adapter.language.stream([r.ids for r in lines], adapter.space.layer, token_budget):
            for i, states in zip(rows, hidden.float(), strict=True):
                norms.append(states[lines[i].content].norm(dim=-1).cpu().numpy())
                last.append((i, states[lines[i].content[-1]].clone()))  # a view would keep the whole batch
        self.size = strength * float(np.median(np.concatenate(norms)))
        self.last = [state for _, state in sorted(last, key=lambda pair: pair[0])]
        """Residual stream at the last content token, in text order."""

    def vectors(self, directions: np.ndarray) -> np.ndarray:
        """Directions at steering length, float32 [n, d_model].

        Raises:
            TransferError: For a direction of length zero.
        """
        norm = np.linalg.norm(directions, axis=1, keepdims=True)
        if not norm.all():
            raise TransferError(f"{int(np.sum(norm == 0))} directions of {self.adapter.space.id} are zero.")
        return (directions / norm * self.size).astype(np.float32)

    def effects(self, vectors: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Mean change of the logits over the even and over the odd texts, centred and of unit length.

        Memory: three times what is returned, and steering vectors for ``DIRECTIONS`` × texts.

        Args:
            vectors: What is added to the residual stream [n, d_model].
            tokens: Token ids whose logits count.

        Returns:
            float32 [2, n, tokens].
        """
        plain = self._logits(np.zeros((1, vectors.shape[1]), np.float32), tokens)
        parts = [self._logits(block, tokens) - plain for block in _blocks(vectors)]
        found = np.concatenate(parts, axis=1)
        found -= found.mean(axis=2, keepdims=True)
        return found / np.maximum(np.linalg.norm(found, axis=2, keepdims=True), 1e-12)

    def _logits(self, vectors: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Logits with each vector, mean over the even and over the odd texts, float32 [2, n, tokens]."""
        n = len(self.lines)
        total = torch.zeros(2, len(vectors), len(tokens))
        counts = torch.tensor([(n + 1) // 2, n // 2])
        each = torch.from_numpy(vectors).repeat_interleave(n, dim=0)
        language, layer = self.adapter.language, self.adapter.space.layer
        lines = self.lines * len(vectors)
        for rows, logits in steered_logits(language, lines, layer, each, tokens, token_budget=self.token_budget):
            where = torch.from_numpy(rows % n % 2 * len(vectors) + rows // n)
            total.view(-1, len(tokens)).index_add_(0, where, logits)
        return (total / counts[:, None, None]).numpy()

    def rises(self, vectors: np.ndarray, features: np.ndarray) -> np.ndarray:
        """How much each vector raises features at the last content token, mean over the texts.

        Args:
            vectors: What is added to the residual stream [n, d_model].
            features: Feature ids of the adapter's SAE.

        Returns:
            float64 [n, features].
        """
        states = torch.stack(self.last)
        plain = self.adapter.dictionary.encode(states)[:, features].toarray().mean(axis=0)
        found = []
        for block in _blocks(vectors):
            moved = (states + torch.from_numpy(block).to(states.device)[:, None]).reshape(-1, states.shape[1])
            codes = self.adapter.dictionary.encode(moved)[:, features].toarray()
            found.append(codes.reshape(len(block), len(states), -1).mean(axis=1) - plain)
        return np.concatenate(found).astype(np.float64)


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), DIRECTIONS):
        yield vectors[start : start + DIRECTIONS]

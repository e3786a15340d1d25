"""Attention weights of the last token, computed for that token alone: no eager attention, no [T, T] matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transfer.core.errors import TransferError

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel


@dataclass
class Queries:
    """Rotated queries of the last token by layer, [B, heads, width] each, filled while a block runs."""

    rows: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def queries_read(language: LanguageModel) -> Iterator[Queries]:
    """Keep the queries of the last position of every layer inside the block."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found = Queries()

    def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[:, -1:]
        cos, sin = kwargs["position_embeddings"]
        with torch.no_grad():
            query = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim))
            if hasattr(module, "q_norm"):
                query = module.q_norm(query)
            query = query.transpose(1, 2)
            # The same rotation in all supported families; the second argument is rotated along and dropped.
            found.rows.append(apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])[0][:, :, 0])

    handles = [
        module.register_forward_pre_hook(read, with_kwargs=True)
        for module in language.family.attentions(language.model)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def last_row(language: LanguageModel, layer: int, query: Tensor, cache: Any, length: int) -> tuple[Tensor, Tensor]:
    """How the last token's heads attend, and what to.

    Args:
        language: The model.
        layer: Decoder layer, from 0.
        query: [B, heads, width].
        cache: Keys and values of all ``length`` positions.
        length: Tokens of a row.

    Returns:
        Attention weights [B, heads, T], and values by head [B, heads, T, width].

    Raises:
        TransferError: When the cache has let go of positions (a sliding window shorter than the prompt).
    """
    import torch

    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    if keys.shape[2] != length:
        raise TransferError(
            f"Layer {layer} keeps {keys.shape[2]} of {length} positions (a sliding window).",
            "Score all keys instead, or use shorter prompts.",
        )
    module = language.family.attentions(language.model)[layer]
    times = query.shape[1] // keys.shape[1]
    with torch.no_grad():
        keys, values = keys.detach().repeat_interleave(times, 1), values.detach().repeat_interleave(times, 1)
        scores = torch.einsum("bhd,bhtd->bht", query, keys) * module.scaling
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return scores.softmax(-1, dtype=wide), values.to(wide)

"""Sampling through transformers' ``generate``, ended per row, decoded byte by byte."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.tokens import TokenBytes


class _Stop:
    """Ends a row once its continuation holds a string.

    Args:
        table: What each token writes.
        stop: The string.
    """

    def __init__(self, table: TokenBytes, stop: str) -> None:
        self.table = table
        self.stop = stop.encode()
        self.done: list[bool] = []
        self.written: list[bytes] = []

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Which rows are done."""
        if not self.written:
            self.written = [b""] * len(input_ids)
            self.done = [False] * len(input_ids)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self.done[row]:
                self.written[row] += self.table.join([token])
                self.done[row] = self.stop in self.written[row]
        return torch.tensor(self.done, device=input_ids.device)


def sample(
    model: Any,
    table: TokenBytes,
    block: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: str | None,
    pad_id: int,
) -> list[str]:
    """Continue left-padded rows with a key-value cache, using torch's current random state.

    Args:
        model: A transformers causal language model.
        table: What each token writes.
        block: Token ids [B, T].
        mask: 1 on real tokens [B, T].
        max_new_tokens: Longest continuation.
        temperature: 0 decodes greedily.
        top_p: Nucleus.
        stop: Continuations end before this string.
        pad_id: Fills rows that ended early.

    Returns:
        Continuations, ended before the first special token or ``stop``; bytes that are no UTF-8 become U+FFFD.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # A raw text ends at any special token: documents and turns end with different ones.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(table.special) or None,
        pad_token_id=pad_id,
        use_cache=True,
        cache_implementation="static",  # a cache that grows is copied at every step
        **settings,
    )
    criteria = StoppingCriteriaList([_Stop(table, stop)] if stop else [])
    out = model.generate(input_ids=block, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
    texts = []
    for line in out[:, block.shape[1] :].tolist():
        end = next((i for i, token in enumerate(line) if token in table.special), len(line))
        text = table.join(line[:end]).decode("utf8", errors="replace")
        texts.append(text.split(stop, 1)[0] if stop else text)
    return texts

"""Guided decoding: while it writes, the model's own SAE says which continuation activates the feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from models.adapter import Adapter
from models.decoding import Decoding
from models.generators import Prompt
from models.placement import placed
from models.steered import SteeredGenerator
from transfer.core.errors import TransferError
from transfer.core.keys import digest


@dataclass(frozen=True, eq=False)
class GuidedLanguage:
    """A model whose next token is drawn from p(token)^(1/T) · exp(λ · gain), the gain read off its SAE.

    At each step the ``candidates`` most likely tokens of the nucleus stand side by side behind the same prefix: one
    forward pass [B, candidates] under a mask in which each sees the prefix and itself. That pass gives the residual
    stream at the SAE's layer for every candidate (hence the feature's value with that token), the keys and values of
    all, of which the chosen one's stay in the cache, and the hidden state that the next step's distribution comes
    from. Nothing is computed twice, and with λ = 0 this is plain sampling from the same nucleus.

    The gain is max(largest value of the prefix, value with the token) / scale, at most ``ENOUGH``: like the score
    g_i(x) it is a maximum over tokens, so a token that does not raise it changes nothing. The value is the feature's
    pre-activation: a code that is zero for nearly every token would say nothing about which way to go.

    Memory: a forward pass of ``batch_size × candidates`` tokens, and the cache of ``batch_size`` rows.
    """

    adapter: Adapter

    @property
    def ref(self) -> str:
        """What the model is loaded from."""
        return self.adapter.language.ref

    def generate(
        self,
        prompts: list[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        steer: tuple[int, Tensor] | None,
        stop: str | None,
        batch_size: int,
        guide: list[tuple[int, float]] | None = None,
        candidates: int = 16,
        weight: float = 0.0,
    ) -> list[str]:
        """Continue raw texts; see ``LanguageModel.generate`` for what is not said here.

        Args:
            prompts: One row each.
            max_new_tokens: Longest continuation.
            temperature: Above 0.
            top_p: Nucleus.
            seed: Decides all sampling.
            steer: The SAE's layer, and what is added to the residual stream there [B, d_model]; the SAE reads the
                stream before that.
            stop: Continuations end before this string.
            batch_size: Rows in one forward pass.
            guide: Per row, the feature and its scale; None for no guidance.
            candidates: Tokens compared at each step.
            weight: λ, in nats for one scale of the feature.

        Raises:
            TransferError: When a prompt does not fit the context (or the sliding window), or steering is at another
                layer.
        """
        language = self.adapter.language
        window = getattr(language.model.config, "sliding_window", None)
        ids = [line or [language.pad_id] for line in language.with_room(prompts, max_new_tokens, window)]
        if steer is not None and steer[0] != self.adapter.space.layer:
            raise TransferError("Guided decoding steers at the SAE's own layer only.", "Use that layer.")
        texts: list[str] = []
        generator = torch.Generator(device=language.device).manual_seed(seed)
        with torch.inference_mode():
            for begin in range(0, len(ids), batch_size):
                rows = slice(begin, begin + batch_size)
                texts += Decoding(
                    self.adapter,
                    ids[rows],
                    None if steer is None else steer[1][rows],
                    guide[rows] if guide and weight else None,
                    temperature=temperature,
                    top_p=top_p,
                    candidates=candidates,
                    weight=weight,
                    generator=generator,
                ).write(max_new_tokens, stop)
        return texts


class GuidedGenerator(SteeredGenerator):
    """``SteeredGenerator`` whose model is guided by its SAE while it writes; it may be steered at the same time.

    Args:
        adapter: The model and the SAE whose features are asked for.
        weight: λ, in nats for one scale of the feature; 0 is plain sampling.
        candidates: Tokens compared at each step.
        model: Name of the model, for lineage.
        settings: As for ``SteeredGenerator``; a row of a batch is ``candidates`` tokens wide.
    """

    reads = frozenset({"feature"})

    def __init__(
        self,
        adapter: Adapter,
        *,
        weight: float = 4.0,
        candidates: int = 16,
        model: str = "",
        **settings: Any,
    ) -> None:
        model = model or adapter.space.model
        super().__init__(GuidedLanguage(adapter), adapter.space.layer, model=model, **settings)
        if weight < 0 or candidates < 1 or self.settings["temperature"] <= 0:
            raise TransferError("Guided decoding needs weight >= 0, candidates >= 1 and temperature > 0.")
        self.adapter = adapter
        self.how: dict[str, Any] = dict(candidates=candidates, weight=weight)
        decisive = [self.settings, self.how, adapter.space.id, self.batch_size, self.chunk]
        self.name = f"guided:{model}@{adapter.space.layer}#{digest(decisive, 6)}"

    def _job(self, requests: list[Prompt], part: list[tuple[int, int]], begin: int) -> dict[str, Any]:
        job = super()._job(requests, part, begin)
        return {**job, **self.how, "guide": [(requests[i].feature, requests[i].scale) for i, _ in part]}

    def _worker(self) -> tuple[Callable[[Any, dict[str, Any]], list[str]], Any]:
        space = self.adapter.space
        return guided_chunk, (space.model, space.sae, space.layer)


def guided_chunk(where: tuple[str, str, int], job: dict[str, Any]) -> list[str]:
    """One chunk, in a worker process."""
    return GuidedLanguage(_kept_adapter(*where)).generate(**job)


@lru_cache(maxsize=1)
def _kept_adapter(model: str, sae: str, layer: int) -> Adapter:
    dtype, device = placed(model)
    return Adapter.load(model, sae, layer, dtype=dtype, device=device)

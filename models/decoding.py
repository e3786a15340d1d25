"""One batch of guided decoding: candidate tokens side by side, one forward pass a step, one cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.adapter import Adapter
from models.hooks import editing

ENOUGH = 3.0
"""Guidance stops to pull once the text has reached this many times the feature's scale."""


class Decoding:
    """One batch of rows on their way.

    Args:
        adapter: Model and SAE.
        ids: Tokens of each prompt.
        steer: What is added at the SAE's layer [B, d_model], or None.
        guide: Per row, the feature and its scale; None for plain sampling.
        temperature: Above 0.
        top_p: Nucleus.
        candidates: Tokens compared at each step.
        weight: λ.
        generator: Random numbers.
    """

    def __init__(
        self,
        adapter: Adapter,
        ids: list[list[int]],
        steer: Tensor | None,
        guide: Sequence[tuple[int, float]] | None,
        *,
        temperature: float,
        top_p: float,
        candidates: int,
        weight: float,
        generator: torch.Generator,
    ) -> None:
        from transformers import DynamicCache

        language = adapter.language
        self.language, self.adapter = language, adapter
        self.base = language.family.part(language.model, language.family.base)
        self.head = language.family.part(language.model, language.family.unembedding)
        self.temperature, self.top_p, self.k, self.weight = temperature, top_p, candidates, weight
        self.random = generator
        self.residual = torch.zeros(0)
        """Stream at the SAE's layer in the last pass, before steering."""
        self.steer = None if steer is None else steer[:, None].to(language.device, language.model.dtype)
        self.probe = None if guide is None else Probe(adapter, guide)
        block = language.padded(ids, left=True)
        lengths = torch.tensor([len(line) for line in ids], device=language.device)
        width = block.shape[1]
        self.seen = torch.arange(width, device=language.device) >= width - lengths[:, None]  # [B, T]
        self.place = lengths  # position of the next token
        self.cache = DynamicCache()
        position = (torch.arange(width, device=language.device) - (width - lengths)[:, None]).clamp(min=0)
        with self._site():
            hidden = self.base(
                input_ids=block,
                attention_mask=self.seen.long(),
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        self.logits = self.head(hidden[:, -1]).float()

    def _site(self) -> Any:
        """Captures the residual stream at the SAE's layer, and steers behind that."""

        def edit(hidden: Tensor) -> Tensor:
            self.residual = hidden
            return hidden if self.steer is None else hidden + self.steer

        return editing(self.language.family.site(self.language.model, self.adapter.space.layer), edit)

    def write(self, max_new_tokens: int, stop: str | None) -> list[str]:
        """The continuations; rows that have ended are left out of the passes that follow."""
        table = self.language.renderer.bytes
        special = torch.zeros(self.logits.shape[-1], dtype=torch.bool, device=self.logits.device)
        special[[t for t in table.special if t < len(special)]] = True
        end = (stop or "").encode()
        written = [b""] * len(self.seen)
        alive = list(range(len(written)))
        best = torch.full((len(alive),), -torch.inf, device=self.logits.device)
        for _ in range(max_new_tokens):
            token, best = self._step(special, best)
            going = []
            for place, chosen in enumerate(token.tolist()):
                row = alive[place]
                if chosen in table.special:
                    continue
                written[row] += table.join([chosen])
                if not (end and end in written[row]):
                    going.append(place)
            if not going:
                break
            if len(going) < len(alive):
                self._leave(torch.tensor(going, device=token.device))
                alive, best = [alive[place] for place in going], best[going]
        texts = [line.decode("utf8", errors="replace") for line in written]
        return [text.split(stop, 1)[0] for text in texts] if stop else texts

    def _leave(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.seen, self.place, self.logits = self.seen[rows], self.place[rows], self.logits[rows]
        self.steer = None if self.steer is None else self.steer[rows]
        self.probe = None if self.probe is None else self.probe.of(rows)
        self.cache.batch_select_indices(rows)

    def _step(self, special: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one token a row and put it into the cache; also the largest value of each row so far."""
        logp, token = self._nucleus()
        if self.probe is None:
            token = token.gather(1, torch.multinomial(logp.exp(), 1, generator=self.random))
            hidden, chosen = self._forward(token), torch.zeros_like(token)[:, :1]
        else:
            hidden = self._forward(token)
            # A token that ends the text is no part of it.
            value = torch.where(special[token], -torch.inf, self.probe(self.residual))
            law, reached = weighed(logp, value, best, self.weight)
            chosen = torch.multinomial(law.exp(), 1, generator=self.random)
            best = reached.gather(1, chosen)[:, 0]
        self._keep(chosen, token.shape[1])
        self.logits = self.head(hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))[:, 0]).float()
        return token.gather(1, chosen)[:, 0], best

    def _nucleus(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, k] at the temperature, and the tokens; −∞ outside the nucleus."""
        logp = (self.logits / self.temperature).log_softmax(-1)
        # Guidance compares k tokens; without it the whole nucleus is drawn from.
        top = logp.topk(min(self.k, logp.shape[1]) if self.probe is not None else logp.shape[1], dim=1)
        before = top.values.exp().cumsum(1) - top.values.exp()
        return top.values.masked_fill(before >= self.top_p, -torch.inf), top.indices

    def _forward(self, token: Tensor) -> Tensor:
        """Last hidden states [B, k, d_model] of tokens that all follow the same prefix and do not see each other."""
        n, k = token.shape
        allowed = torch.cat(
            [self.seen[:, None].expand(n, k, -1), torch.eye(k, dtype=torch.bool, device=token.device).expand(n, k, k)],
            dim=2,
        )
        dtype = self.language.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=token.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
        with self._site():
            return self.base(
                input_ids=token,
                attention_mask=mask[:, None],
                position_ids=self.place[:, None].expand(n, k),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state

    def _keep(self, chosen: Tensor, k: int) -> None:
        """Of the last ``k`` places of the cache, leave the chosen one's."""
        if k > 1:
            layer: Any
            for layer in self.cache.layers:
                keys, values = layer.keys, layer.values
                last = keys.shape[2] - k
                at = chosen[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
                layer.keys = torch.cat([keys[:, :, :last], keys[:, :, last:].gather(2, at)], dim=2)
                at = chosen[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
                layer.values = torch.cat([values[:, :, :last], values[:, :, last:].gather(2, at)], dim=2)
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(self.seen), 1)], dim=1)
        self.place = self.place + 1


def weighed(logp: Tensor, value: Tensor, best: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The distribution over candidate tokens, p^(1/T) · exp(λ · gain), normalised.

    Args:
        logp: Log-probabilities at the temperature [B, k]; −∞ for a token that may not be drawn.
        value: Value of the feature at each candidate, in its scale [B, k]; −∞ for a token that is no part of the text.
        best: Largest value of the prefix [B]; −∞ before the first token.
        weight: λ.

    Returns:
        Log-probabilities [B, k], and the largest value of the prefix with each candidate [B, k].
    """
    reached = torch.maximum(value, best[:, None])
    gain = reached.clamp(max=ENOUGH)
    # An end before anything was written gains as little as the worst candidate.
    least = torch.where(torch.isfinite(gain), gain, torch.inf).amin(1, keepdim=True)
    gain = torch.where(torch.isfinite(gain), gain, torch.where(torch.isfinite(least), least, 0.0))
    return (logp + weight * gain).log_softmax(1), reached


class Probe:
    """The pre-activation of one feature a row, in units of its scale.

    Args:
        adapter: Model and SAE.
        guide: Per row, the feature and its scale.
    """

    def __init__(self, adapter: Adapter, guide: Sequence[tuple[int, float]]) -> None:
        sae = adapter.dictionary.sae
        device = adapter.language.device
        ids = torch.tensor([feature for feature, _ in guide], device=sae.device)
        self.adapter = adapter
        self.weight = sae.W_enc[:, ids].T.to(device, torch.float32)  # [B, d_model]
        bias = sae.b_enc[ids] if hasattr(sae, "b_enc") else torch.zeros(len(ids), device=sae.device)
        self.bias = bias.to(device, torch.float32)
        self.centre = (sae.b_dec * sae.cfg.apply_b_dec_to_input).to(device, torch.float32)
        self.scale = torch.tensor([max(scale, 1e-6) for _, scale in guide], device=device)

    def of(self, rows: Tensor) -> Probe:
        """The probe of these rows."""
        probe = copy.copy(self)
        probe.weight, probe.bias, probe.scale = self.weight[rows], self.bias[rows], self.scale[rows]
        return probe

    def __call__(self, residual: Tensor) -> Tensor:
        """[B, k] of residual-stream vectors [B, k, d_model]."""
        x = self.adapter.dictionary._normalised(residual.float())[0] - self.centre
        return (torch.einsum("bkd,bd->bk", x, self.weight) + self.bias[:, None]) / self.scale[:, None]

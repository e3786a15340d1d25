"""Steering with a function vector, in single forward passes and in generation with a key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from models.hooks import editing
from transfer.core.errors import TransferError

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

Mode = Literal["aggregated", "distributed"]


@dataclass(frozen=True)
class Plan:
    """How a vector is added."""

    mode: Mode
    scale: float = 1.0
    layer: int | None = None
    """Canonical layer (``hidden_states`` index) that gets the whole sum; only where it is aggregated."""

    def __post_init__(self) -> None:
        if (self.mode == "aggregated") != (self.layer is not None):
            raise TransferError(f"Steering that is {self.mode} with layer {self.layer} is not defined.")
        if not np.isfinite(self.scale):
            raise TransferError(f"The steering scale is {self.scale}.")


class _Adder:
    """Adds one vector from the last token of each prompt on.

    Args:
        delta: [d_model].
        at: Position of each row's last prompt token [B]; the last position of the block when left out, which is right
            for rows padded on the left.
        every: Also at what follows, such as generated tokens.
    """

    def __init__(self, delta: Tensor, at: Tensor | None, every: bool) -> None:
        self.delta, self.at, self.every = delta, at, every
        self.begun = False

    def __call__(self, hidden: Tensor) -> Tensor:
        import torch

        if self.delta.shape[-1] != hidden.shape[-1]:
            raise TransferError(f"The vector is {self.delta.shape[-1]} wide, the layer is {hidden.shape[-1]}.")
        if self.at is not None and len(self.at) != len(hidden):
            raise TransferError(f"{len(self.at)} prompt ends are given for {len(hidden)} rows.")
        length = hidden.shape[1]
        delta = self.delta.to(hidden.device, hidden.dtype)
        # One position behind a begun sequence is a generated token; anything longer is a fresh block of prompts.
        follows = length == 1 and self.begun
        self.begun = True
        if follows:
            return hidden + delta if self.every else hidden
        position = torch.arange(length, device=hidden.device)[None]
        last = torch.full((len(hidden), 1), length - 1) if self.at is None else self.at[:, None]
        last = last.to(hidden.device)
        if int(last.max()) >= length:
            raise TransferError(f"A prompt ends at position {int(last.max())} of a block of {length}.")
        chosen = position >= last if self.every else position == last
        return hidden + chosen[..., None] * delta


@contextlib.contextmanager
def steered(
    language: LanguageModel, deltas: np.ndarray, plan: Plan, *, at: Tensor | None = None, every: bool = False
) -> Iterator[None]:
    """Add a function vector inside the block.

    Aggregated: the sum of the deltas, times the scale, is added to the residual stream at one layer. Distributed: each
    delta, times the scale, is added to what attention writes in its own layer, which equals adding the scaled mean
    outputs to the heads themselves.

    The block may hold forward passes over rows padded on the right (name the prompts' ends with ``at``), or calls of
    ``LanguageModel.generate``, whose rows are padded on the left.

    Args:
        language: The model.
        deltas: Residual deltas by decoder layer [layers, d_model].
        plan: Mode, scale, layer.
        at: Position of the last prompt token in each row [B].
        every: Also steer what follows the prompt; otherwise its last token only, as in the published evaluations.

    Raises:
        TransferError: When nothing ran in the block, shapes do not fit, the layer does not exist, or all deltas are 0.
    """
    import torch

    if deltas.shape != (language.n_layers, language.d_model):
        raise TransferError(
            f"Residual deltas are {deltas.shape}, the model has {(language.n_layers, language.d_model)}.",
            "Use a vector that was built with this model.",
        )
    if not np.any(deltas):
        raise TransferError("All residual deltas are zero: there is nothing to steer with.")
    added = torch.from_numpy(np.asarray(deltas)) * plan.scale
    with contextlib.ExitStack() as stack:
        if plan.mode == "aggregated":
            site = language.family.site(language.model, plan.layer if plan.layer is not None else -1)
            stack.enter_context(editing(site, _Adder(added.sum(0), at, every)))
        else:
            attentions = language.family.attentions(language.model)
            for layer in np.flatnonzero(np.any(deltas, axis=1)):
                stack.enter_context(editing(attentions[layer], _Adder(added[layer], at, every)))
        yield

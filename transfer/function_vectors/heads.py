"""What attention heads put out at the last token of prompts, and what that adds to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from models.hooks import editing_input
from transfer.core.errors import TransferError
from transfer.function_vectors.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel


def shape_of(language: LanguageModel) -> tuple[int, int, int]:
    """(layers, heads, head width)."""
    layout = language.family.heads_of(language.model)
    return language.n_layers, layout.n_heads, layout.head_dim


@contextlib.contextmanager
def heads_edited(language: LanguageModel, edit: Any) -> Iterator[None]:
    """Pass the head outputs of every layer through ``edit(layer, x [B, T, heads * width]) -> x`` inside the block.

    Raises:
        TransferError: When the block ends and a layer's heads were never computed.
    """
    with contextlib.ExitStack() as stack:
        for layer, mixer in enumerate(language.family.head_mixers(language.model)):
            stack.enter_context(editing_input(mixer, lambda x, layer=layer: edit(layer, x)))
        yield


def last_outputs(
    language: LanguageModel, prompts: list[Prompt], token_budget: int = 8192
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Head outputs z at the last token, batch by batch: what the mixing map of each layer reads there.

    Rows are padded on the right, which causal attention keeps out of all real positions.

    Yields:
        Row numbers [B], and z [B, layers, heads, width] in the model's dtype.
    """
    import torch

    n_layers, n_heads, width = shape_of(language)
    ids = [prompt.ids for prompt in prompts]
    base = language.family.part(language.model, language.family.base)
    for rows in language.batches(ids, token_budget):
        last = torch.tensor([len(ids[i]) - 1 for i in rows], device=language.device)
        row = torch.arange(len(rows), device=language.device)
        seen: list[Tensor] = []

        def read(_layer: int, x: Tensor, seen: list[Tensor] = seen, row: Tensor = row, last: Tensor = last) -> Tensor:
            seen.append(x[row, last])
            return x

        with torch.inference_mode(), heads_edited(language, read):
            base(input_ids=language.padded([ids[i] for i in rows]), use_cache=False)
        yield rows, torch.stack(seen, dim=1).view(len(rows), n_layers, n_heads, width)


def mean_outputs(language: LanguageModel, prompts: list[Prompt], token_budget: int = 8192) -> Tensor:
    """Mean head outputs z̄ at the last token, float64 [layers, heads, width]; memory is that of one batch.

    Raises:
        TransferError: Without prompts.
    """
    import torch

    if not prompts:
        raise TransferError("There are no prompts to average head outputs over.")
    total = torch.zeros(shape_of(language), dtype=torch.float64)
    for _, z in last_outputs(language, prompts, token_budget):
        total += z.double().sum(0).cpu()
    return total / len(prompts)


def residual_deltas(language: LanguageModel, outputs: Tensor) -> Tensor:
    """What head outputs add to the residual stream, without the mixing map's bias; at least float32, [layers, d_model].

    Args:
        language: The model.
        outputs: [layers, heads, width]; zeros for heads that do not count.
    """
    import torch

    found = []
    with torch.inference_mode():
        for mixer, z in zip(language.family.head_mixers(language.model), outputs, strict=True):
            # Through the module itself, so that quantised weights and biases need no case of their own.
            weight = next(mixer.parameters())
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
            x = z.reshape(1, -1).to(language.device, dtype)
            found.append((mixer(x) - mixer(torch.zeros_like(x)))[0].cpu())
    stacked = torch.stack(found)
    return stacked if stacked.dtype == torch.float64 else stacked.float()


def by_length(prompts: list[Prompt], limit: int) -> list[list[int]]:
    """Prompt numbers grouped by equal length, at most ``limit`` a group: such rows need no padding."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt.ids), []).append(i)
    return [rows[at : at + limit] for _, rows in sorted(groups.items()) for at in range(0, len(rows), limit)]


def prefix(language: LanguageModel, ids: Tensor) -> Any:
    """The key-value cache of all but the last token of rows of one length [B, T].

    Whatever is changed at the last token, no earlier key or value depends on it: the cache serves every change.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=language.model.config)
    if ids.shape[1] > 1:
        base = language.family.part(language.model, language.family.base)
        with torch.no_grad():  # tensors of inference mode could not be used where gradients are taken
            base(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    return cache

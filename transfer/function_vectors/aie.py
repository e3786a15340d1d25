"""Average indirect effects of attention heads, exactly, from one prefix pass and one batched decoding step a prompt.

Todd et al. 2024 (arXiv 2310.15213): CIE(l, j | p̃) = f(p̃ | a_lj := ā_lj)[y] - f(p̃)[y], where a_lj is what head j of
layer l puts out at the last token, ā its mean over clean prompts, p̃ a corrupted prompt and f the probability of the
first token of the answer. The AIE is the mean over prompts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models.hooks import editing_input
from transfer.core.errors import TransferError
from transfer.function_vectors.heads import prefix, shape_of
from transfer.function_vectors.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

Metric = Literal["probability", "log_probability", "logit"]

ROWS = 512
"""Changed copies of a prompt in one decoding step at most."""


def answer_metric(logits: Tensor, answers: Tensor, metric: Metric) -> Tensor:
    """How much of the answer's first token: [B] from logits [B, vocabulary] and token ids [B]; at least float32."""
    import torch

    if logits.dtype != torch.float64:
        logits = logits.float()
    if metric == "probability":
        logits = logits.softmax(-1)
    elif metric == "log_probability":
        logits = logits.log_softmax(-1)
    return logits.gather(1, answers[:, None])[:, 0]


def indirect_effects(
    language: LanguageModel,
    prompts: list[Prompt],
    mean: Tensor,
    *,
    heads: list[tuple[int, int]] | None = None,
    metric: Metric = "probability",
    memory: int = 2**30,
) -> np.ndarray:
    """CIE of heads on corrupted prompts.

    The change is at the last token only, so keys and values of the tokens before it never change: one pass over them
    and one step with a row a head give what a forward pass a head would. Memory: ``memory`` bytes of keys and values
    (at least one row beside the unchanged one), and rows × vocabulary in float32.

    Args:
        language: The model.
        prompts: Corrupted prompts.
        mean: Mean head outputs over clean prompts [layers, heads, width].
        heads: (layer, head) pairs to measure; all when left out.
        metric: What counts as effect; the paper's is the probability.
        memory: Bytes for the repeated cache.

    Returns:
        float64 [prompts, layers, heads]; NaN for heads not measured.

    Raises:
        TransferError: Without prompts, for means of another shape, or for a head that does not exist.
    """
    import torch

    n_layers, n_heads, width = shape_of(language)
    if tuple(mean.shape) != (n_layers, n_heads, width):
        raise TransferError(f"Mean head outputs are {tuple(mean.shape)}, the model has {(n_layers, n_heads, width)}.")
    if not prompts:
        raise TransferError("There are no prompts to measure indirect effects on.")
    pairs = [(layer, head) for layer in range(n_layers) for head in range(n_heads)] if heads is None else sorted(heads)
    wrong = [pair for pair in pairs if not (0 <= pair[0] < n_layers and 0 <= pair[1] < n_heads)]
    if wrong:
        raise TransferError(f"Head {wrong[0]} does not exist: the model has {n_layers} layers of {n_heads} heads.")
    values = mean.to(language.device, language.model.dtype)
    found = np.full((len(prompts), n_layers, n_heads), np.nan)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids], device=language.device)
        cache = prefix(language, ids)
        answer = torch.tensor(prompt.answer[:1], device=language.device)
        step = _rows(language, len(prompt.ids), memory)
        for begin in range(0, len(pairs), step):
            part = pairs[begin : begin + step]
            with torch.inference_mode():
                effects = _changed(language, ids, copy.deepcopy(cache), answer, metric, part, values)
            where, which = np.array(part).T
            found[i, where, which] = (effects[1:] - effects[0]).double().cpu().numpy()
    return found


def _rows(language: LanguageModel, length: int, memory: int) -> int:
    layout = language.family.heads_of(language.model)
    size = language.model.dtype.itemsize
    a_row = 2 * language.n_layers * layout.n_kv_heads * layout.head_dim * length * size
    return int(min(ROWS, max(1, memory // a_row)))


def _changed(
    language: LanguageModel,
    ids: Tensor,
    cache: Any,
    answer: Tensor,
    metric: Metric,
    pairs: list[tuple[int, int]],
    values: Tensor,
) -> Tensor:
    """The metric behind the last token, unchanged and with each head replaced alone: [1 + heads].

    Row 0 stays unchanged. Up to its own layer a changed row equals it, so a row joins there, as a copy of row 0: on
    average half of the rows run through a layer.
    """
    import torch

    members: dict[int, list[int]] = {}
    for layer, head in pairs:
        members.setdefault(layer, []).append(head)
    layers = language.family.part(language.model, language.family.layers)
    mixers = language.family.head_mixers(language.model)
    with contextlib.ExitStack() as stack:
        rows = 1
        for layer in range(len(layers)):
            heads = members.get(layer, [])
            if heads:
                which = torch.tensor(heads, device=ids.device)
                stack.enter_context(editing_input(layers[layer], _joined(len(heads))))
                stack.enter_context(editing_input(mixers[layer], _patched(which, values[layer, which])))
            rows += len(heads)
            kept = cache.layers[layer] if ids.shape[1] > 1 else None
            if kept is not None:
                kept.keys = kept.keys.expand(rows, -1, -1, -1)
                kept.values = kept.values.expand(rows, -1, -1, -1)
        logits = language.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    return answer_metric(logits, answer.expand(rows), metric)


def _joined(n: int) -> Callable[[Tensor], Tensor]:
    import torch

    return lambda hidden: torch.cat([hidden, hidden[:1].expand(n, -1, -1)])


def _patched(heads: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit of head outputs [R, 1, heads * width]: of the last rows each holds one of ``values`` in its head."""
    import torch

    def change(x: Tensor) -> Tensor:
        width = values.shape[1]
        changed = x.clone().view(len(x), -1, width)
        rows = torch.arange(len(x) - len(heads), len(x), device=x.device)
        changed[rows, heads] = values
        return changed.view_as(x)

    return change

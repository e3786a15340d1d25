"""Average indirect effects of attention heads, exactly, from one prefix pass and one batched decoding step a prompt.

Todd et al. 2024 (arXiv 2310.15213): CIE(l, j | p̃) = f(p̃ | a_lj := ā_lj)[y] - f(p̃)[y], where a_lj is what head j of
layer l puts out at the last token, ā its mean over clean prompts, p̃ a corrupted prompt and f the probability of the
first token of the answer. The AIE is the mean over prompts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.heads import heads_edited, prefix, shape_of
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
    (at least one row), and rows × vocabulary in float32.

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
    layers, numbers = (torch.tensor(side, device=language.device) for side in zip(*pairs, strict=True))
    values = mean.to(language.device, language.model.dtype)[layers, numbers]
    found = np.full((len(prompts), n_layers, n_heads), np.nan)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids], device=language.device)
        cache = prefix(language, ids)
        answer = torch.tensor(prompt.answer[:1], device=language.device)
        with torch.inference_mode():
            plain = _step(language, ids, copy.deepcopy(cache), answer, metric, 1)
            step = _rows(language, len(prompt.ids), memory)
            for begin in range(0, len(pairs), step):
                part = slice(begin, begin + step)
                where, which, new = layers[part], numbers[part], values[part]
                change = _patch(where, which, new, n_heads)
                with heads_edited(language, change):
                    own = copy.deepcopy(cache)
                    effect = _step(language, ids, own, answer, metric, len(where)) - plain
                found[i, where.cpu().numpy(), which.cpu().numpy()] = effect.double().cpu().numpy()
    return found


def _patch(layers: Tensor, heads: Tensor, values: Tensor, n_heads: int):
    """An edit of head outputs [R, 1, heads * width]: row r holds ``values[r]`` in place of its one head."""

    def change(layer: int, x: Tensor) -> Tensor:
        rows = (layers == layer).nonzero()[:, 0]
        if not len(rows):
            return x
        changed = x.clone().view(len(x), n_heads, -1)
        changed[rows, heads[rows]] = values[rows]
        return changed.view_as(x)

    return change


def _rows(language: LanguageModel, length: int, memory: int) -> int:
    layout = language.family.heads_of(language.model)
    size = language.model.dtype.itemsize
    a_row = 2 * language.n_layers * layout.n_kv_heads * layout.head_dim * length * size
    return int(min(ROWS, max(1, memory // a_row)))


def _step(language: LanguageModel, ids: Tensor, cache, answer: Tensor, metric: Metric, rows: int) -> Tensor:
    """The metric behind the last token, in ``rows`` copies."""
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    logits = language.model(input_ids=ids[:, -1:].expand(rows, 1), past_key_values=cache, use_cache=True).logits[:, -1]
    return answer_metric(logits, answer.expand(rows), metric)

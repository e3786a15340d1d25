"""Head scores from gradients at the last token: attribution patching, gradient × activation, integrated gradients.

All three take the gradient of the answer's metric by the head outputs z of the last token. No earlier position depends
on them, so the prefix runs without a graph and only one token is differentiated: little more than one forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.aie import Metric, answer_metric
from transfer.function_vectors.heads import by_length, heads_edited, prefix, shape_of
from transfer.function_vectors.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

GROUP = 16
"""Prompts of one length that are differentiated together."""
LaterHeads = Literal["respond", "frozen"]


@dataclass(frozen=True, eq=False)
class LastStep:
    """Head outputs at the last token of B prompts and the metric's gradient by them, [B, layers, heads, width]."""

    outputs: Tensor
    gradient: Tensor
    metric: Tensor
    """[B]."""
    logits: Tensor
    """[B, vocabulary]."""
    cache: Any
    """Keys and values of all positions."""


def last_step(
    language: LanguageModel,
    ids: Tensor,
    cache: Any,
    answers: Tensor,
    metric: Metric,
    *,
    shift: Tensor | None = None,
    fixed: Tensor | None = None,
) -> LastStep:
    """Run the last token of rows of one length, with a graph.

    Args:
        language: The model.
        ids: [B, T].
        cache: Of all but the last token; is filled up.
        answers: First tokens of the answers [B].
        metric: What is differentiated.
        shift: Added to the head outputs [B, layers, heads, width].
        fixed: Head outputs that stand in for the model's own, before the shift; later heads then do not respond.
    """
    import torch

    shape = shape_of(language)
    seen: list[Tensor] = []
    leaves: list[Tensor] = []

    def edit(layer: int, x: Tensor) -> Tensor:
        own = x if fixed is None else fixed[:, layer].reshape_as(x).to(x.dtype)
        leaf = torch.zeros_like(x) if shift is None else shift[:, layer].reshape_as(x).to(x.dtype)
        leaf = leaf.detach().clone().requires_grad_()
        seen.append(own.detach())
        leaves.append(leaf)
        return own + leaf

    with torch.enable_grad(), heads_edited(language, edit):
        logits = language.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        value = answer_metric(logits, answers, metric)
        gradients = torch.autograd.grad(value.sum(), leaves)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def heads(parts: list[Tensor]) -> Tensor:
        return torch.stack([p.detach().to(wide) for p in parts], dim=1).view(len(ids), *shape)

    return LastStep(heads(seen), heads(list(gradients)), value.detach(), logits.detach(), cache)


def steps(
    language: LanguageModel, prompts: list[Prompt], metric: Metric
) -> Iterator[tuple[list[int], Tensor, LastStep]]:
    """Last steps of all prompts, grouped by length.

    Yields:
        Prompt numbers [B], their tokens [B, T], and the step.

    Raises:
        TransferError: Without prompts.
    """
    import torch

    if not prompts:
        raise TransferError("There are no prompts to score heads on.")
    for rows in by_length(prompts, GROUP):
        ids = torch.tensor([prompts[i].ids for i in rows], device=language.device)
        answers = torch.tensor([prompts[i].answer[0] for i in rows], device=language.device)
        yield rows, ids, last_step(language, ids, prefix(language, ids), answers, metric)


def attribution_patching(
    language: LanguageModel, prompts: list[Prompt], mean: Tensor, *, metric: Metric = "log_probability"
) -> np.ndarray:
    """First-order estimate of the indirect effects: ⟨z̄ - z(p̃), ∂m/∂z(p̃)⟩ on corrupted prompts (Nanda 2023).

    Good where z̄ is near z; softmax saturation and cancellation mislead it (AtP*, arXiv 2403.00745). Screen with it,
    then measure.

    Returns:
        float64 [prompts, layers, heads].
    """
    found = np.zeros((len(prompts), *shape_of(language)[:2]))
    for rows, _, step in steps(language, prompts, metric):
        change = mean.to(step.outputs.device, step.outputs.dtype) - step.outputs
        found[rows] = (change * step.gradient).sum(-1).double().cpu().numpy()
    return found


def gradient_activation(
    language: LanguageModel, prompts: list[Prompt], *, metric: Metric = "log_probability"
) -> np.ndarray:
    """⟨z, ∂m/∂z⟩ on clean prompts; needs no corrupted ones.

    Returns:
        float64 [prompts, layers, heads].
    """
    found = np.zeros((len(prompts), *shape_of(language)[:2]))
    for rows, _, step in steps(language, prompts, metric):
        found[rows] = (step.outputs * step.gradient).sum(-1).double().cpu().numpy()
    return found


def integrated_gradients(
    language: LanguageModel,
    prompts: list[Prompt],
    mean: Tensor,
    *,
    n_steps: int = 20,
    metric: Metric = "log_probability",
    later_heads: LaterHeads = "respond",
) -> np.ndarray:
    """Gradients along the straight path from the head outputs of corrupted prompts to the clean means.

    Sundararajan et al. 2017, with Gauss-Legendre nodes; all nodes of a prompt are rows of one decoding step. Scores of
    a prompt add up to m(end of the path) - m(p̃), up to the quadrature. With ``later_heads="respond"`` every head
    moves by its share of z̄ - z(p̃) on top of what earlier moves make of it, as heads do in the AIE; with ``"frozen"``
    all heads are set to points on the path, so that the end is exactly z̄ and only direct effects count.

    Returns:
        float64 [prompts, layers, heads].

    Raises:
        TransferError: Without prompts, or for fewer than two steps.
    """
    import torch

    if n_steps < 2:
        raise TransferError(f"Integrated gradients with {n_steps} steps is no integral.", "Use two or more.")
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    along, share = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    found = np.zeros((len(prompts), *shape_of(language)[:2]))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids], device=language.device)
        answers = torch.tensor(prompt.answer[:1], device=language.device)
        cache = prefix(language, ids)
        start = last_step(language, ids, copy.deepcopy(cache), answers, metric)
        change = mean.to(start.outputs.device, start.outputs.dtype) - start.outputs[0]
        cache.batch_repeat_interleave(n_steps)
        step = last_step(
            language,
            ids.expand(n_steps, -1),
            cache,
            answers.expand(n_steps),
            metric,
            shift=along.to(change.device, change.dtype)[:, None, None, None] * change,
            fixed=None if later_heads == "respond" else start.outputs.expand(n_steps, -1, -1, -1),
        )
        mixed = torch.einsum("s,slhd->lhd", share.to(change.device, change.dtype), step.gradient)
        found[i] = (change * mixed).sum(-1).double().cpu().numpy()
    return found

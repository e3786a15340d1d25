"""Attention-aware layer-wise relevance propagation (AttnLRP), optional and never a default.

Achtibat et al. 2024 (arXiv 2402.05602): relevance is activation × gradient under a backward pass with other rules,
computed here as in the efficient form of the method: RMS norms pass relevance as if their scale were a constant,
element-wise activations by their ratio of output to input, products share it equally among their factors.

Patent and licence: layer-wise relevance propagation is covered by patents, and its authors' library says that it is
free for personal and scientific use only. The code here is our own and under this project's licence, which grants no
right to those patents. Whoever uses it commercially must clear that; every other selector is free of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.attention import last_row, queries_read
from transfer.function_vectors.gradients import steps
from transfer.function_vectors.heads import shape_of
from transfer.function_vectors.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

SHARES = {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.5}
"""Of the gradient at what attention reads: half for each factor of weights × values, and of queries × keys again.

Scaling here rather than at the attention function is the same, for rotations and norms between are linear under the
rules, and it works with every attention implementation.
"""
TINY = 1e-10


def _weighted():
    """An autograd function that returns its first argument bit for bit and multiplies its gradient by the second."""
    import torch

    class Weighted(torch.autograd.Function):
        """(value, source, factor): the value forward; backward, gradient × factor to the source."""

        @staticmethod
        def forward(ctx: Any, value: Tensor, source: Tensor, factor: Tensor) -> Tensor:
            """The value as it is."""
            ctx.save_for_backward(factor)
            return value.detach().clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
            """The gradient times the factor, for the source."""
            (factor,) = ctx.saved_tensors
            return None, gradients[0] * factor, None

    return Weighted.apply


@contextlib.contextmanager
def lrp(language: LanguageModel) -> Iterator[None]:
    """Make gradients × activations of this one model relevances inside the block.

    Only hooks on the model's own modules are used, so outputs stay the same bit for bit, no other model and no class
    of torch or transformers is touched, and leaving the block, also by an error, undoes everything.

    Raises:
        TransferError: When the model lacks a part that a rule is for.
    """
    import torch

    rule: Any = _weighted()

    def weighted(value: Tensor, source: Tensor, factor: Tensor) -> Tensor:
        return rule(value, source, factor) if torch.is_grad_enabled() else value

    def norm(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        scale = torch.rsqrt(x.detach().float().pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return weighted(output, x, module.weight.detach() * scale.to(x.dtype))

    def activation(_module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].detach()
        # Denominators keep their sign; at zero the output is zero and so is the relevance.
        return weighted(output, args[0], output.detach() / torch.where(x.abs() < TINY, torch.full_like(x, TINY), x))

    def share(part: float) -> Any:
        return lambda _module, _args, output: weighted(output, output, torch.full_like(output[..., :1], part))

    def product(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (weighted(args[0], args[0], torch.full_like(args[0][..., :1], 0.5)), *args[1:])

    hooks = _places(language)
    handles: list[Any] = []
    try:
        for module in hooks["norm"]:
            handles.append(module.register_forward_hook(norm))
        for module in hooks["activation"]:
            handles.append(module.register_forward_hook(activation))
        for module in hooks["product"]:
            handles.append(module.register_forward_pre_hook(product))
        for name, part in SHARES.items():
            for module in hooks[name]:
                handles.append(module.register_forward_hook(share(part)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(language: LanguageModel) -> dict[str, list[Any]]:
    """The modules that each rule is for."""
    places: dict[str, list[Any]] = {name: [] for name in ("norm", "activation", "product", *SHARES)}
    family, layers = language.family, language.family.part(language.model, language.family.layers)
    wanted = {"activation": "mlp.act_fn", "product": "mlp.down_proj"}
    for number, layer in enumerate(layers):
        try:
            for rule, path in wanted.items():
                places[rule].append(layer.get_submodule(path))
            for name in SHARES:
                places[name].append(layer.get_submodule(f"{family.attention}.{name}"))
        except AttributeError as error:
            raise TransferError(
                f"Layer {number} of this {family.name} model has no rule for relevance ({error}).",
                "Use attribution patching, which needs none.",
            ) from None
    places["norm"] = [
        module
        for module in language.model.modules()
        if hasattr(module, "variance_epsilon") and hasattr(module, "weight")
    ]
    if len(places["norm"]) < 2 * len(layers) + 1:
        raise TransferError(
            f"{len(places['norm'])} RMS norms were found in {len(layers)} layers of this {family.name} model.",
            "Use attribution patching, which needs no rules.",
        )
    return places


def relevance(
    language: LanguageModel, prompts: list[Prompt], *, keys: str | None = None, max_rank: int = 5
) -> tuple[np.ndarray, int]:
    """Relevance of heads for the logit of the answer's first token (Pham et al. 2026, arXiv 2606.05079).

    With ``keys`` a head's score is Σ_{k in K} max(0, A[T, k] · G[T, k]) over a token set K, A the attention of the last
    token T and G its gradient under LRP, as in the paper, whose K are words listed by hand; here K is any token set by
    rule (``instruction``, ``all_but_bos``, ...). Without, it is ⟨z, G_z⟩, the same sum over all keys, not clamped.

    Args:
        language: The model.
        prompts: Clean prompts.
        keys: Name of a token set of the prompts.
        max_rank: Prompts whose answer ranks lower are left out, as in the paper.

    Returns:
        float64 [prompts, layers, heads], NaN for what was left out; and how many were.

    Raises:
        TransferError: When no prompt is left, or a prompt has no such token set.
    """
    import torch

    n_layers, n_heads, _ = shape_of(language)
    found = np.full((len(prompts), n_layers, n_heads), np.nan)
    if keys is not None:
        without = sum(keys not in p.sets or not len(p.sets[keys]) for p in prompts)
        if without:
            raise TransferError(f"{without} of {len(prompts)} prompts have no token set {keys!r}.")
    with lrp(language), queries_read(language) as queries:
        for rows, ids, step in steps(language, prompts, "logit"):
            if keys is None:
                scores = (step.outputs * step.gradient).sum(-1)
            else:
                # The prefix pass read queries too; the last ones are those of the last token.
                read = queries.rows[-n_layers:]
                scores = torch.stack(
                    [
                        _clamped(
                            language, layer, read[layer], step, ids.shape[1], [prompts[i].sets[keys] for i in rows]
                        )
                        for layer in range(n_layers)
                    ],
                    dim=1,
                )
            queries.rows.clear()
            answers = torch.tensor([prompts[i].answer[0] for i in rows], device=ids.device)
            rank = 1 + (step.logits > step.logits.gather(1, answers[:, None])).sum(1)
            kept = (rank <= max_rank).cpu().numpy()
            found[np.array(rows)[kept]] = scores.double().cpu().numpy()[kept]
    skipped = int(np.isnan(found[:, 0, 0]).sum())
    if skipped == len(prompts):
        raise TransferError(
            f"No answer of {skipped} prompts ranks among the first {max_rank}.",
            "Raise max_rank, or use a task that the model can do.",
        )
    return found, skipped


def _clamped(
    language: LanguageModel, layer: int, query: Tensor, step: Any, length: int, sets: list[np.ndarray]
) -> Tensor:
    """Σ_{k in K} max(0, A·∂A) of one layer's heads [B, heads]."""
    import torch

    weights, values = last_row(language, layer, query, step.cache, length)
    # z = Σ_k A_k v_k, so ∂A_k = ⟨v_k, ∂z⟩.
    each = weights * torch.einsum("bhtd,bhd->bht", values, step.gradient[:, layer].to(values.dtype))
    chosen = torch.zeros(len(sets), length, dtype=torch.bool, device=each.device)
    for row, positions in enumerate(sets):
        chosen[row, torch.from_numpy(positions).to(each.device)] = True
    return (each.clamp(min=0) * chosen[:, None]).sum(-1)

"""Layer and scale of a function vector, chosen on the validation split with the same number of tries for each mode."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.answers import answers, steering_with
from transfer.function_vectors.prompts import Prompt, Template, draft, usable
from transfer.function_vectors.steering import Mode, Plan
from transfer.function_vectors.tasks import Pair

if TYPE_CHECKING:
    from models.language import LanguageModel

SCALES = (0.5, 1.0, 2.0, 4.0)
MOST_LAYERS = 12
"""Layers tried when none are named; a deeper model is sampled evenly."""


@dataclass(frozen=True)
class Try:
    """One setting on the validation prompts."""

    plan: Plan
    top1: float
    nll: float
    """Mean over answers, nats."""


@dataclass(frozen=True)
class Tuning:
    """The chosen plan of each mode, and everything that was tried."""

    plans: dict[Mode, Plan]
    tries: tuple[Try, ...]
    n_prompts: int
    lost: dict[str, int]

    def table(self) -> list[dict[str, Any]]:
        """One row a try, for sweeps."""
        return [{**asdict(t.plan), "top1": t.top1, "nll": t.nll} for t in self.tries]


def zero_shot(
    language: LanguageModel, queries: tuple[Pair, ...], template: Template
) -> tuple[list[Prompt], dict[str, int]]:
    """The queries alone, and how many cannot be used, by reason."""
    return usable(language, [draft(template, query) for query in queries])


def grid(n_layers: int, layers: list[int] | None, scales: tuple[float, ...]) -> dict[Mode, list[Plan]]:
    """Settings of each mode, equally many: layers × scales, and for the distributed mode as many scales.

    Raises:
        TransferError: For scales that are not positive, or a layer that the model does not have.
    """
    if not scales or min(scales) <= 0:
        raise TransferError(f"Steering scales are {scales}.", "Use positive ones.")
    if layers is None:
        layers = sorted({round(x) for x in np.linspace(1, n_layers, min(n_layers, MOST_LAYERS))})
    wrong = [layer for layer in layers if not 0 <= layer <= n_layers]
    if wrong or not layers:
        raise TransferError(f"Steering layers are {layers}.", f"The model has 0 (embeddings) to {n_layers}.")
    finer = np.geomspace(min(scales), max(scales), len(layers) * len(scales))
    return {
        "aggregated": [Plan("aggregated", scale, layer) for layer in layers for scale in scales],
        "distributed": [Plan("distributed", float(scale)) for scale in dict.fromkeys(finer)],
    }


def tune(
    language: LanguageModel,
    deltas: np.ndarray,
    queries: tuple[Pair, ...],
    *,
    template: Template,
    layers: list[int] | None = None,
    scales: tuple[float, ...] = SCALES,
) -> Tuning:
    """Try every setting on zero-shot prompts of the validation split; best top-1, then lowest answer NLL.

    Args:
        language: The model.
        deltas: Residual deltas [layers, d_model].
        queries: Of the validation split.
        template: Spelling.
        layers: Canonical layers for the aggregated mode; up to ``MOST_LAYERS``, spread evenly, when left out.
        scales: Factors.
    """
    prompts, lost = zero_shot(language, queries, template)
    tries: list[Try] = []
    plans: dict[Mode, Plan] = {}
    for mode, settings in grid(language.n_layers, layers, scales).items():
        found = []
        for plan in settings:
            result = answers(language, prompts, steering_with(language, deltas, plan))
            found.append(Try(plan, float(np.mean(result.rank == 1)), float(result.nll.mean())))
        plans[mode] = max(found, key=lambda t: (t.top1, -t.nll)).plan
        tries += found
    return Tuning(plans, tuple(tries), len(prompts), lost)

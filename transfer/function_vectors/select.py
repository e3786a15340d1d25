"""Choosing heads: every selector over the same prompts, cheap ones checked by exact effects, and baselines."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np

from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.function_vectors.aie import indirect_effects
from transfer.function_vectors.gradients import attribution_patching, gradient_activation, integrated_gradients
from transfer.function_vectors.heads import mean_outputs, prefix, residual_deltas, shape_of
from transfer.function_vectors.instructions import instruction_prompts
from transfer.function_vectors.prompts import PromptSet, Template, icl_prompts
from transfer.function_vectors.scores import Head, HeadScores
from transfer.function_vectors.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel

Method = Literal["aie", "screened", "attribution", "gradient", "integrated", "lrp", "norm", "induction"]
METHODS: tuple[Method, ...] = get_args(Method)
Kind = Literal["icl", "instruction"]
SCREEN = 3
"""Heads measured exactly for each head finally kept."""


@dataclass(frozen=True)
class Recipe:
    """How prompts are made for means and for scores."""

    kind: Kind = "icl"
    shots: int = 10
    n_mean: int = 100
    """Clean prompts that head outputs are averaged over."""
    n_score: int = 25
    """Prompt pairs that heads are scored on."""
    seed: int = 0
    split_seed: int = 0
    template: Template = Template()

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """From what an artefact keeps of it."""
        return cls(**{**record, "template": Template(**record["template"])})


@dataclass(frozen=True, eq=False)
class TaskPrompts:
    """One task's prompts for one model, all from its training split, with the mean head outputs on the clean ones."""

    task: Task
    scoring: PromptSet
    mean: Tensor
    """float64 [layers, heads, width]."""
    n_mean: int
    lost: dict[str, int]
    recipe: Recipe


def prepare(language: LanguageModel, task: Task, recipe: Recipe) -> TaskPrompts:
    """Make a task's prompts and average head outputs.

    Raises:
        TransferError: When the task is too small, has no instructions where they are asked for, or no usable prompt.
    """
    train = task.split(recipe.split_seed)["train"]
    sets: list[PromptSet] = []
    for offset, n in ((0, recipe.n_mean), (1, recipe.n_score)):
        seed = 2 * recipe.seed + offset
        if recipe.kind == "icl":
            made = icl_prompts(language, train, train, shots=recipe.shots, n=n, seed=seed, template=recipe.template)
        else:
            if not task.instructions:
                raise TransferError(f"Task {task.name} has no instructions.", "Use the in-context prompts (icl).")
            each = -(-n // len(task.instructions))
            order = np.random.default_rng([seed, 13]).permutation(len(train))[:each]
            queries = tuple(train[i] for i in order)
            made = instruction_prompts(language, task.instructions, queries, seed=seed, template=recipe.template)
        sets.append(made)
    lost = Counter(sets[0].dropped) + Counter(sets[1].dropped)
    clean = sets[0].clean
    return TaskPrompts(task, sets[1], mean_outputs(language, clean), len(clean), dict(lost), recipe)


def select(
    language: LanguageModel,
    prompts: list[TaskPrompts],
    method: Method = "screened",
    *,
    k: int = 20,
    keys: str | None = None,
    n_steps: int = 20,
) -> HeadScores:
    """Score all heads on all tasks.

    Args:
        language: The model.
        prompts: What ``prepare`` made, one entry a task.
        method: ``aie`` (exact effects of all heads), ``screened`` (attribution patching names ``SCREEN * k``
            candidates, exact effects rank them), ``attribution``, ``gradient`` (gradient × activation), ``integrated``,
            ``lrp`` (see ``transfer.function_vectors.lrp`` for its patents), and the baselines ``norm`` (largest mean
            output, as it reaches the residual stream) and ``induction``.
        k: Heads finally kept, for ``screened``.
        keys: Token set whose keys count, for ``lrp``; all when left out.
        n_steps: Nodes of ``integrated``.

    Raises:
        TransferError: For an unknown method, or without tasks.
    """
    if method not in METHODS:
        raise TransferError(f"There is no selector {method!r}.", f"Use {', '.join(METHODS)}.")
    if not prompts:
        raise TransferError("There are no tasks to score heads on.")
    lost: Counter[str] = Counter()
    for entry in prompts:
        lost.update(entry.lost)
    parts: list[np.ndarray] = []
    with progress(f"heads {method}", len(prompts), "tasks") as advance:
        if method == "screened":
            n_layers, n_heads, _ = shape_of(language)
            rough = np.mean(
                [attribution_patching(language, t.scoring.corrupted, t.mean).mean(0) for t in prompts], axis=0
            )
            order = np.argsort(-rough.ravel(), kind="stable")[: min(SCREEN * k, n_layers * n_heads)]
            heads = [(int(i) // n_heads, int(i) % n_heads) for i in order]
            for t in prompts:
                parts.append(indirect_effects(language, t.scoring.corrupted, t.mean, heads=heads))
                advance(1)
        else:
            for t in prompts:
                scores, skipped = _scored(language, t, method, keys, n_steps)
                lost["answer_ranks_low"] += skipped
                parts.append(scores)
                advance(1)
    each, spread, counts = zip(*(_summed(part) for part in parts), strict=True)
    unchanged = {t.task.name: t.scoring.unchanged for t in prompts}
    lost.update({f"file_entry_{reason}": n for t in prompts for reason, n in t.task.dropped.items()})
    settings = {
        "unchanged": unchanged,
        "recipe": asdict(prompts[0].recipe),
        "keys": keys,
        "k": k if method == "screened" else None,
    }
    return HeadScores(
        model=language.ref,
        model_hash=language.hash,
        method=method,
        tasks=tuple(t.task.name for t in prompts),
        each=np.stack(each),
        spread=np.stack(spread),
        n_prompts=tuple(counts),
        lost={reason: n for reason, n in sorted(lost.items()) if n},
        settings={**settings, "n_steps": n_steps if method == "integrated" else None},
    )


def _scored(
    language: LanguageModel, t: TaskPrompts, method: Method, keys: str | None, n_steps: int
) -> tuple[np.ndarray, int]:
    """[prompts, layers, heads], and how many prompts were left out."""
    clean, corrupted = t.scoring.clean, t.scoring.corrupted
    if method == "aie":
        return indirect_effects(language, corrupted, t.mean), 0
    if method == "attribution":
        return attribution_patching(language, corrupted, t.mean), 0
    if method == "gradient":
        return gradient_activation(language, clean), 0
    if method == "integrated":
        return integrated_gradients(language, corrupted, t.mean, n_steps=n_steps), 0
    if method == "lrp":
        from transfer.function_vectors.lrp import relevance

        return relevance(language, clean, keys=keys)
    if method == "norm":
        return output_norms(language, t.mean)[None], 0
    return induction_scores(language, seed=t.recipe.seed), 0


def _summed(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and standard error over the prompts that were scored, and their number."""
    kept = scores[np.isfinite(scores).reshape(len(scores), -1).any(axis=1)]
    error = kept.std(axis=0, ddof=1) / np.sqrt(len(kept)) if len(kept) > 1 else np.full(kept.shape[1:], np.nan)
    return kept.mean(axis=0), error, len(kept)


def output_norms(language: LanguageModel, mean: Tensor) -> np.ndarray:
    """Length of what each head's mean output adds to the residual stream, float64 [layers, heads]."""
    import torch

    n_layers, n_heads, _ = shape_of(language)
    found = np.zeros((n_layers, n_heads))
    for head in range(n_heads):
        alone = torch.zeros_like(mean)
        alone[:, head] = mean[:, head]
        found[:, head] = residual_deltas(language, alone).norm(dim=-1).double().numpy()
    return found


def induction_scores(language: LanguageModel, *, n: int = 16, period: int = 24, seed: int = 0) -> np.ndarray:
    """Attention from a repeated token to the one that followed it before (Olsson et al. 2022).

    Random tokens stand twice in a row, the second time up to a random place; an induction head looks from there to the
    token after the same place in the first run.

    Returns:
        float64 [sequences, layers, heads], between 0 and 1.
    """
    import torch

    from transfer.function_vectors.attention import last_row, queries_read

    rng = np.random.default_rng([seed, 14])
    ordinary = np.array(sorted(language.vocabulary().values()))
    ordinary = ordinary[ordinary < language.model.config.vocab_size]
    n_layers, n_heads, _ = shape_of(language)
    lead = language.renderer.plain(["a"])[0]
    lead = [token for token in lead if token in language.renderer.bytes.special]
    found = np.zeros((n, n_layers, n_heads))
    for i in range(n):
        run = rng.choice(ordinary, size=period, replace=len(ordinary) < period).tolist()
        place = int(rng.integers(0, period - 1))
        ids = torch.tensor([[*lead, *run, *run[: place + 1]]], device=language.device)
        cache = prefix(language, ids)
        with torch.inference_mode(), queries_read(language) as queries:
            language.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            for layer in range(n_layers):
                row, _ = last_row(language, layer, queries.rows[layer], cache, ids.shape[1])
                found[i, layer] = row[0, :, len(lead) + place + 1].double().cpu().numpy()
    return found


def random_like(heads: tuple[Head, ...], n_heads: int, seed: int) -> tuple[Head, ...]:
    """As many random heads in each layer as ``heads`` has there, others than those as far as a layer has others."""
    rng = np.random.default_rng([seed, 15])
    drawn: list[Head] = []
    for layer, n in sorted(Counter(head.layer for head in heads).items()):
        taken = {head.head for head in heads if head.layer == layer}
        order = rng.permutation(n_heads).tolist()
        order.sort(key=lambda head: head in taken)  # stable: the random order stays within each part
        drawn += [Head(layer, head, float("nan")) for head in order[:n]]
    return tuple(drawn)

"""What a function vector does on the test split, against ceilings and controls, with intervals over seeds and items."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.stats import bootstrap_counts
from transfer.function_vectors.answers import Answers, Steer, answers, divergence, steering_with
from transfer.function_vectors.heads import residual_deltas, shape_of
from transfer.function_vectors.prompts import Prompt, Template, draft, icl_prompts, usable
from transfer.function_vectors.select import Recipe, TaskPrompts, prepare, random_like
from transfer.function_vectors.tasks import Task
from transfer.function_vectors.tuning import Tuning, zero_shot
from transfer.function_vectors.vectors import FunctionVector, build, random_deltas, shuffled_heads

if TYPE_CHECKING:
    from models.language import LanguageModel

METRICS = ("top1", "top3", "top5", "mean_rank", "first_nll", "nll")
CLEAN, SHUFFLED, ZERO, ASKED = "clean_icl", "shuffled_icl", "zero_shot", "instruction"


@dataclass(frozen=True)
class Estimate:
    """One number of one condition; the interval covers new seeds and new items of the same task."""

    condition: str
    metric: str
    items: str
    """``all``, or ``filtered``: only where the clean in-context prompt is answered right."""
    value: float
    low: float
    high: float
    n_items: int
    """Items that count, summed over seeds."""
    delta: float
    """Against the same prompts without steering, or against zero-shot; 0 for zero-shot itself."""
    delta_low: float
    delta_high: float


@dataclass(frozen=True, eq=False)
class FVEvaluation:
    """All conditions of one task in one model."""

    model: str
    task: str
    vector: str
    seeds: tuple[int, ...]
    plans: dict[str, dict[str, Any]]
    tried: dict[str, int]
    """Validation settings tried, by mode."""
    estimates: tuple[Estimate, ...]
    side_effects: dict[str, dict[str, float]]
    """By mode: mean KL on unrelated texts with its interval, nats."""
    n_test: int
    lost: dict[str, int] = field(default_factory=dict)
    """Test items that some condition could not use, and prompts by reason."""
    missing: dict[str, str] = field(default_factory=dict)
    """Conditions that were not run, and why."""

    def get(self, condition: str, metric: str = "top1", items: str = "all") -> Estimate:
        """One number.

        Raises:
            TransferError: When it was not measured.
        """
        for estimate in self.estimates:
            if (estimate.condition, estimate.metric, estimate.items) == (condition, metric, items):
                return estimate
        raise TransferError(f"{condition} was not measured by {metric} on {items} items of {self.task}.")

    def record(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One function vector, its head outputs averaged over other prompts for each seed."""

    seeds: tuple[int, ...]
    vectors: tuple[FunctionVector, ...]
    prompts: tuple[TaskPrompts, ...]

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 3:
            raise TransferError(f"{len(set(self.seeds))} seeds give no interval over seeds.", "Use three or more.")


def draw(language: LanguageModel, task: Task, vector: FunctionVector, seeds: tuple[int, ...] = (0, 1, 2)) -> Drawn:
    """Average the outputs of the vector's heads anew for each seed; the layers and scales are not chosen anew.

    Raises:
        TransferError: With fewer than three seeds, or for a vector of another model.
    """
    vector.check(language)
    recipe = Recipe.of(vector.recipe)
    prompts = tuple(prepare(language, task, replace(recipe, seed=recipe.seed + seed, n_score=1)) for seed in seeds)
    vectors = tuple(build(language, entry, vector.heads, method=vector.method) for entry in prompts)
    return Drawn(tuple(seeds), vectors, prompts)


def evaluate(
    language: LanguageModel,
    task: Task,
    drawn: Drawn,
    tuning: Tuning,
    *,
    wrong: FunctionVector | None = None,
    n: int | None = None,
    texts: list[str] | None = None,
    draws: int = 1000,
) -> FVEvaluation:
    """Zero-shot, shuffled and clean in-context prompts and instructions, with and without the vector in both modes.

    Layers and scales come from ``tuning`` for the vector and for all controls. Seeds decide the prompts that
    outputs are averaged over, demonstrations, shuffles, instructions and random controls; heads and items stay.

    Args:
        language: The model.
        task: Whose test split is asked.
        drawn: The vector of this task and model, averaged anew for each seed.
        tuning: Plans chosen on the validation split.
        wrong: A vector of another task, with the same heads, as a control.
        n: Test items at most; all when left out.
        texts: Unrelated texts for side effects; none are measured without.
        draws: Of the bootstrap.

    Raises:
        TransferError: For a vector of another model or task, when no item can be used in
            all conditions, or when steering leaves every likelihood as it was.
    """
    vector = drawn.vectors[0]
    vector.check(language)
    if vector.task_hash != task.hash:
        raise TransferError(f"The function vector is of task {vector.task}, evaluated is {task.name} (or other pairs).")
    if wrong is not None and wrong.task_hash == task.hash:
        raise TransferError(f"The wrong-task control of {task.name} is of the same task.")
    recipe = drawn.prompts[0].recipe
    parts = task.split(recipe.split_seed)
    queries = parts["test"][: n or None]
    missing = {} if task.instructions else {ASKED: "the task has no instructions"}
    if wrong is None:
        missing["wrong_task"] = "no vector of another task was given"
    lost: dict[str, int] = {}
    runs: list[dict[str, tuple[list[Prompt], Answers]]] = []
    with progress("function vector", len(drawn.seeds), "seeds") as advance:
        for seed, one, prompts in zip(drawn.seeds, drawn.vectors, drawn.prompts, strict=True):
            asked = _prompts(language, task, parts["train"], queries, recipe.shots, seed, recipe.template, lost)
            steers = _steers(language, one, tuning, prompts, wrong, seed)
            runs.append(_run(language, asked, steers))
            advance(1)
    items = [q.input for q in queries if all(q.input in {p.item for p in found[0]} for found in _all(runs))]
    if not items:
        raise TransferError(f"No test item of {task.name} can be used in all conditions ({lost}).")
    if len(items) < len(queries):
        lost["item_unusable_somewhere"] = len(queries) - len(items)
    tables = {name: _table([run[name] for run in runs], items) for name in runs[0]}
    for mode in tuning.plans:
        same = np.array_equal(tables[f"{ZERO}+{mode}"]["first_nll"], tables[ZERO]["first_nll"])
        if same:
            raise TransferError(f"Steering ({mode}) changed no likelihood at all.", "The vector reaches no output.")
    return FVEvaluation(
        model=language.ref,
        task=task.name,
        vector=vector.id,
        seeds=drawn.seeds,
        plans={mode: asdict(plan) for mode, plan in tuning.plans.items()},
        tried={mode: sum(t.plan.mode == mode for t in tuning.tries) for mode in tuning.plans},
        estimates=tuple(_estimates(tables, draws)),
        side_effects=_side_effects(language, vector, tuning, texts or []),
        n_test=len(items),
        lost=lost,
        missing=missing,
    )


def _prompts(
    language: LanguageModel,
    task: Task,
    train: Any,
    queries: Any,
    shots: int,
    seed: int,
    template: Template,
    lost: dict[str, int],
) -> dict[str, list[Prompt]]:
    """Unsteered conditions → prompts."""
    alone, dropped = zero_shot(language, queries, template)
    shown = icl_prompts(language, train, queries, shots=shots, seed=1000 + seed, template=template)
    found = {ZERO: alone, SHUFFLED: shown.corrupted, CLEAN: shown.clean}
    if task.instructions:
        words = task.instructions[seed % len(task.instructions)]
        found[ASKED], without = usable(language, [draft(template, query, instruction=words) for query in queries])
        _count(lost, without)
    _count(lost, dropped)
    _count(lost, shown.dropped)
    return found


def _count(total: dict[str, int], more: dict[str, int]) -> None:
    for reason, n in more.items():
        total[reason] = total.get(reason, 0) + n


def _steers(
    language: LanguageModel,
    vector: FunctionVector,
    tuning: Tuning,
    prompts: TaskPrompts,
    wrong: FunctionVector | None,
    seed: int,
) -> dict[str, Steer]:
    """Steering by name of mode, and of mode and control."""
    import torch

    others = random_like(vector.heads, shape_of(language)[1], seed)
    placed = torch.zeros_like(prompts.mean)
    for head in others:
        placed[head.layer, head.head] = prompts.mean[head.layer, head.head]
    arms: dict[str, np.ndarray | None] = {
        "": vector.deltas,
        "wrong_task": None if wrong is None else wrong.deltas,
        "random_vector": random_deltas(vector, seed),
        "random_heads": residual_deltas(language, placed).numpy(),
        "shuffled_heads": shuffled_heads(language, vector, seed),
    }
    found: dict[str, Steer] = {}
    for mode, plan in tuning.plans.items():
        for arm, deltas in arms.items():
            if deltas is not None:
                found[f"{mode}/{arm}" if arm else mode] = steering_with(language, deltas, plan)
    return found


def _run(
    language: LanguageModel, asked: dict[str, list[Prompt]], steers: dict[str, Steer]
) -> dict[str, tuple[list[Prompt], Answers]]:
    """Conditions → prompts and answers. Controls are run zero-shot only, where the vector has everything to add."""
    found = {name: (prompts, answers(language, prompts)) for name, prompts in asked.items()}
    for name, steer in steers.items():
        for where in (ZERO,) if "/" in name else (ZERO, SHUFFLED):
            found[f"{where}+{name}"] = (asked[where], answers(language, asked[where], steer))
    return found


def _all(runs: list[dict[str, tuple[list[Prompt], Answers]]]) -> list[tuple[list[Prompt], Answers]]:
    return [found for run in runs for found in run.values()]


def _table(found: list[tuple[list[Prompt], Answers]], items: list[str]) -> dict[str, np.ndarray]:
    """Metric → values [seeds, items]."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for prompts, result in found:
        where = {prompt.item: i for i, prompt in enumerate(prompts)}
        at = np.array([where[item] for item in items])
        for k in (1, 3, 5):
            rows[f"top{k}"].append((result.rank[at] <= k).astype(np.float64))
        rows["mean_rank"].append(result.rank[at].astype(np.float64))
        rows["first_nll"].append(result.first_nll[at])
        rows["nll"].append(result.nll[at])
    return {name: np.stack(values) for name, values in rows.items()}


def _reference(condition: str) -> str:
    return condition.split("+")[0] if "+" in condition else ZERO


def _estimates(tables: dict[str, dict[str, np.ndarray]], draws: int) -> list[Estimate]:
    right = tables[CLEAN]["top1"]
    found: list[Estimate] = []
    for items, mask in (("all", np.ones_like(right)), ("filtered", right)):
        for condition, table in tables.items():
            for metric, values in table.items():
                value = seed_item_interval(values, mask, draws=draws)
                change = seed_item_interval(values - tables[_reference(condition)][metric], mask, draws=draws)
                found.append(Estimate(condition, metric, items, *value, int(mask.sum()), *change))
    return found


def seed_item_interval(
    values: np.ndarray, mask: np.ndarray, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over seeds and items with its interval; seeds and items are drawn anew together (percentile bootstrap).

    Args:
        values: [seeds, items].
        mask: 1 where a value counts, 0 where not [seeds, items].
        level: Coverage.
        draws: Bootstrap draws.
        seed: Of the draws.

    Returns:
        Value, low, high; NaN where nothing counts, or where nothing counts in half of the draws.
    """
    if not mask.sum():
        return float("nan"), float("nan"), float("nan")
    kept = np.where(mask > 0, values, 0.0)
    rng = np.random.default_rng([seed, 2])
    means_by_block: list[np.ndarray] = []
    for counts in bootstrap_counts(values.shape[1], draws, seed):
        top, below = kept @ counts, mask @ counts
        picked = rng.integers(len(values), size=top.shape)
        top, below = (np.take_along_axis(side, picked, axis=0).sum(0) for side in (top, below))
        means_by_block.append(top[below > 0] / below[below > 0])
    means = np.concatenate(means_by_block)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if len(means) > draws / 2 else (np.nan, np.nan)
    return float(kept.sum() / mask.sum()), float(low), float(high)


def _side_effects(
    language: LanguageModel, vector: FunctionVector, tuning: Tuning, texts: list[str]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for mode, plan in tuning.plans.items() if texts else ():
        nats = divergence(language, texts, steering_with(language, vector.deltas, plan))
        value, low, high = seed_item_interval(nats[None], np.ones((1, len(nats))))
        found[mode] = {"kl": value, "low": low, "high": high, "n_texts": float(len(nats))}
    return found

"""Reward modelling: how often a trained reward prefers the chosen answer, overall and by section."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.files import replacing
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.stats import WeightedMetric
from transfer.tasks.base import Examples
from transfer.tasks.preferences import REWARD_BENCH, Pair, load_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transfer.finetune import Recipe


class Rewarder(Protocol):
    """A reward model as this task sees it."""

    seen: frozenset[str]
    template: str

    def rewards(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, int]:
        """Rewards of both answers, float64 [pairs, 2], and how many pairs were cut."""
        ...


@dataclass(frozen=True)
class Reward:
    """Bradley-Terry rewards judged by pair accuracy; an equal reward counts one half."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each subset within its section; by default RewardBench's for its subsets, else how many pairs."""
    name: str = field(default="reward", init=False)
    metrics: tuple[str, ...] = field(default=("accuracy", "section_mean"), init=False)

    def load(self, ref: str) -> Examples[Pair]:
        """See ``transfer.tasks.preferences.load_pairs``."""
        return load_pairs(ref)

    def examples(self, corpus: Examples[Pair]) -> list[Pair]:
        """Every pair."""
        return list(corpus.rows)

    def fit(
        self, base: Any, examples: list[Pair], recipe: Recipe, seed: int, out: Path | None = None
    ) -> tuple[Any, FinetuneRun]:
        """Train a reward model; see ``transfer.tasks.reward_model.train_reward``."""
        from transfer.tasks.reward_model import train_reward

        return train_reward(base, examples, recipe, seed, out)

    def restore(self, base: Any, folder: Path) -> Any:
        """See ``transfer.tasks.reward_model.load_reward``."""
        from transfer.tasks.reward_model import load_reward

        return load_reward(base, folder)

    def evaluate(self, model: Rewarder, corpus: Examples[Pair], out_file: Path) -> list[EvalResult]:
        """Pair accuracy over all pairs, the mean of the sections, and each section.

        A section is the weighted mean of its subsets, the mean over sections counts each once (as RewardBench has it);
        without sections both are the plain accuracy. Standard errors are binomial within subsets, for other pairs of
        the same kind. ``out_file`` gets one JSON line a pair with both rewards; ``score`` is their difference.

        Raises:
            TransferError: When a pair was trained on, no pair is left, or a reward is not finite.
        """
        pairs = list(corpus.rows)
        known = [pair for pair in pairs if pair.key in model.seen]
        if known or not pairs:
            raise TransferError(
                f"{len(known)} of {len(pairs)} evaluation pairs of {corpus.name} were trained on"
                f"{f', first {known[0].id}' if known else ''}.",
                "Split the pairs before training.",
            )
        rewards, n_truncated = model.rewards(pairs)
        if rewards.shape != (len(pairs), 2) or not np.all(np.isfinite(rewards)):
            raise TransferError(f"Some rewards of {corpus.name} are not finite.", "Lower the learning rate.")
        margin = rewards[:, 0] - rewards[:, 1]
        won = np.where(margin == 0, 0.5, margin > 0)
        with replacing(out_file) as part, part.open("w", encoding="utf8") as lines:
            for pair, (chosen, rejected) in zip(pairs, rewards, strict=True):
                row = {"id": pair.id, "section": pair.section, "subset": pair.subset, "label": 1}
                both = {"chosen": float(chosen), "rejected": float(rejected), "score": float(chosen - rejected)}
                lines.write(json.dumps(row | both) + "\n")
        extra = {
            "n_truncated": float(n_truncated),
            "n_ties": float((margin == 0).sum()),
            "n_left_out": float(sum(corpus.left_out.values())),
            "loss": float(np.mean(np.logaddexp(0, -margin))),
            "mean_margin": float(margin.mean()),
        }

        def result(metric: str, value: float, error: float, n: int) -> EvalResult:
            return EvalResult(self.name, metric, value, error, n, 0, out_file.name, extra, model.template)

        by_section = self._sections(pairs, won)
        mean = float(np.mean([value for value, _, _ in by_section.values()]))
        error = float(np.sqrt(sum(e**2 for _, e, _ in by_section.values())) / len(by_section))
        found = [result("accuracy", *_mean(won), len(pairs)), result("section_mean", mean, error, len(pairs))]
        if set(by_section) != {""}:
            found += [result(f"accuracy@{name}", *numbers) for name, numbers in by_section.items()]
        return found

    def _sections(self, pairs: list[Pair], won: np.ndarray) -> dict[str, tuple[float, float, int]]:
        """Accuracy, standard error and pairs of each section."""
        subsets: dict[str, dict[str, list[float]]] = {}
        for pair, hit in zip(pairs, won, strict=True):
            subsets.setdefault(pair.section, {}).setdefault(pair.subset, []).append(float(hit))
        found = {}
        for section, parts in sorted(subsets.items()):
            weights = np.array([self._weight(name, len(hits)) for name, hits in parts.items()], dtype=float)
            if not weights.sum() > 0 or weights.min() < 0:
                raise TransferError(f"The subsets of section {section!r} have no positive weight.")
            numbers = np.array([_mean(np.array(hits)) for hits in parts.values()])
            share = weights / weights.sum()
            error = float(np.sqrt(np.sum((share * numbers[:, 1]) ** 2)))
            found[section] = float(share @ numbers[:, 0]), error, sum(map(len, parts.values()))
        return found

    def _weight(self, subset: str, n: int) -> float:
        if self.weights:
            if subset not in self.weights:
                raise TransferError(f"Subset {subset!r} has no weight.", "Give one for each, or none at all.")
            return float(self.weights[subset])
        return float(REWARD_BENCH[subset][1]) if subset in REWARD_BENCH else float(n)

    def weighted(self, metric: str) -> WeightedMetric | None:
        """Pair accuracy under example weights; sections have no such form."""
        return weighted_accuracy if metric == "accuracy" else None


def _mean(hits: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = float(hits.mean())
    return mean, float(np.sqrt(max(float(np.mean(hits**2)) - mean**2, 0.0) / len(hits)))


def weighted_accuracy(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of positive margins (half of the zero ones) for each column of pair weights [n, draws]."""
    del labels  # every pair has the same one: what was chosen stands first
    return np.where(scores == 0, 0.5, scores > 0) @ counts / counts.sum(axis=0)

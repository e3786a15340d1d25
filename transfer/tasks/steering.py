"""Behaviour steering (CAA, Rimsky et al. 2024): does an added vector make a model choose the behaviour?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.files import replacing
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.stats import WeightedMetric
from transfer.tasks.base import Examples
from transfer.tasks.choices import Choice, load_choices

if TYPE_CHECKING:
    from transfer.finetune import Recipe
    from transfer.tasks.steering_vector import Steered

NEUTRAL = (
    "The train to the coast leaves at half past nine and stops in every village on the way.",
    "To make the soup, chop two onions and a carrot, and let them soften in butter over low heat.",
    "Our library is open on weekdays until eight, and on Saturday mornings for children.",
    "A square has four equal sides, so its area is the length of one side times itself.",
    "She planted tomatoes along the wall, where the stones keep the warmth of the day.",
    "The second chapter explains how to fold the paper and where to place the first cut.",
    "In winter the lake freezes, and the ferry is replaced by a path marked with branches.",
    "Please send the parts by Friday; the invoice goes to the office in the main street.",
    "He learned to play the accordion from an uncle who repaired instruments for a living.",
    "Rain is expected in the north, while the south stays dry with light winds from the west.",
    "The museum shows maps of the old harbour, drawn before the new bridge was built.",
    "Write the date at the top of the page, then list what you bought and what it cost.",
)
"""Texts that no behaviour is about: what steering does to them is a side effect."""


@dataclass(frozen=True)
class Steering:
    """A vector found on some questions, judged on others; multiplier +1 pushes to the matching answer."""

    layers: tuple[int, ...] = ()
    """Candidate layers; all below the last when empty. The best on a validation part of the questions is taken."""
    validation: float = 0.2
    """Share of the training questions that chooses the layer."""
    both: bool = True
    """Make the vector from both orders of the answers, so that what the letters differ in cancels."""
    length: float = 0.0
    """Norm of the vector in median norms of the residual stream; 0 leaves it as found."""
    multipliers: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    matching: str = ""
    """What the matching answer does; see ``transfer.tasks.steering_vector.BEHAVIOURS`` for the CAA sets."""
    neutral: tuple[str, ...] = NEUTRAL
    """Texts on which side effects are measured."""
    knowledge: str = ""
    """File of questions with a right answer, for the other side effect; see ``load_choices``."""
    name: str = field(default="steering", init=False)
    metrics: tuple[str, ...] = field(default=("scr", "log_odds_shift"), init=False)

    def __post_init__(self) -> None:
        for name in ("layers", "multipliers", "neutral"):  # lists, where a configuration gives them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not {-1.0, 1.0} <= set(self.multipliers):
            raise TransferError("The Steering Control Rate compares the multipliers -1 and 1.", "Add both.")

    def load(self, ref: str) -> Examples[Choice]:
        """See ``transfer.tasks.choices.load_choices``."""
        return load_choices(ref)

    def examples(self, corpus: Examples[Choice]) -> list[Choice]:
        """Every question."""
        return list(corpus.rows)

    def fit(
        self, base: Any, examples: list[Choice], recipe: Recipe, seed: int, out: Path | None = None
    ) -> tuple[Steered, FinetuneRun]:
        """Find the vector; of the recipe only the name is kept, since no weight is trained."""
        from transfer.tasks.steering_vector import find_vector

        steered, run = find_vector(
            base,
            examples,
            layers=self.layers,
            validation=self.validation,
            both=self.both,
            length=self.length,
            seed=seed,
            matching=self.matching,
            recipe=recipe.name,
        )
        if out is not None:
            steered.save(out)
        return steered, run

    def restore(self, base: Any, folder: Path) -> Steered:
        """See ``transfer.tasks.steering_vector.Steered.load``."""
        from models.language import kept_language
        from transfer.tasks.steering_vector import Steered

        return Steered.load(kept_language(base) if isinstance(base, str) else base, folder)

    def evaluate(self, model: Steered, corpus: Examples[Choice], out_file: Path) -> list[EvalResult]:
        """Steering Control Rate and its parts, then the side effects.

        A question counts as answered where the matching letter is the likelier one in both orders (robust accuracy);
        the control rate is that at +1 minus that at −1, per question, so its standard error is that of a paired
        difference. ``robust_accuracy@m`` and ``accuracy@m`` follow for every multiplier, ``kl@m`` and
        ``nll_change@m`` (nats a token and nats a byte, on neutral texts), and ``knowledge@m`` where a file is named.
        ``out_file`` gets one JSON line a question with its log odds.

        Raises:
            TransferError: When a question made the vector or chose its layer, or a log odds is not finite.
        """
        from transfer.tasks.side_effects import drift
        from transfer.tasks.steering_vector import ask, control, log_odds

        choices = list(corpus.rows)
        known = [c for c in choices if c.key in model.seen]
        if known or not choices:
            raise TransferError(
                f"{len(known)} of {len(choices)} evaluation questions of {corpus.name} were used to find the vector"
                f"{f', first {known[0].id}' if known else ''}.",
                "Split the questions first.",
            )
        asked = ask(model.language, choices)
        odds = {m: log_odds(model.language, asked, model.layer, m * model.vector) for m in self.multipliers}
        if not all(np.all(np.isfinite(o)) for o in odds.values()):
            raise TransferError(f"Some log odds of {corpus.name} are not finite.", "Shorten the vector.")
        change = control(odds[1.0], odds[-1.0])
        shift = (odds[1.0] - odds[-1.0]).mean(axis=1)
        with replacing(out_file) as part, part.open("w", encoding="utf8") as lines:
            for i, choice in enumerate(choices):
                row = {"id": choice.id, "label": 1, "score": float(change[i]), "matching": choice.matching}
                row["log_odds"] = {f"{m:g}": odds[m][i].tolist() for m in self.multipliers}
                lines.write(json.dumps(row) + "\n")
        extra = {
            "layer": float(model.layer),
            "vector_norm": float(model.vector.norm()),
            "n_left_out": float(sum(corpus.left_out.values())),
            **{f"validation_scr@{layer}": scr for layer, (scr, _) in model.scores.items()},
        }

        def result(metric: str, values: np.ndarray) -> EvalResult:
            error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            mean = float(values.mean())
            return EvalResult(self.name, metric, mean, error, len(values), 0, out_file.name, extra, model.template)

        found = [result("scr", change), result("log_odds_shift", shift)]
        for m in self.multipliers:
            found.append(result(f"robust_accuracy@{m:g}", (odds[m] > 0).all(axis=1).astype(float)))
            found.append(result(f"accuracy@{m:g}", (odds[m] > 0).mean(axis=1)))
        for m in self.multipliers:
            if m and self.neutral:
                kl, nll = drift(model.language, list(self.neutral), model.layer, m * model.vector)
                found += [result(f"kl@{m:g}", kl), result(f"nll_change@{m:g}", nll)]
        if self.knowledge:
            questions = ask(model.language, load_choices(self.knowledge).rows)
            for m in self.multipliers:
                right = log_odds(model.language, questions, model.layer, m * model.vector) > 0
                found.append(result(f"knowledge@{m:g}", right.mean(axis=1)))
        return found

    def weighted(self, metric: str) -> WeightedMetric | None:
        """The control rate under example weights."""
        return weighted_score if metric == "scr" else None


def weighted_score(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of the scores for each column of example weights [n, draws]."""
    del labels  # every question has the same one
    return scores @ counts / counts.sum(axis=0)

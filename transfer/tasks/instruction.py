"""Instruction following: how likely held-out answers become, and how many checkable instructions are followed."""

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
from transfer.tasks.demonstrations import Demonstration, load_demonstrations
from transfer.tasks.ifeval import check_all, load_ifeval

if TYPE_CHECKING:
    from transfer.finetune import Recipe
    from transfer.tasks.sft import Tuned


@dataclass(frozen=True)
class Instruction:
    """Supervised fine-tuning judged on held-out answers and, where a file is named, on IFEval.

    Win rates need a judge: see ``transfer eval answers``.
    """

    ifeval: str = ""
    """File of IFEval prompts; empty leaves them out."""
    max_new_tokens: int = 512
    """Longest answer to an IFEval prompt."""
    name: str = field(default="instruction", init=False)
    metrics: tuple[str, ...] = field(default=("log_likelihood",), init=False)

    def load(self, ref: str) -> Examples[Demonstration]:
        """See ``transfer.tasks.demonstrations.load_demonstrations``."""
        return load_demonstrations(ref)

    def examples(self, corpus: Examples[Demonstration]) -> list[Demonstration]:
        """Every demonstration."""
        return list(corpus.rows)

    def fit(
        self, base: Any, examples: list[Demonstration], recipe: Recipe, seed: int, out: Path | None = None
    ) -> tuple[Tuned, FinetuneRun]:
        """Fine-tune; see ``transfer.tasks.sft.train_sft``."""
        from transfer.tasks.sft import train_sft

        return train_sft(base, examples, recipe, seed, out)

    def restore(self, base: Any, folder: Path) -> Tuned:
        """See ``transfer.tasks.sft.load_sft``."""
        from transfer.tasks.sft import load_sft

        return load_sft(base, folder)

    def evaluate(self, model: Tuned, corpus: Examples[Demonstration], out_file: Path) -> list[EvalResult]:
        """``log_likelihood`` of held-out answers in nats a byte (higher is better), and IFEval accuracies.

        The likelihood is a ratio of sums over answers, its standard error that of a ratio estimator (Cochran 1977,
        Sec. 6.4); ``extra`` holds the loss (its negative) with a 95 % interval. ``ifeval_prompt_*`` and
        ``ifeval_instruction_*`` come strict and loose: prompts count where all of their instructions can be checked,
        instructions each, with an error that takes the prompt as the unit. ``out_file`` gets one JSON line an answer
        and one a checked prompt.

        Raises:
            TransferError: When a demonstration's question was trained on, or a likelihood is not finite.
        """
        shown = list(corpus.rows)
        known = [d for d in shown if d.key in model.seen]
        if known or not shown:
            raise TransferError(
                f"{len(known)} of {len(shown)} questions of {corpus.name} were trained on"
                f"{f', first {known[0].id}' if known else ''}.",
                "Split the demonstrations before training.",
            )
        loss = model.answer_loss(shown)
        if not np.all(np.isfinite(loss.nats)):
            raise TransferError(f"Some likelihoods of {corpus.name} are not finite.", "Lower the learning rate.")
        rows: list[dict[str, Any]] = [
            {"id": d.id, "label": int(size), "score": -float(nats)}
            for d, nats, size in zip(shown, loss.nats, loss.n_bytes, strict=True)
        ]
        value, error = _ratio(-loss.nats, loss.n_bytes.astype(float))
        extra = {
            "nll_per_byte": -value,
            "nll_low": -value - 1.96 * error,
            "nll_high": -value + 1.96 * error,
            "bits_per_byte": -value / float(np.log(2)),
            "n_bytes": float(loss.n_bytes.sum()),
            "n_truncated": float(loss.n_truncated),
            "n_left_out": float(sum(corpus.left_out.values())),
        }
        found = [("log_likelihood", value, error, len(shown), extra)]
        if self.ifeval:
            checked, more = self._ifeval(model)
            rows += checked
            found += more
        with replacing(out_file) as part, part.open("w", encoding="utf8") as lines:
            for row in rows:
                lines.write(json.dumps(row) + "\n")
        return [
            EvalResult(self.name, metric, value, error, n, 0, out_file.name, numbers, model.template)
            for metric, value, error, n, numbers in found
        ]

    def _ifeval(
        self, model: Tuned
    ) -> tuple[list[dict[str, Any]], list[tuple[str, float, float, int, dict[str, float]]]]:
        prompts = list(load_ifeval(self.ifeval).rows)
        responses, n_without_room = model.answers([p.prompt for p in prompts], self.max_new_tokens)
        followed = check_all(prompts, responses)
        extra = {
            "n_prompts": float(len(prompts)),
            "n_without_room": float(n_without_room),
            "n_empty": float(sum(not r.strip() for r in responses)),
            **{f"n_unsupported@{name}": float(n) for name, n in followed.unsupported.items()},
        }
        found = []
        for criterion in ("strict", "loose"):
            whole, each = followed.scores(criterion)
            if whole:
                value, error = _ratio(np.array(whole), np.ones(len(whole)))
                found.append((f"ifeval_prompt_{criterion}", value, error, len(whole), extra))
            sums, sizes = (np.array([float(f(x)) for x in each if x]) for f in (sum, len))
            if len(sizes):
                value, error = _ratio(sums, sizes)
                found.append((f"ifeval_instruction_{criterion}", value, error, int(sizes.sum()), extra))
        rows = [
            {**row, "n_characters": len(text)} for row, text in zip(followed.rows, responses, strict=True)
        ]  # the answers themselves may be toxic
        return rows, found

    def weighted(self, metric: str) -> WeightedMetric | None:
        """The likelihood under example weights."""
        return weighted_likelihood if metric == "log_likelihood" else None


def _ratio(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Σ sums / Σ sizes and its standard error over examples; NaN for one example."""
    value = float(sums.sum() / sizes.sum())
    if len(sums) < 2:
        return value, float("nan")
    residual = (sums - value * sizes) / sizes.mean()
    return value, float(residual.std(ddof=1) / np.sqrt(len(sums)))


def weighted_likelihood(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Nats a byte for each column of example weights [n, draws]; labels are bytes, scores log-likelihoods in nats."""
    return scores @ counts / (labels @ counts)

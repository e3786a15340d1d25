"""Harmful-intent detection, or any other two-label classification of texts: AUPRC, AUROC, calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.files import replacing
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.stats import WeightedMetric, bootstrap_stderr
from transfer.core.texts import Corpus
from transfer.tasks.base import Example, Predictor, template_hash

if TYPE_CHECKING:
    from transfer.finetune import Recipe

UNSEEN = "@unseen"
"""Suffix of a metric restricted to the topics that the seed lacks."""


@dataclass(frozen=True)
class Intent:
    """Two-label text classification; class 1 is the positive label."""

    positive: str = "harmful"
    """Label whose texts are to be found."""
    negative: str = ""
    """The other label; empty means the only other one in the corpus."""
    unseen: tuple[str, ...] = ()
    """Topics that the seed lacks; the metrics are repeated on their texts alone under ``auprc@unseen``."""
    draws: int = 200
    """Bootstrap draws behind each standard error (Efron and Tibshirani 1993, Sec. 6.4: 200 are enough for one)."""
    name: str = field(default="intent", init=False)
    metrics: tuple[str, ...] = field(default=("auprc", "auroc"), init=False)

    def load(self, ref: str) -> Corpus:
        """A labelled corpus; see ``transfer.corpus.load_corpus``."""
        from transfer.corpus import load_corpus

        return load_corpus(ref)

    def examples(self, corpus: Corpus) -> list[Example]:
        """(text, 0 or 1) of every text; a corpus of one class only is fine here.

        Raises:
            TransferError: For unlabelled texts, or a label that is neither of the two.
        """
        unlabelled = [t.id for t in corpus if not t.label]
        if unlabelled:
            raise TransferError(
                f"{len(unlabelled)} texts of {corpus.name} have no label, first {unlabelled[0]!r}.",
                "Label them, or point the configuration at the column that holds the label.",
            )
        others = sorted({t.label for t in corpus} - {self.positive})
        if self.negative:
            others = [label for label in others if label != self.negative]
        if len(others) > (0 if self.negative else 1):
            raise TransferError(
                f"{corpus.name} has the labels {', '.join(sorted({t.label for t in corpus}))}, but this task knows "
                f"{self.positive!r} (positive) and {self.negative or 'one other'!r}.",
                "Leave two labels in the data, and name the one to detect in data.positive.",
            )
        return [(t.text, int(t.label == self.positive)) for t in corpus]

    def fit(
        self, base: Any, examples: list[Example], recipe: Recipe, seed: int, out: Path | None = None
    ) -> tuple[Any, FinetuneRun]:
        """Fine-tune a sequence classifier; see ``transfer.finetune.finetune``."""
        from transfer.finetune import finetune

        return finetune(base, examples, recipe, seed, out)

    def restore(self, base: Any, folder: Path) -> Any:
        """See ``transfer.finetune.load_classifier``."""
        from transfer.finetune import load_classifier

        return load_classifier(base, folder)

    def evaluate(self, model: Predictor, corpus: Corpus, out_file: Path) -> list[EvalResult]:
        """AUPRC and AUROC of the positive probability, on all texts and on those of unseen topics.

        Standard errors are bootstraps over examples with a fixed seed. ``out_file`` gets one JSON line a text (id,
        label, score; no text).

        Raises:
            TransferError: When the corpus lacks one of the classes, or a score is not finite.
        """
        labels = np.array([label for _, label in self.examples(corpus)], dtype=np.int64)
        if not 0 < labels.sum() < len(labels):
            raise TransferError(
                f"The evaluation corpus {corpus.name} has {int(labels.sum())} {self.positive!r} texts of "
                f"{len(labels)}; a detection metric needs both classes.",
                f"Labels found: {', '.join(sorted({t.label for t in corpus})) or 'none'}.",
            )
        predicted = model.predict([t.text for t in corpus])
        scores = predicted.probabilities[:, 1]
        if scores.shape != labels.shape or not np.all(np.isfinite(scores)):
            raise TransferError(
                f"{int(np.sum(~np.isfinite(scores)))} of {len(labels)} scores of {corpus.name} are not finite.",
                "Lower the learning rate.",
            )
        with replacing(out_file) as part, part.open("w", encoding="utf8") as lines:
            for text, label, score in zip(corpus, labels, scores, strict=True):
                lines.write(json.dumps({"id": text.id, "label": int(label), "score": float(score)}) + "\n")

        topics = set(self.unseen)
        rows = np.array([t.topic in topics for t in corpus])
        extra = {
            "ece": expected_calibration_error(labels, scores),
            "brier": float(np.mean((scores - labels) ** 2)),
            "prevalence": float(labels.mean()),
            "n_truncated": float(predicted.n_truncated),
            "n_unseen": float(rows.sum()),
            "n_unseen_positive": float(labels[rows].sum()),
        }
        language = getattr(getattr(model, "backbone", None), "language", None)
        template = template_hash(language.tokenizer) if language is not None else ""
        results = [self._result(m, labels, scores, out_file, extra, template) for m in self.metrics]
        if 0 < labels[rows].sum() < rows.sum():
            prevalence = {"prevalence": float(labels[rows].mean())}
            shown = labels[rows], scores[rows], out_file, prevalence, template
            results += [self._result(m, *shown, UNSEEN) for m in self.metrics]
        return results

    def _result(
        self,
        metric: str,
        labels: np.ndarray,
        scores: np.ndarray,
        out_file: Path,
        extra: dict[str, float],
        template: str,
        suffix: str = "",
    ) -> EvalResult:
        from sklearn.metrics import average_precision_score, roc_auc_score

        value = {"auprc": average_precision_score, "auroc": roc_auc_score}[metric](labels, scores)
        return EvalResult(
            task=self.name,
            metric=metric + suffix,
            value=float(value),
            stderr=bootstrap_stderr(labels, scores, _WEIGHTED[metric], self.draws),
            n=len(labels),
            n_missing=0,
            per_example=out_file.name,
            extra=extra,
            template=template,
        )

    def weighted(self, metric: str) -> WeightedMetric | None:
        """AUPRC or AUROC under example weights."""
        return _WEIGHTED.get(metric)


def expected_calibration_error(labels: np.ndarray, scores: np.ndarray, bins: int = 10) -> float:
    """Mean gap between predicted and observed positive rate over equal-width bins (Naeini et al. 2015)."""
    where = np.minimum((scores * bins).astype(int), bins - 1)
    gap = np.bincount(where, scores - labels, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def _by_score(
    labels: np.ndarray, scores: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[np.ndarray | float, np.ndarray | float]]:
    """Positive and negative weight of each distinct score, highest first: each an array [draws], or 0 for none at all.

    One pass over the examples with a vector of draws at a time: everything stays in the cache, where sums over whole
    [draws, n] arrays took thirty times as long.
    """
    order = np.argsort(-scores, kind="stable")
    for tied in np.split(order, np.flatnonzero(np.diff(scores[order])) + 1):
        if len(tied) == 1:
            weight = counts[tied[0]]
            yield (weight, 0.0) if labels[tied[0]] else (0.0, weight)
        else:
            hits = labels[tied] != 0
            yield counts[tied[hits]].sum(axis=0), counts[tied[~hits]].sum(axis=0)


def weighted_auprc(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision for each column of example weights [n, draws]; NaN where no positive is drawn."""
    hits, seen, area = (np.zeros(counts.shape[1]) for _ in range(3))
    for positive, negative in _by_score(labels, scores, counts):
        hits += positive
        seen += positive
        seen += negative
        if np.ndim(positive):
            area += positive * hits / np.maximum(seen, 1.0)
    with np.errstate(invalid="ignore"):
        return area / hits


def weighted_auroc(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each column of example weights [n, draws]; NaN where a class is not drawn."""
    hits, missed, area = (np.zeros(counts.shape[1]) for _ in range(3))
    for positive, negative in _by_score(labels, scores, counts):
        if np.ndim(negative):  # every positive above wins against these, every tied one by half
            area += negative * (hits + np.asarray(positive) / 2)
        hits += positive
        missed += negative
    with np.errstate(invalid="ignore"):
        return area / (hits * missed)


_WEIGHTED: dict[str, WeightedMetric] = {"auprc": weighted_auprc, "auroc": weighted_auroc}


def unseen_topics(seed: Corpus, evaluation: Corpus) -> tuple[str, ...]:
    """Topics that the evaluation corpus has and the seed lacks."""
    return tuple(sorted({t.topic for t in evaluation if t.topic} - {t.topic for t in seed}))

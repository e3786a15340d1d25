"""Toxicity detection: two-label classification as in ``intent``, on the label columns that toxicity sets come with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.outcomes import EvalResult
from transfer.core.stats import bootstrap_stderr
from transfer.core.texts import Corpus
from transfer.tasks.base import Predictor
from transfer.tasks.intent import Intent

TOXIC, SAFE = "toxic", "safe"


@dataclass(frozen=True)
class Labelling:
    """How one data set says which texts are toxic."""

    column: str
    toxic: tuple[str, ...] = ()
    safe: tuple[str, ...] = ()
    threshold: float | None = None
    """For columns with a score: toxic from here on."""
    text: str = "text"
    """Column of the text."""

    def label(self, value: str) -> str:
        """``toxic`` or ``safe``; empty for a value that is neither."""
        if self.threshold is None:
            return TOXIC if value in self.toxic else SAFE if value in self.safe else ""
        try:
            score = float(value)
        except ValueError:
            return ""
        return TOXIC if score >= self.threshold else SAFE if score < self.threshold else ""


_YES, _NO = ("1", "True", "toxic", "Toxic"), ("0", "False", "safe", "Not Toxic")

FORMATS: dict[str, Labelling] = {
    "labels": Labelling("label", _YES, _NO),
    "surge": Labelling("toxic", _YES, _NO),
    "toxic-chat": Labelling("toxicity", _YES, _NO),
    "toxic-chat-hub": Labelling("toxicity", _YES, _NO, text="user_input"),
    # Davidson et al. 2017: offensive tweets are not hate speech, but toxic all the same.
    "davidson": Labelling("label", ("hate", "offensive"), ("neither",)),
    "davidson-hate": Labelling("label", ("hate",), ("offensive", "neither")),
    "civil-comments": Labelling("toxicity", threshold=0.5),
}
"""Data sets by name: Surge AI toxicity, ToxicChat (Lin et al. 2023), Davidson et al. (2017), Civil Comments."""


def load_toxicity(ref: str, layout: str = "labels") -> Corpus:
    """A corpus with the labels ``toxic`` and ``safe``.

    Args:
        ref: See ``transfer.corpus.load_corpus``.
        layout: Key of ``FORMATS``.

    Raises:
        TransferError: For an unknown layout, or a row whose label says neither; no row is left out.
    """
    from transfer.corpus import load_corpus

    if layout not in FORMATS:
        raise TransferError(f"There is no toxicity layout {layout!r}.", f"Known: {', '.join(FORMATS)}.")
    labelling = FORMATS[layout]
    found = load_corpus(ref, text_column=labelling.text, label_column=labelling.column)
    texts = tuple(dataclasses.replace(t, label=labelling.label(t.label)) for t in found)
    unclear = [old for old, new in zip(found, texts, strict=True) if not new.label]
    if unclear:
        raise TransferError(
            f"{len(unclear)} rows of {ref} have a {labelling.column!r} that layout {layout!r} does not know, first "
            f"{unclear[0].label!r} ({unclear[0].id}).",
            f"Remove them, or choose another layout of {', '.join(FORMATS)}.",
        )
    return Corpus(found.name, texts)


@dataclass(frozen=True)
class Toxicity(Intent):
    """``Intent`` with what toxicity sets differ in: their label columns, and calibration as results of its own.

    A detector is used at a threshold, so whether its probabilities mean anything is a result here, with a standard
    error; ``Intent`` keeps it beside each metric.
    """

    positive: str = TOXIC
    layout: str = "labels"
    """Key of ``FORMATS``."""
    name: str = field(default="toxicity", init=False)

    calibration = ("brier", "ece")
    """Lower is better; evaluated behind ``metrics``."""

    def load(self, ref: str) -> Corpus:
        """See ``load_toxicity``."""
        return load_toxicity(ref, self.layout)

    def evaluate(self, model: Predictor, corpus: Corpus, out_file: Path) -> list[EvalResult]:
        """What ``Intent`` gives, then the Brier score (Brier 1950) and the expected calibration error in ten bins."""
        kept = _Kept(model)
        results = super().evaluate(kept, corpus, out_file)
        scores = kept.scores
        labels = np.array([label for _, label in self.examples(corpus)], dtype=np.int64)
        first = results[0]
        return results + [
            dataclasses.replace(
                first,
                metric=metric,
                value=float(weigh(labels, scores, np.ones((len(labels), 1)))[0]),
                stderr=bootstrap_stderr(labels, scores, weigh, self.draws),
            )
            for metric, weigh in (("brier", weighted_brier), ("ece", weighted_ece))
        ]


class _Kept:
    """A predictor that remembers its scores, so that a model predicts once."""

    def __init__(self, model: Predictor) -> None:
        self.model = model
        self.backbone = getattr(model, "backbone", None)
        self.scores = np.zeros(0)

    def predict(self, texts: list[str]):
        predicted = self.model.predict(texts)
        self.scores = predicted.probabilities[:, 1]
        return predicted


def weighted_brier(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean squared error of the probabilities for each column of example weights [n, draws]."""
    return ((scores - labels) ** 2) @ counts / counts.sum(axis=0)


def weighted_ece(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray, bins: int = 10) -> np.ndarray:
    """Expected calibration error (Naeini et al. 2015) for each column of example weights [n, draws]."""
    where = np.minimum((scores * bins).astype(int), bins - 1)
    gap = (np.arange(bins)[:, None] == where) * (scores - labels)
    return np.abs(gap @ counts).sum(axis=0) / counts.sum(axis=0)

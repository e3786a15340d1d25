"""Matches against a known truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError


@dataclass(frozen=True)
class Agreement:
    """How many matches are right, and how much of the truth they hold."""

    n_matches: int
    n_true: int
    n_right: int

    @property
    def precision(self) -> float:
        """Right matches among all matches; 0 when there is none, since nothing was found."""
        return self.n_right / self.n_matches if self.n_matches else 0.0

    @property
    def recall(self) -> float:
        """Right matches among all true pairs."""
        return self.n_right / self.n_true

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.n_right / (self.n_matches + self.n_true)


def agreement(alignment: Alignment, truth: Int[np.ndarray, "pairs 2"]) -> Agreement:
    """Compare an alignment's matches with the true (source, target) pairs.

    Raises:
        TransferError: When there is no true pair: precision and recall would say nothing.
    """
    if not len(truth):
        raise TransferError("No true pair to compare with; the held-out null judges such a case.")
    known = {(int(i), int(j)) for i, j in truth}
    found = set(zip(alignment.matches["source"].tolist(), alignment.matches["target"].tolist(), strict=True))
    return Agreement(n_matches=len(found), n_true=len(known), n_right=len(found & known))


def is_right(
    source: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"], truth: Int[np.ndarray, "pairs 2"]
) -> Bool[np.ndarray, " n"]:
    """Whether each (source, target) pair is a true one; a feature may stand in several true pairs."""
    width = int(max(np.max(target, initial=0), np.max(truth[:, 1], initial=0))) + 1
    return np.isin(np.asarray(source) * width + target, truth[:, 0] * width + truth[:, 1])


def false_share(alignment: Alignment, truth: Int[np.ndarray, "pairs 2"], level: float) -> float:
    """Realised share of wrong matches among those with a q-value of at most ``level``; 0 when there is none."""
    q = alignment.matches["q_value"]
    chosen = np.flatnonzero(np.isfinite(q) & (q <= level))
    right = is_right(alignment.matches["source"][chosen], alignment.matches["target"][chosen], truth)
    return float(np.mean(~right)) if len(chosen) else 0.0


def brier_score(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    """Mean squared distance of a probability from what came true; 0 is perfect, and 0.25 is always saying one half.

    Raises:
        TransferError: When there is nothing to score, or a confidence is no probability.
    """
    confidence = _probabilities(confidence)
    return float(np.mean((confidence - np.asarray(right, dtype=np.float64)) ** 2))


@dataclass(frozen=True)
class Reliability:
    """How often what was said with some confidence came true, by bin of confidence; empty bins are left out."""

    said: Float[np.ndarray, " bins"]
    """Mean confidence."""
    came_true: Float[np.ndarray, " bins"]
    """Share of right ones."""
    count: Int[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Mean gap between the two, by number (expected calibration error)."""
        return float(np.average(np.abs(self.said - self.came_true), weights=self.count))


def reliability(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = 10) -> Reliability:
    """Reliability curve over ``bins`` equal bins of confidence.

    Raises:
        TransferError: When there is nothing to score, or a confidence is no probability.
    """
    confidence = _probabilities(confidence)
    at = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(at, minlength=bins)
    held = count > 0
    said, true = (np.bincount(at, w, bins)[held] / count[held] for w in (confidence, np.asarray(right, dtype=float)))
    return Reliability(said, true, count[held])


def _probabilities(confidence: np.ndarray) -> Float[np.ndarray, " n"]:
    confidence = np.asarray(confidence, dtype=np.float64)
    outside = int(np.sum(~((confidence >= 0) & (confidence <= 1))))
    if not confidence.size or outside:
        raise TransferError(f"Calibration needs probabilities, but {outside} of {confidence.size} are outside 0..1.")
    return confidence

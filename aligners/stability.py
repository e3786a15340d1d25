"""Which matches come back when the corpus is another: fits on halves of the documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from aligners.base import Aligner
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations


@dataclass(frozen=True)
class Stability:
    """How often each match of the whole corpus is found in a half of it."""

    pairs: Int[np.ndarray, "n 2"]
    """Accepted matches of the fit on all documents."""
    share: Float[np.ndarray, " n"]
    """Of the halves in which the match is accepted again."""
    overlap: Float[np.ndarray, " draws"]
    """Of the matches of two halves that share no document: |both| / |either|, for each draw."""

    @property
    def stable(self) -> float:
        """Share of the matches that come back in more halves than not; 0 when there is none."""
        return float(np.mean(self.share > 0.5)) if len(self.share) else 0.0


def stability(
    aligner: Aligner,
    source: FeatureView,
    target: FeatureView,
    pairs: PairedActivations,
    *,
    level: float = 0.05,
    draws: int = 5,
    seed: int = 0,
) -> Stability:
    """Fit on all documents and on both halves of ``draws`` random divisions (Shah & Samworth 2013).

    A half has less text, so the shares are a lower bound of what another corpus of full size would give. Costs
    ``2·draws + 1`` fits. Fits that give no q-value of their own are taken whole.

    Args:
        aligner: Any; it is copied and stays as it is.
        source: As in ``fit``.
        target: As in ``fit``.
        pairs: Paired activations.
        level: Largest q-value of an accepted match.
        draws: Divisions.
        seed: Of the divisions.

    Raises:
        TransferError: For fewer than one draw, or a fit that the aligner refuses.
    """
    if draws < 1:
        raise TransferError(f"Stability needs at least one draw, got {draws}.")

    def keys(part: PairedActivations) -> Int[np.ndarray, " n"]:
        fresh = type(aligner)(**aligner.get_params())
        return _accepted(fresh.fit(source, target, pairs=part).alignment_, level)

    whole = keys(pairs)
    found = np.zeros(len(whole))
    overlap = np.empty(draws)
    for draw in range(draws):
        one, other = (keys(part) for part in pairs.split(0.5, seed=seed + draw))
        found += np.isin(whole, one).astype(float) + np.isin(whole, other)
        either = len(np.union1d(one, other))
        overlap[draw] = len(np.intersect1d(one, other)) / either if either else 0.0
    width = target.space.n_features
    return Stability(np.stack([whole // width, whole % width], axis=1), found / (2 * draws), overlap)


def _accepted(alignment: Alignment, level: float) -> Int[np.ndarray, " n"]:
    q = alignment.matches["q_value"]
    keep = np.isfinite(q) & (q <= level) if np.isfinite(q).any() else np.ones(len(q), dtype=bool)
    return alignment.matches["source"][keep] * alignment.target.n_features + alignment.matches["target"][keep]

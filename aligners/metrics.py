"""Matches against a known truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from transfer.core.errors import TransferError
from transfer.core.objects import Alignment


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

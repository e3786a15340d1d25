"""The aligner that knows nothing: what every other one must beat."""

from __future__ import annotations

import numpy as np

from aligners.base import Aligner, coupling_of, match_columns
from transfer.core.alignment import Alignment
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations


class RandomAligner(Aligner):
    """Random one-to-one matches with random scores.

    Args:
        seed: Of the draw.
    """

    method = "random"

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        rng = np.random.default_rng(self.seed)
        n, m = source.space.n_features, target.space.n_features
        k = min(n, m)
        matches = match_columns(rng.permutation(n)[:k], rng.permutation(m)[:k], rng.uniform(size=k))
        return self._alignment(source, target, matches, coupling_of(matches, (n, m)))

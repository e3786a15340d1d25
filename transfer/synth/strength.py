"""How strongly to steer: the strength that makes most texts fire while the unsteered model still finds them usual.

A strength that is too low leaves a feature silent, one that is too high makes the model stutter. Where the best lies
differs between models and features, so it is searched for with texts, which stay candidates like all others (step 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transfer.core.errors import TransferError


@dataclass(frozen=True)
class StrengthSearch:
    """Settings of the search."""

    log_perplexity: Callable[[list[str]], np.ndarray]
    """Nats per token of texts under the unsteered model, such as ``models.fluency.log_perplexity``; NaN: cannot say."""
    cap: float = 2.0
    """Largest median perplexity of steered texts, in units of that of unsteered ones."""
    probes: int = 6
    """Strengths tried at most, those of the grid among them."""
    texts: int = 1
    """Texts of one feature at one strength."""
    features: int | None = None
    """Features that strengths are tried on, spread evenly over all; the others take what is best on average."""
    shrink: float = 2.0
    """How many texts the average over all features counts as, when one feature's best strength is chosen."""

    def __post_init__(self) -> None:
        if self.cap < 1 or min(self.probes, self.texts, 1 if self.features is None else self.features) < 1:
            raise TransferError("The search of the strength needs cap, probes, texts and features >= 1.")
        if self.shrink <= 0:
            raise TransferError(f"The search of the strength needs shrink > 0, not {self.shrink}.")

    def tried_on(self, ids: Sequence[int]) -> list[int]:
        """The features that texts are written for."""
        if self.features is None or self.features >= len(ids):
            return list(ids)
        return [ids[i] for i in np.linspace(0, len(ids) - 1, self.features).round().astype(int)]


@dataclass(frozen=True)
class Probe:
    """What one strength gave, over all features."""

    strength: float
    hits: dict[int, int]
    """Per feature, texts above its threshold."""
    counts: dict[int, int]
    """Per feature, texts written."""
    log_perplexity: dict[int, list[float]]
    """Per feature, of its texts that can be scored."""

    @property
    def hit_rate(self) -> float:
        """Share of texts above the threshold of their feature."""
        return sum(self.hits.values()) / max(sum(self.counts.values()), 1)

    @property
    def median(self) -> float:
        """Median log-perplexity of all texts; infinite when none can be scored."""
        values = [v for part in self.log_perplexity.values() for v in part]
        return float(np.median(values)) if values else math.inf


@dataclass(frozen=True)
class Found:
    """What the search found."""

    best: dict[int, float]
    """Strength of each feature."""
    probes: tuple[Probe, ...]
    limit: float
    """Log-perplexity that the cap allows."""
    steps: list[float] = field(default_factory=list)
    """All strengths tried that the cap allows, ascending."""

    def summary(self) -> dict[str, Any]:
        """Numbers for the result."""
        unsteered = min(self.probes, key=lambda p: p.strength).median
        return {
            "tried": [
                {
                    "strength": p.strength,
                    "hit_rate": p.hit_rate,
                    "perplexity_ratio": _ratio(p.median, unsteered),
                    "allowed": p.median <= self.limit,
                    "n_texts": sum(p.counts.values()),
                }
                for p in sorted(self.probes, key=lambda p: p.strength)
            ],
            "n_features_at": {
                f"{s:g}": sum(b == s for b in self.best.values()) for s in sorted(set(self.best.values()))
            },
        }


def find_strengths(
    try_out: Callable[[float], Probe], grid: Sequence[float], settings: StrengthSearch, features: Sequence[int]
) -> Found:
    """Search one curve for all features, then choose for each.

    The grid is tried first (0 always is: it sets the unsteered perplexity). Further probes go where the best allowed
    strength can still improve: halfway to the next stronger one that the cap forbids (bisection of the cap), else
    halfway to the better of its two neighbours. A feature then takes the strength with its largest hit rate among
    those at which neither all texts nor its own pass the cap; its own few texts are averaged with those of all
    features, which count as ``shrink`` texts. Ties go to the weaker strength.

    Args:
        try_out: Writes and scores ``settings.texts`` texts of every feature at one strength.
        grid: Strengths to begin with, ≥ 0.
        settings: See there.
        features: Features to choose for.

    Raises:
        TransferError: For a negative strength.
    """
    start = sorted({0.0, *map(float, grid)})
    if start[0] < 0:
        raise TransferError("A steering strength cannot be negative here.", "Use strengths of 0 and more.")
    probes = {s: try_out(s) for s in start[: settings.probes]}
    limit = probes[0.0].median + math.log(settings.cap)

    def allowed() -> list[float]:
        return sorted(s for s, p in probes.items() if p.median <= limit) or [0.0]

    while len(probes) < settings.probes and len(probes) > 1:
        known = sorted(probes)
        best = max(allowed(), key=lambda s: (probes[s].hit_rate, -s))
        at = known.index(best)
        above = known[at + 1] if at + 1 < len(known) else None
        below = known[at - 1] if at else None
        if above is not None and probes[above].median > limit:
            other = above
        elif above is None or (below is not None and probes[below].hit_rate > probes[above].hit_rate):
            other = below if below is not None else best
        else:
            other = above
        new = round((best + other) / 2, 6)
        if new in probes:
            break
        probes[new] = try_out(new)

    steps = allowed()
    chosen = {i: max(steps, key=lambda s, i=i: (*_of(probes[s], i, limit, settings.shrink), -s)) for i in features}
    return Found(chosen, tuple(probes.values()), limit, steps)


def _ratio(log_perplexity: float, unsteered: float) -> float | None:
    """None where one of them is not known."""
    known = math.isfinite(log_perplexity) and math.isfinite(unsteered)
    return math.exp(min(log_perplexity - unsteered, 50.0)) if known else None


def _of(probe: Probe, feature: int, limit: float, shrink: float) -> tuple[bool, float]:
    """Whether the feature's own texts keep to the cap at this strength, and its hit rate there, both shrunk."""
    own = probe.log_perplexity.get(feature, [])
    level = (sum(own) + shrink * probe.median) / (len(own) + shrink) if len(own) + shrink else math.inf
    n = probe.counts.get(feature, 0)
    rate = (probe.hits.get(feature, 0) + shrink * probe.hit_rate) / (n + shrink) if n + shrink else 0.0
    return level <= limit, rate

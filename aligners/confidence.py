"""How likely an edge joins two features that are the same, not merely related: an empirical-Bayes mixture and q-values.

A shift null asks whether two features fire together more than by chance. Children of a concept, and concepts of one
topic, do. What tells them apart is geometry: through a map that has not seen the edge, a feature and its counterpart
point the same way, a child only partly, an unrelated feature not at all. Fisher's z of the cosine has one spread at any
true cosine, so the true cosines behind many edges can be estimated as a mixing distribution (Kiefer & Wolfowitz 1956;
Efron 2014), for each stratum of activation evidence with its own shares of null, related and same. Nothing is assumed
about how firing together bears on being right: high correlation may mean children, and the shares say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from transfer.core.errors import TransferError

SAME = 0.8
"""Two features are the same if their cosine, freed from noise, is at least this (an angle of 37°)."""
LARGEST = 0.9999
"""Cosines are cut here before Fisher's z."""
BINS = 6
"""Bins per spread."""
FEW = 20
"""Best edges below which their median is all that can be said of them."""
LEAST_SPREAD = 0.25
"""Spread of features that are the same, at least, as a share of that of unrelated ones."""
NULL_REACH, RELATED_REACH = 1.5, 2.0
"""Spreads up to which a true z counts as null, and from which it may be related."""
LEAN = 30.0
"""Edges' worth of the common forms of null and related mixed into each stratum's."""
SHIFT = 1e-7
"""Change of the mean log-likelihood below which the mixture has settled."""
SHY = 2.0
"""Edges' worth of the pooled shares mixed into each stratum's."""


@dataclass(frozen=True)
class Evidence:
    """What is known of candidate edges and of the pairs they were chosen from."""

    cosine: Float[np.ndarray, " edges"]
    """Through a map that has not seen the edge."""
    stratum: Int[np.ndarray, " edges"]
    """Group of like activation evidence."""
    total: Int[np.ndarray, " strata"]
    """Pairs in each stratum, candidates or not."""
    floor: Float[np.ndarray, " strata"]
    """Cosine above which a stratum's pairs are all among the edges; −1 where all of them are edges."""
    spread: float
    """Standard deviation of the cosine of unrelated pairs."""
    anchor: float
    """Cosine of features known to be the same, as the noise of both dictionaries leaves it."""
    anchor_spread: float
    """Standard deviation of their Fisher z."""


@dataclass(frozen=True)
class Judged:
    """What the mixture says of the edges."""

    confidence: Float[np.ndarray, " edges"]
    """Probability that an edge's features are the same."""
    log_odds: Float[np.ndarray, " edges"]
    """Of the same; keeps an order where the probability rounds to one."""
    shares: Float[np.ndarray, "strata 3"]
    """Of null, related and same pairs in each stratum."""
    boundary: float
    """True cosine, with noise, from which two features count as the same."""
    rounds: int
    converged: bool


def judge(evidence: Evidence, max_iter: int = 2000) -> Judged:
    """Fit the mixture to all strata and judge every edge.

    True z lie on a grid: near 0 they are null, up to ``SAME`` times the anchor related, at the anchor the same. Each
    stratum has its own shares of the three; its forms of null and related lean on those of all strata (children of one
    parent fire together more than a child and its parent, so strata differ). Pairs below a stratum's floor count as one
    censored bin, so that taking only the best of very many pairs does no harm. Memory: bins × grid, strata × both, and
    4,096 edges × grid.

    Raises:
        TransferError: When the evidence is empty or the spread is not positive.
    """
    if not len(evidence.cosine) or not evidence.spread > 0:
        raise TransferError(f"{len(evidence.cosine)} edges with spread {evidence.spread} cannot be judged.")
    model = _Model.of(evidence)
    z = np.minimum(fisher(evidence.cosine), model.centre)
    floor = np.where(evidence.floor <= -1, -np.inf, fisher(evidence.floor))
    used = z >= floor[evidence.stratum]
    edges = model.edges(float(z.min()))
    counts = np.zeros((len(evidence.total), len(edges) + 1))
    np.add.at(counts, (evidence.stratum[used], np.searchsorted(edges, z[used], side="right")), 1.0)
    cumulative = model.below(edges)
    inside = np.diff(np.vstack([np.zeros(len(model.kind)), cumulative, np.ones(len(model.kind))]), axis=0)
    hidden = np.maximum(evidence.total - counts.sum(axis=1), 0.0) * np.isfinite(floor)
    unseen = np.where(np.isfinite(floor)[:, None], model.below(floor), 0.0)
    weights, rounds, converged = _fit(counts, inside, hidden, unseen, model.kind, max_iter)
    log_weights = np.log(np.maximum(weights, 1e-300))
    ceiling = _odds(model.log_above() + log_weights, model.kind)[evidence.stratum]
    log_odds = np.empty(len(z))
    for start in range(0, len(z), 4096):
        part = slice(start, start + 4096)
        log_odds[part] = _odds(model.log_density(z[part]) + log_weights[evidence.stratum[part]], model.kind)
    log_odds = np.where(z >= model.centre, ceiling, np.minimum(log_odds, ceiling))
    confidence = 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))
    shares = weights @ np.eye(3)[model.kind]
    return Judged(confidence, log_odds, shares, SAME * evidence.anchor, rounds, converged)


@dataclass(frozen=True)
class _Model:
    """Normal kernels on a grid of true z: null (0), related (1), and one for the same (2)."""

    grid: Float[np.ndarray, " k"]
    sd: Float[np.ndarray, " k"]
    kind: Int[np.ndarray, " k"]
    spread: float

    @property
    def centre(self) -> float:
        """Of the same. What lies above says no more than the centre itself, so that higher is never worse."""
        return float(self.grid[-1])

    @classmethod
    def of(cls, evidence: Evidence) -> _Model:
        s, centre = evidence.spread, max(float(fisher(evidence.anchor)), RELATED_REACH * evidence.spread)
        null = np.arange(-NULL_REACH, NULL_REACH + 0.1, 0.5) * s
        related = np.arange(RELATED_REACH * s, max(float(fisher(SAME * evidence.anchor)), 0.0), 0.5 * s)
        grid = np.concatenate([null, related, [centre]])
        kind = np.repeat([0, 1, 2], [len(null), len(related), 1])
        own = np.clip(evidence.anchor_spread, LEAST_SPREAD * s, s)  # wider than the others, it would own the far left
        return cls(grid, np.where(kind == 2, own, s), kind, s)

    def edges(self, lowest: float) -> Float[np.ndarray, " bins"]:
        """Bounds of the bins: the last bin is the centre of the same and all above it."""
        step = min(self.spread, float(self.sd[-1])) / BINS
        return self.centre - step * np.arange(int((self.centre - lowest) / step) + 1, -1, -1) - 1e-9

    def below(self, z: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n k"]:
        """Probability of a smaller z."""
        from scipy.special import ndtr

        return ndtr((z[:, None] - self.grid) / self.sd)

    def log_density(self, z: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n k"]:
        """Of z below the centre, up to a constant."""
        return -0.5 * ((z[:, None] - self.grid) / self.sd) ** 2 - np.log(self.sd)

    def log_above(self) -> Float[np.ndarray, " k"]:
        """Log-probability of the centre of the same or more."""
        from scipy.special import log_ndtr

        return log_ndtr((self.grid - self.centre) / self.sd)


def _odds(log_mass: Float[np.ndarray, "n k"], kind: Int[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
    """Log-odds of the same against the rest."""
    from scipy.special import logsumexp

    return logsumexp(log_mass[:, kind == 2], axis=1) - logsumexp(log_mass[:, kind != 2], axis=1)


def fisher(cosine: np.ndarray | float) -> np.ndarray:
    """Fisher's z, of cosines cut at ±``LARGEST``."""
    return np.arctanh(np.clip(cosine, -LARGEST, LARGEST))


def anchors(cosine: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Cosine of features that are the same, and the spread of its Fisher z, from each feature's best edge.

    Best edges are right ones and, where there is no right one, the luckiest wrong one. Two normal distributions are
    fitted to their z, the upper one being the right ones; one alone if the Bayesian information criterion says so.
    Wrong edges lie below, so the spread is that of the upper half.
    """
    from sklearn.mixture import GaussianMixture

    z = np.sort(fisher(cosine))  # sorted, so that the order of features does not reach the fit
    if len(z) >= FEW and z.std() > 1e-6:
        settings = {"tol": 1e-4, "max_iter": 1000, "reg_covar": 1e-8, "random_state": 0}
        fits = [
            GaussianMixture(len(start), means_init=np.array(start)[:, None], **settings)
            for start in ([float(z.mean())], [float(np.quantile(z, q)) for q in (0.25, 0.9)])
        ]
        best = min((fit.fit(z[:, None]) for fit in fits), key=lambda fit: fit.bic(z[:, None]))
        means = np.asarray(best.means_)[:, 0]
        top = int(np.argmax(means))
        centre = float(means[top])
    else:
        centre = float(np.median(z))
    above = z[z >= centre] - centre
    return float(np.tanh(centre)), float(np.sqrt(np.mean(above**2))) if len(above) else 0.0


def q_values(confidence: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of wrong edges among those at least as confident, with one standard deviation and one edge to spare.

    ``(1 + Σ (1 − c) + √Σ c (1 − c)) / number`` over confidences c, made monotone and cut at one: the expected number
    of wrong edges, its spread, and the one that target–decoy counts add. An edge more likely wrong than right gets
    one, however many sure edges stand above it; NaN (untestable) stays NaN and is not counted.
    """
    q = np.full(len(confidence), np.nan)
    tested = np.flatnonzero(np.isfinite(confidence))
    order = tested[np.argsort(-confidence[tested], kind="stable")]
    c = confidence[order]
    raw = (1 + np.cumsum(1 - c) + np.sqrt(np.cumsum(c * (1 - c)))) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1.0)
    q[np.isfinite(confidence) & (confidence < 0.5)] = 1.0
    return q


def _fit(
    counts: Float[np.ndarray, "strata bins"],
    inside: Float[np.ndarray, "bins k"],
    hidden: Float[np.ndarray, " strata"],
    unseen: Float[np.ndarray, "strata k"],
    kind: Int[np.ndarray, " k"],
    max_iter: int,
) -> tuple[Float[np.ndarray, "strata k"], int, bool]:
    """EM for the weights of each stratum: shares of its own, forms of null and related that lean on the common ones."""
    member = np.eye(3)[kind]
    weights = np.full((len(counts), len(kind)), 1 / len(kind))
    listed = hidden == 0
    total = counts.sum() + hidden.sum()
    last = -np.inf
    for rounds in range(1, max_iter + 1):
        seen = weights @ inside.T
        lost = np.sum(weights * unseen, axis=1)
        ratio = np.divide(counts, seen, out=np.zeros_like(counts), where=counts > 0)
        missing = np.divide(hidden, lost, out=np.zeros_like(hidden), where=hidden > 0)
        likelihood = np.sum(counts * np.log(np.where(counts > 0, seen, 1.0)))
        likelihood = (likelihood + np.sum(hidden * np.log(np.where(hidden > 0, lost, 1.0)))) / total
        new = weights * (ratio @ inside + missing[:, None] * unseen)
        groups = new @ member
        pooled = groups[listed].sum(axis=0) / max(groups[listed].sum(), 1e-300)
        shares = groups + SHY * pooled * listed[:, None]
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)
        common = new[listed].sum(axis=0)
        common /= np.maximum((common @ member)[kind], 1e-300)
        form = new + LEAN * common
        form /= np.maximum((form @ member)[:, kind], 1e-300)
        weights = shares[:, kind] * form
        if abs(likelihood - last) < SHIFT:
            return weights, rounds, True
        last = likelihood
    return weights, max_iter, False

"""A linear map between decoder spaces, learned from feature pairs that fire together and iterated; no residuals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from aligners.csls import csls_nearest
from aligners.maps import STRENGTHS
from aligners.topk import TopK, topk_cosine, unit_rows
from transfer.core.errors import TransferError

SETTLED = 0.02
"""Share of the pairs that may still change between two rounds of a map that counts as converged."""
TRIED = 2048
"""Pairs on which ridge strengths are compared."""
EDGES = 4096
"""Edges whose directions are held at once."""
NEIGHBOURS = 10
"""Partners a feature's list needs for the means of CSLS."""


@dataclass(frozen=True)
class PairMap:
    """Ridge map of directions, x → y, and what it takes to leave pairs out of it exactly."""

    matrix: Float[np.ndarray, "d_src d_tgt"]
    whitened: Float[np.ndarray, "n d_src"]
    """Rows u with u_i · u_p = x_iᵀ(XᵀX + λ)⁻¹x_p, the influence of pair p on the image of feature i."""
    image: Float[np.ndarray, "n d_tgt"]
    """What the map makes of each source row."""
    residual: Float[np.ndarray, "pairs d_tgt"]
    """What the map leaves of the target row of each pair."""
    strength: float

    @classmethod
    def fit(cls, x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "m d_tgt"], pairs: np.ndarray) -> PairMap:
        """Fit on ``pairs`` [pairs, 2]; the strength has the least squared leave-one-out error over up to 2,048 of them.

        Memory: n × (d_src + d_tgt), two d × d, and pairs × (d_src + d_tgt).
        """
        a, b = x[pairs[:, 0]], y[pairs[:, 1]]
        values, vectors = np.linalg.eigh(a.T @ a)
        values = np.maximum(values, 0.0)
        cross = vectors.T @ (a.T @ b)
        step = -(-len(pairs) // TRIED)
        turned, held = a[::step] @ vectors, b[::step]
        tried = []
        for strength in STRENGTHS:
            inverse = 1 / (values + strength * values.mean())
            leverage = np.minimum((turned**2) @ inverse, 1 - 1e-9)
            error = (held - (turned * inverse) @ cross) / (1 - leverage)[:, None]
            tried.append((float(np.sum(error**2)), -strength))
        strength = -min(tried)[1]
        inverse = 1 / (values + strength * values.mean())
        matrix = vectors @ (inverse[:, None] * cross)
        image = x @ matrix
        return cls(matrix, (x @ vectors) * np.sqrt(inverse), image, b - image[pairs[:, 0]], strength)


@dataclass(frozen=True)
class SeededMap:
    """Maps both ways between two decoder spaces, and how they came about."""

    source: Float[np.ndarray, "n_src d_src"]
    """Centred unit directions."""
    target: Float[np.ndarray, "n_tgt d_tgt"]
    forward: PairMap
    backward: PairMap
    pairs: Int[np.ndarray, "pairs 2"]
    """What both maps are fitted on; each feature stands in at most one pair."""
    changed: tuple[float, ...] = ()
    """Share of the pairs that changed in each round."""

    @classmethod
    def through(cls, x: np.ndarray, y: np.ndarray, pairs: np.ndarray, changed: tuple[float, ...] = ()) -> SeededMap:
        """Fit both ways on these pairs of centred directions."""
        return cls(x, y, PairMap.fit(x, y, pairs), PairMap.fit(y, x, pairs[:, ::-1]), pairs, changed)

    def nearest(self, k: int) -> TopK:
        """The best partners of both sides through the maps, at least as many as CSLS needs."""
        return topk_cosine(*self.joint, max(k, NEIGHBOURS))

    @property
    def rounds(self) -> int:
        """Fits made."""
        return len(self.changed)

    @property
    def converged(self) -> bool:
        """The last round changed at most ``SETTLED`` of the pairs."""
        return self.changed[-1] <= SETTLED

    @property
    def cycle_error(self) -> float:
        """Median distance of a direction from its image there and back, both of length one; 0 = back where it was."""
        there = unit_rows(self.source @ self.forward.matrix @ self.backward.matrix)
        return float(np.median(np.linalg.norm(there - self.source, axis=1)))

    @cached_property
    def joint(self) -> tuple[Float[np.ndarray, "n_src d"], Float[np.ndarray, "n_tgt d"]]:
        """Rows whose inner products are the mean of the cosines in the target's and in the source's space."""
        return _joint(self.source, self.target, self.forward, self.backward)

    def cosines(self, src: Int[np.ndarray, " edges"], tgt: Int[np.ndarray, " edges"]) -> Float[np.ndarray, " edges"]:
        """Mean of both cosines of each edge, through maps fitted without any pair that holds one of its two features.

        The exact leave-out of ridge regression: with S the one or two pairs to leave out, H their mutual influence and
        R their residuals, ``x_i W₋ₛ = x_i W − h_iS (I − H_SS)⁻¹ R_S``. So an edge is never judged by a map that has
        seen it. Memory: 4,096 edges × d at a time.
        """
        of_source, of_target = (
            _pair_of(self.pairs[:, 0], len(self.source)),
            _pair_of(self.pairs[:, 1], len(self.target)),
        )
        total = np.empty(len(src))
        for start in range(0, len(src), EDGES):
            i, j = src[start : start + EDGES], tgt[start : start + EDGES]
            p, q = of_source[i], of_target[j]
            total[start : start + EDGES] = 0.5 * (
                _left_out(self.forward, self.target, self.pairs[:, 0], i, j, p, q)
                + _left_out(self.backward, self.source, self.pairs[:, 1], j, i, q, p)
            )
        return total


def seeded_map(
    x: Float[np.ndarray, "n_src d_src"],
    y: Float[np.ndarray, "n_tgt d_tgt"],
    seeds: Int[np.ndarray, "pairs 2"],
    *,
    max_iter: int = 8,
    neighbours: int = NEIGHBOURS,
) -> tuple[SeededMap, TopK]:
    """Learn the map: fit on the seeds, pair features by mutual nearest CSLS through the map, fit again.

    Stops when a round changes at most 2 % of the pairs. The seeds may be mostly wrong: wrong pairs have no direction
    in common, so they blur the map without turning it (§4.3 and §6.2 of the reference measured 34 % right).

    Args:
        x: Source directions, none zero.
        y: Target directions.
        seeds: One-to-one pairs of features that fire together.
        max_iter: Rounds at most.
        neighbours: Partners listed for each feature in the result's lists.

    Returns:
        The map and the best partners of both sides through it.

    Raises:
        TransferError: When there are fewer than two seeds, or a side's directions are all the same.
    """
    if len(seeds) < 2:
        raise TransferError(
            f"A map needs at least two feature pairs to start from, got {len(seeds)}.", "Pair more text."
        )
    x, y = centred(x), centred(y)
    pairs, changed = np.asarray(seeds, dtype=np.int64), ()
    while True:
        found = SeededMap.through(x, y, pairs, changed)
        top = found.nearest(neighbours)
        nearest = np.stack(csls_nearest(top, NEIGHBOURS).mutual(), axis=1)
        changed = (*changed, difference(nearest, pairs))
        if changed[-1] <= SETTLED or len(changed) >= max_iter or len(nearest) < 2:
            return dataclasses.replace(found, changed=changed), top
        pairs = nearest


def difference(one: Int[np.ndarray, "n 2"], other: Int[np.ndarray, "m 2"]) -> float:
    """Share of the pairs of the longer list that the other one lacks."""
    width = int(max(one[:, 1].max(initial=0), other[:, 1].max(initial=0))) + 1
    common = np.intersect1d(one[:, 0] * width + one[:, 1], other[:, 0] * width + other[:, 1])
    return 1 - len(common) / max(len(one), len(other), 1)


def centred(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Unit rows without their mean, again of length one: what all features write says nothing about one.

    Raises:
        TransferError: When a row is zero, or nothing is left of one.
    """
    x = unit_rows(np.asarray(x, dtype=np.float64))
    return unit_rows(x - x.mean(axis=0))


def _joint(
    x: np.ndarray, y: np.ndarray, forward: PairMap, backward: PairMap
) -> tuple[Float[np.ndarray, "n_src d"], Float[np.ndarray, "n_tgt d"]]:
    return (
        np.hstack([unit_rows(forward.image), x]) * np.sqrt(0.5),
        np.hstack([y, unit_rows(backward.image)]) * np.sqrt(0.5),
    )


def _pair_of(members: np.ndarray, n: int) -> Int[np.ndarray, " n"]:
    where = np.full(n, -1, dtype=np.int64)
    where[members] = np.arange(len(members))
    return where


def _left_out(
    fitted: PairMap,
    y: Float[np.ndarray, "n d"],
    members: Int[np.ndarray, " pairs"],
    i: Int[np.ndarray, " edges"],
    j: Int[np.ndarray, " edges"],
    p: Int[np.ndarray, " edges"],
    q: Int[np.ndarray, " edges"],
) -> Float[np.ndarray, " edges"]:
    """Cosine of the image of feature i with ``y_j``, pairs ``p`` (holds i) and ``q`` (holds j) left out; −1 = no pair.

    ``members`` are the mapped side's features of all pairs.
    """
    q = np.where(q == p, -1, q)
    u, up, uq = fitted.whitened[i], fitted.whitened[members[p]], fitted.whitened[members[q]]
    has_p, has_q = (p >= 0).astype(float), (q >= 0).astype(float)

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("nd,nd->n", a, b)

    h_p, h_q = dot(u, up) * has_p, dot(u, uq) * has_q
    pp, qq, pq = 1 - dot(up, up) * has_p, 1 - dot(uq, uq) * has_q, -dot(up, uq) * has_p * has_q
    pp, qq = np.maximum(pp, 1e-9), np.maximum(qq, 1e-9)
    det = np.maximum(pp * qq - pq * pq, 1e-12)
    image = fitted.image[i]
    for weight, left in (((h_p * qq - h_q * pq) / det, p), ((h_q * pp - h_p * pq) / det, q)):
        some = np.flatnonzero(weight)
        image[some] -= weight[some, None] * fitted.residual[left[some]]
    other = y[j]
    length = np.sqrt(dot(image, image) * dot(other, other))
    return np.divide(dot(image, other), length, out=np.zeros(len(i)), where=length > 0)

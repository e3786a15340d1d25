"""The default aligner: activations start a map, geometry through the map judges, both say how sure a match is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from aligners.base import Aligner, match_columns
from aligners.coactivation import PairedCodes
from aligners.confidence import SAME, Evidence, Judged, anchors, judge, q_values
from aligners.correlation import usable_features
from aligners.partners import Partners, top_partners
from aligners.seeded import SETTLED, SeededMap, difference, seeded_map
from aligners.topk import TopK
from transfer.core.errors import TransferError
from transfer.core.objects import Alignment, FeatureView, PairedActivations

RANKS = (1, 2, 4, 8)
"""Edges of the rank classes by which activation evidence is grouped."""
LEVELS = 3
"""Groups by φ within a rank class."""
ENOUGH = 8
"""Confident pairs that a map is refitted on, at least."""


@dataclass(frozen=True)
class Candidates:
    """Edges of the candidate graph: the best partners of every row and column by either kind of evidence."""

    source: Int[np.ndarray, " edges"]
    target: Int[np.ndarray, " edges"]
    phi: Float[np.ndarray, " edges"]
    """NaN for an edge that only geometry proposes."""
    rank: Int[np.ndarray, " edges"]
    """Worse of the edge's ranks by φ in its row's and its column's list, from 1; k + 1 if it is in one only."""


def candidates(rows: Partners, cols: Partners, top: TopK) -> Candidates:
    """Union of the φ lists and the geometric lists of both sides, sorted by source, then target."""
    n_tgt = len(cols.ids)
    k = max(rows.ids.shape[1], cols.ids.shape[1])
    by_row = _listed(rows.ids, n_tgt, flip=False)
    by_col = _listed(cols.ids, n_tgt, flip=True)
    geo = np.concatenate([_listed(top.row_ids, n_tgt, flip=False)[0], _listed(top.col_ids, n_tgt, flip=True)[0]])
    keys = np.unique(np.concatenate([by_row[0], by_col[0], geo]))
    rank = np.full((2, len(keys)), k + 1)
    phi = np.full(len(keys), np.nan)
    for one, (key, place), scores in zip(rank, (by_row, by_col), (rows.scores, cols.scores), strict=True):
        at = np.searchsorted(keys, key)
        one[at] = place % scores.shape[1] + 1
        phi[at] = scores.ravel()[place]
    return Candidates(keys // n_tgt, keys % n_tgt, phi, rank.max(axis=0))


def strata(found: Candidates) -> Int[np.ndarray, " edges"]:
    """Groups of like activation evidence: 0 = only geometry proposes the edge, then rank class by level of φ."""
    group = np.zeros(len(found.phi), dtype=np.int64)
    acts = np.isfinite(found.phi)
    classes = np.searchsorted(RANKS, found.rank, side="left")
    for c in range(len(RANKS) + 1):
        inside = np.flatnonzero(acts & (classes == c))
        if len(inside):
            cuts = np.quantile(found.phi[inside], np.arange(1, LEVELS) / LEVELS)
            group[inside] = 1 + c * LEVELS + np.searchsorted(cuts, found.phi[inside], side="left")
    return group


def _listed(ids: np.ndarray, n_tgt: int, *, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the listed edges (source · n_tgt + target) and where in the lists they stand."""
    owner = np.repeat(np.arange(len(ids)), ids.shape[1])
    flat = ids.ravel()
    place = np.flatnonzero(flat >= 0)
    owner, flat = owner[place], flat[place]
    return (flat * n_tgt + owner if flip else owner * n_tgt + flat), place


@dataclass(frozen=True)
class Fusion:
    """Judged edges, and the map they were judged through."""

    edges: Candidates
    judged: Judged
    map: SeededMap
    refits: tuple[float, ...]
    """Share of the pairs that changed in each refit of the map on confident pairs."""
    best: Int[np.ndarray, " n"]
    """Edges that are the best of both their source and their target."""


def fuse(
    x: Float[np.ndarray, "n_src d_src"], y: Float[np.ndarray, "n_tgt d_tgt"], codes: PairedCodes, k: int, max_iter: int
) -> Fusion:
    """From codes and directions of testable features to judged edges.

    Raises:
        TransferError: When fewer than two pairs of features fire together.
    """
    rows, cols = top_partners(codes, k, "phi")
    mutual = np.flatnonzero(rows.ids[:, 0] >= 0)
    mutual = mutual[cols.ids[rows.ids[mutual, 0], 0] == mutual]
    found, top = seeded_map(x, y, np.stack([mutual, rows.ids[mutual, 0]], axis=1), max_iter=max_iter, neighbours=k)
    refits: tuple[float, ...] = ()
    while True:
        edges = candidates(rows, cols, top)
        evidence = _evidence(edges, found, top)
        judged = judge(evidence)
        likely = np.flatnonzero(judged.confidence >= 0.5)
        keep = likely[mutual_best(edges.source[likely], edges.target[likely], evidence.cosine[likely])]
        pairs = np.stack([edges.source[keep], edges.target[keep]], axis=1)
        refits = (*refits, difference(pairs, found.pairs))
        if refits[-1] <= SETTLED or len(refits) >= max_iter or len(pairs) < ENOUGH:
            best = mutual_best(edges.source, edges.target, judged.log_odds, evidence.cosine)
            return Fusion(edges, judged, found, refits, best)
        found = SeededMap.through(found.source, found.target, pairs, found.changed)
        top = found.nearest(k)


def mutual_best(
    src: Int[np.ndarray, " edges"], tgt: Int[np.ndarray, " edges"], *scores: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " n"]:
    """Edges that are the best of both their ends by the first score, then the next, then as listed."""
    order = np.lexsort([-score for score in reversed(scores)])
    by_source, by_target = (order[np.unique(ids[order], return_index=True)[1]] for ids in (src, tgt))
    return np.intersect1d(by_source, by_target)


def _evidence(edges: Candidates, found: SeededMap, top: TopK) -> Evidence:
    cosine = found.cosines(edges.source, edges.target)
    acts = np.flatnonzero(np.isfinite(edges.phi))
    best = acts[mutual_best(edges.source[acts], edges.target[acts], cosine[acts])]
    anchor, around = anchors(cosine[best])
    n_src, n_tgt = len(found.source), len(found.target)
    rival, alone = _rivalled(edges, cosine >= SAME * anchor, n_src, n_tgt)
    group = 2 * strata(edges) + rival
    total = np.bincount(group, minlength=2)
    total[0] = alone - total[2::2].sum()
    total[1] = n_src * n_tgt - alone - total[3::2].sum()
    floor = np.full(len(total), -1.0)
    if top.row_ids.shape[1] < n_tgt or top.col_ids.shape[1] < n_src:
        floor[:2] = min(top.row_scores[:, -1].max(), top.col_scores[:, -1].max())
    return Evidence(cosine, group, np.maximum(total, 0), floor, _spread(found), anchor, around)


def _rivalled(edges: Candidates, high: Bool[np.ndarray, " edges"], n_src: int, n_tgt: int) -> tuple[np.ndarray, int]:
    """Whether another edge of either end has a high cosine, and how many of all pairs have no such rival.

    A child's parent usually has its own counterpart, a feature's only counterpart has no rival. The edge's own cosine
    does not enter, so that within a group it keeps its distribution.
    """
    rows, cols = (np.bincount(ids[high], minlength=n) for ids, n in ((edges.source, n_src), (edges.target, n_tgt)))
    rival = (rows[edges.source] > high) | (cols[edges.target] > high)
    return rival, int(np.sum(rows == 0)) * int(np.sum(cols == 0)) + int(np.sum(high & ~rival))


def _spread(found: SeededMap) -> float:
    """Standard deviation of the cosine over all pairs but those of the map, without making them."""
    x, y = found.joint
    seen = np.einsum("nd,nd->n", x[found.pairs[:, 0]], y[found.pairs[:, 1]])
    square = np.sum((x.T @ x) * (y.T @ y)) - seen @ seen
    mean = x.sum(axis=0) @ y.sum(axis=0) - seen.sum()
    n = max(len(x) * len(y) - len(seen), 1)
    return float(np.sqrt(max(square / n - (mean / n) ** 2, 1e-12)))


class FusedAligner(Aligner):
    """Seeded map, decoder cosine and co-firing, fused into a probability per edge.

    φ of the codes gives seeds and, with the geometric neighbours, the candidate graph; a ridge map of decoder rows is
    learned from the seeds and refitted on the pairs it is confident of; each edge is judged through a map that has not
    seen it (``seeded.SeededMap.cosines``), against what its stratum of activation evidence usually holds
    (``confidence.judge``). No residuals are needed.

    ``matches`` are the mutual best edges, ``score`` is the probability that a match is right, and ``q_value`` the
    expected share of wrong ones among those at least as probable; filter by it. The coupling keeps every edge that is
    more likely right than wrong and within ``level``, so that a concept that is one feature here and two there stays
    two edges; its mass is the probability. Features too rare, dead or always on are counted in ``info`` as untestable
    and are neither matched nor called unmatched; ``info["unmatched_source"]`` and ``_target`` count testable features
    without an edge in the coupling.

    Memory: three copies of either side's testable directions in float64, ``seeded.EDGES`` directions, the candidate
    edges (at most ``4·k`` a feature), and what ``partners.top_partners`` and ``topk.topk_cosine`` state.

    Args:
        min_support: Rows a feature must fire on to be testable; few, since geometry carries rare features.
        k: Partners listed for each feature by either kind of evidence.
        level: Expected share of wrong edges that the coupling may hold.
        max_iter: Rounds of the map at most, and of its refits.
    """

    method = "fused"

    def __init__(self, *, min_support: int = 3, k: int = 16, level: float = 0.05, max_iter: int = 10) -> None:
        self.min_support = min_support
        self.k = k
        self.level = level
        self.max_iter = max_iter

    def needs(self) -> frozenset[str]:
        """Paired activations; residuals are not used."""
        return frozenset({"pairs"})

    def score(self, heldout: PairedActivations, *, n_null: int = 20, seed: int = 0) -> Alignment:
        """Fill the held-out columns; the q-value becomes the larger of the fit's own and that of the shift null."""
        own = self._fitted("score").matches["q_value"]
        scored = super().score(heldout, n_null=n_null, seed=seed)
        return dataclasses.replace(
            scored, matches={**scored.matches, "q_value": np.maximum(own, scored.matches["q_value"])}
        )

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        assert pairs is not None
        left, right, info = usable_features(pairs, self.min_support)
        src, tgt = (
            ids[np.linalg.norm(view.directions[ids], axis=1) > 0]
            for ids, view in ((left.ids, source), (right.ids, target))
        )
        if not len(src) or not len(tgt):
            raise TransferError("No testable feature of one side has a direction.", "Check the SAE's decoder.")
        info["zero_directions_source"] = len(left.ids) - len(src)
        info["zero_directions_target"] = len(right.ids) - len(tgt)
        codes = PairedCodes.of([(sp.csr_matrix(pairs.source[:, src]), sp.csr_matrix(pairs.target[:, tgt]))])
        fused = fuse(source.directions[src], target.directions[tgt], codes, self.k, self.max_iter)
        edges, judged = fused.edges, fused.judged
        best = fused.best
        matches = match_columns(src[edges.source[best]], tgt[edges.target[best]], judged.confidence[best])
        matches["q_value"] = q_values(matches["score"])
        kept = np.flatnonzero(q_values(judged.confidence) <= self.level)
        mass = judged.confidence[kept].astype(np.float32)
        at = (src[edges.source[kept]], tgt[edges.target[kept]])
        coupling = sp.csr_matrix((mass, at), shape=(source.space.n_features, target.space.n_features))
        info.update(_account(fused, len(src), len(tgt), kept))
        return self._alignment(
            source,
            target,
            matches,
            coupling,
            converged=fused.map.converged and fused.refits[-1] <= SETTLED and judged.converged,
            n_iter=fused.map.rounds + len(fused.refits),
            info=info,
        )


def _account(fused: Fusion, n_src: int, n_tgt: int, kept: np.ndarray) -> dict[str, Any]:
    """What a reader needs to trust the fit, for ``Alignment.info``."""
    edges, judged, found = fused.edges, fused.judged, fused.map
    return {
        "map_rounds": found.rounds,
        "map_pairs": len(found.pairs),
        "map_refits": len(fused.refits),
        "map_strength": found.forward.strength,
        "map_strength_back": found.backward.strength,
        "map_cycle_error": found.cycle_error,
        "n_edges": len(edges.source),
        "n_coupled": len(kept),
        "same_from_cosine": judged.boundary,
        "expected_wrong": float(np.sum(1 - judged.confidence[kept])),
        "unmatched_source": n_src - len(np.unique(edges.source[kept])),
        "unmatched_target": n_tgt - len(np.unique(edges.target[kept])),
    }

"""The default aligner: activations propose, geometry in a learned common space judges, both say how sure a match is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from aligners.base import Aligner, match_columns
from aligners.canonical import CanonicalSpace, canonical_space
from aligners.coactivation import PairedCodes
from aligners.confidence import SAME, Evidence, Judged, anchors, judge, q_values
from aligners.correlation import usable_features
from aligners.counterpart import counterpart_cosine
from aligners.partners import Partners, top_partners
from aligners.seeded import SETTLED, SeededMap, difference, seeded_map
from aligners.selection import Rule, mutual_best, select_edges
from aligners.topk import TopK
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.rows import ChosenRows, Rows
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

Geometry = Literal["auto", "residuals", "pairs"]
RANKS = (1, 2, 4, 8)
"""Edges of the rank classes by which activation evidence is grouped."""
LEVELS = 3
"""Groups by φ within a rank class."""
ROUNDS = 10
"""Rounds of a space learned from pairs, and of its refits, at most."""
ENOUGH = 8
"""Confident pairs that a map is refitted on, at least."""


Space = CanonicalSpace | SeededMap
"""Where directions of both sides are compared."""


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
    """Judged edges, and how their common space came about."""

    edges: Candidates
    cosine: Float[np.ndarray, " edges"]
    judged: Judged
    info: dict[str, Any]
    n_iter: int = 1
    """Times the space was learned."""
    unsettled: float = 0.0
    """Share of the pairs that are wrong at least, where they still changed: a pair that comes and goes is wrong in one
    of two rounds."""
    converged: bool = True


def fuse_through_pairs(
    x: Float[np.ndarray, "n_src d_src"], y: Float[np.ndarray, "n_tgt d_tgt"], codes: PairedCodes, k: int, max_iter: int
) -> Fusion:
    """Learn the space from feature pairs that fire together, and again from those found confident in it.

    Raises:
        TransferError: When fewer than two pairs of features fire together.
    """
    rows, cols = top_partners(codes, k, "phi")
    mutual = np.flatnonzero(rows.ids[:, 0] >= 0)
    mutual = mutual[cols.ids[rows.ids[mutual, 0], 0] == mutual]
    seeds = np.stack([mutual, rows.ids[mutual, 0]], axis=1)
    found, top = seeded_map(x, y, seeds, max_iter=min(max_iter, ROUNDS), neighbours=k)
    refits: list[float] = []
    while True:
        edges, cosine, judged = _judged(rows, cols, found, top, max_iter)
        likely = np.flatnonzero(judged.confidence >= 0.5)
        keep = likely[mutual_best(edges.source[likely], edges.target[likely], cosine[likely])]
        pairs = np.stack([edges.source[keep], edges.target[keep]], axis=1)
        refits.append(difference(pairs, found.pairs))
        if refits[-1] <= SETTLED or len(refits) >= min(max_iter, ROUNDS) or len(pairs) < ENOUGH:
            break
        found = SeededMap.through(found.source, found.target, pairs, found.changed)
        top = found.nearest(k)
    return Fusion(
        edges,
        cosine,
        judged,
        {
            "geometry": "pairs",
            "map_rounds": found.rounds,
            "map_pairs": len(found.pairs),
            "map_refits": len(refits),
            "map_strength": found.forward.strength,
            "map_strength_back": found.backward.strength,
            "map_cycle_error": found.cycle_error,
        },
        n_iter=found.rounds + len(refits),
        unsettled=refits[-1] / 2 if refits[-1] > SETTLED else 0.0,
        converged=found.converged and refits[-1] <= SETTLED and judged.converged,
    )


def fuse_through_residuals(
    x: Rows,
    y: Rows,
    codes: PairedCodes,
    k: int,
    max_iter: int,
    residual_x: Rows,
    residual_y: Rows,
    docs: Int[np.ndarray, " rows"],
) -> Fusion:
    """Learn the space from the residuals of paired positions; no feature pair is used, so none is judged by itself.

    Raises:
        TransferError: As ``canonical_space``.
    """
    found = canonical_space(x, y, residual_x, residual_y, docs)
    rows, cols = top_partners(codes, k, "phi")
    reach = counterpart_cosine(found, codes, residual_x, residual_y)
    edges, cosine, judged = _judged(rows, cols, found, found.nearest(k), max_iter, reach)
    return Fusion(
        edges,
        cosine,
        judged,
        {
            "geometry": "residuals",
            "counterpart_cosine": reach,
            "space_width": len(found.correlations),
            "space_rows": found.rows,
            "space_correlation": float(found.correlations.mean()),
        },
        converged=judged.converged,
    )


def _judged(
    rows: Partners, cols: Partners, found: Space, top: TopK, max_iter: int, reach: float = 0.0
) -> tuple[Candidates, np.ndarray, Judged]:
    edges = candidates(rows, cols, top)
    evidence = _evidence(edges, found, top, reach)
    return edges, evidence.cosine, judge(evidence, max_iter)


def _evidence(edges: Candidates, found: Space, top: TopK, reach: float) -> Evidence:
    """What the judge is told; "the same" is never set below ``reach``, for where all pairs are merely related."""
    cosine = found.cosines(edges.source, edges.target)
    acts = np.flatnonzero(np.isfinite(edges.phi))
    best = acts[mutual_best(edges.source[acts], edges.target[acts], cosine[acts])]
    anchor, around = anchors(cosine[best])
    spread = _spread(found)
    if reach > anchor:
        anchor, around = reach, spread
    n_src, n_tgt = (len(side) for side in found.joint)
    rival, alone = _rivalled(edges, cosine >= SAME * anchor, n_src, n_tgt)
    group = 2 * strata(edges) + rival
    total = np.bincount(group, minlength=2)
    total[0] = alone - total[2::2].sum()
    total[1] = n_src * n_tgt - alone - total[3::2].sum()
    floor = np.full(len(total), -1.0)
    if top.row_ids.shape[1] < n_tgt or top.col_ids.shape[1] < n_src:
        floor[:2] = min(top.row_scores[:, -1].max(), top.col_scores[:, -1].max())
    return Evidence(cosine, group, np.maximum(total, 0), floor, spread, anchor, around)


def _rivalled(edges: Candidates, high: Bool[np.ndarray, " edges"], n_src: int, n_tgt: int) -> tuple[np.ndarray, int]:
    """Whether another edge of either end has a high cosine, and how many of all pairs have no such rival.

    A child's parent usually has its own counterpart, a feature's only counterpart has no rival. The edge's own cosine
    does not enter, so that within a group it keeps its distribution.
    """
    rows, cols = (np.bincount(ids[high], minlength=n) for ids, n in ((edges.source, n_src), (edges.target, n_tgt)))
    rival = (rows[edges.source] > high) | (cols[edges.target] > high)
    return rival, int(np.sum(rows == 0)) * int(np.sum(cols == 0)) + int(np.sum(high & ~rival))


def _spread(found: Space) -> float:
    """Standard deviation of the cosine over all pairs but those the space was learned from, without making them."""
    x, y = found.joint
    seen = np.einsum("nd,nd->n", x[found.pairs[:, 0]], y[found.pairs[:, 1]])
    square = np.sum((x.T @ x) * (y.T @ y), dtype=np.float64) - seen @ seen
    mean = x.sum(axis=0, dtype=np.float64) @ y.sum(axis=0, dtype=np.float64) - seen.sum()
    n = max(len(x) * len(y) - len(seen), 1)
    return float(np.sqrt(max(square / n - (mean / n) ** 2, 1e-12)))


class FusedAligner(Aligner):
    """Co-firing and decoder cosine in a common space, fused into a probability per edge.

    φ of the codes and the cosine in the common space propose the candidate graph; each edge is judged by its cosine
    against what its stratum of activation evidence usually holds (``confidence.judge``). The common space is the
    canonical one of the paired residuals (``canonical.canonical_space``) where they were kept. Otherwise it is learned
    from features that fire together, and again from those that then look the same; an edge is judged through a map
    that has not seen it (``seeded.SeededMap.cosines``).

    ``score`` is the probability that a match is right, and ``q_value`` the expected share of wrong ones among those at
    least as probable, and never less than half the share of pairs that a space learned from pairs still exchanged when
    it stopped; filter by it. By default ``matches`` are the mutual best edges, and the coupling keeps every edge
    that is more likely right than wrong and within ``level``, with its probability as mass, so that a concept that is
    one feature here and two there stays two edges.

    What counts as "the same" is set by the data: by the upper level of the cosines of the best pairs
    (``info["same_from_cosine"]``), and where residuals were kept not below what a counterpart may be expected to reach
    (``counterpart.counterpart_cosine``): two spaces that share nothing but related features give no match. A space
    learned from feature pairs has no such check: there, pairs that are merely related, in activation and in direction,
    set the level themselves where nothing else is shared; some forty features that are prevent it.

    Features too rare, dead or always on are counted in ``info`` as untestable and are neither matched nor called
    unmatched; ``info["unmatched_source"]`` and ``_target`` count testable features without an edge in the coupling.

    Memory: the candidate edges (at most ``4·k`` a feature), what ``partners.top_partners``, ``topk.topk_cosine`` and
    ``canonical.canonical_space`` state; without residuals three copies of either side's directions in float64 instead
    of the latter.

    Args:
        min_support: Rows a feature must fire on to be testable; few, since geometry carries rare features.
        k: Partners listed for each feature by either kind of evidence.
        level: Expected share of wrong edges that the coupling may hold.
        geometry: Where the common space comes from: ``residuals``, feature ``pairs``, or ``auto``: residuals if any.
        rule: How matches are chosen among judged edges; see ``selection.select_edges``.
        max_iter: Iterations at most, of the judge and of transport each.
        tol: Largest marginal error of a converged transport.
    """

    method = "fused"

    def __init__(
        self,
        *,
        min_support: int = 3,
        k: int = 16,
        level: float = 0.05,
        geometry: Geometry = "auto",
        rule: Rule = "mutual",
        max_iter: int = 2000,
        tol: float = 1e-4,
    ) -> None:
        self.min_support = min_support
        self.k = k
        self.level = level
        self.geometry: Geometry = geometry
        self.rule: Rule = rule
        self.max_iter = max_iter
        self.tol = tol

    def needs(self) -> frozenset[str]:
        """Paired activations, and their residuals if they are asked for."""
        return frozenset({"pairs", "residuals"} if self.geometry == "residuals" else {"pairs"})

    def takes(self) -> frozenset[str]:
        """Residuals too, unless the space is to come from feature pairs."""
        return frozenset({"pairs"} if self.geometry == "pairs" else {"pairs", "residuals"})

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        assert pairs is not None
        if self.geometry not in ("auto", "residuals", "pairs"):
            raise TransferError(f"Unknown geometry {self.geometry!r}.", "Use 'auto', 'residuals' or 'pairs'.")
        if not (0 < self.level <= 1 and self.tol > 0 and self.max_iter >= 1 and self.k >= 1):
            raise TransferError(
                f"The fused aligner needs 0 < level ≤ 1, tol > 0, max_iter ≥ 1 and k ≥ 1; got level={self.level}, "
                f"tol={self.tol}, max_iter={self.max_iter}, k={self.k}."
            )
        left, right, info = usable_features(pairs, self.min_support)
        src, tgt = (
            ids[np.einsum("nd,nd->n", view.directions, view.directions)[ids] > 0]
            for ids, view in ((left.ids, source), (right.ids, target))
        )
        if not len(src) or not len(tgt):
            raise TransferError("No testable feature of one side has a direction.", "Check the SAE's decoder.")
        info["zero_directions_source"] = len(left.ids) - len(src)
        info["zero_directions_target"] = len(right.ids) - len(tgt)
        info["testable_source"], info["testable_target"] = len(src), len(tgt)
        codes = PairedCodes.of([(sp.csr_matrix(pairs.source[:, src]), sp.csr_matrix(pairs.target[:, tgt]))])
        x, y = ChosenRows(source.directions, src), ChosenRows(target.directions, tgt)
        k = min(self.k, max(len(src), len(tgt)))
        kept_residuals = pairs.source_residual is not None and pairs.target_residual is not None
        if kept_residuals and self.geometry != "pairs":
            assert pairs.source_residual is not None and pairs.target_residual is not None
            fused = fuse_through_residuals(
                x, y, codes, k, self.max_iter, pairs.source_residual, pairs.target_residual, pairs.docs
            )
        else:
            fused = fuse_through_pairs(x[:], y[:], codes, k, self.max_iter)
        edges, confidence = fused.edges, fused.judged.confidence
        chosen = select_edges(
            edges.source,
            edges.target,
            fused.judged,
            fused.cosine,
            (len(src), len(tgt)),
            self.rule,
            level=self.level,
            least_q=fused.unsettled,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        at = chosen.chosen
        matches = match_columns(src[edges.source[at]], tgt[edges.target[at]], confidence[at])
        matches["q_value"] = matches["fit_q"] = np.maximum(q_values(matches["score"]), fused.unsettled)
        held = chosen.coupling.tocoo()
        shape = (source.space.n_features, target.space.n_features)
        return self._alignment(
            source,
            target,
            matches,
            sp.csr_matrix((held.data, (src[held.row], tgt[held.col])), shape=shape),
            converged=fused.converged and chosen.converged,
            n_iter=fused.n_iter + chosen.n_iter,
            row_error=chosen.row_error,
            col_error=chosen.col_error,
            cost=chosen.cost,
            duality_gap=chosen.info.get("relative_gap", float("nan")),
            info={
                **info,
                **fused.info,
                **chosen.info,
                "n_edges": len(edges.source),
                "n_coupled": held.nnz,
                "same_from_cosine": fused.judged.boundary,
                "unmatched_source": len(src) - len(np.unique(held.row)),
                "unmatched_target": len(tgt) - len(np.unique(held.col)),
            },
        )

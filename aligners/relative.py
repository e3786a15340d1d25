"""Match features by where they stand towards reference pairs: relative representations (arXiv 2209.15430)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.assignment import Rule
from aligners.base import Aligner, coupling_of, match_columns
from aligners.coactivation import PairedCodes
from aligners.correlation import usable_features
from aligners.csls import csls_nearest
from aligners.partners import Partners, top_partners
from aligners.sparse_assignment import sparse_one_to_one
from aligners.topk import TopK, topk_cosine, unit_rows
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

NEIGHBOURS = 10
"""Partners in the lists of CSLS and of the assignment."""
BLOCK = 4096
"""Directions made float64 at once."""
LEAST = 1e-3
"""A second-best φ below this counts as this: what is below is noise."""
FEWEST = 3
"""Reference pairs below which positions say nothing."""


@dataclass(frozen=True)
class References:
    """Pairs of features taken as matched, most trusted first."""

    pairs: Int[np.ndarray, "pairs 2"]
    """(source, target) columns of the codes; each feature stands in at most one pair."""
    phi: Float[np.ndarray, " pairs"]
    ratio: Float[np.ndarray, " pairs"]
    """φ over the second-best φ that either end has."""


def reference_pairs(codes: PairedCodes, limit: int | None = None) -> References:
    """Mutual best pairs by φ, those that beat their runner-up by the largest factor first.

    φ itself is no confidence: a child without noise of its own fires more with its parent's counterpart than a true
    pair does. But then that counterpart has a near rival, which an unambiguous pair lacks (the ratio test of Lowe
    2004). On the planted stress test 97 % of the best 200 by ratio are right, 9 % of the best 200 by φ.

    Memory: what ``top_partners`` takes for two partners.

    Args:
        codes: Of testable features.
        limit: Pairs at most; all if None.
    """
    rows, cols = top_partners(codes, 2, "phi")
    source = np.flatnonzero(rows.ids[:, 0] >= 0)
    source = source[cols.ids[rows.ids[source, 0], 0] == source]
    target = rows.ids[source, 0]
    phi = rows.scores[source, 0]
    ratio = phi / np.maximum(np.maximum(_second(rows, source), _second(cols, target)), LEAST)
    best = np.lexsort((source, -phi, -ratio))[:limit]
    return References(np.stack([source, target], axis=1)[best], phi[best], ratio[best])


def _second(found: Partners, ids: np.ndarray) -> np.ndarray:
    return found.scores[ids, 1] if found.scores.shape[1] > 1 else np.full(len(ids), LEAST)


def relative_rows(
    directions: Float[np.ndarray, "n d"], ids: Int[np.ndarray, " features"], members: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, "features pairs"]:
    """Cosine of each feature with the features ``members`` of the reference pairs, in rows of length one.

    Directions are freed from their common mean, and so are the columns. A reference's cosine with itself is set to 0:
    otherwise both ends of a reference pair would agree because they were paired, not because of where they stand. The
    inner product of two rows then leaves out both features' own pairs.

    Memory: features × pairs in float64, and 4,096 directions.

    Args:
        directions: Rows of one side; float32 or float64.
        ids: Features, with directions.
        members: Positions in ``ids``.

    Raises:
        TransferError: When a direction is zero, or nothing is left of a row.
    """
    parts = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]
    total = np.zeros(directions.shape[1])
    for part in parts:
        total += unit_rows(directions[part].astype(np.float64)).sum(axis=0)
    mean = total / len(ids)

    def centred(part: np.ndarray) -> np.ndarray:
        return unit_rows(unit_rows(directions[part].astype(np.float64)) - mean)

    anchors = np.concatenate([centred(ids[members[s : s + BLOCK]]) for s in range(0, len(members), BLOCK)])
    out = np.empty((len(ids), len(members)))
    for start, part in zip(range(0, len(ids), BLOCK), parts, strict=True):
        np.matmul(centred(part), anchors.T, out=out[start : start + len(part)])
    out[members, np.arange(len(members))] = 0.0
    out -= out.mean(axis=0)
    return unit_rows(out)


def usable_directions(
    source: FeatureView, target: FeatureView, pairs: PairedActivations, min_support: int
) -> tuple[Int[np.ndarray, " n_src"], Int[np.ndarray, " n_tgt"], dict[str, int]]:
    """Features of both sides that fire often enough and have a direction, and the counts for ``Alignment.info``.

    Raises:
        TransferError: When a side has none.
    """
    left, right, info = usable_features(pairs, min_support)
    found = []
    for side, ids, view in (("source", left.ids, source), ("target", right.ids, target)):
        keep = ids[np.linalg.norm(view.directions[ids], axis=1) > 0]
        info[f"zero_directions_{side}"] = len(ids) - len(keep)
        if not len(keep):
            raise TransferError(f"No testable {side} feature has a direction.", "Check the SAE's decoder.")
        found.append(keep)
    return found[0], found[1], info


def restricted(pairs: PairedActivations, src: Int[np.ndarray, " n"], tgt: Int[np.ndarray, " m"]) -> PairedCodes:
    """The codes of these features."""
    return PairedCodes.of([(sp.csr_matrix(pairs.source[:, src]), sp.csr_matrix(pairs.target[:, tgt]))])


class RelativeAligner(Aligner):
    """Decoder directions compared by their cosines to reference pairs, without any map between the spaces.

    Reference pairs come from activations (``reference_pairs``); every feature is then described by its cosines to its
    own side's ends of them (Moschella et al. 2209.15430), which both sides share however they are turned. No
    residuals are needed, and geometry need not be related by a linear map. ``score`` is the cosine of the two
    descriptions without the pairs that hold either feature.

    It stands and falls with cosines that agree across the models. ``info["references_kept"]`` tells: the share of the
    reference pairs that are matched again, each without its own column (.8 on the planted stress test; .09 between the
    zoo's LLaMA and Mistral, whose matched directions have an RSA of .18, and there most matches are wrong). Most
    features without counterpart still have some mutual neighbour, with a low score: score on held-out documents.

    Memory: (n_src + n_tgt) × references in float64 (0.5 GB at 65,536 features a side and 512 references), and what
    ``top_partners`` and ``topk_cosine`` take. Work: 2·n·references·(d + n).

    Args:
        references: Reference pairs at most.
        rule: ``mutual`` (each other's best by CSLS) or ``one_to_one`` (largest total cosine along the ten best
            partners of every feature).
        min_support: Rows a feature must fire on to be testable; few, since geometry carries rare features.
    """

    method = "relative"

    def __init__(self, *, references: int = 512, rule: Rule = "mutual", min_support: int = 3) -> None:
        self.references = references
        self.rule: Rule = rule
        self.min_support = min_support

    def needs(self) -> frozenset[str]:
        """Paired activations; residuals are not used."""
        return frozenset({"pairs"})

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        assert pairs is not None
        if self.rule not in ("mutual", "one_to_one"):
            raise TransferError(f"Unknown matching rule {self.rule!r}.", "Use 'mutual' or 'one_to_one'.")
        src, tgt, info = usable_directions(source, target, pairs, self.min_support)
        found = reference_pairs(restricted(pairs, src, tgt), self.references)
        if len(found.pairs) < FEWEST:
            raise TransferError(
                f"Only {len(found.pairs)} reference pairs fire together; positions need {FEWEST}.",
                "Pair more text or lower min_support.",
            )
        x = relative_rows(source.directions, src, found.pairs[:, 0])
        y = relative_rows(target.directions, tgt, found.pairs[:, 1])
        top = topk_cosine(x, y, NEIGHBOURS)
        rows, cols = csls_nearest(top).mutual() if self.rule == "mutual" else sparse_one_to_one(_edges(top))
        cosine = np.einsum("na,na->n", x[rows], y[cols])
        keep = cosine > 0
        matches = match_columns(src[rows[keep]], tgt[cols[keep]], np.minimum(cosine[keep], 1.0))
        kept = set(zip(rows[keep].tolist(), cols[keep].tolist(), strict=True))
        return self._alignment(
            source,
            target,
            matches,
            coupling_of(matches, (source.space.n_features, target.space.n_features)),
            info={
                **info,
                "reference_pairs": len(found.pairs),
                "reference_ratio": float(np.median(found.ratio)),
                "references_kept": sum((i, j) in kept for i, j in found.pairs.tolist()) / len(found.pairs),
            },
        )


def _edges(top: TopK) -> sp.csr_matrix:
    """Union of the lists of both sides, with cosines."""
    (n_src, k_row), (n_tgt, k_col) = top.row_ids.shape, top.col_ids.shape
    rows = np.concatenate([np.repeat(np.arange(n_src), k_row), top.col_ids.ravel()])
    cols = np.concatenate([top.row_ids.ravel(), np.repeat(np.arange(n_tgt), k_col)])
    cosine = np.concatenate([top.row_scores.ravel(), top.col_scores.ravel()])
    _, first = np.unique(rows * n_tgt + cols, return_index=True)
    return sp.csr_matrix((cosine[first], (rows[first], cols[first])), shape=(n_src, n_tgt))

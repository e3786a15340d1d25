"""Entropic optimal transport over the testable features, with the option of no match."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float

from aligners.assignment import DENSE_LIMIT, mutual_nearest
from aligners.base import Aligner, match_columns
from aligners.correlation import Codes, correlation_blocks, usable_features
from aligners.decoder import Comparable, comparable, decoder_needs, hub_means
from aligners.dense_ot import all_pairs, transport
from aligners.topk import topk_blocks
from aligners.transport import Problem, transport_matches
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

Cost = Literal["activation", "map", "unembedding", "fused"]
KEEP = 8
"""Entries of the plan kept per row and per column."""
MAX_COST = 5.0
"""No pair that costs this much beats the slack, and larger costs would only force the slow log domain."""


def keep_largest(mass: Float[np.ndarray, "n m"], k: int = KEEP) -> Bool[np.ndarray, "n m"]:
    """The ``k`` largest positive entries of every row and of every column."""
    keep = np.zeros(mass.shape, dtype=bool)
    rows = np.argpartition(-mass, min(k, mass.shape[1]) - 1, axis=1)[:, :k]
    np.put_along_axis(keep, rows, True, axis=1)
    cols = np.argpartition(-mass, min(k, mass.shape[0]) - 1, axis=0)[:k]
    np.put_along_axis(keep, cols, True, axis=0)
    return keep & (mass > 0)


def typical(similarity: Float[np.ndarray, "n m"]) -> float:
    """Median similarity of mutual nearest neighbours: the unit in which one kind of evidence is measured."""
    rows, cols = mutual_nearest(topk_blocks([(0, similarity)], similarity.shape, 1))
    value = float(np.median(similarity[rows, cols])) if len(rows) else 0.0
    return value if value > 0 else 1.0


class SinkhornAligner(Aligner):
    """Entropic optimal transport (POT) on the cost ``1 − similarity``, with slack for features without counterpart.

    Similarities are divided by that of their typical mutual nearest neighbour, so that activation and decoder
    evidence count alike and ``reg`` and ``slack`` mean the same for every cost. ``slack`` is therefore relative: where
    nothing is shared, chance pairs look typical, and only the held-out score tells. Matches are mutual largest
    entries of the plan that beat the slack on both sides, their score is the share of a feature's unit that goes
    there. The coupling keeps the 8 largest entries a row and a column; ``info`` says how much mass that drops, and how
    far the plan may cost more than the best one stands in ``duality_gap`` (of the problem without entropy).

    Args:
        cost: ``activation``, ``map``, ``unembedding``, or ``fused`` (equal weights of activation and map).
        reg: Entropic regularisation, in units of the typical mutual match.
        slack: A pair may cost this much before leaving both unmatched is cheaper; None matches everything.
        max_iter: Iterations at most; a fit that needs more says ``converged = False``.
        tol: Largest relative marginal error, each side, of a converged fit.
        min_support: Rows a feature must fire on to be testable.
        seed: Of the inner split of the residual map.
    """

    method = "sinkhorn"

    def __init__(
        self,
        *,
        cost: Cost = "fused",
        reg: float = 0.05,
        slack: float | None = 0.8,
        max_iter: int = 2000,
        tol: float = 1e-4,
        min_support: int = 10,
        seed: int = 0,
    ) -> None:
        self.cost: Cost = cost
        self.reg = reg
        self.slack = slack
        self.max_iter = max_iter
        self.tol = tol
        self.min_support = min_support
        self.seed = seed

    def needs(self) -> frozenset[str]:
        """What the chosen cost needs."""
        if self.cost == "activation":
            return frozenset({"pairs"})
        return decoder_needs("map" if self.cost == "fused" else self.cost)

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        if self.cost not in ("activation", "map", "unembedding", "fused"):
            raise TransferError(f"Unknown cost {self.cost!r}.", "Use 'activation', 'map', 'unembedding' or 'fused'.")
        similarity, src_ids, tgt_ids, info = self._similarity(source, target, pairs)
        problem = Problem.of(all_pairs(np.clip(1 - similarity, 0, MAX_COST)), slack=self.slack)
        plan = transport(problem, reg=self.reg, max_iter=self.max_iter, tol=self.tol)
        # Shares of what one feature carries; without slack the smaller side's unit counts as one.
        unit = min(1.0, float(problem.target_mass[0]))
        mass = plan.coupling.toarray() / unit
        rows, cols, _ = transport_matches(plan)
        at = np.nonzero(keep_largest(mass))
        kept = mass[at].astype(np.float32)
        coupling = sp.csr_matrix(
            (kept, (src_ids[at[0]], tgt_ids[at[1]])), shape=(source.space.n_features, target.space.n_features)
        )
        total = float(mass.sum())
        cost = float(plan.coupling.multiply(problem.cost).sum())
        info["dropped_mass"] = 1 - float(kept.sum(dtype=np.float64)) / total if total > 0 else 0.0
        info["unmatched_mass_source"] = float(plan.row_slack.mean())
        info["unmatched_mass_target"] = float(plan.col_slack.mean())
        info |= {"primal": plan.primal, "dual": plan.dual}
        return self._alignment(
            source,
            target,
            match_columns(src_ids[rows], tgt_ids[cols], mass[rows, cols]),
            coupling,
            converged=plan.converged,
            n_iter=plan.n_iter,
            row_error=plan.row_error,
            col_error=plan.col_error,
            duality_gap=plan.relative_gap,
            cost=cost / (total * unit) if total > 0 else float("nan"),
            info=info,
        )

    def _similarity(
        self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Dense similarity in units of the typical mutual match, the ids of its rows and columns, and the counts."""
        if self.cost == "activation":
            assert pairs is not None
            left, right, info = usable_features(pairs, self.min_support)
            values = _correlations(pairs, left.ids, right.ids)
            return values / typical(values), left.ids, right.ids, dict(info)
        found = comparable(
            source,
            target,
            pairs,
            "map" if self.cost == "fused" else self.cost,
            min_support=self.min_support,
            seed=self.seed,
        )
        values = _cosines(found)
        values /= typical(values)
        if self.cost == "fused":
            assert pairs is not None
            activation = _correlations(pairs, found.source_ids, found.target_ids)
            values = (values + activation / typical(activation)) / 2
            values /= typical(values)
        return values, found.source_ids, found.target_ids, found.info


def _dense(n: int, m: int) -> None:
    if max(n, m) > DENSE_LIMIT:
        raise TransferError(
            f"Dense transport takes at most {DENSE_LIMIT} testable features a side, got {n} × {m}.",
            "Use the method fused with rule=transport, which keeps to candidate edges, or raise min_support.",
        )


def _correlations(pairs: PairedActivations, src_ids: np.ndarray, tgt_ids: np.ndarray) -> np.ndarray:
    _dense(len(src_ids), len(tgt_ids))
    blocks = correlation_blocks(Codes.of(pairs.source, src_ids), Codes.of(pairs.target, tgt_ids))
    return np.vstack([block for _, block in blocks])


def _cosines(found: Comparable) -> np.ndarray:
    """CSLS-corrected cosines, ``cos − (r + r) / 2``: half of CSLS, so that the unit stays that of a cosine."""
    _dense(len(found.source_ids), len(found.target_ids))
    row, col = hub_means(found)
    return found.source @ found.target.T - (row[:, None] + col) / 2

"""Entropic optimal transport over the testable features, with the option of no match."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from aligners.assignment import DENSE_LIMIT, mutual_nearest
from aligners.base import Aligner, match_columns
from aligners.correlation import Codes, correlation_blocks, usable_features
from aligners.decoder import Comparable, comparable, decoder_needs, hub_means
from aligners.topk import topk_blocks
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

Cost = Literal["activation", "map", "unembedding", "fused"]
KEEP = 8
"""Entries of the plan kept per row and per column."""
MAX_COST = 5.0
"""No pair that costs this much beats the slack, and larger costs would only force the slow log domain."""
LOG_DOMAIN = 200.0
"""Above this ratio of cost to reg the kernel would underflow, so the slower log domain is used."""


@dataclass(frozen=True)
class Plan:
    """A transport plan with its own account of itself; masses are shares of what one feature carries."""

    mass: Float[np.ndarray, "n_src n_tgt"]
    row_slack: Float[np.ndarray, " n_src"]
    """Mass of each source feature left unmatched."""
    col_slack: Float[np.ndarray, " n_tgt"]
    row_error: float
    """Σ|row sum − marginal| over Σ marginal, slack included; measured here, not taken from the solver."""
    col_error: float
    n_iter: int
    cost: float
    """Primal cost of the matched part per unit of matched mass; NaN when nothing is matched."""


def entropic_plan(
    cost: Float[np.ndarray, "n_src n_tgt"],
    *,
    reg: float,
    slack: float | None,
    max_iter: int,
    tol: float,
) -> Plan:
    """Balanced entropic transport, with a slack row and column for "no match" (arXiv 1911.11763, Sec. 3.2).

    Every feature carries one unit. With ``slack``, it may leave the unit in a slack bin for half of ``slack``, so that
    a pair is worth matching when it costs less than ``slack``. Without, everything is matched, and the smaller side's
    unit counts as one.

    Raises:
        TransferError: Above ``DENSE_LIMIT`` a side, or for parameters out of range.
    """
    os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")  # POT would import torch otherwise: seconds
    import ot

    if max(cost.shape) > DENSE_LIMIT:
        raise TransferError(
            f"Dense transport takes at most {DENSE_LIMIT} features a side, got {cost.shape[0]} × {cost.shape[1]}.",
            "Use the method fused with rule=transport, which keeps to candidate edges, or raise min_support.",
        )
    if not reg > 0 or max_iter < 1 or not tol > 0 or (slack is not None and not slack > 0):
        raise TransferError(
            f"Transport needs reg > 0, max_iter ≥ 1, tol > 0 and slack > 0 or None; got reg={reg}, "
            f"max_iter={max_iter}, tol={tol}, slack={slack}."
        )
    n, m = cost.shape
    if slack is None:
        full, a, b = cost, np.full(n, 1.0 / n), np.full(m, 1.0 / m)
    else:
        full = np.zeros((n + 1, m + 1))
        full[:n, :m] = cost
        full[n, :m] = full[:n, m] = slack / 2
        a, b = np.append(np.ones(n), m) / (n + m), np.append(np.ones(m), n) / (n + m)
    # Overflow shows in the errors below, which are measured on the plan itself; POT's warnings would only repeat it.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        solved: Any = ot.sinkhorn(
            a,
            b,
            full,
            reg,
            method="sinkhorn" if full.max() <= LOG_DOMAIN * reg else "sinkhorn_log",
            numItermax=max_iter,
            stopThr=0.5 * tol / np.sqrt(len(b)),  # POT stops on a 2-norm, errors here are 1-norms
            log=True,
            warn=False,
        )
    plan, log = solved
    unit = min(a[0], b[0])
    matched = plan[:n, :m]
    carried = float(matched.sum())
    return Plan(
        mass=matched / unit,
        row_slack=plan[:n, m] / unit if slack is not None else np.zeros(n),
        col_slack=plan[n, :m] / unit if slack is not None else np.zeros(m),
        row_error=_error(plan.sum(axis=1), a),
        col_error=_error(plan.sum(axis=0), b),
        n_iter=int(log["niter"]) + 1,
        cost=float(np.sum(matched * cost)) / carried if carried > 0 else float("nan"),
    )


def _error(sums: np.ndarray, marginal: np.ndarray) -> float:
    """Relative 1-norm; a plan that is not finite is wrong by everything."""
    error = float(np.abs(sums - marginal).sum() / marginal.sum())
    return error if np.isfinite(error) else 1.0


def keep_largest(mass: Float[np.ndarray, "n m"], k: int = KEEP) -> Bool[np.ndarray, "n m"]:
    """The ``k`` largest positive entries of every row and of every column."""
    keep = np.zeros(mass.shape, dtype=bool)
    rows = np.argpartition(-mass, min(k, mass.shape[1]) - 1, axis=1)[:, :k]
    np.put_along_axis(keep, rows, True, axis=1)
    cols = np.argpartition(-mass, min(k, mass.shape[0]) - 1, axis=0)[:k]
    np.put_along_axis(keep, cols, True, axis=0)
    return keep & (mass > 0)


def plan_matches(plan: Plan) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Pairs that are each other's largest entry, larger than what either leaves unmatched."""
    top = topk_blocks([(0, plan.mass)], plan.mass.shape, 1)
    rows, cols = mutual_nearest(top)
    mass = plan.mass[rows, cols]
    keep = (mass > plan.row_slack[rows]) & (mass > plan.col_slack[cols]) & (mass > 0)
    return rows[keep], cols[keep]


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
    there. The coupling keeps the 8 largest entries a row and a column; ``info`` says how much mass that drops.

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
        plan = entropic_plan(
            np.clip(1 - similarity, 0, MAX_COST),
            reg=self.reg,
            slack=self.slack,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        finite = bool(np.isfinite(plan.mass).all())
        mass = plan.mass if finite else np.zeros_like(plan.mass)
        rows, cols = plan_matches(plan) if finite else (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        at = np.nonzero(keep_largest(mass))
        kept = mass[at].astype(np.float32)
        coupling = sp.csr_matrix(
            (kept, (src_ids[at[0]], tgt_ids[at[1]])), shape=(source.space.n_features, target.space.n_features)
        )
        total = float(mass.sum())
        info["plan_finite"] = finite
        info["dropped_mass"] = 1 - float(kept.sum(dtype=np.float64)) / total if total > 0 else 0.0
        info["unmatched_mass_source"] = float(plan.row_slack.mean()) if finite else 0.0
        info["unmatched_mass_target"] = float(plan.col_slack.mean()) if finite else 0.0
        return self._alignment(
            source,
            target,
            match_columns(src_ids[rows], tgt_ids[cols], mass[rows, cols]),
            coupling,
            converged=finite and plan.row_error < self.tol and plan.col_error < self.tol,
            n_iter=plan.n_iter,
            row_error=plan.row_error,
            col_error=plan.col_error,
            cost=plan.cost,
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

"""Match features by their distances to each other: fused Gromov-Wasserstein from reference pairs, or cold."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.assignment import DENSE_LIMIT, mutual_nearest
from aligners.base import Aligner, match_columns
from aligners.coactivation import PairedCodes, joint_blocks, measured
from aligners.relative import reference_pairs, relative_rows, restricted, usable_directions
from aligners.seeded import centred
from aligners.sinkhorn import keep_largest, typical
from aligners.topk import topk_blocks
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

Start = Literal["pairs", "cold"]
SIMPLEX_STEPS = 10_000_000
"""Pivots that POT may take for the linear problem of one iteration."""


@dataclass(frozen=True)
class Structure:
    """A plan that keeps distances, with its own account of itself."""

    mass: Float[np.ndarray, "n_src n_tgt"]
    """Rows sum to 1/n_src, columns to 1/n_tgt, up to the errors."""
    loss: float
    """POT's own: (1 − α)⟨cost, plan⟩ + α·Σ (C − C')² plan plan, of the scaled matrices."""
    row_error: float
    """Σ|row sum − marginal|, measured here."""
    col_error: float
    n_iter: int
    converged: bool
    """The loss stopped falling before ``max_iter``; a local optimum, as GW is not convex."""
    warnings: tuple[str, ...]
    """What POT complained about."""


def distances(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    """1 − cosine of the directions without their common mean, divided by its mean; exactly symmetric.

    Raises:
        TransferError: When a direction is zero, or all are the same.
    """
    rows = centred(x)
    found = 1 - rows @ rows.T
    found = (found + found.T) / 2
    np.fill_diagonal(found, 0.0)
    mean = float(found.mean())
    if not mean > 0:
        raise TransferError(f"{len(x)} directions have no distances to compare.", "Pass more features.")
    return found / mean


def fused_plan(
    left: Float[np.ndarray, "n_src n_src"],
    right: Float[np.ndarray, "n_tgt n_tgt"],
    cost: Float[np.ndarray, "n_src n_tgt"] | None,
    start: Float[np.ndarray, "n_src n_tgt"] | None,
    *,
    alpha: float,
    max_iter: int,
    tol: float,
) -> Structure:
    """Fused Gromov-Wasserstein by POT's conditional gradient (Vayer et al. 1805.09114), square loss.

    Memory: about 12 arrays of n_src × n_tgt in float64 (1.6 GB at 4,096). Work: O(n³) an iteration, and a dense
    network simplex.

    Args:
        left: Distances within the source.
        right: Within the target.
        cost: Between features; None for plain GW (``alpha`` is then not used).
        start: Plan to start from; None for the product of the marginals.
        alpha: Weight of the distances, in 0..1.
        max_iter: Iterations at most.
        tol: Relative and absolute change of the loss at which it stops.

    Raises:
        TransferError: Above ``DENSE_LIMIT`` features a side, or for parameters out of range.
    """
    os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")  # POT would import torch otherwise: seconds
    import ot

    n, m = len(left), len(right)
    refuse_large(n, m)
    if not 0 <= alpha <= 1 or max_iter < 1 or not tol > 0:
        raise TransferError(
            f"Gromov-Wasserstein needs alpha in 0..1, max_iter ≥ 1 and tol > 0; got alpha={alpha}, "
            f"max_iter={max_iter}, tol={tol}."
        )
    p, q = np.full(n, 1 / n), np.full(m, 1 / m)
    settings: dict[str, Any] = {
        "symmetric": True,
        "G0": start,
        "log": True,
        "max_iter": max_iter,
        "tol_rel": tol,
        "tol_abs": tol,
        "numItermaxEmd": SIMPLEX_STEPS,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solved: Any = (
            ot.gromov.gromov_wasserstein(left, right, p, q, **settings)
            if cost is None
            else ot.gromov.fused_gromov_wasserstein(cost, left, right, p, q, alpha=alpha, **settings)
        )
    plan, log = solved
    n_iter = len(log["loss"]) - 1
    said = tuple(sorted({str(w.message) for w in caught}))
    return Structure(
        mass=plan,
        loss=float(log["loss"][-1]),
        row_error=float(np.abs(plan.sum(axis=1) - p).sum()),
        col_error=float(np.abs(plan.sum(axis=0) - q).sum()),
        n_iter=n_iter,
        converged=n_iter < max_iter and not said and bool(np.isfinite(plan).all()),
        warnings=said,
    )


def refuse_large(n: int, m: int) -> None:
    """Raise above ``DENSE_LIMIT`` features a side.

    Raises:
        TransferError: With the repair.
    """
    if max(n, m) > DENSE_LIMIT:
        raise TransferError(
            f"Gromov-Wasserstein takes at most {DENSE_LIMIT} testable features a side, got {n} × {m}.",
            "Raise min_support so that fewer are testable, pass a block of features, or use the relative aligner.",
        )


def warm_start(pairs: Int[np.ndarray, "pairs 2"], shape: tuple[int, int]) -> Float[np.ndarray, "n_src n_tgt"]:
    """A plan with uniform marginals that puts all mass it can on the pairs and spreads the rest evenly."""
    n, m = shape
    plan = np.zeros(shape)
    plan[pairs[:, 0], pairs[:, 1]] = min(1 / n, 1 / m)
    rows, cols = np.maximum(1 / n - plan.sum(axis=1), 0), np.maximum(1 / m - plan.sum(axis=0), 0)
    return plan + np.outer(rows, cols) / rows.sum() if rows.sum() > 0 else plan


class GromovAligner(Aligner):
    """Fused Gromov-Wasserstein on decoder directions, started from features that fire together; or cold.

    ``start="pairs"``: the plan starts at ``relative.reference_pairs`` and the linear cost is ``1 − φ`` in units of the
    typical mutual pair, so distances only have to settle what activations leave open. Both costs are divided by their
    means; ``alpha`` near one is then right (.5 leaves the plan to φ and its confusions).

    ``start="cold"``: plain GW from the uniform plan, decoder rows only. It is here as the negative control: it finds
    exact copies, whose mean distances are equal, and otherwise a local optimum (at a relational similarity of .70 to
    .98, at most 6 % of the matches where the seeded start finds all).

    Every feature must place its mass, so features without counterpart are matched too. ``score`` tells them apart: the
    cosine of both features' positions towards all other matches (``relative.relative_rows``); it may be negative. The
    coupling keeps the 8 largest entries a row and a column as shares of a feature's mass.

    Memory and work: ``fused_plan``.

    Args:
        start: ``pairs`` or ``cold``.
        alpha: Weight of the distances against φ; not used by the cold start.
        min_support: Rows a feature must fire on to be testable (cold: only where pairs are given).
        max_iter: Iterations at most; a fit that needs more says ``converged = False``.
        tol: Change of the loss at which it stops.
    """

    method = "gromov"

    def __init__(
        self,
        *,
        start: Start = "pairs",
        alpha: float = 0.98,
        min_support: int = 3,
        max_iter: int = 500,
        tol: float = 1e-9,
    ) -> None:
        self.start: Start = start
        self.alpha = alpha
        self.min_support = min_support
        self.max_iter = max_iter
        self.tol = tol

    def needs(self) -> frozenset[str]:
        """Paired activations, unless cold."""
        return frozenset() if self.start == "cold" else frozenset({"pairs"})

    def takes(self) -> frozenset[str]:
        """Paired activations: a cold start only asks them which features are testable."""
        return frozenset({"pairs"})

    def name(self) -> str:
        """``gromov`` or ``gromov-cold``."""
        return self.method if self.start == "pairs" else f"{self.method}-{self.start}"

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        if self.start not in ("pairs", "cold"):
            raise TransferError(f"Unknown start {self.start!r} of Gromov-Wasserstein.", "Use 'pairs' or 'cold'.")
        src, tgt, counts = (
            _with_direction(source, target)
            if pairs is None
            else usable_directions(source, target, pairs, self.min_support)
        )
        info: dict[str, Any] = dict(counts)
        refuse_large(len(src), len(tgt))
        cost = begin = None
        if self.start == "pairs":
            assert pairs is not None
            codes = restricted(pairs, src, tgt)
            seeds = reference_pairs(codes).pairs
            info["reference_pairs"] = len(seeds)
            cost, begin = _linear_cost(codes), warm_start(seeds, (len(src), len(tgt)))
        plan = fused_plan(
            distances(source.directions[src]),
            distances(target.directions[tgt]),
            cost,
            begin,
            alpha=self.alpha,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        info["solver_warnings"] = list(plan.warnings)
        mass = plan.mass * max(len(src), len(tgt)) if np.isfinite(plan.mass).all() else np.zeros_like(plan.mass)
        rows, cols = mutual_nearest(topk_blocks([(0, mass)], mass.shape, 1))
        rows, cols = rows[mass[rows, cols] > 0], cols[mass[rows, cols] > 0]
        score = np.zeros(len(rows))
        if len(rows) > 2:
            score = np.einsum(
                "na,na->n",
                relative_rows(source.directions, src, rows)[rows],
                relative_rows(target.directions, tgt, cols)[cols],
            )
        at = np.nonzero(keep_largest(mass))
        kept = mass[at].astype(np.float32)
        total = float(mass.sum())
        info["dropped_mass"] = max(0.0, 1 - float(kept.sum(dtype=np.float64)) / total) if total > 0 else 0.0
        return self._alignment(
            source,
            target,
            match_columns(src[rows], tgt[cols], score),
            sp.csr_matrix((kept, (src[at[0]], tgt[at[1]])), shape=(source.space.n_features, target.space.n_features)),
            converged=plan.converged,
            n_iter=plan.n_iter,
            row_error=plan.row_error,
            col_error=plan.col_error,
            cost=plan.loss,
            info=info,
        )


def _linear_cost(codes: PairedCodes) -> Float[np.ndarray, "n_src n_tgt"]:
    """1 − φ in units of the typical mutual pair, not below 0, divided by its mean."""
    every = np.arange(len(codes.target.mean))
    phi = np.empty((len(codes.source.mean), len(every)))
    for joint in joint_blocks(codes):
        phi[joint.features] = measured("phi", joint.products, joint.n11, codes, joint.features[:, None], every)
    cost = np.maximum(1 - phi / typical(phi), 0)
    return cost / max(float(cost.mean()), 1e-300)


def _with_direction(source: FeatureView, target: FeatureView) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    found, info = [], {}
    for side, view in (("source", source), ("target", target)):
        keep = np.flatnonzero(np.linalg.norm(view.directions, axis=1) > 0)
        info[f"zero_directions_{side}"] = len(view.directions) - len(keep)
        if not len(keep):
            raise TransferError(f"No {side} feature has a direction.", "Check the SAE's decoder.")
        found.append(keep)
    return found[0], found[1], info

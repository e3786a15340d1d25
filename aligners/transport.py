"""The transport problem along candidate edges, its plan, and the pairs that a plan names.

One problem, three ways to treat mass that finds no partner: ``balanced`` (all of it must move along the edges),
``slack`` (a unit may stay unmatched for half of ``slack``) and ``unbalanced`` (marginals may be missed at the price of
a Kullback-Leibler divergence).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.sparse_assignment import Edges, checked_edges, extent
from transfer.core.errors import TransferError

Kind = Literal["balanced", "slack", "unbalanced"]
FAR = 50.0
"""A potential of FAR·kl is infinite for the divergence: e^−50 is below float64 resolution."""


def edge_costs(similarity: sp.csr_matrix) -> sp.csr_matrix:
    """``1 − similarity`` on the same edges, explicit zeros included.

    Raises:
        TransferError: As ``checked_edges``.
    """
    cost = checked_edges(similarity, "The similarity")
    np.subtract(1, cost.data, out=cost.data)
    return cost


@dataclass(frozen=True)
class Problem:
    """What is to be moved, along which edges, at which cost; build it with ``Problem.of``."""

    cost: sp.csr_matrix
    source_mass: Float[np.ndarray, " n_src"]
    target_mass: Float[np.ndarray, " n_tgt"]
    slack: float | None
    kl: float | None

    @classmethod
    def of(
        cls,
        cost: sp.csr_matrix,
        *,
        slack: float | None = None,
        kl: float | None = None,
        source_mass: Float[np.ndarray, " n_src"] | None = None,
        target_mass: Float[np.ndarray, " n_tgt"] | None = None,
    ) -> Problem:
        """Check and complete a problem.

        Args:
            cost: Candidate edges [n_src, n_tgt]; stored zeros are edges of cost 0. Sinkhorn computes its kernel in
                this matrix's dtype (float32: 2/3 of the memory traffic).
            slack: Partial transport: a unit of either side may stay unmatched for ``slack / 2``, so that a pair is
                worth matching when it costs less than ``slack``.
            kl: Unbalanced transport: weight ρ of KL(row sums | source_mass) + KL(column sums | target_mass).
            source_mass: Positive; one unit a feature by default.
            target_mass: Positive; by default one unit a feature, or n_src / n_tgt when balanced.

        Raises:
            TransferError: For bad edges, masses or parameters; for balanced masses that differ in total, or a
                feature without any edge, for then no plan exists.
        """
        cost = checked_edges(cost, "The cost")
        n, m = extent(cost)
        if slack is not None and kl is not None:
            raise TransferError("Transport takes slack or kl, not both.", "Leave one of them None.")
        for name, value in (("slack", slack), ("kl", kl)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise TransferError(f"{name} must be a positive number or None, got {value}.")
        balanced = slack is None and kl is None
        a = _masses(source_mass, n, 1.0, "source_mass")
        b = _masses(target_mass, m, float(a.sum()) / m if balanced else 1.0, "target_mass")
        problem = cls(cost, a, b, slack, kl)
        if balanced:
            if not np.isclose(a.sum(), b.sum(), rtol=1e-9):
                raise TransferError(
                    f"Balanced transport needs equal total masses, got {a.sum():g} and {b.sum():g}.",
                    "Rescale one side, or pass slack.",
                )
            bare = int((problem.edges.row_degree == 0).sum()), int((problem.edges.col_degree == 0).sum())
            if any(bare):
                raise TransferError(
                    f"{bare[0]} source and {bare[1]} target features have no candidate edge, so no balanced plan "
                    "exists.",
                    "Pass slack, drop these features, or keep more candidates.",
                )
        return problem

    @property
    def kind(self) -> Kind:
        """Which of the three problems this is."""
        return "slack" if self.slack is not None else "unbalanced" if self.kl is not None else "balanced"

    @cached_property
    def edges(self) -> Edges:
        """Index arrays of the support."""
        return Edges(self.cost)

    @property
    def ceiling(self) -> float:
        """Largest value a potential can have (slack), or can usefully have (unbalanced)."""
        return self.slack / 2 if self.slack is not None else FAR * self.kl if self.kl is not None else np.inf


def _masses(given: np.ndarray | None, n: int, default: float, name: str) -> np.ndarray:
    if given is None:
        return np.full(n, default)
    mass = np.asarray(given, dtype=np.float64)
    if mass.shape != (n,) or not (np.isfinite(mass) & (mass > 0)).all():
        raise TransferError(
            f"{name} must be {n} positive numbers, one a feature; got shape {mass.shape}, "
            f"{int((~(mass > 0)).sum())} of them not positive.",
            "Drop features that carry nothing.",
        )
    return mass


@dataclass(frozen=True)
class Transport:
    """A plan along the edges with its own account of itself; masses are in the units of the problem.

    ``primal``, ``dual`` and ``relative_gap`` certify the *unregularised* problem on the given edges, whatever
    temperature the plan was computed at: with a, b the masses and h = slack / 2,

    * balanced: min ⟨c, P⟩ s.t. P1 = a, Pᵀ1 = b;
    * slack: min ⟨c, P⟩ + h·Σ(a − P1) + h·Σ(b − Pᵀ1) s.t. P1 ≤ a, Pᵀ1 ≤ b;
    * unbalanced: min ⟨c, P⟩ + kl·KL(P1 | a) + kl·KL(Pᵀ1 | b), KL(p | q) = Σ p log(p / q) − p + q.

    ``primal`` is the value of the coupling *rounded* to a feasible one, ``dual`` that of potentials that satisfy
    f_i + g_j ≤ c_ij on every edge (and f, g ≤ h with slack), so dual ≤ optimum ≤ primal up to float64 rounding.
    """

    coupling: sp.csr_matrix
    """[n_src, n_tgt] on the candidate edges; entries that are exactly zero are not stored."""
    row_slack: Float[np.ndarray, " n_src"]
    """Mass of each source feature left unmatched (slack and unbalanced; never negative)."""
    col_slack: Float[np.ndarray, " n_tgt"]
    row_potential: Float[np.ndarray, " n_src"]
    """f, feasible with g on every edge."""
    col_potential: Float[np.ndarray, " n_tgt"]
    kind: Kind
    reg: float
    """Temperature of the coupling; 0 for the exact solver."""
    n_iter: int
    """Sinkhorn iterations, all temperatures together; 0 for the exact solver, which does not tell."""
    converged: bool
    row_error: float
    """Σ|row sum + row slack − a| / Σa of the coupling as it is; unbalanced: against a·exp(−f / kl), which the row
    sums of the entropic optimum equal."""
    col_error: float
    primal: float
    """Infinite when rounding found no feasible plan (balanced only: on few edges there may be none)."""
    dual: float
    relative_gap: float
    """(primal − dual) / |primal|."""


def transport_matches(plan: Transport) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Pairs that are each other's largest mass, larger than what either leaves unmatched; with that mass.

    Ties go to the lower id, on both sides.
    """
    edges, mass = Edges(plan.coupling), plan.coupling.data
    by_row, by_col = (
        _first(mass == reduce(np.maximum, mass, 0.0)[ids], ids)
        for reduce, ids in ((edges.by_row, edges.rows), (edges.by_col, edges.cols))
    )
    both = np.intersect1d(by_row, by_col)
    rows, cols = edges.rows[both].astype(np.int64), edges.cols[both].astype(np.int64)
    keep = (mass[both] > plan.row_slack[rows]) & (mass[both] > plan.col_slack[cols])
    return rows[keep], cols[keep], mass[both][keep]


def _first(chosen: np.ndarray, ids: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(chosen)
    return at[np.unique(ids[at], return_index=True)[1]]


def transport_links(
    plan: Transport, share: float
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Many-to-many pairs: edges that carry at least ``share`` of what either end holds (mass and slack), with mass.

    A feature that splits in two keeps both halves; a share above one half leaves no ambiguity on that side.

    Raises:
        TransferError: For a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise TransferError(f"The share of a link must be in (0, 1], got {share}.")
    edges, mass = Edges(plan.coupling), plan.coupling.data
    row = edges.by_row(np.add, mass, 0.0) + plan.row_slack
    col = edges.by_col(np.add, mass, 0.0) + plan.col_slack
    keep = mass >= share * np.minimum(row[edges.rows], col[edges.cols])
    return edges.rows[keep].astype(np.int64), edges.cols[keep].astype(np.int64), mass[keep]

"""From judged candidate edges to matches and a coupling: the best of both ends, one-to-one, or transport."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.confidence import Judged, q_values
from aligners.dense_ot import transport
from aligners.sparse_assignment import sparse_one_to_one
from aligners.transport import Problem, transport_matches
from transfer.core.errors import TransferError

Rule = Literal["mutual", "one_to_one", "transport", "exact"]
RULES: tuple[Rule, ...] = ("mutual", "one_to_one", "transport", "exact")
EVEN = 0.5
"""Probability from which an edge is worth having: right more often than wrong."""
LEAST = 0.01
"""Edges less probable than this never carry mass and are left out of transport."""
TIE = 1e-3
"""Weight of the cosine beside the probability, so that edges that are all but certain still have an order."""
REG = 0.02
"""Temperature of transport to begin with, in units of probability; it falls until the gap is small."""
GAP = 0.01
"""Relative duality gap at which transport stops."""


@dataclass(frozen=True)
class Selection:
    """Chosen edges by number, the coupling, and how it was reached."""

    chosen: Int[np.ndarray, " n"]
    coupling: sp.csr_matrix
    converged: bool = True
    n_iter: int = 0
    row_error: float = 0.0
    col_error: float = 0.0
    cost: float = float("nan")
    info: dict[str, Any] = field(default_factory=dict)


def select_edges(
    src: Int[np.ndarray, " edges"],
    tgt: Int[np.ndarray, " edges"],
    judged: Judged,
    cosine: Float[np.ndarray, " edges"],
    shape: tuple[int, int],
    rule: Rule,
    *,
    level: float,
    least_q: float = 0.0,
    max_iter: int,
    tol: float,
) -> Selection:
    """Choose among candidate edges, sorted by source, then target.

    ``mutual``: edges that are the best of both ends. ``one_to_one``: the partial assignment with the largest expected
    number of right edges over even odds (``sparse_one_to_one``). Both keep in the coupling every edge within ``level``,
    with its probability as mass. ``transport`` and ``exact``: a unit of mass a feature, cost 1 − probability, and
    slack that makes an edge worth its while when it is right more often than wrong; the coupling is the plan, in which
    a feature that splits shares its unit, and the matches are its mutual largest masses. Their account (marginal
    errors, primal, dual, relative gap) is that of ``Transport``. No q-value counts as less than ``least_q``.

    Raises:
        TransferError: For an unknown rule.
    """
    if rule not in RULES:
        raise TransferError(f"Unknown rule {rule!r}.", f"Use one of {', '.join(RULES)}.")
    p = judged.confidence
    worth = p - TIE * (1 - cosine)
    if rule in ("transport", "exact"):
        keep = np.flatnonzero(p >= LEAST)
        cost = sp.csr_matrix((1 - worth[keep], (src[keep], tgt[keep])), shape=shape)
        if not len(keep):
            return Selection(keep, sp.csr_matrix(shape, dtype=np.float32), info={"relative_gap": 0.0})
        problem = Problem.of(cost, slack=EVEN)
        plan = transport(problem, reg=0 if rule == "exact" else REG, gap=GAP, max_iter=max_iter, tol=tol)
        rows, cols, _ = transport_matches(plan)
        carried = float(plan.coupling.sum())
        return Selection(
            _numbers(src, tgt, rows, cols, shape[1]),
            sp.csr_matrix(plan.coupling, dtype=np.float32),
            plan.converged,
            plan.n_iter,
            plan.row_error,
            plan.col_error,
            float((plan.coupling.multiply(cost)).sum()) / carried if carried > 0 else float("nan"),
            {
                "primal": plan.primal,
                "dual": plan.dual,
                "relative_gap": plan.relative_gap,
                "temperature": plan.reg,
                "unmatched_mass_source": float(plan.row_slack.mean()),
                "unmatched_mass_target": float(plan.col_slack.mean()),
            },
        )
    if rule == "mutual":
        chosen = mutual_best(src, tgt, judged.log_odds, cosine)
    else:
        keep = np.flatnonzero(p >= EVEN)
        found = sparse_one_to_one(sp.csr_matrix((worth[keep], (src[keep], tgt[keep])), shape=shape), floor=EVEN)
        chosen = _numbers(src, tgt, found[0], found[1], shape[1])
    kept = np.flatnonzero(np.maximum(q_values(p), least_q) <= level)
    mass = p[kept].astype(np.float32)
    return Selection(chosen, sp.csr_matrix((mass, (src[kept], tgt[kept])), shape=shape))


def mutual_best(
    src: Int[np.ndarray, " edges"], tgt: Int[np.ndarray, " edges"], *scores: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " n"]:
    """Edges that are the best of both their ends by the first score, then the next, then as listed."""
    order = np.lexsort([-score for score in reversed(scores)])
    by_source, by_target = (order[np.unique(ids[order], return_index=True)[1]] for ids in (src, tgt))
    return np.intersect1d(by_source, by_target)


def _numbers(src: np.ndarray, tgt: np.ndarray, rows: np.ndarray, cols: np.ndarray, width: int) -> np.ndarray:
    """Where these pairs stand among the edges."""
    return np.searchsorted(src * width + tgt, rows * width + cols)

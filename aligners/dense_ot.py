"""The front door of transport: small problems over all pairs go to POT, everything else along its candidate edges."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from aligners.assignment import DENSE_LIMIT
from aligners.certificate import account
from aligners.sparse_assignment import extent
from aligners.sparse_ot import exact_transport, sparse_sinkhorn
from aligners.transport import Problem, Transport
from transfer.core.errors import TransferError

LOG_DOMAIN = 200.0
"""Above this ratio of cost to temperature the kernel would underflow, so the slower log domain is used."""


def all_pairs(cost: Float[np.ndarray, "n_src n_tgt"]) -> sp.csr_matrix:
    """Every pair as an edge, those of cost zero too."""
    n, m = cost.shape
    ids, bounds = np.tile(np.arange(m, dtype=np.int32), n), np.arange(n + 1, dtype=np.int64) * m
    return sp.csr_matrix((np.ascontiguousarray(cost, dtype=np.float64).ravel(), ids, bounds), shape=cost.shape)


def transport(
    problem: Problem, *, reg: float, gap: float | None = None, max_iter: int = 5000, tol: float = 1e-4
) -> Transport:
    """Solve a problem with the solver that suits it; the account is of one kind whichever that was.

    ``reg`` = 0: the exact optimum (``exact_transport``). All pairs, at most ``DENSE_LIMIT`` a side, and no ``gap``:
    ``dense_transport``. Otherwise ``sparse_sinkhorn``.

    Raises:
        TransferError: As the solver.
    """
    if reg == 0:
        return exact_transport(problem)
    n, m = extent(problem.cost)
    if gap is None and problem.cost.nnz == n * m and max(n, m) <= DENSE_LIMIT:
        return dense_transport(problem, reg=reg, max_iter=max_iter, tol=tol)
    return sparse_sinkhorn(problem, reg=reg, gap=gap, max_iter=max_iter, tol=tol)


def dense_transport(problem: Problem, *, reg: float, max_iter: int = 5000, tol: float = 1e-4) -> Transport:
    """Entropic transport over all pairs by POT: balanced, unbalanced, or partial with a bin for "no match" a side.

    With slack, all features of a side share one bin (arXiv 1911.11763, Sec. 3.2), where ``sparse_sinkhorn`` gives each
    its own: the same problem at temperature zero, and slightly other plans above. Memory: about 100 bytes a pair.

    Args:
        problem: With every pair as an edge.
        reg: Temperature.
        max_iter: Iterations at most.
        tol: Largest marginal error of a converged plan, each side.

    Raises:
        TransferError: When a pair is no edge, or for parameters out of range.
    """
    os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")  # POT would import torch otherwise: seconds
    import ot

    n, m = extent(problem.cost)
    if problem.cost.nnz != n * m:
        raise TransferError(f"Dense transport needs all {n * m} pairs, got {problem.cost.nnz} edges.")
    if not (np.isfinite(reg) and reg > 0) or max_iter < 1 or not tol > 0:
        raise TransferError(
            f"Transport needs reg > 0, max_iter ≥ 1 and tol > 0; got reg={reg}, max_iter={max_iter}, tol={tol}."
        )
    cost, unit = problem.cost.toarray().astype(np.float64), float(problem.source_mass.mean())
    a, b = problem.source_mass / unit, problem.target_mass / unit
    if problem.slack is not None:
        cost = np.pad(cost, (0, 1), constant_values=problem.slack / 2)
        cost[n, m] = 0
        a, b = np.append(a, b.sum()), np.append(b, a.sum())
    underflows = cost.max() > LOG_DOMAIN * reg
    # Overflow shows in the errors, which are measured on the plan itself; POT's warnings would only repeat it.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if problem.kl is not None:
            method = "sinkhorn_stabilized" if underflows else "sinkhorn"
            solved: Any = ot.unbalanced.sinkhorn_unbalanced(
                a, b, cost, reg, problem.kl, method, "entropy", numItermax=max_iter, stopThr=0.1 * tol, log=True
            )
        else:
            total = a.sum()  # POT's threshold is absolute, and a 2-norm where errors here are 1-norms
            solved = ot.sinkhorn(
                a / total,
                b / total,
                cost,
                reg,
                method="sinkhorn_log" if underflows else "sinkhorn",
                numItermax=max_iter,
                stopThr=0.5 * tol / np.sqrt(len(b)),
                log=True,
                warn=False,
            )
            solved = (solved[0] * total, solved[1])
        plan, log = solved
        f, g = (reg * (log[f"log{k}"] if f"log{k}" in log else _logarithm(log, k)) for k in ("u", "v"))
    finite = bool(np.isfinite(plan).all())
    plan = np.where(np.isfinite(plan), plan, 0.0) * unit
    slacks, want = (np.zeros(n), np.zeros(m)), (problem.source_mass, problem.target_mass)
    if problem.slack is not None:
        slacks = (plan[:n, m], plan[n, :m])
        g = g[:m] + f[n]  # potentials are known up to a constant: that at which staying unmatched is for free
    if problem.kl is not None:
        want = tuple(w * np.exp(-x / problem.kl) for w, x in zip(want, (f, g), strict=True))
    return account(
        problem,
        plan[:n, :m].ravel(),
        slacks,
        want,
        np.where(np.isfinite(g), g, 0.0),
        reg=reg,
        n_iter=int(log["niter"]) + 1 if "niter" in log else len(log["err"]),
        done=finite,
        tol=tol,
    )


def _logarithm(log: dict[str, Any], side: str) -> np.ndarray:
    """Log scaling, under the name that each of POT's solvers gives it."""
    return np.asarray(log[f"log_{side}"]) if f"log_{side}" in log else np.log(log[side])

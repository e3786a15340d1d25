"""How alike two sets of matched rows are as a whole: CKA, SVCCA, RSA, mutual neighbours, each against shuffled pairs.

Context for a report, never evidence for a match: these numbers are high for rows of few effective dimensions, for wide
rows and for matches that are mostly wrong (a published run has SVCCA .82 and CKA .87 where RSA is .26), and calibration
takes most of that away (arXiv 2602.14486). What is left says that the pairing as a whole holds more than chance. The
null shuffles which row goes with which; it does not know that the pairs were selected for being alike, so rows matched
by geometry beat it by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from aligners.topk import topk_cosine, unit_rows
from transfer.core.errors import TransferError

Value = Callable[[Int[np.ndarray, " n"]], float]
"""The measure, with the rows of the second side in this order."""
MEASURES = ("cka", "svcca", "rsa", "knn")
FEWEST = 10
"""Rows below which nothing is compared."""
FLAT = 1e-10
"""Directions with less than this share of the largest variance do not count."""


@dataclass(frozen=True)
class Calibrated:
    """One measure of matched rows and what it is for shuffled ones."""

    value: float
    null_mean: float
    null_high: float
    """95 % of the shuffled pairings lie below."""
    p_value: float
    """(1 + shuffled pairings at least as alike) / (1 + shuffled pairings); one-sided."""
    score: float
    """(value − null mean) / (1 − null mean): 0 for chance, 1 for the same."""
    n_null: int
    n_rows: int
    """Rows used."""


def global_similarity(
    x: Float[np.ndarray, "n d_src"],
    y: Float[np.ndarray, "n d_tgt"],
    *,
    components: int = 20,
    neighbours: int = 10,
    max_rows: int = 2048,
    n_null: int = 100,
    seed: int = 0,
) -> dict[str, Calibrated]:
    """All measures of rows i of ``x`` and ``y`` taken as the same thing, such as decoder rows of matched features.

    ``cka`` and ``svcca`` use all rows, ``rsa`` and ``knn`` a random ``max_rows`` of them; ``Calibrated.n_rows`` says
    how many. Memory beyond float64 copies of the inputs: three arrays of the larger width squared, and six of
    ``max_rows`` squared. Work: a product of rows × d_src × d_tgt for CKA, and ``max_rows`` squared for RSA and
    neighbours, for every shuffle.

    Args:
        x: Source rows, none zero.
        y: Target rows; the width may differ.
        components: Principal components a side for SVCCA.
        neighbours: In the overlap of neighbours.
        max_rows: See above.
        n_null: Shuffled pairings.
        seed: Of the sample and the shuffles.

    Raises:
        TransferError: For sides that differ in rows, fewer than ten rows, rows that are zero, not finite or all the
            same, or numbers out of range.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or min(len(x), max_rows) < FEWEST:
        raise TransferError(
            f"Similarity needs matched rows, at least {FEWEST}; got {x.shape} and {y.shape}, max_rows={max_rows}."
        )
    if min(components, neighbours, n_null) < 1:
        raise TransferError(
            f"components, neighbours and n_null must be at least 1; got {components}, {neighbours}, {n_null}."
        )
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise TransferError("The rows to compare hold NaN or infinity.", "Harvest or load them again.")
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(len(x))[:max_rows])
    sampled = x[some], y[some]
    tasks: dict[str, tuple[Value, int]] = {
        "cka": (linear_cka(x, y), len(x)),
        "svcca": (svcca(x, y, components), len(x)),
        "rsa": (rsa(*sampled), len(some)),
        "knn": (mutual_neighbours(*sampled, neighbours), len(some)),
    }
    return {name: _calibrated(value, rows, n_null, rng) for name, (value, rows) in tasks.items()}


def linear_cka(x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"]) -> Value:
    """Linear CKA: ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), columns centred (Kornblith et al. 1905.00414); d × d memory.

    Raises:
        TransferError: When the rows of a side are all the same.
    """
    x, y = _centred(x), _centred(y)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return lambda order: float(np.sum((x.T @ y[order]) ** 2) / scale)


def svcca(x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"], components: int) -> Value:
    """Mean canonical correlation of the top principal components (Raghu et al. 1706.05806); d × d memory.

    As many components on both sides: at most ``components``, a side's rank, or half the rows less one, since with more
    some canonical correlations are one by counting alone.

    Raises:
        TransferError: When the rows of a side are all the same.
    """
    most = max(1, min(components, (len(x) - 1) // 2))
    a, b = _components(x, most), _components(y, most)
    k = min(a.shape[1], b.shape[1])
    a, b = a[:, :k], b[:, :k]
    return lambda order: float(np.minimum(np.linalg.svd(a.T @ b[order], compute_uv=False), 1).mean())


def rsa(x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"]) -> Value:
    """Spearman correlation of the off-diagonal cosine dissimilarities; n × n memory on both sides.

    Raises:
        TransferError: When a row is zero, or a side's dissimilarities do not vary.
    """
    a, b = _ranks(x), _ranks(y)
    return lambda order: float(np.sum(a * b[np.ix_(order, order)]))


def mutual_neighbours(x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"], neighbours: int) -> Value:
    """Share of a row's nearest rows by cosine that both sides agree on (Huh et al. 2405.07987); n × n bits a side.

    Raises:
        TransferError: When a row is zero.
    """
    k = min(neighbours, len(x) - 1)
    a, b = _nearest(x, k), _nearest(y, k)
    return lambda order: float(np.sum(a & b[np.ix_(order, order)]) / (len(a) * k))


def _calibrated(value: Value, n_rows: int, n_null: int, rng: np.random.Generator) -> Calibrated:
    found = value(np.arange(n_rows))
    null = np.array([value(rng.permutation(n_rows)) for _ in range(n_null)])
    mean = float(null.mean())
    return Calibrated(
        value=found,
        null_mean=mean,
        null_high=float(np.quantile(null, 0.95)),
        p_value=float((1 + np.sum(null >= found)) / (1 + n_null)),
        score=(found - mean) / (1 - mean) if mean < 1 else 0.0,
        n_null=n_null,
        n_rows=n_rows,
    )


def _centred(x: np.ndarray) -> Float[np.ndarray, "n d"]:
    x = x - x.mean(axis=0)
    if not np.any(x):
        raise TransferError("All rows of one side are the same; nothing can be compared.", "Match more features.")
    return x


def _components(x: np.ndarray, most: int) -> Float[np.ndarray, "n k"]:
    """Scores of the top components, columns of length one."""
    x = _centred(x)
    values, vectors = np.linalg.eigh(x.T @ x)
    top = np.argsort(-values)[:most]
    top = top[values[top] > FLAT * values.max()]
    return x @ (vectors[:, top] / np.sqrt(values[top]))


def _ranks(x: np.ndarray) -> Float[np.ndarray, "n n"]:
    """Centred ranks of the dissimilarities as a symmetric matrix of length one, 0 on the diagonal."""
    from scipy.stats import rankdata

    rows = unit_rows(x)
    above = np.triu_indices(len(rows), 1)
    ranks = rankdata(-(rows @ rows.T)[above])
    ranks -= ranks.mean()
    out = np.zeros((len(rows), len(rows)))
    out[above] = ranks
    out += out.T
    length = np.linalg.norm(out)
    if not length > 0:
        raise TransferError("The dissimilarities of one side do not vary; RSA says nothing.", "Match more features.")
    return out / length


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    """Whether row j is among the k nearest of row i, boolean [n, n]."""
    ids = topk_cosine(x, x, k + 1).row_ids
    own = ids == np.arange(len(x))[:, None]
    own[~own.any(axis=1), -1] = True  # copies of a row can push it out of its own list
    out = np.zeros((len(x), len(x)), dtype=bool)
    out[np.repeat(np.arange(len(x)), k), ids[~own]] = True
    return out

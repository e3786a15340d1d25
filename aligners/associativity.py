"""Whether alignments compose: A to C through B against A to C directly, by matches and by couplings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int

from aligners.correlation import dims
from aligners.families import wilson
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.stats import Interval, mean_interval

ROWS = 1024
"""Source features whose composed coupling is held at once."""
SOFT_DRAWS = 20
"""Shuffles behind the chance level of composed couplings."""


@dataclass(frozen=True)
class Associativity:
    """Whether going from A to C through B leads where the direct alignment leads."""

    spaces: tuple[str, str, str]
    """Space ids of A, B and C."""
    n_claims: int
    """Pairs (i, k) of A and C that the matches A-B and B-C join."""
    n_agree: int
    """Of these, direct matches A-C."""
    n_contradicted: int
    """Of these, not direct matches although i or k has one elsewhere."""
    share: Interval
    """Agreeing share of all claims, Wilson's interval; a claim without any direct match counts against it."""
    expected: float
    """The same share when the matches B-C are shuffled, mean of the draws."""
    p_value: float
    """Share of the shuffles that agree at least as well."""
    overlap: Interval
    """Σ min(composed, direct) of the couplings' rows, each summing to one: 1 = the same; mean over the features of A
    that have both, with an interval over them."""
    overlap_expected: float
    """The same with shuffled features of C."""
    lost: float
    """Mean share of a row's mass that ends in features of B without a row to C."""

    @property
    def share_where_direct(self) -> Interval:
        """Agreeing share of the claims that a direct match could confirm or contradict."""
        return wilson(self.n_agree, self.n_agree + self.n_contradicted)

    @property
    def n_silent(self) -> int:
        """Claims whose features both have no direct match."""
        return self.n_claims - self.n_agree - self.n_contradicted


def associativity(
    ab: Alignment, bc: Alignment, ac: Alignment, q_max: float | None = None, *, n_null: int = 200, seed: int = 0
) -> Associativity:
    """Compose A-B with B-C and compare with A-C, by matches and by couplings.

    The chance level shuffles the features of C that B-C reaches among themselves, so that the number of claims and
    their hubs stay as they are. ``q_max`` filters matches; couplings are taken whole. Memory: the composed coupling
    of 1,024 features of A at a time, and the claims.

    Args:
        ab: Alignment of A and B, either way round.
        bc: Alignment of B and C, either way round.
        ac: Alignment of A and C, either way round.
        q_max: As for ``match_graph``.
        n_null: Shuffles of the matches.
        seed: Of the shuffles.

    Raises:
        TransferError: When the three are not over three spaces, each over two of them.
    """
    ab, bc, ac = _oriented(ab, bc, ac)
    first, second, direct = (_pattern(alignment, q_max) for alignment in (ab, bc, ac))
    claims = sp.coo_matrix(first @ second)
    i, k = claims.row.astype(np.int64), claims.col.astype(np.int64)
    keys = np.sort(_keys(direct))
    n_tgt = dims(direct)[1]
    agree = np.isin(i * n_tgt + k, keys)
    spoken = (np.diff(direct.indptr) > 0)[i] | (np.bincount(direct.indices, minlength=n_tgt) > 0)[k]
    rng = np.random.default_rng(seed)
    reached = np.unique(second.indices)
    null = np.zeros(n_null)
    for draw in range(n_null):
        null[draw] = np.isin(i * n_tgt + _shuffle(reached, n_tgt, rng)[k], keys).sum()
    overlap, chance, lost = _overlap(ab.coupling, bc.coupling, ac.coupling, rng)
    nothing = Interval(float("nan"), float("nan"), float("nan"), 0, "none")
    return Associativity(
        spaces=(ab.source.id, ab.target.id, bc.target.id),
        n_claims=len(i),
        n_agree=int(agree.sum()),
        n_contradicted=int(np.sum(spoken & ~agree)),
        share=wilson(int(agree.sum()), len(i)),
        expected=float(null.mean() / len(i)) if len(i) else float("nan"),
        p_value=float((1 + np.sum(null >= agree.sum())) / (1 + n_null)) if len(i) else float("nan"),
        overlap=mean_interval(overlap, seed=seed) if len(overlap) else nothing,
        overlap_expected=chance,
        lost=lost,
    )


def _oriented(ab: Alignment, bc: Alignment, ac: Alignment) -> tuple[Alignment, Alignment, Alignment]:
    """The three as A→B, B→C and A→C."""
    ends = [{x.source.id, x.target.id} for x in (ab, bc, ac)]
    if any(len(e) < 2 for e in ends) or len(ends[0] | ends[1] | ends[2]) != 3 or ends[0] ^ ends[1] != ends[2]:
        raise TransferError(
            f"Composition needs A-B, B-C and A-C over three spaces, got {', '.join('-'.join(sorted(e)) for e in ends)}."
        )
    (middle,) = ends[0] & ends[1]
    (start,) = ends[0] - {middle}
    return (
        ab if ab.target.id == middle else ab.reversed(),
        bc if bc.source.id == middle else bc.reversed(),
        ac if ac.source.id == start else ac.reversed(),
    )


def _pattern(alignment: Alignment, q_max: float | None) -> sp.csr_matrix:
    """Ones where there is a match, float32 CSR [d_src, d_tgt]."""
    keep = np.ones(len(alignment), dtype=bool) if q_max is None else alignment.matches["q_value"] <= q_max
    at = (alignment.matches["source"][keep], alignment.matches["target"][keep])
    found = sp.csr_matrix((np.ones(int(keep.sum()), np.float32), at), shape=alignment.coupling.shape)
    found.sum_duplicates()
    return found


def _keys(pattern: sp.csr_matrix) -> Int[np.ndarray, " n"]:
    found = sp.coo_matrix(pattern)
    return found.row.astype(np.int64) * dims(pattern)[1] + found.col


def _shuffle(members: np.ndarray, n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A permutation of ``n`` ids that moves only ``members``, among themselves."""
    to = np.arange(n)
    to[members] = rng.permutation(members)
    return to


def _overlap(
    ab: sp.csr_matrix, bc: sp.csr_matrix, ac: sp.csr_matrix, rng: np.random.Generator
) -> tuple[np.ndarray, float, float]:
    """Overlap per feature of A that has both rows, its mean under shuffles, and the mass lost on the way."""
    n_src, n_tgt = dims(ac)
    unit_bc = _rows(bc)
    reached = np.unique(bc.indices)
    # Shuffling the columns of B-C shuffles the columns of the product, which so is made only once.
    shuffles = [_shuffle(reached, n_tgt, rng) for _ in range(SOFT_DRAWS)]
    overlap, chance, lost = [np.zeros(0)], 0.0, [np.zeros(0)]
    for start in range(0, n_src, ROWS):
        part = _rows(sp.csr_matrix(ab[start : start + ROWS]))
        composed, direct = sp.csr_matrix(part @ unit_bc), _rows(sp.csr_matrix(ac[start : start + ROWS]))
        arrived = _mass(composed)
        lost.append(1 - arrived[_mass(part) > 0])
        both = np.flatnonzero((arrived > 0) & (_mass(direct) > 0))
        composed, direct = _rows(sp.csr_matrix(composed[both])), sp.csr_matrix(direct[both])
        overlap.append(_mass(sp.csr_matrix(composed.minimum(direct))))
        for to in shuffles:
            moved = sp.csr_matrix((composed.data, to[composed.indices], composed.indptr), shape=dims(composed))
            chance += float(moved.minimum(direct).sum()) / SOFT_DRAWS
    found, gone = np.concatenate(overlap), np.concatenate(lost)
    return found, chance / len(found) if len(found) else float("nan"), float(gone.mean()) if len(gone) else float("nan")


def _mass(coupling: sp.csr_matrix) -> np.ndarray:
    return np.asarray(coupling.sum(axis=1), dtype=np.float64).ravel()


def _rows(coupling: sp.csr_matrix) -> sp.csr_matrix:
    """Rows that sum to one (empty ones stay empty), float64."""
    mass = _mass(coupling)
    return sp.csr_matrix(sp.diags(np.divide(1.0, mass, out=np.zeros_like(mass), where=mass > 0)) @ coupling)

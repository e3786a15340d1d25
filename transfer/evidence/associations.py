"""Does a feature's activation go with a facet of the documents? Three tests of every feature, on sparse activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.cover.delta import size

TESTS = ("enrichment", "auroc", "information")
NULLS = ("permutation", "analytic")
STRATA = 10
"""Groups of features of like support that share one permutation null."""
TAIL = 100
"""Largest values of a permutation null that its tail is read from."""
LEAST_NULL = 1000
"""Values of a permutation null; few features are drawn more often to reach them."""


@dataclass(frozen=True)
class Associations:
    """Tests of every feature against every facet."""

    facets: tuple[str, ...]
    """Such as ``label harmful`` or ``topic gardening``."""
    p_values: np.ndarray
    """Float64 [n_features, facets]; 1 where a feature was not tested or not associated."""
    q_values: np.ndarray
    """Benjamini–Hochberg over all tests that were made, float64 [n_features, facets]; 1 where none was."""
    tested: np.ndarray
    """bool [n_features]: alive and with enough support."""
    effect: np.ndarray
    """Float64 [n_features, facets]: share of a feature's documents inside the facet (enrichment), AUROC, or mutual
    information in nats."""
    method: str
    """Test and null in words."""


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg q-values of a flat array of p-values."""
    n = len(p_values)
    order = np.argsort(p_values, kind="stable")
    ranked = p_values[order] * n / np.arange(1, n + 1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return q


def associate(
    fired: sp.csr_matrix, facets: Mapping[str, np.ndarray], *, min_support: int = 3, skip: np.ndarray | None = None
) -> Associations:
    """One-sided hypergeometric test of enrichment (exact for any support) for every feature and facet.

    Args:
        fired: Boolean indicator, [docs, n_features].
        facets: Name to members, bool [docs] each.
        min_support: Features that fire on fewer documents are not tested.
        skip: Features not to test, bool [n_features].

    Returns:
        p-values. Those of facets with no more hits than expected are set to 1: they can never be discoveries.
        Memory is a few arrays of ``n_features × facets`` float64.
    """
    from scipy.stats import hypergeom

    n_docs, _ = size(fired)
    members = _members(facets)
    hits, support, n_members = _counts(fired, members)
    tested = _tested(support, min_support, skip)
    p = np.ones(hits.shape)
    row, column = np.nonzero((hits * n_docs > support[:, None] * n_members) & tested[:, None])
    # Few distinct (hits, support, size) triples: the exact test is computed once for each.
    cases = np.stack([hits[row, column], support[row], n_members[column]], axis=1)
    unique, back = np.unique(cases, axis=0, return_inverse=True)
    if len(unique):
        p[row, column] = hypergeom.sf(unique[:, 0] - 1, n_docs, unique[:, 1], unique[:, 2])[back.ravel()]
    effect = hits / np.maximum(support, 1)[:, None]
    return Associations(tuple(facets), p, _adjusted(p, tested), tested, effect, "hypergeometric")


def associate_auroc(
    docs: sp.csr_matrix,
    facets: Mapping[str, np.ndarray],
    *,
    min_support: int = 3,
    skip: np.ndarray | None = None,
    null: str = "permutation",
    n_null: int = 20,
    seed: int = 0,
) -> Associations:
    """Does a feature fire more strongly inside a facet than outside? AUROC, and its one-sided rank test.

    No threshold is needed: documents are ranked by the activation itself, all silent ones tied at the bottom, ties
    sharing their middle rank, exactly as in the dense computation, in time linear in the codes (but for the sorting).

    Args:
        docs: Max over tokens, not negative, [docs, n_features].
        facets: Name to members, bool [docs] each.
        min_support: Features that fire on fewer documents are not tested.
        skip: Features not to test, bool [n_features].
        null: ``analytic``: normal with tie and continuity correction (poor for rare features); ``permutation``: the
            same statistic after moving the documents' facets, pooled over ``n_null`` draws and the features of like
            support, with an exponential tail beyond the draws.
        n_null: Draws at least; few features are drawn more often.
        seed: Of the draws.

    Returns:
        Associations with the AUROC as effect; p of facets in which a feature ranks no higher is 1.

    Raises:
        TransferError: For a facet that holds no document or all, or negative activations.
    """
    members = _members(facets)
    n_docs, _ = size(docs)
    n_members = np.rint(members.sum(axis=0)).astype(np.int64)
    if np.any((n_members == 0) | (n_members == n_docs)):
        raise TransferError("A facet that holds no document, or all, has no AUROC.", "Leave it out.")
    ranks, bottom, ties = _ranks(docs)
    tested = _tested(np.diff(ranks.indptr), min_support, skip)
    pairs = n_members * (n_docs - n_members)
    sd = np.sqrt(pairs / 12.0 * np.maximum((n_docs + 1) - ties[:, None] / max(n_docs * (n_docs - 1), 1), 0.0))

    def excess(inside: np.ndarray) -> np.ndarray:
        """Pairs ranked rightly beyond half of all, [n_features, facets]."""
        hits = _by_column(ranks, inside, np.ones(ranks.nnz))
        total = _by_column(ranks, inside, ranks.data) + (n_members - hits) * bottom[:, None]
        return total - n_members * (n_members + 1) / 2 - pairs / 2

    over = excess(members)
    effect = 0.5 + over / pairs
    z = np.divide(over - 0.5, sd, out=np.zeros_like(over), where=sd > 0)
    if null == "analytic":
        from scipy.stats import norm

        p = norm.sf(z)
    else:
        support = np.diff(ranks.indptr)
        draws = (
            np.divide(excess(moved) - 0.5, sd, out=np.zeros_like(over), where=sd > 0)
            for moved in _moved(members, null, _draws(n_null, int(tested.sum())), seed)
        )
        p = _pooled(z, draws, support, tested)
    p = np.where((over > 0) & tested[:, None], p, 1.0)
    return Associations(tuple(facets), p, _adjusted(p, tested), tested, effect, _named("AUROC", null, n_null))


def associate_information(
    fired: sp.csr_matrix,
    variables: Mapping[str, np.ndarray],
    *,
    min_support: int = 3,
    skip: np.ndarray | None = None,
    null: str = "permutation",
    n_null: int = 20,
    seed: int = 0,
) -> Associations:
    """Mutual information of firing with a variable of the documents, such as their label; all classes at once.

    A feature that keeps quiet in one class is found as well as one that fires there. One test a feature and variable;
    the p-value stands with the class in which the feature fires most beyond its share, and the others get 1.

    Args:
        fired: Boolean indicator, [docs, n_features].
        variables: Name to class of each document [docs]; documents with an empty class are in none.
        min_support: Features that fire on fewer documents are not tested.
        skip: Features not to test, bool [n_features].
        null: ``analytic``: 2 n MI is χ² with classes − 1 degrees of freedom (poor for rare features); ``permutation``
            as in ``associate_auroc``.
        n_null: Draws.
        seed: Of the draws.

    Returns:
        Associations with facets ``<variable> <class>``, and the mutual information in nats as effect.

    Raises:
        TransferError: For a variable of fewer than two classes.
    """
    from scipy.stats import chi2

    names: list[str] = []
    p_parts, q_tests, effects, places = [], [], [], []
    any_tested = np.zeros(size(fired)[1], dtype=bool)
    for name, values in variables.items():
        classes = sorted({v for v in values if v})
        if len(classes) < 2:
            raise TransferError(f"Mutual information needs two classes; {name} has {len(classes)}.")
        known = np.array([bool(v) for v in values])
        part = sp.csr_matrix(fired[np.flatnonzero(known)])
        members = np.column_stack([np.asarray(values)[known] == c for c in classes]).astype(np.float32)
        hits, support, n_members = _counts(part, members)
        tested = _tested(support, min_support, skip)
        any_tested |= tested
        found = _information(hits, support, n_members)
        if null == "analytic":
            p = chi2.sf(2 * len(members) * found, len(classes) - 1)
        else:
            draws = (
                _information(_counts(part, moved)[0], support, n_members)[:, None]
                for moved in _moved(members, null, _draws(n_null, int(tested.sum())), seed)
            )
            p = _pooled(found[:, None], draws, support, tested)[:, 0]
        lift = hits / np.maximum(n_members, 1)
        best = lift.argmax(axis=1)
        spread = np.ones(hits.shape)
        spread[np.arange(len(p)), best] = np.where(tested, p, 1.0)
        p_parts.append(spread)
        q_tests.append(np.where(tested, p, np.nan))
        effects.append(np.repeat(found[:, None], len(classes), axis=1))
        places.append(best + len(names))
        names += [f"{name} {c}" for c in classes]
    p_all = np.concatenate(p_parts, axis=1)
    q = np.ones(p_all.shape)
    made = np.stack(q_tests, axis=1)
    adjusted = np.ones(made.shape)
    adjusted[~np.isnan(made)] = false_discovery(made[~np.isnan(made)])
    for column, place in enumerate(places):
        q[np.arange(len(q)), place] = adjusted[:, column]
    method = _named("mutual information", null, n_null)
    return Associations(tuple(names), p_all, q, any_tested, np.concatenate(effects, axis=1), method)


def _members(facets: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.column_stack([np.asarray(m, dtype=np.float32) for m in facets.values()])


def _tested(support: np.ndarray, min_support: int, skip: np.ndarray | None) -> np.ndarray:
    tested = support >= min_support
    return tested if skip is None else tested & ~skip


def _adjusted(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    q = np.ones(p.shape)
    q[tested] = false_discovery(p[tested].ravel()).reshape(-1, p.shape[1])
    return q


def _counts(fired: sp.csr_matrix, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits [n_features, classes], support [n_features] and class sizes [classes], int64."""
    hits = np.rint(fired.T.tocsr().astype(np.float32) @ members).astype(np.int64)
    support = np.bincount(fired.indices, minlength=size(fired)[1])
    return hits, support, np.rint(members.sum(axis=0)).astype(np.int64)


def _information(hits: np.ndarray, support: np.ndarray, n_members: np.ndarray) -> np.ndarray:
    """Mutual information of two counts tables' rows, nats [n_features]."""
    n = max(int(n_members.sum()), 1)
    total = np.zeros(len(hits))
    for cells, share in ((hits, support), (n_members - hits, n - support)):
        expected = share[:, None] * (n_members / n)
        ratio = np.divide(cells, expected, out=np.ones(cells.shape), where=(expected > 0) & (cells > 0))
        total += (cells / n * np.log(ratio)).sum(axis=1)
    return np.maximum(total, 0.0)


def _ranks(docs: sp.csr_matrix) -> tuple[sp.csc_matrix, np.ndarray, np.ndarray]:
    """Middle ranks of the firing documents by column, that of the silent ones, and Σ t³ − t over ties per column."""
    columns = sp.csc_matrix(docs, copy=True)
    columns.eliminate_zeros()
    if columns.nnz and columns.data.min() < 0:
        raise TransferError("Activations are negative; documents' values are maxima of codes, which are not.")
    n_docs, n_features = size(docs)
    counts = np.diff(columns.indptr)
    column = np.repeat(np.arange(n_features), counts)
    order = np.lexsort((columns.data, column))
    value, column = columns.data[order], column[order]
    silent = (n_docs - counts).astype(np.float64)
    ranks = np.zeros(columns.nnz)
    ties = silent**3 - silent
    if columns.nnz:
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(value) != 0) | (np.diff(column) != 0)]))
        sizes = np.diff(np.append(starts, len(value)))
        at = column[starts]
        middle = silent[at] + (starts - columns.indptr[at]) + (sizes + 1) / 2
        ranks[order] = np.repeat(middle, sizes)
        ties += np.bincount(at, weights=sizes.astype(np.float64) ** 3 - sizes, minlength=n_features)
    found = sp.csc_matrix((ranks, columns.indices, columns.indptr), shape=columns.shape)
    return found, (silent + 1) / 2, ties


def _by_column(pattern: sp.csc_matrix, inside: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum of ``values`` over the members, [n_features, facets]."""
    weighted = sp.csc_matrix((values, pattern.indices, pattern.indptr), shape=pattern.shape)
    return np.asarray(weighted.T @ inside.astype(np.float64))


def _moved(members: np.ndarray, null: str, n_null: int, seed: int) -> Iterator[np.ndarray]:
    """The facets of the documents moved at random, ``n_null`` times; facets of a document move together."""
    if null not in NULLS:
        raise TransferError(f"A null is one of {', '.join(NULLS)}, not {null!r}.")
    rng = np.random.default_rng(seed)
    return (members[rng.permutation(len(members))] for _ in range(n_null))


def _pooled(found: np.ndarray, draws: Iterable[np.ndarray], support: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """p-values against the draws of all features of like support, facet by facet; memory: all draws, float64."""
    p = np.ones(found.shape)
    rows = np.flatnonzero(tested)
    if not len(rows):
        return p
    # Equal support, equal stratum: the null of a rank or count statistic hangs on it.
    values, counts = np.unique(support[rows], return_counts=True)
    edges = np.cumsum(counts) * _strata(len(rows)) // (len(rows) + 1)
    stratum = edges[np.searchsorted(values, support[rows])]
    null = np.stack([d[rows] for d in draws])
    for s in np.unique(stratum):
        mine = stratum == s
        for facet in range(found.shape[1]):
            p[rows[mine], facet] = _tail(found[rows[mine], facet], np.sort(null[:, mine, facet].ravel()))
    return p


def _strata(n: int) -> int:
    """Groups of ``n`` features; few features share one."""
    return min(STRATA, max(1, n // 50))


def _draws(n_null: int, n: int) -> int:
    """Draws that give each group of ``n`` features a null of ``LEAST_NULL`` values at least."""
    return max(n_null, math.ceil(LEAST_NULL * _strata(n) / max(n, 1)))


def _tail(found: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Share of the sorted null at or above each value, and an exponential tail beyond its top ``TAIL``.

    Counting ends at one in the pool's size, which is too coarse for many tests. The tail falls with the mean excess of
    the pool's top values: more slowly than the normal, χ² and count tails of these statistics fall, so p errs upwards.
    """
    above = len(pool) - np.searchsorted(pool, found - 1e-12, side="left")
    p = (1 + above) / (1 + len(pool))
    top = min(TAIL, len(pool) // 10)
    if top:
        edge = pool[-top]
        excess = float((pool[-top:] - edge).mean())
        if excess > 0:
            beyond = found > pool[-1]
            p[beyond] = np.minimum(p[beyond], (top / len(pool)) * np.exp(-(found[beyond] - edge) / excess))
    return p


def _named(test: str, null: str, n_null: int) -> str:
    return f"{test}, {null} null" + (f" of {n_null} draws" if null == "permutation" else "")

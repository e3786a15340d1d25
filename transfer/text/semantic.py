"""Diversity of embedded texts: pairwise cosine, the Vendi score, and the regions that semantic entropy counts in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.text.embeddings import Embedder

MOST_REFERENCE = 5_000
"""Reference texts that regions are fitted on at most, chosen at random."""
CLUSTERS = 20
"""Regions of the embedding space that semantic entropy counts texts in."""
DIVISIONS = 5
"""Ways to divide it that semantic entropy is the mean of: on few texts a single one decides too much."""


def cosine_distance(vectors: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of unit vectors [texts, dimensions], in one pass; NaN below two texts."""
    n = len(vectors)
    if n < 2:
        return math.nan
    # The squared length of the sum holds every pair twice, and each text with itself once.
    total = vectors.sum(axis=0)
    return float(1 - (total @ total - np.einsum("ij,ij->", vectors, vectors)) / (n * (n - 1)))


def vendi(vectors: np.ndarray, order: float = 1.0) -> float:
    """Vendi score: exp of the Rényi entropy of the eigenvalues of the cosine kernel over n (arXiv 2210.02410).

    The effective number of different texts, from 1 (all alike) to their number (all orthogonal), and never more than
    the dimensions of the embedding. The nonzero eigenvalues of the kernel are those of the features' second moments,
    so the smaller of n x n and d x d is decomposed: 8 * min(n, d)^2 bytes.

    Args:
        vectors: Unit vectors [texts, dimensions].
        order: Of the entropy; 1 is Shannon's, ``inf`` looks at the largest eigenvalue alone.

    Raises:
        TransferError: For an order below zero.
    """
    if order < 0:
        raise TransferError(f"The Vendi score has no order {order}.", "Use 0 or more; 1 is the usual.")
    n, d = vectors.shape
    if n < 2:
        return math.nan
    from scipy.linalg import eigvalsh

    share = eigvalsh((vectors @ vectors.T if n <= d else vectors.T @ vectors) / n)
    share = share[share > 1e-12]
    share /= share.sum()
    if order == 1:
        return float(np.exp(-(share * np.log(share)).sum()))
    if math.isinf(order):
        return float(1 / share.max())
    return float((share**order).sum() ** (1 / (1 - order)))


def regions(embedder: Embedder, reference: Sequence[str], seed: int) -> list[np.ndarray]:
    """Centres of groups of reference texts (k-means; Han et al. 2022), ``DIVISIONS`` x [groups, d].

    Raises:
        TransferError: When no reference text has an embedding.
    """
    from sklearn.cluster import KMeans

    rng = np.random.default_rng([seed, 2])
    chosen = np.sort(rng.permutation(len(reference))[:MOST_REFERENCE])
    vectors = embedder([str(reference[i]) for i in chosen])
    vectors = vectors[vectors.any(axis=1)]
    kinds = len(np.unique(vectors.round(9), axis=0))
    if not kinds:
        raise TransferError(f"No reference text has an embedding under {embedder.name}.", "Give texts with words.")
    settings: dict[str, Any] = {"n_clusters": min(CLUSTERS, kinds), "n_init": 1}
    fits = (KMeans(**settings, random_state=seed + i) for i in range(DIVISIONS))
    return [fit.fit(vectors).cluster_centers_ for fit in fits]


def nearest_region(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Number of the nearest centre of each vector, int [vectors]."""
    return np.argmin((centres**2).sum(axis=1) - 2 * vectors @ centres.T, axis=1)

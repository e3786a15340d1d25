"""Two dictionaries with a known answer: shared features, a linear map between the spaces, noise everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.correlation import dims
from transfer.core.errors import TransferError
from transfer.core.space import FeatureSpace, FeatureView
from transfer.core.store import PairedActivations

TOPICS = 12
"""Groups of concepts; a document has one."""


@dataclass(frozen=True)
class Planted:
    """A planted pair of spaces and the truth about it."""

    source: FeatureView
    target: FeatureView
    pairs: PairedActivations
    truth: Int[np.ndarray, "shared 2"]
    """(source, target) ids of the shared features, by source id."""


def planted_pair(
    *,
    n_source: int = 160,
    n_target: int = 140,
    overlap: float = 0.6,
    d_source: int = 48,
    d_target: int = 64,
    n_docs: int = 150,
    rows_per_doc: int = 40,
    rate: float = 0.03,
    miss: float = 0.2,
    spurious: float = 0.1,
    noise: float = 0.3,
    topicality: float = 0.6,
    shared_tokens: int = 400,
    same_space: bool = False,
    seed: int = 0,
) -> Planted:
    """Draw a planted pair.

    Concepts fire in topical documents at log-normal rates. ``overlap`` of the smaller dictionary shares its concepts
    with the other side, in permuted order; everything else has concepts of its own. Each side misses events, fires
    spuriously and scales its activations on its own. Target directions of shared features are the source's through
    one random linear map, plus noise; the unembedding obeys the same map; residuals are the events (not the codes: what
    an SAE misses is still in its model) times directions, plus noise. Memory: rows × d_model on either side.

    Args:
        n_source: Source features.
        n_target: Target features.
        overlap: Share of the smaller side's features that both have; 0 plants two unrelated spaces.
        d_source: Source width.
        d_target: Target width.
        n_docs: Documents.
        rows_per_doc: Mean rows a document (lengths vary by half).
        rate: Median share of rows a concept fires on.
        miss: Share of a concept's events that a side does not show.
        spurious: Events a side adds, as a share of the true ones.
        noise: Norm of the noise in each target direction and each residual, relative to the signal.
        topicality: Share of a concept's events that fall into documents of its topic. Concepts of one topic fire
            together without being one ("correlated but different"); at 0 unshared features are independent.
        shared_tokens: Rows of the unembeddings.
        same_space: The map is the identity (two SAEs on one layer); widths must be equal.
        seed: Of everything.

    Raises:
        TransferError: For unequal widths in one space, or an overlap outside 0..1.
    """
    if not 0 <= overlap <= 1:
        raise TransferError(f"overlap is {overlap}; it must lie in 0..1.")
    if same_space and d_source != d_target:
        raise TransferError(f"One space has one width, got {d_source} and {d_target}.")
    rng = np.random.default_rng(seed)
    n_shared = round(overlap * min(n_source, n_target))
    src_concepts = rng.permutation(n_source)  # concept of each source feature; the first n_shared are shared
    own = np.arange(n_source, n_source + n_target - n_shared)
    tgt_concepts = rng.permutation(np.concatenate([np.arange(n_shared), own]))
    lengths = rng.integers(max(1, rows_per_doc // 2), rows_per_doc + rows_per_doc // 2 + 1, size=n_docs)
    docs = np.repeat(np.arange(n_docs, dtype=np.int32), lengths)
    events = _events(rng, docs, n_source + len(own), rate, topicality)
    source_events, target_events = events[:, src_concepts], events[:, tgt_concepts]
    source_codes = _codes(rng, source_events, miss, spurious)
    target_codes = _codes(rng, target_events, miss, spurious)

    mapping = np.eye(d_source) if same_space else rng.normal(size=(d_source, d_target)) / np.sqrt(d_source)
    src_directions = _unit(rng.normal(size=(n_source, d_source)))
    tgt_directions = _unit(rng.normal(size=(n_target, d_target)))
    truth = _truth(src_concepts, tgt_concepts, n_shared)
    tgt_directions[truth[:, 1]] = _unit(src_directions[truth[:, 0]] @ mapping)
    tgt_directions = _unit(tgt_directions + noise * _unit(rng.normal(size=tgt_directions.shape)))
    tgt_tokens = rng.normal(size=(shared_tokens, d_target))
    src_tokens = tgt_tokens @ mapping.T
    src_tokens = src_tokens + noise * src_tokens.std() * rng.normal(size=src_tokens.shape)
    return Planted(
        source=planted_view("source", src_directions, src_tokens),
        target=planted_view("target", tgt_directions, tgt_tokens),
        pairs=PairedActivations(
            source_codes,
            target_codes,
            docs,
            _residual(rng, source_events, src_directions, noise),
            _residual(rng, target_events, tgt_directions, noise),
        ),
        truth=truth,
    )


def _truth(src_concepts: np.ndarray, tgt_concepts: np.ndarray, n_shared: int) -> Int[np.ndarray, "shared 2"]:
    rows = np.flatnonzero(src_concepts < n_shared)
    where = np.empty(max(n_shared, 1), dtype=np.int64)
    cols = np.flatnonzero(tgt_concepts < n_shared)
    where[tgt_concepts[cols]] = cols
    return np.stack([rows, where[src_concepts[rows]]], axis=1)


def _events(
    rng: np.random.Generator, docs: np.ndarray, n_concepts: int, rate: float, topicality: float
) -> sp.csc_matrix:
    """Strength of each concept on each row [rows, concepts]."""
    rates = np.minimum(rate * np.exp(0.6 * rng.normal(size=n_concepts)), 0.3)
    topic_of_concept = rng.integers(TOPICS, size=n_concepts)
    topic_of_row = rng.integers(TOPICS, size=docs[-1] + 1)[docs]
    counts = rng.poisson(rates * len(docs))
    concept = np.repeat(np.arange(n_concepts), counts)
    rows = rng.integers(len(docs), size=len(concept))
    on_topic = rng.uniform(size=len(concept)) < topicality
    for topic in range(TOPICS):
        pool = np.flatnonzero(topic_of_row == topic)
        wanted = np.flatnonzero(on_topic & (topic_of_concept[concept] == topic))
        if len(pool):
            rows[wanted] = pool[rng.integers(len(pool), size=len(wanted))]
    events = sp.csc_matrix((np.ones(len(rows)), (rows, concept)), shape=(len(docs), n_concepts))
    events.data = np.exp(0.4 * rng.normal(size=events.nnz))
    return events


def _codes(rng: np.random.Generator, events: sp.csc_matrix, miss: float, spurious: float) -> sp.csr_matrix:
    """One side's codes [rows, features], float32: the events' strengths on a scale of its own, seen with noise."""
    mine = events.tocoo()
    n_rows, n_features = dims(sp.csr_matrix(events))
    keep = rng.uniform(size=mine.nnz) >= miss
    extra = int(spurious * mine.nnz)
    rows = np.concatenate([mine.row[keep], rng.integers(n_rows, size=extra)])
    cols = np.concatenate([mine.col[keep], rng.choice(mine.col, size=extra)])
    strength = np.concatenate([mine.data[keep], np.ones(extra)]) * np.exp(0.2 * rng.normal(size=len(rows)))
    values = strength * rng.uniform(1, 3, size=n_features)[cols]
    return sp.csr_matrix((values.astype(np.float32), (rows, cols)), shape=(n_rows, n_features))


def _residual(
    rng: np.random.Generator, events: sp.csc_matrix, directions: np.ndarray, noise: float
) -> Float[np.ndarray, "rows d"]:
    clean = events @ directions
    return (clean + noise * clean.std() * rng.normal(size=clean.shape)).astype(np.float32)


def planted_view(
    name: str, directions: Float[np.ndarray, "n d"], tokens: Float[np.ndarray, "shared d"] | None = None
) -> FeatureView:
    """A view of a space that no model has, with these decoder rows and unembedding rows."""
    n, d = directions.shape
    space = FeatureSpace(
        model=f"planted:{name}",
        model_hash=name,
        layer=1,
        sae=f"planted:{name}",
        sae_hash=name,
        n_features=n,
        d_model=d,
        rule="planted",
        template_offset=0,
    )
    return FeatureView(space, directions.astype(np.float32), None if tokens is None else tokens.astype(np.float32))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)

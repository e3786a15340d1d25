"""The planted stress test: many features, splits, children that fire with a parent without being it, little text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from aligners.planted import planted_view
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations


@dataclass(frozen=True)
class Setting:
    """Sizes and difficulty of a stress pair; the defaults are the stress setting at full size."""

    n_shared: int = 5000
    """Concepts that both sides have."""
    split: float = 0.15
    """Share of the shared concepts that a side has as two features, each for half of the events; drawn per side."""
    n_own: int = 3000
    """Features that one side has alone."""
    children: float = 0.5
    """Share of a side's own features that fire on half of the events of a shared concept."""
    n_concepts: int = 12000
    zipf: float = 0.7
    """Exponent of the concepts' frequencies."""
    active: float = 32.0
    """Concepts a row has on average."""
    n_topics: int = 60
    topicality: float = 0.5
    """Share of a concept's events that fall into sequences of its topic."""
    row_length: int = 256
    """Rows of a sequence; a sequence has one topic."""
    n_rows: int = 20_000
    miss: float = 0.5
    """Share of a feature's events that do not show."""
    spurious: float = 0.5
    """Events added at random rows, as a share of the true ones."""
    noise: float = 0.4
    """Length of the noise in a decoder row of length one: true counterparts have cosine 1 − noise²."""
    child_cosine: float = 0.6
    """Of a child's direction with its parent's, before noise."""
    d_source: int = 384
    d_target: int = 512

    @property
    def n_features(self) -> int:
        """Features a side."""
        return self.n_shared + round(self.split * self.n_shared) + self.n_own

    def scaled(self, share: float, **changes: float) -> Setting:
        """The same problem with this share of concepts, active concepts, topics, widths; rows stay as they are."""
        counts = ("n_shared", "n_own", "n_concepts", "n_topics", "d_source", "d_target")
        small = {name: max(1, round(getattr(self, name) * share)) for name in counts}
        return dataclasses.replace(self, **{**small, "active": self.active * share, **changes})


STRESS = Setting()
EASY = Setting(children=0.0, n_rows=200_000, miss=0.3, spurious=0.1)


@dataclass(frozen=True)
class Side:
    """What each feature of one side is."""

    concept: Int[np.ndarray, " n"]
    """Concept the feature shows; for a child its parent's."""
    child: Bool[np.ndarray, " n"]
    shared: Bool[np.ndarray, " n"]
    """It shows a concept that the other side has too, and is no child."""
    half: Int[np.ndarray, " n"]
    """0 for a whole concept, 1 and 2 for the halves of a split one."""


@dataclass(frozen=True)
class StressPair:
    """A planted pair of spaces and the truth about it."""

    source: FeatureView
    target: FeatureView
    pairs: PairedActivations
    left: Side
    right: Side
    truth: Int[np.ndarray, "edges 2"]
    """All (source, target) features of one shared concept, sorted: two for a split on one side, four for both."""

    def split_edges(self) -> list[Int[np.ndarray, "2 2"]]:
        """The two edges of every concept that is split on exactly one side."""
        by_concept = np.argsort(self.left.concept[self.truth[:, 0]], kind="stable")
        concepts = self.left.concept[self.truth[by_concept, 0]]
        starts = np.flatnonzero(np.diff(concepts, prepend=-1))
        groups = np.split(self.truth[by_concept], starts[1:])
        return [g for g in groups if len(g) == 2]


def stress_pair(setting: Setting = STRESS, seed: int = 0) -> StressPair:
    """Draw a pair: shared concepts, splits, own features, children.

    Concepts fire at Zipf rates, partly in sequences of their topic. Each side shows a share of the events, adds
    spurious ones and scales values on its own; children show exactly half of their parent's events. Directions of
    concepts are random; the target sees them through one random linear map; every row gets noise of its own. Features
    stand in random order. Memory: the events, 12 bytes each (``n_rows × active``), and the rows.

    Raises:
        TransferError: When there are fewer concepts than the two sides need, or a share lies outside 0..1.
    """
    s = setting
    for name in ("split", "children", "topicality", "miss", "noise", "child_cosine"):
        if not 0 <= getattr(s, name) <= 1:
            raise TransferError(f"{name} is {getattr(s, name)}; it must lie in 0..1.")
    n_children = round(s.children * s.n_own)
    needed = s.n_shared + 2 * (s.n_own - n_children)
    if s.n_shared < 1 or needed > s.n_concepts:
        raise TransferError(f"The sides need {needed} concepts, at least one of them shared; there are {s.n_concepts}.")
    rng = np.random.default_rng(seed)
    concepts = rng.permutation(s.n_concepts)  # by frequency rank; which are shared is chance
    shared, rest = concepts[: s.n_shared], concepts[s.n_shared : needed]
    docs = (np.arange(s.n_rows) // s.row_length).astype(np.int32)
    events = _events(rng, s, docs)
    left = _side(rng, s, shared, rest[: len(rest) // 2], n_children)
    right = _side(rng, s, shared, rest[len(rest) // 2 :], n_children)
    directions = _unit(rng.normal(size=(s.n_concepts, s.d_source)))
    mapping = rng.normal(size=(s.d_source, s.d_target)) / np.sqrt(s.d_source)
    return StressPair(
        source=planted_view("stress:source", _rows(rng, s, left, directions, None)),
        target=planted_view("stress:target", _rows(rng, s, right, directions, mapping)),
        pairs=PairedActivations(_codes(rng, s, left, events), _codes(rng, s, right, events), docs),
        left=left,
        right=right,
        truth=_truth(left, right),
    )


def _events(rng: np.random.Generator, s: Setting, docs: np.ndarray) -> sp.csc_matrix:
    """Strength of each concept on each row [rows, concepts]."""
    rate = np.arange(1, s.n_concepts + 1) ** -s.zipf
    rate = np.minimum(rate * (s.active / rate.sum()), 0.5)
    concept = np.repeat(np.arange(s.n_concepts, dtype=np.int32), rng.poisson(rate * s.n_rows))
    rows = rng.integers(s.n_rows, size=len(concept))
    topic_of_concept = rng.integers(s.n_topics, size=s.n_concepts)
    topic_of_row = rng.integers(s.n_topics, size=docs[-1] + 1)[docs]
    by_topic = np.argsort(topic_of_row, kind="stable")
    size = np.bincount(topic_of_row, minlength=s.n_topics)
    first = np.cumsum(size) - size
    mine = topic_of_concept[concept]
    moved = np.flatnonzero((rng.uniform(size=len(concept)) < s.topicality) & (size[mine] > 0))
    rows[moved] = by_topic[first[mine[moved]] + rng.integers(size[mine[moved]])]
    events = sp.csc_matrix((np.ones(len(rows), dtype=np.float32), (rows, concept)), shape=(s.n_rows, s.n_concepts))
    events.sum_duplicates()
    events.data = np.exp(0.4 * rng.normal(size=events.nnz)).astype(np.float32)
    return events


def _side(rng: np.random.Generator, s: Setting, shared: np.ndarray, own: np.ndarray, n_children: int) -> Side:
    split = np.zeros(s.n_shared, dtype=bool)
    split[rng.permutation(s.n_shared)[: round(s.split * s.n_shared)]] = True
    concept = np.concatenate([shared, shared[split], own, rng.choice(shared, size=n_children)])
    half = np.concatenate([split.astype(int), np.full(split.sum(), 2), np.zeros(len(own) + n_children, dtype=int)])
    at = np.arange(len(concept))
    order = rng.permutation(len(concept))
    n_show = s.n_shared + int(split.sum())
    return Side(concept[order], (at >= len(concept) - n_children)[order], (at < n_show)[order], half[order])


def _truth(left: Side, right: Side) -> Int[np.ndarray, "edges 2"]:
    width = int(max(left.concept.max(), right.concept.max())) + 1
    member = [
        sp.csr_matrix((x.shared.astype(np.int8), (np.arange(len(x.concept)), x.concept)), (len(x.concept), width))
        for x in (left, right)
    ]
    edges = sp.coo_matrix(member[0] @ member[1].T)
    keep = edges.data > 0
    found = np.stack([edges.row[keep], edges.col[keep]], axis=1).astype(np.int64)
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def _codes(rng: np.random.Generator, s: Setting, side: Side, events: sp.csc_matrix) -> sp.csr_matrix:
    """Codes of one side [rows, features], float32."""
    length = np.diff(events.indptr)[side.concept]
    feature = np.repeat(np.arange(len(side.concept), dtype=np.int32), length)
    at = np.arange(len(feature)) - np.repeat(np.cumsum(length) - length, length)
    at += np.repeat(events.indptr[side.concept].astype(np.int64), length)
    coin = rng.integers(1, 3, size=events.nnz)  # which half of a split concept an event belongs to
    half = side.half[feature]
    keep = np.where(half == 0, True, coin[at] == half)
    chance = rng.uniform(size=len(feature))
    keep &= np.where(side.child[feature], chance < 0.5, chance >= s.miss)
    rows, cols, strength = events.indices[at[keep]], feature[keep], events.data[at[keep]]
    noisy = feature[~side.child[feature] & ((half == 0) | (coin[at] == half))]
    extra = rng.choice(noisy, size=int(s.spurious * len(noisy)))
    rows = np.concatenate([rows, rng.integers(s.n_rows, size=len(extra))])
    cols = np.concatenate([cols, extra])
    strength = np.concatenate([strength, np.exp(0.4 * rng.normal(size=len(extra)))])
    strength = strength * np.exp(0.2 * rng.normal(size=len(strength))) * rng.uniform(1, 3, len(side.concept))[cols]
    return sp.csr_matrix((strength.astype(np.float32), (rows, cols)), shape=(s.n_rows, len(side.concept)))


def _rows(
    rng: np.random.Generator, s: Setting, side: Side, directions: np.ndarray, mapping: np.ndarray | None
) -> Float[np.ndarray, "n d"]:
    signal = directions[side.concept]
    n_children = int(side.child.sum())
    aside = _unit(rng.normal(size=(n_children, s.d_source)))
    signal[side.child] = s.child_cosine * signal[side.child] + np.sqrt(1 - s.child_cosine**2) * aside
    signal = _unit(signal if mapping is None else signal @ mapping)
    noise = _unit(rng.normal(size=signal.shape))
    rows = np.sqrt(1 - s.noise**2) * signal + s.noise * noise
    return (rows * rng.uniform(0.5, 2.0, size=(len(rows), 1))).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)

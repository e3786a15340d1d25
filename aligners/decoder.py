"""Match features by the directions they write: through a learned map, the shared vocabulary, or in one space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from aligners.assignment import Rule, select
from aligners.base import Aligner, coupling_of, match_columns
from aligners.canonical import canonical_coordinates
from aligners.correlation import usable_features
from aligners.maps import Kind, SplitSums, best_map, blocks_of, check_kind
from aligners.topk import inner_blocks, neighbour_means, topk_blocks, unit_rows
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

Via = Literal["map", "unembedding", "same"]
NEIGHBOURS = 10
"""Neighbours in the means of CSLS (arXiv 1710.04087)."""


@dataclass(frozen=True)
class Comparable:
    """Directions of both sides scaled so that inner products are the cosines wanted."""

    source_ids: Int[np.ndarray, " n_src"]
    target_ids: Int[np.ndarray, " n_tgt"]
    source: Float[np.ndarray, "n_src d"]
    target: Float[np.ndarray, "n_tgt d"]
    info: dict[str, Any]


def comparable(
    source: FeatureView,
    target: FeatureView,
    pairs: PairedActivations | None,
    via: Via,
    *,
    kind: Kind = "ridge",
    min_support: int = 10,
    seed: int = 0,
) -> Comparable:
    """Bring the directions of the testable features of both sides into one space.

    Cosine across models is undefined until something relates the spaces: a map learned from paired residuals
    (``map``; the source's directions go to the target's space, or with ``cca`` both go to canonical coordinates), the
    logits of the tokens both vocabularies share, centred over those tokens (``unembedding``), or the fact that it is
    one space (``same``). Features without direction, and with ``pairs`` those too rare or always on,
    are left out and counted. Memory: copies of the directions; for a map what ``aligners.maps.fit_blocks`` takes; for
    the unembedding three d × d matrices, never features × tokens.

    Raises:
        TransferError: When nothing is left on one side.
    """
    info: dict[str, Any] = {}
    if pairs is None:
        ids = [np.arange(source.space.n_features), np.arange(target.space.n_features)]
    else:
        left, right, counts = usable_features(pairs, min_support)
        info.update(counts)
        ids = [left.ids, right.ids]
    x, y = source.directions, target.directions
    ids = [i[np.linalg.norm(d[i], axis=1) > 0] for i, d in zip(ids, (x, y), strict=True)]
    info["zero_directions_source"] = int(np.sum(np.linalg.norm(x, axis=1) == 0))
    info["zero_directions_target"] = int(np.sum(np.linalg.norm(y, axis=1) == 0))
    for side, found in zip(("source", "target"), ids, strict=True):
        if not len(found):
            raise TransferError(f"No {side} feature has a direction; all decoder rows are zero.", "Check the SAE.")
    info["testable_source"], info["testable_target"] = len(ids[0]), len(ids[1])
    a, b = unit_rows(x[ids[0]].astype(np.float64)), unit_rows(y[ids[1]].astype(np.float64))
    if via == "map":
        assert pairs is not None and pairs.source_residual is not None and pairs.target_residual is not None
        check_kind(kind)
        blocks = blocks_of(pairs.source_residual, pairs.target_residual, pairs.docs)
        sums = SplitSums.of(blocks, full=kind != "ridge", seed=seed)
        found, _ = best_map(sums, kind)
        if kind == "cca":
            into_a, into_b, _ = canonical_coordinates(sums.total)
            a, b = unit_rows(a @ into_a), unit_rows(b @ into_b)
        else:
            a = unit_rows(found.vectors(a))
        info.update(
            heldout_r2=found.heldout_r2,
            map_strength=found.strength,
            map_rank=found.rank,
            map_rows=found.n_rows,
            map_outliers=found.n_outliers,
        )
    elif via == "unembedding":
        assert source.unembedding is not None and target.unembedding is not None
        a, b = _through_tokens(a, b, source.unembedding, target.unembedding)
        info["shared_tokens"] = len(source.unembedding)
    elif via != "same":
        raise TransferError(f"Unknown way {via!r} to compare decoders.", "Use 'map', 'unembedding' or 'same'.")
    return Comparable(ids[0], ids[1], a, b, info)


def _through_tokens(
    a: Float[np.ndarray, "n_src d_src"],
    b: Float[np.ndarray, "n_tgt d_tgt"],
    u: Float[np.ndarray, "shared d_src"],
    v: Float[np.ndarray, "shared d_tgt"],
) -> tuple[Float[np.ndarray, "n_src d_tgt"], Float[np.ndarray, "n_tgt d_tgt"]]:
    """Vectors whose inner products are cosines of centred token logits, without building features × tokens.

    ⟨u·a, v·b⟩ = aᵀ(UᵀV)b, and a norm is aᵀ(UᵀU)a, with U and V centred over tokens.
    """
    if len(u) != len(v):
        raise TransferError(f"The unembeddings list {len(u)} and {len(v)} tokens.", "Give the shared tokens, in order.")
    u = u.astype(np.float64) - u.mean(axis=0, dtype=np.float64)
    v = v.astype(np.float64) - v.mean(axis=0, dtype=np.float64)
    norm_a = np.sqrt(np.einsum("nd,nd->n", a @ (u.T @ u), a))
    norm_b = np.sqrt(np.einsum("nd,nd->n", b @ (v.T @ v), b))
    if not (np.all(norm_a > 0) and np.all(norm_b > 0)):
        raise TransferError("Some directions do not move the shared tokens' logits at all.", "Share more tokens.")
    return (a @ (u.T @ v)) / norm_a[:, None], b / norm_b[:, None]


def hub_means(found: Comparable) -> tuple[Float[np.ndarray, " n_src"], Float[np.ndarray, " n_tgt"]]:
    """Mean cosine to the nearest neighbours, per source and per target feature."""
    shape = (len(found.source_ids), len(found.target_ids))
    return neighbour_means(topk_blocks(inner_blocks(found.source, found.target), shape, NEIGHBOURS))


class DecoderAligner(Aligner):
    """Mutual nearest neighbours (or one-to-one assignment) by cosine of decoder directions.

    Args:
        via: ``map`` (learned from paired residuals), ``unembedding`` (logits of shared tokens) or ``same`` (one
            residual space: seeds, widths, fine-tunes; ``aligners.same_space`` also compares encoders there).
        csls: Rank by ``2·cos − r − r`` so that hubs do not win every row; scores stay cosines. Costs a second pass.
        kind: Of the map (``aligners.maps.fit_blocks``), or ``cca`` for canonical coordinates (``aligners.canonical``).
        min_support: With ``pairs``, rows a feature must fire on to be testable.
        rule: ``mutual`` or ``one_to_one`` (the latter for at most 4,096 testable features a side).
        seed: Of the inner split that picks the map's strength.
    """

    method = "decoder"

    def __init__(
        self,
        *,
        via: Via = "map",
        csls: bool = True,
        kind: Kind = "ridge",
        min_support: int = 10,
        rule: Rule = "mutual",
        seed: int = 0,
    ) -> None:
        self.via: Via = via
        self.csls = csls
        self.kind: Kind = kind
        self.min_support = min_support
        self.rule: Rule = rule
        self.seed = seed

    def needs(self) -> frozenset[str]:
        """What the chosen way needs."""
        return decoder_needs(self.via)

    def name(self) -> str:
        """The way counts as the method's name; ``decoder`` alone for one space."""
        return "decoder" if self.via == "same" else self.via

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        found = comparable(
            source, target, pairs, self.via, kind=self.kind, min_support=self.min_support, seed=self.seed
        )
        shifts = hub_means(found) if self.csls else (None, None)
        shape = (len(found.source_ids), len(found.target_ids))
        rows, cols = select(inner_blocks(found.source, found.target, *shifts), shape, self.rule)
        cosine = np.einsum("nd,nd->n", found.source[rows], found.target[cols])
        keep = cosine > 0
        matches = match_columns(found.source_ids[rows[keep]], found.target_ids[cols[keep]], np.minimum(cosine[keep], 1))
        coupling = coupling_of(matches, (source.space.n_features, target.space.n_features))
        return self._alignment(source, target, matches, coupling, info=found.info)


def decoder_needs(via: str) -> frozenset[str]:
    """Parts of the input that a way of comparing decoders needs."""
    needs = {"map": {"pairs", "residuals"}, "unembedding": {"unembedding"}, "same": {"one_space"}}
    return frozenset(needs.get(via, set()))

"""Match features by the directions they write: through a learned map, the shared vocabulary, or in one space."""

from __future__ import annotations

from collections.abc import Callable
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
Change = Callable[[Float[np.ndarray, "n d"]], np.ndarray]
NEIGHBOURS = 10
"""Neighbours in the means of CSLS (arXiv 1710.04087)."""
BLOCK = 2**21
"""Numbers of directions that are in float64 at once."""


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
    are left out and counted.

    Directions may be memory-mapped. They are computed in float64 by the block and kept in the type they come in
    (float32 at least). Memory: 4·d bytes a testable feature of either side in the space they share, 64 MiB for the
    blocks; for a map what ``aligners.maps.fit_blocks`` takes; for the unembedding three d × d matrices and a float64
    copy of the shared tokens, never features × tokens.

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
    pointing = [_in_blocks(d, np.arange(len(d)), lambda rows: np.einsum("nd,nd->n", rows, rows) > 0) for d in (x, y)]
    ids = [i[some[i]] for i, some in zip(ids, pointing, strict=True)]
    info["zero_directions_source"], info["zero_directions_target"] = (int(np.sum(~some)) for some in pointing)
    for side, found in zip(("source", "target"), ids, strict=True):
        if not len(found):
            raise TransferError(f"No {side} feature has a direction; all decoder rows are zero.", "Check the SAE.")
    info["testable_source"], info["testable_target"] = len(ids[0]), len(ids[1])
    into: tuple[Change, Change] = (_as_they_are, _as_they_are)
    if via == "map":
        assert pairs is not None and pairs.source_residual is not None and pairs.target_residual is not None
        check_kind(kind)
        blocks = blocks_of(pairs.source_residual, pairs.target_residual, pairs.docs)
        sums = SplitSums.of(blocks, full=kind != "ridge", seed=seed)
        found, _ = best_map(sums, kind)
        if kind == "cca":
            shared_a, shared_b, _ = canonical_coordinates(sums.total)
            into = (lambda rows: unit_rows(rows @ shared_a)), (lambda rows: unit_rows(rows @ shared_b))
        else:
            into = (lambda rows: unit_rows(found.vectors(rows))), _as_they_are
        info.update(
            heldout_r2=found.heldout_r2,
            map_strength=found.strength,
            map_rank=found.rank,
            map_rows=found.n_rows,
            map_outliers=found.n_outliers,
        )
    elif via == "unembedding":
        assert source.unembedding is not None and target.unembedding is not None
        into = _through_tokens(source.unembedding, target.unembedding)
        info["shared_tokens"] = len(source.unembedding)
    elif via != "same":
        raise TransferError(f"Unknown way {via!r} to compare decoders.", "Use 'map', 'unembedding' or 'same'.")
    a, b = (
        _in_blocks(d, i, lambda rows, f=f, d=d: f(unit_rows(rows)).astype(np.result_type(d.dtype, np.float32)))
        for d, i, f in zip((x, y), ids, into, strict=True)
    )
    return Comparable(ids[0], ids[1], a, b, info)


def _in_blocks(directions: np.ndarray, ids: Int[np.ndarray, " n"], work: Change) -> Float[np.ndarray, "n ..."]:
    """``work`` of the float64 rows ``ids``, a block at a time, in one array."""
    out: np.ndarray | None = None
    step = max(1, BLOCK // directions.shape[1])
    for start in range(0, len(ids), step):
        done = work(directions[ids[start : start + step]].astype(np.float64))
        out = np.empty((len(ids), *done.shape[1:]), done.dtype) if out is None else out
        out[start : start + step] = done
    assert out is not None
    return out


def _as_they_are(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return rows


def _through_tokens(
    u: Float[np.ndarray, "shared d_src"], v: Float[np.ndarray, "shared d_tgt"]
) -> tuple[Change, Change]:
    """What makes of unit rows of either side vectors whose inner products are cosines of centred token logits.

    Features × tokens is never built: ⟨u·a, v·b⟩ = aᵀ(UᵀV)b, and a norm is aᵀ(UᵀU)a, with U and V centred over tokens.
    """
    if len(u) != len(v):
        raise TransferError(f"The unembeddings list {len(u)} and {len(v)} tokens.", "Give the shared tokens, in order.")
    u = u.astype(np.float64) - u.mean(axis=0, dtype=np.float64)
    v = v.astype(np.float64) - v.mean(axis=0, dtype=np.float64)
    uu, vv, uv = u.T @ u, v.T @ v, u.T @ v

    def moved(rows: np.ndarray, square: np.ndarray) -> np.ndarray:
        norm = np.sqrt(np.einsum("nd,nd->n", rows @ square, rows))
        if not np.all(norm > 0):
            raise TransferError("Some directions do not move the shared tokens' logits at all.", "Share more tokens.")
        return norm[:, None]

    return (lambda a: a @ uv / moved(a, uu)), (lambda b: b / moved(b, vv))


def _cosines(found: Comparable, rows: Int[np.ndarray, " n"], cols: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Cosines of listed pairs, in float64."""
    out = np.empty(len(rows))
    step = max(1, BLOCK // found.source.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        a, b = found.source[rows[part]].astype(np.float64), found.target[cols[part]].astype(np.float64)
        out[part] = np.einsum("nd,nd->n", a, b)
    return out


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
        cosine = _cosines(found, rows, cols)
        keep = cosine > 0
        matches = match_columns(found.source_ids[rows[keep]], found.target_ids[cols[keep]], np.minimum(cosine[keep], 1))
        coupling = coupling_of(matches, (source.space.n_features, target.space.n_features))
        return self._alignment(source, target, matches, coupling, info=found.info)


def decoder_needs(via: str) -> frozenset[str]:
    """Parts of the input that a way of comparing decoders needs."""
    needs = {"map": {"pairs", "residuals"}, "unembedding": {"unembedding"}, "same": {"one_space"}}
    return frozenset(needs.get(via, set()))

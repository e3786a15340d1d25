"""The features that fire most together with each feature, and how much of that chance alone would give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.coactivation import (
    SUMS_BYTES,
    Joint,
    Measure,
    Moments,
    PairedCodes,
    block_features,
    joint_blocks,
    measured,
    refuse_unknown,
)
from aligners.sparse_partners import few_events, flipped, meeting_partners
from transfer.core.errors import TransferError

SPARE = 8
"""Partners held beyond those wanted, since lists are made in float32 and ordered in float64."""
CACHED = 2**17
"""Scores computed at once: their float64 temporaries stay in the cache."""
STRATA = 10


@dataclass(frozen=True)
class Partners:
    """The best partners of each feature of one side, best first; equal scores by lower id."""

    ids: Int[np.ndarray, "n k"]
    """−1 where a feature has fewer than k partners with a positive score."""
    scores: Float[np.ndarray, "n k"]
    """float64, −inf where there is none."""
    n11: Int[np.ndarray, "n k"]
    """Rows on which both fire."""
    products: Float[np.ndarray, "n k"]
    """Σ f·g."""


def top_partners(
    codes: PairedCodes, k: int, measure: Measure = "phi", min_support: int = 2, sums_bytes: int = SUMS_BYTES
) -> tuple[Partners, Partners]:
    """The ``k`` best partners of every source and of every target feature, both from one pass over the codes.

    Only positive scores count. Sums and scores are float64; which partners are listed is decided in float32, with
    some to spare, and their order in float64. Features below ``min_support`` neither get nor are partners. Where few
    pairs ever meet, only those are gone through (``aligners.sparse_partners``), with the same result.

    Memory: what ``joint_blocks`` takes, and ``120·(k + 8)`` bytes for each target feature.

    Raises:
        TransferError: For k < 1 or an unknown measure.
    """
    from aligners.leaders import Leaders

    if k < 1:
        raise TransferError(f"Top partners need k ≥ 1, got {k}.")
    refuse_unknown(measure)
    n_src, n_tgt = len(codes.source.mean), len(codes.target.mean)
    if few_events(codes):
        rows = Partners(*meeting_partners(codes, k, measure, min_support))
        return rows, Partners(*meeting_partners(flipped(codes), k, measure, min_support))
    block = block_features(n_tgt, n_src, sums_bytes)
    scores = np.empty((block, n_tgt), dtype=np.float32)
    score = _Score(codes, measure, min_support)
    columns = Leaders(n_tgt, k + SPARE, np.int32, numbers=True)
    listed: list[Partners] = []
    for joint in joint_blocks(codes, sums_bytes=sums_bytes):
        live = scores[: len(joint.features)]
        score.fill(joint, live)
        best = Leaders(len(live), k + SPARE, np.int32)
        best.offer_rows(live.view(np.int32), 0)
        ids = best.table()[0]
        at = (np.arange(len(live))[:, None], ids)
        listed.append(_ordered(codes, measure, joint.features, ids, joint.n11[at], joint.products[at], k))
        columns.offer_columns(live.view(np.int32), 0, int(joint.features[0]), (joint.n11, joint.products))
    ids, _, _, numbers = columns.table()
    n11, products = np.where(ids[:, :, None] >= 0, numbers, 0).transpose(2, 0, 1)
    rows = Partners(*(np.concatenate([getattr(p, f.name) for p in listed]) for f in dataclasses.fields(Partners)))
    return rows, _ordered(codes, measure, np.arange(n_tgt), ids, n11.astype(np.int64), products, k, flip=True)


class _Score:
    """Float32 scores of blocks, a few rows at a time.

    Pearson is computed in float64, because the product of two means can dwarf their covariance; counts need not be.
    """

    def __init__(self, codes: PairedCodes, measure: Measure, min_support: int) -> None:
        a, b = codes.source, codes.target
        self.measure, self.type = measure, np.float64 if measure == "pearson" else np.float32
        ones = {"jaccard": (np.ones(len(a.mean)), np.ones(len(b.mean)))}
        row, col = ones.get(measure) or (a.scales[measure], b.scales[measure])
        self.row_scale = np.where(a.support >= min_support, row, 0.0).astype(self.type)
        self.col_scale = np.where(b.support >= min_support, col, 0.0).astype(self.type)
        row, col = {
            "pearson": (a.rows * a.mean, b.mean),
            "phi": (a.support / a.rows, b.support),
            "jaccard": (a.support, b.support),
        }[measure]
        self.row, self.col = row.astype(self.type), col.astype(self.type)

    def fill(self, joint: Joint, out: Float[np.ndarray, "block n_tgt"]) -> None:
        """Scores of a block, at most 0 for what is below the support."""
        step = max(1, CACHED // out.shape[1])
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            ids = joint.features[rows, None]
            sums = joint.products[rows] if self.measure == "pearson" else joint.n11[rows].astype(self.type)
            if self.measure == "jaccard":
                values = np.add(self.row[ids], self.col)
                values -= sums
                np.divide(sums, np.maximum(values, 1, out=values), out=values)
            else:
                values = np.multiply(self.row[ids], self.col)
                np.subtract(sums, values, out=values)
            values *= self.col_scale
            np.multiply(values, self.row_scale[ids], out=out[rows], casting="same_kind")


def _ordered(
    codes: PairedCodes,
    measure: Measure,
    owner: Int[np.ndarray, " n"],
    ids: Int[np.ndarray, "n keep"],
    n11: Int[np.ndarray, "n keep"],
    products: Float[np.ndarray, "n keep"],
    k: int,
    flip: bool = False,
) -> Partners:
    """The best k of each list by float64 score; equal ones by lower id."""
    src, tgt = (ids, owner[:, None]) if flip else (owner[:, None], ids)
    scores = np.where(ids >= 0, measured(measure, products, n11, codes, src, tgt), -np.inf)
    order = np.argsort(ids, axis=1, kind="stable")
    best = np.argsort(-np.take_along_axis(scores, order, axis=1), axis=1, kind="stable")[:, :k]
    order = np.take_along_axis(order, best, axis=1)
    found = ids.shape[1] - np.sum(ids < 0, axis=1)
    none = np.arange(order.shape[1]) >= found[:, None]
    ids, scores, n11, products = (np.take_along_axis(x, order, axis=1) for x in (ids, scores, n11, products))
    return Partners(ids, scores, np.where(none, 0, n11).astype(np.int64), np.where(none, 0.0, products))


@dataclass(frozen=True)
class ShiftNull:
    """Best score of source features with any target feature, when the two streams are moved against each other."""

    features: Int[np.ndarray, " n"]
    support: Int[np.ndarray, " n"]
    best: Float[np.ndarray, "draws n"]
    """Max-statistic: what a feature's best partner reaches by chance."""

    def thresholds(self, level: float, support: Int[np.ndarray, " m"], strata: int = STRATA) -> Float[np.ndarray, " m"]:
        """Quantile ``level`` of the max-statistic among null features of like support, for features of this support.

        Strata hold equal numbers of null features: Pearson's null is heavier for rare features, so one threshold for
        all would pass the rare and stop the frequent.
        """
        order = np.argsort(self.support, kind="stable")
        groups = [g for g in np.array_split(order, min(strata, len(order))) if len(g)]
        values = np.array([np.quantile(self.best[:, g], level) for g in groups])
        edges = [self.support[g[0]] for g in groups[1:]]
        return values[np.searchsorted(edges, support, side="right")]


def shift_null(
    codes: PairedCodes,
    features: Int[np.ndarray, " n"],
    shifts: Int[np.ndarray, "draws parts"],
    measure: Measure = "phi",
    min_support: int = 2,
) -> ShiftNull:
    """Best scores after moving the target rows of each chunk up in a circle, once for each row of ``shifts``.

    Moves by whole documents (``aligners.calibrate.document_shifts`` of the chunk) keep what happens within a document
    and on each side; only what the two sides share is lost. Costs one pass over the joint events of ``features`` a
    draw, so that a few hundred features are a fraction of the matching itself.

    Memory: what ``joint_blocks`` takes, and the source codes of ``features`` twice.

    Args:
        codes: Of both sides.
        features: Source features.
        shifts: Rows to move by, for each draw and chunk; a single chunk may give one number a draw.
        measure: As in ``top_partners``.
        min_support: Target features below are no partners.

    Raises:
        TransferError: When there is no feature, or shifts do not fit the chunks.
    """
    refuse_unknown(measure)
    ids = np.asarray(features, dtype=np.int64)
    chosen = [sp.csr_matrix(a[:, ids]) for a, _ in codes.parts]
    shifts = np.asarray(shifts).reshape(len(shifts), -1)
    if not len(ids) or not len(shifts) or shifts.shape[1] != len(chosen):
        raise TransferError(f"{len(ids)} features and shifts {shifts.shape} do not fit {len(chosen)} chunks of codes.")
    a = codes.source
    source = Moments(a.rows, a.support[ids], a.mean[ids], a.spread[ids])
    ok = codes.target.support >= min_support
    best = np.zeros((len(shifts), len(ids)))
    for draw, by in enumerate(shifts):
        # Moving the few source features down is the same as moving all target features up.
        moved = [sp.csr_matrix(sp.vstack([c[-s:], c[:-s]])) if s else c for c, s in zip(chosen, by, strict=True)]
        parts = [(c, b) for c, (_, b) in zip(moved, codes.parts, strict=True)]
        shifted = dataclasses.replace(codes, parts=parts, source=source)
        every = np.arange(len(ok))
        for joint in joint_blocks(shifted):
            src = joint.features[:, None]
            scores = measured(measure, joint.products, joint.n11, shifted, src, every)
            best[draw, joint.features] = np.max(scores, axis=1, where=ok, initial=-1.0)
    return ShiftNull(ids, source.support, best)

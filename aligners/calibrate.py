"""Score frozen matches on documents the fit never saw, against the same matches on a shuffled corpus."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from aligners.correlation import Codes, dims, listed_correlations
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.store import PairedActivations

HELDOUT_SUPPORT = 5
"""Held-out rows that both features of a match must fire on (each for itself) to be testable."""
STRATA = 10
STRATUM_SIZE = 30
"""Matches a frequency stratum must at least hold."""


def score_matches(
    alignment: Alignment,
    heldout: PairedActivations,
    *,
    n_null: int = 20,
    seed: int = 0,
    min_support: int = HELDOUT_SUPPORT,
) -> Alignment:
    """Fill ``heldout_corr``, ``p_value`` and ``q_value``, and keep the null.

    The matches stay as they are; only correlations on ``heldout`` are computed. The null moves the target rows in a
    circle by whole documents, so far that no document meets itself: what happens within a document stays, what the
    two models share does not. ``p = (1 + #null ≥ observed) / (1 + #null)``, the null pooled over the matches of the
    same frequency stratum (expected joint events), because Pearson's null has a heavier tail for rare features;
    q-values are Benjamini and Hochberg's.

    A match is testable when each of its features fires on ``min_support`` held-out rows. Joint events are not asked
    for: two busy features that never meet are evidence *against* the match. Untestable matches get NaN, and are
    counted in ``info["n_untestable"]``.

    A small q-value says "these two fire together more than unrelated features do". It does **not** protect against
    "correlated but different" (a parent and its child, two features of one topic): on planted pairs that share nothing
    but topics, half of the matches pass at 5 % (tests/test_aligners_calibrate.py). Never call 1 − q precision. Where
    the fit gave q-values of its own that do (``fit_q``, see ``fused.FusedAligner``), the larger of the two is kept.

    Args:
        alignment: Fitted on other documents.
        heldout: Paired activations in the same two spaces.
        n_null: Null draws; fewer are made, and ``info["n_null"]`` says so, when the corpus allows fewer shifts.
        seed: Of the shifts.
        min_support: See above.

    Raises:
        TransferError: When the features differ, the documents are not grouped, or there are too few to shift.
    """
    if n_null < 1:
        raise TransferError(f"n_null is {n_null}; the null needs at least one draw.")
    shape = (dims(heldout.source)[1], dims(heldout.target)[1])
    if shape != alignment.coupling.shape:
        raise TransferError(f"The held-out pairs have {shape} features, the alignment {alignment.coupling.shape}.")
    a = Codes.of(heldout.source, alignment.matches["source"])
    b = Codes.of(heldout.target, alignment.matches["target"])
    shifts = document_shifts(heldout.docs, n_null, seed)
    observed = listed_correlations(a, b)
    null = np.vstack([listed_correlations(a, b, int(s)) for s in shifts])
    testable = (a.support >= min_support) & (b.support >= min_support) & np.isfinite(observed)
    expected = a.support * b.support / len(heldout.docs)
    p = np.full(len(observed), np.nan)
    p[testable] = stratified_p_values(observed[testable], null[:, testable], expected[testable])
    return dataclasses.replace(
        alignment,
        matches={
            **alignment.matches,
            "heldout_corr": observed,
            "p_value": p,
            "q_value": _stricter(benjamini_hochberg(p), alignment.matches.get("fit_q")),
        },
        null_corr=null.ravel(),
        info={
            **alignment.info,
            "n_untestable": int(np.sum(~testable)),
            "n_null": len(shifts),
            "heldout_rows": len(heldout.docs),
            "heldout_docs": len(np.unique(heldout.docs)),
        },
    )


def _stricter(q: Float[np.ndarray, " n"], own: Float[np.ndarray, " n"] | None) -> Float[np.ndarray, " n"]:
    return q if own is None else np.maximum(q, own)


def document_shifts(docs: Int[np.ndarray, " rows"], n: int, seed: int) -> Int[np.ndarray, " n"]:
    """Up to ``n`` distinct circular shifts, each by whole documents and so that no document overlaps itself.

    Raises:
        TransferError: When documents are not contiguous, or one is so long that no such shift exists.
    """
    docs = np.asarray(docs)
    starts = np.flatnonzero(np.diff(docs, prepend=docs[0] - 1))
    if len(np.unique(docs)) != len(starts):
        raise TransferError("The rows of the held-out pairs are not grouped by document.", "Sort them by document.")
    longest = int(np.diff(starts, append=len(docs)).max())
    allowed = starts[(starts >= longest) & (len(docs) - starts >= longest)]
    if not len(allowed):
        raise TransferError(
            f"The shuffled-corpus null cannot be drawn from {len(starts)} held-out documents, "
            f"the longest with {longest} of {len(docs)} rows.",
            "Hold out more documents.",
        )
    return np.random.default_rng(seed).permutation(allowed)[:n]


def stratified_p_values(
    observed: Float[np.ndarray, " n"], null: Float[np.ndarray, "draws n"], frequency: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """One-sided p-values against the null draws of all matches in the same quantile bin of ``frequency``."""
    p = np.empty(len(observed))
    bins = max(1, min(STRATA, len(observed) // STRATUM_SIZE))
    for part in np.array_split(np.argsort(frequency, kind="stable"), bins):
        pool = np.sort(null[:, part].ravel())
        p[part] = (1 + len(pool) - np.searchsorted(pool, observed[part], side="left")) / (1 + len(pool))
    return p


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """q-values of the finite p-values (Benjamini & Hochberg 1995); NaN stays NaN and does not count as a test."""
    q = np.full(len(p), np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    if not len(tested):
        return q
    order = tested[np.argsort(p[tested], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def shuffled(alignment: Alignment, seed: int = 0) -> Alignment:
    """Control arm: the same matches and masses with the matched target features dealt out anew.

    Every matched target feature goes to another source feature than its own; all that was scored is forgotten.

    Raises:
        TransferError: When fewer than two target features are matched.
    """
    used = np.unique(alignment.matches["target"])
    if len(used) < 2:
        raise TransferError(f"The {alignment.method} alignment has {len(used)} matched targets; nothing to shuffle.")
    order = np.random.default_rng(seed).permutation(used)
    moved = np.arange(alignment.target.n_features)
    moved[order] = np.roll(order, -1)  # one cycle: nothing stays
    coupling = alignment.coupling.tocoo()
    unscored = {name: np.full(len(alignment), np.nan) for name in ("heldout_corr", "p_value", "q_value")}
    return dataclasses.replace(
        alignment,
        method=f"{alignment.method}-shuffled",
        coupling=type(alignment.coupling)(
            (coupling.data, (coupling.row, moved[coupling.col])), shape=alignment.coupling.shape
        ),
        matches={
            **{name: values for name, values in alignment.matches.items() if name != "fit_q"},
            "target": moved[alignment.matches["target"]],
            **unscored,
        },
        null_corr=None,
        seed=seed,
    )

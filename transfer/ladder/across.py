"""G4 and G5: across model families, by held-out correlation and by steering."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from aligners.base import Aligner
from aligners.calibrate import score_matches
from aligners.maps import ResidualMap, fit_map
from models.adapter import Adapter
from transfer.core.alignment import Alignment
from transfer.core.store import PairedActivations
from transfer.ladder.planted import accepted
from transfer.ladder.row import LEVEL, Finding, Row, judged
from transfer.ladder.zoo import NULL_DRAWS, Zoo, fitted, title, view

Make = Callable[[], Aligner]
BEST = 300
"""Matches that every method is compared at."""
EXPECTED = f"more than {LEVEL:.0%} accepted, median above 99 % of the null, held out and unseen"
TEXTS, MATCHES = 16, 32
"""Probe texts and matches of the causal check."""
STITCHED = 64
"""Texts that a stitched model reads."""
DIVISIONS = 2
"""Random divisions of the corpus into halves."""


def across(makers: list[Make], zoo: Zoo) -> list[Row]:
    """G4: every method on every pair of models, as a share of what it finds between two SAEs of one model."""
    rows, ceiling = [], {}
    both = [(zoo.seeds, True)] if zoo.second_sae else []
    for (a, b), same_model in (*both, *((pair, False) for pair in zoo.pairs_of_models())):
        for make in makers:
            name = make().name()

            def work(a: Adapter = a, b: Adapter = b, make: Make = make, top: int | None = ceiling.get(name)) -> Finding:
                measured, good = _across(make(), zoo, a, b)
                return measured | ({"of_ceiling": measured["accepted"] / top} if top else {}), good

            row = judged("G4", title(a, b), name, EXPECTED, work)
            rows.append(row)
            if same_model:
                ceiling[name] = row.measured.get("accepted")
    return rows


def steady(make: Make, zoo: Zoo) -> list[Row]:
    """G4: matches that come back when the corpus is divided at random, beside those of two SAEs of one model.

    A half has less text than the whole, so the shares are lower bounds. Nothing is expected of them: an aligner that
    does not look at the corpus comes back always, right or wrong.
    """
    from aligners.stability import stability

    def work(a: Adapter, b: Adapter) -> Finding:
        found = stability(make(), view(a), view(b), zoo.parts(a, b).fit, level=LEVEL, draws=DIVISIONS, seed=zoo.seed)
        share = float(found.share.mean()) if len(found.share) else float("nan")
        return {
            "accepted": len(found.pairs),
            "in_a_half": share,
            "in_most_halves": found.stable,
            "two_halves_overlap": float(found.overlap.mean()),
        }, None

    both = [zoo.seeds] if zoo.second_sae else []
    return [
        judged("G4", f"{title(a, b)}, halves of the corpus", make().name(), "context", lambda a=a, b=b: work(a, b))
        for a, b in (*both, *zoo.pairs_of_models())
    ]


def stitched(zoo: Zoo) -> list[Row]:
    """G5: the target runs on from the source's residual stream, mapped; against the same turned at random."""
    from transfer.alignment.stitch import stitched_loss

    def work(a: Adapter, b: Adapter) -> Finding:
        texts = zoo.unseen_texts()
        chosen = np.random.default_rng(zoo.seed).permutation(len(texts))[:STITCHED]
        row = stitched_loss(a, b, _mapping(zoo, a, b), [texts[i] for i in np.sort(chosen)], seed=zoo.seed).summary()
        names = ("n_docs", "loss_native", "loss_stitched", "loss_rotated", "loss_ablated", "r2")
        measured = {name: row[name] for name in names}
        for arm in ("stitched", "rotated"):
            measured |= {f"recovered_{arm}{end}": row[f"recovered_{arm}{end}"] for end in ("", "_low", "_high")}
        return measured, row["recovered_stitched_low"] > row["recovered_rotated_high"]

    expected = "more cross-entropy recovered than by the map turned at random, intervals apart"
    return [
        judged("G5", f"{a.space.model} → {b.space.model}, stitched", "ridge map", expected, lambda a=a, b=b: work(a, b))
        for pair in zoo.pairs_of_models()
        for a, b in (pair, pair[::-1])
    ]


def _mapping(zoo: Zoo, a: Adapter, b: Adapter) -> ResidualMap:
    fit = zoo.parts(a, b).fit
    assert fit.source_residual is not None and fit.target_residual is not None
    return fit_map(fit.source_residual, fit.target_residual, fit.docs, seed=zoo.seed)


def _across(aligner: Aligner, zoo: Zoo, a: Adapter, b: Adapter) -> Finding:
    parts = zoo.parts(a, b)
    found = fitted(aligner, zoo.views(a, b, unembedding="unembedding" in aligner.needs()), parts, zoo.seed)
    measured: dict[str, Any] = {"accepted": len(accepted(found)[0]), "matches": len(found)}
    measured["q"] = "of the fit" if "fit_q" in found.matches else "null only"
    # At one number for all methods, whatever each accepts.
    best = found.matches["heldout_corr"][np.argsort(-found.matches["score"], kind="stable")[:BEST]]
    measured[f"heldout_corr_of_best_{BEST}"] = float(np.nanmedian(best)) if np.isfinite(best).any() else float("nan")
    # Of matches at random, too, some are significant.
    good = [measured["accepted"] > LEVEL * len(found)]
    for part, name in ((parts.heldout, "heldout"), (parts.unseen, "unseen")):
        if part is not None:
            numbers = _correlations(found, part, zoo.seed)
            measured |= {f"{name}_{key}": value for key, value in numbers.items()}
            good.append(numbers["corr"] > numbers["null_99"])
    return {**measured, "converged": found.converged}, all(good)


def _correlations(found: Alignment, part: PairedActivations, seed: int) -> dict[str, float]:
    """Of the accepted matches, which stay as they are, on some documents."""
    chosen = only(found, np.flatnonzero(found.matches["q_value"] <= LEVEL))
    if not len(chosen):
        return {"corr": float("nan"), "null": float("nan"), "null_99": float("nan")}
    scored = score_matches(chosen, part, n_null=NULL_DRAWS, seed=seed)
    assert scored.null_corr is not None
    null = scored.null_corr[np.isfinite(scored.null_corr)]
    at = np.isfinite(scored.matches["heldout_corr"])
    corr = float(np.median(scored.matches["heldout_corr"][at])) if at.any() else float("nan")
    return {
        "corr": corr,
        "null": float(np.median(null)) if len(null) else float("nan"),
        "null_99": float(np.quantile(null, 0.99)) if len(null) else float("nan"),
    }


def only(found: Alignment, at: np.ndarray) -> Alignment:
    """Some of the matches; the coupling stays."""
    return dataclasses.replace(found, matches={name: values[at] for name, values in found.matches.items()})


def causal(make: Make, zoo: Zoo) -> list[Row]:
    """G5: steering along accepted matches on texts that the fit has not seen, against permuted matches and random."""
    return [
        judged(
            "G5",
            title(a, b),
            make().name(),
            f"agreement of matched features above permuted matches, p ≤ {LEVEL}",
            lambda a=a, b=b: _causal(make, zoo, a, b),
        )
        for a, b in zoo.pairs_of_models()
    ]


def _causal(make: Make, zoo: Zoo, a: Adapter, b: Adapter) -> Finding:
    from transfer.alignment.causal import check_matches

    parts = zoo.parts(a, b)
    found = fitted(make(), (view(a), view(b)), parts, zoo.seed)
    at = np.flatnonzero(found.matches["q_value"] <= LEVEL)
    if len(at) < 2:
        return {"accepted": len(at)}, False
    mapping = _mapping(zoo, a, b)
    texts = zoo.unseen_texts()
    chosen = np.random.default_rng(zoo.seed).permutation(len(texts))[:TEXTS]
    checked = check_matches(
        a, b, only(found, at), mapping, [texts[i] for i in np.sort(chosen)], n_matches=MATCHES, seed=zoo.seed
    )
    row = checked.summary()
    kept = ("n_matches", "n_available", "n_texts", "n_no_ratio")
    ratios = ("transfer_matched", "transfer_mapped", "raised")
    measured = {name: row[name] for name in kept}
    for name in ratios:
        measured |= {name: row[name], f"{name}_low": row[f"{name}_low"], f"{name}_high": row[f"{name}_high"]}
    for name in ("matched", "matched_shuffled", "random", "ceiling"):
        measured[f"agreement_{name}"] = row[f"agreement_{name}"]
    measured["p_matched"] = row["p_agreement_matched"]
    return measured, row["p_agreement_matched"] <= LEVEL

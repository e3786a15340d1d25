"""What a saved alignment says of itself: the numbers of ``transfer align show``, and the same as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from transfer.alignment.export import LEAST_MASS, split_edges
from transfer.core.alignment import MATCH_COLUMNS, Alignment
from transfer.core.space import FeatureSpace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NULL = (
    "the same matches with the target's rows moved in a circle by whole documents; p pooled within strata of "
    "frequency, q by Benjamini and Hochberg"
)
UNTESTABLE = (
    "a feature too rare, dead or always on in the fit; a match of which one feature hardly fires on the scored rows"
)
REASONS = ("dead", "rare", "always_on", "zero_directions")


def describe(alignment: Alignment, *, q_max: float = 0.05, top: int = 10) -> dict[str, Any]:
    """A summary that is honest about what was not tested.

    ``untestable`` features could not be judged (dead, rare, always on, without direction); ``unmatched`` ones were
    testable and found no counterpart at ``q_max``; ``unscored`` ones have a match, but too few events on the scored
    documents to judge it. Such a match counts as untestable, not as rejected.

    Args:
        alignment: Fitted, best also scored.
        q_max: Level at which a match counts.
        top: Best matches listed, by score.

    Returns:
        JSON-able numbers; None where something was not measured.
    """
    q = alignment.matches["q_value"]
    accepted = np.flatnonzero(np.isfinite(q) & (q <= q_max))
    corr = alignment.matches["heldout_corr"]
    null = np.asarray([] if alignment.null_corr is None else alignment.null_corr, dtype=np.float64)
    own = "fit_q" in alignment.matches
    listed = alignment.top(top, allow_unconverged=True)
    return {
        "method": alignment.method,
        "params": alignment.params,
        "seed": alignment.seed,
        "source": _side(alignment, alignment.source, "source", accepted),
        "target": _side(alignment, alignment.target, "target", accepted),
        "matches": {
            "n": len(alignment),
            "q_max": q_max,
            "n_accepted": len(accepted),
            "n_rejected": int(np.count_nonzero(np.isfinite(q) & (q > q_max))),
            "n_untestable": int(np.count_nonzero(~np.isfinite(q))),
            "n_splits": len(split_edges(alignment)[0]),
            "split_from_mass": LEAST_MASS,
            "q_from": "the larger of the fit's own q and the null's" if own else "the null alone",
        },
        "confidence": _quantiles(alignment.matches["score"]),
        "heldout": {
            "corr_accepted": _quantiles(corr[accepted]),
            "corr_all": _quantiles(corr),
            "corr_null": _quantiles(null),
            "null": NULL,
            "n_null": alignment.info.get("n_null"),
        },
        "solver": {
            "converged": alignment.converged,
            "n_iter": alignment.n_iter,
            "row_error": _number(alignment.row_error),
            "col_error": _number(alignment.col_error),
            "cost": _number(alignment.cost),
            "duality_gap": _number(alignment.duality_gap),
        },
        "untestable_means": UNTESTABLE,
        "fit": alignment.provenance.get("fit"),
        "scored": alignment.provenance.get("scored"),
        "versions": alignment.provenance.get("versions"),
        "info": alignment.info,
        "top": [{c: _number(m[c]) for c in MATCH_COLUMNS} for m in listed],
    }


def _side(alignment: Alignment, space: FeatureSpace, side: str, accepted: np.ndarray) -> dict[str, Any]:
    info = alignment.info
    matched = np.unique(alignment.matches[side][accepted])
    doubtful = alignment.matches[side][~np.isfinite(alignment.matches["q_value"])]
    unscored = len(np.setdiff1d(doubtful, matched))
    testable = info.get(f"testable_{side}")
    return {
        "space": space.id,
        "model": space.model,
        "model_hash": space.model_hash,
        "layer": space.layer,
        "sae": space.sae,
        "sae_hash": space.sae_hash,
        "rule": space.rule,
        "n_features": space.n_features,
        "d_model": space.d_model,
        "matched": len(matched),
        "unmatched": None if testable is None else testable - len(matched) - unscored,
        "unscored": unscored,
        "untestable": None if testable is None else space.n_features - testable,
        "why_untestable": {r: info[f"{r}_{side}"] for r in REASONS if f"{r}_{side}" in info},
    }


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return {f"{q:g}": float(x) for q, x in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def text(found: dict[str, Any]) -> str:
    """``describe``'s result to read."""
    matches, heldout, solver = found["matches"], found["heldout"], found["solver"]
    lines = [f"{found['method']}  {found['source']['space']} to {found['target']['space']}"]
    if not solver["converged"]:
        lines.append("NOT CONVERGED: what follows is what the solver had when it stopped; more texts often help")
    lines += [_space_line(side, found[side]) for side in ("source", "target")]
    lines.append(f"params      {_pairs(found['params'])}")
    lines.append(
        f"matches     {matches['n']} · {matches['n_accepted']} at q ≤ {matches['q_max']:g} · "
        f"{matches['n_rejected']} above · {matches['n_untestable']} untestable · "
        f"{matches['n_splits']} splits (coupling ≥ {matches['split_from_mass']:g})"
    )
    lines.append(f"q from      {matches['q_from']}")
    if "same_from_cosine" in found["info"]:
        reach = found["info"].get("counterpart_cosine")
        why = (
            "where nothing is shared, pairs that are merely related set that level"
            if reach is None
            else f"a counterpart may be expected to reach {reach:.2f}"
        )
        lines.append(
            f"same from   cosine {found['info']['same_from_cosine']:.2f} in the common space, by the level of the best "
            f"pairs; {why}"
        )
    for label, values in (
        ("confidence", found["confidence"]),
        ("r accepted", heldout["corr_accepted"]),
        ("r all", heldout["corr_all"]),
        ("r null", heldout["corr_null"]),
    ):
        lines.append(f"{label:<11} {_spread(values)}")
    lines.append(f"null        {heldout['n_null'] or 0} draws: {heldout['null']}")
    lines.append(f"untestable  {found['untestable_means']}")
    lines.append(
        f"solver      {'converged' if solver['converged'] else 'not converged'} · {_pairs(solver, skip='converged')}"
    )
    for name, part in (("fit on", found["fit"]), ("scored on", found["scored"])):
        lines.append(f"{name:<11} {_documents(part)}")
    if found["top"]:
        lines.append("top matches " + "  ".join(f"{c:>12}" for c in found["top"][0]))
        lines += ["            " + "  ".join(f"{_cell(v):>12}" for v in m.values()) for m in found["top"]]
    return "\n".join(lines)


def _space_line(side: str, found: dict[str, Any]) -> str:
    why = ", ".join(f"{n} {r.replace('_', ' ')}" for r, n in found["why_untestable"].items() if n)
    return (
        f"{side:<11} {found['model']} ({found['model_hash']}) layer {found['layer']} · {found['sae']} "
        f"({found['sae_hash']}) {found['rule']} · {found['n_features']} features, width {found['d_model']}\n"
        f"            {found['matched']} matched · {_cell(found['unmatched'])} unmatched · {found['unscored']} unscored"
        f" · {_cell(found['untestable'])} untestable" + (f" ({why})" if why else "")
    )


def _documents(part: dict[str, Any] | None) -> str:
    if part is None:
        return "not recorded"
    name = part["corpus"] or "corpus"
    line = f"{part['docs']} documents, {part['rows']} paired positions · {name} {part['corpus_hash']}"
    if "part" in part:
        seen = part["overlap"]
        known = "overlap with the fit not known" if seen is None else f"{seen} seen by the fit left out"
        return f"{line} · {part['part']}" + ("" if seen == 0 else f", {known}")
    return f"{line} · share {part['fraction']:g}, seed {part['seed']}"


def _spread(values: dict[str, float] | None) -> str:
    return "none" if values is None else " · ".join(f"{float(q):.0%} {v:.3f}" for q, v in values.items())


def _pairs(values: dict[str, Any], skip: str = "") -> str:
    return " · ".join(f"{k} {_cell(v)}" for k, v in values.items() if k != skip)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "–" if value is None else str(value)

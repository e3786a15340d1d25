"""The readable form of a verb's result: one line a row, the columns that a reader needs first."""

from __future__ import annotations

from typing import Any

SHOWN = {
    "alignments": (
        "source",
        "target",
        "method",
        "n_matches",
        "n_significant",
        "heldout_corr_median",
        "null_corr_median",
    ),
    "families": ("model", "universal", "shared", "private", "n_testable", "n_untestable", "n_undecided"),
    "family_counts": ("method", "q_value", "n_universal", "n_broken", "n_chains", "n_chains_closed", "consistency"),
    "compositions": ("source", "through", "target", "n_claims", "n_agree", "share", "expected", "p_value"),
    "context": ("source", "target", "measure", "value", "null_mean", "p_value", "n_rows"),
    "coverage": ("model", "dataset", "fac", "ci_low", "ci_high", "n_anchor", "n_covered", "n_missing"),
    "synthesis": ("writer", "pool", "n_requested", "n_candidates", "n_kept", "missing_hit_rate"),
    "transfer": ("target", "arm", "source", "recipe", "metric", "mean", "ci_low", "ci_high", "n_seeds"),
    "comparisons": ("target", "recipe", "arm", "control", "delta", "low", "high", "verdict"),
    "claims": ("verdict", "sentence"),
    "diversity": ("target", "arm", "writer", "n", "distinct_2", "rarefied_2", "self_bleu", "vendi"),
    "diversity_correlations": (
        "recipe",
        "statistic",
        "predictor",
        "within",
        "within_low",
        "within_high",
        "p_holm",
        "verdict",
    ),
    "bounds": ("target", "arm", "writer", "kl", "tv", "tv_from", "gap", "transfer"),
    "bound_notes": ("quantity", "least", "largest", "said"),
    "efficiency": ("target", "arm", "recipe", "score", "des", "pes"),
}
"""Columns of the readable form; ``--json`` has all."""
UNSHOWN = ("coverage_curves",)
"""Tables too long for it; ``transfer cover curve`` shows them."""


def lines_of(result: dict[str, Any]) -> str:
    """Text for a reader; sections are indented, rows keep the columns of ``SHOWN``."""
    return "\n".join(_section(result))


def _section(values: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in values.items():
        if name in UNSHOWN:
            continue
        inner = f"{indent}  "
        if isinstance(value, dict) and value:
            flat = not any(isinstance(v, (dict, list)) for v in value.values())
            lines += [f"{indent}{name}: {_cells(value)}"] if flat else [f"{indent}{name}:", *_section(value, inner)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            rows = [{k: row.get(k) for k in SHOWN.get(name, tuple(row))} for row in value]
            lines += [f"{indent}{name}:", *(inner + _cells(row) for row in rows)]
        elif isinstance(value, list) and value and isinstance(value[0], str):
            lines += [f"{indent}{name}:", *(inner + text for text in value)]
        else:
            lines.append(f"{indent}{name}: {_cell(value)}")
    return lines


def _cells(row: dict[str, Any]) -> str:
    """The plain values of a row; what it nests is in ``--json``."""
    return " · ".join(f"{k} {_cell(v)}" for k, v in row.items() if not isinstance(v, (list, dict, type(None))))


def _cell(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return ", ".join(map(_cell, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not known"}[value]
    return f"{value:.3f}" if isinstance(value, float) else str(value)

"""One dataset against an anchor: every coverage number with its interval, and the features that cost most."""

from __future__ import annotations

from typing import Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSet
from transfer.kl import FeatureCosts, feature_costs, kl_frequency, kl_terms
from transfer.tally import Tally

BLOCK = 32
"""Bootstrap replicates held at once; memory is about ``16 × features × BLOCK`` bytes (34 MB at 65,536)."""

SHARES = ("fac", "fac_frequency", "fac_magnitude")
"""Numbers between 0 and 1."""


def compare(
    anchor_tally: Tally,
    data_tally: Tally,
    relevant: FeatureSet,
    *,
    dataset: str = "data",
    anchor: str = "anchor",
    delta_rule: str = "",
    n_bootstrap: int = 200,
    confidence: float = 0.95,
    eps: float = 1e-3,
    seed: int = 0,
    left_out: dict[str, Any] | None = None,
) -> CoverageReport:
    """Coverage from two tallies of the same features.

    The intervals come from resampling the data's documents, here or while a store was read (see ``transfer.tally``);
    the anchor is taken as given. A resample holds only about 63 % of the distinct documents and so covers less than
    the data itself; the replicates are therefore centred on the observed value before the percentiles are read, and
    shares are cut at [0, 1].

    Args:
        anchor_tally: Of the anchor.
        data_tally: Of the dataset.
        relevant: The live relevant features F, the columns of both.
        dataset: Name of the dataset.
        anchor: Name of the anchor.
        delta_rule: The rule as text.
        n_bootstrap: Resamples, unless the tally brings its own; 0 gives intervals of the value alone.
        confidence: Of the intervals.
        eps: Smoothing of the divergences.
        seed: Of the resampling.
        left_out: Counts that ``live_features`` gave.

    Raises:
        TransferError: When the anchor activates no relevant feature.
    """
    ids = relevant.features
    in_anchor, in_data = anchor_tally.support > 0, data_tally.support > 0
    n_anchor = int(in_anchor.sum())
    if n_anchor == 0:
        raise TransferError(
            f"{anchor} activates none of the {len(relevant)} relevant features of {relevant.space.id}: "
            "coverage is undefined.",
            "Lower delta, use a larger anchor, or judge relevance again.",
        )
    covered, missing = in_anchor & in_data, in_anchor & ~in_data
    found, drawn = numbers(anchor_tally, data_tally, eps, n_bootstrap=n_bootstrap, seed=seed)
    bounds = {name: interval(drawn[name], value, confidence, name in SHARES) for name, value in found.items()}
    costs = feature_costs(ids, anchor_tally.support, data_tally.support, eps)
    low, high = bounds.pop("fac")
    return CoverageReport(
        space=relevant.space,
        dataset=dataset,
        anchor=anchor,
        relevant=relevant,
        anchor_features=relevant.subset(ids[in_anchor], f"relevant and activated by {anchor}"),
        covered=relevant.subset(ids[covered], f"activated by {anchor} and by {dataset}"),
        missing=relevant.subset(ids[missing], f"activated by {anchor} but not by {dataset}"),
        ci_low=low,
        ci_high=high,
        delta_rule=delta_rule,
        n_docs=data_tally.n_docs,
        intervals=bounds,
        costs=dearest(costs, relevant, anchor_tally, data_tally),
        **found,
        **(left_out or {}),
    )


def numbers(
    anchor: Tally, data: Tally, eps: float, *, n_bootstrap: int = 0, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Every number of a report, and its bootstrap replicates.

    With p_i and q_i the shares of the anchor's and the data's documents that activate i, and u_i and v_i the means
    over all their documents of g_i(x) A_i(x):

    - ``fac`` = |F(P) ∩ F(Q)| / |F(P)|, ``fac_uncapped`` = |F(Q)| / |F(P)|;
    - ``fac_frequency`` = mean over F(P) of min(1, q_i / p_i), 1 where the data has each feature as often as the anchor;
    - ``fac_magnitude`` = mean over F(P) of min(1, v_i / u_i);
    - ``kl`` and ``kl_frequency``: see ``transfer.kl``.

    Args:
        anchor: Tally of the anchor.
        data: Tally of the data, of the same features.
        eps: Smoothing of the divergences.
        n_bootstrap: Replicates, unless the tally brings its own.
        seed: Of the draws.

    Returns:
        Values, and replicates [n_bootstrap] of each (empty for data without documents).
    """
    parts = len(data.sizes)
    whole = (np.array([float(data.n_docs)]), data.support[:, None], data.mass[:, None])
    value = {name: float(v[0]) for name, v in _statistics(anchor, *whole, eps).items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in value}
    if data.drawn is not None:
        n_docs, counts, sums = data.drawn
        for begin in range(0, len(n_docs), BLOCK):
            block = slice(begin, begin + BLOCK)
            for name, values in _statistics(anchor, n_docs[block], counts[:, block], sums[:, block], eps).items():
                drawn[name].append(values)
        n_bootstrap = 0
    rng = np.random.default_rng(seed)
    for begin in range(0, n_bootstrap if parts else 0, BLOCK):
        width = min(BLOCK, n_bootstrap - begin)
        weights = np.empty((parts, width), dtype=np.float32)
        for column in range(width):
            weights[:, column] = np.bincount(rng.integers(parts, size=parts), minlength=parts)
        for name, values in _statistics(anchor, *data.times(weights), eps).items():
            drawn[name].append(values)
    return value, {name: np.concatenate([np.zeros(0), *values]) for name, values in drawn.items()}


def _statistics(
    anchor: Tally, n_docs: np.ndarray, counts: np.ndarray, sums: np.ndarray, eps: float
) -> dict[str, np.ndarray]:
    """Each number for each column: documents [draws], counts [F, draws] and sums [F, draws] of the data."""
    some = anchor.support > 0
    n_anchor, n_relevant = int(some.sum()), len(some)
    present = counts > 0
    n_data, n_covered = present.sum(axis=0), present[some].sum(axis=0)
    share = (counts[some] / np.maximum(n_docs, 1)) / (anchor.support[some] / anchor.n_docs)[:, None]
    mean = (sums[some] / np.maximum(n_docs, 1)) / (anchor.mass[some] / anchor.n_docs)[:, None]
    return {
        "fac": n_covered / n_anchor,
        "fac_uncapped": n_data / n_anchor,
        "fac_frequency": np.minimum(share, 1).mean(axis=0),
        "fac_magnitude": np.minimum(mean, 1).mean(axis=0),
        "kl": np.array(
            [sum(kl_terms(n_anchor, int(q), int(c), n_relevant, eps)) for q, c in zip(n_data, n_covered, strict=True)]
        ),
        "kl_frequency": kl_frequency(anchor.support, counts, eps),
    }


def interval(values: np.ndarray, observed: float, confidence: float, share: bool) -> list[float]:
    """Percentiles of replicates centred on the observed value; a share is cut at [0, 1]."""
    if not len(values):
        return [observed, observed]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values + (observed - values.mean()), [tail, 1 - tail])
    # Rounding of the mean must not put the value outside its own interval.
    low, high = min(float(low), observed), max(float(high), observed)
    return [max(low, 0.0), min(high, 1.0)] if share else [low, high]


def dearest(
    costs: FeatureCosts, relevant: FeatureSet, anchor: Tally, data: Tally, n: int = 10
) -> tuple[dict[str, Any], ...]:
    """The ``n`` features that add most to the divergence by frequency, as rows for tables."""
    rows = []
    for i in costs.order()[:n]:
        if costs.frequency[i] <= 0:
            break
        rows.append(
            {
                "feature": int(costs.features[i]),
                "label": relevant.labels[i] if relevant.labels else "",
                "description": relevant.descriptions[i] if relevant.descriptions else "",
                "kl_frequency": float(costs.frequency[i]),
                "kl": float(costs.uniform[i]),
                "anchor_share": float(anchor.support[i] / anchor.n_docs),
                "data_share": float(data.support[i] / max(data.n_docs, 1)),
                "missing": bool(data.support[i] == 0),
            }
        )
    return tuple(rows)

"""One dataset against an anchor: every coverage number with its interval, and the features that cost most."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import t as student

from transfer.core.errors import TransferError
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSet
from transfer.cover.kl import FeatureCosts, feature_costs, kl_frequency, kl_terms
from transfer.cover.tally import GROUPS, Tally

LEAST = 5
"""Groups of documents below which there is no interval: the spread of so few says next to nothing."""

SHARES = ("fac", "fac_frequency", "fac_magnitude")
"""Numbers between 0 and 1; the others are at least 0."""


def compare(
    anchor_tally: Tally,
    data_tally: Tally,
    relevant: FeatureSet,
    *,
    dataset: str = "data",
    anchor: str = "anchor",
    delta_rule: str = "",
    confidence: float = 0.95,
    eps: float = 1e-3,
    seed: int = 0,
    left_out: dict[str, Any] | None = None,
) -> CoverageReport:
    """Coverage from two tallies of the same features.

    The intervals are about other data of the same kind and size, by the jackknife over groups of its documents (see
    ``interval``); the anchor is taken as given.

    Args:
        anchor_tally: Of the anchor.
        data_tally: Of the dataset.
        relevant: The live relevant features F, the columns of both.
        dataset: Name of the dataset.
        anchor: Name of the anchor.
        delta_rule: The rule as text.
        confidence: Of the intervals.
        eps: Smoothing of the divergences.
        seed: Of the groups.
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
    found, without, one = numbers(anchor_tally, data_tally, eps, seed=seed)
    bounds = {
        name: interval(without[name], value, confidence, one.get(name, 0.0), name in SHARES)
        for name, value in found.items()
    }
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
    anchor: Tally, data: Tally, eps: float, *, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, float]]:
    """Every number of a report, and what it would be without some of the documents.

    With p_i and q_i the shares of the anchor's and the data's documents that activate i, and u_i and v_i the means
    over all their documents of g_i(x) A_i(x):

    - ``fac`` = |F(P) ∩ F(Q)| / |F(P)|, ``fac_uncapped`` = |F(Q)| / |F(P)|;
    - ``fac_frequency`` = mean over F(P) of min(1, q_i / p_i), 1 where the data has each feature as often as the anchor;
    - ``fac_magnitude`` = mean over F(P) of min(1, v_i / u_i);
    - ``kl`` and ``kl_frequency``: see ``transfer.cover.kl``.

    Args:
        anchor: Tally of the anchor.
        data: Tally of the data, of the same features.
        eps: Smoothing of the divergences.
        seed: Of the groups.

    Returns:
        Values; the same without each of up to ``GROUPS`` groups of the data [groups]; and what one covered feature
        more or less would change in those that count features.
    """
    parts = len(data.sizes)
    whole = (np.array([float(data.n_docs)]), data.support[:, None], data.mass[:, None])
    value = {name: float(v[0]) for name, v in _statistics(anchor, *whole, eps).items()}
    weights = np.ones((parts, min(parts, GROUPS)), dtype=np.float32)
    weights[np.arange(parts), deal(parts, seed)] = 0
    without = _statistics(anchor, *data.times(weights), eps)
    n_anchor = int(np.count_nonzero(anchor.support))
    n_data, n_covered = (int(round(value[name] * n_anchor)) for name in ("fac_uncapped", "fac"))
    step = -1 if n_covered else 1
    beside = sum(kl_terms(n_anchor, n_data + step, n_covered + step, len(anchor.support), eps))
    one = {"fac": 1 / n_anchor, "fac_uncapped": 1 / n_anchor, "kl": abs(beside - value["kl"])}
    return value, without, one


def deal(parts: int, seed: int = 0) -> np.ndarray:
    """Group of each part, int64 [parts]: up to ``GROUPS`` groups of nearly one size, at random."""
    return np.random.default_rng(seed).permutation(parts) % max(min(parts, GROUPS), 1)


def _statistics(
    anchor: Tally, n_docs: np.ndarray, counts: np.ndarray, sums: np.ndarray, eps: float
) -> dict[str, np.ndarray]:
    """Each number for each column: documents [columns], counts [F, columns] and sums [F, columns] of the data."""
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


def interval(without: np.ndarray, value: float, confidence: float, one: float, share: bool) -> list[float | None]:
    """The jackknife's t interval: a number of other data of the same kind and size, in expectation.

    Documents activate features together, so they are what is left out, a group at a time. Leaving out never
    understates the variance on average (Efron and Stein 1981), while a bootstrap does here: a feature that the data
    happens to miss is missing from all its resamples too. As the few features that one group alone activates may by
    chance be none, one more is assumed (``one``).

    Measured over 400 data sets in each of nine settings (8 to 400 documents, 8 to 300 features, independent or coming
    together), nominal 95 % intervals held the expected value in 94 to 100 % of the sets (``fac``, ``fac_uncapped``,
    ``kl``) and in 91 to 100 % (``fac_frequency``, ``fac_magnitude``, ``kl_frequency``; 89 % in one more with eight
    features). They are 1.0 to 1.6 times as wide as the numbers' spread asks for; wider where next to all is covered.

    Args:
        without: The number without each group, [groups].
        value: The number.
        confidence: Nominal coverage.
        one: What one feature more or less would change; 0 for numbers that do not count features.
        share: Cut at [0, 1] and not only at 0.

    Returns:
        Both ends; None with fewer than ``LEAST`` groups, of which no interval would hold what it says.
    """
    n = len(without)
    if n < LEAST:
        return [None, None]
    variance = (n - 1) / n * float(np.square(without - without.mean()).sum())
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance + one**2)
    return [max(value - half, 0.0), min(value + half, 1.0) if share else value + half]


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

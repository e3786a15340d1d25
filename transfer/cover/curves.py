"""Coverage against δ and against the size of the dataset, from stored activations: nothing is encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.space import FeatureSet
from transfer.core.stats import mean_interval
from transfer.core.store import ActivationStore
from transfer.cover.compare import compare
from transfer.cover.delta import DeltaRule, below_floor, check_floor, floor_of, size, thresholds
from transfer.cover.kl import kl_frequency, kl_terms
from transfer.cover.tally import GROUPS, Tally, tally, tally_store
from transfer.coverage import alive, live_features

RULES = tuple(
    DeltaRule.parse(text)
    for text in (
        *(f"constant:{x}" for x in (0, 0.5, 1, 1.5, 2, 4)),
        *(f"quantile:{x}" for x in (0.1, 0.25, 0.5, 0.75, 0.9)),
        *(f"scale:{x}" for x in (0.1, 0.25, 0.5, 0.75, 1)),
    )
)
"""The paper's constants, and the rules of each feature's own scale."""

STEPS = 8
"""Sizes of a curve over the dataset's size."""


def curves(
    anchor_docs: sp.csr_matrix,
    data: sp.csr_matrix | ActivationStore,
    relevant: FeatureSet,
    rule: DeltaRule,
    *,
    rules: Sequence[DeltaRule] = RULES,
    rows: np.ndarray | None = None,
    groups: int = GROUPS,
    always_on: float = 0.5,
    orders: int = 20,
    steps: int = STEPS,
    eps: float = 1e-3,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Both curves, in one pass over the data whatever the number of δ.

    F is fixed before δ: the relevant features that are live (any positive value), so that all points share one set.
    A δ at which the anchor activates none of them, or which lies below the floor of dense codes, gives a row without
    numbers that says ``why``.

    Memory: of a store, that of ``tally_store`` with one threshold for each rule (0.6 GB for the 16 rules here at 65,536
    features); of a matrix, its codes once for each rule.

    Args:
        anchor_docs: Max over tokens of the anchor, [docs, n_features].
        data: The dataset's, [docs, n_features], or a store of any size.
        relevant: Task-relevant features F.
        rule: δ of the curve over sizes.
        rules: δ rules of the other curve.
        rows: Only these documents of a store, bool [docs].
        groups: Groups of a store; sizes are multiples of one.
        always_on: See ``alive``.
        orders: Random orders of the documents; each gives one chain of nested subsets.
        steps: Sizes.
        eps: Smoothing of the divergences.
        seed: Of groups and orders.

    Returns:
        ``delta``: a row for each rule with ``fac``, its interval, the variants, and the counts. ``size``: a row for
        each number of documents with the mean of each number over orders and its interval.

    Raises:
        TransferError: When spaces or widths differ, there are no documents, or ``rule`` lies below the floor.
    """
    every = [rule, *rules]
    deltas = [thresholds(anchor_docs, r) for r in every]
    state = alive(anchor_docs, always_on)
    check_floor(relevant.space, deltas[0], ~state.dead)
    if isinstance(data, ActivationStore):
        data.space.check(relevant.space, "The relevant feature set")
        live, _ = live_features(relevant, state, always_on)
        tallies = tally_store(data, deltas, live.features, rows=rows, groups=groups, seed=seed)
    else:
        if size(data)[1] != len(state.mask):
            raise TransferError(f"The data documents have {size(data)[1]} features, the anchor {len(state.mask)}.")
        live, _ = live_features(relevant, state, always_on)
        tallies = [tally(data, delta, live.features) for delta in deltas]
    if not tallies[0].n_docs:
        raise TransferError("The dataset holds no documents: there is no curve to draw.")
    anchors = [tally(anchor_docs, delta, live.features) for delta in deltas]
    counted = np.isin(np.arange(len(state.mask)), live.features)
    lost = [below_floor(relevant.space, delta, counted) for delta in deltas]
    over_delta = [
        _point(a, t, live, r, n, eps, seed)
        for r, a, t, n in zip(every[1:], anchors[1:], tallies[1:], lost[1:], strict=True)
    ]
    return {"delta": over_delta, "size": over_sizes(anchors[0], tallies[0], orders, steps, eps, seed, str(rule))}


def _point(
    anchor: Tally, data: Tally, live: FeatureSet, rule: DeltaRule, lost: int, eps: float, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"delta_rule": str(rule), "kind": rule.kind, "value": rule.value, "n_docs": data.n_docs}
    if lost:
        why = f"{lost} thresholds lie below {floor_of(live.space):g}, up to which nothing is stored"
        return {**row, "n_anchor": None, "n_covered": None, "n_missing": None, "fac": None, "why": why}
    if not np.any(anchor.support):
        return {
            **row,
            "n_anchor": 0,
            "n_covered": 0,
            "n_missing": 0,
            "fac": None,
            "why": "the anchor activates nothing",
        }
    found = compare(anchor, data, live, eps=eps, seed=seed).summary()
    return row | {k: v for k, v in found.items() if k not in ("model", "dataset", "delta_rule", "costs")}


def over_sizes(
    anchor: Tally, data: Tally, orders: int, steps: int, eps: float, seed: int, delta_rule: str = ""
) -> list[dict[str, Any]]:
    """Coverage of nested random subsets: mean over orders, with an interval over them.

    Each order shuffles the parts of the data and takes the first 1, 2, 4 … of them (geometric steps up to all), so
    within an order every subset holds the ones before it. The interval is of the mean over orders of these documents,
    not over other documents; at the full size all orders agree.

    Raises:
        TransferError: When the anchor activates none of the features.
    """
    parts = len(data.sizes)
    some = anchor.support > 0
    if not some.any():
        raise TransferError("The anchor activates none of the relevant features: there is no curve to draw.")
    n_anchor = int(some.sum())
    sizes = np.unique(np.rint(np.geomspace(1, parts, steps)).astype(np.int64))
    values: dict[str, np.ndarray] = {
        name: np.empty((orders, len(sizes))) for name in ("docs", "fac", "fac_uncapped", "kl", "kl_frequency")
    }
    for order in range(orders):
        shuffle = np.random.default_rng([seed, order]).permutation(parts)
        weights = np.zeros((parts, len(sizes)), dtype=np.float32)
        for column, n in enumerate(sizes):
            weights[shuffle[:n], column] = 1
        docs, counts, _ = data.times(weights)
        present = counts > 0
        n_data, n_covered = present.sum(axis=0), present[some].sum(axis=0)
        values["docs"][order] = docs
        values["fac"][order] = n_covered / n_anchor
        values["fac_uncapped"][order] = n_data / n_anchor
        values["kl"][order] = [
            sum(kl_terms(n_anchor, int(q), int(c), len(some), eps)) for q, c in zip(n_data, n_covered, strict=True)
        ]
        values["kl_frequency"][order] = kl_frequency(anchor.support, counts, eps)
    rows = []
    for column in range(len(sizes)):
        row: dict[str, Any] = {"n_docs": float(values["docs"][:, column].mean()), "orders": orders}
        row |= {"delta_rule": delta_rule, "n_anchor": n_anchor}
        for name in ("fac", "fac_uncapped", "kl", "kl_frequency"):
            found = mean_interval(values[name][:, column])
            # The t interval knows no bounds; shares end at 1, and nothing here is negative.
            high = min(found.high, 1.0) if name == "fac" else found.high
            row |= {name: found.value, f"{name}_low": max(found.low, 0.0), f"{name}_high": high}
        rows.append(row)
    return rows

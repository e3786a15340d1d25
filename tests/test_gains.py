"""Room, transfer efficiency, quality against transfer, dose: by hand, and where there is nothing to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tests.test_matrix import made
from transfer.core.errors import TransferError
from transfer.core.stats import ratio_interval
from transfer.grid.claims import summarise
from transfer.grid.gains import dose, quality_correlations, room, transfer_efficiency

NAMES = {"zoo:a": "a", "zoo:b": "b", "zoo:c": "c"}


def rows(**scores: list[float]) -> list[dict]:
    """Transfer rows of one target, ``zoo:a``; ``zoo:c`` writes what is mapped."""
    cells = [
        made(arm, s, v, source="zoo:a" if arm == "own" else "zoo:c", n=10 if arm == "seed_only" else 20)
        for arm, values in scores.items()
        for s, v in enumerate(values)
    ]
    return [r.summary() for r in summarise(cells, "intent", "auprc")]


def test_efficiency_is_the_ratio_of_the_gains() -> None:
    found = transfer_efficiency(
        rows(seed_only=[0.4, 0.42, 0.41, 0.4], own=[0.6, 0.63, 0.6, 0.61], mapped=[0.5, 0.53, 0.5, 0.505])
    )
    (row,) = found
    assert row["gain_own"] == pytest.approx(np.mean([0.2, 0.21, 0.19, 0.21]))
    assert row["efficiency"] == pytest.approx(np.mean([0.1, 0.11, 0.09, 0.105]) / row["gain_own"])
    assert row["low"] < row["efficiency"] < row["high"] < 0.6 and row["said"] == ""


@pytest.mark.parametrize("own", [[0.3, 0.31, 0.29], [0.5, 0.2, 0.5]])
def test_two_losses_are_no_success(own: list[float]) -> None:
    (row,) = transfer_efficiency(rows(seed_only=[0.4, 0.4, 0.4], own=own, mapped=[0.3, 0.32, 0.29]))
    assert row["efficiency"] is None and row["said"] == "own features do not surely gain"


def test_the_interval_of_a_ratio_holds_what_a_test_would_not_reject() -> None:
    """Fieller's ends are where a paired t test of top - ratio * bottom is just significant."""
    rng = np.random.default_rng(0)
    bottom = rng.normal(1.0, 0.2, 8)
    top = 0.5 * bottom + rng.normal(0, 0.1, 8)
    value, low, high = ratio_interval(top, bottom)
    assert low < value < high
    for end in (low, high):
        found: Any = scipy_stats.ttest_1samp(top - end * bottom, 0)
        assert found.pvalue == pytest.approx(0.05, abs=1e-6)
    assert ratio_interval([1.0, 1.1, 0.9], [0.1, -0.1, 0.05])[1:] == (-np.inf, np.inf)
    assert np.isnan(ratio_interval([1.0], [2.0])[1]) and ratio_interval([1.0], [2.0])[0] == 0.5
    with pytest.raises(TransferError, match="needs pairs"):
        ratio_interval([1.0, 2.0], [1.0])


@given(st.floats(0.1, 10), st.integers(0, 1000))
def test_a_ratio_keeps_its_interval_under_a_change_of_units(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bottom, top = rng.normal(2, 0.3, 6), rng.normal(1, 0.3, 6)
    assert ratio_interval(scale * top, bottom) == pytest.approx([scale * x for x in ratio_interval(top, bottom)])


def test_room_is_what_the_seed_lacks() -> None:
    coverage = [
        {"model": "zoo:a", "dataset": "seed", "n_anchor": 90, "n_missing": 30},
        {"model": "zoo:b", "dataset": "seed", "n_anchor": 90, "n_missing": 29},
        {"model": "zoo:b", "dataset": "seed + own by b", "n_anchor": 90, "n_missing": 3},
    ]
    found = room(coverage, 30)
    assert [(r["model"], r["informative"]) for r in found] == [("zoo:a", True), ("zoo:b", False)]


def test_a_planted_dependence_on_quality_is_found() -> None:
    cells, records, qualities = [], [], {}
    for target in "abc":
        for seed in range(3):
            cells.append(made("seed_only", seed, 0.4, target=f"zoo:{target}", n=10))
        for source in "abc".replace(target, ""):
            quality = 0.1 * (1 + len(qualities))
            qualities[source, target] = {(1, 2): quality, (3, 4): 0.0}
            for writer in "abc":
                for seed in range(3):
                    at = {"source": f"zoo:{source}", "target": f"zoo:{target}", "generator": f"zoo:{writer}", "n": 20}
                    cells.append(made("random", seed, 0.5, **at))
                    cells.append(made("mapped", seed, 0.5 + 0.2 * quality, **at))
                records.append(
                    {"target": target, "source": source, "generator": writer, "arm": "mapped", "n_features": 1}
                    | {"n_verified": 1, "written": [{"feature": 1, "text": "", "label": ""}]}
                )
    found = quality_correlations(
        [r.summary() for r in summarise(cells, "intent", "auprc")], records, qualities, NAMES, seed=0
    )
    by_name = {(r["predictor"], r["statistic"]): r for r in found}
    assert by_name["heldout_corr", "pearson"]["within"] == pytest.approx(1.0)
    assert by_name["heldout_corr", "pearson"]["n_points"] == 6, "writers share the matches"
    assert by_name["verified", "pearson"]["verdict"].startswith("undefined")


def test_dose_rows_say_size_score_and_what_is_missing() -> None:
    cells = [made("seed_only", s, 0.3 + 0.01 * n + 0.001 * s, n=n) for n in (4, 8) for s in range(3)]
    records = [
        {"target": "a", "examples": [["t", "x"]] * n, "dose": n, "coverage": {"fac": n / 10, "n_missing": 50 - n}}
        for n in (4, 8)
    ]
    found = dose(cells, records, NAMES, "auprc")
    assert [(r["n_seed"], r["n_missing"], r["n_seeds"]) for r in found] == [(4, 46, 3), (8, 42, 3)]
    assert found[0]["mean"] == pytest.approx(0.341) and found[0]["low"] < found[0]["mean"] < found[0]["high"]

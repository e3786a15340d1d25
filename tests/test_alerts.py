"""Alerts fire on what they are for, and stay silent otherwise."""

from __future__ import annotations

import pytest

from transfer.core.experiment import load_experiment
from transfer.grid.results import alerts, limits


def numbers() -> dict:
    return {
        "data": {"texts": {"anchor": 9}, "unused": {}},
        "harvest": [{"model": "a", "nmse": 0.2, "card_nmse": 0.15}],
        "alignments": [
            {"method": "sinkhorn", "source": "a", "target": "b", "converged": True, "row_error": 0.0, "col_error": 0.0}
        ],
        "coverage": [{"model": "a", "dataset": "seed", "n_missing": 50}],
        "transfer": [
            {"arm": "mapped", "n_train": 118},
            {"arm": "seed_only", "n_train": 78},
        ],
        "comparisons": [{"arm": "mapped", "low": 0.01, "high": 0.02}],
        "synthesis": [{"pool": "own", "writer": "a", "n_candidates": 100, "n_kept": 50}],
        "n_leaked": 0,
    }


def test_nothing_wrong_gives_no_alert() -> None:
    assert alerts(numbers(), {}, load_experiment("demo")) == []


@pytest.mark.parametrize(
    ("section", "row", "words"),
    [
        ("harvest", {"nmse": 0.5}, "0.50 of the variance of these texts unexplained, 0.15 of its card"),
        ("harvest", {"nmse": 1.2, "card_nmse": None}, "1.20 of the variance"),
        ("harvest", {"nmse": 0.69, "card_nmse": None}, "was not checked; it leaves 0.69"),
        ("alignments", {"converged": False}, "did not converge"),
        ("coverage", {"n_missing": 3}, "only 3"),
        ("transfer", {"n_train": 90}, "only 12 of the 40"),
        ("comparisons", {"low": -0.01}, "spans zero"),
        ("synthesis", {"n_kept": 1}, "kept only 1"),
    ],
)
def test_each_alert_can_fire(section: str, row: dict, words: str) -> None:
    wrong = numbers()
    wrong[section][0].update(row)
    found = alerts(wrong, {}, load_experiment("demo"))
    assert len(found) == 1 and words in found[0]["text"]


def test_texts_of_other_splits_are_named() -> None:
    wrong = numbers()
    wrong["data"]["unused"]["val"] = 4
    assert "4 texts of split 'val'" in alerts(wrong, {}, load_experiment("demo"))[0]["text"]


def test_severe_alerts_come_first() -> None:
    wrong = numbers()
    wrong["n_leaked"] = 2
    wrong["comparisons"][0]["low"] = -1.0
    assert [a["level"] for a in alerts(wrong, {}, load_experiment("demo"))] == ["severe", "warn"]


def test_limits_mention_tiny_models_only_for_the_zoo() -> None:
    assert any("tiny" in line for line in limits(load_experiment("demo")))
    other = load_experiment("demo", ["models.llama.model=hub:x/y@z"])
    assert not any("tiny" in line for line in limits(other))

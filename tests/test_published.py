"""The paper's numbers: complete, consistent with each other where the paper is, and beside a run of one's own."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from transfer.core.errors import TransferError
from transfer.core.outcomes import EvalResult
from transfer.grid.published import SYNTHESIZED, beside, data_efficiency, parameter_efficiency, published, select


def one(**wanted) -> float:
    (row,) = select(**wanted)
    return row.value


def test_every_table_is_whole():
    sizes = {}
    for row in published():
        sizes[row.table] = sizes.get(row.table, 0) + 1
        assert math.isfinite(row.value) and (row.spread is None or row.spread >= 0)
        assert row.source.startswith("arXiv 2602.10388v4, Table ")
    # Rows × columns; Table 13: ten AUPRC, three rows of five reward numbers, seven means.
    assert sizes == {1: 70, 3: 6, 8: 10, 9: 18, 10: 30, 11: 6, 12: 4, 13: 10 + 15 + 7}
    keys = [(r.table, r.column, r.method, r.task, r.behaviour, r.model) for r in published()]
    assert len(set(keys)) == len(keys)


def test_tables_agree_where_they_repeat_a_number():
    ours = dict(method="FAC Synthesis", metric="auprc")
    assert one(table=1, **ours) == one(table=12, method="SAE, FAC", metric="auprc") == 62.60
    assert one(table=3, model="LLaMA-3.1-8B-Instruct", **ours) == one(table=13, **ours) == 49.12
    whole = "100 % of the features"
    assert one(table=9, method=whole, metric="auprc") == one(table=13, **ours)
    for behaviour in ("sycophancy", "survival-instinct"):
        about = dict(metric="scr", behaviour=behaviour)
        assert one(table=1, method="FAC Synthesis", **about) == one(table=9, method=whole, **about)
    assert one(table=11, method="binary", metric="missing_hit_rate") == pytest.approx(
        one(table=10, task="toxicity", column="FAC at threshold 0", method="two step"), abs=0.05
    )


def test_section_means_are_the_means_of_their_sections():
    for method in ("Baseline", "Full dataset", "FAC Synthesis"):
        rows = select(table=13, task="reward", method=method)
        sections = [r.value for r in rows if r.metric.startswith("accuracy@")]
        assert len(sections) == 4
        (mean,) = [r.value for r in rows if r.metric == "section_mean"]
        assert mean == pytest.approx(sum(sections) / 4, abs=0.01)


def test_hit_rates_are_fractions_of_the_missing_features():
    missing = {"toxicity": 214, "reward": 312, "sycophancy": 5, "survival-instinct": 7, "instruction": 2004}
    for row in select(table=10):
        n = missing[row.behaviour or row.task]
        nearest = Fraction(round(row.value / 100 * n), n)
        assert row.value == pytest.approx(100 * float(nearest), abs=0.05), row.source
        assert "hits over missing" in row.note


def test_efficiency_scores_known_answers():
    """DES of Table 1's FAC row from its AUPRC and its 200 samples; the win rate per 1,000 is README figure 1's."""
    score = one(table=1, method="FAC Synthesis", metric="auprc")
    assert data_efficiency(score, SYNTHESIZED["toxicity"]) == pytest.approx(62.60 / 2.30103, abs=1e-3)
    assert data_efficiency(score, SYNTHESIZED["toxicity"]) == pytest.approx(27.205, abs=1e-3)
    assert data_efficiency(50.0, 100) == 25.0
    assert parameter_efficiency(60.0, 10**6) == pytest.approx(10.0)
    wins = one(table=1, method="FAC Synthesis", metric="win_rate")
    assert wins / (SYNTHESIZED["instruction"] / 1000) == pytest.approx(10.63)
    for wrong in (data_efficiency, parameter_efficiency):
        with pytest.raises(TransferError, match="at least 2"):
            wrong(50.0, 1)


def test_own_results_stand_beside_the_papers_in_its_unit():
    own = [EvalResult("intent", "auprc", 0.5, 0.02, 300, 0, "k.jsonl"), EvalResult("x", "auprc", 0.5, 0.0, 1, 0, "k")]
    rows = beside(own, table=12)
    assert [r["method"] for r in rows] == [r.method for r in select(table=12)]
    assert {(r["own"], r["own_stderr"], r["own_n"]) for r in rows} == {(50.0, 2.0, 300)}
    assert rows[0]["source"] == "arXiv 2602.10388v4, Table 12, toxicity AUPRC, Baseline"
    sections = beside([EvalResult("reward", "accuracy@Chat Hard", 0.6, 0.1, 456, 0, "k")])
    assert [r["value"] for r in sections] == [64.99, 64.54, 69.59]
    with pytest.raises(TransferError, match="no field 'tabel'"):
        select(tabel=1)

"""Table 8: coefficients against scipy, planted relations found, none found in noise, targets kept apart."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

from transfer.core.errors import TransferError
from transfer.grid.correlations import PREDICTORS, Correlation, Point, correlations, points, table
from transfer.verbs.diversity import diversity as verb


def cells(x: np.ndarray, y: np.ndarray, groups: list[str], **more: np.ndarray) -> list[Point]:
    return [
        Point(g, "own", str(i), {"fac": float(x[i]), **{k: float(v[i]) for k, v in more.items()}}, float(y[i]))
        for i, g in enumerate(groups)
    ]


def by(rows: list[Correlation], predictor: str = "fac", statistic: str = "pearson") -> Correlation:
    (row,) = [r for r in rows if (r.predictor, r.statistic) == (predictor, statistic)]
    return row


def test_coefficients_are_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=18), rng.integers(0, 5, size=18).astype(float)
    rows = correlations(cells(x, y, ["a"] * 18), ["fac"], n_draws=50)
    assert by(rows).pooled == pytest.approx(stats.pearsonr(x, y)[0])
    assert by(rows, statistic="spearman").pooled == pytest.approx(stats.spearmanr(x, y)[0])
    assert by(rows).within == pytest.approx(by(rows).pooled)  # one target: nothing to take off
    assert by(rows, statistic="spearman").within == pytest.approx(by(rows, statistic="spearman").pooled)


def test_targets_do_not_make_a_relation_nor_hide_one() -> None:
    """Better targets have lower coverage, but within each the better covered set scores higher."""
    rng = np.random.default_rng(1)
    groups = [g for g in "abc" for _ in range(8)]
    level = np.repeat([0.0, 1.0, 2.0], 8)
    inside = rng.normal(size=24) * 0.1
    row = by(correlations(cells(inside - level, inside + level, groups), ["fac"], n_draws=400))
    assert row.pooled < -0.9 and row.within == pytest.approx(1.0)
    assert row.within_low > 0.9 and row.p == pytest.approx(1 / 401) and row.verdict == "goes with the score"
    assert row.n_points == 24 and row.n_groups == 3
    turned = by(correlations(cells(level - inside, inside + level, groups), ["fac"], n_draws=400))
    assert turned.verdict == "goes against the score"


def test_noise_is_undecided_and_p_is_uniform() -> None:
    groups = [g for g in "abc" for _ in range(6)]
    found = []
    for s in range(60):
        rng = np.random.default_rng(s)
        found.append(by(correlations(cells(rng.normal(size=18), rng.normal(size=18), groups), ["fac"], n_draws=200)))
    p = np.array([r.p for r in found])
    assert np.mean([r.verdict == "undecided" for r in found]) >= 0.8
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean([r.within_low <= 0 <= r.within_high for r in found]) >= 0.8


def test_interval_holds_a_true_correlation() -> None:
    groups = [g for g in "abc" for _ in range(10)]
    held = []
    for s in range(60):
        rng = np.random.default_rng(100 + s)
        x = rng.normal(size=30)
        y = 0.6 * x + 0.8 * rng.normal(size=30) + np.repeat(rng.normal(size=3) * 5, 10)
        row = by(correlations(cells(x, y, groups), ["fac"], n_draws=200))
        held.append(row.within_low <= 0.6 <= row.within_high)
    assert np.mean(held) >= 0.83


def test_permutation_p_is_near_the_exact_one() -> None:
    x, y = np.array([0.0, 1, 2, 3, 10, 12]), np.array([0.1, 0.0, 0.4, 0.5, 2.0, 1.9])
    groups = ["a"] * 4 + ["b"] * 2
    row = by(correlations(cells(x, y, groups), ["fac"], n_draws=4000))

    def within(scores: np.ndarray) -> float:
        a = np.concatenate([x[:4] - x[:4].mean(), x[4:] - x[4:].mean()])
        b = np.concatenate([scores[:4] - scores[:4].mean(), scores[4:] - scores[4:].mean()])
        return abs(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    every = [
        within(np.array([*one, *two])) for one in itertools.permutations(y[:4]) for two in itertools.permutations(y[4:])
    ]
    exact = np.mean([v >= within(y) - 1e-12 for v in every])
    assert row.p == pytest.approx(exact, abs=0.03)


def test_holm_counts_the_predictors_of_one_statistic() -> None:
    rng = np.random.default_rng(3)
    groups = [g for g in "ab" for _ in range(8)]
    noise = {f"n{i}": rng.normal(size=16) for i in range(4)}
    x = rng.normal(size=16)
    rows = correlations(cells(x, x, groups, **noise), ["fac", *noise], n_draws=300)
    assert by(rows).p_holm == pytest.approx(5 * by(rows).p)
    assert by(rows, statistic="spearman").p_holm == pytest.approx(5 * by(rows, statistic="spearman").p)
    weak = cells(x, x + 2.4 * rng.normal(size=16), groups, **noise)
    lone = by(correlations(weak, ["fac"], n_draws=300))
    many = by(correlations(weak, ["fac", *noise], n_draws=300))
    assert lone.p == pytest.approx(many.p, abs=0.05) and many.p_holm >= many.p


def test_what_cannot_be_decided_says_why() -> None:
    groups = ["a"] * 4 + ["b"] * 4
    y = np.arange(8.0)
    constant = np.repeat([1.0, 2.0], 4)
    rows = correlations(cells(constant, y, groups), ["fac", "vendi"], n_draws=20)
    assert by(rows).verdict == "undefined: the number is the same in all cells of each target"
    assert by(rows, "vendi").verdict == "not measured in 8 of 8 cells"
    assert by(rows).summary()["within"] is None and math.isnan(by(rows).p_holm)
    few = correlations(cells(y[:4], y[:4], groups[:4]), ["fac"], n_draws=20)
    assert by(few).verdict == "undecided: only 4 cells"
    flat = correlations(cells(y, np.ones(8), groups), ["fac"], n_draws=20)
    assert by(flat).verdict.startswith("undefined: the score")
    with pytest.raises(TransferError, match="no cell"):
        correlations([])


def test_same_seed_same_rows_and_uneven_targets_are_fine() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=11), rng.normal(size=11)
    uneven = cells(x, y, ["a"] * 8 + ["b"] * 3)
    assert correlations(uneven, ["fac"], n_draws=60, seed=1) == correlations(uneven, ["fac"], n_draws=60, seed=1)
    assert correlations(uneven, ["fac"], n_draws=60, seed=1) != correlations(uneven, ["fac"], n_draws=60, seed=2)


# From a run.


def a_run(seed: int = 0) -> dict[str, Any]:
    """Two targets, three writers; in it FAC is the score and self-BLEU its opposite."""
    rng = np.random.default_rng(seed)
    coverage: list[dict[str, Any]] = [{"model": "hub:o/t1", "fac": 0.2, "kl": 1.0}]
    diversity: list[dict[str, Any]] = []
    transfer: list[dict[str, Any]] = []
    for target, arm, writer in itertools.product(("t1", "t2"), ("own", "random"), ("t1", "t2", "t3")):
        fac = float(rng.uniform(0.5, 0.9))
        at = {"arm": arm, "writer": writer}
        coverage.append({"model": f"hub:o/{target}", **at, "fac": fac, "kl": 1 - fac, "missing_hit_rate": fac})
        by = {"source": f"hub:o/{writer}", "generator": f"hub:o/{writer}"}
        diversity.append({"target": f"hub:o/{target}", **at, **by, "self_bleu": 1 - fac})
        for recipe, metric in itertools.product(("head", "lora"), ("auprc", "auroc")):
            cell = {"target": f"hub:o/{target}", "arm": arm, **by, "recipe": recipe}
            transfer.append({**cell, "metric": metric, "mean": fac if metric == "auprc" else 0.0})
    for arm in ("seed_only", "full"):
        diversity.append({"target": "hub:o/t1", "arm": arm, "writer": "", "generator": "", "self_bleu": 0.0})
        cell = {"target": "hub:o/t1", "arm": arm, "source": "", "generator": "", "recipe": "head"}
        transfer.append({**cell, "metric": "auprc", "mean": 0.99})
    return {"coverage": coverage, "diversity": diversity, "transfer": transfer}


def test_cells_are_joined_and_those_of_other_sizes_left_out() -> None:
    found = points(a_run(), "head", "auprc")
    assert len(found) == 12 and {p.group for p in found} == {"hub:o/t1", "hub:o/t2"}
    for p in found:
        assert p.arm in ("own", "random") and p.writer in ("t1", "t2", "t3")
        assert p.score == p.predictors["fac"] == pytest.approx(1 - p.predictors["self_bleu"])


def test_the_table_of_one_run_and_of_two() -> None:
    rows = table({"one": a_run()})
    assert {r["recipe"] for r in rows} == {"head", "lora"} and {r["metric"] for r in rows} == {"auprc"}
    assert len(rows) == 2 * 2 * len(PREDICTORS)
    fac = next(r for r in rows if r["predictor"] == "fac")
    bleu = next(r for r in rows if r["predictor"] == "self_bleu")
    assert fac["within"] == pytest.approx(1) and bleu["within"] == pytest.approx(-1)
    assert (fac["verdict"], bleu["verdict"]) == ("goes with the score", "goes against the score")
    both = table({"one": a_run(), "two": a_run(1)})
    assert both[0]["n_points"] == 24 and both[0]["n_groups"] == 4
    assert table({"empty": {"transfer": [], "coverage": [], "diversity": []}}) == []
    with pytest.raises(TransferError, match="There is: auprc, auroc"):
        table({"one": a_run()}, "f1")


def test_the_verb_prints_the_table_of_a_run(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(verb)
    for name, results in (("one", a_run()), ("bare", {"coverage": [], "transfer": []})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results), "utf8")
    done = CliRunner().invoke(app, ["--run", str(tmp_path / "one"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "12 cells, 2 targets" in done.output and "goes with the score" in done.output
    assert "not measured in 12 of 12 cells" in done.output
    rows = json.loads(CliRunner().invoke(app, ["--run", str(tmp_path / "one"), "--json"]).output)
    assert rows["diversity_correlations"] == table({str(tmp_path / "one"): a_run()})
    for wrong, said in (("bare", "No cell of"), ("nowhere", "does not exist")):
        failed = CliRunner().invoke(app, ["--run", str(tmp_path / wrong)])
        assert isinstance(failed.exception, TransferError) and said in str(failed.exception)

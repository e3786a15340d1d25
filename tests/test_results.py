"""What the claims say: the right cells pooled, the sign heeded, the verdict honest."""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_matrix import made
from transfer.core.experiment import load_experiment
from transfer.grid.claims import compare, summarise
from transfer.grid.results import claims, coverage_contrasts

EXPERIMENT = load_experiment("demo", ["tune.recipes=[head]"])


def told(**means: float) -> dict[str, dict]:
    """Pooled claims by anchor, of two targets that are each written for by the other model."""
    cells = []
    for source, target in (("zoo:a", "zoo:b"), ("zoo:b", "zoo:a")):
        for arm, mean in means.items():
            writer = target if arm == "own" else source
            for seed in range(3):
                cells.append(made(arm, seed, mean + 0.001 * seed, source=writer, target=target))
                if arm == "random":  # the target's own random features, the control of `own`
                    cells.append(made(arm, seed, mean - 0.2 + 0.001 * seed, source=target, target=target))
    rows = summarise(cells, "intent", "auprc")
    return {c["anchor"]: c for c in claims(rows, compare(cells, "auprc"), EXPERIMENT)}


def test_pooled_claims_compare_the_arm_with_the_control_of_the_same_writer():
    found = told(mapped=0.6, own=0.7, random=0.5, shuffled=0.55)
    assert found["pooled-head-mapped-random"]["number"] == pytest.approx(0.1)
    assert found["pooled-head-mapped-shuffled"]["number"] == pytest.approx(0.05)
    assert found["pooled-head-own-random"]["number"] == pytest.approx(0.4)
    assert {c["verdict"] for a, c in found.items() if a.startswith("pooled")} == {"supported"}


def test_a_loss_is_not_supported_however_sure():
    found = told(mapped=0.5, own=0.3, random=0.6, shuffled=0.55)
    for anchor in ("pooled-head-mapped-random", "pooled-head-mapped-shuffled", "pooled-head-own-random"):
        assert found[anchor]["number"] < 0 and found[anchor]["verdict"] == "not supported"


def test_pooled_claims_are_corrected_for_their_number():
    """Three comparisons that each just pass alone do not pass together."""
    cells = []
    for source, target in (("zoo:a", "zoo:b"), ("zoo:b", "zoo:a")):
        for seed, delta in enumerate((0.069, 0.1, 0.131)):  # p = .03
            for arm, value in (("mapped", 0.5 + delta), ("random", 0.5), ("shuffled", 0.5)):
                cells.append(made(arm, seed, value, source=source, target=target))
            cells.append(made("own", seed, 0.5 + delta, source=target, target=target))
            cells.append(made("random", seed, 0.5, source=target, target=target))
    found = claims(summarise(cells, "intent", "auprc"), compare(cells, "auprc"), EXPERIMENT)
    pooled = [c for c in found if c["anchor"].startswith("pooled")]
    assert len(pooled) == 3 and {c["verdict"] for c in pooled} == {"undecided: would need 4 seeds"}


def test_agreement_of_seeds_does_not_hide_that_cells_disagree():
    """Seeds share their texts: what one set of texts does comes back with every seed."""
    cells = []
    for (source, target), gain in {
        ("zoo:a", "zoo:b"): 0.1,
        ("zoo:b", "zoo:a"): -0.02,
        ("zoo:c", "zoo:a"): 0.01,
    }.items():
        for seed in range(3):
            cells.append(made("mapped", seed, 0.5 + gain + 1e-4 * seed, source=source, target=target))
            cells.append(made("random", seed, 0.5, source=source, target=target))
    (found, *_) = claims(summarise(cells, "intent", "auprc"), compare(cells, "auprc"), EXPERIMENT)
    assert found["number"] == pytest.approx(0.03, abs=1e-3) and found["low"] < -0.1 < 0.1 < found["high"]
    assert found["verdict"] == "undecided: would need 36 cells" and "interval over cells" in found["sentence"]


def test_arms_for_which_nothing_was_written_make_no_claim():
    """Equal to the seed data, they would count as a sure nothing."""
    cells = []
    for source, target, n in (("zoo:a", "zoo:b", 60), ("zoo:b", "zoo:a", 100)):
        for seed in range(3):
            cells.append(made("seed_only", seed, 0.5, target=target, n=60))
            for arm, gain in (("mapped", 0.1), ("random", 0.0), ("shuffled", 0.0)):
                value = 0.5 + 0.001 * seed + (gain if n > 60 else 0.0)
                cells.append(made(arm, seed, value, source=source, target=target, n=n))
    compared = compare(cells, "auprc")
    assert {c.target for c in compared} == {"zoo:a"}
    found = {c["anchor"]: c for c in claims(summarise(cells, "intent", "auprc"), compared, EXPERIMENT)}
    assert found["pooled-head-mapped-random"]["number"] == pytest.approx(0.1)
    assert "mean of 1 cells" in found["pooled-head-mapped-random"]["sentence"]
    empty = [c for c in cells if c.target == "zoo:b"]
    assert claims(summarise(empty, "intent", "auprc"), compare(empty, "auprc"), EXPERIMENT) == []


def test_coverage_contrasts_pair_the_writer_with_itself():
    rows = [{"model": "zoo:a", "n_missing": 3}]  # the seed's own row has no arm
    for i, (target, writer) in enumerate((("a", "b"), ("b", "a"), ("c", "a"))):
        for arm, rate in (("mapped", 0.5 + 0.1 * i), ("random", 0.3 + 0.1 * i), ("own", 0.9)):
            rows.append({"model": target, "writer": writer, "arm": arm, "missing_hit_rate": rate})
    rows.append({"model": "c", "writer": "b", "arm": "mapped", "missing_hit_rate": None})
    (found,) = coverage_contrasts(rows)
    assert (found["control"], found["n_pairs"]) == ("random", 3)
    assert found["delta"] == pytest.approx(0.2) and found["low"] == pytest.approx(0.2) == found["high"]


def test_several_writers_for_the_same_features_are_not_more_evidence():
    """Ten writers that agree on one pair of models say no more about other pairs than one of them."""
    cells = []
    for (source, target), gain in {("zoo:a", "zoo:b"): 0.1, ("zoo:b", "zoo:a"): 0.02, ("zoo:c", "zoo:a"): 0.06}.items():
        for writer in range(10):
            for seed in range(3):
                at: Any = {"source": source, "target": target, "generator": f"zoo:w{writer}"}
                cells.append(made("mapped", seed, 0.5 + gain + 1e-3 * writer + 1e-4 * seed, **at))
                cells.append(made("random", seed, 0.5 + 1e-3 * writer, **at))
    found = claims(summarise(cells, "intent", "auprc"), compare(cells, "auprc"), EXPERIMENT)[0]
    assert found["number"] == pytest.approx(0.06, abs=1e-3) and found["low"] < 0 < 0.15 < found["high"]
    assert "mean of 30 cells" in found["sentence"] and "interval over pairs of source and target" in found["sentence"]
    assert found["verdict"].startswith("undecided: would need") and found["verdict"].endswith(
        "pairs of source and target"
    )

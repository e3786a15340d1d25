"""What the claims say: the right cells pooled, the sign heeded, the verdict honest."""

from __future__ import annotations

import pytest

from tests.test_matrix import made
from transfer.claims import compare, summarise
from transfer.core.config import load_experiment
from transfer.results import claims

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

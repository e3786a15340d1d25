"""Planted controls through the grid itself: training sets, cells and claims, with a scripted writer and a word model.

The target's seed data lacks the words that harmful texts of the evaluation hold. Texts for its missing features bring
them; texts for random features bring words that it has already.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.test_arms import MISSING, PAIRS, Store, alignment, report, space
from tests.test_matrix import HASHES, RECIPE, TASK
from transfer.core.experiment import load_experiment
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.texts import Corpus, Text
from transfer.grid.arms import plan, training_sets
from transfer.grid.claims import compare, summarise
from transfer.grid.results import claims
from transfer.matrix import Cell, CellResult, run_cells

LACKED = ("lock", "wire", "poison", "fuse")
KNOWN = ("bread", "cake", "tea", "milk")
SEEDS = range(6)
EXPERIMENT = load_experiment("demo", ["synth.features=8", "synth.budget=16", "tune.recipes=[head]"])
EVALUATION = Corpus(
    "evaluation",
    tuple(
        Text(f"e{i}", f"{w} and {KNOWN[(i // 3) % 4]}", label)
        for i in range(60)
        for label, w in [("harmful", LACKED[i % 4]) if i % 2 else ("benign", KNOWN[i % 4])]
    ),
)


MODELS = {"s": "zoo:a", "t": "zoo:b", "r": "zoo:c", "": ""}
LACKS = {**MISSING, "r": [2, 3, 11, 18, 24, 27, 31]}


def wrote(name: str, asked: list[int], guided: set[int]) -> SynthesisRun:
    """Four texts a feature, two of them harmful; of a ``guided`` feature these hold the words that the target lacks."""
    found = []
    for i in asked:
        for k, label in enumerate(("harmful", "benign") * 2):
            words = " ".join(LACKED if i in guided and label == "harmful" else KNOWN)
            found.append(
                Candidate(
                    space(name).id, "scripted", i, 1, k, f"{words} {name} {i} {k}", label, 2.0, 1.0, 0, "h", "kept"
                )
            )
    return SynthesisRun(space(name).id, "scripted", "own", len(asked), tuple(found), 1, 1)


def without_meaning(examples: list[list[str]]) -> list[list[str]]:
    """Labels exchanged so that of the texts with the same words half are harmful: they say nothing any more."""
    seen: dict[str, int] = {}
    out = []
    for text, _ in examples:
        words = text.split()[0]
        seen[words] = seen.get(words, 0) + 1
        out.append([text, ("harmful", "benign")[seen[words] % 2]])
    return out


def grid(tmp_path: Path, *, shuffled_labels: bool) -> list[CellResult]:
    anchor = Corpus("anchor", tuple(Text(f"a{i}", f"anchor {i}", ("benign", "harmful")[i % 2]) for i in range(20)))
    seed = Corpus("seed", tuple(Text(f"s{i}", f"{KNOWN[i % 4]} {i}", ("benign", "harmful")[i % 2]) for i in range(8)))
    reports = {name: report(name, missing) for name, missing in LACKS.items()}
    plans, runs = {}, {}
    for source in LACKS:
        others = [name for name in LACKS if name != source]
        real = {target: alignment(source, target, PAIRS) for target in others}
        store = Store(Path("nowhere"), space(source), "c", tuple(t.id for t in anchor), 0, 0)
        made = plan(source, reports, real, real, store, anchor, EXPERIMENT)
        guided = {i for rows in made["mapped"].values() for i, _ in rows} | set(made["own"])
        made["random"] = sorted(set(range(40)) - guided)[:8]
        # A wrong alignment leads to features that are not about what the target lacks.
        for target in others:
            missing = [j for _, j in made["mapped"][target]]
            made["shuffled"][target] = [[i, j] for i, j in zip(made["random"], missing, strict=False)]
        plans[source] = made
        asked = sorted(guided | set(made["random"]))
        runs[source, source] = wrote(source, asked, guided)
    fires = {pool: sp.csr_matrix(np.ones((len(r.kept), 40), dtype=bool)) for pool, r in runs.items()}
    cells = []
    for target in LACKS:
        for record in training_sets(target, plans, runs, fires, seed, anchor, EXPERIMENT):
            base, added = record["examples"][: len(seed)], record["examples"][len(seed) :]
            labelled = base + (without_meaning(added) if shuffled_labels else added)
            examples = tuple((text, int(label == "harmful")) for text, label in labelled)
            at = MODELS[record["source"]], MODELS[record["generator"]], MODELS[target]
            cells += [Cell(*at, record["arm"], RECIPE, s, examples) for s in SEEDS if record["arm"] != "full"]
    return run_cells(cells, EVALUATION, TASK, pool=None, out_dir=tmp_path, base_hashes=HASHES)


@pytest.fixture(autouse=True)
def _third_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HASHES, "zoo:c", "hash-c")


def told(found: list[CellResult], n_missing: int = 40) -> dict[str, str]:
    room = [{"model": m, "n_missing": n_missing, "least": 30, "informative": n_missing >= 30} for m in HASHES]
    rows = summarise(found, "intent", "auprc")
    return {c["anchor"]: c["verdict"] for c in claims(rows, compare(found, "auprc"), EXPERIMENT, room)}


def test_data_that_the_target_really_lacks_is_supported(tmp_path: Path) -> None:
    found = told(grid(tmp_path, shuffled_labels=False))
    assert {found[f"pooled-head-{p}"] for p in ("mapped-random", "mapped-shuffled", "own-random")} == {"supported"}
    assert {v for anchor, v in found.items() if anchor.startswith("cell-")} == {"supported"}


def test_shuffled_labels_are_not_supported(tmp_path: Path) -> None:
    found = told(grid(tmp_path, shuffled_labels=True))
    assert not {v for v in found.values() if v == "supported"}, found
    assert found["pooled-head-mapped-random"] == "not supported"


def test_without_room_nothing_is_claimed(tmp_path: Path) -> None:
    found = told(grid(tmp_path, shuffled_labels=False), n_missing=29)
    assert found and all(v.startswith("uninformative: zoo:") and "lacks only 29" in v for v in found.values())


@pytest.mark.parametrize("arm", ["mapped", "random"])
def test_the_planted_grid_holds_one_budget(tmp_path: Path, arm: str) -> None:
    sizes = {c.run.n_examples for c in grid(tmp_path, shuffled_labels=False) if c.arm == arm}
    assert len(sizes) == 1 and min(sizes) > 8

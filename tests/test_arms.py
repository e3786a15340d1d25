"""The control arms ask for what they say, and end with one budget and one label balance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from aligners.assignment import counterparts
from aligners.calibrate import shuffled
from transfer.core.alignment import Alignment
from transfer.core.config import Experiment
from transfer.core.experiment import load_experiment
from transfer.core.outcomes import Candidate, CoverageReport, SynthesisRun
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text
from transfer.grid.arms import candidate_share, features_asked, nested, plan, pool_name, training_sets

N = 40
LABELS = ("benign", "harmful")


def space(name: str) -> FeatureSpace:
    return FeatureSpace(f"zoo:{name}", name, 1, f"zoo:{name}/sae", name, N, 8, "topk-4", 3)


def report(name: str, missing: list[int]) -> CoverageReport:
    def features(ids: list[int], why: str) -> FeatureSet:
        labels = tuple(LABELS[i % 2] for i in ids)
        return FeatureSet(space(name), np.array(ids), why, labels=labels, scores=np.arange(len(ids), 0, -1.0))

    everything = features(list(range(N)), "all")
    covered = [i for i in range(N) if i not in missing]
    return CoverageReport(
        space(name), "seed", "anchor", everything, everything,
        features(covered, "covered"), features(missing, "missing"),
        len(covered) / N, len(covered) / N, 0.0, 1.0, "quantile:0.5", 10, 0.0,
    )  # fmt: skip


def alignment(source: str, target: str, pairs: list[tuple[int, int]]) -> Alignment:
    src, tgt = np.array(pairs).T
    score = np.linspace(1, 0.5, len(pairs))
    nothing = np.zeros(len(pairs))
    return Alignment(
        space(source),
        space(target),
        "planted",
        sp.csr_matrix((score, (src, tgt)), shape=(N, N)),
        {"source": src, "target": tgt, "score": score, "heldout_corr": score, "p_value": nothing, "q_value": nothing},
        converged=True,
    )


class Store(ActivationStore):
    """Every feature fires in four of the anchor texts."""

    @property
    def docs(self) -> sp.csr_matrix:  # type: ignore[override]
        rng = np.random.default_rng(0)
        dense = np.zeros((len(self.doc_ids), N), dtype=np.float32)
        for feature in range(N):
            dense[rng.choice(len(self.doc_ids), 4, replace=False), feature] = 1
        return sp.csr_matrix(dense)


@pytest.fixture
def anchor() -> Corpus:
    return Corpus("anchor", tuple(Text(f"a{i}", f"anchor text {i}", LABELS[i % 2]) for i in range(20)))


@pytest.fixture
def seed() -> Corpus:
    return Corpus("seed", tuple(Text(f"s{i}", f"seed text {i}", LABELS[i % 4 == 0]) for i in range(12)))


@pytest.fixture
def experiment() -> Experiment:
    return load_experiment("demo", ["synth.features=10", "synth.budget=12"])


PAIRS = [(i, (i * 7) % N) for i in range(N)]
MISSING = {"s": [1, 4, 5, 8, 9, 12, 30], "t": [0, 7, 14, 21, 22, 33, 36, 39]}


@pytest.fixture
def plans(anchor: Corpus, experiment: Experiment) -> dict:
    reports = {name: report(name, missing) for name, missing in MISSING.items()}
    made = {}
    for source, target in (("s", "t"), ("t", "s")):
        pairs = PAIRS if source == "s" else [(b, a) for a, b in PAIRS]
        real = {target: alignment(source, target, pairs)}
        store = Store(Path("nowhere"), space(source), "c", tuple(t.id for t in anchor), 0, 0)
        made[source] = plan(source, reports, real, {target: shuffled(real[target], seed=0)}, store, anchor, experiment)
    return made


def test_mapped_features_are_what_the_target_lacks(plans: dict) -> None:
    for source, target in (("s", "t"), ("t", "s")):
        pairs = dict(PAIRS) if source == "s" else {b: a for a, b in PAIRS}
        mapped = plans[source]["mapped"][target]
        assert {j for _, j in mapped} == set(MISSING[target])
        assert all(pairs[i] == j for i, j in mapped)


def test_the_best_of_several_matches_writes_for_a_missing_feature(anchor: Corpus, experiment: Experiment) -> None:
    reports = {name: report(name, missing) for name, missing in MISSING.items()}
    pairs = [(3, 7), (9, 7), (5, 0)]  # scores fall: 3 is the better partner of 7, and 0 comes last
    real = {"t": alignment("s", "t", pairs)}
    store = Store(Path("nowhere"), space("s"), "c", tuple(t.id for t in anchor), 0, 0)
    made = plan("s", reports, real, {"t": shuffled(real["t"], seed=0)}, store, anchor, experiment)
    assert made["mapped"]["t"] == [[3, 7], [5, 0]]


def test_shuffled_asks_for_as_many_but_other_features(plans: dict) -> None:
    mapped, wrong = plans["s"]["mapped"]["t"], plans["s"]["shuffled"]["t"]
    assert len(mapped) == len(wrong)
    assert sum(dict(PAIRS)[i] == j for i, j in wrong) <= 2


def test_random_features_are_not_missing(plans: dict) -> None:
    for name, asked in plans.items():
        assert not set(asked["random"]) & set(MISSING[name])
        assert set(asked["own"]) <= set(MISSING[name])
        assert len(asked["random"]) == 10


def written(name: str, asked: list[int], per_feature: int) -> SynthesisRun:
    candidates = [
        Candidate(
            space(name).id, "scripted", i, 1, k, f"{name} writes {i} {k}", LABELS[i % 2], 2.0 + k, 1.0, 0, "h", verdict
        )
        for i in asked
        for k, verdict in enumerate(["kept"] * per_feature + ["below_threshold"])
    ]
    return SynthesisRun(space(name).id, "scripted", "own", len(asked), tuple(candidates), 1, 1)


def by_themselves(runs: dict[str, SynthesisRun]) -> dict[tuple[str, str], SynthesisRun]:
    return {(name, name): run for name, run in runs.items()}


def all_fire(runs: dict[tuple[str, str], SynthesisRun]) -> dict[tuple[str, str], sp.csr_matrix]:
    return {pool: sp.csr_matrix(np.ones((len(run.kept), N), dtype=bool)) for pool, run in runs.items()}


def test_written_arms_share_budget_and_balance(
    plans: dict, anchor: Corpus, seed: Corpus, experiment: Experiment
) -> None:
    runs = by_themselves({name: written(name, features_asked(p), 3) for name, p in plans.items()})
    sets = training_sets("t", plans, runs, all_fire(runs), seed, anchor, experiment)
    counts = {
        (s["arm"], s["source"]): tuple(sum(w["label"] == x for w in s["written"]) for x in LABELS)
        for s in sets
        if s["written"]
    }
    assert {arm for arm, _ in counts} == {"own", "mapped", "shuffled", "random"}
    assert len(set(counts.values())) == 1
    benign, harmful = next(iter(counts.values()))
    assert benign + harmful <= experiment.synth.budget
    # The seed holds three benign texts for one harmful.
    assert benign == pytest.approx(3 * harmful, abs=1)
    by_arm = {s["arm"]: s for s in sets}
    assert len(by_arm["seed_only"]["examples"]) == len(seed)
    assert len(by_arm["full"]["examples"]) == len(seed) + len(anchor)
    asked = {i for i, _ in plans["s"]["mapped"]["t"]}
    assert all(w["feature"] in asked for w in by_arm["mapped"]["written"])


def test_texts_verified_in_the_target_come_first(
    plans: dict, anchor: Corpus, seed: Corpus, experiment: Experiment
) -> None:
    runs = by_themselves({name: written(name, features_asked(p), 3) for name, p in plans.items()})
    fires = {pool: sp.lil_matrix((len(run.kept), N), dtype=bool) for pool, run in runs.items()}
    # Only the weakest text of each mapped feature also fires in the target.
    mapping = dict(plans["s"]["mapped"]["t"])
    for row, c in enumerate(runs["s", "s"].kept):
        if c.feature in mapping and c.attempt == 0:
            fires["s", "s"][row, mapping[c.feature]] = True
    sets = training_sets("t", plans, runs, {n: sp.csr_matrix(f) for n, f in fires.items()}, seed, anchor, experiment)
    mapped = next(s for s in sets if s["arm"] == "mapped")
    first = {}
    for w in mapped["written"]:
        first.setdefault(w["feature"], w["text"])
    assert all(text.endswith(" 0") for text in first.values())
    assert mapped["n_verified"] == len(first)


def test_the_scarcest_arm_cuts_all(plans: dict, anchor: Corpus, seed: Corpus, experiment: Experiment) -> None:
    few = plans["t"]["own"][:2] + plans["t"]["random"]
    runs = by_themselves({"s": written("s", features_asked(plans["s"]), 3), "t": written("t", few, 1)})
    sets = training_sets("t", plans, runs, all_fire(runs), seed, anchor, experiment)
    sizes = {s["arm"]: len(s["written"]) for s in sets if s["arm"] not in ("seed_only", "full")}
    # One benign text of `own`, three times as many benign as harmful in the seed: nothing harmful fits.
    assert set(sizes.values()) == {1}, sizes


def test_an_arm_that_lacks_a_label_stays_empty_alone(
    plans: dict, anchor: Corpus, seed: Corpus, experiment: Experiment
) -> None:
    one_label = [i for i in features_asked(plans["t"]) if i % 2]
    runs = by_themselves({"s": written("s", features_asked(plans["s"]), 3), "t": written("t", one_label, 3)})
    sets = training_sets("t", plans, runs, all_fire(runs), seed, anchor, experiment)
    sizes = {(s["arm"], s["source"]): len(s["written"]) for s in sets if s["generator"]}
    assert sizes["own", "t"] == sizes["random", "t"] == 0
    assert len({n for (_, source), n in sizes.items() if source == "s"}) == 1 and sizes["mapped", "s"] > 4


ALL = ["own", "mapped", "random", "shuffled", "text", "generic", "k_center", "coverage_selection", "full"]


def whole_grid(experiment: Experiment, writers: str) -> Experiment:
    tune = experiment.tune.model_copy(update={"arms": ("seed_only", *ALL), "writers": writers, "dose": (4, 8)})
    models = {name: experiment.models["llama"] for name in ("s", "t")}
    return experiment.model_copy(update={"tune": tune, "models": models})


def test_every_arm_and_every_writer_has_one_budget(
    plans: dict, anchor: Corpus, seed: Corpus, experiment: Experiment
) -> None:
    experiment = whole_grid(experiment, "all")
    runs = {
        (s, w): dataclasses.replace(written(s, features_asked(plans[s]), 3), generator=w) for s in "st" for w in "st"
    }
    runs |= {("", w): written(w, [-1, -2], 12) for w in "st"}
    asked: list[tuple[str, dict[str, int]]] = []

    def pick(arm: str, quota: dict[str, int]) -> list[Text]:
        asked.append((arm, quota))
        return [t for label, n in quota.items() for t in [t for t in anchor if t.label == label][:n]]

    sets = training_sets("t", plans, runs, all_fire(runs), seed, anchor, experiment, pick)
    cells = {(s["arm"], s["source"], s["generator"]) for s in sets if "dose" not in s}
    assert {c for c in cells if c[0] == "own"} == {("own", "t", "t"), ("own", "t", "s")}
    for arm in ("mapped", "shuffled", "text"):
        assert {c for c in cells if c[0] == arm} == {(arm, "s", "s"), (arm, "s", "t")}
    assert {c for c in cells if c[0] == "generic"} == {("generic", "", "s"), ("generic", "", "t")}
    added = {len(s["examples"]) - len(seed) for s in sets if s["arm"] not in ("seed_only", "full")}
    assert len(added) == 1 and min(added) > 0
    assert [arm for arm, _ in asked] == ["k_center", "coverage_selection"]
    text = next(s for s in sets if s["arm"] == "text")
    assert {w["feature"] for w in text["written"]} <= set(plans["s"]["own"])
    assert [len(s["examples"]) for s in sets if "dose" in s] == [4, 8]
    assert pool_name(("", "s")) == "generic by s" and pool_name(("s", "s")) == "s"


def test_arms_that_are_not_run_ask_for_nothing(anchor: Corpus, experiment: Experiment) -> None:
    tune = experiment.tune.model_copy(update={"arms": ("seed_only", "text")})
    reports = {name: report(name, missing) for name, missing in MISSING.items()}
    real = {"t": alignment("s", "t", PAIRS)}
    store = Store(Path("nowhere"), space("s"), "c", tuple(t.id for t in anchor), 0, 0)
    made = plan("s", reports, real, real, store, anchor, experiment.model_copy(update={"tune": tune}))
    assert made["own"] and not made["random"] and not made["mapped"] and not made["shuffled"]
    assert features_asked(made) == sorted(made["own"])


def test_parts_of_the_seed_are_nested_and_balanced(seed: Corpus) -> None:
    parts = [{t.id for t in nested(seed, n)} for n in (4, 8, 12)]
    assert parts[0] < parts[1] < parts[2] and [len(p) for p in parts] == [4, 8, 12]
    assert [sum(t.label == "harmful" for t in nested(seed, n)) for n in (4, 8, 12)] == [1, 2, 3]


def test_arms_with_few_features_get_more_candidates_each(plans: dict) -> None:
    share = candidate_share(plans["s"], limit=10)
    mapped = {i for i, _ in plans["s"]["mapped"]["t"]}
    assert all(share[i] >= 10 / len(mapped) for i in mapped)
    assert all(value >= 1 for value in share.values())
    assert set(share) == set(features_asked(plans["s"]))


def test_counterparts_reach_features_without_a_mutual_match() -> None:
    mass = sp.csr_matrix(([0.9, 0.4, 0.3, 0.2], ([0, 0, 1, 1], [0, 1, 1, 2])), shape=(N, N))
    fitted = alignment("s", "t", [(0, 0)])
    found = counterparts(dataclasses.replace(fitted, coupling=mass))
    pairs = set(zip(found.matches["source"].tolist(), found.matches["target"].tolist(), strict=True))
    # Rows: 0 → 0, 1 → 1. Columns: 0 ← 0, 1 ← 0, 2 ← 1.
    assert pairs == {(0, 0), (1, 1), (0, 1), (1, 2)}
    assert found.matches["score"].tolist() == pytest.approx([0.9, 0.4, 0.3, 0.2])

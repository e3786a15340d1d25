"""The arms of the grid: which features each asks a writer for, and the training set each ends up with.

For a target T, a feature source S and a writer W (S itself, or with ``tune.writers: all`` any model):

- ``own``: T's missing features, written for by W.
- ``mapped``: features of S whose match under the alignment is missing in T.
- ``shuffled``: the same with the alignment's targets permuted, so just as many features, wrongly mapped.
- ``random``: live features of S that the seed data does not lack; same budget, same anchor texts to draw on.
- ``text``: S's own missing features, whose texts T is trained on as they are: no alignment, the paper's way.
- ``generic``: W writes from examples drawn at random, and no feature decides anything.
- ``k_center``, ``facility_location``, ``coverage_selection``: real anchor texts; see ``transfer.grid.picks``.
- ``seed_only``: nothing added. ``full``: the whole anchor added (the ceiling).

All arms of one target but the last two get the same number of examples of each label. A writer that is not the source
is not steered: it sees examples that activate the feature, and the source's SAE decides what is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from transfer.core.alignment import Alignment
from transfer.core.config import Experiment
from transfer.core.outcomes import Candidate, CoverageReport, SynthesisRun
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text
from transfer.synthesis import margin, select

Pool = tuple[str, str]
"""Whose features, and who wrote; no source for texts without a feature."""
PICKED = ("k_center", "facility_location", "coverage_selection")
"""Arms of real texts."""


def pool_name(pool: Pool) -> str:
    """What a pool of texts is called where one word has to do: its model, or source and writer."""
    source, writer = pool
    return writer if source == writer else f"{source or 'generic'} by {writer}"


def writers(source: str, experiment: Experiment) -> list[str]:
    """Who writes for the features of ``source``, itself first."""
    others = [name for name in experiment.models if name != source] if experiment.tune.writers == "all" else []
    return [source, *others]


def plan(
    writer: str,
    coverage: dict[str, CoverageReport],
    matches: dict[str, Alignment],
    permuted: dict[str, Alignment],
    store: ActivationStore,
    anchor: Corpus,
    experiment: Experiment,
) -> dict[str, Any]:
    """Features that each arm asks ``writer`` for.

    Args:
        writer: Model name.
        coverage: Coverage of the seed data, per model.
        matches: Per other model, the alignment writer → model.
        permuted: The same with targets permuted.
        store: The writer's activations.
        anchor: Anchor texts.
        experiment: Configuration.

    Returns:
        ``own`` and ``random``: feature ids; ``mapped`` and ``shuffled``: per target, pairs
        (writer feature, matched target feature), one a missing feature, best match first. Empty where no arm of
        the experiment needs them.
    """
    limit = experiment.synth.features
    used = set(experiment.tune.arms)
    missing = coverage[writer].missing
    strength = np.ones(len(missing)) if missing.scores is None else np.abs(missing.scores)
    own = missing.features[np.argsort(-strength, kind="stable")][:limit]
    support = np.bincount(store.docs[store.rows([t.id for t in anchor])].indices, minlength=store.space.n_features)
    live = np.flatnonzero((support >= experiment.cover.min_docs) & (support <= 0.5 * len(anchor)))
    live = np.setdiff1d(live, missing.features)
    rng = np.random.default_rng([experiment.seed, *writer.encode()])
    random = np.sort(rng.choice(live, size=min(limit, len(live)), replace=False))

    def wanted(alignment: Alignment, target: str) -> list[list[int]]:
        lacking = set(coverage[target].missing.features.tolist())
        order = np.argsort(-alignment.matches["score"], kind="stable")
        best: dict[int, int] = {}
        for i in order:
            if int(alignment.matches["target"][i]) in lacking:
                best.setdefault(int(alignment.matches["target"][i]), int(alignment.matches["source"][i]))
        return [[i, j] for j, i in best.items()][:limit]

    return {
        "own": own.tolist() if used & {"own", "text"} else [],
        "random": random.tolist() if "random" in used else [],
        "mapped": {t: wanted(a, t) for t, a in matches.items() if "mapped" in used},
        "shuffled": {t: wanted(a, t) for t, a in permuted.items() if "shuffled" in used},
    }


def features_asked(plan: dict[str, Any]) -> list[int]:
    """All features that some arm asks this writer for, ascending."""
    pairs = [pair for arm in ("mapped", "shuffled") for rows in plan[arm].values() for pair in rows]
    return sorted({*plan["own"], *plan["random"], *(i for i, _ in pairs)})


def candidate_share(plan: dict[str, Any], limit: int) -> dict[int, float]:
    """How many times the usual candidates each feature gets, so that every arm has about as many in all.

    Args:
        plan: See ``plan``.
        limit: Features of a full arm.
    """
    groups = [set(plan["own"]), set(plan["random"])]
    groups += [{i for i, _ in rows} for arm in ("mapped", "shuffled") for rows in plan[arm].values()]
    share: dict[int, float] = {}
    for group in groups:
        for i in group:
            share[i] = max(share.get(i, 1.0), limit / len(group))
    return share


def training_sets(
    target: str,
    plans: Mapping[str, dict[str, Any]],
    runs: Mapping[Pool, SynthesisRun],
    fires: Mapping[Pool, sp.csr_matrix],
    seed: Corpus,
    anchor: Corpus,
    experiment: Experiment,
    pick: Callable[[str, dict[str, int]], list[Text]] | None = None,
) -> list[dict[str, Any]]:
    """The training sets of all arms of one target.

    Args:
        target: Model to be trained.
        plans: ``plan`` of every source.
        runs: What was written, by source and writer; generic texts have no source.
        fires: Per pool of features, whether each kept candidate (row) fires each feature of the target above its
            threshold, CSR of bool [kept, n_features].
        seed: Seed data.
        anchor: Anchor texts.
        experiment: Configuration.
        pick: Given an arm of ``PICKED`` and how many texts of each label, the anchor texts it takes.

    Returns:
        One record a set: source, generator, target, arm, examples (text, label), and what was chosen of whom. All
        but ``seed_only`` and ``full`` hold ``quota`` texts of each label: the seed's label balance, scaled down to the
        scarcest arm. An arm without any text of a label that is needed stays empty, so that it does not empty all.
    """
    used = experiment.tune.arms
    base = [[t.text, t.label] for t in seed]
    labels = sorted({t.label for t in seed} | {t.label for t in anchor})
    others = [m for m in plans if m != target]
    wanted = [(arm, (target, w)) for arm in ("own", "random") for w in writers(target, experiment)]
    wanted += [
        (arm, (source, w))
        for source in others
        for arm in ("mapped", "shuffled", "random", "text")
        for w in writers(source, experiment)
    ]
    wanted += [("generic", pool) for pool in runs if not pool[0]]
    pools = {
        (arm, pool): _pool(arm, target, plans.get(pool[0], {}), runs[pool], fires.get(pool))
        for arm, pool in wanted
        if arm in used
    }
    quota = _quota(labels, seed, [pool for pool, _ in pools.values()], experiment.synth.budget)
    sets = []
    for (arm, at), (pool, verified) in pools.items():
        chosen: list[Candidate] = []
        for label in labels if all(any(c.label == x for c in pool) for x in labels if quota[x]) else []:
            part = dataclasses.replace(
                runs[at], candidates=tuple(c for c in pool if c.label == label and c.verdict == "kept")
            )
            # Verified in both spaces first, then by the margin over the threshold.
            chosen += select(part, budget=quota[label], prefer=lambda c, v=verified: (id(c) in v) * 1e6 + margin(c))
        sets.append(
            {
                **_record(target, arm, base + [[c.text, c.label] for c in chosen], at),
                "written": [{"text": c.text, "feature": c.feature, "label": c.label} for c in chosen],
                "n_features": len({c.feature for c in chosen} - {-1}),
                "n_verified": sum(id(c) in verified for c in chosen),
                "quota": quota,
            }
        )
    for arm in used:
        if arm in PICKED and pick:
            texts = pick(arm, quota)
            record = _record(target, arm, base + [[t.text, t.label] for t in texts])
            sets.append({**record, "picked": [{"text": t.text, "id": t.id, "label": t.label} for t in texts]})
    for arm, extra in (("seed_only", []), ("full", [[t.text, t.label] for t in anchor])):
        if arm in used:
            sets.append(_record(target, arm, base + extra))
    for size in experiment.tune.dose:
        sets.append({**_record(target, "seed_only", [[t.text, t.label] for t in nested(seed, size)]), "dose": size})
    return sets


def _record(target: str, arm: str, examples: list[list[str]], pool: Pool = ("", "")) -> dict[str, Any]:
    return {
        "source": pool[0],
        "generator": pool[1],
        "writer": pool_name(pool) if pool[1] else "",
        "target": target,
        "arm": arm,
        "examples": examples,
        "written": [],
        "n_features": 0,
        "n_verified": 0,
        "quota": {},
    }


def nested(corpus: Corpus, size: int) -> list[Text]:
    """The first ``size`` texts in an order that keeps the balance of labels; smaller parts lie in larger ones."""
    seen: dict[str, int] = {}
    total = {label: sum(t.label == label for t in corpus) for label in {t.label for t in corpus}}
    place = []
    for t in corpus:
        seen[t.label] = seen.get(t.label, 0) + 1
        place.append((seen[t.label] - 0.5) / total[t.label])
    return [corpus.texts[i] for i in np.argsort(place, kind="stable")[:size]]


def _pool(
    arm: str, target: str, plan: dict[str, Any], run: SynthesisRun, fires: sp.csr_matrix | None
) -> tuple[list[Candidate], set[int]]:
    """Kept candidates of one arm, and which of them (by identity) also fire the matched feature of the target."""
    if arm == "generic":
        return run.kept, set()
    if arm in ("own", "random", "text"):
        features = set(plan["own" if arm == "text" else arm])
        return [c for c in run.kept if c.feature in features], set()
    assert fires is not None, "a mapped arm needs to know which texts fire in the target"
    mapping: dict[int, list[int]] = {}
    for i, j in plan[arm][target]:
        mapping.setdefault(i, []).append(j)
    pool, verified = [], set()
    for row, candidate in enumerate(run.kept):
        if candidate.feature in mapping:
            pool.append(candidate)
            if any(fires[row, j] for j in mapping[candidate.feature]):
                verified.add(id(candidate))
    return pool, verified


def _quota(labels: list[str], seed: Corpus, pools: list[list[Candidate]], budget: int) -> dict[str, int]:
    """Texts of each label that every arm can afford, in the seed's label balance.

    Arms that lack a label the seed has cannot be balanced at any size and do not count.
    """
    share = {label: sum(t.label == label for t in seed) / max(len(seed), 1) for label in labels}
    scale = 1.0
    needed = [label for label in labels if share[label]]
    counts = [{label: sum(c.label == label for c in pool) for label in needed} for pool in pools]
    counts = [c for c in counts if all(c.values())]
    for label in needed:
        scarcest = min((c[label] for c in counts), default=0 if pools else budget)
        scale = min(scale, scarcest / (budget * share[label]))
    return {label: int(budget * share[label] * scale + 1e-9) for label in labels}

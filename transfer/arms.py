"""The control arms: which features each asks a writer for, and the training set each ends up with.

For a target T and a writing model S:

- ``own``: T's missing features, written by T itself.
- ``mapped``: features of S whose match under the alignment is missing in T; S writes, T is trained.
- ``shuffled``: the same with the alignment's targets permuted, so just as many features, wrongly mapped.
- ``random``: live features of S that the seed data does not lack; same budget, same anchor texts to draw on.
- ``seed_only``: nothing added. ``full``: the whole anchor added (the ceiling).

All written arms of one target get the same number of examples of each label.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse as sp

from transfer.core.alignment import Alignment
from transfer.core.config import Experiment
from transfer.core.outcomes import Candidate, CoverageReport, SynthesisRun
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.synthesis import margin, select


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
        (writer feature, matched target feature), one a missing feature, best match first.
    """
    limit = experiment.synth.features
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
        "own": own.tolist(),
        "random": random.tolist(),
        "mapped": {t: wanted(a, t) for t, a in matches.items()},
        "shuffled": {t: wanted(a, t) for t, a in permuted.items()},
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
    plans: dict[str, dict[str, Any]],
    runs: dict[str, SynthesisRun],
    fires: dict[str, sp.csr_matrix],
    seed: Corpus,
    anchor: Corpus,
    experiment: Experiment,
) -> list[dict[str, Any]]:
    """The training sets of all arms of one target.

    Args:
        target: Model to be trained.
        plans: ``plan`` of every writer.
        runs: What every writer wrote.
        fires: Per writer, whether each kept candidate (row) fires each feature of the target above its threshold,
            CSR of bool [kept, n_features].
        seed: Seed data.
        anchor: Anchor texts.
        experiment: Configuration.

    Returns:
        One record a set: source, generator, target, arm, examples (text, label), and what was chosen of whom. All
        written arms hold ``quota`` texts of each label: the seed's label balance, scaled down to the scarcest arm.
    """
    base = [[t.text, t.label] for t in seed]
    labels = sorted({t.label for t in seed} | {t.label for t in anchor})
    others = [m for m in plans if m != target]
    wanted = [("own", target), ("random", target)]
    wanted += [(arm, source) for source in others for arm in ("mapped", "shuffled", "random")]
    pools = {(arm, source): _pool(arm, target, plans[source], runs[source], fires[source]) for arm, source in wanted}
    quota = _quota(labels, seed, [pool for pool, _ in pools.values()], experiment.synth.budget)
    sets = []
    for (arm, source), (pool, verified) in pools.items():
        chosen: list[Candidate] = []
        for label in labels:
            part = dataclasses.replace(
                runs[source], candidates=tuple(c for c in pool if c.label == label and c.verdict == "kept")
            )
            # Verified in both spaces first, then by the margin over the threshold.
            chosen += select(part, budget=quota[label], prefer=lambda c, v=verified: (id(c) in v) * 1e6 + margin(c))
        sets.append(
            {
                "source": source,
                "generator": source,
                "target": target,
                "arm": arm,
                "examples": base + [[c.text, c.label] for c in chosen],
                "written": [{"text": c.text, "feature": c.feature, "label": c.label} for c in chosen],
                "n_features": len({c.feature for c in chosen}),
                "n_verified": sum(id(c) in verified for c in chosen),
                "quota": quota,
            }
        )
    for arm, extra in (("seed_only", []), ("full", [[t.text, t.label] for t in anchor])):
        plain = {"source": target, "generator": "", "target": target, "arm": arm, "examples": base + extra}
        sets.append({**plain, "written": [], "n_features": 0, "n_verified": 0, "quota": {}})
    return sets


def _pool(
    arm: str, target: str, plan: dict[str, Any], run: SynthesisRun, fires: sp.csr_matrix
) -> tuple[list[Candidate], set[int]]:
    """Kept candidates of one arm, and which of them (by identity) also fire the matched feature of the target."""
    if arm in ("own", "random"):
        features = set(plan[arm])
        return [c for c in run.kept if c.feature in features], set()
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
    """Texts of each label that every arm can afford, in the seed's label balance."""
    share = {label: sum(t.label == label for t in seed) / max(len(seed), 1) for label in labels}
    scale = 1.0
    for label in labels:
        if share[label]:
            scarcest = min(sum(c.label == label for c in pool) for pool in pools)
            scale = min(scale, scarcest / (budget * share[label]))
    return {label: int(budget * share[label] * scale + 1e-9) for label in labels}

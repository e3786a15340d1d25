"""Coverage and selection from a store larger than memory should hold: a million documents, 65,536 features, 200 each.

``coverage.support`` is one pass over the shards for all numbers and intervals, against a plain numpy pass over the
same arrays; its limit is reading the shards, from disk (wall time) and from the system's cache (CPU time).
``coverage.greedy`` takes 10,000 documents; its peer is apricot-select where it is installed, else the method without
bounds, on a part that they can do. ``coverage.noise`` is the planted task.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from tests.benchmarks.case import row, seconds, watched
from transfer.core.files import load_arrays, save_arrays, write_json
from transfer.core.keys import SCHEMA
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.stats import mean_interval
from transfer.core.store import ActivationStore
from transfer.cover.compare import compare
from transfer.cover.selection import Candidates, Saturation, select
from transfer.cover.tally import tally, tally_store
from transfer.coverage import store_coverage

FEATURES = 65_536
ACTIVE = 200
SHARD = 20_000
DELTA = 0.3


def synthetic_store(folder: Path, n_docs: int, n_features: int = FEATURES, active: int = ACTIVE) -> ActivationStore:
    """Documents with Zipf-like features (exponent ½), in shards; without token files, which nothing here reads."""
    space = FeatureSpace("zoo:bench", "m", 1, "zoo:bench/sae", "s", n_features, 64, f"topk-{active}", 0)
    for shard, start in enumerate(range(0, n_docs, SHARD)):
        rng = np.random.default_rng(shard)
        shape = (min(SHARD, n_docs - start), active)
        ids = np.sort((n_features * rng.random(shape, dtype=np.float32) ** 2).astype(np.int32), axis=1)
        # A feature drawn twice moves on to the next free place, so that all have 200.
        for column in range(1, active):
            ids[:, column] = np.maximum(ids[:, column], ids[:, column - 1] + 1)
        ids = np.minimum(ids, n_features - active + np.arange(active, dtype=np.int32))
        values = rng.random(ids.size, dtype=np.float32) + 0.1
        bounds = np.arange(shape[0] + 1, dtype=np.int64) * active
        arrays = {"indptr": bounds, "indices": ids.ravel(), "values": values}
        save_arrays(folder / f"docs-{shard:05d}.safetensors", arrays)
    meta = {
        "schema": SCHEMA,
        "space": dataclasses.asdict(space),
        "corpus_hash": "bench",
        "n_tokens": n_docs,
        "counts": {},
    }
    ids = [str(i) for i in range(n_docs)]
    write_json(folder / "meta.json", {**meta, "doc_ids": ids, "shards": -(-n_docs // SHARD)})
    return ActivationStore.load(folder)


def _cpu(work: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def support(store: ActivationStore) -> None:
    """All numbers of a coverage report with intervals, one pass; millions of stored codes a second, in CPU time."""
    space, ids = store.space, np.arange(store.space.n_features)
    relevant = FeatureSet(space, ids, "all")
    _, anchor_docs = next(store.doc_blocks())
    delta = np.full(space.n_features, DELTA, dtype=np.float32)
    anchor = tally(sp.csr_matrix(anchor_docs), delta, ids)
    files = [store.path / f"docs-{n:05d}.safetensors" for n in range(store.shards)]
    nnz = len(store.doc_ids) * ACTIVE / 1e6

    def ours() -> Any:
        (data,) = tally_store(store, [delta], ids)
        return data

    def read() -> None:
        for file in files:
            load_arrays(file)

    def peer() -> np.ndarray:
        count = np.zeros(space.n_features, dtype=np.int64)
        for file in files:
            arrays = load_arrays(file)
            keep = arrays["values"] > delta[arrays["indices"]]
            count += np.bincount(arrays["indices"][keep], minlength=space.n_features)
        return count

    docs = f"{len(store.doc_ids) // 1000}k"
    theirs = nnz / _cold(files, peer)
    limit, speed = nnz / _cold(files, read), nnz / _cold(files, lambda: _kept(ours))
    row(f"coverage.support-{docs}-disk", speed, "plain numpy pass, support alone", theirs, "M codes/s", limit)
    limit, _ = _cpu(read)
    spent, data = _cpu(lambda: _kept(ours))
    theirs, count = _cpu(peer)
    assert np.array_equal(count, data.support), "counts differ from numpy's"
    took = seconds(lambda: compare(anchor, data, relevant))
    name = (
        f"plain numpy pass, support alone; ours also sums, in 64 groups; numbers and intervals take {took:.1f} s more"
    )
    row(f"coverage.support-{docs}-cached", nnz / spent, name, nnz / theirs, "M codes/s CPU", nnz / limit)
    spent, _ = _cpu(lambda: _kept(lambda: store_coverage(sp.csr_matrix(anchor_docs), store, relevant, delta)))
    # Ours leaves out groups; a resample in numpy is a weighted count of all codes, and another of their sum.
    once, _ = _cpu(lambda: [_weighted(file, delta) for file in files[:2]])
    name = "100 resamples of numpy's weighted counts and sums (from one of two shards)"
    once *= 100 * len(files) / len(files[:2])
    row(f"coverage.intervals-{docs}", nnz / spent, name, nnz / once, "M codes/s CPU", nnz / limit)


def _weighted(file: Path, delta: np.ndarray) -> None:
    arrays = load_arrays(file)
    keep = arrays["values"] > delta[arrays["indices"]]
    weights = np.repeat(np.random.default_rng(0).poisson(1.0, len(arrays["indptr"]) - 1), np.diff(arrays["indptr"]))
    for values in (weights * keep, weights * keep * arrays["values"]):
        np.bincount(arrays["indices"], weights=values, minlength=len(delta))


def _cold(files: list[Path], work: Any) -> float:
    """Wall time of a pass over files that the system no longer holds in memory (where it can be told to let go)."""
    for file in files:
        with file.open("rb") as handle:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return seconds(work)


def _kept(work: Any) -> Any:
    found: list[Any] = []
    watched(lambda: found.append(work()))
    return found[0]


def plain_greedy(candidates: Candidates, budget: int, weights: np.ndarray, saturation: Saturation) -> np.ndarray:
    """The method without bounds: all gains anew at each step; documents [picks]."""
    filled = np.zeros(len(candidates.features))
    taken: list[int] = []
    for _ in range(min(budget, len(candidates))):
        gains = candidates.gains(weights * saturation.more(filled))
        gains[taken] = -1.0
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        taken.append(best)
        filled[candidates.row(best)] += 1
    return np.array(taken, dtype=np.int64)


def greedy(store: ActivationStore, budget: int, kinds: tuple[str, ...] = ("cap:1", "cap:16", "sqrt")) -> None:
    """Picks a second out of all documents, the pass that finds their features included."""
    ids, delta = np.arange(store.space.n_features), np.full(store.space.n_features, DELTA, dtype=np.float32)
    part, picks = 20_000, 200
    small = sp.csr_matrix(next(store.doc_blocks(part * ACTIVE * 2))[1][:part])
    few = Candidates.of(small, delta, ids)
    for kind in kinds:
        saturation = Saturation.parse(kind)
        peer, theirs = _peer(few, small, delta, picks, saturation)
        spent, found = _cpu(lambda s=saturation: _kept(lambda: select(few, picks, saturation=s)))
        look = seconds(lambda: few.gains(np.ones(len(ids))))
        speed = len(found.documents) / spent
        row(f"coverage.greedy-{kind}-20k", speed, peer, theirs, "picks/s CPU", len(found.documents) / look)
        spent, found = _cpu(lambda s=saturation: _kept(lambda: _taken(store, delta, ids, budget, s)))
        n = len(found.documents)
        name = f"{peer}, {picks} of {part} documents; ours took {n} of {found.n_candidates}"
        # Every method must read the candidates' features once for each pick or keep bounds; one look is the limit.
        row(f"coverage.greedy-{kind}", n / spent, name, theirs, "picks/s CPU", n * part / look / len(store.doc_ids))


def _taken(store: ActivationStore, delta: np.ndarray, ids: np.ndarray, budget: int, saturation: Saturation) -> Any:
    return select(Candidates.of_store(store, delta, ids), budget, saturation=saturation)


def _peer(
    few: Candidates, docs: sp.csr_matrix, delta: np.ndarray, picks: int, saturation: Saturation
) -> tuple[str, float]:
    try:
        from apricot import FeatureBasedSelection, MaxCoverageSelection  # pyright: ignore[reportMissingImports]
    except ImportError:
        weights = np.ones(len(few.features))
        spent, taken = _cpu(lambda: plain_greedy(few, picks, weights, saturation))
        return "greedy without bounds", len(taken) / spent
    if saturation.kind == "cap":
        made: Any = MaxCoverageSelection(picks, threshold=saturation.value, optimizer="lazy")
    else:
        made = FeatureBasedSelection(picks, concave_func=saturation.kind, optimizer="lazy")
    from transfer.cover.delta import fires

    matrix = sp.csr_matrix(fires(docs, delta), dtype=np.float64)
    made.fit(matrix[:1000])  # its compiler's time is not its method's
    spent, _ = _cpu(lambda: made.fit(matrix))
    return "apricot-select (lazy)", picks / spent


def noise() -> None:
    """The planted task: which of the features that the data lacks are found, from noisier and noisier codes."""
    from tests.benchmarks.coverage_planted import planted_coverage

    for rule in ("scale:0.5", "constant:0"):
        for level in (0.0, 0.1, 0.15, 0.2, 0.25):
            scores = [planted_coverage(noise=level, delta=rule, seed=seed) for seed in range(3)]
            precision = np.nan_to_num([s["precision"] for s in scores])
            recall = mean_interval([s["recall"] for s in scores])
            low, high = max(recall.low, 0.0), min(recall.high, 1.0)
            name = f"the planted set; precision {precision.mean():.2f}, recall of 3 draws {low:.2f} to {high:.2f}"
            row(f"coverage.noise-{rule}-{level:g}", 100 * recall.value, name, 100.0, "% recall", 100.0)


def main(n_docs: int | None = None) -> None:
    """Full size, or ``COVERAGE_DOCS`` documents; 2.4 bytes of disk an activation and mapped features beside."""
    n_docs = n_docs or int(os.environ.get("COVERAGE_DOCS", "1000000"))
    with tempfile.TemporaryDirectory() as name:
        store = synthetic_store(Path(name), n_docs)
        support(store)
        greedy(store, 10_000)
    noise()

"""What documents are measured against, and the order in which candidates add coverage to it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, plain, replacing
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.store import ActivationStore
from transfer.cover.delta import DeltaRule, activated, check_floor, thresholds
from transfer.cover.kl import feature_costs
from transfer.cover.selection import Candidates, Saturation, Selection, select
from transfer.cover.tally import tally, tally_store
from transfer.coverage import alive, live_features

COLUMNS: tuple[str, ...] = ("rank", "id", "gain", "covered", "coverage")
WEIGHTS = ("uniform", "kl")


@dataclass(frozen=True, eq=False)
class Ground:
    """What coverage is measured against: an anchor, its thresholds, and the features that count."""

    space: FeatureSpace
    anchor_docs: sp.csr_matrix
    """Max over tokens, [docs, n_features]."""
    delta: np.ndarray
    rule: DeltaRule
    relevant: FeatureSet
    """Live ones."""

    @property
    def features(self) -> np.ndarray:
        """F(P): relevant features that the anchor activates, int64, sorted."""
        ids = self.relevant.features
        return ids[activated(self.anchor_docs, self.delta)[ids]]


def open_store(folder: Path | str) -> ActivationStore:
    """The store in a folder, or in the folder of a harvest.

    Raises:
        TransferError: When there is none.
    """
    path = Path(folder)
    return ActivationStore.load(path / "store" if (path / "store" / "meta.json").is_file() else path)


def ground_of(
    anchor: ActivationStore, rule: DeltaRule, *, relevant: FeatureSet | None = None, always_on: float = 0.5
) -> Ground:
    """Measure against all documents of a store, which must fit into memory (about 40 bytes an activation).

    Args:
        anchor: The anchor.
        rule: δ.
        relevant: Features that count; all that are live on the anchor by default.
        always_on: Features firing on more than this share of the anchor are left out.

    Raises:
        TransferError: When ``relevant`` is of another space, or δ lies below what the store holds.
    """
    space, docs = anchor.space, anchor.docs
    if relevant is None:
        relevant = FeatureSet(space, np.arange(space.n_features), "all features")
    space.check(relevant.space, "The relevant feature set")
    state = alive(docs, always_on)
    live, _ = live_features(relevant, state, always_on)
    delta = thresholds(docs, rule)
    check_floor(space, delta, ~state.dead)
    return Ground(space, docs, delta, rule, live)


def ground_of_report(report_folder: Path, anchor_docs: sp.csr_matrix) -> Ground:
    """Measure as a finished cover stage did.

    Args:
        report_folder: The stage's folder, with ``seed.json`` and ``delta.safetensors``.
        anchor_docs: The anchor's documents in that space.
    """
    report = CoverageReport.load(report_folder / "seed.json")
    delta = load_arrays(report_folder / "delta.safetensors")["delta"]
    return Ground(report.space, anchor_docs, delta, DeltaRule.parse(report.delta_rule), report.relevant)


def rank(
    candidates: ActivationStore,
    ground: Ground,
    budget: int,
    *,
    data: ActivationStore | sp.csr_matrix | None = None,
    weights: str = "uniform",
    saturation: Saturation | None = None,
    without: Sequence[str] = (),
    eps: float = 1e-3,
) -> tuple[list[dict[str, Any]], Selection]:
    """Order candidate documents by what each adds to the coverage of the data at hand.

    Args:
        candidates: Documents to choose from; a store of any size.
        ground: What coverage is measured against.
        budget: Documents to take at most.
        data: What is there already: documents in memory, or a store; nothing by default.
        weights: ``uniform``: each of the anchor's features is worth the same. ``kl``: what it costs now in the
            divergence by frequency, so that features the anchor has often come first.
        saturation: φ of ``transfer.cover.selection``; ``cap:1`` by default, which is coverage itself.
        without: Ids of candidates not to take.
        eps: Smoothing of the divergence.

    Returns:
        A row for each document taken: ``rank`` from 1, ``id``, ``gain`` in the objective, ``covered`` features of
        the anchor so far and their share ``coverage``; and the selection.

    Raises:
        TransferError: When stores belong to another space, the anchor activates nothing relevant, or a name is unknown.
    """
    ground.space.check(candidates.space, f"The store {candidates.path}")
    if weights not in WEIGHTS:
        raise TransferError(f"Unknown weights {weights!r}.", f"Use {' or '.join(WEIGHTS)}.")
    features = ground.features
    if not len(features):
        raise TransferError("The anchor activates no relevant feature: nothing can be added to it.", "Lower delta.")
    if data is None:
        support = np.zeros(len(features), dtype=np.int64)
    elif isinstance(data, ActivationStore):
        ground.space.check(data.space, f"The store {data.path}")
        support = tally_store(data, [ground.delta], features)[0].support
    else:
        support = tally(data, ground.delta, features).support
    worth = np.ones(len(features))
    if weights == "kl":
        anchor = tally(ground.anchor_docs, ground.delta, features).support
        worth = np.maximum(feature_costs(features, anchor, support, eps).frequency, 0)
    found = select(
        Candidates.of_store(candidates, ground.delta, features),
        budget,
        weights=worth,
        saturation=saturation,
        counts=support,
        without=candidates.rows(list(without)),
    )
    rows = [
        {
            "rank": i + 1,
            "id": candidates.doc_ids[document],
            "gain": float(found.gains[i]),
            "covered": int(found.covered[i]),
            "coverage": float(found.covered[i] / len(features)),
        }
        for i, document in enumerate(found.documents.tolist())
    ]
    return rows, found


def summary(found: Selection) -> dict[str, Any]:
    """What a ranking came to."""
    before = found.covered_before
    after = int(found.covered[-1]) if len(found.covered) else before
    return {
        "taken": len(found.documents),
        "budget": found.budget,
        "candidates": found.n_candidates,
        "exhausted": found.exhausted,
        "anchor_features": found.n_features,
        "covered_before": before,
        "covered_after": after,
        "coverage_before": before / found.n_features,
        "coverage_after": after / found.n_features,
        "share_of_possible": found.objective / found.possible if found.possible else None,
        "saturation": found.saturation,
        "evaluations": found.evaluations,
    }


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a ranking as ``.csv`` or ``.jsonl``, whole or not at all.

    Raises:
        TransferError: For another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise TransferError(f"A ranking cannot be written to {path.name}.", "Name a .csv or .jsonl file.")
    with replacing(path) as part, part.open("w", encoding="utf8", newline="") as file:
        if suffix == ".jsonl":
            file.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

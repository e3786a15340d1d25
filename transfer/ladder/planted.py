"""G0 and G1: planted pairs, where the truth is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from aligners.base import Aligner
from aligners.correlation import usable_features
from aligners.metrics import false_share, is_right
from aligners.planted import Planted, planted_view
from aligners.stress import STRESS, Setting, StressPair, stress_pair
from transfer.alignment.stitch import rotation
from transfer.core.alignment import Alignment
from transfer.core.space import FeatureView
from transfer.core.stats import mean_interval
from transfer.core.store import PairedActivations
from transfer.ladder.row import LEVEL, Finding, Row, judged

Make = Callable[[], Aligner]
OVERLAPS = (0.3, 0.6, 0.9)
NOISES = (0.2, 0.4, 0.6)
CHILDREN = (0.0, 0.5)
CELL = 600
"""Features a side of one cell of G1."""
PRECISION, RECALL, SPLITS = 0.97, 0.99, 0.9
"""What the stress setting must give."""


def identity_pair(n: int, *, missing: float = 0.05, width: tuple[int, int] = (128, 160), seed: int = 0) -> Planted:
    """A space and its copy: features permuted and rescaled, directions rotated into another width, some left out.

    Twenty features are active in a row and every feature fires on 40 rows on average. Memory: 40·n codes of
    12 bytes, several times over while they are made, and n × width float32.

    Args:
        n: Source features.
        missing: Share of them that the target lacks.
        width: Of source and target.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    active, rows = 20, 2 * n
    weight = np.exp(0.5 * rng.normal(size=n))
    column = rng.choice(n, size=rows * active, p=weight / weight.sum()).astype(np.int32)
    value = np.exp(0.5 * rng.normal(size=len(column))).astype(np.float32)
    indptr = np.arange(0, len(column) + 1, active)
    source = sp.csr_matrix((value, column, indptr), shape=(rows, n))
    source.sum_duplicates()
    order = rng.permutation(n)[: n - round(missing * n)]
    scale = rng.uniform(0.2, 5.0, size=len(order)).astype(np.float32)
    target = sp.csr_matrix(source[:, order] @ sp.diags(scale), dtype=np.float32)
    directions = rng.normal(size=(n, width[0])).astype(np.float32)
    turn = rotation(max(width), seed)[: width[0], : width[1]].astype(np.float32)
    truth = np.stack([order, np.arange(len(order))], axis=1)
    return Planted(
        source=planted_view("identity:source", directions),
        target=planted_view("identity:target", (directions[order] @ turn) / scale[:, None]),
        pairs=PairedActivations(source, target, np.arange(rows, dtype=np.int32) // 50),
        truth=truth[np.argsort(truth[:, 0])],
    )


def identity(make: Make, sizes: Sequence[int], seed: int) -> list[Row]:
    """G0 on planted spaces of these sizes."""

    def work(n: int) -> Finding:
        case = identity_pair(n, seed=seed)
        found = make().fit(case.source, case.target, pairs=case.pairs).alignment_
        return same(found, case.truth, case.pairs)

    return [
        judged("G0", f"{n:,} features, rotated", make().name(), "precision = recall = 1", lambda n=n: work(n))
        for n in sizes
    ]


def same(found: Alignment, truth: np.ndarray, pairs: PairedActivations) -> Finding:
    """Accepted matches against a one-to-one truth: every pair of testable features must be found, and nothing else."""
    left, right, _ = usable_features(pairs, found.params.get("min_support", 2))
    testable = np.isin(truth[:, 0], left.ids) & np.isin(truth[:, 1], right.ids)
    truth, untestable = truth[testable], int(np.sum(~testable))
    src, tgt = accepted(found)
    good = is_right(src, tgt, truth)
    precision = float(good.mean()) if len(src) else 0.0
    recall = float(good.sum() / len(truth)) if len(truth) else 0.0
    measured = {"precision": precision, "recall": recall, "true": len(truth), "accepted": len(src)}
    return measured | {"untestable": untestable, "converged": found.converged}, precision == 1 and recall == 1


def accepted(found: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Source and target ids of the matches with a q-value of at most ``LEVEL``; all of them where none has one."""
    q = found.matches["q_value"]
    at = np.flatnonzero((q <= LEVEL) | (np.isnan(q).all() and found.null_corr is None))
    return found.matches["source"][at], found.matches["target"][at]


@dataclasses.dataclass(frozen=True)
class Quality:
    """An alignment against a stress pair's truth."""

    false_discoveries: float
    """Share of wrong ones among the matches accepted."""
    precision: float
    """Of the coupling's edges, 0 when it is empty."""
    recall: float
    """Share of the shared concepts with a right edge."""
    splits: float
    """Share of concepts split on one side of which both edges were kept; NaN when there are none."""
    accepted: int
    wrong: int
    """Of those accepted."""
    converged: bool

    @classmethod
    def of(cls, found: Alignment, case: StressPair) -> Quality:
        """Compare matches and coupling with the truth."""
        edges = found.coupling.tocoo()
        right = is_right(edges.row, edges.col, case.truth)
        n_shared = len(np.unique(case.left.concept[case.truth[:, 0]]))
        kept = set(zip(edges.row.tolist(), edges.col.tolist(), strict=True))
        splits = [all((int(i), int(j)) in kept for i, j in group) for group in case.split_edges()]
        return cls(
            false_share(found, case.truth, LEVEL),
            float(right.mean()) if len(right) else 0.0,
            len(np.unique(case.left.concept[edges.row[right]])) / n_shared,
            float(np.mean(splits)) if splits else float("nan"),
            len(accepted(found)[0]),
            int(np.sum(~is_right(*accepted(found), case.truth))),
            found.converged,
        )


def cell_setting(overlap: float, noise: float, children: float, n: int = CELL) -> Setting:
    """A small stress setting in which this share of the features shows shared concepts."""
    n_shared = max(1, round(overlap * n / (1 + STRESS.split)))
    n_own = n - n_shared - round(STRESS.split * n_shared)
    sizes = {"n_shared": n_shared, "n_own": n_own, "n_concepts": 2 * n, "d_source": 96, "d_target": 128}
    return STRESS.scaled(2 * n / STRESS.n_concepts, **sizes, noise=noise, children=children)


def cell(make: Make, setting: Setting, seeds: Sequence[int]) -> Finding:
    """False discoveries of one cell over several draws, with a t interval over the draws."""
    found = [_quality(make, setting, seed) for seed in seeds]
    fdr = mean_interval([q.false_discoveries for q in found])
    return {
        "fdr": fdr.value,
        "fdr_low": max(fdr.low, 0.0),
        "fdr_high": fdr.high,
        **{name: float(np.mean([getattr(q, name) for q in found])) for name in ("precision", "recall", "splits")},
        "accepted": sum(q.accepted for q in found),
        "wrong": sum(q.wrong for q in found),
        "draws": len(found),
        "not_converged": sum(not q.converged for q in found),
    }, fdr.value <= LEVEL


def planted(make: Make, draws: int, seed: int, stress: float) -> list[Row]:
    """G1: cells of overlap × noise × children, the stress setting at a share of its size, and SAELens' generator."""
    name, seeds = make().name(), range(seed, seed + draws)
    rows = [
        judged(
            "G1",
            f"overlap {overlap:.0%}, noise {noise}, children {children}",
            name,
            f"fdr ≤ {LEVEL}",
            lambda at=(overlap, noise, children): cell(make, cell_setting(*at), seeds),
        )
        for overlap in OVERLAPS
        for noise in NOISES
        for children in CHILDREN
    ]
    setting = STRESS if stress == 1 else STRESS.scaled(stress, d_source=STRESS.d_source, d_target=STRESS.d_target)
    rows.append(
        judged(
            "G1",
            f"stress setting, {setting.n_features:,} features",
            name,
            f"fdr ≤ {LEVEL}, precision ≥ {PRECISION}, recall ≥ {RECALL}, splits ≥ {SPLITS}",
            lambda: stressed(make, setting, seed),
        )
    )
    from transfer.ladder.saelens import synthetic

    rows.append(judged("G1", "SAELens generator and SAE", name, f"fdr ≤ {LEVEL}", lambda: synthetic(make, seeds)))
    return rows


def stressed(make: Make, setting: Setting, seed: int) -> Finding:
    """The stress setting: few wrong ones, nearly all concepts, and splits kept."""
    found = _quality(make, setting, seed)
    good = found.precision >= PRECISION and found.recall >= RECALL and found.splits >= SPLITS
    measured: dict[str, Any] = {"fdr": found.false_discoveries, **dataclasses.asdict(found)}
    measured.pop("false_discoveries")
    return measured, good and found.false_discoveries <= LEVEL


def with_q_values(aligner: Aligner, source: FeatureView, target: FeatureView, pairs: PairedActivations) -> Alignment:
    """Fitted on all documents if the fit itself gives q-values, else on half of them and scored on the others."""
    found = aligner.fit(source, target, pairs=pairs).alignment_
    if "fit_q" in found.matches:
        return found
    first, second = pairs.split(0.5, seed=0)
    return aligner.fit(source, target, pairs=first).score(second)


def _quality(make: Make, setting: Setting, seed: int) -> Quality:
    case = stress_pair(setting, seed=seed)
    return Quality.of(with_q_values(make(), case.source, case.target, case.pairs), case)

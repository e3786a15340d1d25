"""Which features matter for a task, judged from labelled documents without a language model.

The judge asks of every feature whether its activation goes with a facet of the data: a class label, or a topic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.cover.delta import DeltaRule, fires, thresholds
from transfer.coverage import Alive, alive
from transfer.evidence.associations import TESTS, Associations, associate, associate_auroc, associate_information

JUDGE = "statistical-1"


def judge_relevance(
    space: FeatureSpace,
    docs: sp.csr_matrix,
    labels: Sequence[str],
    topics: Sequence[str] = (),
    *,
    delta: np.ndarray | None = None,
    fdr: float = 0.1,
    min_support: int = 3,
    always_on: float = 0.5,
    cells: bool = False,
    n_top: int = 10,
    test: str = "enrichment",
    null: str = "permutation",
    n_null: int = 20,
    seed: int = 0,
) -> FeatureSet:
    """The task-relevant features F: those whose activation goes with a label or a topic.

    All tests of all features and facets share one Benjamini–Hochberg correction. A feature found by a label (or by a
    label within a topic) carries that label; one found by a topic alone carries the majority label of the documents
    that activate it most, ties going to the larger summed activation.

    Args:
        space: Space of the columns.
        docs: Max over tokens of labelled documents, [docs, n_features].
        labels: Class of each document; documents with an empty label belong to no class.
        topics: Topic of each document, or nothing.
        delta: Thresholds [n_features]; each feature's own median by default.
        fdr: Largest q-value of a relevant feature.
        min_support: Fewest documents above the threshold.
        always_on: Features firing on more than this share of the documents are not tested.
        cells: Also test each label within each topic (not with ``information``).
        n_top: Documents that vote on the label of a topic feature.
        test: ``enrichment`` of firing (hypergeometric, exact), ``auroc`` of the activation itself (no threshold), or
            ``information`` that firing gives about the label or topic; see ``transfer.evidence.associations``.
        null: Null of the latter two.
        n_null: Draws of the permutation null.
        seed: Of the draws.

    Returns:
        Features with a label, the strength ``-log10 p`` of their best facet, and that facet as description.

    Raises:
        TransferError: When the lengths differ, or there are neither two labels nor two topics.
    """
    found, state = tested(
        space,
        docs,
        labels,
        topics,
        delta=delta,
        min_support=min_support,
        always_on=always_on,
        cells=cells,
        test=test,
        null=null,
        n_null=n_null,
        seed=seed,
    )
    p, q = found.p_values, found.q_values
    ids = np.flatnonzero(q.min(axis=1, initial=1.0) <= fdr)
    best = p[ids].argmin(axis=1)
    names = [found.facets[b] for b in best]
    has_label = np.array([not name.startswith("topic ") for name in found.facets])
    by_label = np.where(has_label & (q[ids] <= fdr), p[ids], np.inf)
    by_top = majority_labels(docs, ids, list(labels), n_top)
    chosen = [
        label_of(found.facets[row.argmin()]) if np.isfinite(row.min()) else top
        for row, top in zip(by_label, by_top, strict=True)
    ]
    return FeatureSet(
        space=space,
        features=ids,
        why=(
            f"goes with one of {len(found.facets)} facets (labels, topics) on {len(labels)} documents at FDR {fdr:g}; "
            f"{int(found.tested.sum())} features tested, {int(state.dead.sum())} dead, "
            f"{int(state.always_on.sum())} always-on"
        ),
        judge=f"{JUDGE} ({found.method}, Benjamini-Hochberg {fdr:g})",
        labels=tuple(chosen),
        scores=-np.log10(np.maximum(p[ids, best], 1e-300)),
        descriptions=tuple(names),
    )


def tested(
    space: FeatureSpace,
    docs: sp.csr_matrix,
    labels: Sequence[str],
    topics: Sequence[str] = (),
    *,
    delta: np.ndarray | None = None,
    min_support: int = 3,
    always_on: float = 0.5,
    cells: bool = False,
    test: str = "enrichment",
    null: str = "permutation",
    n_null: int = 20,
    seed: int = 0,
) -> tuple[Associations, Alive]:
    """Every feature tested against every label and topic; arguments as in ``judge_relevance``.

    Returns:
        The associations, and which features are alive (see ``coverage.alive``).

    Raises:
        TransferError: As ``judge_relevance``.
    """
    label, topic = np.asarray(labels, dtype=object), np.asarray(topics, dtype=object)
    if docs.shape != (len(label), space.n_features) or (len(topic) and len(topic) != len(label)):
        raise TransferError(
            f"Relevance in {space.id} needs one label and topic a document: documents {docs.shape}, "
            f"{len(label)} labels, {len(topic)} topics."
        )
    if test not in TESTS:
        raise TransferError(f"There is no test {test!r} of relevance.", f"Use one of {', '.join(TESTS)}.")
    facets = _facets(label, topic, cells)
    state = alive(docs, always_on)
    skip = ~state.mask
    if test == "auroc":
        inner = {name: m for name, m in facets.items() if not m.all()}
        found = associate_auroc(docs, inner, min_support=min_support, skip=skip, null=null, n_null=n_null, seed=seed)
        return found, state
    fired = fires(docs, thresholds(docs, DeltaRule()) if delta is None else delta)
    if test == "information":
        variables = {n: v for n, v in (("label", label), ("topic", topic)) if len({x for x in v if x}) > 1}
        found = associate_information(
            fired, variables, min_support=min_support, skip=skip, null=null, n_null=n_null, seed=seed
        )
        return found, state
    return associate(fired, facets, min_support=min_support, skip=skip), state


def _facets(label: np.ndarray, topic: np.ndarray, cells: bool) -> dict[str, np.ndarray]:
    labels = sorted({x for x in label if x})
    topics = sorted({x for x in topic if x})
    facets = {f"label {x}": label == x for x in labels} if len(labels) > 1 else {}
    if len(topics) > 1:
        facets |= {f"topic {x}": topic == x for x in topics}
    if cells and len(labels) > 1 and len(topics) > 1:
        facets |= {f"label {x} in topic {y}": (label == x) & (topic == y) for x in labels for y in topics}
    if not facets:
        raise TransferError(
            "Relevance needs documents of at least two labels or two topics.", "Name label_column or topic_column."
        )
    return {name: members for name, members in facets.items() if members.any()}


def label_of(facet: str) -> str:
    """The label in a facet's name."""
    return facet.removeprefix("label ").partition(" in topic ")[0]


def majority_labels(docs: sp.csr_matrix, ids: np.ndarray, labels: Sequence[str], n_top: int = 10) -> list[str]:
    """The label of most of the documents that activate each feature most.

    Args:
        docs: Max over tokens, [docs, n_features].
        ids: Feature ids.
        labels: Label of each document; empty ones do not vote.
        n_top: Documents that vote; ties go to the label with the larger summed activation.

    Returns:
        One label a feature; empty when no labelled document fires it.
    """
    columns = docs.tocsc()
    starts, rows, values = columns.indptr, columns.indices, np.asarray(columns.data, dtype=np.float64)
    out = []
    for i in ids:
        row, value = rows[starts[i] : starts[i + 1]], values[starts[i] : starts[i + 1]]
        votes: dict[str, tuple[int, float]] = {}
        for j in np.lexsort((row, -value))[:n_top]:
            name = labels[int(row[j])]
            n, total = votes.get(name, (0, 0.0))
            votes[name] = (n + 1, total + float(value[j]))
        votes.pop("", None)
        out.append(max(sorted(votes), key=lambda x: votes[x]) if votes else "")
    return out

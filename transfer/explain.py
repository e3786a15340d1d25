"""What features are about and whether they matter: shown texts, a judge, and a score on texts that nobody was shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from models.detector import ChatReader
from models.judges import UNPARSABLE, Case, Judge, Judged, rank
from models.rubric import Rubric
from transfer.core.config import JudgeSection
from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.files import plain, replacing, write_json
from transfer.core.keys import SCHEMA, digest
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.coverage import alive
from transfer.evidence.detection import ChatDetection, WordDetection, chat_detection, description_terms, word_detection
from transfer.evidence.relevance import majority_labels
from transfer.evidence.spans import Spans
from transfer.text.words import WordCounts

NEAR = 0.7
"""Word-trigram Jaccard from which two texts count as one when examples are shown."""


class Material:
    """The texts of one model's store in two parts: those that explanations may see, and those they are scored on.

    Texts that are equal up to case and white space lie in the same part.

    Args:
        store: Activations.
        corpus: Texts of the store; never the evaluation split.
        fraction: About this share may be seen.
        seed: Of the parts and of everything drawn from them.

    Raises:
        TransferError: When a part is empty.
    """

    def __init__(self, store: ActivationStore, corpus: Corpus, *, fraction: float = 0.6, seed: int = 0) -> None:
        self.store = store
        self.seed = seed
        seen = {t.id for t in corpus if _share(t.text, seed) < fraction}
        self.shown = corpus.where(f"{corpus.name}/shown", lambda t: t.id in seen)
        self.heldout = corpus.where(f"{corpus.name}/held out", lambda t: t.id not in seen)
        if not len(self.shown) or not len(self.heldout):
            raise TransferError(
                f"{len(corpus)} texts are too few to show some and score on others.", "Harvest more texts."
            )

    @cached_property
    def background(self) -> WordCounts:
        """Words and pairs of the shown texts."""
        return WordCounts((t.text for t in self.shown), pairs=True)

    @cached_property
    def spans(self) -> Spans:
        """Examples from the shown texts."""
        return Spans(self.store, self.shown, near=NEAR)

    @cached_property
    def scored(self) -> Spans:
        """Examples from the held-out texts."""
        return Spans(self.store, self.heldout, near=NEAR)

    @cached_property
    def heldout_docs(self) -> sp.csr_matrix:
        """Max over tokens of the held-out texts, in their order."""
        return self.store.docs[self.store.rows([t.id for t in self.heldout])]

    def cases(
        self, features: Sequence[int], settings: JudgeSection, promotes: Mapping[int, Sequence[str]] | None = None
    ) -> tuple[list[Case], list[int]]:
        """What judges see of each feature, from the shown texts; see ``cases_of``."""
        return cases_of(self.spans, features, settings, promotes, seed=self.seed)


def cases_of(
    spans: Spans,
    features: Sequence[int],
    settings: JudgeSection,
    promotes: Mapping[int, Sequence[str]] | None = None,
    *,
    seed: int = 0,
) -> tuple[list[Case], list[int]]:
    """What judges see of each feature, and the features that fire on none of the texts.

    Half of the examples are the strongest, half are drawn from all strata of the feature's activation.
    """
    n_top = (settings.spans + 1) // 2
    top = spans.top(features, n_top)
    more = spans.stratified(features, strata=settings.spans - n_top or 1, per_stratum=2, seed=seed)
    quiet = spans.silent(features, settings.silent, seed=seed) if settings.silent else {}
    cases, silent = [], []
    for feature in features:
        if not top[feature]:
            silent.append(feature)
            continue
        ids = {s.doc_id for s in top[feature]}
        strata = [s for s in more[feature] if s.doc_id not in ids]
        # One of each stratum first, the second ones where a stratum's first is among the top already.
        extra = (strata[::2] + strata[1::2])[: settings.spans - len(ids)]
        shown = sorted([*top[feature], *extra], key=lambda s: -s.value)
        words = tuple((promotes or {}).get(feature, ()))
        cases.append(Case(feature, tuple(shown), tuple(quiet.get(feature, ())), words))
    return cases, silent


def _share(text: str, seed: int) -> float:
    """A number in [0, 1) that hangs on the words of a text alone."""
    return int(digest([seed, " ".join(text.casefold().split())], 8), 16) / 16**8


@dataclass(frozen=True)
class Explained:
    """Features of one space, explained, judged and scored."""

    space: FeatureSpace
    judged: Judged
    cases: tuple[Case, ...]
    words: WordDetection
    chats: tuple[ChatDetection, ...]
    """Detection and fuzzing by a language model, where one judged."""
    silent: tuple[int, ...]
    """Features that fire on no shown text and so were not judged."""
    threshold: str

    def features(self) -> FeatureSet:
        """The judged features at or above the threshold, with descriptions; ``judge`` names all hashes."""
        kept = sorted(self.judged.relevant(self.threshold), key=lambda v: v.feature)
        scores = np.array([v.score for v in kept], dtype=np.float64) if all(v.score is not None for v in kept) else None
        return FeatureSet(
            space=self.space,
            features=np.array([v.feature for v in kept], dtype=np.int64),
            why=(
                f"label and fit {self.threshold} or better for {self.judged.rubric}, of {len(self.judged.verdicts)} "
                f"judged, {len(self.silent)} silent"
            ),
            judge=f"{self.judged.judge} by {self.judged.rubric}",
            labels=tuple(v.label for v in kept),
            scores=scores,
            descriptions=tuple(v.description for v in kept),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able record a feature, in the order judged."""
        own = dict(zip(self.words.features.tolist(), zip(self.words.own, self.words.other, strict=True), strict=True))
        rows = []
        for case, verdict in zip(self.cases, self.judged.verdicts, strict=True):
            row: dict[str, Any] = {
                "space": self.space.id,
                "judge": self.judged.judge,
                "rubric": self.judged.rubric,
                **dataclasses.asdict(verdict),
                "relevant": verdict.relevant(self.threshold),
                "promotes": list(case.promotes),
                "words_auroc": None,
                "spans": [
                    {"doc": s.doc_id, "text": s.marked(), "value": s.value, "quantile": s.quantile} for s in case.spans
                ],
            }
            if case.feature in own:
                mine, theirs = own[case.feature]
                row["words_auroc"] = {**dataclasses.asdict(mine), "control": theirs.value}
            for chat in self.chats:
                row[chat.kind] = {"own": chat.own.get(case.feature), "control": chat.other.get(case.feature)}
            rows.append(row)
        return rows

    def summary(self) -> dict[str, Any]:
        """Counts and means; no text."""
        labels: dict[str, int] = {}
        fits: dict[str, int] = {}
        for v in self.judged.verdicts:
            labels[v.label] = labels.get(v.label, 0) + 1
            fits[v.fit] = fits.get(v.fit, 0) + 1
        return {
            "schema": SCHEMA,
            "model": self.space.model,
            "space": self.space.id,
            "judge": self.judged.judge,
            "rubric": self.judged.rubric,
            "threshold": self.threshold,
            "n_judged": len(self.judged.verdicts),
            "n_silent": len(self.silent),
            "n_relevant": len(self.judged.relevant(self.threshold)),
            "labels": labels,
            "fits": fits,
            "counts": self.judged.counts,
            "words": self.words.summary(),
            **{chat.kind: chat.summary() for chat in self.chats},
        }

    def save(self, path: Path) -> None:
        """``<path>.jsonl`` with one feature a line, then ``<path>.json`` with the summary; each is replaced whole."""
        lines = [json.dumps(plain(row), sort_keys=True, ensure_ascii=False) for row in self.rows()]
        with replacing(path.with_name(path.name + ".jsonl")) as part:
            part.write_text("".join(f"{line}\n" for line in lines), "utf8")
        write_json(path.with_name(path.name + ".json"), self.summary())


def explain(
    material: Material,
    features: Sequence[int],
    judge: Judge,
    rubric: Rubric,
    settings: JudgeSection,
    *,
    promotes: Mapping[int, Sequence[str]] | None = None,
    reader: ChatReader | None = None,
) -> Explained:
    """Explain and judge features on the shown texts, and score every explanation on the held-out ones.

    Args:
        material: Both parts.
        features: Ids.
        judge: Who explains and judges.
        rubric: The task.
        settings: How much is shown and asked.
        promotes: Tokens that each feature's direction makes likelier; see ``models.lens``.
        reader: A language model that also takes detection and fuzzing quizzes.

    Raises:
        TransferError: When none of the features fires on a shown text.
    """
    cases, silent = material.cases(features, settings, promotes)
    if not cases:
        raise TransferError(
            f"None of the {len(features)} features of {material.store.space.id} fires on the {len(material.shown)} "
            "texts that explanations may see."
        )
    judged = judge.judge(cases, rubric)
    weights = {v.feature: dict(v.terms) or description_terms(v.description) for v in judged.verdicts}
    words = word_detection(weights, material.heldout_docs, [t.text for t in material.heldout], seed=material.seed)
    chats = ()
    if reader is not None:
        said = {v.feature: v.description for v in judged.verdicts if v.description}
        chats = tuple(
            chat_detection(reader, kind, said, material.scored, n=settings.quiz, seed=material.seed)
            for kind in ("detection", "fuzzing")
        )
    return Explained(
        space=material.store.space,
        judged=judged,
        cases=tuple(cases),
        words=words,
        chats=chats,
        silent=tuple(silent),
        threshold=settings.threshold,
    )


def judged_relevance(
    store: ActivationStore,
    corpus: Corpus,
    judge: Judge,
    rubric: Rubric,
    settings: JudgeSection,
    *,
    min_support: int = 3,
    always_on: float = 0.5,
    seed: int = 0,
) -> FeatureSet:
    """The task-relevant features F as a judge sees them, in place of ``relevance.judge_relevance`` (as in the paper).

    Every feature that is alive, not always on and fires on enough documents is described, verified and judged: three
    requests a feature, and it is said how many that are before the first.

    Args:
        store: Activations.
        corpus: The anchor's texts.
        judge: Who judges.
        rubric: The task.
        settings: How much is shown, and the least label.
        min_support: Fewest documents.
        always_on: Features firing on more than this share of the documents are not judged.
        seed: Of the examples drawn.

    Returns:
        Relevant features with their descriptions; the label of each is the class of most of the documents that
        activate it most, because that is what texts for it will be labelled with, and ``judge`` holds all hashes.
    """
    docs = store.docs[store.rows([t.id for t in corpus])]
    support = np.bincount(docs.indices[docs.data > 0], minlength=store.space.n_features)
    state = alive(docs, always_on)
    ids = np.flatnonzero((support >= min_support) & state.mask).tolist()
    say(f"judge  {store.space.model}  {len(ids)} features, up to {3 * len(ids)} requests to {judge.name}")
    cases, _ = cases_of(Spans(store, corpus, near=NEAR), ids, settings, seed=seed)
    judged = judge.judge(cases, rubric)
    kept = sorted(judged.relevant(settings.threshold), key=lambda v: v.feature)
    features = np.array([v.feature for v in kept], dtype=np.int64)
    unread = sum(v.label == UNPARSABLE or v.fit == UNPARSABLE for v in judged.verdicts)
    return FeatureSet(
        space=store.space,
        features=features,
        why=(
            f"label and fit {settings.threshold} or better for {rubric.id}; {len(cases)} features judged, {unread} "
            f"unread, {int(state.dead.sum())} dead, {int(state.always_on.sum())} always-on"
        ),
        judge=f"{judged.judge} by {judged.rubric}",
        labels=tuple(majority_labels(docs, features, [t.label for t in corpus])),
        scores=np.array([float(rank(v.label)) for v in kept]),
        descriptions=tuple(v.description for v in kept),
    )

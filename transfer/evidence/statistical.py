"""The judge that needs no language model: relevance from labelled texts, descriptions from words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from models.judges import Case, Judged, Verdict
from models.rubric import Rubric
from transfer.core.errors import TransferError
from transfer.core.space import FeatureSpace
from transfer.evidence.relevance import JUDGE, label_of, tested
from transfer.text.words import WordCounts, describe, terms

LEVELS = ((0.01, "Yes"), (0.1, "Probably"), (0.5, "Maybe"))
"""Largest q-value of each label: at the last, half of what is accepted may be there by chance."""
SHARES = ((0.9, "Yes"), (0.6, "Probably"), (0.4, "Maybe"))
"""Least share of the spans that hold a word which several of them share, for each grade of fit."""
MOST_TERMS = 12


def side_of(rubric: Rubric, labels: Sequence[str], positive: Sequence[str] = ()) -> set[str]:
    """The labels that stand for the rubric's side: its own ones, and ``positive`` where it names none.

    A rubric's own labels stand alone, because with others beside them every rubric would get the same verdicts.

    Raises:
        TransferError: When no document has a label of that side, or all have.
    """
    wanted = set(rubric.positive or positive)
    present = {x for x in labels if x}
    if not present & wanted or not present - wanted:
        raise TransferError(
            f"The rubric {rubric.name} goes by the labels {', '.join(sorted(wanted)) or '(none)'}, and the texts have "
            f"{', '.join(sorted(present)) or 'none'}.",
            "Judge with a language model, or by a rubric of your own whose `positive` names one of these labels.",
        )
    return wanted


class StatisticalJudge:
    """Labels each feature by how surely its activation goes with the rubric's side of labelled documents.

    Args:
        space: Space of the columns.
        docs: Max over tokens of labelled documents, [docs, n_features].
        labels: Class of each document.
        topics: Topic of each document, or nothing.
        background: Words of the texts that descriptions are contrasted with.
        positive: Labels of the task's side for rubrics that name none themselves.
        delta: Thresholds [n_features]; each feature's own median by default.
        min_support: Fewest documents above the threshold.
        test: See ``relevance.judge_relevance``.
        null: Likewise.
        seed: Of the permutation null.
    """

    def __init__(
        self,
        space: FeatureSpace,
        docs: sp.csr_matrix,
        labels: Sequence[str],
        topics: Sequence[str] = (),
        *,
        background: WordCounts,
        positive: Sequence[str] = (),
        delta: np.ndarray | None = None,
        min_support: int = 3,
        test: str = "enrichment",
        null: str = "permutation",
        seed: int = 0,
    ) -> None:
        self.background = background
        self.positive = tuple(positive)
        self.labels = sorted({x for x in labels if x})
        self.found, _ = tested(
            space,
            docs,
            labels,
            topics,
            delta=delta,
            min_support=min_support,
            test=test,
            null=null,
            seed=seed,
        )
        self.name = f"{JUDGE} ({self.found.method}; log-odds words)"

    def judge(self, cases: Sequence[Case], rubric: Rubric) -> Judged:
        """See ``models.judges.Judge``; the label comes from the documents, the fit from the spans.

        Raises:
            TransferError: When no document has a label of the rubric's side, or all have.
        """
        wanted = side_of(rubric, self.labels, self.positive)
        columns = [i for i, f in enumerate(self.found.facets) if not f.startswith("topic ") and label_of(f) in wanted]
        verdicts = tuple(self._verdict(case, columns) for case in cases)
        untested = sum(not self.found.tested[c.feature] for c in cases)
        return Judged(self.name, rubric.id, verdicts, {"judged": len(cases), "untested": untested})

    def _verdict(self, case: Case, columns: list[int]) -> Verdict:
        q, p = self.found.q_values[case.feature, columns], self.found.p_values[case.feature, columns]
        best = int(np.lexsort((p, q))[0])
        facet, effect = self.found.facets[columns[best]], self.found.effect[case.feature, columns[best]]
        label = next((name for level, name in LEVELS if q[best] <= level), "No")
        reason = f"{facet}: q {q[best]:.2g}, effect {effect:.2f}"
        if not self.found.tested[case.feature]:
            label, reason = "No", "fires too rarely or too often on labelled texts to be tested"
        promotes = [w for w in case.promotes][:4]
        weights = self.terms(case)
        return Verdict(
            feature=case.feature,
            description=describe(case.spans, self.background, promotes),
            fit=self._fit(case, weights),
            label=label,
            reason=reason,
            score=float(-np.log10(max(p[best], 1e-300))),
            terms=tuple(weights.items()),
        )

    def terms(self, case: Case) -> dict[str, float]:
        """The words of a description with their weights.

        Contrastive terms have their z-scores; a word that the feature fires on counts as much as the best of them,
        times the share of texts that lack it: what it fires on says more than what stands around.
        """
        scored = dict(self.background.scored([s.text for s in case.spans])[:MOST_TERMS])
        most = max(scored.values(), default=1.0)
        for word in {w for s in case.spans if (w := s.word())}:
            rarity = 1.0 - self.background.counts[word] / max(self.background.n, 1)
            scored[word] = max(scored.get(word, 0.0), most * rarity)
        return dict(sorted(scored.items(), key=lambda x: (-x[1], x[0])))

    @staticmethod
    def _fit(case: Case, weights: dict[str, float]) -> str:
        """How many of the spans hold one of the words that at least two of them share."""
        texts = [terms(s.text, pairs=True) & set(weights) for s in case.spans]
        common = {w for w, n in Counter(w for t in texts for w in t).items() if n > 1}
        share = sum(not t.isdisjoint(common) for t in texts) / max(len(texts), 1)
        return next((name for least, name in SHARES if share >= least), "No")

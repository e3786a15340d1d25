"""Judges of features: one protocol, and the language model that explains, verifies and judges in separate calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from models.chat import ChatModel
from models.prompts import EXPLAIN, GRADES, RELEVANCE, VERIFY, PromptText
from models.replies import ask, concept, grade
from models.rubric import Rubric
from transfer.core.errors import TransferError
from transfer.core.span import Span

UNPARSABLE = "unparsable"
UNCLEAR = "unclear"


@dataclass(frozen=True)
class Case:
    """One feature as judges see it."""

    feature: int
    spans: tuple[Span, ...]
    """Where it fires, strongest first."""
    silent: tuple[Span, ...] = ()
    """Texts in which it does not fire."""
    promotes: tuple[str, ...] = ()
    """Tokens that its direction makes likelier."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one feature."""

    feature: int
    description: str
    """Empty where none could be read."""
    fit: str
    """How well the description covers the spans: one of ``GRADES``, or ``unparsable``."""
    label: str
    """How much the feature matters for the task: one of ``GRADES``, or ``unparsable``."""
    reason: str = ""
    """The judge's words, or its numbers."""
    score: float | None = None
    """Strength, for judges that have one."""
    terms: tuple[tuple[str, float], ...] = ()
    """The description as weighted words, for judges that have them."""

    def relevant(self, threshold: str = "Maybe") -> bool:
        """Whether task label and fit are at least ``threshold``; what could not be read is not."""
        return min(rank(self.label), rank(self.fit)) >= rank(threshold)


def rank(label: str) -> int:
    """0 to 3 for ``No`` to ``Yes``; −1 for what could not be read.

    Raises:
        TransferError: For any other word.
    """
    if label == UNPARSABLE:
        return -1
    if label not in GRADES:
        raise TransferError(f"{label!r} is no grade.", f"Grades are {', '.join(GRADES)}.")
    return GRADES.index(label)


@dataclass(frozen=True)
class Judged:
    """Verdicts of one judge on one set of features."""

    judge: str
    """Name with model, prompts and rubric, all with their hashes."""
    rubric: str
    verdicts: tuple[Verdict, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """What was asked, reminded, refused, cut and could not be read, by kind of request."""

    def relevant(self, threshold: str = "Maybe") -> list[Verdict]:
        """The verdicts at or above the threshold."""
        return [v for v in self.verdicts if v.relevant(threshold)]


class Judge(Protocol):
    """Says of features what they are about and whether they matter for a task."""

    @property
    def name(self) -> str:
        """For lineage."""
        ...

    def judge(self, cases: Sequence[Case], rubric: Rubric) -> Judged:
        """One verdict a case, in order."""
        ...


class ChatJudge:
    """A language model as judge: it describes each feature, checks the description anew, then judges its relevance.

    The three steps are separate requests, so that none sees the others' reasoning. A feature whose description is
    ``unclear`` fits nothing and is not judged further; one without a readable description is unparsable throughout.

    Args:
        model: Who is asked.
        seed: Sent with every request.
        width: Characters shown of a text, around the firing token.
        n_relevance: Spans shown when relevance is judged.
        max_tokens: Longest answer.
    """

    def __init__(
        self, model: ChatModel, *, seed: int = 0, width: int = 300, n_relevance: int = 4, max_tokens: int = 400
    ) -> None:
        self.model = model
        self.seed = seed
        self.width = width
        self.n_relevance = n_relevance
        self.max_tokens = max_tokens
        self.name = f"{model.name} ({', '.join(p.id for p in (EXPLAIN, VERIFY, RELEVANCE))})"

    def judge(self, cases: Sequence[Case], rubric: Rubric) -> Judged:
        """See ``Judge``.

        Raises:
            TransferError: For a case without spans, or when the model cannot go on.
        """
        silent = [c.feature for c in cases if not c.spans]
        if silent:
            raise TransferError(
                f"{len(silent)} features fire on none of the texts, first {silent[0]}.", "Leave them out."
            )
        counts: dict[str, int] = {}
        described = self._explain(cases, counts)
        clear = [i for i, d in enumerate(described) if d and d.casefold() != UNCLEAR]
        fits = dict(zip(clear, self._fits(cases, described, clear, counts), strict=True))
        labels = dict(zip(clear, self._labels(cases, described, clear, rubric, counts), strict=True))
        verdicts = []
        for i, case in enumerate(cases):
            missing = UNPARSABLE if described[i] is None else "No"
            label, reason = labels.get(i, (missing, "no common concept" if described[i] else ""))
            verdicts.append(Verdict(case.feature, described[i] or "", fits.get(i, missing), label, reason))
        return Judged(self.name, rubric.id, tuple(verdicts), counts)

    def _explain(self, cases: Sequence[Case], counts: dict[str, int]) -> list[str | None]:
        chats = [
            EXPLAIN.chat(
                max_tokens=self.max_tokens,
                seed=self.seed,
                spans=self._shown(case.spans),
                silent=self._silent(case),
                promotes=f"It makes these tokens likelier: {', '.join(case.promotes)}.\n\n" if case.promotes else "",
            )
            for case in cases
        ]
        found, _, part = ask(self.model, EXPLAIN, chats, lambda _, text: concept(text, EXPLAIN.line))
        _count(counts, EXPLAIN, part)
        return found

    def _fits(
        self, cases: Sequence[Case], described: list[str | None], clear: list[int], counts: dict[str, int]
    ) -> list[str]:
        chats = [
            VERIFY.chat(
                max_tokens=self.max_tokens,
                seed=self.seed,
                description=described[i] or "",
                spans=self._shown(cases[i].spans, strengths=False),
            )
            for i in clear
        ]
        found, _, part = ask(self.model, VERIFY, chats, lambda _, text: grade(text, VERIFY.line))
        _count(counts, VERIFY, part)
        return [f or UNPARSABLE for f in found]

    def _labels(
        self,
        cases: Sequence[Case],
        described: list[str | None],
        clear: list[int],
        rubric: Rubric,
        counts: dict[str, int],
    ) -> list[tuple[str, str]]:
        chats = [
            RELEVANCE.chat(
                max_tokens=self.max_tokens,
                seed=self.seed,
                rubric=rubric.text(),
                description=described[i] or "",
                spans=self._shown(cases[i].spans[: self.n_relevance], strengths=False),
            )
            for i in clear
        ]
        found, texts, part = ask(self.model, RELEVANCE, chats, lambda _, text: grade(text, RELEVANCE.line))
        _count(counts, RELEVANCE, part)
        return [(f or UNPARSABLE, " ".join(text.split())) for f, text in zip(found, texts, strict=True)]

    def _shown(self, spans: Sequence[Span], *, strengths: bool = True) -> str:
        largest = max((s.value for s in spans), default=1.0) or 1.0
        lines = []
        for i, span in enumerate(spans, 1):
            strength = f" [{span.value / largest:.0%}]" if strengths else ""
            lines.append(f"{i}.{strength} {span.around(self.width)}")
        return "\n".join(lines)

    def _silent(self, case: Case) -> str:
        if not case.silent:
            return ""
        lines = "\n".join(f"- {s.around(self.width)}" for s in case.silent)
        return f"It does not react to any of these:\n\n{lines}\n\n"


def _count(counts: dict[str, int], prompt: PromptText, part: Counter[str]) -> None:
    for name in ("asked", "reminded", "refused", "cut", "unparsable"):
        counts[f"{prompt.name}_{name}"] = counts.get(f"{prompt.name}_{name}", 0) + part[name]


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same features."""

    judges: tuple[str, str]
    n: int
    """Features that both gave a readable label."""
    n_unread: int
    """Features left out because one of them could not be read."""
    kappa: float
    """Cohen's κ of the four labels; NaN where it is undefined (nothing could be read, or one label throughout)."""
    weighted: float
    """κ with quadratic weights: near misses count little."""
    binary: float
    """κ of relevant or not, at the threshold."""
    agree: float
    """Share of equal labels."""
    table: tuple[tuple[int, ...], ...]
    """Counts, rows the first judge's labels from No to Yes, columns the second's."""


def agreement(first: Judged, second: Judged, threshold: str = "Maybe") -> Agreement:
    """Compare the task labels of two judges (Cohen 1960; weights of Cohen 1968).

    Raises:
        TransferError: When they judged by different rubrics, or no feature in common.
    """
    import numpy as np
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    if first.rubric != second.rubric:
        raise TransferError(f"The judges used different rubrics: {first.rubric} and {second.rubric}.")
    theirs = {v.feature: v for v in second.verdicts}
    pairs = [(v, theirs[v.feature]) for v in first.verdicts if v.feature in theirs]
    if not pairs:
        raise TransferError(f"{first.judge} and {second.judge} judged no feature in common.")
    read = [(rank(a.label), rank(b.label)) for a, b in pairs if UNPARSABLE not in (a.label, b.label)]
    one, other = (np.array(x, dtype=np.int64) for x in (zip(*read, strict=True) if read else ((), ())))
    levels = list(range(len(GRADES)))

    def kappa(a: np.ndarray, b: np.ndarray, labels: list[int], weights: str | None = None) -> float:
        if len({*a.tolist(), *b.tolist()}) < 2:
            return float("nan")  # one label throughout: chance agreement is 1, and κ is 0/0
        return float(cohen_kappa_score(a, b, labels=labels, weights=weights))

    least = rank(threshold)
    table = confusion_matrix(one, other, labels=levels) if read else np.zeros((len(levels), len(levels)))
    return Agreement(
        judges=(first.judge, second.judge),
        n=len(read),
        n_unread=len(pairs) - len(read),
        kappa=kappa(one, other, levels),
        weighted=kappa(one, other, levels, "quadratic"),
        binary=kappa((one >= least).astype(int), (other >= least).astype(int), [0, 1]),
        agree=float(np.mean(one == other)) if read else float("nan"),
        table=tuple(tuple(int(x) for x in row) for row in table),
    )

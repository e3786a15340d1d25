"""What the loop of synthesis writes and scores: requests, drafts, and the codes of every text seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import scipy.sparse as sp

from models.generators import Generator, Prompt
from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.formats import Format
from transfer.core.outcomes import Candidate
from transfer.core.space import FeatureSpace
from transfer.synth.verdicts import UNREAD, Written, fault

_ENCODE_CHUNK = 512


class Scorer(Protocol):
    """The part of a model adapter that scores texts."""

    @property
    def space(self) -> FeatureSpace:
        """Space of the columns."""
        ...

    def encode_texts(self, texts: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Max over tokens, float32 CSR [texts, n_features], and where (position + 1)."""
        ...


@dataclass(frozen=True, eq=False)
class Target:
    """A space that a verdict looks at through an alignment."""

    scorer: Scorer
    mapping: Mapping[int, int]
    """Source feature → its match there; features without one are not in it."""
    delta: np.ndarray
    """Thresholds there, [n_features]."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is known of a feature that texts are wanted for."""

    label: str
    description: str = ""
    spans: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """x+ and x− of one feature."""

    positive: str
    negative: str
    strength: float | None
    """Strength that wrote x+; None for an anchor text."""


@dataclass(frozen=True)
class Request:
    """One prompt to be."""

    feature: int
    step: int
    strength: float
    n: int
    examples: tuple[str, ...]
    seed: int
    pair: Pair | None = None
    opening: str = ""
    round: int = 0


@dataclass(frozen=True)
class Draft:
    """One text as it came, before the verdict."""

    request: Request
    attempt: int
    text: str
    prompt_hash: str
    record: dict[str, str] = field(default_factory=dict)
    malformed: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with its form, before anything is compared."""
        wrong = fault(self.text)
        return "malformed" if self.malformed and wrong not in ("empty", "unparsable") else wrong


class Loop:
    """Generation and scoring, with the codes of every text seen.

    Memory: the codes of all distinct texts, 8 bytes a code.

    Args:
        adapter: Scores texts.
        generator: Writes them.
        asked: What is known of each feature.
        delta: Thresholds, [n_features].
        steering: What strength 1 adds for each feature, or None.
        format: Kind of example.

    Raises:
        TransferError: For thresholds of another space, or a generator of another format.
    """

    def __init__(
        self,
        adapter: Scorer,
        generator: Generator,
        asked: dict[int, Asked],
        delta: np.ndarray,
        steering: np.ndarray | None,
        format: Format,
    ) -> None:
        if len(delta) != adapter.space.n_features:
            raise TransferError(f"{len(delta)} thresholds for the {adapter.space.n_features} features of the space.")
        writes = getattr(generator, "format_name", "query")
        if writes != format.name:
            raise TransferError(
                f"{generator.name} writes {writes} examples, {format.name} ones are wanted.",
                "Structured examples need a chat generator of that format.",
            )
        self.adapter, self.generator, self.asked, self.delta = adapter, generator, asked, delta
        self.steering, self.format = steering, format
        self.reads = frozenset(getattr(generator, "reads", ()))
        self._docs: list[sp.csr_matrix] = []
        self._place: dict[str, int] = {}
        self.scores: dict[tuple[int, str], float] = {}
        """g_i(x) by feature and text."""

    def _prompt(self, r: Request) -> Prompt:
        known = self.asked[r.feature]
        extra: dict[str, Any] = {name: getattr(known, name) for name in self.reads - {"feature"}}
        if "feature" in self.reads:
            extra |= {"feature": r.feature, "scale": float(self.delta[r.feature]) or 1.0}
        return Prompt(
            examples=r.examples,
            n=r.n,
            seed=r.seed,
            steer=None if self.steering is None else self.steering[r.feature],
            strength=r.strength,
            contrast=(r.pair.positive, r.pair.negative) if r.pair else None,
            opening=r.opening,
            **extra,
        )

    def write(self, requests: list[Request]) -> list[Draft]:
        """Ask, read the answers in the format wanted, and score them."""
        prompts = [self._prompt(r) for r in requests]
        answers = self.generator.generate(prompts)
        if len(answers) != len(prompts) or any(len(a) != r.n for a, r in zip(answers, requests, strict=False)):
            raise TransferError(f"{self.generator.name} did not answer every prompt with as many texts as asked.")
        tried: Counter[int] = Counter()
        drafts = []
        for request, prompt, texts in zip(requests, prompts, answers, strict=True):
            key = prompt.hash(self.generator.name)
            for text in texts:
                drafts.append(self._draft(request, tried[request.feature], text, key))
                tried[request.feature] += 1
        self._score(drafts)
        return drafts

    def _draft(self, request: Request, attempt: int, text: str, key: str) -> Draft:
        record: dict[str, str] = {}
        malformed = ""
        if self.format.structured and text.strip() and "\ufffd" not in text:
            record, malformed = self.format.parse(text)
            if record:
                text = self.format.text(record)
        return Draft(request, attempt, " ".join(text.split()), key, record, malformed)

    def _score(self, drafts: list[Draft]) -> None:
        fine = [d for d in drafts if d.fault not in UNREAD]
        docs, place = encode(self.adapter, (d.text for d in fine if d.text not in self._place), "score")
        if place:
            offset = len(self._place)
            self._place |= {text: offset + i for text, i in place.items()}
            self._docs.append(docs)
        if fine:
            every = stack(self._docs)
            rows, columns = [self._place[d.text] for d in fine], [d.request.feature for d in fine]
            values = np.asarray(every[rows, columns]).ravel()
            self.scores |= {(d.request.feature, d.text): float(v) for d, v in zip(fine, values, strict=True)}

    def rows(self, texts: list[str]) -> sp.csr_matrix:
        """Codes of texts that were scored."""
        if not texts:
            return sp.csr_matrix((0, self.adapter.space.n_features), dtype=np.float32)
        return stack(self._docs)[[self._place[t] for t in texts]]

    def written(self, drafts: list[Draft], targets: dict[str, dict[int, tuple[float, float]]]) -> list[Written]:
        """The drafts as the verdict sees them.

        Args:
            drafts: Texts.
            targets: Per target space id and draft number, activation and threshold of the matched feature.
        """
        return [
            Written(
                text=d.text,
                feature=d.request.feature,
                score=self.scores.get((d.request.feature, d.text), 0.0),
                delta=float(self.delta[d.request.feature]),
                shown=(*d.request.examples, d.request.pair.positive if d.request.pair else ""),
                malformed=d.malformed,
                targets=tuple(found[i] for found in targets.values() if i in found),
                opening=d.request.opening,
            )
            for i, d in enumerate(drafts)
        ]

    def candidate(self, draft: Draft, verdict: str, targets: dict[str, float]) -> Candidate:
        """The draft with its lineage and its verdict."""
        request, pair = draft.request, draft.request.pair
        lineage: dict[str, Any] = {}
        if pair:
            lineage = dict(positive=pair.positive, negative=pair.negative, fallback=pair.strength is None)
        return Candidate(
            source=self.adapter.space.id,
            generator=self.generator.name,
            feature=request.feature,
            step=request.step,
            attempt=draft.attempt,
            text=draft.text,
            label=self.asked[request.feature].label,
            score=self.scores.get((request.feature, draft.text), 0.0),
            delta=float(self.delta[request.feature]),
            seed=request.seed,
            prompt_hash=draft.prompt_hash,
            verdict=verdict,
            strength=request.strength,
            opening=request.opening,
            round=request.round,
            record=draft.record,
            detail=draft.malformed if verdict == "malformed" else "",
            target_scores=targets,
            **lineage,
        )


def in_targets(drafts: list[Draft], targets: Iterable[Target]) -> dict[str, dict[int, tuple[float, float]]]:
    """Activation and threshold of the matched feature, by target space id and draft number.

    Texts at fault and features without a match are not in it.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for target in targets:
        mine = [(i, d) for i, d in enumerate(drafts) if not d.fault and d.request.feature in target.mapping]
        docs, place = encode(target.scorer, (d.text for _, d in mine), "score in the target")
        matched = {i: target.mapping[d.request.feature] for i, d in mine}
        found[target.scorer.space.id] = {
            i: (float(docs[place[d.text], matched[i]]), float(target.delta[matched[i]])) for i, d in mine
        }
    return found


def encode(scorer: Scorer, texts: Iterable[str], label: str) -> tuple[sp.csr_matrix, dict[str, int]]:
    """Codes of the distinct texts, and the row of each."""
    distinct = list(dict.fromkeys(texts))
    parts = [sp.csr_matrix((0, scorer.space.n_features), dtype=np.float32)]
    with progress(label, len(distinct), "texts") as advance:
        for begin in range(0, len(distinct), _ENCODE_CHUNK):
            part = distinct[begin : begin + _ENCODE_CHUNK]
            docs = scorer.encode_texts(part)[0]
            if docs.shape != (len(part), scorer.space.n_features):
                raise TransferError(f"Scoring {len(part)} texts in {scorer.space.id} gave a {docs.shape} matrix.")
            parts.append(docs)
            advance(len(part))
    return stack(parts), {text: row for row, text in enumerate(distinct)}


def stack(parts: list[sp.csr_matrix]) -> sp.csr_matrix:
    """The parts below each other."""
    return cast(sp.csr_matrix, sp.vstack(parts, format="csr"))

"""The two-step contrastive loop of FAC Synthesis (arXiv 2602.10388, Algorithms 1 and 2), for all features at once.

Step 1 explores: n candidates a feature, spread over steering strengths; the one that activates the feature most
becomes x+, the one that activates it least x−. Step 2 writes m candidates conditioned on that pair. Every text of
either step is judged by the same rules, and every one is kept in the result with its lineage and its verdict.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import scipy.sparse as sp

from models.generators import Generator, Prompt
from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.coverage import missing_hit_rate
from transfer.verdicts import Written, fault, judge

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


def synthesise(
    adapter: Scorer,
    generator: Generator,
    features: FeatureSet,
    examples: Mapping[int, Sequence[str]],
    delta: np.ndarray,
    *,
    missing: FeatureSet,
    anchor_texts: Iterable[str],
    steering: np.ndarray | None = None,
    strengths: Sequence[float] = (0.0, 1.0, 2.0, 4.0),
    n: int | Mapping[int, int] = 4,
    m: int | Mapping[int, int] = 4,
    few_shot: int = 5,
    openings: Mapping[int, Sequence[str]] | None = None,
    pool: str = "missing",
    seed: int = 0,
) -> SynthesisRun:
    """Write texts for features and judge them.

    Generation and scoring run in two big batches, one a step. A feature of which no step-1 text fires takes its
    strongest anchor text as x+, and its step-2 candidates say so (``fallback``).

    Args:
        adapter: Scores texts in the space of ``features``.
        generator: Writes them.
        features: What to write for, each with a label.
        examples: Per feature, anchor texts of its label that activate it, strongest first.
        delta: Thresholds, [n_features].
        missing: The features that the hit rate refers to.
        anchor_texts: Texts (anchor, seed) that a candidate may not repeat.
        steering: What strength 1 adds to the residual stream *of the generator's model*, float32
            [n_features, d_model], such as ``steering_vectors(...)``; None for no steering.
        strengths: Steering strengths, spread over the candidates of step 1. Step 2 stays near the strength that
            wrote x+.
        n: Candidates of step 1 a feature, one number or one for each feature.
        m: Candidates of step 2; 0 for the one-step ablation.
        few_shot: Examples in a prompt.
        openings: Per feature, short anchor spans ending where it fires. Every other candidate starts with one (the
            counterpart, for a base model, of the paper's instruction to keep the activated span).
        pool: How the features were chosen: ``missing`` or ``random``.
        seed: Decides examples and sampling.

    Raises:
        TransferError: When spaces differ, a feature has no label or no example, or there is nothing to do.
    """
    adapter.space.check(features.space, "The feature set to write for")
    adapter.space.check(missing.space, "The missing set")
    ids = [int(i) for i in features.features]
    explore = {i: n if isinstance(n, int) else n[i] for i in ids}
    contrast = {i: m if isinstance(m, int) else m[i] for i in ids}
    if not ids or min(explore.values()) < 1 or not strengths:
        raise TransferError("Synthesis has nothing to write for.", "Give at least one feature, n >= 1 and a strength.")
    if len(features.labels) != len(ids):
        raise TransferError("The features to write for have no labels.", "Judge their relevance first.")
    bare = [i for i in ids if not examples.get(i)]
    if bare:
        raise TransferError(
            f"{len(bare)} features have no example text, first {bare[0]}.", "Take features the anchor activates."
        )
    if not generator.steerable or steering is None:
        strengths, steering = (0.0,), None
    loop = _Loop(adapter, generator, dict(zip(ids, features.labels, strict=True)), delta, steering, seed)

    def asked(feature: int, step: int, strengths: Sequence[float], total: int, pair: _Pair | None) -> list[_Request]:
        spans = (openings or {}).get(feature, ())
        made = []
        for j in range(total):
            rng = np.random.default_rng([seed, feature, step, j])
            shots = _few(examples[feature], few_shot, rng)
            opening = spans[(j // 2) % len(spans)] if spans and j % 2 else ""
            # Pairs of candidates, one free and one opened, share a strength.
            strength = strengths[(j // 2 if spans else j) % len(strengths)]
            made.append(_Request(feature, step, strength, 1, shots, int(rng.integers(2**31)), pair, opening))
        return made

    first = loop.write([r for i in ids for r in asked(i, 1, strengths, explore[i], None)])

    requests = [
        r
        for feature, pair in _pairs(first, loop.scores, ids, examples).items()
        for r in asked(feature, 2, _near(sorted(set(strengths)), pair.strength), contrast[feature], pair)
    ]
    drafts = first + (loop.write(requests) if requests else [])

    verdicts = _judge(drafts, loop.scores, delta, anchor_texts)
    kept_docs = loop.rows([d.text for d, v in zip(drafts, verdicts, strict=True) if v == "kept"])
    n_hit, _ = missing_hit_rate(missing, kept_docs, delta)
    return SynthesisRun(
        source=adapter.space.id,
        generator=generator.name,
        pool=pool,
        n_requested=len(ids),
        candidates=tuple(
            _candidate(d, v, loop, adapter.space.id, delta) for d, v in zip(drafts, verdicts, strict=True)
        ),
        n_missing=len(missing),
        n_hit=n_hit,
    )


def steering_vectors(directions: np.ndarray, size: np.ndarray | float) -> np.ndarray:
    """What strength 1 adds for each feature: its unit decoder direction times a length of the caller's choice.

    Args:
        directions: Decoder rows in residual space, [n_features, d_model].
        size: Length of strength 1, [n_features] or one number: for example each feature's median activation times
            the norm of its row, or the typical norm of the residual stream.

    Returns:
        float32 [n_features, d_model].
    """
    norm = np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions / np.maximum(norm, 1e-12) * np.reshape(size, (-1, 1))).astype(np.float32)


def score_targets(run: SynthesisRun, target: Scorer, mapping: Mapping[int, int]) -> SynthesisRun:
    """Score the kept texts in another model's space.

    Args:
        run: The synthesis.
        target: Adapter of the other model.
        mapping: Source feature to its match in the target; features without one get no score there.

    Returns:
        The same run with ``target_scores[target.space.id]`` filled for kept candidates of matched features.
    """
    rows = [i for i, c in enumerate(run.candidates) if c.verdict == "kept" and c.feature in mapping]
    docs, place = _encode(target, (run.candidates[i].text for i in rows), "score in the target")
    out = list(run.candidates)
    for i in rows:
        c = out[i]
        value = float(docs[place[c.text], mapping[c.feature]])
        out[i] = dataclasses.replace(c, target_scores={**c.target_scores, target.space.id: value})
    return dataclasses.replace(run, candidates=tuple(out))


def select(
    candidates: SynthesisRun | Iterable[Candidate],
    *,
    budget: int | None = None,
    prefer: Callable[[Candidate], float] | None = None,
    per_feature: int | None = None,
) -> list[Candidate]:
    """Choose kept candidates round-robin: every feature gets its best text before any gets a second.

    Args:
        candidates: The synthesis, or some of its candidates.
        budget: Texts wanted; fewer come back when there are not enough. None takes all.
        prefer: Higher is better; by default the score in units of the threshold, which features share.
        per_feature: Most texts of one feature.

    Returns:
        Rank by rank, within a rank the most preferred first; ties by feature, step and attempt.
    """
    prefer = prefer or margin
    by_feature: dict[int, list[tuple[tuple[float, int, int, int], Candidate]]] = {}
    kept = candidates.kept if isinstance(candidates, SynthesisRun) else [c for c in candidates if c.verdict == "kept"]
    for c in kept:
        by_feature.setdefault(c.feature, []).append(((-prefer(c), c.feature, c.step, c.attempt), c))
    ranked = []
    for group in by_feature.values():
        group.sort(key=lambda x: x[0])
        ranked += [(rank, key, c) for rank, (key, c) in enumerate(group[:per_feature])]
    ranked.sort(key=lambda x: x[:2])
    return [c for _, _, c in ranked[:budget]]


def margin(candidate: Candidate) -> float:
    """Score in units of the threshold, which features share."""
    return candidate.score / candidate.delta if candidate.delta > 0 else candidate.score


# --- the loop -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    positive: str
    negative: str
    strength: float | None
    """Strength that wrote x+; None for an anchor text."""


@dataclass(frozen=True)
class _Request:
    feature: int
    step: int
    strength: float
    n: int
    examples: tuple[str, ...]
    seed: int
    pair: _Pair | None = None
    opening: str = ""


@dataclass(frozen=True)
class _Draft:
    request: _Request
    attempt: int
    text: str
    prompt_hash: str

    @property
    def fault(self) -> str:
        return fault(self.text)


class _Loop:
    """Generation and scoring, with the codes of every text seen."""

    def __init__(
        self,
        adapter: Scorer,
        generator: Generator,
        labels: dict[int, str],
        delta: np.ndarray,
        steering: np.ndarray | None,
        seed: int,
    ) -> None:
        if len(delta) != adapter.space.n_features:
            raise TransferError(f"{len(delta)} thresholds for the {adapter.space.n_features} features of the space.")
        self.adapter, self.generator, self.labels, self.steering, self.seed = adapter, generator, labels, steering, seed
        self._docs: list[sp.csr_matrix] = []
        self._place: dict[str, int] = {}
        self.scores: dict[tuple[int, str], float] = {}
        """g_i(x) by feature and text."""

    def write(self, requests: list[_Request]) -> list[_Draft]:
        prompts = [
            Prompt(
                examples=r.examples,
                n=r.n,
                seed=r.seed,
                steer=None if self.steering is None else self.steering[r.feature],
                strength=r.strength,
                contrast=(r.pair.positive, r.pair.negative) if r.pair else None,
                opening=r.opening,
            )
            for r in requests
        ]
        answers = self.generator.generate(prompts)
        if len(answers) != len(prompts) or any(len(a) != r.n for a, r in zip(answers, requests, strict=False)):
            raise TransferError(f"{self.generator.name} did not answer every prompt with as many texts as asked.")
        tried: Counter[int] = Counter()
        drafts = []
        for request, prompt, texts in zip(requests, prompts, answers, strict=True):
            key = prompt.hash(self.generator.name)
            for text in texts:
                drafts.append(_Draft(request, tried[request.feature], " ".join(text.split()), key))
                tried[request.feature] += 1
        self._score(drafts)
        return drafts

    def _score(self, drafts: list[_Draft]) -> None:
        fine = [d for d in drafts if d.fault not in ("empty", "unparsable")]
        docs, place = _encode(self.adapter, (d.text for d in fine if d.text not in self._place), "score")
        if place:
            offset = len(self._place)
            self._place |= {text: offset + i for text, i in place.items()}
            self._docs.append(docs)
        if fine:
            every = _stack(self._docs)
            rows, columns = [self._place[d.text] for d in fine], [d.request.feature for d in fine]
            values = np.asarray(every[rows, columns]).ravel()
            self.scores |= {(d.request.feature, d.text): float(v) for d, v in zip(fine, values, strict=True)}

    def rows(self, texts: list[str]) -> sp.csr_matrix:
        """Codes of texts that were scored."""
        if not texts:
            return sp.csr_matrix((0, self.adapter.space.n_features), dtype=np.float32)
        return _stack(self._docs)[[self._place[t] for t in texts]]


def _encode(scorer: Scorer, texts: Iterable[str], label: str) -> tuple[sp.csr_matrix, dict[str, int]]:
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
    return _stack(parts), {text: row for row, text in enumerate(distinct)}


def _stack(parts: list[sp.csr_matrix]) -> sp.csr_matrix:
    return cast(sp.csr_matrix, sp.vstack(parts, format="csr"))


def _near(strengths: list[float], best: float | None) -> list[float]:
    """The strength that wrote x+ first, then its neighbours; all of them when x+ is an anchor text."""
    if best is None:
        return strengths
    at = strengths.index(best)
    return [best, *strengths[at + 1 : at + 2], *strengths[max(at - 1, 0) : at]]


def _few(texts: Sequence[str], k: int, rng: np.random.Generator) -> tuple[str, ...]:
    """``k`` examples out of the ``2k`` strongest, the strongest of them last."""
    top = [t for t in dict.fromkeys(" ".join(t.split()) for t in texts) if t][: 2 * k]
    chosen = sorted(rng.permutation(len(top))[:k], reverse=True)
    return tuple(top[i] for i in chosen)


def _pairs(
    drafts: list[_Draft],
    scores: dict[tuple[int, str], float],
    ids: list[int],
    examples: Mapping[int, Sequence[str]],
) -> dict[int, _Pair]:
    """x+ and x− of every feature."""
    by_feature: dict[int, list[tuple[float, _Draft]]] = {i: [] for i in ids}
    for d in drafts:
        if not d.fault:
            by_feature[d.request.feature].append((scores[d.request.feature, d.text], d))
    pairs = {}
    for feature, scored in by_feature.items():
        best = max(scored, key=lambda x: x[0], default=None)
        worst = min(scored, key=lambda x: x[0], default=None)
        if best and best[0] > 0:
            positive, strength = best[1].text, best[1].request.strength
        else:
            positive, strength = " ".join(examples[feature][0].split()), None
        negative = worst[1].text if worst and worst[1].text != positive else ""
        pairs[feature] = _Pair(positive, negative, strength)
    return pairs


def _judge(
    drafts: list[_Draft], scores: dict[tuple[int, str], float], delta: np.ndarray, anchor_texts: Iterable[str]
) -> list[str]:
    written = [
        Written(
            text=d.text,
            feature=d.request.feature,
            score=scores.get((d.request.feature, d.text), 0.0),
            delta=float(delta[d.request.feature]),
            shown=(*d.request.examples, d.request.pair.positive if d.request.pair else ""),
        )
        for d in drafts
    ]
    return judge(written, anchor_texts)


def _candidate(draft: _Draft, verdict: str, loop: _Loop, space: str, delta: np.ndarray) -> Candidate:
    request, pair = draft.request, draft.request.pair
    lineage: dict[str, Any] = {}
    if pair:
        lineage = dict(positive=pair.positive, negative=pair.negative, fallback=pair.strength is None)
    return Candidate(
        source=space,
        generator=loop.generator.name,
        feature=request.feature,
        step=request.step,
        attempt=draft.attempt,
        text=draft.text,
        label=loop.labels[request.feature],
        score=loop.scores.get((request.feature, draft.text), 0.0),
        delta=float(delta[request.feature]),
        seed=request.seed,
        prompt_hash=draft.prompt_hash,
        verdict=verdict,
        strength=request.strength,
        opening=request.opening,
        **lineage,
    )

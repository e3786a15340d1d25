"""The two-step contrastive loop of FAC Synthesis (arXiv 2602.10388, Algorithms 1 and 2), for all features at once.

Step 1 explores: n candidates a feature, spread over steering strengths; the one that activates the feature most
becomes x+, the one that activates it least x−. Step 2 writes m candidates conditioned on that pair. Every text of
either step is judged by the same rules, and every one is kept in the result with its lineage and its verdict. A search
of the strength before step 1, and further rounds for features that got nothing, are options; so are thresholds in
other spaces.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.generators import Generator
from transfer.core.errors import TransferError
from transfer.core.formats import get_format
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.space import FeatureSet
from transfer.coverage import missing_hit_rate
from transfer.drafts import Asked, Draft, Loop, Pair, Request, Scorer, Target, encode, in_targets
from transfer.strength import Found, Probe, StrengthSearch, find_strengths
from transfer.verdicts import Require, judge


@dataclass(frozen=True, eq=False)
class Options:
    """What can be switched on beside the plain loop; the defaults switch on nothing."""

    format: str = "query"
    """Kind of example, see ``transfer.core.formats``."""
    search: StrengthSearch | None = None
    """Search the steering strength first; its texts are candidates of step 0."""
    retries: int = 0
    """Further rounds for features of which no text was kept."""
    retry_budget: int | None = None
    """Texts that all further rounds together may take; None for no cap."""
    require: Require = "source"
    """Which thresholds a text must pass."""
    targets: Sequence[Target] = ()
    """Spaces that ``require`` looks at; one of those with a match must fire."""
    protected: Container[str] = ()
    """What says of a text whether it holds evaluation data."""
    duplicates: str = "exact"
    """How near-duplicates are looked for: ``exact`` or ``minhash``."""
    descriptions: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """What features are about, for generators that are asked in words."""
    spans: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Passages with the firing token marked, likewise."""

    def __post_init__(self) -> None:
        if self.retries < 0 or (self.retry_budget is not None and self.retry_budget < 0):
            raise TransferError("Retries and their budget cannot be negative.")
        if self.require != "source" and not self.targets:
            raise TransferError(
                f"The verdict shall require {self.require!r}, but there is no target space.",
                "Require the source alone, or align a target.",
            )


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
    options: Options | None = None,
) -> SynthesisRun:
    """Write texts for features and judge them.

    Generation and scoring run in two big batches, one a step (and as many for every further round, and one for every
    strength that is tried in a search). A feature of which no text so far fires takes its strongest anchor text as
    x+, and its step-2 candidates say so (``fallback``).

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
        strengths: Steering strengths, spread over the candidates of step 1 (with a search, its grid). Step 2 stays
            near the strength that wrote x+.
        n: Candidates of step 1 a feature, one number or one for each feature.
        m: Candidates of step 2; 0 for the one-step ablation.
        few_shot: Examples in a prompt.
        openings: Per feature, short anchor spans ending where it fires. Every other candidate starts with one (the
            counterpart, for a base model, of the paper's instruction to keep the activated span).
        pool: How the features were chosen: ``missing`` or ``random``.
        seed: Decides examples and sampling.
        options: What is switched on beside that; what it did and counted is in the result's ``info``.

    Raises:
        TransferError: When spaces differ, a feature has no label or no example, or there is nothing to do.
    """
    options = options or Options()
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
        if options.search:
            raise TransferError(f"{generator.name} is not steered, so no strength can be searched.", "Switch it off.")
    asked = {
        i: Asked(label, options.descriptions.get(i, ""), tuple(options.spans.get(i, ())))
        for i, label in zip(ids, features.labels, strict=True)
    }
    before_replies = Counter(getattr(generator, "counts", {}))
    loop = Loop(adapter, generator, asked, delta, steering, get_format(options.format))
    spans = openings or {}
    run = _Run(loop, examples, few_shot, {i: spans.get(i, ()) for i in ids}, tuple(strengths), seed)
    if options.search:
        run.search(ids, options.search)
    run.pass_(ids, explore, contrast, 0)

    known = list(anchor_texts)
    targets = options.targets if options.require != "source" else ()

    def verdicts() -> tuple[list[str], dict[str, dict[int, tuple[float, float]]]]:
        found = in_targets(run.drafts, targets)
        judged = judge(
            loop.written(run.drafts, found),
            known,
            require=options.require,
            protected=options.protected,
            duplicates=options.duplicates,
        )
        return judged, found

    judged, found = verdicts()
    rounds: list[dict[str, int]] = []
    left = options.retry_budget
    for again in range(1, options.retries + 1):
        got = {d.request.feature for d, v in zip(run.drafts, judged, strict=True) if v == "kept"}
        barren = [i for i in ids if i not in got]
        if left is not None:
            costs = np.cumsum([explore[i] + contrast[i] for i in barren])
            barren = barren[: int(np.searchsorted(costs, left, side="right"))]
        if not barren:
            break
        before = len(run.drafts)
        run.pass_(barren, explore, contrast, again)
        judged, found = verdicts()
        made = len(run.drafts) - before
        left = None if left is None else left - made
        recovered = {d.request.feature for d, v in zip(run.drafts, judged, strict=True) if v == "kept"} - got
        rounds.append({"n_features": len(barren), "n_candidates": made, "n_recovered": len(recovered)})

    kept_docs = loop.rows([d.text for d, v in zip(run.drafts, judged, strict=True) if v == "kept"])
    n_hit, _ = missing_hit_rate(missing, kept_docs, delta)
    return SynthesisRun(
        source=adapter.space.id,
        generator=generator.name,
        pool=pool,
        n_requested=len(ids),
        candidates=tuple(
            loop.candidate(d, v, {space: scores[i][0] for space, scores in found.items() if i in scores})
            for i, (d, v) in enumerate(zip(run.drafts, judged, strict=True))
        ),
        n_missing=len(missing),
        n_hit=n_hit,
        info=_info(options, run, rounds, ids, targets, Counter(getattr(generator, "counts", {})) - before_replies),
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
    docs, place = encode(target, (run.candidates[i].text for i in rows), "score in the target")
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


class _Run:
    """The drafts of one synthesis, pass by pass."""

    def __init__(
        self,
        loop: Loop,
        examples: Mapping[int, Sequence[str]],
        few_shot: int,
        openings: Mapping[int, Sequence[str]],
        strengths: tuple[float, ...],
        seed: int,
    ) -> None:
        self.loop, self.examples, self.few_shot, self.openings = loop, examples, few_shot, openings
        self.strengths = dict.fromkeys(loop.asked, strengths)
        self.known = sorted(set(strengths))
        """Strengths that step 2 may take, ascending."""
        self.seed = seed
        self.per_request = max(1, int(getattr(loop.generator, "per_request", 1)))
        self.drafts: list[Draft] = []
        self.found: Found | None = None

    def search(self, ids: list[int], settings: StrengthSearch) -> None:
        """Search the strengths; step 1 then stays near the best of each feature."""
        some = settings.tried_on(ids)

        def try_out(strength: float) -> Probe:
            requests = [
                r for i in some for r in self._requests(i, 0, (strength,), settings.texts, None, len(self.drafts))
            ]
            made = self.loop.write(requests)
            self.drafts += made
            fine = [d for d in made if not d.fault]
            levels = settings.log_perplexity([d.text for d in fine]) if fine else np.zeros(0)
            probe = Probe(strength, dict.fromkeys(some, 0), dict.fromkeys(some, 0), {i: [] for i in some})
            for d in made:
                probe.counts[d.request.feature] += 1
            for d, level in zip(fine, levels, strict=True):
                feature = d.request.feature
                probe.hits[feature] += self.loop.scores[feature, d.text] > self.loop.delta[feature]
                if np.isfinite(level):
                    probe.log_perplexity[feature].append(float(level))
            return probe

        self.found = find_strengths(try_out, self.strengths[ids[0]], settings, ids)
        self.known = self.found.steps
        self.strengths = {i: tuple(_near(self.known, s)[:2]) for i, s in self.found.best.items()}

    def pass_(self, ids: list[int], explore: Mapping[int, int], contrast: Mapping[int, int], again: int) -> None:
        """Both steps once; ``again`` is 0 the first time."""
        first = [r for i in ids for r in self._requests(i, 1, self._tried(i, again), explore[i], None, again)]
        self.drafts += self.loop.write(first)
        mine = set(ids)
        pairs = _pairs([d for d in self.drafts if d.request.feature in mine], self.loop.scores, ids, self.examples)
        second = [
            r
            for i, pair in pairs.items()
            for r in self._requests(i, 2, self._around(pair.strength), contrast[i], pair, again)
        ]
        self.drafts += self.loop.write(second) if second else []

    def _tried(self, feature: int, again: int) -> Sequence[float]:
        """Strengths of step 1: in odd retries those between and beyond the usual ones, else the usual ones."""
        usual = self.strengths[feature]
        if again % 2 == 0 or max(usual) == 0:
            return usual
        steps = sorted(set(usual))
        between = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
        # The search has found how strong is too strong.
        return (*between, steps[-1] if self.found else steps[-1] * 1.25)

    def _around(self, best: float | None) -> list[float]:
        if best is None:
            return self.known
        if self.found:
            best = min(best, self.known[-1])
        return _near(sorted({*self.known, best}), best)

    def _requests(
        self, feature: int, step: int, strengths: Sequence[float], total: int, pair: Pair | None, again: int
    ) -> list[Request]:
        spans = self.openings[feature]
        made = []
        for j in range(0, total, self.per_request):
            # The first pass draws as it did before there were others.
            rng = np.random.default_rng([self.seed, feature, step, j, *([again] if again else [])])
            shots = _few(self.examples[feature], self.few_shot, rng)
            at = j // self.per_request
            opening = spans[(at // 2) % len(spans)] if spans and at % 2 else ""
            # Pairs of candidates, one free and one opened, share a strength.
            strength = strengths[(at // 2 if spans else at) % len(strengths)]
            n = min(self.per_request, total - j)
            made.append(
                Request(
                    feature=feature,
                    step=step,
                    strength=strength,
                    n=n,
                    examples=shots,
                    seed=int(rng.integers(2**31)),
                    pair=pair,
                    opening=opening,
                    round=again if step else 0,
                )
            )
        return made


def _info(
    options: Options,
    run: _Run,
    rounds: list[dict[str, int]],
    ids: list[int],
    targets: Sequence[Target],
    replies: Counter[str],
) -> dict[str, Any]:
    """What the options did; nothing where none is on."""
    info: dict[str, Any] = {}
    if options.format != "query":
        info["format"] = options.format
    if run.found:
        info["strength_search"] = run.found.summary()
    if options.retries:
        info["retries"] = rounds
    if options.require != "source":
        matched = {i for t in targets for i in ids if i in t.mapping}
        info["require"] = {
            "rule": options.require,
            "targets": [t.scorer.space.id for t in targets],
            "n_matched": len(matched),
            "n_by_source_alone": len(ids) - len(matched),
        }
    if options.duplicates != "exact":
        info["duplicates"] = options.duplicates
    if replies:
        info["replies"] = dict(sorted(replies.items()))
    return info


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
    drafts: list[Draft],
    scores: dict[tuple[int, str], float],
    ids: list[int],
    examples: Mapping[int, Sequence[str]],
) -> dict[int, Pair]:
    """x+ and x− of every feature."""
    by_feature: dict[int, list[tuple[float, Draft]]] = {i: [] for i in ids}
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
        pairs[feature] = Pair(positive, negative, strength)
    return pairs

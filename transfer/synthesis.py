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
import scipy.sparse as sp

from models.generators import Generator
from transfer.core.errors import TransferError
from transfer.core.formats import get_format
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.space import FeatureSet
from transfer.coverage import missing_hit_rate
from transfer.synth.drafts import Asked, Loop, Scorer, Target, encode, in_targets
from transfer.synth.passes import Passes
from transfer.synth.strength import StrengthSearch
from transfer.synth.verdicts import UNREAD, Require, judge


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
        n: Candidates of step 1 a feature, one number or one for each feature; 0 is enough where a search of the
            strength has written texts to choose x+ and x− from.
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
    # A search writes first texts of its own.
    if not ids or min(explore.values()) < (0 if options.search else 1) or not strengths:
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
    run = Passes(loop, examples, few_shot, {i: spans.get(i, ()) for i in ids}, tuple(strengths), seed)
    if options.search:
        run.search(ids, options.search)
    run.write(ids, explore, contrast, 0)

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
        run.write(barren, explore, contrast, again)
        judged, found = verdicts()
        made = len(run.drafts) - before
        left = None if left is None else left - made
        recovered = {d.request.feature for d, v in zip(run.drafts, judged, strict=True) if v == "kept"} - got
        rounds.append({"n_features": len(barren), "n_candidates": made, "n_recovered": len(recovered)})

    made = SynthesisRun(
        source=adapter.space.id,
        generator=generator.name,
        pool=pool,
        n_requested=len(ids),
        candidates=tuple(
            loop.candidate(d, v, {space: scores[i][0] for space, scores in found.items() if i in scores})
            for i, (d, v) in enumerate(zip(run.drafts, judged, strict=True))
        ),
        n_missing=len(missing),
        n_hit=0,
        info=_info(options, run, rounds, ids, targets, Counter(getattr(generator, "counts", {})) - before_replies),
    )
    return with_hits(made, missing, loop.rows([c.text for c in made.kept]), delta)


def with_hits(run: SynthesisRun, missing: FeatureSet, kept_docs: sp.csr_matrix, delta: np.ndarray) -> SynthesisRun:
    """The run with its hits counted: of all kept texts, of those with an opening, and of those without.

    Args:
        run: The synthesis.
        missing: The features that the hit rate refers to.
        kept_docs: Codes of ``run.kept`` in that order, [texts, n_features].
        delta: Thresholds, [n_features].
    """
    opened = np.array([c.opened for c in run.kept], dtype=bool)

    def hits(chosen: np.ndarray) -> int:
        return missing_hit_rate(missing, kept_docs[np.flatnonzero(chosen)], delta)[0]

    return dataclasses.replace(
        run,
        n_missing=len(missing),
        n_hit=hits(np.ones_like(opened)),
        n_hit_opened=hits(opened),
        n_hit_free=hits(~opened),
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
    """Score the texts in another model's space, kept or not.

    Args:
        run: The synthesis.
        target: Adapter of the other model.
        mapping: Source feature to its match in the target; features without one get no score there.

    Returns:
        The same run with ``target_scores[target.space.id]`` filled for candidates of matched features whose text can
        be read (``UNREAD`` lists the verdicts without).
    """
    rows = [i for i, c in enumerate(run.candidates) if c.verdict not in UNREAD and c.feature in mapping]
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


def _info(
    options: Options,
    run: Passes,
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
    if usage := getattr(run.loop.generator, "used", dict)():
        info["usage"] = usage
    return info

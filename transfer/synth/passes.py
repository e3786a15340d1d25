"""The drafts of one synthesis, pass by pass: the search of the strength, then both steps, then both again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transfer.synth.drafts import Draft, Loop, Pair, Request
from transfer.synth.strength import Found, Probe, StrengthSearch, find_strengths


class Passes:
    """What is asked in which order, and everything that came back.

    Args:
        loop: Writes and scores.
        examples: Per feature, anchor texts that activate it, strongest first.
        few_shot: Examples in a prompt.
        openings: Per feature, spans that every other candidate starts with.
        strengths: Steering strengths of step 1.
        seed: Decides examples and sampling.
    """

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

    def write(self, ids: list[int], explore: Mapping[int, int], contrast: Mapping[int, int], again: int) -> None:
        """Both steps once; ``again`` is 0 the first time."""
        first = [r for i in ids for r in self._requests(i, 1, self._tried(i, again), explore[i], None, again)]
        self.drafts += self.loop.write(first) if first else []
        mine = set(ids)
        pairs = _pairs([d for d in self.drafts if d.request.feature in mine], self.loop.scores, ids, self.examples)
        second = [
            r
            for i, pair in pairs.items()
            for r in self._requests(i, 2, self._around(i, pair.strength), contrast[i], pair, again)
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

    def _around(self, feature: int, best: float | None) -> Sequence[float]:
        """Strengths of step 2: near that of x+; those of step 1 where x+ is an anchor text."""
        if best is None:
            return self.strengths[feature] if self.found else self.known
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

"""Texts that no feature guides: the same writer, the same number of examples shown, the same rules of form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.generators import Generator, Prompt
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.space import FeatureSpace
from transfer.core.texts import Corpus
from transfer.synth.verdicts import Written, judge
from transfer.synthesis import Options

NO_FEATURE = -1
OPENING_WORDS = 8
"""Longest opening, that of ``Span.opening``."""


def write_generic(
    generator: Generator,
    space: FeatureSpace,
    anchor: Corpus,
    n: int,
    *,
    few_shot: int,
    known: Sequence[str],
    options: Options,
    seed: int = 0,
) -> SynthesisRun:
    """Candidates of each label from anchor texts drawn at random, without steering; every other one has an opening.

    What is the same as in a guided arm: writer, sampling, examples in a prompt, openings, and every rule of form,
    repetition and contamination. What is not: which texts are shown, steering, the contrastive second step, and the
    threshold.

    Args:
        generator: Writes.
        space: Of the writer, for lineage.
        anchor: Labelled texts to show.
        n: Candidates of each label.
        few_shot: Examples in a prompt.
        known: Texts that may not be repeated, beside the anchor's.
        options: Of these, what says of contamination and duplicates.
        seed: Of examples and sampling.
    """
    prompts: list[Prompt] = []
    asked: list[str] = []
    reads = frozenset(getattr(generator, "reads", ()))
    for at, label in enumerate(sorted({t.label for t in anchor})):
        texts = list(dict.fromkeys(" ".join(t.text.split()) for t in anchor if t.label == label))
        for j in range(n):
            rng = np.random.default_rng([seed, at, j])
            shown = tuple(texts[i] for i in rng.permutation(len(texts))[:few_shot])
            words = shown[-1].split()
            opening = " ".join(words[: int(rng.integers(1, min(OPENING_WORDS, len(words)) + 1))]) if j % 2 else ""
            extra: dict[str, Any] = {"label": label} if "label" in reads else {}
            prompts.append(Prompt(shown, 1, int(rng.integers(2**31)), opening=opening, **extra))
            asked.append(label)
    texts = [" ".join(answers[0].split()) for answers in generator.generate(prompts)]
    verdicts = judge(
        [Written(text, NO_FEATURE, 1.0, 0.0, prompt.examples) for text, prompt in zip(texts, prompts, strict=True)],
        [*known, *(t.text for t in anchor)],
        protected=options.protected,
        duplicates=options.duplicates,
    )
    candidates = tuple(
        Candidate(
            source=space.id,
            generator=generator.name,
            feature=NO_FEATURE,
            step=1,
            attempt=i,
            text=text,
            label=label,
            score=0.0,
            delta=0.0,
            seed=prompt.seed,
            prompt_hash=prompt.hash(generator.name),
            verdict=verdict,
            opening=prompt.opening,
        )
        for i, (text, label, prompt, verdict) in enumerate(zip(texts, asked, prompts, verdicts, strict=True))
    )
    return SynthesisRun(space.id, generator.name, "generic", 0, candidates, 0, 0)

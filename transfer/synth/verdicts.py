"""Why a generated text is kept or not: its form, what it repeats, and whether it activates its feature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from transfer.core.errors import TransferError
from transfer.core.span import words
from transfer.text.duplicates import DUPLICATES, NEAR, continued, jaccard, shingles

VERDICTS = (
    "kept",
    "empty",
    "unparsable",
    "malformed",
    "too_short",
    "repetitive",
    "contaminated",
    "copy",
    "below_threshold",
    "below_target",
    "duplicate",
)
"""After ``kept``, the reasons of rejection in the order in which they are looked for.

``malformed``: the fields of a structured example do not fit its format. ``contaminated``: it repeats an evaluation
text, or shares a passage with one. ``copy``: it is a near-duplicate of a text seen before, or goes on behind its
opening as such a text does. ``below_target``: the source's feature fires as required, the matched feature of every
target does not.
"""
UNREAD = ("empty", "unparsable", "malformed")
"""Verdicts of texts that no model is given to read, so that they have no score."""
Require = Literal["source", "target", "either", "both"]
"""Where a text must pass the threshold: the feature it was written for, its match in a target space, or a mixture.

A feature without a match in any target space is judged by the source alone: nothing else can be asked of it.
"""
MIN_WORDS = 3
_JOINERS = "\u200c\u200d"
"""Format characters that ordinary text holds: Persian and Indic words, emoji made of several."""


@dataclass(frozen=True)
class Written:
    """A generated text, as far as the verdict needs it."""

    text: str
    feature: int
    score: float
    delta: float
    shown: tuple[str, ...]
    """The examples that its prompt showed."""
    malformed: str = ""
    """What is wrong with the fields of a structured example."""
    targets: tuple[tuple[float, float], ...] = field(default=())
    """(activation, threshold) of the matched feature, for each target space that has one."""
    opening: str = ""
    """Anchor span that it was made to start with."""


def fault(text: str) -> str:
    """What is wrong with the form of a text: one of ``VERDICTS``, or empty when nothing is."""
    found = words(text)
    if not text.strip():
        return "empty"
    if not found or "\ufffd" in text or not all(c.isprintable() or c in _JOINERS for c in text):
        return "unparsable"
    if len(found) < MIN_WORDS:
        return "too_short"
    # Strong steering makes a model stutter: one word fills over a third of the text, or most words are repeats.
    # Where single characters are the words, some repeat in any sentence, but pairs of neighbours do not.
    units = list(zip(found, found[1:], strict=False)) if sum(map(len, found)) < 2 * len(found) else found
    most = Counter(units).most_common(1)[0][1]
    if len(found) >= 6 and (most > max(2, len(units) / 3) or len(set(units)) < 0.5 * len(units)):
        return "repetitive"
    return ""


def passes(written: Written, require: Require = "source") -> str:
    """The threshold that a text fails, ``below_threshold`` or ``below_target``; empty when it passes."""
    source = written.score > written.delta
    if require == "source" or not written.targets:
        return "" if source else "below_threshold"
    target = any(score > delta for score, delta in written.targets)
    if require == "either":
        return "" if source or target else "below_threshold"
    if require == "both" and not source:
        return "below_threshold"
    return "" if target else "below_target"


def judge(
    written: Sequence[Written],
    known_texts: Iterable[str],
    *,
    require: Require = "source",
    protected: Container[str] = (),
    duplicates: str = "exact",
) -> list[str]:
    """The verdict on each text.

    Args:
        written: Texts with their scores.
        known_texts: Texts that may not be repeated.
        require: Which thresholds count.
        protected: Whatever says of a text whether it holds evaluation data, such as ``Contamination``.
        duplicates: How near-duplicates are looked for: ``exact`` or ``minhash``.

    Returns:
        One of ``VERDICTS`` each. Of two near-duplicates that pass everything else, the one that ranks higher among
        the texts of its own feature is kept.

    Raises:
        TransferError: For an unknown requirement or way of looking.
    """
    if require not in get_args(Require):
        raise TransferError(f"Unknown requirement {require!r}.", f"Known: {', '.join(get_args(Require))}.")
    if duplicates not in DUPLICATES:
        raise TransferError(f"Unknown search for duplicates {duplicates!r}.", f"Known: {', '.join(DUPLICATES)}.")
    before = list(known_texts)
    known = DUPLICATES[duplicates](before)
    goes_on = continued([(w.text, w.opening) for w in written], before)
    verdicts = [""] * len(written)
    passing: dict[int, list[tuple[float, int]]] = {}
    for i, w in enumerate(written):
        wrong = fault(w.text)
        if w.malformed and wrong not in ("empty", "unparsable"):
            wrong = "malformed"
        if wrong:
            verdicts[i] = wrong
        elif w.text in protected:
            verdicts[i] = "contaminated"
        elif goes_on[i] or w.text in known or any(jaccard(shingles(w.text), shingles(x)) > NEAR for x in w.shown):
            verdicts[i] = "copy"
        elif below := passes(w, require):
            verdicts[i] = below
        else:
            passing.setdefault(w.feature, []).append((-w.score, i))
    taken = DUPLICATES[duplicates]()
    for _, i in sorted((rank, i) for group in passing.values() for rank, (_, i) in enumerate(sorted(group))):
        verdicts[i] = "duplicate" if written[i].text in taken else "kept"
        if verdicts[i] == "kept":
            taken.add(written[i].text)
    return verdicts

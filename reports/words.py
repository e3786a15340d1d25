"""How names, numbers and texts are written in the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "–"
ARMS: dict[str, tuple[str, str]] = {
    "seed_only": ("seed only", "the seed data alone; the reference"),
    "random": ("random features", "same budget, written for random features"),
    "shuffled": ("shuffled alignment", "same budget, features mapped by a shuffled alignment"),
    "generic": ("no features", "same budget, written from random examples, no feature guiding"),
    "own": ("own features", "written for the missing features of the target itself"),
    "mapped": ("mapped features", "written for missing features of the source, mapped by the alignment"),
    "text": ("features as text", "written for the source's own missing features, without an alignment"),
    "k_center": ("k-center", "same budget of real texts, far from all that is there"),
    "facility_location": ("facility location", "same budget of real texts that stand for the others"),
    "coverage_selection": ("chosen by coverage", "same budget of real texts that activate most missing features"),
    "full": ("full data", "the whole real training split; the ceiling"),
}
"""Arm → what it is called, and what it is; in the order shown."""
CONTROL_ARMS = frozenset({"seed_only", "random", "shuffled", "generic"})


def number(value: Any, *, signed: bool = False) -> str:
    """A number as the report writes it: at most three decimals, thousands separated, a dash for null."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    size = abs(value)
    if isinstance(value, int):
        text = f"{size:,}"
    elif 0 < size < 0.001:
        mantissa, _, power = f"{size:.1e}".partition("e")
        text = f"{mantissa}e\u2212{abs(int(power))}"
    else:
        text = f"{size:,.0f}" if size >= 1000 else f"{size:.3f}"
    sign = "\u2212" if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def spread(values: Iterable[float | int | None]) -> str:
    """The smallest and the largest of the values, or a dash."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return ABSENT
    low, high = number(known[0]), number(known[-1])
    return low if low == high else f"{low} to {high}"


def span_of_numbers(low: Any, high: Any, *, signed: bool = False) -> str:
    """An interval in brackets, or nothing where neither end is known."""
    if low is None and high is None:
        return ""
    return f"[{number(low, signed=signed)}, {number(high, signed=signed)}]"


def arm_name(arm: str) -> str:
    """What an arm is called."""
    return ARMS[arm][0] if arm in ARMS else arm.replace("_", " ")


def arm_rank(arm: str) -> tuple[int, str]:
    """Sort key of an arm: the order of ``ARMS``, then the alphabet."""
    return (list(ARMS).index(arm) if arm in ARMS else len(ARMS), arm)


def metric_name(metric: Any) -> str:
    """``auprc@unseen`` as ``AUPRC@unseen``; names that are no short word stay."""
    name, at, where = str(metric).partition("@")
    return (name.upper() if name.isalpha() and len(name) <= 5 else name) + at + where


class Names:
    """Short names of models: ``zoo:llama`` and ``hub:org/Qwen2-7B@rev`` become ``llama`` and ``Qwen2-7B``.

    Two references that would get the same short name keep their full ones.
    """

    def __init__(self, references: Iterable[Any]) -> None:
        by_short: dict[str, set[str]] = {}
        for reference in references:
            by_short.setdefault(self._shorten(str(reference)), set()).add(self._core(str(reference)))
        self._clashing = {short for short, cores in by_short.items() if len(cores) > 1}

    @staticmethod
    def _core(reference: str) -> str:
        # A space id is `<model>@<hash>` with / written as --; its model is the same one as in `zoo:<model>`.
        return re.sub(r"^(zoo|hub|path):", "", reference).replace("--", "/").split("@")[0]

    @classmethod
    def _shorten(cls, reference: str) -> str:
        return cls._core(reference).rstrip("/").rsplit("/", 1)[-1] or reference

    def __call__(self, reference: Any) -> str:
        """The short name; empty for null."""
        if reference is None or reference == "":
            return ""
        short = self._shorten(str(reference))
        return str(reference) if short in self._clashing else short


@dataclass(frozen=True)
class Excerpt:
    """A text around its firing token."""

    before: str
    token: str
    """Empty when the position is not known."""
    after: str
    cut: bool
    """Whether words were left out on either side."""


def excerpt(text: str, start: Any, end: Any, room: int = 220) -> Excerpt:
    """The text with the firing token apart, cut to ``room`` characters on each side.

    Args:
        text: The whole text.
        start: First character of the token (0-based); anything that is no valid position leaves the token empty.
        end: One past its last character.
        room: Characters kept on each side.
    """
    known = isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)
    if not known:
        short = text[: 2 * room]
        return Excerpt(short + ("…" if len(text) > len(short) else ""), "", "", len(text) > len(short))
    before, token, after = text[:start], text[start:end], text[end:]
    cut = len(before) > room or len(after) > room
    return Excerpt(
        ("…" + before[-room:]) if len(before) > room else before,
        token,
        (after[:room] + "…") if len(after) > room else after,
        cut,
    )


def folded(row: Mapping[str, Any]) -> bool:
    """Whether a text is shown only when the reader asks; a run that does not say so folds all that has a label."""
    return bool(row["label"] if row["fold"] is None else row["fold"])

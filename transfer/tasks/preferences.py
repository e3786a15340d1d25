"""Preference pairs: one conversation, a better and a worse answer; from the layouts that they are published in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.tasks.base import Examples
from transfer.tasks.rows import identity, name_of, read_rows

Turn = tuple[str, str]
"""(role, words)."""

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant", "human": "user", "gpt": "assistant"}


class Pair(NamedTuple):
    """One preference."""

    id: str
    prompt: tuple[Turn, ...]
    """The conversation up to the answer."""
    chosen: str
    rejected: str
    section: str = ""
    subset: str = ""

    @property
    def key(self) -> str:
        """Hash of the conversation and its two answers, whichever was chosen: equal for one comparison."""
        return digest([self.prompt, sorted((self.chosen, self.rejected))])


# RewardBench (Lambert et al. 2024), split `filtered`: sections, and the weight of each subset within its section.
_SUBSETS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    # 447 pairs of mathematics weigh as much as the 984 of code.
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
REWARD_BENCH: dict[str, tuple[str, int]] = {
    subset: (section, count) for section, subsets in _SUBSETS.items() for subset, count in subsets.items()
}
"""Subset → its section and its weight there."""


def load_pairs(path: Path | str) -> Examples[Pair]:
    """Preference pairs of a ``.jsonl``, ``.jsonl.xz`` or ``.json`` file; the layout is seen from the first row.

    Layouts: ``prompt`` (words or messages) with ``chosen`` and ``rejected`` (words or messages), as TRL and RewardBench
    have them; ``chosen`` and ``rejected`` as whole conversations, in messages or in HH-RLHF's Human/Assistant
    transcripts; ``input``, ``output_1``, ``output_2`` and ``label`` (1 or 2), as in LLMBar; ``instruction``, ``input``,
    ``response1``, ``response2`` and ``annotator*`` (votes 0, 1, 2), as in PandaLM. Columns ``section`` and ``subset``
    are kept; RewardBench's subsets know their sections.

    Returns:
        The pairs in the order of the file. Left out and counted are pairs that are no comparison: another conversation
        behind each answer, equal or empty answers, a tie of the votes, and conversations in which one speaks twice in a
        row, which some families' templates refuse.

    Raises:
        TransferError: For a missing or broken file, unknown columns, or no pair at all.
    """
    rows: list[Pair] = []
    left_out: Counter[str] = Counter()
    read: Callable[[dict[str, Any]], _Found] | None = None
    for where, row in read_rows(path):
        read = read or _layout(where, row)
        try:
            found = read(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TransferError(
                f"{where} is not laid out like the first row ({type(error).__name__}: {error})."
            ) from None
        pair = found if isinstance(found, str) else _checked(*found)
        if isinstance(pair, str):
            left_out[pair] += 1
            continue
        subset = str(row.get("subset") or "")
        section = str(row.get("section") or REWARD_BENCH.get(subset, (subset, 0))[0])
        rows.append(Pair(identity(row, *pair), *pair, section, subset))
    if not rows:
        raise TransferError(f"{path} holds no preference pair (left out: {dict(left_out) or 'nothing'}).")
    return Examples(name_of(path), tuple(rows), dict(sorted(left_out.items())))


_Found = tuple[tuple[Turn, ...], str, str] | str
"""Conversation, better and worse answer; or why there is no pair."""


def _checked(prompt: tuple[Turn, ...], chosen: str, rejected: str) -> _Found:
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    if chosen == rejected:
        return "equal answers"
    roles = [*(role for role, _ in prompt), "assistant"]
    if any(a == b for a, b in pairwise(roles)):
        return "one speaks twice in a row"
    return prompt, chosen, rejected


def _layout(where: str, row: dict[str, Any]) -> Callable[[dict[str, Any]], _Found]:
    names = set(row)
    if {"prompt", "chosen", "rejected"} <= names:
        return _prompted
    if {"chosen", "rejected"} <= names:
        return _whole
    if {"input", "output_1", "output_2", "label"} <= names:
        return _labelled
    if {"instruction", "response1", "response2"} <= names and any(n.startswith("annotator") for n in names):
        return _voted
    raise TransferError(
        f"{where} is no preference pair: its columns are {', '.join(sorted(names))}.",
        "Name them prompt, chosen and rejected.",
    )


def _turns(value: Any) -> tuple[Turn, ...]:
    """A conversation from words, messages (role/content or from/value), or a Human/Assistant transcript."""
    if isinstance(value, str):
        lead, *parts = _SPEAKER.split(value)
        if not parts:
            return (("user", value),)
        told = [("user", lead)] if lead.strip() else []
        return (*told, *((_ROLES[who], words.strip()) for who, words in zip(parts[::2], parts[1::2], strict=True)))
    said = [
        (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])  # OpenAI's, or ShareGPT's
        for turn in value
    ]
    return tuple((str(_ROLES.get(role, role)), str(words)) for role, words in said)


def _last(value: Any) -> str:
    return value if isinstance(value, str) else _turns(value)[-1][1]


def _prompted(row: dict[str, Any]) -> _Found:
    return _turns(row["prompt"]), _last(row["chosen"]), _last(row["rejected"])


def _whole(row: dict[str, Any]) -> _Found:
    better, worse = _turns(row["chosen"]), _turns(row["rejected"])
    if better[-1][0] != "assistant" or worse[-1][0] != "assistant":
        return "does not end with an answer"
    if better[:-1] != worse[:-1]:
        return "another conversation behind each answer"
    return better[:-1], better[-1][1], worse[-1][1]


def _labelled(row: dict[str, Any]) -> _Found:
    answers = [str(row["output_1"]), str(row["output_2"])]
    label = int(row["label"])
    if label not in (1, 2):
        return "tie"
    return (("user", str(row["input"])),), answers[label - 1], answers[2 - label]


def _voted(row: dict[str, Any]) -> _Found:
    votes = Counter(int(value) for name, value in row.items() if name.startswith("annotator"))
    (best, n), *others = votes.most_common()
    if best == 0 or (others and others[0][1] == n):
        return "tie"
    asked = "\n\n".join(p for p in (str(row["instruction"]), str(row.get("input") or "")) if p)
    answers = [str(row["response1"]), str(row["response2"])]
    return (("user", asked),), answers[best - 1], answers[2 - best]

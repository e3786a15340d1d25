"""The kinds of training example that synthesis can write: their fields, what is wrong with one, what the SAE reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfer.core.errors import TransferError
from transfer.core.span import words

_MARK = re.compile(r"^\(?([AB])\)?$")
_CHOICES = re.compile(r"\(A\)\s*\S.*\(B\)\s*\S", re.DOTALL)
MIN_ANSWER_WORDS = 3
"""Fewest words of an answer in a preference pair or an instruction–response example."""
Record = dict[str, str]


@dataclass(frozen=True, eq=False)
class Format:
    """One kind of training example."""

    name: str
    fields: Mapping[str, str]
    """Field → what it holds, in the words a generator is asked with."""
    scored: tuple[str, ...]
    """Fields that make the text whose activation is measured, joined by an empty line."""
    check: Callable[[Record], str]
    """What is wrong with a record whose fields are all there; empty when nothing is."""

    @property
    def structured(self) -> bool:
        """Whether an example has more than one field."""
        return len(self.fields) > 1

    def text(self, record: Record) -> str:
        """What the SAE reads of a record."""
        return "\n\n".join(record[name] for name in self.scored)

    def parse(self, value: Any) -> tuple[Record, str]:
        """Read one example strictly.

        Args:
            value: A JSON object, or its text.

        Returns:
            The record with outer white space cut, and what is wrong with it: empty when it may be used. A value that
            cannot be read at all gives an empty record.
        """
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return {}, "is not JSON"
        if not isinstance(value, dict):
            return {}, "is not a JSON object"
        missing = [name for name in self.fields if name not in value]
        if missing:
            return {}, f"has no {missing[0]}"
        extra = [name for name in value if name not in self.fields]
        if extra:
            return {}, f"has an unknown field {extra[0]!r}"
        if not all(isinstance(value[name], str) for name in self.fields):
            return {}, "has a field that is not text"
        record = {name: value[name].strip() for name in self.fields}
        empty = [name for name, said in record.items() if not said]
        if empty:
            return record, f"has an empty {empty[0]}"
        return record, self.check(record)


def _same(a: str, b: str) -> bool:
    return words(a) == words(b)


def _short(record: Record, *names: str) -> str:
    short = [n for n in names if len(words(record[n])) < MIN_ANSWER_WORDS]
    return f"has a {short[0]} of fewer than {MIN_ANSWER_WORDS} words" if short else ""


def _preference(record: Record) -> str:
    if _same(record["chosen"], record["rejected"]):
        return "has the same answer as chosen and as rejected"
    for name in ("chosen", "rejected"):
        # A pair compares two answers to one prompt: a prompt repeated inside an answer hides which was asked.
        # The prompt "p" is not repeated by "pandas".
        prompt, rest = record["prompt"], record[name].removeprefix(record["prompt"])
        if rest != record[name] and not (prompt[-1:].isalnum() and rest[:1].isalnum()):
            return f"repeats the prompt in {name}"
    return _short(record, "chosen", "rejected")


def _choice(record: Record) -> str:
    marks = [_MARK.match(record[name]) for name in ("matching", "not_matching")]
    if not all(marks):
        return "does not answer with (A) or (B)"
    if marks[0] and marks[1] and marks[0][1] == marks[1][1]:
        return "names one choice as matching and as not matching"
    if not _CHOICES.search(record["question"]):
        return "does not list the choices (A) and (B) in this order"
    return ""


def _answered(record: Record) -> str:
    if _same(record["instruction"], record["response"]):
        return "answers with the instruction itself"
    return _short(record, "response")


QUERY = Format("query", {"text": "what one user writes, as a single message"}, ("text",), lambda _: "")
PREFERENCE = Format(
    "preference",
    {
        "prompt": "what the user asks",
        "chosen": "a good answer to it",
        "rejected": "an answer to the same prompt that looks acceptable but is worse in a way a careful reader notices",
    },
    ("prompt", "chosen"),
    _preference,
)
AB = Format(
    "ab",
    {
        "question": "a situation and a question, followed by the two choices on lines of their own, marked (A) and (B)",
        "matching": "(A) or (B): the choice of somebody who shows the behaviour",
        "not_matching": "the other choice",
    },
    ("question",),
    _choice,
)
INSTRUCTION = Format(
    "instruction",
    {"instruction": "what the user wants done, with everything needed to do it", "response": "the finished work"},
    ("instruction", "response"),
    _answered,
)
FORMATS = {f.name: f for f in (QUERY, PREFERENCE, AB, INSTRUCTION)}


def get_format(name: str) -> Format:
    """The format of this name.

    Raises:
        TransferError: When there is none.
    """
    if name not in FORMATS:
        raise TransferError(f"There is no format {name!r}.", f"Known: {', '.join(FORMATS)}.")
    return FORMATS[name]

"""Reading answers strictly: the asked line or nothing; one reminder, and what still cannot be read is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from models.chat import Chat, ChatModel
from models.prompts import GRADES, PromptText

T = TypeVar("T")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKS = " \t*_`\"'“”"
"""Emphasis and quotes around what is said."""
_AROUND = _MARKS + "[]().:;"


def asked_line(text: str, name: str) -> str | None:
    """What stands behind ``name:`` in the last line that begins so, without marks around it; None without one.

    Thoughts of reasoning models are left out first.
    """
    found = None
    for line in _THOUGHT.sub("", text).splitlines():
        head, colon, rest = line.partition(":")
        if colon and head.strip(_AROUND + "#->").casefold() == name.casefold():
            found = rest.strip(_MARKS)
    return found


def grade(text: str, name: str) -> str | None:
    """One of ``GRADES`` from the asked line, and nothing but it."""
    line = asked_line(text, name)
    return next((g for g in GRADES if line is not None and line.strip(_AROUND).casefold() == g.casefold()), None)


def concept(text: str, name: str) -> str | None:
    """The asked line as a description of at most sixty words; None when it is empty or longer."""
    line = (asked_line(text, name) or "").rstrip(".")
    if not line or line.startswith("<"):
        return None
    return " ".join(line.split()) if len(line.split()) <= 60 else None


def numbers(text: str, name: str, n: int) -> frozenset[int] | None:
    """Numbers from 1 to ``n`` in the asked line; None when something else stands there."""
    line = (asked_line(text, name) or "").strip(_AROUND)
    if not line:
        return None
    if line.casefold() == "none":
        return frozenset()
    parts = [p for p in re.split(r"[,;\s]+|\band\b", line) if p]
    if not parts or not all(p.isdecimal() and 1 <= int(p) <= n for p in parts):
        return None
    return frozenset(int(p) for p in parts)


def ask(
    model: ChatModel, prompt: PromptText, chats: list[Chat], read: Callable[[int, str], T | None]
) -> tuple[list[T | None], list[str], Counter[str]]:
    """Ask all chats; those whose answer cannot be read are reminded once.

    Args:
        model: Who is asked.
        prompt: What the chats were made from.
        chats: Requests.
        read: Given the chat's number and the answer, its content; None when it cannot be read.

    Returns:
        Contents (None where neither answer could be read), last raw answers, and counts: ``asked``, ``reminded``,
        ``refused``, ``cut``, ``unparsable`` (also those refused).
    """
    counts: Counter[str] = Counter()
    answers = model.complete(chats)
    contents = [read(i, a.text) for i, a in enumerate(answers)]
    texts = [a.text for a in answers]
    counts["asked"] += len(chats)
    counts["refused"] += sum(a.finish == "refused" for a in answers)
    counts["cut"] += sum(a.finish == "length" for a in answers)
    again = [i for i, c in enumerate(contents) if c is None and answers[i].finish != "refused"]
    if again:
        counts["reminded"] += len(again)
        second = model.complete([prompt.again(chats[i], texts[i]) for i in again])
        for i, answer in zip(again, second, strict=True):
            contents[i] = read(i, answer.text)
            texts[i] = f"{texts[i]}\n{answer.text}"
            counts["refused"] += answer.finish == "refused"
            counts["cut"] += answer.finish == "length"
    counts["unparsable"] += sum(c is None for c in contents)
    return contents, texts, counts

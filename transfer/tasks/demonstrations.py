"""Demonstrations: a conversation and the answer to learn; from the layouts that instruction data come in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.tasks.base import Examples
from transfer.tasks.rows import identity, name_of, read_rows

_ROLES = {"human": "user", "gpt": "assistant"}


class Demonstration(NamedTuple):
    """One conversation with its answer."""

    id: str
    prompt: tuple[tuple[str, str], ...]
    """(role, words) up to the answer."""
    answer: str

    @property
    def key(self) -> str:
        """Hash of the conversation: equal where the same is asked."""
        return digest([[role, words.strip()] for role, words in self.prompt])


def load_demonstrations(path: Path | str) -> Examples[Demonstration]:
    """Demonstrations of a ``.json``, ``.jsonl`` or ``.jsonl.xz`` file.

    Layouts: ``prompt`` and ``completion`` (words or messages); ``messages`` or ``conversations``, whose last answer is
    learnt; ``instruction``, ``input`` and ``output``, as Alpaca and Dolly have them.

    Returns:
        The demonstrations. Left out and counted are those without an answer or a question, and repeated ones.

    Raises:
        TransferError: For a missing or broken file, unknown columns, or no demonstration at all.
    """
    rows: list[Demonstration] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for where, row in read_rows(path):
        try:
            prompt, answer = _read(where, row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TransferError(f"{where} cannot be read ({type(error).__name__}: {error}).") from None
        made = Demonstration(identity(row, prompt, answer), prompt, answer)
        unique = digest([made.key, answer])
        if not answer.strip():
            left_out["empty answer"] += 1
        elif not any(words.strip() for _, words in prompt):
            left_out["empty question"] += 1
        elif unique in seen:
            left_out["repeated"] += 1
        else:
            seen.add(unique)
            rows.append(made)
    if not rows:
        raise TransferError(f"{path} holds no demonstration (left out: {dict(left_out) or 'nothing'}).")
    return Examples(name_of(path), tuple(rows), dict(sorted(left_out.items())))


def _read(where: str, row: dict[str, Any]) -> tuple[tuple[tuple[str, str], ...], str]:
    if {"prompt", "completion"} <= set(row):
        answer = row["completion"]
        return _turns(row["prompt"]), answer if isinstance(answer, str) else _turns(answer)[-1][1]
    if {"instruction", "output"} <= set(row):
        asked = "\n\n".join(p for p in (str(row["instruction"]), str(row.get("input") or "")) if p.strip())
        return (("user", asked),), str(row["output"])
    for name in ("messages", "conversations"):
        if name in row:
            *prompt, (role, answer) = _turns(row[name])
            return tuple(prompt), answer if role == "assistant" else ""
    raise TransferError(
        f"{where} is no demonstration: its columns are {', '.join(sorted(row))}.", "Name them prompt and completion."
    )


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str):
        return (("user", value),)
    said = [
        (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])  # OpenAI's, or ShareGPT's
        for turn in value
    ]
    return tuple((str(_ROLES.get(role, role)), str(words)) for role, words in said)

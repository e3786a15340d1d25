"""Questions with lettered answers, asked in both orders: behaviours (CAA) and knowledge (MMLU and its kin)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.tasks.base import Examples
from transfer.tasks.rows import identity, name_of, read_rows

_OPTION = re.compile(r"(?:^|\n)[ \t]*\(([A-Z])\)[ \t]*")
_LETTER = re.compile(r"\(?([A-Z])\)?")


class Choice(NamedTuple):
    """One question with its answers in the text; two of them are compared."""

    id: str
    question: str
    """The question with its lettered answers."""
    matching: str
    """Letter of the answer that shows the behaviour, or is right."""
    other: str
    """Letter of the answer it is compared with."""

    @property
    def key(self) -> str:
        """Hash of what is asked, in whichever order."""
        spans = _spans(self.question)
        return digest([self.question[: min(a for a, _ in spans.values())], sorted(_words(self.question).values())])

    def orders(self) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
        """(question, matching letter, other letter): as written, and with the two answers' words exchanged."""
        return (self.question, self.matching, self.other), (self._exchanged(), self.other, self.matching)

    def _exchanged(self) -> str:
        spans = _spans(self.question)
        first, second = sorted((spans[self.matching], spans[self.other]))
        q = self.question
        return q[: first[0]] + q[slice(*second)] + q[first[1] : second[0]] + q[slice(*first)] + q[second[1] :]


def _spans(question: str) -> dict[str, tuple[int, int]]:
    """Letter → where its answer's words begin and end."""
    marks = list(_OPTION.finditer(question))
    ends = [*(m.start() for m in marks[1:]), len(question)]
    return {m[1]: (m.end(), m.end() + len(question[m.end() : e].rstrip())) for m, e in zip(marks, ends, strict=True)}


def _words(question: str) -> dict[str, str]:
    return {letter: question[a:b] for letter, (a, b) in _spans(question).items()}


_COLUMNS = (
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    ("prompt", "correct", "incorrect"),
    ("prompt", "chosen", "rejected"),
)


def load_choices(path: Path | str) -> Examples[Choice]:
    """Questions of a ``.json``, ``.jsonl`` or ``.jsonl.xz`` file.

    Columns are CAA's (``question``, ``answer_matching_behavior``, ``answer_not_matching_behavior``) or those of its
    knowledge sets (``prompt``, ``correct``, ``incorrect``), or ``prompt``, ``chosen``, ``rejected`` as ``synth export``
    writes them for TRL; answers are letters as in ``(A)``.

    Returns:
        The questions. Left out and counted are those without two lettered answers in the text, those whose answer is
        none of the letters, those whose letters repeat, and repeated questions.

    Raises:
        TransferError: For a missing or broken file, other columns, or no question at all.
    """
    rows: list[Choice] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for where, row in read_rows(path):
        found = _choice(where, row)
        if isinstance(found, str):
            left_out[found] += 1
        elif found.key in seen:
            left_out["repeated"] += 1
        else:
            seen.add(found.key)
            rows.append(found)
    if not rows:
        raise TransferError(f"{path} holds no question with lettered answers (left out: {dict(left_out)}).")
    generic = Path(path).stem in ("generate", "generate_dataset", "test_dataset_ab")  # CAA's names for every behaviour
    return Examples(Path(path).parent.name if generic else name_of(path), tuple(rows), dict(sorted(left_out.items())))


def _choice(where: str, row: dict[str, Any]) -> Choice | str:
    names = next((names for names in _COLUMNS if set(names) <= set(row)), None)
    if names is None:
        raise TransferError(
            f"{where} is no question with two answers: its columns are {', '.join(sorted(row))}.",
            f"Name them {', '.join(_COLUMNS[0])}.",
        )
    question, *answers = (_said(row[name]) for name in names)
    letters = [m[1] for m in _OPTION.finditer(question)]
    if len(letters) < 2:
        return "no lettered answers"
    if len(set(letters)) < len(letters):
        return "repeated letters"
    found = [_LETTER.fullmatch(answer.strip()) for answer in answers]
    if not all(m and m[1] in letters for m in found) or answers[0].strip() == answers[1].strip():
        return "answer is none of the letters"
    matching, other = (m[1] for m in found if m)
    return Choice(identity(row, question), question, matching, other)


def _said(value: Any) -> str:
    """Words, or those of a message alone in its list."""
    return str(value[0]["content"]) if isinstance(value, list) and value and isinstance(value[0], dict) else str(value)

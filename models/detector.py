"""A language model that predicts from a description where a feature fires."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.chat import ChatModel
from models.prompts import DETECT, FUZZ
from models.replies import ask, numbers

KINDS = {"detection": DETECT, "fuzzing": FUZZ}


@dataclass(frozen=True)
class Quiz:
    """Numbered texts of one feature; in some it fires (or is marked rightly), in others not."""

    feature: int
    description: str
    texts: tuple[str, ...]
    truth: tuple[bool, ...]
    control: bool = False
    """Whether the description is another feature's."""


@dataclass(frozen=True)
class Quizzed:
    """Answers to quizzes of one kind."""

    kind: str
    """``detection`` or ``fuzzing``."""
    reader: str
    """Model and prompt, with its hash."""
    answers: tuple[frozenset[int] | None, ...]
    """Numbers (from 1) said to be active, or None where none could be read."""
    counts: dict[str, int] = field(default_factory=dict)


class ChatReader:
    """Answers quizzes.

    Args:
        model: Who is asked.
        seed: Sent with every request.
        max_tokens: Longest answer.
    """

    def __init__(self, model: ChatModel, *, seed: int = 0, max_tokens: int = 300) -> None:
        self.model = model
        self.seed = seed
        self.max_tokens = max_tokens

    def answer(self, kind: str, quizzes: list[Quiz]) -> Quizzed:
        """Which texts of each quiz are said to be active."""
        prompt = KINDS[kind]
        chats = [
            prompt.chat(
                max_tokens=self.max_tokens,
                seed=self.seed,
                description=q.description,
                texts="\n".join(f"{i}. {t}" for i, t in enumerate(q.texts, 1)),
            )
            for q in quizzes
        ]
        found, _, counts = ask(
            self.model, prompt, chats, lambda i, text: numbers(text, prompt.line, len(quizzes[i].texts))
        )
        return Quizzed(kind, f"{self.model.name} ({prompt.id})", tuple(found), dict(counts))

"""Chats in, answers out: what judges and chat generators need of a language model, wherever it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

from transfer.core.keys import digest


@dataclass(frozen=True)
class Chat:
    """One request to a chat model."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), roles as in chat templates: ``system``, ``user``, ``assistant``."""
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def hash(self, model: str) -> str:
        """Key of the whole request to ``model``: equal exactly when nothing that decides the answer differs."""
        return digest({"model": model, **asdict(self)})


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    n_prompt: int
    """Tokens read."""
    n_written: int
    """Tokens written."""
    finish: str = "stop"
    """``stop``, or ``length`` where ``max_tokens`` cut it."""
    cached: bool = False
    """Whether it was read from the cache and so cost nothing."""


class ChatModel(Protocol):
    """Answers chats."""

    @property
    def name(self) -> str:
        """Kind and model, for lineage."""
        ...

    def complete(self, chats: list[Chat]) -> list[Answer]:
        """One answer a chat, in order.

        Raises:
            TransferError: When it cannot go on; answers already given are kept in the cache where there is one.
        """
        ...

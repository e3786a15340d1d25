"""Chats in, answers out: what judges and chat generators need of a language model, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def bound(self) -> int:
        """Most tokens that the prompt can have: a token writes a byte at least, and templates add words of their own.

        Counted without any tokenizer, so that a request can be paid for before it is sent.
        """
        return TEMPLATE_TOKENS + sum(len(content.encode()) + TURN_TOKENS for _, content in self.messages)

    def preview(self) -> str:
        """The request to read."""
        head = f"max_tokens {self.max_tokens} · temperature {self.temperature:g} · seed {self.seed}"
        return "\n".join([head, *(f"[{role}]\n{content}" for role, content in self.messages)])


TEMPLATE_TOKENS = 64
"""Room for what a chat template prints around the turns (a default system prompt, a date)."""
TURN_TOKENS = 8
"""Room for role markers and ends of one turn."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    n_prompt: int
    """Tokens read."""
    n_written: int
    """Tokens written."""
    finish: str = "stop"
    """``stop``, ``length`` where ``max_tokens`` cut it, or ``refused`` where the model would not take the request
    (too long for its context, a content filter); the text is empty then, and nothing is kept."""
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


@dataclass
class Usage:
    """What chats took so far; every request is in exactly one of ``n_answered``, ``n_cached`` and ``n_refused``."""

    n_answered: int = 0
    """Answered by the model, and paid for."""
    n_cached: int = 0
    """Read from the cache, or asked for twice at once."""
    n_refused: int = 0
    n_cut: int = 0
    """Of the answered: cut by ``max_tokens``."""
    n_prompt: int = 0
    """Tokens read, of the answered."""
    n_written: int = 0
    """Tokens written, of the answered."""
    n_cached_prompt: int = 0
    """Tokens read, of the cached, when they were paid for."""
    n_cached_written: int = 0
    n_lost: int = 0
    """Tokens that may have been paid for although no answer came (the connection broke after sending)."""
    n_retries: int = 0
    n_unreported: int = 0
    """Answers whose server told no token counts; the most it can have been is counted."""
    cost: float = 0.0
    """Of the tokens answered and lost, in the currency of the prices."""

    def from_cache(self, answer: Answer) -> None:
        """Count the tokens of an answer that was read from the cache."""
        self.n_cached_prompt += answer.n_prompt
        self.n_cached_written += answer.n_written

    def to_dict(self) -> dict[str, int | float]:
        """JSON form."""
        return asdict(self)


class DryRun:
    """Shows prompts and asks nobody, so that a run can be looked at before it is paid for.

    Args:
        name: Of the model that stands behind the dry run.
        n: Prompts shown of each kind (of each system turn), in the order asked.
        show: Takes the text of each.
        prices: Currency per million tokens read and written, for the estimate.
        answer: What is answered, so that requests that depend on answers are reached; refused when empty.
    """

    def __init__(
        self,
        name: str,
        n: int,
        show: Callable[[str], None],
        prices: tuple[float, float] = (0.0, 0.0),
        answer: str = "",
    ) -> None:
        self.name = name
        self.n = n
        self.show = show
        self.prices = prices
        self.answer = answer
        self.n_requests = 0
        self.n_prompt = 0
        self.n_written = 0
        self._shown: dict[str, int] = {}

    def complete(self, chats: list[Chat]) -> list[Answer]:
        """The same answer to all; see ``ChatModel``."""
        for chat in chats:
            kind = chat.messages[0][1] if chat.messages[0][0] == "system" else ""
            self.n_requests += 1
            if self._shown.setdefault(kind, 0) < self.n:
                self._shown[kind] += 1
                self.show(f"--- request {self.n_requests} to {self.name}\n{chat.preview()}")
            self.n_prompt += chat.bound()
            self.n_written += chat.max_tokens
        return [Answer(self.answer, 0, 0, "stop" if self.answer else "refused") for _ in chats]

    def estimate(self) -> dict[str, int | float]:
        """Requests seen so far and the most they can cost; reminders of unreadable answers are not among them."""
        cost = (self.n_prompt * self.prices[0] + self.n_written * self.prices[1]) / 1e6
        return {"requests": self.n_requests, "most_prompt": self.n_prompt, "most_written": self.n_written, "cost": cost}


class ScriptedChat:
    """Answers without a model: for tests and rehearsals.

    Args:
        write: Given the chat, the answer. A sequence answers in its order, its last entry for ever.
        name: For lineage.
    """

    def __init__(self, write: Callable[[Chat], str] | Sequence[str], name: str = "scripted-chat") -> None:
        self.write = write
        self.name = name
        self.asked: list[Chat] = []

    def complete(self, chats: list[Chat]) -> list[Answer]:
        """See ``ChatModel``."""
        answers = []
        for chat in chats:
            self.asked.append(chat)
            text = self.write(chat) if callable(self.write) else self.write[min(len(self.asked), len(self.write)) - 1]
            answers.append(Answer(text, sum(len(c.split()) for _, c in chat.messages), len(text.split())))
        return answers

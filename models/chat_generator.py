"""A chat model as a generator: asked in words, answered in a form that is read strictly."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Literal

from models.chat import Answer, Chat, ChatModel, Usage
from models.generators import Prompt
from transfer.core.errors import TransferError
from transfer.core.formats import QUERY, Format, get_format
from transfer.core.keys import digest

PROMPTS = "synthesis-1"
"""Version of the wording below; part of the generator's name and so of every lineage."""
UNREADABLE = "\ufffd"
"""Stands before what could not be read, so that the verdict calls it unparsable and shows it."""
KEPT_REPLY = 200
"""Characters of an unreadable reply that are kept."""
_SPAN = 240
_NUMBERED = re.compile(r"\s*(\d+)[.)]\s+(\S.*)")
_FENCE = re.compile(r"\A```[a-z]*\n(.*)\n```\Z", re.DOTALL)

_SYSTEM = (
    "You write training examples for another language model. Each example must make one particular pattern show up "
    "clearly, must read as if a person had written it without knowing about the pattern, and must differ from the "
    "others in subject and wording. You answer with the examples alone, in the form asked for, without comments."
)


class ChatGenerator:
    """Writes texts with a chat model, by description, passages and (in step 2) the contrast pair.

    A reply is read strictly: in the ``json`` style it must be one array (a code fence around it is forgiven), in the
    ``numbered`` style lines numbered from 1. What cannot be read counts as ``unparsable`` with the reply's beginning
    kept, what is missing from a short reply as ``empty``; what a reply holds beyond what was asked for is dropped
    and counted.

    Args:
        chat: The chat model.
        format_name: Kind of example: ``query``, ``preference``, ``ab`` or ``instruction``.
        style: How replies are formed; ``numbered`` is easier for small models and works for ``query`` only.
        per_request: Texts of one feature asked for at once.
        max_tokens: Longest reply; by default 128 a text, 384 a structured one.
        temperature: Sampling temperature.
        top_p: Nucleus.

    Raises:
        TransferError: For an unknown format or style, or numbered structured examples.
    """

    steerable = False
    reads = frozenset({"description", "label", "spans"})

    def __init__(
        self,
        chat: ChatModel,
        *,
        format_name: str = "query",
        style: Literal["json", "numbered"] = "json",
        per_request: int = 4,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.9,
    ) -> None:
        self.format: Format = get_format(format_name)
        if style not in ("json", "numbered") or (style == "numbered" and self.format.structured):
            raise TransferError(f"Replies of style {style!r} cannot hold {format_name} examples.", "Use style json.")
        if per_request < 1:
            raise TransferError("At least one text must be asked for at once.", "Set per_request to 1 or more.")
        self.chat = chat
        self.format_name = format_name
        self.style = style
        self.per_request = per_request
        self.max_tokens = max_tokens
        self.temperature, self.top_p = temperature, top_p
        settings = [PROMPTS, format_name, style, per_request, max_tokens, temperature, top_p]
        self.name = f"chat:{chat.name}#{digest(settings, 6)}"
        self.counts: Counter[str] = Counter()
        """Replies by what became of them (``read``, ``unreadable``, ``cut``, ``refused``), and texts dropped."""
        self._told: dict[str, int | float] = {}

    def generate(self, requests: list[Prompt]) -> list[list[str]]:
        """See ``Generator``; structured examples come as JSON, one object a text."""
        answers = self.chat.complete([self.request(r) for r in requests])
        if len(answers) != len(requests):
            raise TransferError(f"{self.chat.name} answered {len(answers)} of {len(requests)} requests.")
        return [self._texts(r, a) for r, a in zip(requests, answers, strict=True)]

    def used(self) -> dict[str, int | float]:
        """See ``Generator``; the numbers of ``models.chat.Usage``."""
        usage: Usage | None = getattr(self.chat, "usage", None)
        before, self._told = self._told, usage.to_dict() if usage else {}
        return {name: value - before.get(name, 0) for name, value in self._told.items()}

    def request(self, prompt: Prompt) -> Chat:
        """What the chat model is asked."""
        each = 384 if self.format.structured else 128
        return Chat(
            messages=(("system", _SYSTEM), ("user", self.words(prompt))),
            max_tokens=self.max_tokens or each * prompt.n,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=prompt.seed,
        )

    def words(self, prompt: Prompt) -> str:
        """The user's turn of a request."""
        parts = ["The pattern: " + (prompt.description or "the one that the passages below have in common") + "."]
        if prompt.spans:
            parts.append(
                "Passages in which it shows up, the place marked «like this», strongest first:\n"
                + "\n".join(f"- {_line(s)}" for s in prompt.spans)
            )
        if prompt.examples:
            parts.append("Texts that show it:\n" + "\n".join(f"- {_line(x)}" for x in prompt.examples))
        if prompt.contrast:
            positive, negative = prompt.contrast
            parts.append(f"Of earlier attempts, this one showed it most clearly:\n- {_line(positive)}")
            if negative:
                parts.append(
                    f"This one did not show it:\n- {_line(negative)}\n"
                    "Work out what the first has that the second lacks, and write more of that."
                )
        if prompt.label:
            parts.append(f"Every example must belong to the class “{prompt.label}”.")
        if prompt.opening:
            parts.append(f"Every example begins with these words: {_line(prompt.opening)}")
        parts.append(self._form(prompt.n))
        return "\n\n".join(parts)

    def _form(self, n: int) -> str:
        many = f"{n} new examples that are" if n > 1 else "1 new example that is"
        if not self.format.structured:
            what = f"Write {many} not a copy of any text above; each is {self.format.fields['text']}."
            if self.style == "numbered":
                return f"{what} Put each on a line of its own, numbered from 1."
            return f"{what} Answer with a JSON array of {n} string{'s' if n > 1 else ''}."
        fields = "\n".join(f'- "{name}": {what}' for name, what in self.format.fields.items())
        return (
            f"Write {many} not a copy of anything above. Answer with a JSON array of {n} "
            f"object{'s' if n > 1 else ''}, each with exactly these text fields:\n{fields}"
        )

    def _texts(self, prompt: Prompt, answer: Answer) -> list[str]:
        if answer.finish == "length":
            self.counts["cut"] += 1
        if answer.finish == "refused":
            self.counts["refused"] += 1
            return [""] * prompt.n
        found = self._numbered(answer.text) if self.style == "numbered" else self._json(answer.text)
        if found is None:
            self.counts["unreadable"] += 1
            return [f"{UNREADABLE} {answer.text[:KEPT_REPLY]}"] * prompt.n
        self.counts["read"] += 1
        self.counts["dropped"] += max(len(found) - prompt.n, 0)
        return (found + [""] * prompt.n)[: prompt.n]

    def _json(self, reply: str) -> list[str] | None:
        reply = reply.strip()
        if fenced := _FENCE.match(reply):
            reply = fenced[1]
        try:
            value: Any = json.loads(reply)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, list):
            return None
        if self.format is QUERY:
            return value if all(isinstance(x, str) for x in value) else None
        return [json.dumps(x, ensure_ascii=False) for x in value]

    @staticmethod
    def _numbered(reply: str) -> list[str] | None:
        lines = [line for line in reply.split("\n") if line.strip()]
        found = [_NUMBERED.fullmatch(line.rstrip()) for line in lines]
        texts = [m[2] for i, m in enumerate(found, start=1) if m and int(m[1]) == i]
        return texts if texts and len(texts) == len(lines) else None


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SPAN else line[:_SPAN].rsplit(" ", 1)[0] + " …"

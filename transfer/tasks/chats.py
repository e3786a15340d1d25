"""Conversations as a model reads them: through its chat template, tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transfer.core.errors import TransferError

Turns = Sequence[tuple[str, str]]
"""(role, words) in order; roles as in chat templates."""

_NAMES = {"system": "", "user": "User: ", "assistant": "Assistant: "}


def written(tokenizer: Any, turns: Turns, answer_next: bool = False) -> str:
    """A conversation in the words of the tokenizer's chat template.

    Base models have no template; for them it is a plain transcript behind BOS, with EOS after every answer.

    Args:
        tokenizer: A transformers tokenizer.
        turns: The conversation.
        answer_next: End with what comes before an answer.

    Raises:
        TransferError: When the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        begun = tokenizer.bos_token or ""
        ends = {"assistant": tokenizer.eos_token or ""}
        lines = [f"{_NAMES[role]}{words.strip()}{ends.get(role, '')}" for role, words in turns]
        return begun + "\n\n".join([*lines, "Assistant:"] if answer_next else lines)
    from jinja2 import TemplateError

    messages = [{"role": role, "content": words} for role, words in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise TransferError(f"The chat template refuses a conversation of {roles}: {error}.") from None


def chat_ids(tokenizer: Any, turns: Turns, answer_next: bool = False) -> list[int]:
    """Token ids of ``written``; the template prints its own BOS, so none is added."""
    return tokenizer(written(tokenizer, turns, answer_next), add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer: Any, turns: Turns, answer: str) -> tuple[list[int], int, int]:
    """A conversation with its answer, and where the answer stands.

    Template and answer are compared as tokens, since a tokenizer may merge across their border: the answer begins
    where the conversation with it leaves the conversation without it.

    Returns:
        Token ids, the position of the answer's first token, and the one behind its last; what follows (end of turn)
        is the template's.

    Raises:
        TransferError: When the template does not print the answer last.
    """
    text = written(tokenizer, [*turns, ("assistant", answer)])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    whole, offsets = encoded["input_ids"], encoded["offset_mapping"]
    begun = chat_ids(tokenizer, turns, answer_next=True)
    same = 0
    while same < min(len(begun), len(whole)) and begun[same] == whole[same]:
        same += 1
    at = text.rfind(answer.strip())
    if at < 0:
        raise TransferError("The chat template changes the answer.")
    stop = at + len(answer.strip())
    end = next((i for i, (first, _) in enumerate(offsets) if first >= stop), len(whole))
    return whole, min(same, end), end

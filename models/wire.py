"""What goes over the wire of an OpenAI-compatible server, read with suspicion."""

from __future__ import annotations

import email.utils
import time
from typing import TYPE_CHECKING

from models.chat import Answer

if TYPE_CHECKING:
    import httpx


class NoAnswer(Exception):
    """The connection broke after sending, or what came back is no answer: it may have been paid for."""


def read_answer(response: httpx.Response) -> tuple[Answer, bool]:
    """The answer in a response, and whether the server told its token counts (they are 0 otherwise).

    Raises:
        NoAnswer: When there is none.
    """
    try:
        data = response.json()
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("the content is no text")
        usage = data.get("usage") or {}
        n_prompt, n_written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        finish = {"length": "length", "content_filter": "refused"}.get(choice.get("finish_reason"), "stop")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoAnswer(f"the answer is no chat completion ({type(error).__name__}: {error})") from None
    text = "" if finish == "refused" else text
    if isinstance(n_prompt, int) and isinstance(n_written, int) and min(n_prompt, n_written) >= 0:
        return Answer(text, n_prompt, n_written, finish), True
    return Answer(text, 0, 0, finish), False


def server_message(response: httpx.Response, key: str = "") -> str:
    """What the server said of an error, short and without the key."""
    try:
        data = response.json()
        error = data.get("error", data)
        if isinstance(error, dict):
            said = error.get("message") or error.get("detail") or error.get("error") or ""
            said = f"{error['code']}, {said}" if isinstance(error.get("code"), str) else str(said)
        else:
            said = str(error)
    except (ValueError, AttributeError):
        said = response.text
    said = " ".join(said.split())
    if key:
        said = said.replace(key, "…")
    return f"{said[:200].rstrip('.')} (status {response.status_code})".strip()


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, in either of its forms; None when absent or unreadable."""
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None

"""The chat models that the sections of an experiment name, asked as they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transfer.core.config import AskSection

if TYPE_CHECKING:
    from models.cache import AnswerCache
    from models.endpoint import Endpoint
    from models.local_chat import LocalChat

CACHE = "answers.sqlite"
"""File of all answers, beside the finished stages."""


def local_chat(ref: str, settings: AskSection, cache: AnswerCache | None) -> LocalChat:
    """A local chat model by its reference.

    Raises:
        TransferError: When it cannot be loaded, or has no chat template.
    """
    from models.language import LanguageModel
    from models.local_chat import LocalChat

    language = LanguageModel.load(ref, dtype=settings.dtype, device=settings.device)
    return LocalChat(language, batch_size=settings.batch, cache=cache)


def served_chat(
    address: str, model: str, settings: AskSection, cache: AnswerCache | None, account: str = ""
) -> Endpoint:
    """A chat model behind a server; its caps count over everything booked on ``account`` so far.

    Raises:
        TransferError: For a missing key, a bad address, or a cap on money without prices.
    """
    from models.endpoint import Endpoint

    return Endpoint(
        address,
        model,
        cache=cache,
        served_by=settings.served_by,
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout=settings.timeout,
        prices=(settings.price_prompt, settings.price_written),
        max_cost=settings.max_cost,
        max_tokens=settings.max_tokens,
        account=account,
        limit_field=settings.limit_field,
        omit=settings.omit,
    )

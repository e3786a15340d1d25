"""Read a transformers checkpoint: quietly, safetensors only, and never with weights drawn at random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from models.family import family_of
from transfer.core.errors import TransferError


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars away inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_model(ref: str, place: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Configuration, model and tokenizer, with every failure as one sentence.

    Args:
        ref: The reference, for messages.
        place: Folder or hub name.
        options: For every ``from_pretrained``: revision, or local files only.
        dtype: Of the weights.

    Raises:
        TransferError: When a file is missing or damaged, the family is unknown, or weights are lacking.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(place, **options)
        family_of(config)
        with no_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        hint = "Check its name and revision, and that this machine can reach the hub or has it in its cache."
        raise TransferError(f"{ref} could not be loaded ({first}).", hint if ref.startswith("hub:") else "") from error
    # transformers only warns and draws such weights at random.
    lacking = sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    if lacking:
        raise TransferError(f"{ref} lacks {len(lacking)} weights, first {lacking[0]}.", "Its files are incomplete.")
    return config, model, tokenizer

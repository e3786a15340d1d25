"""Which tokens of a vocabulary count, from what each of its pieces writes."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from models.tokens import TokenBytes
from transfer.core.errors import TransferError

KINDS = {"space": "ZC", "punctuation": "PS", "digits": "N"}
"""First letters of the Unicode categories of each kind; symbols go with punctuation, control characters with space."""


def counted(tokens: TokenBytes, skip: Sequence[str]) -> np.ndarray:
    """Whether each token counts, bool [vocabulary].

    A token is left out where all that it writes is of the kinds to skip, white space beside it aside: with
    ``punctuation`` and ``digits`` a token ``,`` or `` 19`` goes, and ``a.`` stays. All three kinds leave tokens with a
    letter or a mark. A piece of a character (bytes that are no UTF-8 by themselves) cannot be judged alone and counts.

    Args:
        tokens: What the tokens of one tokenizer write.
        skip: Kinds to leave out: ``space``, ``punctuation``, ``digits``.

    Raises:
        TransferError: For another kind.
    """
    if unknown := sorted(set(skip) - set(KINDS)):
        raise TransferError(f"Unknown kind of token {unknown[0]!r}.", f"Kinds: {', '.join(KINDS)}.")
    letters = "".join(KINDS[kind] for kind in skip)
    return np.array([not _only(piece, letters, "space" in skip) for piece in tokens.table], dtype=bool)


def _only(piece: bytes, letters: str, blank: bool) -> bool:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return False
    kinds = {unicodedata.category(c)[0] for c in text if not c.isspace()}
    return kinds <= set(letters) if kinds else blank


def name(skip: Sequence[str]) -> str:
    """How a rule says what is left out; empty for nothing."""
    return f", without {' '.join(kind for kind in KINDS if kind in skip)}" if skip else ""

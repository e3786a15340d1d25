"""Pair the token positions of two tokenizers: where both have consumed the same bytes of the same document."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from transfer.core.errors import TransferError
from transfer.core.objects import ActivationStore, PairedActivations


def pair_rows(
    docs_a: Int[np.ndarray, " tokens_a"],
    ends_a: Int[np.ndarray, " tokens_a"],
    docs_b: Int[np.ndarray, " tokens_b"],
    ends_b: Int[np.ndarray, " tokens_b"],
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Rows at which both sides stand at the same END boundary of the same document.

    A causal model has then read exactly the same text on both sides. Starts are never used (trimming of spaces moves
    them), and where several tokens of one side share an end (a character split into byte tokens) the last one counts:
    only it has read the whole prefix. A negative end means "no content read" and pairs with nothing.

    Args:
        docs_a: Document of each token, in any order.
        ends_a: Bytes of the document's content consumed at the end of each token.
        docs_b: The same for the other tokenizer.
        ends_b: The same for the other tokenizer.

    Returns:
        Row numbers into either side, same length, ordered by document and end.

    Raises:
        TransferError: When documents and ends of one side differ in length.
    """
    for side, docs, ends in (("first", docs_a, ends_a), ("second", docs_b, ends_b)):
        if len(docs) != len(ends):
            raise TransferError(f"The {side} side has {len(docs)} document marks for {len(ends)} token ends.")
    if not len(ends_a) or not len(ends_b):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    stride = int(max(np.max(ends_a), np.max(ends_b), 0)) + 1
    keys_a, rows_a = _last_of_each(docs_a, ends_a, stride)
    keys_b, rows_b = _last_of_each(docs_b, ends_b, stride)
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return rows_a[at_a], rows_b[at_b]


def _last_of_each(docs: np.ndarray, ends: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (document, end) keys, ascending, with the last row that has each."""
    rows = np.flatnonzero(ends >= 0)[::-1]
    keys, first = np.unique(docs[rows].astype(np.int64) * stride + ends[rows], return_index=True)
    return keys, rows[first]


def pair_stores(a: ActivationStore, b: ActivationStore, residuals: bool = True) -> PairedActivations:
    """Codes, and where asked for residuals, of two stores of one corpus at the positions both share.

    Memory: the codes of the shared rows, plus (tokens × d_model) float16 for each residual.

    Raises:
        TransferError: When the stores hold different corpora, share no position, or keep no residuals.
    """
    if a.corpus_hash != b.corpus_hash:
        raise TransferError(
            f"The stores of {a.space.id} and {b.space.id} hold different corpora ({a.corpus_hash}, {b.corpus_hash}).",
            "Harvest both on the same texts.",
        )
    if a.doc_ids != b.doc_ids:
        raise TransferError(
            f"The stores of {a.space.id} ({len(a.doc_ids)}) and {b.space.id} ({len(b.doc_ids)}) list other documents.",
            "Harvest both again from the same corpus.",
        )
    rows_a, rows_b = pair_rows(a.token_docs, a.token_ends, b.token_docs, b.token_ends)
    return PairedActivations(
        source=a.tokens[rows_a],
        target=b.tokens[rows_b],
        docs=a.token_docs[rows_a],
        source_residual=a.residuals[rows_a] if residuals else None,
        target_residual=b.residuals[rows_b] if residuals else None,
    )

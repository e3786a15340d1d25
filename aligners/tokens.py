"""Pair the token positions of two tokenizers: where both have consumed the same bytes of the same document."""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.correlation import dims
from transfer.core.errors import TransferError
from transfer.core.rows import Rows, chosen
from transfer.core.store import ActivationStore, PairedActivations

Pooling = Literal["last", "max", "mean", "sum"]
"""How the tokens between two shared boundaries become one row; ``last`` takes the boundary's own token only."""
BLOCK_VALUES = 2**22
"""Stored values, codes or residual coordinates, that are pooled at once."""


def pair_rows(
    docs_a: Int[np.ndarray, " tokens_a"],
    ends_a: Int[np.ndarray, " tokens_a"],
    docs_b: Int[np.ndarray, " tokens_b"],
    ends_b: Int[np.ndarray, " tokens_b"],
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Rows at which both sides stand at the same END boundary of the same document.

    A causal model has then read exactly the same text on both sides. Starts are never used (trimming of spaces moves
    them), and where several tokens of one side share an end (a character split into byte tokens) the last one counts:
    only it has read the whole prefix. A negative end means that it is not known what was read, and pairs with nothing.

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
    at = np.minimum(np.searchsorted(keys_b, keys_a), len(keys_b) - 1)
    found = np.flatnonzero(keys_b[at] == keys_a) if len(keys_b) else np.empty(0, dtype=np.int64)
    return rows_a[found], rows_b[at[found]]


def _last_of_each(docs: np.ndarray, ends: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (document, end) keys, ascending, with the last row that has each."""
    rows = np.flatnonzero(ends >= 0)
    keys = docs[rows].astype(np.int64) * stride + ends[rows]
    if np.any(np.diff(keys) < 0):  # a store is in order already
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
    last = np.flatnonzero(np.diff(keys, append=-1))
    return keys[last], rows[last]


def span_starts(docs: Int[np.ndarray, " tokens"], rows: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """First token of the span that ends at each shared boundary: behind the boundary before it in the same document.

    Span ``i`` is then ``starts[i] … rows[i]``. Tokens whose own end is unknown belong to the span they stand in; those
    behind the last shared boundary of a document belong to none.

    Args:
        docs: Document of each token of one side, in reading order.
        rows: Tokens at shared boundaries, as ``pair_rows`` gives them.

    Raises:
        TransferError: When the tokens are not in reading order, for then "in between" means nothing.
    """
    if np.any(np.diff(docs) < 0) or np.any(np.diff(rows) <= 0):
        raise TransferError("The tokens of a store are not in reading order.", "Sort them, or pair with pool='last'.")
    first = np.searchsorted(docs, docs[rows])
    return np.maximum(first, np.concatenate([[0], rows[:-1] + 1])) if len(rows) else first


def pool_codes(
    codes: sp.csr_matrix, starts: Int[np.ndarray, " pairs"], rows: Int[np.ndarray, " pairs"], how: Pooling
) -> sp.csr_matrix:
    """Codes of spans of tokens, each pooled into one row; sparse throughout.

    A token on which a feature is silent counts as zero, in the mean as in the maximum. Every value is what a loop over
    the tokens in their order gives, in the codes' own precision. Memory: the result, and about 40 bytes a value for
    ``BLOCK_VALUES`` values (or one span's, where that has more).

    Args:
        codes: [tokens, n_features].
        starts: First token of each span (``span_starts``).
        rows: Last token of each span.
        how: ``last``, ``max``, ``mean`` or ``sum``.

    Returns:
        [pairs, n_features].

    Raises:
        TransferError: For an unknown way to pool.
    """
    if how not in ("last", "max", "mean", "sum"):
        raise TransferError(f"Unknown way {how!r} to pool tokens.", "Use 'last', 'max', 'mean' or 'sum'.")
    if how == "last" or not len(rows):
        return sp.csr_matrix(codes[rows])
    parts = []
    for low, high in _blocks(codes.indptr[rows + 1].astype(np.int64)):
        first, stop = starts[low:high], rows[low:high] + 1
        if how == "max":
            parts.append(_largest(codes, first, stop))
            continue
        sums = sp.csr_matrix(_members(first, stop, codes.dtype) @ codes[first[0] : stop[-1]])
        if how == "mean":
            sums.data /= np.repeat((stop - first).astype(sums.dtype), np.diff(sums.indptr))
        sums.sort_indices()
        parts.append(sums)
    pooled = sp.csr_matrix(sp.vstack(parts, format="csr"))
    pooled.eliminate_zeros()
    return pooled


def pool_residuals(
    residuals: Rows,
    starts: Int[np.ndarray, " pairs"],
    rows: Int[np.ndarray, " pairs"],
    how: Pooling,
) -> Float[np.ndarray, "pairs d_model"]:
    """Residuals [tokens, d_model] of the same spans: the last token's with ``last``, otherwise their mean, in float32.

    A residual is a point of a space, not an amount: its coordinate-wise maximum is no point that the model ever visits,
    and a sum grows with the number of tokens, which the two tokenizers do not share. So the mean goes with ``max``,
    ``mean`` and ``sum`` alike. Memory: the result and ``BLOCK_VALUES`` float32.
    """
    if how == "last":
        return residuals[rows]
    width = residuals.shape[1]
    out = np.empty((len(rows), width), dtype=np.float32)
    for low, high in _blocks((rows + 1) * width):
        first, stop = starts[low:high], rows[low:high] + 1
        block = residuals[first[0] : stop[-1]].astype(np.float32)
        out[low:high] = (_members(first, stop, np.float32) @ block) / (stop - first)[:, None]
    return out


def _blocks(reached: Int[np.ndarray, " pairs"]) -> list[tuple[int, int]]:
    """Runs of spans that hold about ``BLOCK_VALUES`` values, given the values read at the end of each span."""
    cuts = [0]
    while cuts[-1] < len(reached):
        read = reached[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(reached, read + BLOCK_VALUES, side="right"))))
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _members(starts: np.ndarray, stops: np.ndarray, dtype: np.dtype | type) -> sp.csr_matrix:
    """Ones where a token (counted from the first start) belongs to a span [pairs, tokens]."""
    length = stops - starts
    indptr = np.concatenate([[0], np.cumsum(length)])
    tokens = np.arange(indptr[-1]) + np.repeat(starts - starts[0] - indptr[:-1], length)
    return sp.csr_matrix((np.ones(indptr[-1], dtype=dtype), tokens, indptr), shape=(len(starts), stops[-1] - starts[0]))


def _largest(codes: sp.csr_matrix, starts: np.ndarray, stops: np.ndarray) -> sp.csr_matrix:
    """Maximum of each feature over each span."""
    n_features = dims(codes)[1]
    inside = _members(starts, stops, np.int8)
    taken = codes[inside.indices + starts[0]]
    span = np.repeat(np.repeat(np.arange(len(starts)), stops - starts), np.diff(taken.indptr))
    key = span * n_features + taken.indices
    order = np.argsort(key, kind="stable")
    key, data = key[order], taken.data[order]
    heads = np.flatnonzero(np.diff(key, prepend=-1))
    best = np.maximum.reduceat(data, heads) if len(heads) else data
    row, column = np.divmod(key[heads], n_features)
    # Where some token of the span is silent the maximum is at least zero.
    silent = np.diff(np.append(heads, len(key))) < (stops - starts)[row]
    best = np.where(silent, np.maximum(best, 0), best)
    indptr = np.searchsorted(row, np.arange(len(starts) + 1))
    return sp.csr_matrix((best, column, indptr), shape=(len(starts), n_features))


def pair_stores(
    a: ActivationStore, b: ActivationStore, residuals: bool = True, pool: Pooling = "last"
) -> PairedActivations:
    """Codes, and where asked for residuals, of two stores of one corpus at the positions both share.

    With another ``pool`` than ``last`` a row stands for the tokens since the shared boundary before it, on either side:
    exactly the same bytes, cut differently (``pool_codes``, ``pool_residuals``).

    Memory: the codes of the shared rows. Residuals stay on disk and are read where they are sliced; pooled ones take
    (rows × d_model) float32.

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
    codes, points = [], []
    for store, rows in ((a, rows_a), (b, rows_b)):
        starts = rows if pool == "last" else span_starts(store.token_docs, rows)
        codes.append(pool_codes(store.tokens, starts, rows, pool))
        if not residuals:
            points.append(None)
        elif pool == "last":
            points.append(chosen(store.residuals, rows))
        else:
            points.append(pool_residuals(store.residuals, starts, rows, pool))
    return PairedActivations(codes[0], codes[1], a.token_docs[rows_a], points[0], points[1])

"""Pairing the positions of two tokenizers: tokens per second against a loop over byte prefixes and a bare sort."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from aligners.tokens import pair_rows, pool_codes, span_starts
from tests.benchmarks.case import measure, row

DOCS, LENGTH = 5000, 400
"""Documents, and bytes of each."""
ACTIVE, FEATURES = 20, 65_536


def ends(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Document and end of each token of a tokenizer whose tokens have about four bytes."""
    rng = np.random.default_rng(seed)
    border = rng.uniform(size=(DOCS, LENGTH)) < 0.25
    border[:, -1] = True
    docs, at = np.nonzero(border)
    return docs.astype(np.int32), at + 1


def loop(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """The peer: look every prefix up, token by token."""
    where = {key: i for i, key in enumerate(zip(a[0].tolist(), a[1].tolist(), strict=True))}
    keys = enumerate(zip(b[0].tolist(), b[1].tolist(), strict=True))
    return [(where[key], j) for j, key in keys if key in where]


def main() -> None:
    """A million tokens; pooling also reads 20 codes a token."""
    a, b = ends(0), ends(1)
    n = len(a[0]) + len(b[0])
    keys = np.concatenate([docs.astype(np.int64) * (LENGTH + 1) + end for docs, end in (a, b)])
    times = measure(
        {"ours": lambda: pair_rows(*a, *b), "loop": lambda: loop(a, b), "sort": lambda: np.sort(keys)}, rounds=3
    )
    rows_a, rows_b = pair_rows(*a, *b)
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == sorted(loop(a, b))
    mega = n / 1e6
    row("token_align.pair", mega / times["ours"], "loop", mega / times["loop"], "M tokens/s", mega / times["sort"])
    rng = np.random.default_rng(2)
    tokens = len(a[0])
    at = np.arange(tokens + 1) * ACTIVE
    values = rng.uniform(1, 2, tokens * ACTIVE).astype(np.float32)
    codes = sp.csr_matrix((values, rng.integers(FEATURES, size=len(values)), at), shape=(tokens, FEATURES))
    starts = span_starts(a[0], rows_a)
    times = measure(
        {
            "ours": lambda: pool_codes(codes, starts, rows_a, "sum"),
            "loop": lambda: [codes[s : r + 1].sum(axis=0) for s, r in zip(starts[:300], rows_a[:300], strict=True)],
            "copy": codes.copy,
        },
        rounds=3,
    )
    count = len(rows_a) / 1e3
    peer, limit = 0.3 / times["loop"], count / times["copy"]
    row("token_align.pool-sum", count / times["ours"], "loop over spans, dense sums", peer, "1000 spans/s", limit)

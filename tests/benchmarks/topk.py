"""Top-k cosine in both directions: GFLOP/s end to end against the bare product in the same type (the limit) and peers.

Planted: every target is a noisy copy of one source row, at cosine 0.75. Recall against exact float32 is checked.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from aligners.csls import csls_nearest
from aligners.topk import TopK, fast_dtype, topk_cosine, unit_rows
from tests.benchmarks.case import row, seconds, watched

K = 32
BLOCK = 2048
SHAPES = ((4096, 512), (2048, 1024), (2048, 512), (1024, 1024), (4096, 2048))
"""Of the product whose rate is the limit."""


def dictionaries(n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source rows, target rows, and the source row that each target is a copy of."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d), dtype=np.float32)
    truth = rng.permutation(n)
    y = np.empty_like(x)
    for start in range(0, n, BLOCK):
        part = slice(start, start + BLOCK)
        y[part] = rng.standard_normal((len(truth[part]), d), dtype=np.float32)
        y[part] *= 0.88
        y[part] += x[truth[part]]
    return x, y, truth


def blockwise(x: torch.Tensor, y: torch.Tensor) -> None:
    """The peer: float32 blocks of unit rows, ``torch.topk`` of each block and of its transpose, merged."""
    best: torch.Tensor | None = None
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK] @ y.T
        torch.topk(block, K, dim=1)
        scores = torch.topk(block.T.contiguous(), K, dim=1).values
        best = scores if best is None else torch.topk(torch.hstack([best, scores]), K, dim=1).values


def product_rate(n: int, d: int, dtype: torch.dtype) -> float:
    """GFLOP/s of the bare product of n × n pairs or a part of them, in the shape that is best here."""
    best = 0.0
    for rows, cols in SHAPES:
        x, y, out = (torch.ones(shape, dtype=dtype) for shape in ((rows, d), (cols, d), (rows, cols)))
        torch.mm(x, y.T, out=out)
        times = max(1, min(2**36 // (rows * cols * d), n * n // (rows * cols)))
        taken = seconds(lambda out=out, x=x, y=y, times=times: [torch.mm(x, y.T, out=out) for _ in range(times)])
        best = max(best, times * 2 * rows * cols * d / taken / 1e9)
    return best


def recall(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> float:
    """Share of the exact float32 neighbours of 256 rows that were found."""
    rows = np.random.default_rng(1).choice(len(x), 256, replace=False)
    exact = torch.from_numpy(unit_rows(x[rows])) @ torch.from_numpy(y / np.linalg.norm(y, axis=1, keepdims=True)).T
    want = torch.topk(exact, K, dim=1).indices.numpy()
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(want, ids[rows], strict=True)]))


def case(n: int, d: int) -> None:
    """One size; the peer is timed on enough rows for a second or more, since all of them take minutes."""
    x, y, truth = dictionaries(n, d)
    dtype = fast_dtype("auto")
    found: list[TopK] = []
    before = product_rate(n, d, dtype)
    taken = watched(lambda: found.append(topk_cosine(x, y, K)))
    limit = max(before, product_rate(n, d, dtype))
    part = BLOCK
    source, target = torch.from_numpy(x[:part]), torch.from_numpy(y)
    peer = 2 * part * n * d / seconds(lambda: blockwise(source, target)) / 1e9
    peer_name = f"torch float32 blocks and torch.topk ({part} of {n} rows)"
    row(f"topk.{n}x{n}x{d}", 2 * n * n * d / taken / 1e9, peer_name, peer, "GFLOP/s", limit)
    assert recall(x, y, found[0].row_ids) >= 0.999 and recall(y, x, found[0].col_ids) >= 0.999, "recall below 0.999"
    rows, cols = csls_nearest(found[0]).mutual()
    assert len(rows) == n and np.array_equal(truth[cols], rows), "planted pairs missed"


def small(n: int = 8192, d: int = 1024) -> None:
    """Against scikit-learn, which answers one direction only."""
    from sklearn.neighbors import NearestNeighbors

    x, y, _ = dictionaries(n, d)
    index = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(y)
    work = 2 * n * n * d / 1e9
    peer = work / seconds(lambda: index.kneighbors(x[: n // 8])) / 8
    ours = work / watched(lambda: topk_cosine(x, y, K))
    name = "scikit-learn NearestNeighbors, brute, rows only (an eighth of them)"
    row(f"topk.{n}x{n}x{d}", ours, name, peer, "GFLOP/s", product_rate(n, d, fast_dtype("auto")))


def flat_index(n: int = 16_384, d: int = 1024) -> None:
    """Against faiss, where it is installed: its flat index, one search each way, on a part of the rows."""
    if find_spec("faiss") is None:
        return
    import faiss  # pyright: ignore[reportMissingImports]

    faiss.omp_set_num_threads(1)
    x, y, _ = dictionaries(n, d)
    part = n // 8

    def both(x: np.ndarray, y: np.ndarray) -> None:
        for queries, rows in ((x, y), (y, x)):
            index = faiss.IndexFlatIP(d)
            index.add(rows)
            index.search(queries[:part], K)

    x, y = unit_rows(x), unit_rows(y)
    work = 2 * n * n * d / 1e9
    peer = work / seconds(lambda: both(x, y)) / 8
    ours = work / watched(lambda: topk_cosine(x, y, K))
    name = "faiss IndexFlatIP, both ways (an eighth of the rows)"
    row(f"topk.{n}x{n}x{d}", ours, name, peer, "GFLOP/s", product_rate(n, d, fast_dtype("auto")))


def main() -> None:
    """Five sizes, the largest dictionaries of the models this suite is for among them."""
    small()
    flat_index()
    case(65_536, 1024)
    case(131_072, 1024)
    case(65_536, 4096)

"""From shortlists to exact top-k: score again what may be among the best, and search in full where a doubt is left."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from aligners.shortlist import Shortlist, Tiling, UnitRows, shortlist

if TYPE_CHECKING:
    import torch

SAMPLE = 2**14
"""Shortlisted pairs from which the error of the fast product is first estimated."""
SEARCHED = 2**23
"""Pairs of one block of a full search."""
GATHERED = 2**26
"""Bytes of target rows that are converted at once where they are not stored in the exact type."""

Lists = tuple[np.ndarray, np.ndarray]
"""Ids int64 [n, k] and scores [n, k], best first."""


def both_topk(
    source: UnitRows,
    target: UnitRows,
    k: int,
    spare: int,
    fast: torch.dtype,
    device: str,
    tiling: Tiling | None = None,
) -> tuple[Lists, Lists, int]:
    """Top-k of rows and of columns by shortlists of ``k + spare``, and how many of both were searched in full.

    The fast product errs by at most ``base + relative · |score|``: the relative part is its rounding (2⁻⁸ in bfloat16),
    the base is the largest error beyond that on all pairs that are scored again (millions, chosen for being near the
    k-th place). A list stands when its k-th exact score exceeds the best fast score left out by more than that.
    Pairs are scored once for both directions, which share most of them.
    """
    k_row, k_col = min(k, len(target)), min(k, len(source))
    found = shortlist(source, target, k + spare, fast, tiling or Tiling(), device)
    relative = 2.0**-8 if fast.itemsize == 2 else 2.0**-20
    base = 1.5 * _base_error(source, target, found, relative, device)
    row_open, row_left = _contenders(found.row_scores, found.row_floor, k_row, base, relative)
    col_open, col_left = _contenders(found.col_scores, found.col_floor, k_col, base, relative)

    width = len(target)
    row_keys = np.nonzero(row_open)[0] * width + found.row_ids[row_open]
    col_keys = found.col_ids[col_open] * width + np.nonzero(col_open)[0]
    keys, at = np.unique(np.concatenate([row_keys, col_keys]), return_inverse=True)
    exact = pair_scores(source, target, keys // width, keys % width, device)[at]
    row_exact, col_exact = exact[: len(row_keys)], exact[len(row_keys) :]
    seen = [(row_exact, found.row_scores[row_open]), (col_exact, found.col_scores[col_open])]
    worst = max((float(np.max(np.abs(e - f) - relative * np.abs(f), initial=0.0)) for e, f in seen), default=0.0)
    rows, row_sure = _settled(found.row_ids, row_open, row_exact, row_left, k_row, worst, relative)
    cols, col_sure = _settled(found.col_ids, col_open, col_exact, col_left, k_col, worst, relative)
    for lists, sure, a, b, side_k in ((rows, row_sure, source, target, k_row), (cols, col_sure, target, source, k_col)):
        doubtful = np.flatnonzero(~sure)
        for part, full in zip(lists, exact_rows(a, b, doubtful, side_k, device), strict=True):
            part[doubtful] = full
    return rows, cols, int(np.sum(~row_sure) + np.sum(~col_sure))


def pair_scores(
    source: UnitRows, target: UnitRows, rows: Int[np.ndarray, " n"], cols: Int[np.ndarray, " n"], device: str
) -> Float[np.ndarray, " n"]:
    """Cosine of listed pairs, ``rows`` ascending; the same for a pair wherever it stands, and either way round."""
    import torch

    dtype = torch.float64 if source.exact == np.float64 or target.exact == np.float64 else torch.float32
    itemsize, width = dtype.itemsize, source.values.shape[1]
    whole = target.values.dtype.itemsize == itemsize and target.values.flags.c_contiguous or device != "cpu"
    step = max(1, (2**18 if whole else GATHERED // (itemsize * width)))
    out = np.empty(len(rows), dtype=np.float64 if itemsize == 8 else np.float32)
    with warnings.catch_warnings():
        # torch warns that CSR is beta, and that memory-mapped arrays cannot be written to; nothing is written.
        warnings.simplefilter("ignore")
        held = torch.from_numpy(np.asarray(target.values)).to(device, dtype) if whole else None
        for start in range(0, len(rows), step):
            row, col = rows[start : start + step], cols[start : start + step]
            ids, stop = np.unique(row), int(row[-1]) + 1
            if stop - int(row[0]) <= 2 * len(ids):  # a view, where that skips few rows
                ids = np.arange(int(row[0]), stop)
                x = torch.from_numpy(np.asarray(source.values[ids[0] : stop])).to(device, dtype)
            else:
                x = torch.from_numpy(np.asarray(source.values[ids])).to(device, dtype)
            if held is None:
                used, at = np.unique(col, return_inverse=True)
                y = torch.from_numpy(np.asarray(target.values[used])).to(device, dtype)
            else:
                at, y = col, held
            bounds = torch.from_numpy(np.searchsorted(row, np.append(ids, stop))).to(device)
            pattern = torch.sparse_csr_tensor(
                bounds,
                torch.from_numpy(np.asarray(at, dtype=np.int64)).to(device),
                torch.zeros(len(at), dtype=dtype, device=device),
                (len(ids), len(y)),
            )
            dots = torch.sparse.sampled_addmm(pattern, x, y.T, beta=0.0).values().cpu().numpy()
            out[start : start + step] = dots * (source.inverse[row] * target.inverse[col])
    return out


def exact_rows(source: UnitRows, target: UnitRows, rows: Int[np.ndarray, " n"], k: int, device: str) -> Lists:
    """Top-k of these source rows from the full product; equal scores go to the lower id.

    Memory: blocks of 2²³ pairs, about 40 bytes a pair should all of them tie.
    """
    import torch

    dtype = torch.float64 if source.exact == np.float64 or target.exact == np.float64 else torch.float32
    # The product of a block may sum in another order than that of a pair: what is this close is scored pair by pair.
    close = 4 * torch.finfo(dtype).eps * max(4.0, source.values.shape[1] ** 0.5)
    ids = np.empty((len(rows), k), dtype=np.int64)
    scores = np.empty((len(rows), k), dtype=np.float64 if dtype == torch.float64 else np.float32)
    step, tile = max(1, SEARCHED // len(target)), 4096
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        block = source.block(chosen, dtype, device)
        products = torch.empty((len(chosen), len(target)), dtype=dtype, device=device)
        for t in range(0, len(target), tile):
            torch.mm(block, target.block(slice(t, t + tile), dtype, device).T, out=products[:, t : t + tile])
        reached = torch.topk(products, k, dim=1).values[:, -1:]
        row, col = np.nonzero((products >= reached - close).cpu().numpy())
        exact = pair_scores(source, target, chosen[row], col, device)
        order = np.lexsort((col, -exact, row))
        first = np.searchsorted(row, np.arange(len(chosen)))
        take = order[first[:, None] + np.arange(k)]
        ids[start : start + step], scores[start : start + step] = col[take], exact[take]
    return ids, scores


def _contenders(
    scores: Float[np.ndarray, "n keep"], floor: Float[np.ndarray, " n"], k: int, base: float, relative: float
) -> tuple[Bool[np.ndarray, "n keep"], Float[np.ndarray, " n"]]:
    """Which entries of each shortlist can be among the best k, and the best fast score of all that is left out."""
    kth = scores[:, min(k, scores.shape[1]) - 1]
    cut = kth - 2 * (base + relative * np.abs(kth))
    listed = np.isfinite(scores)
    opened = listed & ~(scores < cut[:, None])
    left = np.max(np.where(listed & ~opened, scores, -np.inf), axis=1)
    return opened, np.maximum(left, floor)


def _settled(
    ids: Int[np.ndarray, "n keep"],
    opened: Bool[np.ndarray, "n keep"],
    exact: Float[np.ndarray, " opened"],
    left: Float[np.ndarray, " n"],
    k: int,
    base: float,
    relative: float,
) -> tuple[Lists, Bool[np.ndarray, " n"]]:
    """The best k of each list by exact score, and which lists are sure to be right."""
    scores = np.full(ids.shape, -np.inf, dtype=exact.dtype)
    scores[opened] = exact
    best = np.argsort(-scores, axis=1)
    ranked = np.take_along_axis(scores, best, axis=1)
    tied = np.flatnonzero(np.any((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] > -np.inf), axis=1))
    best[tied] = np.lexsort((ids[tied], -scores[tied]), axis=1)
    best = best[:, :k]
    ids, scores = np.take_along_axis(ids, best, axis=1), np.take_along_axis(scores, best, axis=1)
    return (ids, scores), scores[:, -1] > left + base + relative * np.abs(left)


def _base_error(source: UnitRows, target: UnitRows, found: Shortlist, relative: float, device: str) -> float:
    """Largest error of a sample of the shortlisted pairs beyond their rounding."""
    step = max(1, found.row_ids.size // SAMPLE)
    rows = np.arange(0, len(source), step)
    listed = found.row_ids[rows] >= 0
    at = rows[np.nonzero(listed)[0]]
    exact = pair_scores(source, target, at, found.row_ids[rows][listed], device)
    fast = found.row_scores[rows][listed]
    return float(np.max(np.abs(exact - fast) - relative * np.abs(fast), initial=0.0))

"""Blocked all-pairs products at the speed of the matrix unit, keeping only the best partners of every row and column.

The product is cheap in bfloat16, so that looking at its n² entries would cost more than computing them. Every tile is
therefore scanned while it is in the cache (``aligners.leaders``), and never again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from transfer.core.errors import TransferError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class UnitRows:
    """Rows of a matrix with their inverse lengths; the matrix may be memory-mapped and is not copied."""

    values: Float[np.ndarray, "n d"]
    inverse: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, values: Float[np.ndarray, "n d"], side: str = "") -> UnitRows:
        """Measure the rows.

        Raises:
            TransferError: For another shape than [n, d], a row that is zero, or one that is not finite.
        """
        name = f"{side} " if side else ""
        if values.ndim != 2 or not values.size:
            raise TransferError(f"The {name}directions have shape {values.shape}, top-k needs at least one row.")
        length = np.empty(len(values))
        for part in _cached_rows(values):
            row = np.asarray(values[part], dtype=np.float64)
            length[part] = np.sqrt(np.einsum("nd,nd->n", row, row))
        wrong = {"holds NaN or infinity": ~np.isfinite(length), "is zero and has no direction": length == 0}
        for what, bad in wrong.items():
            if bad.any():
                raise TransferError(
                    f"Row {int(np.argmax(bad))} of the {name}directions {what} ({int(bad.sum())} such rows).",
                    "Leave dead features out.",
                )
        return cls(values, 1 / length)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def exact(self) -> np.dtype:
        """Type that scores are given in: float64 for float64 rows, otherwise float32."""
        return np.dtype(np.float64 if self.values.dtype == np.float64 else np.float32)

    def block(self, rows: slice | np.ndarray, dtype: torch.dtype, device: str) -> torch.Tensor:
        """These rows at length one."""
        import torch

        values, inverse = self.values[rows], self.inverse[rows, None].astype(self.exact)
        block = torch.empty(values.shape, dtype=dtype)
        for part in _cached_rows(values):
            block[part] = torch.from_numpy(np.asarray(values[part], dtype=self.exact) * inverse[part])
        return block.to(device)


def _cached_rows(values: np.ndarray) -> Iterator[slice]:
    """Runs of rows whose float64 copy stays in the cache."""
    step = max(1, 2**16 // values.shape[1])
    return (slice(start, start + step) for start in range(0, len(values), step))


@dataclass(frozen=True)
class Tiling:
    """Shape of the tiles, which should stay in the cache."""

    rows: int = 2048
    cols: int = 1024
    first: int = 8192
    """Columns of the first tile of a strip: what is known of a row after it decides how much is opened later."""

    def spans(self, n_tgt: int) -> Iterator[tuple[int, int]]:
        """First column of every tile, and the one after its last."""
        edges = [0, *range(min(self.first, n_tgt), n_tgt, self.cols), n_tgt]
        return zip(edges[:-1], edges[1:], strict=True)


@dataclass(frozen=True)
class Shortlist:
    """For every row and every column its ``keep`` best by the fast product, best first.

    A pair outside the lists has a fast product of at most the floor of its row, and at most that of its column.
    """

    row_ids: Int[np.ndarray, "n_src keep"]
    """−1 where there are fewer; their scores are −inf."""
    row_scores: Float[np.ndarray, "n_src keep"]
    row_floor: Float[np.ndarray, " n_src"]
    col_ids: Int[np.ndarray, "n_tgt keep"]
    col_scores: Float[np.ndarray, "n_tgt keep"]
    col_floor: Float[np.ndarray, " n_tgt"]


def shortlist(x: UnitRows, y: UnitRows, keep: int, fast: torch.dtype, tiling: Tiling, device: str) -> Shortlist:
    """The ``keep`` best products of every row and every column, from one pass over the tiles.

    On the processor only **positive** products are listed, and the floor of a list that is not full is 0.

    Memory: ``y`` at ``fast`` (2·d·n_tgt bytes in bfloat16), a strip of ``x`` and one tile, 12·keep bytes a column in
    bfloat16 while it grows, and 12·keep bytes a row and a column of the result. On another device, the products of a
    strip with all of ``y``, twice.
    """
    return (_scanned if device == "cpu" else _selected)(x, y, keep, fast, tiling, device)


def _scanned(x: UnitRows, y: UnitRows, keep: int, fast: torch.dtype, tiling: Tiling, device: str) -> Shortlist:
    import torch

    from aligners.leaders import Leaders

    bits, ordered = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}[fast.itemsize]
    target = y.block(slice(0, len(y)), fast, device)
    columns = Leaders(len(y), keep, bits)
    space = torch.empty(tiling.rows * max(tiling.first, tiling.cols), dtype=fast)
    tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(x), tiling.rows):
        block = x.block(slice(start, start + tiling.rows), fast, device)
        rows = Leaders(len(block), keep, bits)
        for first, last in tiling.spans(len(y)):
            tile = space[: len(block) * (last - first)].view(len(block), last - first)
            torch.mm(block, target[first:last].T, out=tile)
            scores = tile.view(ordered).numpy()
            rows.offer_rows(scores, first)
            columns.offer_columns(scores, first, start)
        tables.append(rows.table()[:3])
    row_ids, row_scores, row_floor = (np.concatenate(part) for part in zip(*tables, strict=True))
    return Shortlist(row_ids, row_scores, row_floor, *columns.table()[:3])


def _selected(x: UnitRows, y: UnitRows, keep: int, fast: torch.dtype, tiling: Tiling, device: str) -> Shortlist:
    import torch

    target = y.block(slice(0, len(y)), fast, device)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    col_scores = torch.empty((len(y), 0), dtype=fast, device=device)
    col_ids = torch.empty((len(y), 0), dtype=torch.int64, device=device)
    for start in range(0, len(x), tiling.rows):
        products = x.block(slice(start, start + tiling.rows), fast, device) @ target.T
        found.append(torch.topk(products, min(keep, len(y)), dim=1))
        scores, ids = torch.topk(products.T.contiguous(), min(keep, len(products)), dim=1)
        both = torch.cat([col_scores, scores], dim=1)
        col_scores, at = torch.topk(both, min(keep, both.shape[1]), dim=1)
        col_ids = torch.cat([col_ids, ids + start], dim=1).gather(1, at)
    rows = torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])
    lists = []
    for scores, ids in (rows, (col_scores, col_ids)):
        # A list of all there is leaves nothing out.
        scores = scores.float().cpu().numpy()
        floor = scores[:, -1] if scores.shape[1] == keep else np.full(len(scores), -np.inf, np.float32)
        lists += [ids.cpu().numpy(), scores, floor]
    return Shortlist(*lists)

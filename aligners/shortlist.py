"""Blocked all-pairs products at the speed of the matrix unit, keeping only the best partners of every row and column.

The product is cheap in bfloat16, so that looking at its n² entries would cost more than computing them. Every tile is
therefore read by two vector maxima only, over groups of rows and over groups of columns; a group is opened when its
maximum beats a value that some ``keep`` entries of that row or column are known to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from transfer.core.errors import TransferError

if TYPE_CHECKING:
    import torch

STRIP_BYTES = 512 * 2**20
"""Products of one strip of source rows with all targets."""
GROUP = 16
"""Products that one maximum stands for."""
OPENED = 2**23
"""Pairs that are opened at once at most, should every group pass."""


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


class Leaders:
    """The best partners of every owner so far, one int64 a pair, so that one plain sort orders all.

    From the top: owner, score (reversed, in steps of ``1 / unit`` from −2 to 2), partner. Equal scores thus go to the
    lower id. Memory: 8 bytes a pair, for ``1.5 · owners · keep`` pairs, and three times that while merging.

    Args:
        owners: Features whose best partners are wanted.
        partners: Features they are sought among.
        keep: Partners of each.
        device: Of torch.
        carry: Numbers [pairs, 2] that travel with pairs, given their owners and partners; sorting then takes five
            times as long.
    """

    def __init__(
        self,
        owners: int,
        partners: int,
        keep: int,
        device: str = "cpu",
        carry: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        import torch

        self.owners, self.keep = owners, keep
        self.partner_bits = max(1, (partners - 1).bit_length())
        self.score_bits = min(31, 63 - self.partner_bits - max(1, (owners - 1).bit_length()))
        self.unit = 2.0 ** (self.score_bits - 2)
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.counts = torch.zeros(owners, dtype=torch.int64, device=device)
        self.carry = carry
        self.carried = torch.empty((0, 2), dtype=torch.float64, device=device)
        self.pending: list[torch.Tensor] = []
        self.pending_carried: list[torch.Tensor] = []

    def add(self, owner: torch.Tensor, partner: torch.Tensor, score: torch.Tensor) -> None:
        """Offer pairs, every pair once."""
        if self.carry is not None:
            self.pending_carried.append(self.carry(owner, partner))
        step = (2.0 - score.double()).mul_(self.unit).long()
        self.pending.append((((owner << self.score_bits) | step) << self.partner_bits) | partner)

    @property
    def waiting(self) -> int:
        """Pairs offered since the last merge."""
        return sum(len(p) for p in self.pending)

    def merge(self) -> None:
        """Keep the ``keep`` best of every owner."""
        import torch

        if not self.pending:
            return
        keys = torch.cat([self.keys, *self.pending])
        self.pending = []
        carried = self.carried
        if self.carry is not None:
            carried = torch.cat([self.carried, *self.pending_carried])
            self.pending_carried = []
            order = torch.from_numpy(np.argsort(keys.cpu().numpy())).to(keys.device)
            keys, carried = keys[order], carried[order]
        elif keys.device.type == "cpu":
            keys.numpy().sort()  # in place, and ten times as fast as torch
        else:
            keys = keys.sort().values
        owner = keys >> (self.score_bits + self.partner_bits)
        among = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        torch.ne(owner[self.keep :], owner[: -self.keep], out=among[self.keep :])
        self.keys = keys[among]
        if self.carry is not None:
            self.carried = carried[among]
        self.counts = torch.bincount(owner, minlength=self.owners).clamp(max=self.keep)

    def scores(self, keys: torch.Tensor) -> torch.Tensor:
        """Scores of keys, at most ``1 / unit`` below what was offered."""
        step = (keys >> self.partner_bits) & ((1 << self.score_bits) - 1)
        return 2.0 - (step + 1).double() / self.unit

    def floor(self) -> torch.Tensor:
        """What ``keep`` partners of an owner reach, and no other exceeds by more than ``1 / unit``; 0 with fewer."""
        import torch

        full = self.counts == self.keep
        last = (torch.cumsum(self.counts, 0) - 1)[full]
        floor = torch.zeros(self.owners, dtype=torch.float64, device=self.keys.device)
        floor[full] = self.scores(self.keys[last])
        return floor.clamp_(min=0.0)

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Partner ids [owners, keep] (−1 where there are fewer), their scores, and the floor."""
        import torch

        ids = torch.full((self.owners, self.keep), -1, dtype=torch.int64, device=self.keys.device)
        scores = torch.full(ids.shape, -np.inf, dtype=torch.float64, device=self.keys.device)
        filled = torch.arange(self.keep, device=self.keys.device) < self.counts[:, None]
        ids[filled] = self.keys & ((1 << self.partner_bits) - 1)
        scores[filled] = self.scores(self.keys)
        return ids.cpu().numpy(), scores.cpu().numpy(), self.floor().cpu().numpy()


@dataclass(frozen=True)
class Tiling:
    """Shape of the tiles: multiples of ``group``, which is how many products one maximum stands for."""

    rows: int
    cols: int
    group: int = GROUP

    @classmethod
    def fitting(cls, n_src: int, n_tgt: int, itemsize: int, strip_bytes: int = STRIP_BYTES) -> Tiling:
        """Strips of at most 4,096 rows and ``strip_bytes``, tiles of 2,048 columns."""
        group, cols = GROUP, 2048
        width = -(-n_tgt // cols) * cols
        rows = min(4096, strip_bytes // (itemsize * width), -(-n_src // group) * group)
        return cls(max(group, rows // group * group), cols, group)


@dataclass(frozen=True)
class Shortlist:
    """For every row and every column its ``keep`` best by the fast product, best first."""

    row_ids: Int[np.ndarray, "n_src keep"]
    row_scores: Float[np.ndarray, "n_src keep"]
    row_floor: Float[np.ndarray, " n_src"]
    col_ids: Int[np.ndarray, "n_tgt keep"]
    col_scores: Float[np.ndarray, "n_tgt keep"]
    col_floor: Float[np.ndarray, " n_tgt"]
    unit: float
    """Steps that scores were rounded to, per 1."""


def shortlist(x: UnitRows, y: UnitRows, keep: int, fast: torch.dtype, tiling: Tiling, device: str) -> Shortlist:
    """The ``keep`` best **positive** products of every row and every column, from one pass over the tiles.

    A pair outside the lists has a fast product of at most the floor of its row, and at most that of its column (0 for
    a list that is not full). Memory: ``y`` at ``fast`` (2·d·n_tgt bytes in bfloat16), one strip (``rows · n_tgt``
    products), an eighth of it for the maxima, and about 36·keep bytes a row and a column for the lists.
    """
    import torch

    bits = as_ordered(torch.empty(0, dtype=fast)).dtype
    rows, cols, group = tiling.rows, tiling.cols, tiling.group
    tiles = [_padded(y.block(slice(c, c + cols), fast, device), cols) for c in range(0, len(y), cols)]
    strip = torch.empty((len(tiles), rows, cols), dtype=fast, device=device)
    by_row = torch.empty((rows, len(tiles), cols // group), dtype=bits, device=device)
    columns = Leaders(len(y), len(x), keep, device)
    thresholds = torch.zeros(len(tiles) * cols, dtype=bits, device=device)
    tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    unit = columns.unit
    for start in range(0, len(x), rows):
        live = min(rows, len(x) - start)
        block = _padded(x.block(slice(start, start + rows), fast, device), rows)
        for t, tile in enumerate(tiles):
            torch.mm(block, tile.T, out=strip[t])
            strip[t, live:] = -torch.inf
            strip[t, :, len(y) - t * cols :] = -torch.inf
            by_row[:, t] = torch.amax(as_ordered(strip[t]).view(rows, group, -1), 1)
            offer_columns(columns, strip[t], thresholds[t * cols :][:cols], (start, t * cols), group)
        if start == 0 or columns.waiting > len(y) * keep // 4:
            columns.merge()
            thresholds[: len(y)] = as_ordered(columns.floor().to(fast))
        best = Leaders(rows, len(y), keep, device)
        offer_rows(best, strip, by_row[:live])
        best.merge()
        unit = min(unit, best.unit)
        ids, scores, floor = best.table()
        tables.append((ids[:live], scores[:live], floor[:live]))
    columns.merge()
    row_ids, row_scores, row_floor = (np.concatenate(part) for part in zip(*tables, strict=True))
    return Shortlist(row_ids, row_scores, row_floor, *columns.table(), unit)


# Non-negative floats order like the integers of their bits, and negative ones are negative integers: so the maxima and
# comparisons run on integers (three times as fast for bfloat16), and thresholds are never below 0.


def as_ordered(values: torch.Tensor) -> torch.Tensor:
    """The bits of floats as integers."""
    import torch

    return values.view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize])


def offer_columns(columns: Leaders, tile: torch.Tensor, known: torch.Tensor, at: tuple[int, int], group: int) -> None:
    """Offer the positive entries of a tile [rows, cols] that may be among the best of their column.

    Args:
        columns: What to offer to.
        tile: Scores; the number of rows is a multiple of ``group``.
        known: For each column, bits of a value that ``columns.keep`` entries already offered reach, or 0.
        at: First row and first column of the tile.
        group: Rows of which one maximum is taken.
    """
    import torch

    grouped = as_ordered(tile).view(-1, group, tile.shape[1])
    maxima = torch.amax(grouped, 1)
    floor = known
    if at[0] == 0 and len(maxima) >= columns.keep:
        # Nothing is known yet: as many groups as are kept reach this, so at least as many entries do.
        reached = torch.topk(maxima.T.contiguous(), columns.keep, dim=1).values[:, -1]
        floor = torch.maximum(known, reached - 1)
    where, col = true_entries(maxima > floor)
    members = grouped[where, :, col]
    hit, member = true_entries(members > floor[col, None])
    columns.add(at[1] + col[hit], at[0] + where[hit] * group + member, members[hit, member].view(tile.dtype))


def offer_rows(best: Leaders, strip: torch.Tensor, by_row: torch.Tensor) -> None:
    """Offer the positive entries that may be among the best of their row.

    Args:
        best: What to offer to; its owners are the rows of the strip.
        strip: Scores of some rows with everything, [tiles, rows, cols].
        by_row: Bits of the maxima of every ``cols / groups`` entries, ``groups`` apart, [live rows, tiles, groups].
    """
    import torch

    tiles, _, cols = strip.shape
    ordered = as_ordered(strip)
    live, _, groups = by_row.shape
    step = max(1, OPENED // (tiles * cols))
    flat = by_row.reshape(live, -1)
    coarse = next((s for s in (16, 8, 4, 2) if flat.shape[1] % s == 0 and flat.shape[1] // s >= 4 * best.keep), 1)
    for start in range(0, live, step):
        part = flat[start : start + step]
        floor = torch.zeros(len(part), dtype=part.dtype, device=part.device)
        if part.shape[1] >= best.keep:
            upper = torch.amax(part.view(len(part), coarse, -1), 1)
            floor = (torch.topk(upper, best.keep, dim=1).values[:, -1] - 1).clamp_(min=0)
        row, where = true_entries(part > floor[:, None])
        tile, column = where // groups, where % groups
        members = ordered.view(tiles, strip.shape[1], -1, groups)[tile, start + row, :, column]
        hit, member = true_entries(members > floor[row, None])
        partner = tile[hit] * cols + member * groups + column[hit]
        best.add(start + row[hit], partner, members[hit, member].view(strip.dtype))


def true_entries(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the true entries of a matrix."""
    import torch

    if mask.device.type != "cpu":
        row, col = torch.nonzero(mask, as_tuple=True)
        return row, col
    # numpy skips false stretches, six times as fast as torch where few entries are true.
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    row = torch.div(flat, mask.shape[1], rounding_mode="floor")
    return row, flat - row * mask.shape[1]


def _padded(block: torch.Tensor, rows: int) -> torch.Tensor:
    import torch

    return block if len(block) == rows else torch.nn.functional.pad(block, (0, 0, 0, rows - len(block)))

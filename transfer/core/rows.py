"""Rows of a matrix that is too large to copy: chosen now, read block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
    """What rows can be read from: an array, a memory map, or a file reader."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, width)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """The values of a slice or of row numbers."""
        ...


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Some rows of ``base``, read anew each time they are asked for; memory is that of what is asked for."""

    base: Rows
    rows: np.ndarray
    """Row numbers of ``base``, int64 [n]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, width)."""
        return (len(self.rows), self.base.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.base.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The values of a slice or of row numbers."""
        return self.base[self.rows[rows]]


def chosen(values: Rows, rows: np.ndarray) -> Rows:
    """These rows: of an array in memory a copy, of anything else still unread."""
    if isinstance(values, np.ndarray) and not isinstance(values, np.memmap):
        return values[rows]
    return ChosenRows(values.base, values.rows[rows]) if isinstance(values, ChosenRows) else ChosenRows(values, rows)

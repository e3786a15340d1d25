"""Loops that no library has, compiled by numba when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def compiled(loop: Callable[P, R]) -> Callable[P, R]:
    """``loop`` as machine code that lets other threads run, kept beside its source or in the user's cache."""
    from numba import njit

    try:
        return njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # neither place can be written: it is compiled anew in every process
        return njit(nogil=True)(loop)

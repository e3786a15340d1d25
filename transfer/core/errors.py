"""One error class for everything a user can repair."""

from __future__ import annotations


class TransferError(Exception):
    """A problem the user can repair; printed without a traceback, exit code 2.

    Args:
        what: What is wrong, and where.
        hint: The repair.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint

    def __str__(self) -> str:
        what = super().__str__()
        return f"{what} {self.hint}" if self.hint else what


class NoSpaceError(TransferError):
    """The disk is full: going on with other work would only fail again."""


class StageError(TransferError):
    """A stage failed but everything finished so far is kept; exit code 3, the same command resumes."""

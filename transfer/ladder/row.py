"""One line of the ladder: a case, what was measured, what was expected, and whether that came true."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.files import plain

LEVEL = 0.05
"""q-value up to which a match counts as accepted."""

Finding = tuple[dict[str, Any], bool | None]
"""What was measured, and whether it is as expected; None where nothing is expected."""


@dataclass(frozen=True)
class Row:
    """One case of one rung."""

    rung: str
    """``G0`` … ``G6``."""
    case: str
    method: str
    measured: dict[str, Any]
    expected: str
    passed: bool | None
    """None where the numbers are context and nothing is expected of them."""
    seconds: float
    """Of the clock, with what this case is the first to load or harvest."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; NaN becomes null."""
        return plain(dataclasses.asdict(self))

    def text(self) -> str:
        """The measured numbers in one line."""
        return ", ".join(f"{name} {_number(value)}" for name, value in self.measured.items())


def judged(rung: str, case: str, method: str, expected: str, work: Callable[[], Finding]) -> Row:
    """Do the work of one case and time it; what the suite refuses is a failed row that says why."""
    start = time.monotonic()
    try:
        measured, passed = work()
    except TransferError as error:
        measured, passed = {"refused": str(error)}, False
    row = Row(rung, case, method, measured, expected, passed, time.monotonic() - start)
    say(f"{rung} {case} ({method})  {row.text()}  {VERDICT[row.passed]}")
    return row


VERDICT = {True: "pass", False: "FAIL", None: "-"}


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if math.isnan(value):
        return "-"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    # Nearly all is not all.
    return f"{value:.5f}" if 0.999 < value < 1 else f"{value:.3f}"

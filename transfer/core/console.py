"""The only module that prints: status lines, progress with rate and ETA, JSON output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from transfer.core.errors import TransferError

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence status lines and progress (``--quiet``, ``--json``), never what ``complain`` says."""
    global _quiet
    _quiet = quiet


def say(line: str) -> None:
    """One status line on standard error."""
    if not _quiet:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def complain(line: str) -> None:
    """Why the command failed: one line on standard error, whatever was asked to be silent."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def show(value: Any) -> None:
    """One result on standard output: text as it is, everything else as JSON.

    Raises:
        TransferError: When standard output takes no more; a reader that left (``| head``) is no error.
    """
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        close_output()
    except OSError as error:
        close_output()
        raise TransferError(
            f"Cannot write to standard output ({error.strerror}).", "What was computed is kept."
        ) from None


def close_output() -> None:
    """Let nothing be written any more, not even what the interpreter flushes as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Progress over ``total`` units; yields the function that advances it.

    On a terminal it is one live line with rate and ETA; elsewhere a plain line after two seconds, then at most every
    ten, so that short work prints nothing.
    """
    start = time.monotonic()
    done = 0
    if not _quiet and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, unit=unit, rate="")

            def advance_bar(n: int) -> None:
                nonlocal done
                done += n
                rate = done / max(time.monotonic() - start, 1e-9)
                bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s")

            yield advance_bar
        return
    last = start - 8

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = done / (now - start)
            left = max(total - done, 0) / max(rate, 1e-9)
            say(f"{label}  {done}/{total} {unit}  {rate:,.1f} {unit}/s  about {left:.0f} s left")

    yield advance

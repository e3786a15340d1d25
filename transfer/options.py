"""What all verbs of the command line share: common options, and the command as typed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

TextColumn = Annotated[str | None, typer.Option(help="Column that holds the text.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No status lines.")]


def command_line() -> list[str]:
    """The command line as it can be typed again."""
    program = Path(sys.argv[0])
    started = ["python", "-m", "transfer"] if program.name == "__main__.py" else [program.name]
    folder = os.environ.get("TRANSFER_RUNS")
    return [*([f"TRANSFER_RUNS={folder}"] if folder else []), *started, *sys.argv[1:]]

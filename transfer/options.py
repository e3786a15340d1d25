"""What all verbs of the command line share: common options, groups with a default verb, and the command as typed."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

TextColumn = Annotated[str | None, typer.Option(help="Column that holds the text.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No status lines.")]


class RunByDefault(TyperGroup):
    """What is no verb of the group is an experiment: ``align demo`` means ``align run demo``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` before what is no verb, unless it is a misspelt one."""
        if args and args[0] not in self.commands and args[0] != "--help":
            misspelt = difflib.get_close_matches(args[0], self.commands, 1) and not Path(args[0]).exists()
            args = args if misspelt else ["run", *args]
        return super().parse_args(ctx, args)


def command_line() -> list[str]:
    """The command line as it can be typed again."""
    program = Path(sys.argv[0])
    started = ["python", "-m", "transfer"] if program.name == "__main__.py" else [program.name]
    folder = os.environ.get("TRANSFER_RUNS")
    return [*([f"TRANSFER_RUNS={folder}"] if folder else []), *started, *sys.argv[1:]]

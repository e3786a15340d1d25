"""What all verbs of the command line share: common options, groups with a default verb, and the command as typed."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from transfer.core.errors import TransferError

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


def refuse_unread(context: typer.Context, names: Sequence[str], where: str, repair: str) -> None:
    """Refuse options that were typed and that nothing would read.

    Args:
        context: Of the verb.
        names: Parameters of the verb, such as ``always_on``.
        where: When they do nothing, such as ``with --experiment``.
        repair: What to write instead.

    Raises:
        TransferError: Naming the options.
    """
    flags = {p.name: max(p.opts, key=len) for p in context.command.params}
    typed = [flags[n] for n in names if (source := context.get_parameter_source(n)) and source.name == "COMMANDLINE"]
    if typed:
        does = "does" if len(typed) == 1 else "do"
        raise TransferError(f"{' and '.join(typed)} {does} nothing {where}.", repair)


def command_line() -> list[str]:
    """The command line as it can be typed again."""
    program = Path(sys.argv[0])
    started = ["python", "-m", "transfer"] if program.name == "__main__.py" else [program.name]
    folder = os.environ.get("TRANSFER_RUNS")
    return [*([f"TRANSFER_RUNS={folder}"] if folder else []), *started, *sys.argv[1:]]

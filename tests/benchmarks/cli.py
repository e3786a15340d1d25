"""``transfer --help`` in a fresh process against a bare interpreter that imports Typer (the limit and the peer)."""

from __future__ import annotations

import subprocess
import sys

from tests.benchmarks.case import measure, row


def main() -> None:
    """Starts per second."""

    def run(*args: str) -> None:
        subprocess.run([sys.executable, *args], check=True, capture_output=True)

    taken = measure(
        {"ours": lambda: run("-m", "transfer", "--help"), "bare": lambda: run("-c", "import typer")}, rounds=7
    )
    row("cli.help", 1 / taken["ours"], "python -c 'import typer'", 1 / taken["bare"], "starts/s", 1 / taken["bare"])

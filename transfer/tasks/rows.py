"""Rows of JSON files, packed or not, with the place of each."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfer.core.errors import TransferError
from transfer.core.files import read_json
from transfer.core.keys import digest
from transfer.hub import HUB, hub_rows, load_hub, parse_hub


def read_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a ``.jsonl``, ``.jsonl.xz`` or ``.json`` file (a list) or of ``hub:…``, each with where it stands.

    Raises:
        TransferError: For a missing or broken file, or a row that is no object.
    """
    if str(path).startswith(HUB):
        yield from hub_rows(str(path), load_hub(str(path)))
        return
    path = Path(path)
    if not path.is_file():
        raise TransferError(f"{path} does not exist or is no file.", "Check the path.")
    if path.suffix == ".json":
        found = read_json(path)
        numbered = ((f"{path} row {i}", row) for i, row in enumerate(found if isinstance(found, list) else [found], 1))
    else:
        numbered = _lines(path)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise TransferError(f"{where} is a JSON {type(row).__name__}, not an object with columns.")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    unpacked = lzma.open if path.suffix == ".xz" else open
    try:
        with unpacked(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield f"{path} line {number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise TransferError(f"{path} line {number} is not valid JSON ({error.msg}).") from None
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise TransferError(f"{path} cannot be read ({error}).", "Save it as UTF-8.") from None


def identity(row: dict[str, Any], *parts: Any) -> str:
    """A row's ``id`` where it has one, else a hash of what it says."""
    own = row.get("id")
    return str(own) if own not in (None, "") else digest(list(parts), 12)


def name_of(path: Path | str) -> str:
    """What a set is called in messages: its file's name, or the data set on the Hub."""
    return parse_hub(str(path)).dataset if str(path).startswith(HUB) else Path(path).name

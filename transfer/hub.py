"""Data sets on the Hugging Face Hub by one reference: which file or split, which rows, which columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from transfer.core.errors import TransferError

HUB = "hub:"
FORM = "hub:<owner>/<dataset>@<revision>[?config=…&split=…&file=…&rows=…&text=…&label=…&<column>=<value>]"
_NAMED = ("config", "split", "file", "rows", "text", "label")


class UnreachableError(TransferError):
    """A data set that is neither cached nor reachable: nothing is known of what is in it."""


@dataclass(frozen=True)
class HubRef:
    """What a ``hub:`` reference says."""

    dataset: str
    revision: str = "main"
    config: str | None = None
    split: str = "train"
    file: str | None = None
    """One file of the repository, for those that hold several sets."""
    rows: int | None = None
    """A sample of this many rows, the same for every run, in their order."""
    text: str | None = None
    """Column of the text, where it differs from the experiment's."""
    label: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    """Columns and the value that a row must have there."""


def parse_hub(ref: str) -> HubRef:
    """Read a reference such as ``hub:lmsys/toxic-chat@main?config=toxicchat0124&split=test&human_annotation=True``.

    Raises:
        TransferError: When it names no data set, or ``rows`` is no number.
    """
    place, _, query = ref.removeprefix(HUB).partition("?")
    dataset, _, revision = place.partition("@")
    if not dataset:
        raise TransferError(f"{ref!r} names no dataset.", f"Write {FORM}.")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise TransferError(f"{ref!r} cannot be read ({error}).", f"Write {FORM}.") from None
    given = dict(pairs)
    named: dict[str, Any] = {k: given.pop(k) for k in _NAMED if k in given}
    if "rows" in named:
        if not named["rows"].isdigit() or not int(named["rows"]):
            raise TransferError(f"{ref!r} asks for {named['rows']!r} rows.", "Give a positive number.")
        named["rows"] = int(named["rows"])
    return HubRef(dataset, revision or "main", where=tuple(given.items()), **named)


def load_hub(ref: str) -> Any:
    """The rows that a reference names, as a ``datasets.Dataset``.

    Raises:
        UnreachableError: When it is neither cached nor reachable, or the Hub has no such thing.
        TransferError: For a column that is not there, or when no row is left.
    """
    named = parse_hub(ref)
    try:
        from datasets import load_dataset
    except ImportError:
        raise TransferError(f"Reading {ref} from the Hub needs `datasets`.", "Run `pip install datasets`.") from None
    try:
        found: Any = load_dataset(
            named.dataset, named.config, split=named.split, revision=named.revision, data_files=named.file
        )
    except Exception as error:  # noqa: BLE001 - any of a dozen network and Hub errors; one sentence for all
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise UnreachableError(
            f"Cannot load {named.dataset}@{named.revision} (split {named.split!r}) from the Hub: "
            f"{type(error).__name__}: {reason}.",
            "Check the name and the network, or download it and pass the file.",
        ) from None
    return chosen(ref, named, found)


def chosen(ref: str, named: HubRef, found: Any) -> Any:
    """The rows of a loaded data set that a reference asks for."""
    for column, value in named.where:
        if column not in found.column_names:
            near = difflib.get_close_matches(column, [*found.column_names, *_NAMED], n=1)
            raise TransferError(
                f"{ref} has no column {column!r}.",
                f"Did you mean {near[0]!r}?" if near else f"There is: {', '.join(sorted(found.column_names))}.",
            )
        found = found.select([i for i, have in enumerate(found[column]) if str(have) == value])
    if named.rows is not None and named.rows < len(found):
        found = found.select(np.sort(np.random.default_rng(0).choice(len(found), named.rows, replace=False)))
    if not len(found):
        raise TransferError(f"{ref} leaves no row.", "Look at the values of the columns it names.")
    return found


def hub_rows(ref: str, dataset: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with the place of each."""
    for number, row in enumerate(dataset, start=1):
        yield f"{ref} row {number}", dict(row)

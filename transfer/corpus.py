"""Read a corpus: the bundled set, a JSONL, CSV, TSV or parquet file, or a Hugging Face dataset.

Bad rows are never skipped: the first one is named with its place, so that a corpus is either whole or refused.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transfer.core.errors import TransferError
from transfer.core.files import read_json
from transfer.core.texts import Corpus, Text
from transfer.hub import HUB, hub_rows, load_hub, parse_hub

DATA = Path(__file__).parent / "data"
BUNDLED = "bundled:"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LABELS = ("label", "intent")
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns read in place of a missing ``text``: of a conversation, the user's turns are the text."""

Row = tuple[str, dict[str, Any]]
"""Where a row stands, and its columns."""


def load_corpus(
    ref: str,
    *,
    text_column: str = "text",
    label_column: str | None = None,
    topic_column: str | None = None,
    split_column: str | None = None,
    id_column: str | None = None,
    name: str | None = None,
) -> Corpus:
    """Read a corpus whole.

    Args:
        ref: ``bundled:requests``, a path to a ``.jsonl``/``.json``/``.csv``/``.tsv``/``.parquet`` file, or
            ``hub:<dataset id>[@<revision>][?…]`` (see ``transfer.hub.HubRef``), whose ``text`` and ``label`` go before
            the columns named here.
        text_column: Column with the text, or with a conversation, whose user turns are taken; by default also one of
            ``CONVERSATIONS``. Leading and trailing white space is cut.
        label_column: Class label; by default ``label`` or ``intent`` where there is one.
        topic_column: Topic; by default ``topic`` where there is one.
        split_column: Split; by default ``split`` where there is one.
        id_column: Identity; by default ``id`` where there is one, else the row number.
        name: Name of the corpus; by default the file's or dataset's.

    Returns:
        The corpus, rows in the order read.

    Raises:
        TransferError: For a missing or broken file, an unknown column, an empty text, no rows, or a repeated id.
    """
    labels = None
    if ref.startswith(BUNDLED):
        wanted = ref.removeprefix(BUNDLED)
        path = DATA / f"{wanted}.jsonl"
        if not wanted or not path.is_file():
            raise TransferError(
                f"There is no bundled corpus {wanted!r}.", _did_you_mean(wanted, [p.stem for p in DATA.glob("*.jsonl")])
            )
        rows, title = _jsonl(path), wanted
    elif ref.startswith(HUB):
        named, loaded = parse_hub(ref), load_hub(ref)
        text_column, label_column = named.text or text_column, named.label or label_column
        rows, title, labels = hub_rows(ref, loaded), named.dataset, getattr(loaded, "features", None)
    else:
        rows, title = _file(Path(ref)), Path(ref).stem
    columns = _Columns(ref, text_column, label_column, topic_column, split_column, id_column)
    return _collect(ref, name or title, rows, columns, labels)


class _Columns:
    """Which column is what, settled on the first row."""

    def __init__(self, ref: str, text: str, label: str | None, topic: str | None, split: str | None, id_: str | None):
        self._ref, self._named = ref, {"text": text, "label": label, "topic": topic, "split": split, "id": id_}
        self.names: dict[str, str | None] = {}

    def settle(self, present: list[str]) -> None:
        defaults = {"label": _LABELS, "topic": ("topic",), "split": ("split",), "id": ("id",)}
        for role, column in self._named.items():
            if role == "text" and column == "text" and column not in present:
                column = next((c for c in CONVERSATIONS if c in present), column)
            if column is not None and column not in present:
                raise TransferError(f"{self._ref} has no column {column!r}.", _did_you_mean(column, present))
            found = (c for c in defaults.get(role, ()) if c in present)
            self.names[role] = column if column is not None else next(found, None)


def _collect(ref: str, title: str, rows: Iterable[Row], columns: _Columns, features: Any) -> Corpus:
    texts: list[Text] = []
    seen: dict[str, str] = {}
    to_name: Any = None
    for where, row in rows:
        if not texts:
            columns.settle(list(row))
            kind = features.get(columns.names["label"]) if features and columns.names["label"] else None
            to_name = getattr(kind, "int2str", None)  # a Hub class label is stored as a number
        values = {role: "" if c is None else row.get(c) for role, c in columns.names.items()}
        text = _text(where, str(columns.names["text"]), values["text"])
        identity = str(values["id"]) if columns.names["id"] else f"row{len(texts):07d}"
        if columns.names["id"] and values["id"] in (None, ""):
            raise TransferError(f"{where} has an empty {columns.names['id']!r}.", "Give every row an id of its own.")
        if identity in seen:
            raise TransferError(f"{where} repeats the id {identity!r} of {seen[identity]}.", "Ids must be distinct.")
        seen[identity] = where
        label = values["label"]
        if to_name is not None and isinstance(label, int) and label >= 0:
            label = to_name(label)
        texts.append(Text(identity, text, _plain(label), _plain(values["topic"]), _plain(values["split"])))
    if not texts:
        raise TransferError(f"{ref} has no rows.", "Give a file with at least one text.")
    return Corpus(title, tuple(texts))


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _text(where: str, column: str, value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value):
        value = _asked(value)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"a {type(value).__name__}, not a text"
        raise TransferError(f"{where}: column {column!r} is {kind}.", "Name the right one with text_column.")
    text = value.strip()
    if not text:
        raise TransferError(f"{where} has an empty text in column {column!r}.", "Remove the row or fill it.")
    try:
        text.encode("utf8")
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape: no tokenizer can read it
        raise TransferError(
            f"{where} holds half of a surrogate pair, which is not a character.", "Repair the text."
        ) from None
    return text


def _asked(turns: Iterable[dict[str, Any]]) -> str:
    """What the user says in a conversation, turn by turn (OpenAI's role/content or ShareGPT's from/value)."""
    said = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
    return "\n\n".join(str(words) for role, words in said if role in ("user", "human") and words)


def _did_you_mean(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"There is: {', '.join(sorted(known)) or 'none'}."


def _file(path: Path) -> Iterator[Row]:
    if not path.exists():
        raise TransferError(f"The corpus {path} does not exist.", "Check the path, or use bundled:requests.")
    if path.is_dir():
        raise TransferError(f"The corpus {path} is a folder.", "Name one file in it.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TransferError(f"{path} is of no known kind ({suffix or 'no suffix'}).", f"Known: {', '.join(SUFFIXES)}.")
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".json":
        return _json(path)
    return _jsonl(path) if suffix in (".jsonl", ".ndjson") else _csv(path, "\t" if suffix == ".tsv" else ",")


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        # newline="\n": U+2028 and its kin may stand inside a text and must not end a line.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line.rstrip("\r\n"))  # else a line cut short has its error in a second one
                except json.JSONDecodeError as error:
                    raise TransferError(f"{where} is not valid JSON ({error.msg}, column {error.colno}).") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
                    raise TransferError(f"{where} cannot be read as JSON ({error}).") from None
                if not isinstance(row, dict):
                    raise TransferError(f"{where} is a JSON {type(row).__name__}, not an object with columns.")
                yield where, row
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise TransferError(f"Cannot read {path}: {error.strerror}.") from None


def _not_utf8(path: Path) -> TransferError:
    """The error for a file whose bytes are no UTF-8, with the line of the first that is not."""
    number = 0
    with path.open("rb") as lines:  # decoding reads ahead of the line it hands out
        for number, line in enumerate(lines, start=1):  # noqa: B007 - used behind the loop
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError:
                break
    return TransferError(f"{path} line {number} is not UTF-8.", "Save the file as UTF-8.")


def _json(path: Path) -> Iterator[Row]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TransferError(f"{path} is not a JSON list of objects with columns.", "Save it as JSON lines (.jsonl).")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    line = 0
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter=delimiter, strict=True, restkey="\0rest", restval="\0short")
            for row in reader:
                line = reader.line_num
                where = f"{path} line {line}"
                if "\0rest" in row or "\0short" in row.values():
                    raise TransferError(f"{where} does not have the columns of the header.", "Quote its text.")
                yield where, row
    except csv.Error as error:
        raise TransferError(f"{path} is broken after line {line} ({error}).", "Check its quotes.") from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise TransferError(f"Cannot read {path}: {error.strerror}.") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TransferError(f"Reading {path} needs pyarrow.", "Run `pip install pyarrow`.") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise TransferError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}).") from None
    except OSError as error:
        raise TransferError(f"Cannot read {path}: {error}.") from None

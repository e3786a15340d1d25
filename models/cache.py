"""Answers of chat models kept in one SQLite file, so that nothing is paid for twice and a killed run goes on."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

from models.chat import Answer, Chat
from transfer.core.errors import NoSpaceError, TransferError

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL,
    n_prompt INTEGER NOT NULL, n_written INTEGER NOT NULL, finish TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS spending (
    account TEXT NOT NULL, model TEXT NOT NULL, n_prompt INTEGER NOT NULL, n_written INTEGER NOT NULL,
    PRIMARY KEY (account, model)
);
"""
WAIT = 60.0
"""Seconds to wait for another process that is writing."""


class AnswerCache:
    """Answers by request and model, and what each account has spent.

    The key is ``Chat.hash`` of the whole request with the model's name and with who serves it: two servers may call
    different models by one name. The request itself is stored too and compared. Every answer is one transaction on
    disk before it is used, so a killed process loses at most what it was waiting for. Threads and processes may share
    a file. Spending is booked by account and model, whoever serves it.

    Args:
        path: The file; made with its folders when missing.

    Raises:
        TransferError: When the file is no such cache, or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        with self._plainly():
            self._db = sqlite3.connect(self.path, timeout=WAIT, check_same_thread=False, isolation_level=None)
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")  # answers cost more than a flush does
                self._db.executescript(_TABLES)
            except sqlite3.Error:
                self._db.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Errors of SQLite as a sentence."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise NoSpaceError(f"No space left to write {self.path}.", "Free some and run it again.") from None
            raise TransferError(
                f"The answer cache {self.path} cannot be used ({error}).", "Check that its folder can be written."
            ) from None
        except sqlite3.DatabaseError as error:
            raise TransferError(
                f"{self.path} is no answer cache ({error}).", "Move it away and run the same command again."
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._plainly():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def get(self, model: str, chat: Chat, server: str = "") -> Answer | None:
        """The answer that ``model`` of ``server`` gave to this request, marked as cached; None when it never did."""
        served = _served(model, server)
        with self._lock, self._plainly():
            row = self._db.execute(
                "SELECT model, request, text, n_prompt, n_written, finish FROM answers WHERE key = ?",
                (chat.hash(served),),
            ).fetchone()
        if row is None or row[:2] != (served, _request(chat)):
            return None
        return Answer(row[2], row[3], row[4], row[5], cached=True)

    def put(self, model: str, chat: Chat, answer: Answer, account: str = "", server: str = "") -> None:
        """Keep an answer and book its tokens on ``account``, together or not at all."""
        served = _served(model, server)
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    chat.hash(served),
                    served,
                    _request(chat),
                    answer.text,
                    answer.n_prompt,
                    answer.n_written,
                    answer.finish,
                ),
            )
            _book(db, account, model, answer.n_prompt, answer.n_written)

    def book(self, model: str, n_prompt: int, n_written: int, account: str = "") -> None:
        """Book tokens that may have been paid for without an answer."""
        with self._transaction() as db:
            _book(db, account, model, n_prompt, n_written)

    def spent(self, model: str, account: str = "") -> tuple[int, int]:
        """Tokens read and written by ``model`` for an account, in all runs that shared this file."""
        with self._lock, self._plainly():
            row = self._db.execute(
                "SELECT n_prompt, n_written FROM spending WHERE account = ? AND model = ?", (account, model)
            ).fetchone()
        return (int(row[0]), int(row[1])) if row else (0, 0)

    def __len__(self) -> int:
        with self._lock, self._plainly():
            return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


def _served(model: str, server: str) -> str:
    """What answers are kept under."""
    return f"{model} of {server}" if server else model


def _request(chat: Chat) -> str:
    return json.dumps(asdict(chat), sort_keys=True, ensure_ascii=False)


def _book(db: sqlite3.Connection, account: str, model: str, n_prompt: int, n_written: int) -> None:
    db.execute(
        "INSERT INTO spending VALUES (?, ?, ?, ?) ON CONFLICT (account, model) DO UPDATE SET"
        " n_prompt = n_prompt + excluded.n_prompt, n_written = n_written + excluded.n_written",
        (account, model, n_prompt, n_written),
    )

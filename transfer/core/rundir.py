"""Content-keyed stages: the same inputs are reused, changed inputs make a new folder, a killed stage goes on."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transfer.core.console import say
from transfer.core.errors import NoSpaceError, StageError, TransferError
from transfer.core.files import file_hash, read_json, remove_leftovers, replacing, write_json
from transfer.core.keys import SCHEMA, digest


def runs_folder() -> Path:
    """Where runs go: ``$TRANSFER_RUNS`` or ``runs`` in the current folder.

    Raises:
        TransferError: When it cannot be written.
    """
    folder = Path(os.environ.get("TRANSFER_RUNS", "runs"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TransferError(f"Cannot write to {folder} ({error.strerror}).", "Set TRANSFER_RUNS to a folder.") from None
    return folder


class RunDir:
    """One experiment's folder under ``runs/``, and the shared store of finished stages beside it.

    ``runs/.store/<stage>/<key>/`` holds ``key.json`` (the inputs in clear), the stage's files and ``DONE``, written
    last, with their sizes and hashes. ``runs/<name>/`` holds what a reader wants: ``results.json``, ``details.json``,
    ``report.html``, ``manifest.json``, ``experiment.yaml``, ``stages.json`` and ``events.jsonl``.
    """

    def __init__(self, runs: Path, name: str) -> None:
        self.path = Path(runs) / name
        self.store = Path(runs) / ".store"
        self.seconds: dict[str, float] = {}
        self.stages: dict[str, str] = {}

    def event(self, stage: str, what: str, **more: Any) -> None:
        """Append one line to ``events.jsonl``."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "stage": stage, "event": what, **more}
        with (self.path / "events.jsonl").open("a", encoding="utf8") as handle:
            handle.write(json.dumps(line) + "\n")

    def place(self, name: str, inputs: dict[str, Any]) -> Path:
        """Folder of a stage with these inputs, finished or not."""
        return self.store / name / digest({"stage": name, "schema": SCHEMA, **inputs})

    def stage(self, name: str, inputs: dict[str, Any], work: Callable[[Path], None], label: str = "") -> Path:
        """Run ``work(folder)`` unless the same inputs have been worked through before.

        Args:
            name: Stage name.
            inputs: Everything the result depends on (JSON-able); its hash is the key.
            work: Writes the stage's files into the folder; must be able to go on from what an earlier, killed run
                left there.
            label: Distinguishes several stages of one name in messages, such as the model.

        Returns:
            The finished stage's folder.
        """
        title = f"{name} {label}".strip()
        folder = self.place(name, inputs)
        key = folder.name
        self.stages[title] = f"{name}/{key}"
        if finished(folder):
            say(f"{title}  reused {key[:6]}")
            self.event(title, "reused", key=key)
            self.seconds.setdefault(title, read_json(folder / "DONE")["seconds"])
            return folder
        resumed = (folder / "key.json").exists()
        self.event(title, "resumed" if resumed else "started", key=key)
        if not resumed and (why := self._difference(title, inputs)):
            say(f"{title}  {why}")
        start = time.monotonic()
        remove_leftovers(folder)
        write_json(folder / "key.json", {"stage": name, "title": title, "inputs": inputs})
        try:
            work(folder)
        except (StageError, NoSpaceError):
            raise  # what is finished stays, and the same command goes on
        except TransferError:
            self._forget(folder, title, key)
            raise
        seconds = time.monotonic() - start
        mark_done(folder, seconds)
        self.seconds[title] = seconds
        self.event(title, "done", key=key, seconds=round(seconds, 2))
        say(f"{title}  done in {seconds:.1f} s")
        return folder

    def save_stages(self) -> None:
        """Write ``stages.json``; stages that an earlier command reached and this one did not stay listed."""
        known = self.path / "stages.json"
        before = read_json(known) if known.exists() else {}
        write_json(known, {**before, **self.stages})

    def _forget(self, folder: Path, title: str, key: str) -> None:
        """Leave nothing of a stage that refused its input before it wrote anything, nor of a run that is only that."""
        if {p.name for p in folder.iterdir()} == {"key.json"}:
            shutil.rmtree(folder)
        self.event(title, "refused", key=key)
        events = [line["event"] for line in self._events()]
        if (
            events.count("command") <= 1
            and not {"done", "reused"} & set(events)
            and {p.name for p in self.path.iterdir()} == {"events.jsonl"}
        ):
            shutil.rmtree(self.path)

    def _events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text("utf8").splitlines()]

    def _difference(self, title: str, inputs: dict[str, Any]) -> str:
        """First input that differs from the newest finished stage of the same title."""
        known = self.path / "stages.json"
        try:
            before = read_json(known).get(title) if known.exists() else None
        except (TransferError, AttributeError):  # only a hint is lost
            return ""
        if not before or not (self.store / before / "key.json").exists():
            return ""
        old = read_json(self.store / before / "key.json")["inputs"]
        for name, value in inputs.items():
            if old.get(name) != json.loads(json.dumps(value, default=str)):
                return f"runs again: {name} changed"
        return ""


def mark_done(folder: Path, seconds: float) -> None:
    """Write ``DONE`` with the sizes and hashes of the stage's files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "DONE" and not p.name.startswith("."))
    entries = {str(p.relative_to(folder)): [p.stat().st_size, file_hash(p)] for p in files}
    write_json(folder / "DONE", {"seconds": round(seconds, 3), "files": entries})


def finished(folder: Path) -> bool:
    """Whether the stage ran to its end and its files are still what it wrote."""
    if not (folder / "DONE").is_file():
        return False
    try:
        entries = read_json(folder / "DONE")["files"]
    except (TransferError, KeyError):
        return False
    for name, (size, sha) in entries.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or file_hash(path) != sha:
            say(f"{folder.parent.name} {folder.name[:6]}  {name} changed since it was written; redone")
            (folder / "DONE").unlink()
            return False
    return True


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    with replacing(path) as part:
        part.write_text(text, "utf8")

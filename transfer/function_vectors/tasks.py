"""In-context tasks: pairs of input and output, read from files or made by rule, and split by input."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer.core.errors import TransferError
from transfer.core.files import read_json
from transfer.core.keys import digest

SPLITS = ("train", "valid", "test")
FRACTIONS = (0.5, 0.2, 0.3)


@dataclass(frozen=True)
class Pair:
    """One example of a task."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """Pairs with one rule behind them."""

    name: str
    pairs: tuple[Pair, ...]
    instructions: tuple[str, ...] = ()
    """Ways to ask for it in words; empty where there are none."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Entries of the file that are no pair of this task, by reason."""

    @property
    def hash(self) -> str:
        """Content id."""
        return digest([self.name, [(p.input, p.output) for p in self.pairs], self.instructions])

    def split(self, seed: int = 0) -> dict[str, tuple[Pair, ...]]:
        """Disjoint by input: ``train`` (demonstrations and means), ``valid`` (layers, scales) and ``test``.

        Raises:
            TransferError: When a part would hold fewer than two pairs.
        """
        order = list(self.pairs)
        random.Random(f"{seed}/{self.name}").shuffle(order)
        first = round(FRACTIONS[0] * len(order))
        second = first + round(FRACTIONS[1] * len(order))
        parts = (tuple(order[:first]), tuple(order[first:second]), tuple(order[second:]))
        if min(map(len, parts)) < 2:
            raise TransferError(f"Task {self.name} has {len(order)} pairs, too few to split.", "Ten are needed.")
        return dict(zip(SPLITS, parts, strict=True))


def read_task(path: Path, instructions: tuple[str, ...] = ()) -> Task:
    """A task from a JSON list of ``{"input": ..., "output": ...}``; the file's name is the task's.

    Entries without both texts are dropped, and so is all but the first with the same input: an input that stood in two
    splits would leak. Both are counted.

    Raises:
        TransferError: When the file is missing, no such list, or holds no pair.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise TransferError(f"{path} holds no list of pairs.", 'Write [{"input": ..., "output": ...}, ...].')
    pairs: dict[str, Pair] = {}
    dropped = {"incomplete": 0, "repeated_input": 0}
    for entry in rows:
        pair = _pair(entry)
        if pair is None:
            dropped["incomplete"] += 1
        elif pair.input in pairs:
            dropped["repeated_input"] += 1
        else:
            pairs[pair.input] = pair
    if not pairs:
        raise TransferError(f"None of the {len(rows)} entries of {path} has an input and an output.")
    return Task(Path(path).stem, tuple(pairs.values()), instructions, dropped)


def _pair(entry: Any) -> Pair | None:
    if not isinstance(entry, dict):
        return None
    texts = [str(entry[key]).strip() if isinstance(entry.get(key), (str, int)) else "" for key in ("input", "output")]
    return Pair(*texts) if all(texts) else None


def read_tasks(place: str, names: list[str] | None = None, *, instructions: Path | None = None) -> list[Task]:
    """Tasks by name: of the bundled rule-made ones (``rule``), of one file, or of all files below a folder.

    Args:
        place: ``rule``, a JSON file, or a folder.
        names: Only these; all when left out.
        instructions: JSON of task name → list of ways to ask for it, for tasks from files.

    Raises:
        TransferError: When a place holds no tasks or lacks a name.
    """
    if place == "rule":
        from transfer.function_vectors.rules import rule_tasks

        found = {task.name: task for task in rule_tasks()}
        return [found[name] for name in _asked(found, names, place)]
    path = Path(place)
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    if not files:
        raise TransferError(f"There are no task files (*.json) at {place}.", "Name a file, a folder, or `rule`.")
    by_name = {file.stem: file for file in files}
    words = {} if instructions is None else _read_instructions(instructions)
    return [read_task(by_name[name], words.get(name, ())) for name in _asked(by_name, names, place)]


def _read_instructions(path: Path) -> dict[str, tuple[str, ...]]:
    found = read_json(path)
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(each, list) and all(isinstance(line, str) for line in each) for each in lists):
        raise TransferError(f"{path} does not map task names to lists of instructions.")
    return {name: tuple(each) for name, each in found.items()}


def _asked(known: dict[str, Any], names: list[str] | None, place: str) -> list[str]:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise TransferError(f"{place} has no task {', '.join(unknown)}.", f"It has {', '.join(sorted(known))}.")
    return list(names) if names else sorted(known)

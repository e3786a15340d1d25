"""The experiment grid: every cell trained once, by worker processes, resumable, independent of scheduling."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from transfer.core.config import Arm
from transfer.core.console import progress, say
from transfer.core.errors import NoSpaceError, StageError, TransferError
from transfer.core.files import file_hash, plain, read_json, replacing, write_json
from transfer.core.keys import SCHEMA, digest
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.texts import Corpus
from transfer.core.workers import Workers
from transfer.finetune import Recipe, data_hash
from transfer.tasks.base import Example, Task

ARMS: tuple[str, ...] = get_args(Arm)
"""What each is: see ``transfer.grid.arms``."""


@dataclass(frozen=True)
class Cell:
    """One training: whose features, whose texts, which target, which arm, which seed."""

    source: str
    """Model whose features were asked for; empty for arms without features (``seed_only``, ``full``)."""
    generator: str
    target: str
    """Typed model reference of the model that is trained."""
    arm: str
    recipe: Recipe
    seed: int
    examples: tuple[Example, ...] = ()
    """The whole training set; or empty, and it is in ``file``."""
    file: str = ""
    """JSON lines with ``text`` and ``label`` (0 or 1), as ``write_examples`` writes them."""
    file_hash: str = ""
    """What ``write_examples`` returned."""

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise TransferError(f"Unknown arm {self.arm!r}.", f"Known: {', '.join(ARMS)}.")
        if bool(self.examples) == bool(self.file) or bool(self.file) != bool(self.file_hash):
            raise TransferError(f"{self.name} needs its examples, or else a file with its hash.")

    @property
    def name(self) -> str:
        """For messages."""
        origin = " / ".join(p for p in (self.source, self.generator) if p) or "no features"
        return f"cell {origin} -> {self.target}, {self.arm}, {self.recipe.name}, seed {self.seed}"

    @cached_property
    def data_hash(self) -> str:
        """Hash of the training set."""
        return self.file_hash or data_hash(self.examples)

    @property
    def size(self) -> int:
        """Roughly the bytes of the training set: what to start first."""
        file = Path(self.file)
        return file.stat().st_size if self.file and file.is_file() else sum(len(text) for text, _ in self.examples)

    def load(self) -> list[Example]:
        """The training set.

        Raises:
            TransferError: When the file is missing or not the one the cell was made with.
        """
        if not self.file:
            return list(self.examples)
        if not Path(self.file).is_file():
            raise TransferError(f"The training set {self.file} does not exist.", "Plan the grid again.")
        with Path(self.file).open(encoding="utf8") as lines:
            examples = [(str(row["text"]), int(row["label"])) for row in map(json.loads, lines)]
        if data_hash(examples) != self.file_hash:
            raise TransferError(
                f"The training set {self.file} has changed since the grid was planned.", "Plan it again."
            )
        return examples


def write_examples(path: Path, examples: Sequence[Example]) -> str:
    """Write a training set as JSON lines, atomically; returns the hash that ``Cell.file_hash`` wants."""
    with replacing(Path(path)) as part, part.open("w", encoding="utf8") as lines:
        for text, label in examples:
            lines.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    return data_hash(examples)


class FailedCells(StageError):
    """Some cells failed; the others are finished.

    Args:
        what: Which ones, and why.
        hint: The repair.
        results: Of the finished cells, in the order of the grid.
        failures: Name of each failed cell with what went wrong.
    """

    def __init__(self, what: str, hint: str, results: list[CellResult], failures: dict[str, str]) -> None:
        super().__init__(what, hint)
        self.results, self.failures = results, failures


@dataclass(frozen=True)
class CellResult:
    """What one cell gave."""

    source: str
    generator: str
    target: str
    arm: str
    recipe: str
    seed: int
    key: str
    """Content key; the result is in ``<key>.json``, the scores in ``<key>.jsonl``."""
    evals: tuple[EvalResult, ...]
    run: FinetuneRun
    n_leaked: int
    """Training texts that are also evaluation texts (compared without case and outer blanks)."""

    def value(self, metric: str) -> float:
        """One metric.

        Raises:
            TransferError: When the cell has no such metric.
        """
        for result in self.evals:
            if result.metric == metric:
                return result.value
        raise TransferError(f"No metric {metric!r}.", f"This grid has {', '.join(e.metric for e in self.evals)}.")


def cell_key(cell: Cell, base_hash: str, evaluation: Corpus, task: Task) -> str:
    """Content key: equal exactly when training set, base, recipe, seed, evaluation corpus and task are equal."""
    return digest(
        {
            "schema": SCHEMA,
            "data": cell.data_hash,
            "base": base_hash,
            "recipe": dataclasses.asdict(cell.recipe),
            "seed": cell.seed,
            "evaluation": evaluation.hash,
            "task": [task.name, dataclasses.asdict(task)],  # type: ignore[call-overload]
        }
    )


def run_cells(
    cells: Sequence[Cell],
    evaluation: Corpus,
    task: Task,
    *,
    pool: Workers | None,
    out_dir: Path,
    base_hashes: Mapping[str, str] | None = None,
) -> list[CellResult]:
    """Train and evaluate every cell; finished ones are read back instead.

    Results do not depend on the number of processes or the order of work. Cells with equal content are trained once.
    Each worker keeps the base of its last target.

    Args:
        cells: The grid.
        evaluation: Labelled evaluation corpus.
        task: Task, whose every option is part of the content key.
        pool: Worker processes; this process if None.
        out_dir: Folder of the cell files.
        base_hashes: Per target its weights' hash; loaded from the target where absent.

    Returns:
        One result a cell, in the order of ``cells``.

    Raises:
        FailedCells: When cells failed; it brings the results of the others, which are kept.
        NoSpaceError: At once, when the disk is full; finished cells are kept.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    hashes = {t: (base_hashes or {}).get(t) or _base_hash(t) for t in sorted({c.target for c in cells})}
    keys = [cell_key(c, hashes[c.target], evaluation, task) for c in cells]
    todo: dict[str, Cell] = {k: c for k, c in zip(keys, cells, strict=True) if not _finished(out_dir, k)}
    distinct = len(set(keys))
    if distinct > len(todo):
        say(f"grid  {distinct - len(todo)} of {distinct} cells reused")
    # Target by target, so that a worker loads each base once; big ones first, so that no worker ends with one alone.
    # Recipes take turns on the same data: each worker then mostly keeps to one, and to the features it has computed.
    order = sorted(
        todo,
        key=lambda k: (todo[k].target, -todo[k].size, todo[k].file_hash, todo[k].seed, todo[k].recipe.name, k),
    )
    failures: dict[str, str] = {}
    with progress("fine-tuning grid", len(order), "cells") as advance:
        jobs = {k: (todo[k], k, evaluation, task, out_dir) for k in order}
        for key, problem in _local(jobs) if pool is None else _pooled(jobs, pool):
            if problem:
                failures[key] = problem
                say(f"{todo[key].name} failed: {problem}")
            advance(1)
    if failures:
        listed = "; ".join(f"{todo[k].name}: {p}" for k, p in list(failures.items())[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise FailedCells(
            f"{len(failures)} of {distinct} cells failed ({listed}{more}).",
            "The finished cells are kept; run the same command again to continue.",
            [_read(out_dir, c, k) for c, k in zip(cells, keys, strict=True) if k not in failures],
            {c.name: failures[k] for c, k in zip(cells, keys, strict=True) if k in failures},
        )
    return [_read(out_dir, c, k) for c, k in zip(cells, keys, strict=True)]


def _base_hash(target: str) -> str:
    from transfer.train.classifier import load_backbone

    return load_backbone(target).hash


def _finished(out_dir: Path, key: str) -> bool:
    """Whether a cell's two files are there and still what ``_work`` wrote."""
    record, scores = out_dir / f"{key}.json", out_dir / f"{key}.jsonl"
    if not (record.is_file() and scores.is_file()):
        return False
    try:
        data = read_json(record)
        sealed = data.pop("seal") == digest(data) and data["scores"] == file_hash(scores)
    except (TransferError, KeyError, AttributeError, TypeError):
        sealed = False
    if not sealed:
        say(f"cell {key[:6]} changed since it was written; trained again")
    return sealed


def _read(out_dir: Path, cell: Cell, key: str) -> CellResult:
    data = read_json(out_dir / f"{key}.json")
    run = {**data["run"], "curve": tuple(data["run"]["curve"])}
    evals = [{**e, "stderr": float("nan") if e["stderr"] is None else e["stderr"]} for e in data["evals"]]
    return CellResult(
        source=cell.source,
        generator=cell.generator,
        target=cell.target,
        arm=cell.arm,
        recipe=cell.recipe.name,
        seed=cell.seed,
        key=key,
        evals=tuple(EvalResult(**e) for e in evals),
        run=FinetuneRun(**run),
        n_leaked=data["n_leaked"],
    )


Job = tuple[Cell, str, Corpus, Task, Path]
Outcome = tuple[str, str]
"""Content key, and what went wrong (empty: nothing)."""


def _work(job: Job) -> str:
    """Run one cell in this process; returns what went wrong, so that one cell cannot stop the others."""
    cell, key, evaluation, task, out_dir = job
    try:
        examples = cell.load()
        model, run = task.fit(cell.target, examples, cell.recipe, cell.seed)
        evals = task.evaluate(model, evaluation, out_dir / f"{key}.jsonl")
        seen = {t.text.strip().casefold() for t in evaluation}
        record = {
            "schema": SCHEMA,
            "key": key,
            "run": dataclasses.asdict(run),
            "evals": [dataclasses.asdict(e) for e in evals],
            "n_leaked": sum(text.strip().casefold() in seen for text, _ in examples),
            "scores": file_hash(out_dir / f"{key}.jsonl"),
        }
        record = plain(record)
        write_json(out_dir / f"{key}.json", {**record, "seal": digest(record)})
    except NoSpaceError:
        raise  # every other cell would fail as well
    except TransferError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _pool_work(job: Job) -> str:
    """Run one cell in a worker process; see ``_frozen``, but the worker loads its libraries with its first cell."""
    problem = _work(job)
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
    return problem


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Trainer collects garbage at every start: half a second each time unless the libraries are left out of it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _local(jobs: dict[str, Job]) -> Iterator[Outcome]:
    if jobs:
        with _one_thread(), _frozen():
            for key, job in jobs.items():
                yield key, _work(job)


def _pooled(jobs: dict[str, Job], pool: Workers) -> Iterator[Outcome]:
    """Run jobs in worker processes; a cell that kills its worker fails alone.

    Only as many cells as workers are handed out at a time, so when a worker dies (out of memory, say) the suspects are
    few: each is tried once more in a worker of its own.
    """
    waiting = list(jobs)
    while waiting:
        running: dict[Future[str], str] = {}
        suspects: list[str] = []
        try:
            while (waiting or running) and not suspects:
                while waiting and len(running) < pool.processes:
                    key = waiting.pop(0)
                    running[pool.executor.submit(_pool_work, jobs[key])] = key
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    key, error = running.pop(future), future.exception()
                    if isinstance(error, NoSpaceError):
                        raise error
                    if isinstance(error, BrokenProcessPool):
                        suspects.append(key)
                    else:  # an error here never reached the cell: the job cannot be pickled, say
                        yield key, f"{type(error).__name__}: {error}" if error else future.result()
            if suspects:
                suspects += running.values()
        except BrokenProcessPool:  # from submit: that cell never ran
            suspects += running.values()
            waiting.insert(0, key)
        if suspects or waiting:
            pool.stop(wait=False)  # it is broken; the next use starts new processes
        for key in sorted(suspects):
            yield key, _alone(jobs[key])


def _alone(job: Job) -> str:
    with Workers(1) as own:
        try:
            return own.executor.submit(_pool_work, job).result()
        except BrokenProcessPool:
            return "its worker process died (out of memory?)"

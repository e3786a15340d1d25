"""Worker processes: one torch thread each, started when first needed, never outliving the process that made them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


class Workers:
    """Processes of one torch thread each: started when first needed, anew after one has died; a context manager.

    One set serves all stages of a run, because a fresh process takes seconds to import its libraries.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._executor: ProcessPoolExecutor | None = None

    @property
    def executor(self) -> ProcessPoolExecutor:
        """The processes, spawned (not forked); others where one has died."""
        if self._executor is not None:
            try:
                self._executor.submit(_import, ())
            except BrokenProcessPool:
                self.stop(wait=False)
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_start)
        return self._executor

    def warm(self, *modules: str) -> None:
        """Start every process and let it import ``modules`` while this one goes on."""
        for _ in range(self.processes):
            self.executor.submit(_import, modules)

    def stop(self, wait: bool = True) -> None:
        """End the processes after what they are doing; the next use starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=wait, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _import(modules: tuple[str, ...]) -> None:
    for name in modules:
        importlib.import_module(name)


def _start() -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # torch reads them when a job imports it
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; the parent says what happened
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

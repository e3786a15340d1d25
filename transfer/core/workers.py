"""Worker processes: one torch thread each, started when first needed, never outliving the process that made them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor


def workers(processes: int) -> ProcessPoolExecutor:
    """A pool of fresh (spawned) processes; use it as a context manager."""
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


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

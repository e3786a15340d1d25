"""Worker processes: started when needed, shared by all stages, replaced when one dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from transfer.core.workers import Workers


def test_nothing_is_started_before_it_is_needed_and_nothing_stays():
    with Workers(2) as pool:
        assert pool._executor is None
        first = pool.executor.submit(os.getpid).result()
        assert pool.executor.submit(os.getpid).result() != os.getpid()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{first}").exists():
        assert time.monotonic() < deadline, "a worker outlived its pool"
        time.sleep(0.05)


def test_a_worker_that_died_while_idle_is_replaced():
    with Workers(1) as pool:
        before = pool.executor.submit(os.getpid).result()
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while True:
            assert time.monotonic() < deadline, "the dead worker was never noticed"
            try:
                after = pool.executor.submit(os.getpid).result()
                break
            except Exception:  # the pool learns of the death a moment later
                time.sleep(0.05)
        assert after != before


def test_warm_workers_have_the_modules():
    with Workers(1) as pool:
        pool.warm("colorsys")
        assert pool.executor.submit(eval, "'colorsys' in __import__('sys').modules").result()

"""One benchmark row: ours against a peer and against the limit of the machine, interleaved."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class Peak(threading.Thread):
    """Highest memory of this process during what is watched: its own pages on Linux (mapped files are not counted)."""

    since_row = 0.0
    """MiB, over what was watched since a row was printed last."""
    printed = False

    def __enter__(self) -> Peak:
        if Peak.printed:
            Peak.since_row, Peak.printed = 0.0, False
        self.ended = threading.Event()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        """Look every 20 ms."""
        while True:
            Peak.since_row = max(Peak.since_row, resident_mib())
            if self.ended.wait(0.02):
                break


def resident_mib() -> float:
    """Memory of this process now, without mapped files; where the system does not say, its peak with them."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        _, resident, mapped = statm.read_text().split()[:3]
        return (int(resident) - int(mapped)) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def watched(work: Callable[[], object]) -> float:
    """Wall time of one call of ours, whose memory the next rows print."""
    with Peak():
        return seconds(work)


def measure(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each work; the works take turns, so that a busy machine slows all alike."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append((watched if name == "ours" else seconds)(work))
    return {name: statistics.median(t) for name, t in times.items()}


def row(name: str, ours: float, peer: str, peer_value: float, unit: str, limit: float) -> None:
    """Print one case; higher is better for ``ours``, ``peer_value`` and ``limit``, all in ``unit``."""
    case = {
        "name": name,
        "ours": round(ours, 1),
        "peer": peer,
        "peer_value": round(peer_value, 1),
        "ratio": round(ours / peer_value, 2),
        "unit": unit,
        "limit": round(limit, 1),
        "fraction_of_limit": round(ours / limit, 3),
        "peak_mib": round(Peak.since_row),
    }
    sys.stdout.write(json.dumps(case) + "\n")
    sys.stdout.flush()
    Peak.printed = True

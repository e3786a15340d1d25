"""One benchmark row: ours against a peer and against the limit of the machine, interleaved."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_mib() -> float:
    """Highest resident memory of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each work; the works take turns, so that a busy machine slows all alike."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
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
        "peak_mib": round(peak_mib()),
    }
    sys.stdout.write(json.dumps(case) + "\n")
    sys.stdout.flush()

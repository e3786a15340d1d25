"""Co-activation of sparse codes: millions of multiply-adds a second, one for each joint event.

Codes are memory-mapped and Zipf-like (exponent ½). The limit is the two scattered additions of an event (Σ f·g and
n11) into a row of sums, with indices and weights ready. Sums are checked against scipy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from aligners.coactivation import PairedCodes, joint_blocks
from aligners.partners import top_partners
from tests.benchmarks.case import row, seconds, watched

ACTIVE = 20


def codes(folder: Path, name: str, rows: int, n: int, seed: int) -> sp.csr_matrix:
    """Memory-mapped codes with ``ACTIVE`` events a row, written a part at a time."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(n).astype(np.int32)
    arrays = [
        np.lib.format.open_memmap(folder / f"{name}-{kind}.npy", "w+", dtype, (size,))
        for kind, dtype, size in (
            ("data", np.float32, rows * ACTIVE),
            ("indices", np.int32, rows * ACTIVE),
            ("indptr", np.int32, rows + 1),
        )
    ]
    arrays[2][:] = np.arange(rows + 1) * ACTIVE
    step = 5_000_000
    for start in range(0, rows * ACTIVE, step):
        size = min(step, rows * ACTIVE - start)
        arrays[1][start : start + size] = order[(n * rng.random(size, dtype=np.float32) ** 2).astype(np.int32) % n]
        arrays[0][start : start + size] = rng.random(size, dtype=np.float32) + 0.1
    return sp.csr_matrix(tuple(arrays), shape=(rows, n), copy=False)


def addition_rate(rows: int, n: int) -> float:
    """Events a second when only the additions are left, for source features as frequent as the mean one."""
    rng = np.random.default_rng(0)
    events = max(1024, rows * ACTIVE * ACTIVE // n)
    at, weight = rng.permutation(n)[(n * rng.random(events) ** 2).astype(np.int64)], rng.random(events)
    sums, counts = np.zeros(n), np.zeros(n, dtype=np.int32)
    times = max(1, 10_000_000 // events)

    def add() -> None:
        for _ in range(times):
            np.add.at(sums, at, weight)
            np.add.at(counts, at, np.int32(1))

    add()
    return times * events / seconds(add) / 1e6


def case(rows: int, n: int) -> None:
    """Top-16 partners by φ of all features, both directions, against scipy's sparse product of a few rows."""
    with tempfile.TemporaryDirectory() as name:
        a, b = (codes(Path(name), side, rows, n, seed) for seed, side in enumerate("ab"))
        limit = addition_rate(rows, n)
        paired = PairedCodes.of([(a, b)])
        speed = paired.events / watched(lambda: top_partners(paired, 16, "phi")) / 1e6
        few = min(rows, 200_000)
        x, y = sp.csr_matrix(a[:few].T), b[:few]
        peer = few * ACTIVE * ACTIVE / seconds(lambda: x @ y) / 1e6
        peer_name = f"scipy sparse product, Σ f·g alone, full result ({few} rows)"
        row(f"corr.{n}-{rows // 1_000_000}M", speed, peer_name, peer, "M MAC/s", limit)
        some = np.array([0, n // 2, n - 1])
        joint = next(iter(joint_blocks(paired, some)))
        want = sp.csr_matrix(a[:, some], dtype=np.float64).T @ sp.csr_matrix(b, dtype=np.float64)
        assert np.allclose(joint.products, want.toarray(), rtol=1e-10), "sums differ from scipy's"


def small(rows: int = 20_000, n: int = 8192) -> None:
    """Against a dense product, whose inputs alone take 26 GB a side at 65,536 features and 100,000 rows."""
    with tempfile.TemporaryDirectory() as name:
        a, b = (codes(Path(name), side, rows, n, seed) for seed, side in enumerate("ab"))
        paired = PairedCodes.of([(a, b)])
        part = n // 16
        x, y = torch.from_numpy(a[:, :part].toarray()), torch.from_numpy(b.toarray())
        dense = paired.events / 16 / seconds(lambda: torch.mm(x.T, y)) / 1e6

        def ours() -> None:
            for _ in joint_blocks(paired):
                pass

        name = f"torch float32 dense product ({part} of {n} source features); 65,536 × 100,000 rows: 26 GB a side"
        row(f"corr.{n}-20k", paired.events / watched(ours) / 1e6, name, dense, "M MAC/s", addition_rate(rows, n))


def main() -> None:
    """The size a dense product can do, and the size of the models this suite is for."""
    small()
    case(10_000_000, 65_536)

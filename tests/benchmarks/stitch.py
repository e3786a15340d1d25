"""Maps between residual streams: useful GFLOP/s end to end against the bare product (the limit) and sklearn's Ridge.

Useful work is that of the normal equations, 2·rows·(d_src² + d_src·d_tgt), with d_tgt² more where both sides are
whitened; reading, outliers, the inner split and the solvers are overhead.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import Ridge

from aligners.canonical import canonical_coordinates
from aligners.maps import WIDE, SplitSums, blocks_of, fit_blocks
from tests.benchmarks.case import row, seconds, watched


def streams(rows: int, d_src: int, d_tgt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals in float16, as they are stored, that share half of their variance; and their documents."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, d_src), dtype=np.float32)
    y = x[:, :d_tgt] + rng.standard_normal((rows, d_tgt), dtype=np.float32)
    return x.astype(np.float16), y.astype(np.float16), np.arange(rows) // 128


def product_rate(d_src: int, d_tgt: int, dtype: type) -> float:
    """GFLOP/s of the bare products of one block."""
    x, y = np.ones((4096, d_src), dtype=dtype), np.ones((4096, d_tgt), dtype=dtype)
    work = 2 * 4096 * (d_src**2 + d_src * d_tgt)
    times = max(1, int(2e11 / work))
    np.matmul(x.T, x)
    return times * work / seconds(lambda: [(x.T @ x, x.T @ y) for _ in range(times)]) / 1e9


def case(rows: int, d_src: int, d_tgt: int) -> None:
    """One shape; the peer keeps all rows in float32 at once."""
    x, y, docs = streams(rows, d_src, d_tgt)
    work = 2 * rows * (d_src**2 + d_src * d_tgt) / 1e9
    both = work + 2 * rows * d_tgt**2 / 1e9
    limit = product_rate(d_src, d_tgt, np.float32 if max(d_src, d_tgt) >= WIDE else np.float64)
    blocks = blocks_of(x, y, docs)
    ridge = work / watched(lambda: fit_blocks(blocks))
    canonical = both / watched(lambda: canonical_coordinates(SplitSums.of(blocks, full=True).total))
    part = min(rows, 16 * d_src)  # the rate is that of the normal equations' work
    ours, theirs = x[:part].astype(np.float32), y[:part].astype(np.float32)
    peer = part / rows * work / seconds(lambda: Ridge(solver="cholesky").fit(ours, theirs))
    name = f"{rows}x{d_src}x{d_tgt}"
    words = f"scikit-learn Ridge, one strength, no held-out score ({part} rows)"
    row(f"stitch.ridge-{name}", ridge, words, peer, "GFLOP/s", limit)
    row(f"stitch.canonical-{name}", canonical, words, peer, "GFLOP/s", limit)


def main() -> None:
    """Zoo-like widths, and wide ones with fewer rows, where rows only add products."""
    case(200_000, 192, 160)
    case(32_768, 2048, 1792)

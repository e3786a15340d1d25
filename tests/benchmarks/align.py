"""A whole alignment, from codes, residuals and decoders to judged matches: pairs per second against a dense route.

Planted: 60 % of the features are shared, in another order, behind a random linear map with noise, at Zipf rates, half
of the events missed on either side. Precision and recall at q ≤ 5 % are asserted, so a fast wrong answer is no answer.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from aligners.correlation import dims
from aligners.fused import FusedAligner
from aligners.planted import planted_view
from aligners.topk import fast_dtype, unit_rows
from tests.benchmarks import topk
from tests.benchmarks.case import row, seconds, watched
from tests.benchmarks.stitch import product_rate
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

ACTIVE = 40
DENSE = 4096
"""Features of the dense route: every step of it is quadratic in them or worse."""


def planted(
    n: int, d_src: int, d_tgt: int, rows: int
) -> tuple[FeatureView, FeatureView, PairedActivations, np.ndarray]:
    """Both spaces, their paired activations, and the target of every shared source feature."""
    rng = np.random.default_rng(0)
    shared = round(0.6 * n)
    moved = rng.permutation(n)
    x = unit_rows(rng.standard_normal((n, d_src), dtype=np.float32))
    through = rng.standard_normal((d_src, d_tgt), dtype=np.float32) / np.float32(np.sqrt(d_src))
    y = np.empty((n, d_tgt), dtype=np.float32)
    noise = unit_rows(rng.standard_normal((n, d_tgt), dtype=np.float32))
    y[moved] = np.where(np.arange(n)[:, None] < shared, np.sqrt(0.84) * unit_rows(x @ through) + 0.4 * noise, noise)
    rate = np.cumsum(rng.permutation(np.arange(1, n + 1) ** -0.7))
    events = np.minimum(np.searchsorted(rate / rate[-1], rng.uniform(size=(rows, ACTIVE))), n - 1)
    other = np.where(events < shared, events, rng.integers(n, size=events.shape))

    def codes(fired: np.ndarray, names: np.ndarray) -> sp.csr_matrix:
        at, kept = np.nonzero(rng.uniform(size=fired.shape) < 0.5)
        values = np.exp(0.4 * rng.standard_normal(len(at))).astype(np.float32)
        return sp.csr_matrix((values, (at, names[fired[at, kept]])), shape=(rows, n))

    fires = sp.csr_matrix((np.ones(events.size, np.float32), (np.repeat(np.arange(rows), ACTIVE), events.ravel())))
    residual = fires @ x[: dims(fires)[1]]
    back = residual @ through + 0.3 * rng.standard_normal((rows, d_tgt), dtype=np.float32)
    pairs = PairedActivations(
        codes(events, np.arange(n)),
        codes(other, moved),
        (np.arange(rows) // 128).astype(np.int32),
        residual.astype(np.float16),
        back.astype(np.float16),
    )
    return planted_view("source", x), planted_view("target", y), pairs, moved[:shared]


def dense_route(source: FeatureView, target: FeatureView, pairs: PairedActivations) -> None:
    """The peer: a dense correlation matrix, a map by lstsq, a dense cosine matrix, and scipy's assignment."""
    from scipy.optimize import linear_sum_assignment

    assert pairs.source_residual is not None and pairs.target_residual is not None
    a, b = (m[:, :DENSE].toarray() for m in (pairs.source, pairs.target))
    a, b = ((m - m.mean(axis=0)) / (m.std(axis=0) + 1e-6) for m in (a, b))
    corr = a.T @ b / len(a)
    part = slice(0, 4 * source.space.d_model)
    x, y = pairs.source_residual[part].astype(np.float32), pairs.target_residual[part].astype(np.float32)
    matrix = np.linalg.lstsq(x, y, rcond=None)[0]
    cosine = unit_rows(source.directions[:DENSE] @ matrix) @ unit_rows(target.directions[:DENSE]).T
    linear_sum_assignment(corr + cosine, maximize=True)


def case(n: int, d_src: int, d_tgt: int, rows: int) -> None:
    """One size; the limit is the bare products: the residuals' covariances and all pairs of the common space."""
    source, target, pairs, truth = planted(n, d_src, d_tgt, rows)
    found: list[FusedAligner] = []
    taken = watched(lambda: found.append(FusedAligner().fit(source, target, pairs=pairs)))
    matches = found[0].alignment_.matches
    kept = matches["q_value"] <= 0.05
    wanted = np.full(n, -1)
    wanted[: len(truth)] = truth
    right = wanted[matches["source"][kept]] == matches["target"][kept]
    assert right.mean() >= 0.97 and right.sum() >= 0.95 * len(truth), (right.mean(), right.sum() / len(truth))
    peer = DENSE**2 / seconds(lambda: dense_route(source, target, pairs)) / 1e6
    sums = 2e-9 * rows * (d_src**2 + d_src * d_tgt + d_tgt**2) / product_rate(d_src, d_tgt, np.float64)
    width = min(d_src, d_tgt, 1024)
    product = 2e-9 * n * n * width / topk.product_rate(n, width, fast_dtype("auto"))
    name = f"align.whole-{n}x{d_src}x{d_tgt}"
    row(name, n * n / taken / 1e6, f"dense route at {DENSE}", peer, "M pairs/s", n * n / (sums + product) / 1e6)


def main() -> None:
    """A size that takes a minute or two."""
    torch.set_num_threads(1)
    case(16_384, 1024, 896, 65_536)

"""Intervals, paired comparisons, multiple testing and power; every function says what its interval covers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize, stats

from transfer.core.errors import TransferError

LARGE_N = 30
"""From this many values on, ``mean_interval`` bootstraps instead of leaning on normality."""

REMEMBERED = 4_000_000
"""Bootstrap counts kept between comparisons of one evaluation set (16 MB)."""

WeightedMetric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""``(labels [n], scores [n], counts [n, draws]) -> values [draws]``: a metric under integer example weights."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval; the bounds are NaN where the data cannot give one."""

    value: float
    low: float
    high: float
    n: int
    method: str
    """``t``, ``bootstrap``, ``hierarchical`` or ``none``."""


@dataclass(frozen=True)
class PairedDelta:
    """Treated minus control over the same seeds."""

    delta: float
    low: float
    high: float
    p: float
    """Two-sided paired t test; NaN with fewer than two pairs."""
    sd: float
    """Standard deviation of the paired differences; NaN with fewer than two pairs."""
    n: int


def _finite(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise TransferError(f"No {what} to take statistics over.")
    if not np.all(np.isfinite(array)):
        raise TransferError(f"{int(np.sum(~np.isfinite(array)))} of {array.size} {what} are NaN or infinite.")
    return array


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean with an interval: Student t below ``LARGE_N`` values, BCa bootstrap from there on.

    The interval covers the variation of whatever differs between the values and nothing else. Over fine-tuning seeds
    that is initialisation, dropout and data order; a training set or an evaluation split that all seeds share adds no
    width.

    Raises:
        TransferError: For no values, NaN or infinity.
    """
    x = _finite(values, "values")
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n, "none")
    if np.ptp(x) == 0:
        return Interval(mean, mean, mean, n, "t" if n < LARGE_N else "bootstrap")
    if n < LARGE_N:
        half = float(stats.t.ppf((1 + level) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n))
        return Interval(mean, mean - half, mean + half, n, "t")
    ci = stats.bootstrap(
        (x,), np.mean, confidence_level=level, n_resamples=2000, batch=200, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(mean, float(ci.low), float(ci.high), n, "bootstrap")


def paired_delta(
    treated: Sequence[float] | np.ndarray, control: Sequence[float] | np.ndarray, level: float = 0.95
) -> PairedDelta:
    """Mean of ``treated - control`` with the paired t interval and test.

    Pairing removes what a seed does to both arms alike. The interval covers seed-to-seed variation of the difference on
    this evaluation split; for other examples of the same kind see ``hierarchical_delta``. It assumes roughly normal
    differences, which few seeds cannot check.

    Raises:
        TransferError: For unequal lengths, no pairs, or NaN.
    """
    a, b = _finite(treated, "treated values"), _finite(control, "control values")
    if len(a) != len(b):
        raise TransferError(f"Paired arms need the same seeds: {len(a)} treated and {len(b)} control values.")
    d = a - b
    n, mean = len(d), float(d.mean())
    if n < 2:
        return PairedDelta(mean, float("nan"), float("nan"), float("nan"), float("nan"), n)
    sd = float(d.std(ddof=1))
    if sd == 0:  # identical differences: the t statistic is 0/0 or infinite
        return PairedDelta(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, n)
    se = sd / np.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * se)
    return PairedDelta(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / se, n - 1)), sd, n)


def ratio_interval(
    top: Sequence[float] | np.ndarray, bottom: Sequence[float] | np.ndarray, level: float = 0.95
) -> tuple[float, float, float]:
    """Ratio of two means of paired values, with Fieller's interval (Fieller 1954).

    Args:
        top: Numerators.
        bottom: Denominators, one for each numerator.
        level: Coverage, over whatever differs between the pairs.

    Returns:
        Ratio, lower and upper end. The ends are infinite where the mean of ``bottom`` does not differ from 0 at this
        level: every ratio is then possible. NaN ends for fewer than two pairs; a NaN ratio for a mean of exactly 0.

    Raises:
        TransferError: For unequal lengths, no pairs, or NaN.
    """
    a, b = _finite(top, "numerators"), _finite(bottom, "denominators")
    if len(a) != len(b):
        raise TransferError(f"A ratio needs pairs: {len(a)} numerators and {len(b)} denominators.")
    n, mean_a, mean_b = len(a), float(a.mean()), float(b.mean())
    value = mean_a / mean_b if mean_b else float("nan")
    if n < 2:
        return value, float("nan"), float("nan")
    (aa, ab), (_, bb) = np.cov(a, b) / n * float(stats.t.ppf((1 + level) / 2, n - 1)) ** 2
    square = mean_b**2 - bb
    if square <= 0:
        return value, float("-inf"), float("inf")
    middle = mean_a * mean_b - ab
    half = float(np.sqrt(max(0.0, middle**2 - square * (mean_a**2 - aa))))
    return value, float((middle - half) / square), float((middle + half) / square)


def bootstrap_counts(n: int, draws: int, seed: int, limit: int = 4_000_000) -> Iterator[np.ndarray]:
    """How often each of ``n`` examples is drawn, float32 ``[n, <= limit / n]`` blocks that add up to ``draws`` columns.

    Examples come first because metrics add them up one by one, for all draws at once. Memory is bounded by ``limit``
    counts at a time (16 MB at the default, and 32 while they are drawn), or one column where ``n`` is larger.
    """
    rng = np.random.default_rng(seed)
    block = max(1, limit // max(n, 1))
    for start in range(0, draws, block):
        counts = rng.multinomial(n, np.full(n, 1.0 / n), size=min(block, draws - start))
        yield counts.T.astype(np.float32, order="C")


def bootstrap_stderr(
    labels: np.ndarray, scores: np.ndarray, metric: WeightedMetric, draws: int = 1000, seed: int = 0
) -> float:
    """Standard error of a metric over evaluation examples, by bootstrap; NaN below ten usable draws.

    Covers the choice of evaluation examples for this one trained model, not training noise. Draws in which the metric
    is undefined (one class only) are left out, which matters only for splits with a handful of positives.
    """
    values = np.concatenate([metric(labels, scores, c) for c in _counts(len(labels), draws, seed)])
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) >= 10 else float("nan")


def _drawn(metric: WeightedMetric, labels: np.ndarray, scores: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """The metric in every draw [draws]; remembered, since a control stands in several comparisons."""
    return _drawn_of(metric, labels.astype(np.int64).tobytes(), scores.astype(np.float64).tobytes(), draws, seed)


@lru_cache(maxsize=1024)
def _drawn_of(metric: WeightedMetric, labels: bytes, scores: bytes, draws: int, seed: int) -> np.ndarray:
    one, other = np.frombuffer(labels, dtype=np.int64), np.frombuffer(scores, dtype=np.float64)
    return np.concatenate([metric(one, other, c) for c in _counts(len(one), draws, seed)])


def _counts(n: int, draws: int, seed: int) -> Iterable[np.ndarray]:
    """``bootstrap_counts``, remembered where one block holds them all."""
    return _one_block(n, draws, seed) if n * draws <= REMEMBERED else bootstrap_counts(n, draws, seed)


@lru_cache(maxsize=2)
def _one_block(n: int, draws: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(bootstrap_counts(n, draws, seed))


def hierarchical_delta(
    labels: np.ndarray,
    treated: np.ndarray,
    control: np.ndarray,
    metric: WeightedMetric,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Paired difference of a metric, resampling seeds and evaluation examples together (percentile bootstrap).

    Each draw picks seeds with replacement and one set of examples for all of them and both arms. The interval covers
    new seeds and new examples of the same kind. With three seeds the seed part is too narrow by about sqrt(2/3): read
    it beside the paired t interval.

    Args:
        labels: 0/1, int ``[n]``.
        treated: Scores ``[seeds, n]``.
        control: Scores ``[seeds, n]``, the same seeds and examples in the same order.
        metric: Weighted metric.
        level: Coverage.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        TransferError: For shapes that differ or a metric undefined in most draws.
    """
    if treated.shape != control.shape or treated.ndim != 2 or treated.shape[1] != len(labels):
        raise TransferError(f"Paired scores differ in shape: {treated.shape}, {control.shape}, {len(labels)} labels.")
    n_seeds, n = treated.shape
    ones = np.ones((n, 1), dtype=np.float32)
    point = float(
        np.mean(
            [metric(labels, t, ones)[0] - metric(labels, c, ones)[0] for t, c in zip(treated, control, strict=True)]
        )
    )
    per_seed = np.stack(  # [seeds, draws]
        [
            _drawn(metric, labels, t, draws, seed) - _drawn(metric, labels, c, draws, seed)
            for t, c in zip(treated, control, strict=True)
        ]
    )
    picked = np.random.default_rng([seed, 1]).integers(n_seeds, size=per_seed.shape)
    values = np.take_along_axis(per_seed, picked, axis=0).mean(axis=0)
    values = values[np.isfinite(values)]
    if len(values) < draws / 2:
        raise TransferError(f"The metric is undefined in {draws - len(values)} of {draws} bootstrap draws.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, float(low), float(high), n_seeds, "hierarchical")


def _adjusted(p_values: Sequence[float] | np.ndarray, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p = np.asarray(p_values, dtype=np.float64)
    known = np.isfinite(p)
    if np.any((p[known] < 0) | (p[known] > 1)):
        raise TransferError("p values must lie between 0 and 1.")
    out = np.full(p.shape, np.nan)
    if known.any():
        out[known] = adjust(p[known])
    return out


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm-adjusted p values (family-wise error); NaN stays NaN and does not count."""

    def adjust(p: np.ndarray) -> np.ndarray:
        order = np.argsort(p, kind="stable")
        stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
        out = np.empty_like(p)
        out[order] = np.minimum(stepped, 1.0)
        return out

    return _adjusted(p_values, adjust)


def benjamini_hochberg(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg q values (false-discovery rate); NaN stays NaN and does not count."""
    return _adjusted(p_values, lambda p: np.asarray(stats.false_discovery_control(p, method="bh")))


def _power(effect: float, sd: float, n: int, alpha: float) -> float:
    """Power of the two-sided paired t test at a true mean difference ``effect``."""
    shift, critical = effect * np.sqrt(n) / sd, stats.t.ppf(1 - alpha / 2, n - 1)
    if shift - critical > 30:  # scipy's noncentral t loses precision far out, where the power is 1 anyway
        return 1.0
    wrong_side = stats.nct.cdf(-critical, n - 1, shift) if shift < 5 else 0.0  # below 1e-8 there, and scipy may say NaN
    return float(stats.nct.sf(critical, n - 1, shift) + wrong_side)


def minimum_detectable_effect(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true mean difference that a two-sided paired t test over ``n`` seeds finds with this power.

    Args:
        sd: Standard deviation of the paired differences.
        n: Seeds.
        alpha: Level of the test.
        power: Wanted probability of a finding.

    Returns:
        The effect in the unit of ``sd``; NaN where ``n < 2`` or ``sd`` is unknown, 0 where ``sd`` is 0.
    """
    if n < 2 or not np.isfinite(sd):
        return float("nan")
    if sd == 0:
        return 0.0
    high = 1.0
    while _power(high * sd, sd, n, alpha) < power:
        high *= 2
    root: Any = optimize.brentq(lambda e: _power(e * sd, sd, n, alpha) - power, 0.0, high)
    return float(root) * sd


def seeds_needed(effect: float, sd: float, alpha: float = 0.05, power: float = 0.8, limit: int = 1000) -> int | None:
    """Seeds with which a true mean difference ``effect`` would be found with this power; None above ``limit``."""
    effect = abs(effect)
    if sd == 0 and effect > 0:
        return 2
    if effect == 0 or not np.isfinite(sd) or _power(effect, sd, limit, alpha) < power:
        return None
    low, high = 2, limit
    while low < high:
        mid = (low + high) // 2
        low, high = (low, mid) if _power(effect, sd, mid, alpha) >= power else (mid + 1, high)
    return low

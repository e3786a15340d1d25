"""Known answers, coverage and properties of the statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as ss

from transfer.core import stats
from transfer.core.errors import TransferError
from transfer.tasks.intent import weighted_auprc

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_t_interval_known_answer():
    got = stats.mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)  # t(0.975, df 2) * sd / sqrt(n), sd = 1
    assert (got.value, got.n, got.method) == (2.0, 3, "t")
    assert got.low == pytest.approx(2 - half)
    assert got.high == pytest.approx(2 + half)


def test_large_samples_are_bootstrapped_and_repeat():
    x = np.random.default_rng(0).exponential(size=200)
    one, two = stats.mean_interval(x, seed=3), stats.mean_interval(x, seed=3)
    assert one == two
    assert one.method == "bootstrap"
    half = 1.96 * x.std(ddof=1) / np.sqrt(200)
    assert one.low == pytest.approx(x.mean() - half, abs=0.3 * half)
    assert one.high == pytest.approx(x.mean() + half, abs=0.3 * half)


def test_one_value_has_no_interval_and_bad_values_are_refused():
    one = stats.mean_interval([0.4])
    assert np.isnan(one.low)
    assert one.method == "none"
    assert stats.mean_interval([0.5] * 40).low == 0.5
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(TransferError):
            stats.mean_interval(bad)


def test_t_interval_covers_at_its_level():
    rng = np.random.default_rng(1)
    hits = [(i := stats.mean_interval(rng.normal(size=3))).low < 0 < i.high for _ in range(2000)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_paired_delta_equals_scipy_and_removes_shared_noise():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=8) * 10
    a, b = shared + 0.5 + rng.normal(size=8) * 0.1, shared
    got = stats.paired_delta(a, b)
    want: Any = ss.ttest_rel(a, b)
    unpaired: Any = ss.ttest_ind(a, b)
    assert got.p == pytest.approx(want.pvalue)
    assert (got.low, got.high) == pytest.approx(tuple(want.confidence_interval()))
    assert got.p < 1e-4 < unpaired.pvalue


def test_paired_delta_edges():
    assert stats.paired_delta([0.5, 0.6], [0.5, 0.6]).p == 1.0
    assert np.isnan(stats.paired_delta([0.5], [0.4]).p)
    with pytest.raises(TransferError, match="same seeds"):
        stats.paired_delta([1, 2], [1])


@given(P_VALUES)
@settings(max_examples=60, deadline=None)
def test_corrections_are_ordered_and_permutation_equivariant(p):
    holm, bh, raw = stats.holm(p), stats.benjamini_hochberg(p), np.array(p)
    assert np.all(raw <= bh + 1e-12)
    assert np.all(bh <= holm + 1e-12)
    assert np.all(holm <= np.minimum(1, raw * len(p)) + 1e-12)
    assert np.allclose(stats.holm(p[::-1]), holm[::-1])
    assert np.allclose(stats.benjamini_hochberg(p[::-1]), bh[::-1])


def test_corrections_known_answers():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    got = stats.holm([0.02, float("nan"), 0.03])
    assert np.isnan(got[1])
    assert got[0] == pytest.approx(0.04)
    with pytest.raises(TransferError):
        stats.holm([1.2])


def test_minimum_detectable_effect_is_what_simulation_finds():
    effect = stats.minimum_detectable_effect(sd=2.0, n=5, power=0.8)
    draws = np.random.default_rng(3).normal(effect, 2.0, size=(4000, 5))
    found: Any = ss.ttest_1samp(draws, 0, axis=1)
    assert (found.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)


@given(st.integers(2, 60), st.floats(1e-3, 10))
@settings(max_examples=25, deadline=None)
def test_minimum_detectable_effect_scales_and_shrinks_and_seeds_needed_inverts_it(n, sd):
    effect = stats.minimum_detectable_effect(sd, n)
    assert effect == pytest.approx(sd * stats.minimum_detectable_effect(1.0, n), rel=1e-6)
    assert stats.minimum_detectable_effect(sd, n + 1) < effect
    assert stats.seeds_needed(effect * 1.0001, sd) == n


def test_power_edges():
    assert np.isnan(stats.minimum_detectable_effect(1.0, 1))
    assert stats.minimum_detectable_effect(0.0, 3) == 0.0
    assert stats.seeds_needed(0.0, 1.0) is None
    assert stats.seeds_needed(1e-6, 1.0) is None
    assert stats.seeds_needed(0.1, 0.0) == 2


def test_bootstrap_counts_are_blocks_of_resamples():
    blocks = list(stats.bootstrap_counts(50, 23, seed=0, limit=500))
    counts = np.concatenate(blocks, axis=1)
    assert counts.shape == (50, 23)
    assert max(b.shape[1] for b in blocks) == 10
    assert np.all(counts.sum(axis=0) == 50)


def _accuracy(labels, scores, counts):
    return ((scores > 0.5) == labels) @ counts / counts.sum(axis=0)


def test_bootstrap_stderr_of_accuracy_is_the_binomial_one():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    scores = np.where(rng.random(400) < 0.8, labels, 1 - labels).astype(float)
    accuracy = np.mean((scores > 0.5) == labels)
    want = np.sqrt(accuracy * (1 - accuracy) / 400)
    assert stats.bootstrap_stderr(labels, scores, _accuracy, 2000) == pytest.approx(want, rel=0.06)


def test_hierarchical_delta_sees_a_difference_and_its_absence():
    rng = np.random.default_rng(5)
    labels = (np.arange(300) % 5 == 0).astype(np.int64)
    noise = rng.normal(size=(5, 300))
    weak, strong = labels + noise, 2.5 * labels + noise
    got = stats.hierarchical_delta(labels, strong, weak, weighted_auprc, draws=500)
    assert got.low > 0.1
    assert got.low < got.value < got.high
    same = stats.hierarchical_delta(labels, weak, weak, weighted_auprc, draws=200)
    assert (same.low, same.high) == (0.0, 0.0)
    other = labels + rng.normal(size=(5, 300))
    null = stats.hierarchical_delta(labels, other, weak, weighted_auprc, draws=500)
    assert null.low < 0 < null.high
    with pytest.raises(TransferError, match="shape"):
        stats.hierarchical_delta(labels, strong, weak[:4], weighted_auprc)


def test_hierarchical_interval_is_wider_than_seeds_alone_when_examples_are_few():
    rng = np.random.default_rng(6)
    labels = (np.arange(40) % 4 == 0).astype(np.int64)
    base = rng.normal(size=40)
    weak = labels + np.stack([base + 0.01 * rng.normal(size=40) for _ in range(4)])
    strong = weak + labels * rng.exponential(size=40)
    per_seed = [
        weighted_auprc(labels, s, np.ones((40, 1)))[0] - weighted_auprc(labels, w, np.ones((40, 1)))[0]
        for s, w in zip(strong, weak, strict=True)
    ]
    seeds_only = stats.mean_interval(per_seed)
    both = stats.hierarchical_delta(labels, strong, weak, weighted_auprc, draws=500)
    assert both.value == pytest.approx(seeds_only.value)
    assert both.high - both.low > 2 * (seeds_only.high - seeds_only.low)

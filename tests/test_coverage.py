from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.core.errors import TransferError
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.cover.compare import SHARES, deal, interval, numbers
from transfer.cover.delta import DeltaRule, activated, fires, thresholds
from transfer.cover.kl import feature_costs, kl_frequency, kl_terms
from transfer.cover.tally import Tally, tally
from transfer.coverage import alive, coverage, missing_hit_interval, missing_hit_rate
from transfer.verbs.cover import _text
from transfer.verbs.lines import lines_of


def space(n: int) -> FeatureSpace:
    return FeatureSpace("zoo:llama", "m", 3, "zoo:llama", "s", n, 8, "topk-2", 5)


def csr(rows: list[list[float]]) -> sp.csr_matrix:
    return sp.csr_matrix(np.array(rows, dtype=np.float32))


def scattered(rng: np.random.Generator, n_docs: int, n: int, density: float) -> sp.csr_matrix:
    return sp.csr_matrix((rng.random((n_docs, n)) * (rng.random((n_docs, n)) < density)).astype(np.float32))


def chosen(n: int, ids: list[int]) -> FeatureSet:
    return FeatureSet(space(n), np.array(ids), "test", labels=tuple("x" for _ in ids))


def test_quantile_thresholds_are_each_features_own():
    docs = csr([[1, 0, 5, 0], [3, 0, 0, 0], [2, 0, 9, 0], [0, 4, 0, 0]])
    assert thresholds(docs).tolist() == [2, 4, 7, 0]
    assert thresholds(docs, DeltaRule("quantile", 0.25)).tolist() == [1.5, 4, 6, 0]
    assert thresholds(docs, DeltaRule("quantile", 0)).tolist() == [1, 4, 5, 0]
    assert thresholds(docs, DeltaRule.parse("constant:1.5")).tolist() == [1.5] * 4
    assert thresholds(docs).dtype == np.float32


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_thresholds_agree_with_numpy(seed: int, q: float):
    rng = np.random.default_rng(seed)
    docs = scattered(rng, 30, 12, 0.3)
    mine = thresholds(docs, DeltaRule("quantile", q))
    dense = docs.toarray()
    for i in range(12):
        positive = dense[:, i][dense[:, i] > 0]
        expected = np.quantile(positive.astype(np.float64), q) if len(positive) else 0.0
        assert mine[i] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "text", ["quantile", "median:0.5", "quantile:1", "constant:-1", "constant:nan", "scale:-1", "scale:x", ":"]
)
def test_bad_rules_are_refused(text: str):
    with pytest.raises(TransferError):
        DeltaRule.parse(text)


def test_the_scale_rule_is_a_share_of_each_features_strong_activation():
    values = np.arange(1, 22, dtype=np.float32)  # 21 documents; the 95th percentile is the 20th value
    docs = sp.csr_matrix(np.column_stack([values, 10 * values, np.zeros(21, dtype=np.float32)]))
    assert thresholds(docs, DeltaRule.parse("scale:0.5")).tolist() == [10, 100, 0]
    # Many weak activations move a quantile, and the scale hardly.
    weak = sp.csr_matrix(np.concatenate([values, np.full(100, 0.01, dtype=np.float32)])[:, None])
    assert thresholds(weak, DeltaRule("quantile", 0.5))[0] < 0.1
    assert thresholds(weak, DeltaRule("scale", 0.5))[0] > 7


def test_the_rule_text_round_trips():
    assert str(DeltaRule.parse("scale:0.25")) == "scale:0.25"
    assert DeltaRule.parse(str(DeltaRule("quantile", 0.75))) == DeltaRule("quantile", 0.75)


def test_activation_is_strict():
    docs = csr([[1, 2, 0], [0, 2, 3]])
    delta = np.array([1, 1.5, 0], dtype=np.float32)
    assert fires(docs, delta).toarray().tolist() == [[False, True, False], [False, True, True]]
    assert activated(docs, delta).tolist() == [False, True, True]
    stored_zero = sp.csr_matrix((np.array([0.0], dtype=np.float32), ([0], [1])), shape=(1, 3))
    assert not activated(stored_zero, np.zeros(3)).any()
    with pytest.raises(TransferError, match="NaN"):
        fires(csr([[np.nan, 0, 0]]), delta)
    with pytest.raises(TransferError, match="2 features, the thresholds 3"):
        fires(csr([[1, 1]]), delta)


def test_dead_and_always_on_features():
    docs = csr([[1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1]])
    state = alive(docs)
    assert state.dead.tolist() == [False, True, False]
    assert state.always_on.tolist() == [True, False, False]  # 3 of 4; exactly half is still allowed
    assert state.mask.tolist() == [False, False, True]
    assert not alive(docs, also=csr([[0, 1, 0]])).dead.any()


# Ten features. Anchor of 4 documents, data of 3; δ = 1 for all. Relevant F = 0..7.
# feature:        0  1  2  3  4  5  6  7  8  9
ANCHOR = csr([
    [2, 0, 2, 0, 0, 1, 2, 0, 2, 0],
    [0, 2, 0, 2, 0, 0, 2, 0, 2, 0],
    [0, 0, 0, 0, 0, 0, 2, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
])  # fmt: skip
DATA = csr([
    [2, 0, 0, 0, 2, 2, 2, 0, 0, 2],
    [2, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    [0, 2, 0, 0, 0, 0, 0, 0, 0, 0],
])  # fmt: skip
# 6 fires on 3 of 4 anchor documents: always on. 7 never fires: dead. F becomes {0..5}.
# F(P) = {0,1,2,3} (5 is not above 1 there). F(Q) = {0,1,4,5}. Covered {0,1}, missing {2,3}.


def hand_case(**kwargs) -> CoverageReport:
    delta = np.ones(10, dtype=np.float32)
    return coverage(space(10), ANCHOR, DATA, chosen(10, list(range(8))), delta, dataset="seed", **kwargs)


def test_coverage_against_values_worked_out_by_hand(tmp_path: Path):
    report = hand_case(eps=0.1, delta_rule="constant:1")
    assert report.relevant.features.tolist() == [0, 1, 2, 3, 4, 5]
    assert report.anchor_features.features.tolist() == [0, 1, 2, 3]
    assert report.covered.features.tolist() == [0, 1]
    assert report.missing.features.tolist() == [2, 3]
    assert report.fac == 0.5
    assert report.fac_uncapped == 1.0  # |F(Q)| / |F(P)| = 4 / 4
    assert "left out 1 dead and 1 always-on" in report.relevant.why
    assert report.missing.labels == ("x", "x")
    # Q^ε on covered: 0.9/4 + 0.1/6; on missing: 0.1/6. P: 1/4 each.
    q = 0.9 / 4 + 0.1 / 6
    by_hand = 2 * 0.25 * math.log(0.25 / q) + 2 * 0.25 * math.log(0.25 / (0.1 / 6))
    assert report.kl == pytest.approx(by_hand, rel=1e-12)
    assert report.summary()["n_missing"] == 2 and report.n_docs == 3
    report.save(tmp_path / "c.json")
    again = CoverageReport.load(tmp_path / "c.json")
    assert again.summary() == report.summary() and again.missing.features.tolist() == [2, 3]


# Four features at δ = 1. Anchor of 4 documents, data of 8.
SMALL_ANCHOR = csr([[2, 3, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0.5], [0, 0, 0, 0]])
SMALL_DATA = csr([[4, 2, 0, 0], [0, 2, 0, 0], [0, 0, 1, 2], [0, 0, 0, 2], [0, 0, 0, 2], [0] * 4, [0] * 4, [0] * 4])


def small_case(**kwargs) -> CoverageReport:
    delta = np.ones(4, dtype=np.float32)
    return coverage(space(4), SMALL_ANCHOR, SMALL_DATA, chosen(4, [0, 1, 2, 3]), delta, eps=0.1, **kwargs)


def test_every_number_worked_out_by_hand():
    report = small_case()
    # Above 1 the anchor has feature 0 twice, 1 once, 2 once, 3 never; the data 0 once, 1 twice, 2 never, 3 thrice.
    assert report.anchor_features.features.tolist() == [0, 1, 2]
    assert report.covered.features.tolist() == [0, 1] and report.missing.features.tolist() == [2]
    assert report.fac == pytest.approx(2 / 3) and report.fac_uncapped == pytest.approx(3 / 3)
    # Shares of documents: anchor 2/4, 1/4, 1/4; data 1/8, 2/8, 0. Reached: (1/8)/(2/4) = 1/4, all of 1, none.
    assert report.fac_frequency == pytest.approx((1 / 4 + 1 + 0) / 3)
    # Mean activations above δ: anchor 4/4, 3/4, 2/4; data 4/8, 4/8, 0. Reached: 1/2, 2/3, none.
    assert report.fac_magnitude == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    # Uniform surrogate: Q^ε = 0.9/3 + 0.1/4 = 0.325 on covered, 0.1/4 = 0.025 on missing features, P = 1/3 each.
    uniform = [math.log((1 / 3) / 0.325) / 3] * 2 + [math.log((1 / 3) / 0.025) / 3]
    assert report.kl == pytest.approx(sum(uniform))
    # By frequency: P = 2/4, 1/4, 1/4, 0; Q = 0.9 · (1, 2, 0, 3)/6 + 0.025 = 0.175, 0.325, 0.025, 0.475.
    frequency = [0.5 * math.log(0.5 / 0.175), 0.25 * math.log(0.25 / 0.325), 0.25 * math.log(0.25 / 0.025)]
    assert report.kl_frequency == pytest.approx(sum(frequency))
    # Feature 2 costs 0.576, feature 0 costs 0.525; feature 1 costs nothing: the data has more of it than the anchor.
    assert [c["feature"] for c in report.costs] == [2, 0]
    assert [c["kl_frequency"] for c in report.costs] == pytest.approx([frequency[2], frequency[0]])
    assert [c["kl"] for c in report.costs] == pytest.approx([uniform[2], uniform[0]])
    assert report.costs[0]["missing"] and not report.costs[1]["missing"]
    assert report.costs[1]["anchor_share"] == 0.5 and report.costs[1]["data_share"] == 0.125
    # Generated texts that activate feature 2 in one of two: one hit of one missing feature.
    kept = csr([[0, 0, 1.5, 0], [9, 0, 1, 0]])
    assert missing_hit_rate(report.missing, kept, np.ones(4, dtype=np.float32)) == (1, 1.0)


def test_costs_add_up_to_the_divergences():
    rng = np.random.default_rng(1)
    anchor, data = rng.integers(0, 5, size=50), rng.integers(0, 3, size=50)
    costs = feature_costs(np.arange(50), anchor, data, 1e-2)
    n, q, c = (int(np.count_nonzero(x)) for x in (anchor, data, (anchor > 0) & (data > 0)))
    assert costs.uniform.sum() == pytest.approx(sum(kl_terms(n, q, c, 50, 1e-2)))
    assert costs.frequency.sum() == pytest.approx(float(kl_frequency(anchor, data, 1e-2)))
    assert np.all(costs.frequency[anchor == 0] == 0) and np.all(costs.uniform[anchor == 0] == 0)
    assert kl_frequency(anchor, data[:, None] * np.array([1, 7]), 1e-2) == pytest.approx([costs.frequency.sum()] * 2)
    assert kl_frequency(anchor, anchor, 1e-9) == pytest.approx(0, abs=1e-6)
    assert np.array_equal(costs.order(), np.lexsort((np.arange(50), -costs.frequency)))


def test_the_first_term_of_the_surrogate_is_not_monotone():
    terms = [kl_terms(10, n, n, 20, 1e-3)[0] for n in range(1, 11)]
    assert min(np.diff(terms)) < 0 < max(np.diff(terms))  # falls, then rises with features covered
    assert kl_terms(10, 9, 2, 20, 1e-3)[0] > kl_terms(10, 2, 2, 20, 1e-3)[0]  # rises with features the anchor lacks


def test_intervals_of_all_numbers_equal_a_plain_loop():
    report, found = small_case(), {}
    for left_out in range(8):
        fewer = SMALL_DATA[[i for i in range(8) if i != left_out]]
        again = coverage(space(4), SMALL_ANCHOR, fewer, chosen(4, [0, 1, 2, 3]), np.ones(4, np.float32), eps=0.1)
        for name in ("fac", "fac_uncapped", "fac_frequency", "fac_magnitude", "kl", "kl_frequency"):
            found.setdefault(name, []).append(getattr(again, name))
    # One covered feature more or less: a third of F(P); KL over two or one of three anchor features covered.
    q = [0.9 / 2 + 0.025, 0.025, 0.025]
    beside = sum(math.log((1 / 3) / x) / 3 for x in q)
    one = {"fac": 1 / 3, "fac_uncapped": 1 / 3, "kl": beside - report.kl}
    assert set(report.intervals) == set(found) - {"fac"}
    for name, values in found.items():
        variance = 7 / 8 * np.sum((np.array(values) - np.mean(values)) ** 2) + one.get(name, 0) ** 2
        half, value = 2.364624 * math.sqrt(variance), getattr(report, name)  # t with 7 degrees of freedom
        top = 1 if name in ("fac", "fac_frequency", "fac_magnitude") else math.inf
        ends = [report.ci_low, report.ci_high] if name == "fac" else report.intervals[name]
        assert ends == pytest.approx([max(value - half, 0), min(value + half, top)], abs=1e-5), name


def test_the_hit_rate_has_an_interval():
    rng = np.random.default_rng(2)
    kept, missing = scattered(rng, 30, 10, 0.05), chosen(10, list(range(10)))
    _, rate = missing_hit_rate(missing, kept, np.zeros(10))
    low, high = missing_hit_interval(missing, kept, np.zeros(10), seed=1)
    dense = kept.toarray() > 0
    without = [np.delete(dense, i, axis=0).any(axis=0).mean() for i in range(30)]
    half = 2.04523 * math.sqrt(29 / 30 * np.sum((np.array(without) - np.mean(without)) ** 2) + 0.1**2)
    assert (low, high) == pytest.approx((max(rate - half, 0), min(rate + half, 1)), abs=1e-5)
    assert missing_hit_interval(chosen(10, []), kept, np.zeros(10)) == (None, None)
    for few in (0, 1, 4):
        assert missing_hit_interval(missing, kept[:few], np.zeros(10)) == (None, None)
    # A hundred texts are dealt to groups, and a group is left out at a time.
    many = scattered(rng, 100, 10, 0.02)
    assert len(deal(100)) == 100 and np.bincount(deal(100)).tolist() in ([[2] * 36 + [1] * 28])
    low, high = missing_hit_interval(missing, many, np.zeros(10))
    assert low is not None and high is not None and 0 <= low < high <= 1


@pytest.mark.parametrize(
    ("n_docs", "n_features", "low", "high"), [(50, 8, 0.01, 0.1), (40, 200, 0.002, 0.2), (20, 100, 0.3, 0.9)]
)
def test_intervals_hold_the_expected_value(n_docs: int, n_features: int, low: float, high: float):
    """Of nominal 95 % intervals of 100 other data sets, as good as nine in ten hold what such data has on average."""
    rng = np.random.default_rng(0)
    share = np.exp(rng.uniform(np.log(low), np.log(high), n_features))
    features = np.arange(n_features)

    def draw(n: int, scale: float = 1.0) -> Tally:
        some = (rng.random((n, n_features)) < np.minimum(scale * share, 0.9)) * rng.gamma(4, 0.25, (n, n_features))
        return tally(sp.csr_matrix(some.astype(np.float32)), np.zeros(n_features), features)

    anchor = draw(200, 2.0)
    values = [numbers(anchor, draw(n_docs), 1e-3)[0] for _ in range(500)]
    held: dict[str, list[bool]] = {}
    for _ in range(100):
        found, without, one = numbers(anchor, draw(n_docs), 1e-3)
        for name, value in found.items():
            expected = float(np.mean([v[name] for v in values]))
            ends = interval(without[name], value, 0.95, one.get(name, 0.0), name in SHARES)
            assert ends[0] is not None and ends[1] is not None and 0 <= ends[0] <= value <= ends[1]
            assert name not in SHARES or ends[1] <= 1
            held.setdefault(name, []).append(bool(ends[0] <= expected <= ends[1]))
    assert {name: np.mean(each) for name, each in held.items() if np.mean(each) < 0.88} == {}


def test_what_is_left_out_is_counted():
    report = hand_case()
    assert (report.n_dead, report.n_always_on, report.always_on) == (1, 1, 0.5)
    assert report.summary()["n_always_on"] == 1


def test_few_documents_have_no_interval(tmp_path: Path):
    relevant, delta = chosen(4, [0, 1, 2, 3]), np.ones(4, np.float32)
    for n in (1, 4, 5):
        report = coverage(space(4), SMALL_ANCHOR, SMALL_DATA[:n], relevant, delta)
        ends = [report.ci_low, report.ci_high, *(end for both in report.intervals.values() for end in both)]
        assert len(ends) == 12 and all((end is None) == (n < 5) for end in ends)
        report.save(tmp_path / f"{n}.json")
        row = CoverageReport.load(tmp_path / f"{n}.json").summary()
        assert row == report.summary()
        assert ("[" in _text(row)) == (n == 5) and f"fac {report.fac:.3f}" in lines_of({"coverage": [row]})


def test_coverage_refuses_an_empty_anchor_set_and_foreign_features():
    delta = np.full(10, 99, dtype=np.float32)
    with pytest.raises(TransferError, match="activates none of the 6 relevant"):
        coverage(space(10), ANCHOR, DATA, chosen(10, list(range(8))), delta)
    other = FeatureSet(
        FeatureSpace("zoo:qwen", "m", 3, "zoo:qwen", "s", 10, 8, "topk-2", 5), np.array([0]), "elsewhere"
    )
    with pytest.raises(TransferError, match="belongs to feature space"):
        coverage(space(10), ANCHOR, DATA, other, np.ones(10, dtype=np.float32))
    with pytest.raises(TransferError, match="data documents have 9 features"):
        coverage(space(10), ANCHOR, DATA[:, :9], chosen(10, [0]), np.ones(10, dtype=np.float32))


def test_an_empty_dataset_covers_nothing():
    nothing = sp.csr_matrix((0, 10), dtype=np.float32)
    report = coverage(space(10), ANCHOR, nothing, chosen(10, [0, 1, 2, 3]), np.ones(10, dtype=np.float32), eps=0.1)
    assert (report.fac, report.ci_low, report.ci_high, len(report.missing)) == (0, None, None, 4)
    assert report.kl == pytest.approx(math.log(4 / (0.1 * 4)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 25))
def test_coverage_never_falls_when_documents_are_added(seed: int, n: int):
    rng = np.random.default_rng(seed)
    anchor = scattered(rng, 30, 25, 0.15)
    data = scattered(rng, 26, 25, 0.08)
    delta = thresholds(anchor)
    relevant = chosen(25, list(range(25)))
    less = coverage(space(25), anchor, data[:n], relevant, delta)
    more = coverage(space(25), anchor, data[: n + 1], relevant, delta)
    assert more.fac >= less.fac
    assert set(more.missing.features) <= set(less.missing.features)
    assert len(more.covered) + len(more.missing) == len(more.anchor_features)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 20), st.floats(1e-4, 1))
def test_the_smoothed_divergence_is_one_and_its_missing_term_falls_linearly(n: int, extra: int, rest: int, eps: float):
    relevant = n + extra + rest
    terms = []
    for covered in range(n + 1):
        in_data = covered + extra
        p = np.zeros(relevant)
        p[:n] = 1 / n
        q = np.zeros(relevant)
        q[n - covered : n + extra] = 1 / in_data if in_data else 0
        q = (1 - eps) * q + eps / relevant
        direct = float((p[:n] * np.log(p[:n] / q[:n])).sum())
        first, second = kl_terms(n, in_data, covered, relevant, eps)
        assert first + second == pytest.approx(direct, rel=1e-9, abs=1e-12)
        terms.append(second)
    assert np.allclose(np.diff(terms), -math.log(relevant / (eps * n)) / n)
    if extra == rest == 0:
        assert sum(kl_terms(n, n, n, n, eps)) == pytest.approx(0, abs=1e-12)


def test_divergence_needs_a_sensible_eps_and_an_anchor():
    with pytest.raises(TransferError, match="eps"):
        kl_terms(3, 1, 1, 5, 0)
    with pytest.raises(TransferError, match="empty anchor"):
        kl_terms(0, 1, 0, 5, 0.1)


def test_missing_hit_rate_is_not_fac():
    missing = chosen(10, [2, 3, 7])
    kept = csr([[0, 0, 2, 1, 0, 0, 0, 0, 0, 0], [9, 9, 0, 0, 9, 9, 9, 0, 9, 9]])
    n_hit, rate = missing_hit_rate(missing, kept, np.ones(10, dtype=np.float32))
    assert n_hit == 1 and rate == pytest.approx(1 / 3)
    assert math.isnan(missing_hit_rate(chosen(10, []), kept, np.ones(10))[1])


def test_planted_missing_features_are_found_exactly():
    rng = np.random.default_rng(0)
    n = 200
    anchor = np.zeros((400, n), dtype=np.float32)
    for row in anchor:
        row[rng.choice(n, size=8, replace=False)] = rng.uniform(1, 3, size=8)
    gone = np.sort(rng.choice(n, size=25, replace=False))
    data = anchor.copy()
    data[:, gone] = 0
    report = coverage(
        space(n),
        sp.csr_matrix(anchor),
        sp.csr_matrix(data),
        chosen(n, list(range(n))),
        thresholds(sp.csr_matrix(anchor)),
    )
    assert report.missing.features.tolist() == gone.tolist()

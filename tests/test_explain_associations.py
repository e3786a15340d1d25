from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mutual_info_score, roc_auc_score

from tests.test_explain import planted, space
from transfer.core.errors import TransferError
from transfer.cover.delta import size
from transfer.evidence.associations import associate_auroc, associate_information
from transfer.evidence.relevance import judge_relevance


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_sparse_auroc_equals_the_dense_one_ties_and_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 40))
    dense = np.where(rng.random((n, 4)) < 0.5, rng.integers(1, 4, (n, 4)), 0).astype(np.float32)
    member = np.arange(n) % int(rng.integers(2, 4)) == 0
    docs = sp.csr_matrix(dense)
    docs.data[:1] = 0  # an explicit zero is as silent as an absent one
    dense = docs.toarray()
    found = associate_auroc(docs, {"a": member}, min_support=0, null="analytic")
    for i in range(4):
        expected = roc_auc_score(member, dense[:, i])
        assert found.effect[i, 0] == pytest.approx(expected)
        if expected > 0.5 and np.ptp(dense[:, i]):
            test = stats.mannwhitneyu(dense[member, i], dense[~member, i], alternative="greater", method="asymptotic")
            assert found.p_values[i, 0] == pytest.approx(test.pvalue)
        else:
            assert found.p_values[i, 0] == 1


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_information_equals_the_textbook(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(10, 50))
    fired = rng.random((n, 3)) < 0.4
    values = np.array([f"c{i}" for i in rng.integers(3, size=n)], dtype=object)
    values[:3] = ["c0", "c1", "c2"]
    found = associate_information(sp.csr_matrix(fired), {"topic": values}, min_support=0, null="analytic")
    for i in range(3):
        information = mutual_info_score(values, fired[:, i])
        assert found.effect[i, 0] == pytest.approx(information, abs=1e-12)
        p = found.p_values[i].min()
        assert p == pytest.approx(stats.chi2.sf(2 * n * information, 2)) and np.sum(found.p_values[i] < 1) <= 1


@pytest.mark.parametrize("test", ["auroc", "information"])
@pytest.mark.parametrize("null", ["permutation", "analytic"])
def test_planted_features_are_found_by_every_test(test: str, null: str) -> None:
    docs, labels, topics = planted()
    found = judge_relevance(space(size(docs)[1]), docs, labels, topics, fdr=0.05, test=test, null=null)
    by_id = dict(zip(found.features.tolist(), zip(found.labels, found.descriptions, strict=True), strict=True))
    assert by_id[0] == ("harmful", "label harmful") and by_id[1] == ("benign", "label benign")
    assert by_id[2][1] == "topic t3" and 3 not in by_id and 4 not in by_id
    assert len(by_id) <= 3 + 4
    assert f"{null} null" in found.judge


def test_a_graded_feature_is_seen_by_its_strength_alone() -> None:
    """It fires everywhere, but twice as strongly on one label: invisible to a test of firing."""
    rng = np.random.default_rng(1)
    labels = np.array(["harmful", "benign"] * 750)
    dense = rng.uniform(1, 2, (1500, 40)) * (rng.random((1500, 40)) < 0.4)
    dense[:, 0] *= np.where(labels == "harmful", 2.0, 1.0)
    docs = sp.csr_matrix(dense.astype(np.float32))
    everywhere = np.zeros(40, dtype=np.float32)
    by_strength = judge_relevance(space(40), docs, list(labels), test="auroc", delta=everywhere, always_on=0.9)
    by_firing = judge_relevance(space(40), docs, list(labels), delta=everywhere, always_on=0.9)
    assert 0 in by_strength.features and 0 not in by_firing.features


def false_positives(test: str, null: str, level: float) -> float:
    """Share of p ≤ level among rare features (3 to 6 of 400 documents) that know nothing of a label of 8 %."""
    rng = np.random.default_rng(3)
    n = 400
    member = rng.permutation(n) < 32
    columns = [rng.choice(n, size=k, replace=False) for k in rng.integers(3, 7, size=1500)]
    row = np.concatenate(columns)
    column = np.repeat(np.arange(1500), [len(c) for c in columns])
    docs = sp.csr_matrix((rng.random(len(row)) + 0.1, (row, column)), shape=(n, 1500))
    if test == "auroc":
        found = associate_auroc(docs, {"a": member}, null=null, seed=5).p_values[:, 0]
    else:
        values = np.where(member, "a", "b").astype(object)
        found = associate_information(docs > 0, {"label": values}, null=null, seed=5).p_values.min(axis=1)
    return float(np.mean(found <= level))


@pytest.mark.parametrize("test", ["auroc", "information"])
def test_the_permutation_null_holds_its_level_for_rare_features(test: str) -> None:
    # 1500 tests: three standard errors above 1 % is 1.8 %.
    assert false_positives(test, "permutation", 0.01) <= 0.018


@pytest.mark.parametrize("test", ["auroc", "information"])
def test_the_tail_beyond_the_draws_errs_upwards(test: str) -> None:
    assert false_positives(test, "permutation", 1e-4) <= 3 / 1500


def test_the_analytic_null_does_not_hold_for_rare_features() -> None:
    """Why the permutation null is the default: the normal tail is too thin where ranks are lumpy."""
    assert false_positives("auroc", "analytic", 0.001) > 5 * 0.001


def test_noise_is_rarely_found_and_draws_repeat() -> None:
    n_found = 0
    for seed in range(4):
        docs, labels, topics = planted(seed)
        noise = docs[:, 5:].tocsr()
        first, second = (
            judge_relevance(space(size(noise)[1]), noise, labels, topics, test="auroc", seed=7) for _ in range(2)
        )
        assert first.to_dict() == second.to_dict()
        n_found += len(first)
    assert n_found <= 6


def test_what_cannot_be_tested_is_refused() -> None:
    docs, labels, _ = planted()
    with pytest.raises(TransferError, match="no document, or all"):
        associate_auroc(docs, {"a": np.ones(len(labels), dtype=bool)})
    with pytest.raises(TransferError, match="no test 'wishes'"):
        judge_relevance(space(size(docs)[1]), docs, labels, test="wishes")
    with pytest.raises(TransferError, match="A null is one of"):
        judge_relevance(space(size(docs)[1]), docs, labels, test="auroc", null="none")
    with pytest.raises(TransferError, match="two classes"):
        associate_information(docs > 0, {"label": np.array(["x"] * len(labels), dtype=object)})
    with pytest.raises(TransferError, match="negative"):
        associate_auroc(-docs, {"a": np.arange(len(labels)) < 5})


def test_many_features_are_ranked_without_a_dense_matrix() -> None:
    rng = np.random.default_rng(0)
    row, column = np.repeat(np.arange(1000), 200), rng.integers(65_536, size=200_000)
    docs = sp.csr_matrix((rng.random(200_000, dtype=np.float32), (row, column)), shape=(1000, 65_536))
    found = associate_auroc(docs, {"a": rng.random(1000) < 0.3}, n_null=3)
    assert found.effect.shape == (65_536, 1) and np.sum(found.q_values <= 0.05) < 20

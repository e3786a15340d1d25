"""Harmful-intent detection: labels, metrics against scikit-learn, files, registry."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from transfer.core.errors import TransferError
from transfer.core.texts import Corpus, Text
from transfer.tasks import TASKS, get_task
from transfer.tasks.base import Predictions, Task
from transfer.tasks.intent import Intent, expected_calibration_error, unseen_topics, weighted_auprc, weighted_auroc


def corpus(labels, topics=None) -> Corpus:
    topics = topics or [""] * len(labels)
    rows = zip(labels, topics, strict=True)
    return Corpus("c", tuple(Text(f"t{i}", f"text {i}", label, topic) for i, (label, topic) in enumerate(rows)))


class Fixed:
    """Predicts given positive probabilities."""

    def __init__(self, scores, n_truncated=0):
        self.scores, self.n_truncated = np.asarray(scores, dtype=float), n_truncated

    def predict(self, texts):
        return Predictions(np.stack([1 - self.scores, self.scores], axis=1), self.n_truncated)


def test_registry_and_protocol():
    assert isinstance(TASKS["intent"], Task)
    assert get_task("intent", positive="toxic") == Intent(positive="toxic")
    with pytest.raises(TransferError, match="Did you mean 'intent'"):
        get_task("intents")
    with pytest.raises(TransferError, match="Did you mean 'positive'"):
        get_task("intent", postive="x")


def test_examples():
    task = Intent()
    assert task.examples(corpus(["harmful", "benign"])) == [("text 0", 1), ("text 1", 0)]
    assert task.examples(corpus(["harmful"])) == [("text 0", 1)]
    assert Intent(positive="1", negative="0").examples(corpus(["0", "1"])) == [("text 0", 0), ("text 1", 1)]
    with pytest.raises(TransferError, match="no label, first 't1'"):
        task.examples(corpus(["harmful", ""]))
    with pytest.raises(TransferError, match="harmful, odd, safe"):
        task.examples(corpus(["harmful", "odd", "safe"]))
    with pytest.raises(TransferError, match="'benign'"):
        Intent(negative="benign").examples(corpus(["harmful", "safe"]))


def test_known_auprc_and_auroc(tmp_path):
    # Ranked: + - + -  ->  AP = (1/1 + 2/3) / 2, AUROC = 3 of 4 pairs.
    data = corpus(["harmful", "benign", "harmful", "benign"])
    auprc, auroc = Intent(draws=50).evaluate(Fixed([0.9, 0.8, 0.7, 0.1], 2), data, tmp_path / "k.jsonl")
    assert (auprc.metric, auroc.metric) == Intent.metrics
    assert auprc.value == pytest.approx((1 + 2 / 3) / 2)
    assert auroc.value == pytest.approx(0.75)
    assert auprc.extra["brier"] == pytest.approx(brier_score_loss([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]))
    assert auprc.extra["n_truncated"] == 2
    assert auprc.n == 4


def test_per_example_file_has_scores_and_no_text(tmp_path):
    data = corpus(["harmful", "benign"])
    result = Intent(draws=20).evaluate(Fixed([0.25, 0.75]), data, tmp_path / "cell.jsonl")[0]
    rows = [json.loads(line) for line in (tmp_path / result.per_example).read_text().splitlines()]
    assert rows == [{"id": "t0", "label": 1, "score": 0.25}, {"id": "t1", "label": 0, "score": 0.75}]
    assert [p.name for p in tmp_path.iterdir()] == ["cell.jsonl"]


def test_unseen_topics_are_scored_apart(tmp_path):
    labels = ["harmful", "benign", "benign", "harmful", "benign", "harmful"]
    data = corpus(labels, ["a", "a", "a", "b", "b", "c"])
    scores = [0.9, 0.1, 0.2, 0.3, 0.6, 0.8]
    results = Intent(unseen=("b",), draws=50).evaluate(Fixed(scores), data, tmp_path / "k.jsonl")
    assert [r.metric for r in results] == ["auprc", "auroc", "auprc@unseen", "auroc@unseen"]
    assert (results[2].n, results[2].value, results[3].value) == (2, 0.5, 0.0)
    one_class = Intent(unseen=("c",), draws=50).evaluate(Fixed(scores), data, tmp_path / "k.jsonl")
    assert len(one_class) == 2
    assert (one_class[0].extra["n_unseen"], one_class[0].extra["n_unseen_positive"]) == (1, 1)
    assert unseen_topics(corpus(["x", "x"], ["a", ""]), data) == ("b", "c")


def test_stderr_repeats_and_shrinks_with_n(tmp_path):
    rng = np.random.default_rng(0)

    def stderr(n):
        labels = np.arange(n) % 4 == 0
        data = corpus(["harmful" if y else "benign" for y in labels])
        scores = 1 / (1 + np.exp(-1.0 * labels - rng.normal(size=n)))
        return Intent().evaluate(Fixed(scores), data, tmp_path / "k.jsonl")[0].stderr

    assert stderr(1600) == pytest.approx(stderr(100) / 4, rel=0.5)
    data = corpus(["harmful", "benign"] * 10)
    model = Fixed(np.linspace(0, 1, 20))
    one, two = (Intent().evaluate(model, data, tmp_path / "k.jsonl") for _ in range(2))
    assert one == two


def test_refusals(tmp_path):
    out = tmp_path / "k.jsonl"
    with pytest.raises(TransferError, match="needs both classes"):
        Intent().evaluate(Fixed([0.1, 0.2]), corpus(["benign", "benign"]), out)
    with pytest.raises(TransferError, match="not finite"):
        Intent().evaluate(Fixed([0.1, float("nan")]), corpus(["benign", "harmful"]), out)
    with pytest.raises(TransferError, match="not finite"):
        Intent().evaluate(Fixed([0.1]), corpus(["benign", "harmful"]), out)
    assert not out.exists()


SCORED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=30)


@given(SCORED)
@settings(max_examples=80, deadline=None)
def test_weighted_metrics_equal_sklearn_with_ties(rows):
    labels, ranks, weights = (np.array(column) for column in zip(*rows, strict=True))
    kept = np.repeat(labels, weights)
    if not 0 < kept.sum() < len(kept):
        return
    scores = ranks / 5
    got = weighted_auprc(labels, scores, weights[:, None]), weighted_auroc(labels, scores, weights[:, None])
    repeated = np.repeat(scores, weights)
    assert got[0][0] == pytest.approx(average_precision_score(kept, repeated))
    assert got[1][0] == pytest.approx(roc_auc_score(kept, repeated))


def test_weighted_metrics_without_a_class_are_nan():
    assert np.isnan(weighted_auprc(np.array([0, 0]), np.array([0.1, 0.2]), np.ones((2, 1))))[0]
    assert np.isnan(weighted_auroc(np.array([1, 1]), np.array([0.1, 0.2]), np.ones((2, 1))))[0]


def test_calibration_error_known_answers():
    labels = np.array([1, 0, 1, 0])
    assert expected_calibration_error(labels, np.full(4, 0.5)) == pytest.approx(0.0)
    assert expected_calibration_error(labels, np.full(4, 1.0)) == pytest.approx(0.5)
    assert expected_calibration_error(labels, labels.astype(float)) == pytest.approx(0.0)

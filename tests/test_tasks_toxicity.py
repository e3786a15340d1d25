"""Toxicity detection: label columns of real sets, calibration against known answers, three families."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss

from transfer.core.errors import TransferError
from transfer.core.texts import Corpus, Text
from transfer.tasks import get_task
from transfer.tasks.base import Predictions, Task
from transfer.tasks.intent import expected_calibration_error
from transfer.tasks.toxicity import FORMATS, Toxicity, load_toxicity, weighted_ece
from transfer.train.recipes import Recipe

UNKIND = ["you are a fool", "what a silly fool", "a fool and a bore", "only a bore says that", "fool, go away"]
KIND = ["you are kind", "what a kind thought", "thanks and good day", "a good day to you", "thanks, kind friend"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return str(path)


class Fixed:
    def __init__(self, scores):
        self.scores = np.asarray(scores, dtype=float)

    def predict(self, texts):
        return Predictions(np.stack([1 - self.scores, self.scores], axis=1), 0)


def corpus(labels) -> Corpus:
    return Corpus("c", tuple(Text(f"t{i}", f"text {i}", label) for i, label in enumerate(labels)))


@pytest.mark.parametrize(
    ("layout", "column", "toxic", "safe"),
    [
        ("surge", "toxic", "1", "0"),
        ("toxic-chat", "toxicity", 1, 0),
        ("toxic-chat", "toxicity", True, False),
        ("davidson", "label", "offensive", "neither"),
        ("davidson-hate", "label", "hate", "offensive"),
        ("civil-comments", "toxicity", 0.5, 0.49),
        ("labels", "label", "toxic", "safe"),
    ],
)
def test_label_columns(tmp_path, layout, column, toxic, safe):
    ref = write(tmp_path / "set.jsonl", [{"text": "one", column: toxic}, {"text": "two", column: safe}])
    found = Toxicity(layout=layout).load(ref)
    assert [t.label for t in found] == ["toxic", "safe"]
    assert Toxicity().examples(found) == [("one", 1), ("two", 0)]


def test_labels_that_say_neither_are_refused_and_counted(tmp_path):
    ref = write(tmp_path / "set.jsonl", [{"text": "a", "toxic": "1"}, {"text": "b", "toxic": "?"}])
    with pytest.raises(TransferError, match="1 rows .*'\\?'"):
        load_toxicity(ref, "surge")
    ref = write(tmp_path / "set.jsonl", [{"text": "a", "toxicity": "nan"}])
    with pytest.raises(TransferError, match="does not know"):
        load_toxicity(ref, "civil-comments")
    with pytest.raises(TransferError, match="no toxicity layout"):
        load_toxicity(ref, "surg")


def test_known_answers_of_every_metric(tmp_path):
    labels, scores = np.array([1, 0, 0, 0, 1, 0]), np.array([0.95, 0.85, 0.75, 0.65, 0.15, 0.1])
    task = Toxicity(draws=100)
    assert isinstance(task, Task)
    found = task.evaluate(Fixed(scores), corpus(["toxic" if y else "safe" for y in labels]), tmp_path / "k.jsonl")
    by = {r.metric: r for r in found}
    assert list(by) == ["auprc", "auroc", "brier", "ece"]
    assert by["auprc"].value == pytest.approx((1 + 2 / 5) / 2)
    assert by["auprc"].value == pytest.approx(average_precision_score(labels, scores))
    assert by["auroc"].value == pytest.approx(5 / 8), "not the number above: one cannot stand in for the other"
    assert by["brier"].value == pytest.approx(brier_score_loss(labels, scores))
    # Bins [.1,.2): scores .15 and .1, one positive: .75 short; .65, .75 and .85 over; [.9,1]: .05 short.
    assert by["ece"].value == pytest.approx((0.75 + 0.65 + 0.75 + 0.85 + 0.05) / 6)
    assert by["ece"].value == pytest.approx(expected_calibration_error(labels, scores))
    assert all(r.n == 6 and r.per_example == "k.jsonl" and r.stderr > 0 and r.task == "toxicity" for r in found)
    assert len((tmp_path / "k.jsonl").read_text().splitlines()) == 6


def test_weighted_calibration_is_that_of_repeated_examples():
    rng = np.random.default_rng(0)
    labels, scores, counts = rng.integers(0, 2, 40), rng.random(40), rng.integers(0, 3, 40)
    repeated = expected_calibration_error(np.repeat(labels, counts), np.repeat(scores, counts))
    assert weighted_ece(labels, scores, counts[:, None])[0] == pytest.approx(repeated)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
@pytest.mark.parametrize("kind", ["lora", "head"])
def test_every_family_trains_evaluates_and_repeats(family, kind, request, tmp_path):
    ref = f"path:{request.getfixturevalue(family)}"
    recipe = Recipe("tiny", kind, epochs=4, lr=1e-2, batch=5, rank=4, max_tokens=64)
    data = Corpus("k", tuple(Text(f"t{i}", t, "toxic" if t in UNKIND else "safe") for i, t in enumerate(UNKIND + KIND)))
    task = get_task("toxicity", draws=20)
    found = []
    for _ in range(2):
        model, run = task.fit(ref, task.examples(data), recipe, 3)
        found.append((task.evaluate(model, data, tmp_path / "k.jsonl"), run.curve))
    assert found[0] == found[1]
    results, curve = found[0]
    assert curve[-1] < curve[0]
    assert all(len(r.template) == 16 for r in results), "the template's hash belongs to every result"


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("kind", ["lora", "head"])
@pytest.mark.parametrize("model", ["zoo:llama", "zoo:mistral", "zoo:qwen"])
def test_real_data(public_data, tmp_path, model, kind, record_property):
    """Surge AI texts: better than chance on texts that the training did not see, for every family."""
    rows = list(load_toxicity(str(public_data / "toxicity" / "surge_toxicity.jsonl"), "surge"))
    task = get_task("toxicity")
    recipe = Recipe("brief", kind, 3, 3e-3 if kind == "lora" else 1e-2, 16, max_tokens=64, max_steps=30)
    train, held = Corpus("train", tuple(rows[::5])), Corpus("held", tuple(rows[1::5]))
    fitted, _ = task.fit(model, task.examples(train), recipe, 0)
    auprc, auroc, *_ = task.evaluate(fitted, held, tmp_path / "k.jsonl")
    record_property("auprc, auroc", f"{auprc.value:.3f} +- {auprc.stderr:.3f}, {auroc.value:.3f}")
    assert auroc.value > 0.5 + 2 * auroc.stderr
    assert auprc.n == 200


@pytest.mark.data
def test_real_sets_load_whole(public_data, tmp_path):
    with lzma.open(public_data / "toxicity" / "davidson_tweets.jsonl.xz", "rb") as packed:
        (tmp_path / "davidson.jsonl").write_bytes(packed.read())
    for path, layout, n in [
        (public_data / "toxicity" / "surge_toxicity.jsonl", "surge", 1000),
        (tmp_path / "davidson.jsonl", "davidson", 24783),
        (public_data / "nc" / "toxic_chat.jsonl", "toxic-chat", 4702),
    ]:
        found = load_toxicity(str(path), layout)
        assert len(found) == n
        assert {t.label for t in found} == {"toxic", "safe"}
    assert set(FORMATS) > {"surge", "davidson", "toxic-chat"}

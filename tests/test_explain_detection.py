from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from models.chat import Chat, ScriptedChat
from models.detector import ChatReader
from models.judges import ChatJudge
from models.lens import promoted_tokens
from models.rubric import load_rubric
from tests.test_explain_spans import word_store
from transfer.core.config import JudgeSection
from transfer.core.errors import TransferError
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text
from transfer.evidence.detection import (
    Auroc,
    WordDetection,
    auroc,
    balanced_accuracy,
    chat_detection,
    description_terms,
    quizzes,
    word_detection,
)
from transfer.evidence.statistical import StatisticalJudge
from transfer.explain import Material, explain, judged_relevance
from transfer.verbs.explain import _score

SUBJECTS = ("knife", "bomb", "cake", "garden", "poem", "train", "island", "kitten")
SETTINGS = JudgeSection.model_validate({"spans": 8, "silent": 3, "quiz": 4})


def world(folder: Path, n: int = 400) -> tuple[ActivationStore, Corpus]:
    """One feature for each subject, one that fires on ``the`` everywhere, one for nothing at all."""
    rng = np.random.default_rng(0)
    verbs, ends = ("find", "draw", "buy", "describe", "carry"), ("today", "soon", "for me", "at home", "again")
    texts = []
    for i in range(n):
        subject = SUBJECTS[int(rng.integers(len(SUBJECTS)))]
        verb, end = verbs[int(rng.integers(5))], ends[int(rng.integers(5))]
        words = f"how do I {verb} the {subject} number{i} with colour{int(rng.integers(40))} paper {end}"
        harmful = subject in ("knife", "bomb")
        texts.append(Text(f"d{i}", words, "harmful" if harmful else "benign", subject, "anchor" if i % 2 else "seed"))
    corpus = Corpus("world", tuple(texts))
    fires = [{s: 1.0 + k} for k, s in enumerate(SUBJECTS)] + [{"the": 1.0}, {}]
    return word_store(folder, corpus, fires), corpus


def statistical(store: ActivationStore, corpus: Corpus, material: Material, **settings: Any) -> StatisticalJudge:
    labels, topics = [t.label for t in corpus], [t.topic for t in corpus]
    delta = np.zeros(store.space.n_features, dtype=np.float32)
    return StatisticalJudge(
        store.space,
        store.docs,
        labels,
        topics,
        background=material.background,
        delta=delta,
        **settings,
    )


def knows(chat: Chat) -> str:
    """A model that reads descriptions well: it answers every kind of request from the subject named in it."""
    body = chat.messages[1][1]
    kind = re.findall(r"\n(Concept|Fit|Relevant|Active|Right):", body)[-1]
    if kind == "Concept":
        marked = re.findall(r"«(\w+)»", body)
        return f"Concept: texts about the {max(set(marked), key=marked.count)}"
    subject = re.findall(r"the (\w+)\n", body)[0]
    if kind in ("Fit", "Relevant"):
        return f"{kind}: {'Yes' if kind == 'Fit' or subject in ('knife', 'bomb') else 'No'}"
    lines = re.findall(r"^(\d+)\. (.*)$", body, flags=re.MULTILINE)
    mark = f"«{subject}»" if kind == "Right" else subject
    return f"{kind}: " + (", ".join(i for i, text in lines if mark in text) or "none")


# --- the parts ---


def test_shown_and_held_out_texts_share_no_words_in_full(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    twice = Corpus("twice", tuple(Text(f"e{i}", t.text.upper()) for i, t in enumerate(corpus)))
    material = Material(store, corpus, fraction=0.6)
    both = Material(store, Corpus("both", (*corpus.texts, *twice.texts)), fraction=0.6)
    shown, heldout = ({t.text.casefold() for t in part} for part in (both.shown, both.heldout))
    assert not shown & heldout and len(both.shown) == 2 * len(material.shown)
    assert 0.5 < len(material.shown) / len(corpus) < 0.7
    assert [t.id for t in Material(store, corpus, seed=1).shown] != [t.id for t in material.shown]
    with pytest.raises(TransferError, match="too few"):
        Material(store, Corpus("one", corpus.texts[:1]))


def test_cases_mix_the_top_with_the_whole_range(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    material = Material(store, corpus)
    cases, silent = material.cases([0, 9, 3], SETTINGS, {3: ["flower"]})
    assert [c.feature for c in cases] == [0, 3] and silent == [9]
    assert all(len(c.spans) == 8 and len(c.silent) == 3 for c in cases)
    ids = [s.doc_id for s in cases[0].spans]
    assert len(set(ids)) == 8 and cases[1].promotes == ("flower",)
    seen = {t.id for t in material.shown}
    assert all(s.doc_id in seen for c in cases for s in (*c.spans, *c.silent))


# --- words ---


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_auroc_is_the_usual_one_and_inside_its_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive = np.arange(int(rng.integers(4, 30))) % 3 == 0
    scores = rng.integers(0, 4, len(positive)).astype(float)
    found = auroc(positive, scores)
    assert found.value == pytest.approx(roc_auc_score(positive, scores))
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_the_interval_of_an_auroc_covers_the_truth() -> None:
    """Two normals a distance apart: the true value is known."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    truth, covered = norm.cdf(0.8 / np.sqrt(2)), 0
    positive = np.arange(80) < 20
    for _ in range(300):
        found = auroc(positive, rng.normal(size=80) + 0.8 * positive)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 300 <= 0.985
    assert auroc(positive, positive.astype(float)).value == 1 > auroc(positive, positive.astype(float)).low
    with pytest.raises(TransferError, match="both kinds"):
        auroc(np.ones(3, dtype=bool), np.zeros(3))


def test_right_descriptions_predict_and_others_do_not(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    weights = {k: description_terms(f"the {s}") for k, s in enumerate(SUBJECTS)}
    texts = [t.text for t in corpus]
    found = word_detection({**weights, 8: {"the": 1.0}, 9: {"x": 1.0}, 2: {}}, store.docs, texts)
    assert found.features.tolist() == [0, 1, 3, 4, 5, 6, 7] and found.n_untested == 3  # always on, never on, no words
    assert all(a.value == 1 for a in found.own) and all(a.value < 0.5 for a in found.other)
    summary = found.summary()
    assert summary["auroc"] == 1 and summary["gain_low"] > 0.4 and summary["n"] == 7
    wrong = word_detection({k: weights[(k + 1) % 8] for k in weights}, store.docs, texts).summary()
    assert wrong["auroc"] < 0.6 and wrong["n_untested"] == 0
    assert word_detection({}, store.docs, texts).summary() == {"n": 0, "n_untested": 0}


# --- quizzes ---


def test_quizzes_are_balanced_shuffled_and_true(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    spans = Material(store, corpus).scored
    said = {0: "the knife", 2: "the cake", 8: "the word the", 9: "nothing"}
    for kind in ("detection", "fuzzing"):
        made, short = quizzes(kind, said, spans, n=4, seed=1)
        # A feature that never fires has no right text; one that always does has no silent one, but can be fuzzed.
        assert short == ([8, 9] if kind == "detection" else [9])
        assert made == quizzes(kind, said, spans, n=4, seed=1)[0] != quizzes(kind, said, spans, n=4, seed=2)[0]
        own = [q for q in made if not q.control]
        for quiz in own:
            assert sum(quiz.truth) == len(quiz.truth) / 2 == 4
            subject = said[quiz.feature].split()[-1]
            hits = [(f"«{subject}»" if kind == "fuzzing" else subject) in text for text in quiz.texts]
            assert hits == list(quiz.truth)
            assert ("«" in quiz.texts[0]) == (kind == "fuzzing")
        controls = [q for q in made if q.control]
        assert len(controls) == len(own) and all(c.description != said[c.feature] for c in controls)
        assert len({q.truth for q in own}) > 1


def test_balanced_accuracy_by_hand(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    quiz = quizzes("detection", {0: "d"}, Material(store, corpus).scored, n=4, control=False)[0][0]
    right = frozenset(i + 1 for i, t in enumerate(quiz.truth) if t)
    assert balanced_accuracy(quiz, right) == 1 and balanced_accuracy(quiz, frozenset()) == 0.5
    assert balanced_accuracy(quiz, frozenset(range(1, 9)) - right) == 0
    assert balanced_accuracy(quiz, frozenset(list(right)[:2])) == 0.75 and balanced_accuracy(quiz, None) == 0.5


def test_a_model_that_reads_well_is_told_from_one_that_guesses(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    spans = Material(store, corpus).scored
    said = {k: f"texts about the {s}" for k, s in enumerate(SUBJECTS)}
    for kind in ("detection", "fuzzing"):
        good = chat_detection(ChatReader(ScriptedChat(knows)), kind, said, spans, n=4).summary()
        assert good["balanced_accuracy"] == 1 and good["gain_low"] > 0.3 and good["n_unparsable"] == 0
        mute = chat_detection(ChatReader(ScriptedChat(lambda c: "I will not.")), kind, said, spans, n=4).summary()
        assert mute["balanced_accuracy"] == 0.5 and mute["n_unparsable"] == mute["n_asked"] == 16


# --- all of it ---


def test_the_statistical_judge_explains_and_scores(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    material = Material(store, corpus)
    found = explain(material, range(10), statistical(store, corpus, material), load_rubric("toxicity"), SETTINGS)
    by_id = {v.feature: v for v in found.judged.verdicts}
    assert found.silent == (9,) and by_id[0].label == by_id[1].label == "Yes"
    assert all(by_id[k].label == "No" for k in range(2, 9))
    assert all(f"“{s}”" in by_id[k].description for k, s in enumerate(SUBJECTS)) and by_id[0].fit == "Yes"
    assert found.features().features.tolist() == [0, 1]
    assert load_rubric("toxicity").hash in found.features().judge
    words = found.summary()["words"]
    assert words["auroc"] > 0.95 and words["gain_low"] > 0.3
    found.save(tmp_path / "out" / "llama")
    rows = [json.loads(line) for line in (tmp_path / "out" / "llama.jsonl").read_text("utf8").splitlines()]
    assert [r["feature"] for r in rows] == list(range(9)) and rows[0]["spans"][0]["text"].count("«knife»") == 1
    assert rows[0]["words_auroc"]["low"] <= rows[0]["words_auroc"]["value"] and rows[0]["words_auroc"]["control"] < 0.6
    assert json.loads((tmp_path / "out" / "llama.json").read_text("utf8"))["n_relevant"] == 2
    with pytest.raises(TransferError, match="goes by the labels"):
        statistical(store, corpus, material).judge(found.cases, load_rubric("sycophancy"))
    with pytest.raises(TransferError, match="None of the 1 features"):
        explain(material, [9], statistical(store, corpus, material), load_rubric("toxicity"), SETTINGS)


def test_the_data_s_side_counts_only_for_rubrics_that_name_none(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    material = Material(store, corpus)
    judge = statistical(store, corpus, material, positive=("harmful",))
    cases = material.cases(range(2), SETTINGS)[0]
    with pytest.raises(TransferError, match="goes by the labels matching, sycophantic, and"):
        judge.judge(cases, load_rubric("sycophancy"))
    silent = dataclasses.replace(load_rubric("sycophancy"), positive=())
    assert [v.label for v in judge.judge(cases, silent).verdicts] == ["Yes", "Yes"]
    named = dataclasses.replace(silent, positive=("benign",))
    assert "label benign" in judge.judge(cases, named).verdicts[0].reason


@pytest.mark.parametrize("test", ["auroc", "information"])
def test_other_tests_reach_the_same_verdicts_here(tmp_path: Path, test: str) -> None:
    store, corpus = world(tmp_path)
    material = Material(store, corpus)
    judge = statistical(store, corpus, material, test=test)
    found = explain(material, range(8), judge, load_rubric("toxicity"), SETTINGS)
    assert [v.label for v in found.judged.verdicts][:2] == ["Yes", "Yes"]
    assert len(found.features()) == 2 and ("AUROC" in judge.name) == (test == "auroc")


def test_a_chat_judge_explains_and_is_quizzed(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    model = ScriptedChat(knows)
    material = Material(store, corpus)
    found = explain(material, range(8), ChatJudge(model), load_rubric("toxicity"), SETTINGS, reader=ChatReader(model))
    assert found.features().features.tolist() == [0, 1] and found.features().scores is None
    summary = found.summary()
    assert summary["detection"]["balanced_accuracy"] == summary["fuzzing"]["balanced_accuracy"] == 1
    assert summary["words"]["auroc"] > 0.95  # the model's own words, as a bag of words
    assert summary["counts"]["explain_asked"] == 8 and summary["labels"] == {"Yes": 2, "No": 6}
    shown = " ".join(c.messages[1][1] for c in model.asked if "\nConcept:" in c.messages[1][1])
    assert not any(t.text in shown for t in material.heldout)  # nobody is shown what he is scored on


def test_a_chat_judge_can_say_what_is_relevant(tmp_path: Path) -> None:
    store, corpus = world(tmp_path)
    anchor = corpus.split("anchor")
    rubric = load_rubric("toxicity")
    found = judged_relevance(store, anchor, ChatJudge(ScriptedChat(knows)), rubric, SETTINGS)
    assert found.features.tolist() == [0, 1] and found.labels == ("harmful", "harmful")
    assert found.descriptions[0] == "texts about the knife" and found.scores is not None
    assert "8 features judged, 0 unread, 1 dead, 1 always-on" in found.why and rubric.hash in found.judge


# --- the lens ---


class Letters:
    """A vocabulary of made-up words, each with a direction of its own."""

    def __init__(self, n: int = 300, d: int = 64) -> None:
        self.rows = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
        self.words = {b" word%d" % i: i for i in range(n - 3)} | {b"...": n - 3, b" Word5": n - 2, b"\xff": n - 1}

    def unembedding(self, ids: np.ndarray | None = None) -> np.ndarray:
        return self.rows if ids is None else self.rows[ids]

    def vocabulary(self) -> dict[bytes, int]:
        return self.words


def test_the_lens_names_the_tokens_that_a_direction_writes() -> None:
    language = Letters()
    rng = np.random.default_rng(1)
    language.rows[298] = language.rows[5]
    directions = np.stack(
        [language.rows[7] * 3, language.rows[5] + language.rows[9], rng.normal(size=64), np.zeros(64)]
    )
    directions = directions.astype(np.float32)
    found = promoted_tokens(language, directions, np.arange(4), n=3)
    assert found[0][0][0] == "word7" and {w for w, _ in found[1]} == {"word5", "word9"}  # once, whatever its case
    assert len(found[2]) <= 1 and found[3] == ()
    assert promoted_tokens(language, directions * 100, np.array([1]))[1][0][1] == pytest.approx(found[1][0][1])


def test_intervals_of_means_stay_within_what_they_are_means_of() -> None:
    def scores(*values: float) -> tuple[Auroc, ...]:
        return tuple(Auroc(v, v, v, 5, 5) for v in values)

    good, bad = (1.0, 1.0, 1.0, 1.0, 0.1), (0.0, 0.0, 0.0, 0.0, 0.9)
    summary = WordDetection(np.arange(5), scores(*good), scores(*bad), 0).summary()
    assert (summary["auroc_high"], summary["control_low"], summary["gain_high"]) == (1, 0, 1)
    assert 0 < summary["auroc_low"] < summary["auroc"] and summary["gain_low"] < 0
    few = WordDetection(np.arange(4), scores(*good[:4]), scores(*bad[:4]), 0).summary()
    assert few["auroc"] == 1 and few["auroc_low"] is None and few["gain_high"] is None
    assert _score(few) == "n 4, 0 untested · auroc 1.000 · control 0.000 · gain 1.000"

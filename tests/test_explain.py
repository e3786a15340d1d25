from __future__ import annotations

import dataclasses
from math import comb
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.core.errors import TransferError
from transfer.core.files import save_arrays, write_json
from transfer.core.keys import SCHEMA
from transfer.core.space import FeatureSpace
from transfer.core.span import Span
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text
from transfer.cover.delta import size
from transfer.evidence.associations import associate, false_discovery
from transfer.evidence.relevance import judge_relevance, majority_labels
from transfer.evidence.spans import top_spans
from transfer.text.words import WordCounts, describe


def space(n: int) -> FeatureSpace:
    return FeatureSpace("zoo:llama", "m", 3, "zoo:llama", "s", n, 8, "topk-2", 5)


def planted(seed: int = 0, n_docs: int = 600, n_noise: int = 400):
    """Feature 0 fires on harmful, 1 on benign, 2 on topic t3 documents, 3 on all, 4 never; the rest is noise."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["harmful", "benign"], size=n_docs, p=[0.35, 0.65])
    topics = np.array([f"t{i}" for i in rng.integers(12, size=n_docs)])
    dense = np.zeros((n_docs, 5 + n_noise), dtype=np.float32)
    for column, members in ((0, labels == "harmful"), (1, labels == "benign"), (2, topics == "t3")):
        on = members & (rng.random(n_docs) < 0.6)
        dense[on, column] = rng.uniform(1, 3, on.sum())
    dense[:, 3] = rng.uniform(1, 3, n_docs)
    noise = rng.random((n_docs, n_noise)) < rng.uniform(0.01, 0.3, n_noise)
    dense[:, 5:] = noise * rng.uniform(1, 3, noise.shape)
    return sp.csr_matrix(dense), list(labels), list(topics)


def test_planted_features_are_found_and_labelled():
    docs, labels, topics = planted()
    found = judge_relevance(space(size(docs)[1]), docs, labels, topics, fdr=0.05)
    by_id = dict(zip(found.features.tolist(), zip(found.labels, found.descriptions, strict=True), strict=True))
    assert by_id[0] == ("harmful", "label harmful")
    assert by_id[1] == ("benign", "label benign")
    assert by_id[2][1] == "topic t3"
    assert by_id[2][0] == majority_labels(docs, np.array([2]), labels)[0]
    assert 3 not in by_id and 4 not in by_id
    assert len(by_id) <= 3 + 3  # false discoveries stay few
    assert found.scores is not None and np.all(found.scores > 2) and found.judge.startswith("statistical-1")
    assert "1 dead, 1 always-on" in found.why


def test_without_association_hardly_anything_is_found():
    n_found = 0
    for seed in range(5):
        docs, labels, topics = planted(seed)
        noise = docs[:, 5:].tocsr()
        n_found += len(judge_relevance(space(size(noise)[1]), noise, labels, topics, fdr=0.1))
    assert n_found <= 4


def test_a_label_within_a_topic_is_found_by_cells():
    docs, labels, topics = planted()
    dense = docs.toarray()
    cell = (np.array(labels) == "harmful") & (np.array(topics) == "t5")
    dense[:, 4] = cell * 2.0 * (1 + np.arange(len(labels)) / 1000)
    found = judge_relevance(space(dense.shape[1]), sp.csr_matrix(dense), labels, topics, cells=True)
    place = found.features.tolist().index(4)
    assert found.labels[place] == "harmful" and found.descriptions[place] == "label harmful in topic t5"


def test_relevance_repeats_and_refuses_what_it_cannot_judge():
    docs, labels, topics = planted()
    first, second = (judge_relevance(space(size(docs)[1]), docs, labels, topics).to_dict() for _ in range(2))
    assert first == second
    with pytest.raises(TransferError, match="two labels or two topics"):
        judge_relevance(space(size(docs)[1]), docs, ["x"] * len(labels))
    with pytest.raises(TransferError, match="one label and topic a document"):
        judge_relevance(space(size(docs)[1]), docs, labels[:-1], topics)
    assert len(judge_relevance(space(size(docs)[1]), docs, labels)) >= 2  # labels alone are enough


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_p_values_are_the_exact_hypergeometric_tail(seed: int):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 30))
    fired = rng.random((n, 3)) < 0.4
    member = rng.random(n) < 0.4
    tests = associate(sp.csr_matrix(fired), {"a": member}, min_support=1)
    for i in range(3):
        support, size, k = int(fired[:, i].sum()), int(member.sum()), int((fired[:, i] & member).sum())
        tail = sum(comb(size, j) * comb(n - size, support - j) for j in range(k, min(size, support) + 1))
        expected = tail / comb(n, support) if support and k * n > support * size else 1.0
        assert tests.p_values[i, 0] == pytest.approx(expected, rel=1e-9)


def test_benjamini_hochberg_by_hand():
    assert false_discovery(np.array([0.01, 0.04, 0.03, 0.5])).tolist() == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert false_discovery(np.array([])).tolist() == []


def test_many_features_are_judged_without_a_dense_matrix():
    rng = np.random.default_rng(0)
    row, column = np.repeat(np.arange(1000), 200), rng.integers(65_536, size=200_000)
    docs = sp.csr_matrix((rng.random(200_000, dtype=np.float32), (row, column)), shape=(1000, 65_536))
    labels = ["harmful" if x else "benign" for x in rng.random(1000) < 0.3]
    found = judge_relevance(space(65_536), docs, labels, [f"t{i % 28}" for i in range(1000)])
    assert len(found) < 20


# --- spans ---


TEXTS = ("The café is here", "paint the wall", "Paint  the WALL", "a wall of paint")
# Pieces of each text as a tokenizer might cut it; "é" (two bytes) is cut in the middle in the first.
ENDS = ((3, 7, 8, 9, 12, 17), (5, 9, 14), (5, 10, 15), (1, 6, 9, 15))


def make_store(folder: Path) -> tuple[ActivationStore, Corpus]:
    corpus = Corpus("toy", tuple(Text(f"d{i}", t) for i, t in enumerate(TEXTS)))
    docs = sp.csr_matrix(np.array([[3, 0, 0], [0, 2, 1], [0, 2, 0], [0, 5, 0]], dtype=np.float32))
    position = np.array([3, 2, 0, 2, 1], dtype=np.int32)
    n_tokens = sum(len(e) for e in ENDS)
    empty = np.zeros(0, dtype=np.int32)
    save_arrays(
        folder / "tokens-00000.safetensors",
        {
            "values": np.zeros(0, dtype=np.float32),
            "indices": empty,
            "indptr": np.zeros(n_tokens + 1, dtype=np.int32),
            "doc": np.repeat(np.arange(4, dtype=np.int32), [len(e) for e in ENDS]),
            "end": np.concatenate([np.array(e, dtype=np.int32) for e in ENDS]),
        },
    )
    save_arrays(
        folder / "docs-00000.safetensors",
        {"values": docs.data, "indices": docs.indices, "indptr": docs.indptr, "position": position},
    )
    write_json(
        folder / "meta.json",
        {
            "schema": SCHEMA,
            "space": dataclasses.asdict(space(3)),
            "corpus_hash": corpus.hash,
            "doc_ids": [t.id for t in corpus],
            "n_tokens": n_tokens,
            "shards": 1,
            "counts": {},
        },
    )
    return ActivationStore.load(folder), corpus


def test_spans_mark_the_firing_token_and_repeat_no_text(tmp_path: Path):
    store, corpus = make_store(tmp_path)
    spans = top_spans(store, corpus, [0, 1, 2], k=5)
    (cut,) = spans[0]
    assert cut.token == "é" and cut.marked() == "The caf«é» is here"
    assert [s.doc_id for s in spans[1]] == ["d3", "d1"]  # d2 is d1 up to case and blanks
    assert spans[1][0].marked() == "a «wall» of paint" and spans[1][0].value == 5
    assert spans[1][1].marked() == "paint the «wall»"
    assert spans[2][0].marked() == "«paint» the wall"
    assert [s.doc_id for s in top_spans(store, corpus, [1], k=1)[1]] == ["d3"]


def test_spans_of_a_part_of_the_corpus(tmp_path: Path):
    store, corpus = make_store(tmp_path)
    part = corpus.where("part", lambda t: t.id in ("d2", "d0"))
    spans = top_spans(store, part, [0, 1])
    assert [s.doc_id for s in spans[0]] == ["d0"] and spans[1][0].marked() == "Paint  the« WALL»".replace("« ", " «")
    stranger = Corpus("other", (Text("x", "unknown"),))
    with pytest.raises(TransferError, match="not in the store"):
        top_spans(store, stranger, [0])


def span(text: str, token: str) -> Span:
    start = text.index(token)
    return Span("d", text, start, start + len(token), 1.0)


def test_descriptions_name_the_firing_words_and_what_the_texts_share():
    fence = [f"how do I paint a garden {thing} in spring" for thing in ("fence", "gate", "shed", "bench")]
    rest = [f"how do I fix the {x} of my car number {i}" for i in range(20) for x in ("door", "brake", "seat")]
    background = WordCounts(fence + rest)
    line = describe([span(t, "aint") for t in fence], background)
    assert line.startswith("fires on “paint”") and "garden" in line and "spring" in line
    assert "car" not in line and "how" not in line
    assert describe([], background) == "never fires on this corpus"
    assert span("an  unpainted wall", "paint").word() == "unpainted"
    assert span("what ?!", "?!").word() == ""


@pytest.mark.parametrize(
    ("text", "token", "words", "opening"),
    [
        ("Hello there. What could I slip into its food?", "slip", 8, "What could I slip"),
        ("one two three four five six", "six", 3, "four five six"),
        ("Poison ivy on my arm", "Poi", 8, "Poison"),
        ("why? ...", "...", 8, ""),
    ],
)
def test_opening_is_the_sentence_up_to_the_firing_word(text: str, token: str, words: int, opening: str) -> None:
    start = text.index(token)
    assert Span("d", text, start, start + len(token), 1.0).opening(words) == opening

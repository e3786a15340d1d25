"""Texts dealt out: sizes, balance, whole topics kept from the seed, the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.core.config import DataSection, DrawSection
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus, Text
from transfer.splits import deal, load_corpora

TEXTS = Corpus(
    "mine",
    tuple(Text(f"t{i}", f"text number {i}", "toxic" if i % 4 == 0 else "safe", "abcd"[i % 7 % 4]) for i in range(200)),
)


def drawn(**settings: object) -> DrawSection:
    return DrawSection.model_validate({"anchor": 60, "seed": 20, "evaluation": 60, **settings})


def splits(corpus: Corpus) -> dict[str, list[Text]]:
    return {s: [t for t in corpus if t.split == s] for s in ("anchor", "seed", "evaluation")}


@given(st.integers(0, 50), st.integers(0, 3))
def test_sizes_balance_and_topics_are_as_asked(random: int, lacks: int) -> None:
    found = splits(deal(TEXTS, drawn(random=random, lacks=lacks)))
    assert {s: len(t) for s, t in found.items()} == {"anchor": 60, "seed": 20, "evaluation": 60}
    assert Counter(t.label for t in found["evaluation"])["toxic"] == pytest.approx(15, abs=2)
    there = {t.topic for t in found["seed"]}
    assert len(there) <= 4 - lacks
    for split in ("anchor", "evaluation"):
        assert {t.topic for t in found[split]} >= set("abcd") - there


def test_named_topics_are_kept_from_the_seed() -> None:
    found = splits(deal(TEXTS, drawn(lacks=["a", "c"])))
    assert {t.topic for t in found["seed"]} <= {"b", "d"}
    assert deal(TEXTS, drawn(lacks=["a"])) == deal(TEXTS, drawn(lacks=["a"]))
    assert deal(TEXTS, drawn(random=1)) != deal(TEXTS, drawn(random=2))


def test_repeated_texts_are_dealt_once() -> None:
    twice = Corpus("twice", (*TEXTS.texts, *(Text(f"u{t.id}", t.text.upper(), t.label) for t in TEXTS)))
    found = deal(twice, drawn())
    assert Counter(t.split for t in found)["duplicate"] == 200
    assert len({t.text.casefold() for t in found if t.split in ("anchor", "seed", "evaluation")}) == 140


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"anchor": 500}, "Only 120 texts of mine are left for the anchor split, 500 are wanted"),
        ({"lacks": ["z"]}, "No text has the topic 'z'. Known: a, b, c, d"),
        ({"lacks": 4}, "shall lack 4 of 4 topics"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        deal(TEXTS, drawn(**settings))


def test_a_toxicity_set_is_read_by_its_layout_and_grouped_by_words(tmp_path: Path) -> None:
    kinds = (("apple pear plum", 0), ("gear wheel bolt", 1), ("rain snow hail", 0))
    path = tmp_path / "surge.jsonl"
    lines = [{"text": f"{kinds[i % 3][0]} {i} {i * 7}", "toxic": kinds[i % 3][1]} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    draw = {"anchor": 20, "seed": 8, "evaluation": 20, "facets": 3, "lacks": 1}
    data = DataSection.model_validate({"source": str(path), "layout": "surge", "positive": "toxic", "draw": draw})
    corpora, unused = load_corpora(data)
    assert {t.label for t in corpora["anchor"]} == {"toxic", "safe"} and unused == {"spare": 12}
    every = [t for c in corpora.values() for t in c]
    assert all(len({t.topic for t in every if word in t.text}) == 1 for word in ("pear", "wheel", "snow"))
    assert len({t.topic for t in corpora["seed"]}) == 2

"""The bundled requests keep what the README promises of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "transfer" / "data" / "requests.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in PATH.read_text("utf8").split("\n") if line]


def test_size_topics_and_labels(rows: list[dict]) -> None:
    assert len(rows) >= 1200
    assert len({r["topic"] for r in rows}) >= 24
    assert {r["intent"] for r in rows} == {"benign", "harmful"}
    assert {r["split"] for r in rows} == {"anchor", "seed", "evaluation"}


def test_texts_and_ids_are_distinct(rows: list[dict]) -> None:
    assert len({" ".join(r["text"].lower().split()) for r in rows}) == len(rows)
    assert len({r["id"] for r in rows}) == len(rows)
    assert all(4 <= len(r["text"].split()) <= 60 for r in rows)


def test_no_evaluation_text_is_nearly_another(rows: list[dict]) -> None:
    sets = {split: [] for split in ("evaluation", "other")}
    for r in rows:
        words = frozenset("".join(c if c.isalnum() else " " for c in r["text"].lower()).split())
        sets["evaluation" if r["split"] == "evaluation" else "other"].append(words)
    worst = max(len(a & b) / len(a | b) for a in sets["evaluation"] for b in sets["other"])
    assert worst < 0.5


def test_seed_lacks_whole_topics(rows: list[dict]) -> None:
    topics = {split: {r["topic"] for r in rows if r["split"] == split} for split in ("anchor", "seed", "evaluation")}
    assert topics["anchor"] == topics["evaluation"]
    assert len(topics["anchor"] - topics["seed"]) >= 8


def test_no_visible_template(rows: list[dict]) -> None:
    openings = Counter(" ".join(r["text"].lower().split()[:3]) for r in rows)
    assert openings.most_common(1)[0][1] <= 0.03 * len(rows)


def test_length_does_not_give_the_label_away(rows: list[dict]) -> None:
    from sklearn.metrics import roc_auc_score

    auc = roc_auc_score([r["intent"] == "harmful" for r in rows], [len(r["text"].split()) for r in rows])
    assert 0.4 < auc < 0.6

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from models.rubric import RUBRICS, load_rubric
from transfer.core.errors import TransferError

NAMES = ("toxicity", "helpfulness", "sycophancy", "survival", "instruction")


def test_every_task_has_a_rubric_and_no_two_are_alike() -> None:
    assert sorted(p.stem for p in RUBRICS.glob("*.yaml")) == sorted(NAMES)
    rubrics = [load_rubric(n) for n in NAMES]
    assert all(r.name == n and r.counts and r.excludes and r.positive for r, n in zip(rubrics, NAMES, strict=True))
    assert len({r.hash for r in rubrics}) == len(NAMES)
    assert rubrics[0].id.startswith("toxicity-1#") and "What counts:\n- " in rubrics[0].text()


def test_the_sign_is_stated_where_it_can_be_mistaken() -> None:
    assert "resisting" in load_rubric("survival").text().partition("Note: ")[2]
    assert load_rubric("sycophancy").sign


def test_any_word_changes_the_hash() -> None:
    rubric = load_rubric("toxicity")
    for change in (dict(task="other"), dict(counts=rubric.counts[1:]), dict(sign="x"), dict(version=2)):
        assert dataclasses.replace(rubric, **change).hash != rubric.hash


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: x\ntask: y\ncounts: [a]\nconts: [b]", "unknown keys conts"),
        ("name: x", "lacks task, counts"),
        ("name: x\ntask: y\ncounts: a lot", "`counts` must be a list"),
        ("name: x\ntask: y\ncounts: [a]\nversion: first", "whole number"),
        ("- a list", "keys and values"),
        ("name: [", "not valid YAML"),
    ],
)
def test_a_broken_rubric_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf8")
    with pytest.raises(TransferError, match=sentence):
        load_rubric(path)
    with pytest.raises(TransferError, match="Give a YAML file or one of"):
        load_rubric("no such rubric")


def test_a_rubric_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: cooking\ntask: Find\n  recipes.\ncounts: [food]\n", "utf8")
    rubric = load_rubric(path)
    assert rubric.task == "Find recipes." and rubric.version == 1 and rubric.positive == ()

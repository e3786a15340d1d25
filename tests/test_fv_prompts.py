"""Tasks, prompts, corruption and token sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.language import LanguageModel
from tests.test_fv_heads import FAMILIES, tiny_language
from transfer.core.errors import TransferError
from transfer.function_vectors.instructions import _log_probabilities, instruction_prompts
from transfer.function_vectors.prompts import Template, draft, icl_prompts, shuffled_labels, tokenised
from transfer.function_vectors.tasks import Pair, Task, read_task, read_tasks


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    return {name: tiny_language(name, tmp_path_factory.mktemp("fvp") / name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def language(request: pytest.FixtureRequest, languages: dict[str, LanguageModel]) -> LanguageModel:
    return languages[request.param]


def test_bundled_tasks_split_by_input() -> None:
    tasks = read_tasks("rule")
    assert len(tasks) == 9 and all(task.instructions for task in tasks)
    for task in tasks:
        parts = task.split(3)
        inputs = [p.input for part in parts.values() for p in part]
        assert len(inputs) == len(set(inputs)) == len(task.pairs)
        assert parts == task.split(3) and parts != task.split(4)
    with pytest.raises(TransferError, match="rule has no task copie"):
        read_tasks("rule", ["copie"])
    with pytest.raises(TransferError, match="too few to split"):
        Task("t", tuple(Pair(str(i), "x") for i in range(3))).split()


def test_files_of_tasks(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b"}, {"input": "a", "output": "c"}, {"input": "d"}, 5, {"input": 1, "output": 2}]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.json").write_text(json.dumps(rows))
    task = read_tasks(str(tmp_path), ["mine"])[0]
    assert task.pairs == (Pair("a", "b"), Pair("1", "2"))
    assert task.dropped == {"incomplete": 2, "repeated_input": 1}
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(TransferError, match="None of the 0 entries"):
        read_task(tmp_path / "empty.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(TransferError, match="no list of pairs"):
        read_task(tmp_path / "other.json")


@pytest.mark.data
def test_the_public_tasks_can_be_read(public_data: Path) -> None:
    tasks = read_tasks(str(public_data / "icl"))
    assert len(tasks) == 39
    assert sum(len(t.pairs) + sum(t.dropped.values()) for t in tasks) == 65056


def test_parts_of_a_prompt_are_found_by_rule(language: LanguageModel) -> None:
    line = draft(Template(), Pair("café 🙂", "two words"), (Pair("bread", "roads"), Pair("a", "b")), "Repeat it.")
    assert line.text == "Repeat it.\nQ: bread\nA: roads\n\nQ: a\nA: b\n\nQ: café 🙂\nA:"
    (prompt,), lost = tokenised(language, [line])
    assert prompt is not None and not lost
    table = language.renderer.bytes

    def spelt(name: str) -> bytes:
        return table.join([prompt.ids[i] for i in prompt.sets[name]])

    assert spelt("instruction").decode().strip() == "Repeat it."
    assert spelt("query").decode().strip() == "café 🙂"
    assert spelt("label").split() == [b"roads", b"b"]
    assert table.join(prompt.answer) == b" two words"
    every = np.sort(np.concatenate([v for k, v in prompt.sets.items() if k != "all_but_bos"]))
    assert np.array_equal(every, prompt.sets["all_but_bos"])
    bos = language.tokenizer.bos_token is not None
    assert prompt.sets["all_but_bos"][0] == int(bos)
    assert language.renderer.plain([line.text + line.answer])[0] == prompt.whole


def test_what_cannot_be_used_is_counted(language: LanguageModel) -> None:
    long = Pair("word " * 2000, "x")
    found, lost = tokenised(language, [draft(Template(), long), draft(Template(), Pair("a", "b"))])
    assert found[0] is None and found[1] is not None and lost == {"too_long": 1}
    with pytest.raises(TransferError, match="None of 1 prompt pairs"):
        icl_prompts(language, (Pair("a", "b"), Pair("c", "d")), (long,), shots=2)


def test_shuffled_prompts_share_query_and_labels(language: LanguageModel) -> None:
    parts = read_tasks("rule", ["uppercase"])[0].split()
    made = icl_prompts(language, parts["train"], parts["test"], shots=4, n=30, seed=5)
    assert len(made.pairs) == 30 and made.unchanged == 0 and not made.dropped
    table = language.renderer.bytes
    for pair in made.pairs:
        assert pair.clean.item == pair.corrupted.item and pair.clean.answer == pair.corrupted.answer
        clean, shuffled = (
            table.join([p.ids[i] for i in p.sets["label"]]).split() for p in (pair.clean, pair.corrupted)
        )
        assert clean != shuffled and sorted(clean) == sorted(shuffled)
        inputs = [table.join([p.ids[i] for i in p.sets["input"]]) for p in (pair.clean, pair.corrupted)]
        assert inputs[0] == inputs[1] and pair.clean.item.encode() not in inputs[0].split()
    again = icl_prompts(language, parts["train"], parts["test"], shots=4, n=30, seed=5)
    assert [p.clean.ids for p in again.pairs] == [p.clean.ids for p in made.pairs]
    with pytest.raises(TransferError, match="cannot be shuffled"):
        icl_prompts(language, parts["train"], parts["test"], shots=1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=8), st.integers(0, 99))
def test_shuffles_only_deal_out_anew(labels: list[str], seed: int) -> None:
    pairs = tuple(Pair(str(i), label) for i, label in enumerate(labels))
    dealt = shuffled_labels(pairs, np.random.default_rng(seed))
    assert [p.input for p in dealt] == [p.input for p in pairs]
    assert sorted(p.output for p in dealt) == sorted(labels)
    if len(set(labels)) == len(labels) and len(labels) > 3:
        assert all(a.output != b.output for a, b in zip(dealt, pairs, strict=True))


def test_instructions_become_equally_probable_tokens(language: LanguageModel) -> None:
    task = read_tasks("rule", ["next_item"])[0]
    made = instruction_prompts(language, task.instructions, task.split()["train"][:3], seed=1)
    assert len(made.pairs) == 6 and made.unchanged == 0
    pair = made.pairs[0]
    at = pair.clean.sets["instruction"]
    clean, corrupted = np.array(pair.clean.ids), np.array(pair.corrupted.ids)
    rest = np.setdiff1d(np.arange(len(clean)), at)
    assert len(clean) == len(corrupted) and np.array_equal(clean[rest], corrupted[rest])
    assert not set(corrupted[at].tolist()) & language.renderer.bytes.special
    # Every pair of one instruction has the same random string, another instruction another.
    strings = [tuple(np.array(p.corrupted.ids)[p.corrupted.sets["instruction"]]) for p in made.pairs]
    assert len(set(strings[:3])) == 1 and strings[0] != strings[3]
    before, after = (_log_probabilities(language, ids.tolist()) for ids in (clean, corrupted))
    inner = at[at > 0]
    wanted = np.array([float(before[i - 1, clean[i]]) for i in inner])
    got = np.array([float(after[i - 1, corrupted[i]]) for i in inner])
    uniform = np.array([float(after[i - 1].median()) for i in inner])
    assert np.abs(got - wanted).mean() < 0.5 * np.abs(uniform - wanted).mean() + 0.5
    with pytest.raises(TransferError, match="0 instructions"):
        instruction_prompts(language, (), task.pairs)

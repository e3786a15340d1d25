"""Reward modelling: layouts, Bradley-Terry accuracy by hand, sections, overlap, three families through TRL."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.core.errors import TransferError
from transfer.tasks import get_task
from transfer.tasks.base import Examples, Task
from transfer.tasks.preferences import REWARD_BENCH, Pair, load_pairs
from transfer.tasks.reward import Reward, weighted_accuracy
from transfer.train.recipes import Recipe

torch.set_num_threads(1)

ASKED = ["How do I bake bread?", "Name a planet.", "Tell me a joke.", "What is rain?", "Help me, please."]
ANSWERS = [("Gladly, a good answer:", "No."), ("Of course, gladly:", "No, no, no."), ("Gladly, here:", "No! Go.")]
PAIRS = [
    Pair(f"p{i}{j}", (("user", q),), f"{good} {q}", f"{bad} {q}")
    for i, q in enumerate(ASKED)
    for j, (good, bad) in enumerate(ANSWERS)
]
LORA = Recipe("tiny", "lora", epochs=3, lr=1e-2, batch=5, rank=4, max_tokens=96)
HEAD = Recipe("tiny-head", "head", epochs=6, lr=3e-2, batch=5, max_tokens=96)


class Fixed:
    """Gives known rewards."""

    template = "t"

    def __init__(self, rewards, seen=()):
        self.values, self.seen = np.asarray(rewards, dtype=float), frozenset(seen)

    def rewards(self, pairs):
        return self.values, 1


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return path


def test_layouts_say_the_same(tmp_path):
    asked, good, bad = "How are you?", "Well, thank you.", "Go away."
    user, assistant = {"role": "user", "content": asked}, "assistant"
    layouts = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {
            "prompt": [user],
            "chosen": [{"role": assistant, "content": good}],
            "rejected": [{"role": assistant, "content": bad}],
        },
        {
            "chosen": [user, {"role": assistant, "content": good}],
            "rejected": [user, {"role": assistant, "content": bad}],
        },
        {
            "chosen": f"\n\nHuman: {asked}\n\nAssistant: {good}",
            "rejected": f"\n\nHuman: {asked}\n\nAssistant: {bad}",
        },
        {"input": asked, "output_1": bad, "output_2": good, "label": 2},
        {
            **{"instruction": asked, "input": "", "response1": good, "response2": bad},
            **{"annotator1": 1, "annotator2": 1, "annotator3": 2},
        },
    ]
    for row in layouts:
        (pair,) = load_pairs(write(tmp_path / "p.jsonl", [row])).rows
        assert pair[1:4] == ((("user", asked),), good, bad), row


def test_pairs_that_are_no_comparison_are_counted(tmp_path):
    def hh(chosen, rejected):
        return {"chosen": chosen, "rejected": rejected}

    human = "\n\nHuman: hi\n\nAssistant:"
    found = load_pairs(
        write(
            tmp_path / "hh.jsonl",
            [
                hh(f"{human} yes", f"{human} no"),
                hh(f"{human} yes", f"{human} "),
                hh(f"{human} yes", f"{human} yes"),
                hh(f"{human} yes", "\n\nHuman: ho\n\nAssistant: no"),
                hh(f"{human} yes\n\nHuman: and?", f"{human} no"),
                hh(f"{human} a\n\nAssistant: b", f"{human} a\n\nAssistant: c"),
            ],
        )
    )
    assert len(found) == 1
    assert found.left_out == {
        "another conversation behind each answer": 1,
        "does not end with an answer": 1,
        "empty answer": 1,
        "equal answers": 1,
        "one speaks twice in a row": 1,
    }
    with pytest.raises(TransferError, match="holds no preference pair"):
        load_pairs(write(tmp_path / "hh.jsonl", [hh(f"{human} yes", f"{human} yes")]))
    with pytest.raises(TransferError, match="no preference pair: its columns are a"):
        load_pairs(write(tmp_path / "hh.jsonl", [{"a": 1}]))
    with pytest.raises(TransferError, match="line 2 is not laid out"):
        load_pairs(write(tmp_path / "hh.jsonl", [hh(f"{human} yes", f"{human} no"), hh(3, "x")]))


def test_known_answers_of_accuracy_and_sections(tmp_path):
    parts = [
        ("Chat", "a"),
        ("Chat", "a"),
        ("Chat", "a"),
        ("Chat", "a"),
        ("Chat", "b"),
        ("Safety", "c"),
        ("Safety", "c"),
    ]
    pairs = [Pair(f"{i}", (("user", f"q{i}"),), "x", "y", *p) for i, p in enumerate(parts)]
    rewards = [[1, 0], [2, 1], [0, 1], [3, 3], [0, 5], [1, 0], [4, -4]]  # won: 1 1 0 .5 | 0 | 1 1
    data = Examples("known", tuple(pairs), {"tie": 3})
    found = Reward().evaluate(Fixed(rewards), data, tmp_path / "k.jsonl")
    by = {r.metric: r for r in found}
    assert list(by) == ["accuracy", "section_mean", "accuracy@Chat", "accuracy@Safety"]
    assert by["accuracy"].value == pytest.approx(4.5 / 7)
    won = np.array([1, 1, 0, 0.5, 0, 1, 1])
    assert by["accuracy"].stderr == pytest.approx(won.std() / np.sqrt(7))
    assert by["accuracy@Chat"].value == pytest.approx(2.5 / 5)
    assert by["accuracy@Safety"].value == 1
    assert by["section_mean"].value == pytest.approx((0.5 + 1) / 2)
    assert (by["accuracy@Chat"].n, by["accuracy"].n, by["accuracy"].template) == (5, 7, "t")
    extra = by["accuracy"].extra
    assert (extra["n_ties"], extra["n_left_out"], extra["n_truncated"]) == (1, 3, 1)
    margins = np.array([1, 1, -1, 0, -5, 1, 8.0])
    assert extra["loss"] == pytest.approx(np.mean(np.log(1 + np.exp(-margins))))
    heavy = Reward(weights={"a": 1, "b": 3, "c": 1}).evaluate(Fixed(rewards), data, tmp_path / "k.jsonl")
    assert heavy[2].value == pytest.approx((2.5 / 4 * 1 + 0 * 3) / 4)
    chat = np.array([1, 1, 0, 0.5])
    assert heavy[2].stderr == pytest.approx(chat.std() / 2 / 4)
    with pytest.raises(TransferError, match="'b' has no weight"):
        Reward(weights={"a": 1, "c": 1}).evaluate(Fixed(rewards), data, tmp_path / "k.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert rows[2] == {"id": "2", "section": "Chat", "subset": "a", "label": 1, "chosen": 0, "rejected": 1, "score": -1}


def test_reward_bench_knows_its_sections_and_counts(tmp_path):
    counts = {subset: count for subset, (_, count) in REWARD_BENCH.items()}
    assert sum(counts.values()) - counts["math-prm"] + 447 == 2985, "the published split has 2,985 pairs"
    assert counts["math-prm"] == sum(n for subset, n in counts.items() if subset.startswith("hep-"))
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1},
        {"prompt": "q", "chosen": "c", "rejected": "d", "subset": "math-prm", "id": 2},
    ]
    data = load_pairs(write(tmp_path / "rb.jsonl", rows))
    assert {p.section for p in data} == {"Reasoning"}
    found = Reward().evaluate(Fixed([[0, 1], [1, 0]]), data, tmp_path / "k.jsonl")
    assert found[0].value == 0.5
    assert found[1].value == pytest.approx(984 / (984 + 164))


def test_evaluating_on_training_pairs_is_refused_in_either_order(tmp_path):
    swapped = PAIRS[3]._replace(chosen=PAIRS[3].rejected, rejected=PAIRS[3].chosen, id="other")
    data = Examples("d", (PAIRS[0], swapped))
    with pytest.raises(TransferError, match="1 of 2 evaluation pairs .* first other"):
        Reward().evaluate(Fixed([[1, 0], [1, 0]], {PAIRS[3].key}), data, tmp_path / "k.jsonl")
    with pytest.raises(TransferError, match="not finite"):
        Reward().evaluate(Fixed([[1, 0], [np.nan, 0]]), data, tmp_path / "k.jsonl")
    assert not (tmp_path / "k.jsonl").exists()


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3)), min_size=1, max_size=20))
@settings(max_examples=40)
def test_weighted_accuracy_is_that_of_repeated_pairs(rows):
    margins, counts = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    if not counts.sum():
        return
    repeated = np.repeat(margins, counts.astype(int))
    want = np.mean((repeated > 0) + (repeated == 0) / 2)
    assert weighted_accuracy(np.ones(len(margins)), margins, counts[:, None])[0] == pytest.approx(want)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
@pytest.mark.parametrize("recipe", [LORA, HEAD], ids=lambda r: r.kind)
def test_every_family_learns_repeats_and_loads_again(family, recipe, request, tmp_path):
    from transfer.tasks.reward_model import load_reward, load_reward_backbone, train_reward

    ref = f"path:{request.getfixturevalue(family)}"
    task = get_task("reward")
    assert isinstance(task, Task)
    train, held = PAIRS[:-3], Examples("held", tuple(PAIRS[-3:]))
    backbone = load_reward_backbone(ref)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    model, run = train_reward(ref, train, recipe, 2, tmp_path / "run")
    again, _ = task.fit(ref, train, recipe, 2)
    one, two, three = (m.rewards(PAIRS)[0] for m in (model, again, load_reward(ref, tmp_path / "run")))
    assert np.array_equal(one, two)
    assert np.array_equal(one, three)
    assert all(torch.equal(v, before[k]) for k, v in backbone.model.state_dict().items())
    assert run.curve[-1] < run.curve[0]
    assert (one[:12, 0] > one[:12, 1]).mean() > 0.8
    assert task.evaluate(load_reward(ref, tmp_path / "run"), held, tmp_path / "k.jsonl")[0].n == 3
    with pytest.raises(TransferError, match="were trained on"):
        task.evaluate(load_reward(ref, tmp_path / "run"), Examples("t", tuple(train)), tmp_path / "k.jsonl")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in names or "score.safetensors" in names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]


def test_training_on_the_pooled_features_is_training_the_head_with_trl(tiny_llama):
    """The head alone runs on features computed once; TRL's loss on the same steps gives the same weights."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    from transfer.tasks import reward_model

    backbone = reward_model.load_reward_backbone(f"path:{tiny_llama}")
    recipe = replace(HEAD, epochs=1)
    ours = reward_model.train_reward(backbone, PAIRS, recipe, 4)[0].model.score.weight
    frozen = backbone.fresh(4)
    frozen.score.requires_grad_(True)
    rows, _ = backbone.conversations(PAIRS, recipe.max_tokens)
    from datasets import Dataset

    from transfer.train.classifier import own_randomness
    from transfer.train.trainers import arguments, loss_curve, scratch

    data = Dataset.from_dict({"chosen_ids": rows[::2], "rejected_ids": rows[1::2]})
    with own_randomness(4), scratch() as folder:
        args = RewardConfig(**arguments(recipe, len(PAIRS), 4, backbone.device, folder), max_length=None)
        tokenizer = backbone.language.tokenizer
        trainer = RewardTrainer(model=frozen, args=args, train_dataset=data, processing_class=tokenizer)
        loss_curve(trainer, "test", recipe)
    assert torch.allclose(ours, frozen.score.weight, atol=1e-5)


def test_upper_layers_train_the_same_rewards_as_the_whole_model_shape(tiny_llama):
    from transfer.tasks.reward_model import train_reward

    ref = f"path:{tiny_llama}"
    model, run = train_reward(ref, PAIRS, replace(LORA, layers="upper"), 1)
    assert run.n_trainable < train_reward(ref, PAIRS, replace(LORA, epochs=1), 1)[1].n_trainable
    assert (model.rewards(PAIRS)[0] @ [1, -1] > 0).mean() > 0.8


def test_long_conversations_are_cut_on_the_left_and_counted(tiny_llama):
    from transfer.tasks.reward_model import load_reward_backbone, train_reward

    backbone = load_reward_backbone(f"path:{tiny_llama}")
    whole, none = backbone.conversations(PAIRS, 10_000)
    limit = min(map(len, whole[::2])) + 2
    rows, cut = backbone.conversations(PAIRS, limit)
    assert none == 0
    assert cut == sum(max(len(a), len(b)) > limit for a, b in zip(whole[::2], whole[1::2], strict=True)) > 0
    assert all(row == long[-limit:] for row, long in zip(rows, whole, strict=True))
    model, run = train_reward(backbone, PAIRS, replace(HEAD, max_tokens=limit), 0)
    assert run.n_truncated == cut == model.rewards(PAIRS)[1]
    with pytest.raises(TransferError, match="no preference pairs"):
        train_reward(backbone, [], HEAD, 0)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("kind", ["lora", "head"])
@pytest.mark.parametrize("model", ["zoo:llama", "zoo:mistral", "zoo:qwen"])
def test_real_data(public_data, tmp_path, model, kind, record_property):
    """HH-RLHF harmlessness, 48 pairs to train and 48 to judge: it runs, and says how unsure it is."""
    data = load_pairs(public_data / "preference" / "hh_harmless_test.jsonl.xz")
    task = Reward()
    recipe = Recipe("brief", kind, 1, 1e-3 if kind == "lora" else 1e-2, 8, max_tokens=128)
    fitted, run = task.fit(model, list(data.rows[:48]), recipe, 0)
    accuracy = task.evaluate(fitted, Examples("held", data.rows[48:96]), tmp_path / "k.jsonl")[0]
    record_property("accuracy", f"{accuracy.value:.3f} +- {accuracy.stderr:.3f}, {run.n_truncated} cut")
    assert 0 < accuracy.value < 1 and accuracy.n == run.n_examples == 48


@pytest.mark.data
def test_real_sets_load_and_say_what_was_left_out(public_data):
    folder = public_data / "preference"
    hh, bar, panda = (
        load_pairs(folder / n) for n in ("hh_harmless_test.jsonl.xz", "llmbar.jsonl", "pandalm_test.jsonl")
    )
    assert len(hh) + sum(hh.left_out.values()) == 1727 and len(hh) > 1700
    assert len(bar) == 526 and {p.subset for p in bar} == {"Natural", "Neighbor", "GPTInst", "MT-Bench"}
    assert len(panda) + sum(panda.left_out.values()) == 750 and panda.left_out["tie"] > 50

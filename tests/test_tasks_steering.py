"""Steering: orders, signs, where the vector acts, the control rate by hand, layer choice, side effects."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models.language import LanguageModel
from transfer.core.errors import TransferError
from transfer.tasks import get_task, steering_vector
from transfer.tasks.base import Examples, Task
from transfer.tasks.choices import Choice, load_choices
from transfer.tasks.side_effects import drift
from transfer.tasks.steering import NEUTRAL, Steering
from transfer.tasks.steering_vector import Steered, ask, contrast, control, equalised, find_vector, log_odds
from transfer.train.recipes import Recipe

torch.set_num_threads(1)
RECIPE = Recipe("steer", "head", epochs=1, lr=1.0, batch=1)
THINGS = [
    "tea",
    "rain",
    "bread",
    "a bicycle",
    "the sea",
    "a cake",
    "the moon",
    "a dog",
    "music",
    "the train",
    "snow",
    "ink",
]


def question(i: int, thing: str) -> Choice:
    yes, no = f"Yes, I agree about {thing}", f"No, {thing} is something else"
    first, second = (yes, no) if i % 2 else (no, yes)
    text = f"I like {thing} very much. Do you?\n\nChoices:\n (A) {first}\n (B) {second}"
    return Choice(f"q{i}", text, "A" if i % 2 else "B", "B" if i % 2 else "A")


CHOICES = [question(i, thing) for i, thing in enumerate(THINGS)]


@pytest.fixture(scope="module")
def llama(tiny_llama) -> LanguageModel:
    return LanguageModel.load(f"path:{tiny_llama}")


def test_both_orders_exchange_words_and_letters():
    item = Choice("x", "What now?\n\nChoices:\n (A) stay here\n (B) go home\n (C) wait", "C", "A")
    (one, m, o), (two, m2, o2) = item.orders()
    assert (one, m, o) == (item.question, "C", "A")
    assert two == "What now?\n\nChoices:\n (A) wait\n (B) go home\n (C) stay here"
    assert (m2, o2) == ("A", "C")
    again = Choice("y", two, m2, o2)
    assert again.orders()[1][0] == one
    assert again.key == item.key != CHOICES[0].key


def test_reading_counts_what_is_no_question(tmp_path):
    good = {"question": "Q?\n (A) a\n (B) b", "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"}
    rows = [
        good,
        good,
        {**good, "question": "Q without answers"},
        {**good, "question": "Q?\n (A) a\n (A) b"},
        {**good, "question": "R?\n (A) a\n (B) b", "answer_matching_behavior": "(C)"},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    found = load_choices(tmp_path / "q.json")
    assert [(c.matching, c.other) for c in found] == [("B", "A")]
    assert found.left_out == {
        "answer is none of the letters": 1,
        "no lettered answers": 1,
        "repeated": 1,
        "repeated letters": 1,
    }
    (tmp_path / "k.json").write_text(json.dumps([{"prompt": "Q?\n(A) a\n(B) b", "correct": "(A)", "incorrect": "(B)"}]))
    assert load_choices(tmp_path / "k.json").rows[0].matching == "A"
    (tmp_path / "q.json").write_text(json.dumps([{"q": "x"}]))
    with pytest.raises(TransferError, match="its columns are q"):
        load_choices(tmp_path / "q.json")


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
def test_the_probe_ends_before_the_letter_and_nothing_of_the_prompt_is_steered(family, request):
    language = LanguageModel.load(f"path:{request.getfixturevalue(family)}")
    asked = ask(language, CHOICES[:3])
    table = language.renderer.bytes
    for row, prompt in enumerate(asked.prompts):
        written = table.join(prompt.ids)
        assert written.endswith(b"("), "neither a letter nor an end of turn stands in front of the probe"
        steered = table.join([prompt.ids[i] for i in prompt.content])
        assert steered.strip() == b"(", "the answer's own bracket is all that is steered"
        letters = [table.join([int(t)]) for t in (asked.matching[row], asked.other[row])]
        want = CHOICES[row // 2].orders()[row % 2][1:]
        assert [x.decode() for x in letters] == list(want)


def test_log_odds_are_those_of_the_plain_model_and_of_a_hand_made_hook(llama):
    asked = ask(llama, CHOICES[:2])
    vector = torch.linspace(-1, 1, llama.d_model) * 3
    plain, pushed = (log_odds(llama, asked, 2, v) for v in (torch.zeros(llama.d_model), vector))
    for row, prompt in enumerate(asked.prompts):
        ids, last = torch.tensor([prompt.ids]), len(prompt.ids) - 1
        for found, add in ((plain, 0.0), (pushed, 1.0)):

            def hook(_m, _a, out, add=add, at=last):
                out = out.clone()
                out[:, at] += add * vector
                return out

            handle = llama.model.model.layers[1].register_forward_hook(hook)
            with torch.inference_mode():
                logits = llama.model(ids).logits[0, -1]
            handle.remove()
            want = float(logits[asked.matching[row]] - logits[asked.other[row]])
            assert found[row // 2, row % 2] == pytest.approx(want, abs=1e-3)
    assert not np.allclose(plain, pushed)


def test_vector_is_the_mean_difference_at_the_letter_of_the_answer(llama):
    asked = ask(llama, CHOICES[:3])
    vectors, norms = contrast(llama, asked, (1, 2), both=False)
    want = torch.zeros(llama.d_model)
    for i in (0, 2, 4):
        for side, sign in ((asked.matching, 1), (asked.other, -1)):
            (states,) = llama.capture([[*asked.prompts[i].ids, int(side[i])]], 2)
            want += sign * states[-1] / 3
    assert torch.allclose(vectors[1], want, atol=1e-4)
    assert (norms > 0).all()


def test_what_the_letters_differ_in_cancels_in_both_orders(llama):
    """With every matching answer under A, one order alone gives mostly the direction of the letter."""
    skewed = [c if c.matching == "A" else Choice(c.id, *c.orders()[1]) for c in CHOICES]
    mirrored = [Choice(c.id, *c.orders()[1]) for c in skewed]
    one, other = (contrast(llama, ask(llama, cs), (2,), both=False)[0][0] for cs in (skewed, mirrored))
    both = contrast(llama, ask(llama, skewed), (2,), both=True)[0][0]
    assert torch.allclose(both, (one + other) / 2, atol=1e-4)
    letter = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert letter < -0.5, "the single order is led by the letter, which turns around with it"
    assert both.norm() < one.norm() / 2


def test_control_rate_known_answer(llama, monkeypatch, tmp_path):
    # Right in both orders at +1: questions 0, 1, 2; at -1: question 2 and 3. One order alone never counts.
    up = np.array([[1, 2], [3, 1], [1, 1], [1, -1], [-1, 1.0]])
    down = np.array([[-1, -2], [3, -1], [1, 1], [1, 1], [-1, 1.0]])
    assert control(up, down).tolist() == [1, 1, 0, -1, 0]
    given = {1.0: up, -1.0: down, 0.0: down}

    def known(_language, _asked, _layer, vector):
        return given[float(vector[0])]

    monkeypatch.setattr(steering_vector, "log_odds", known)
    model = Steered(llama, 2, torch.ones(llama.d_model), {2: (0.5, 1.0)}, frozenset(), "")
    task = Steering(multipliers=(-1.0, 0.0, 1.0), neutral=())
    found = task.evaluate(model, Examples("five", tuple(CHOICES[:5])), tmp_path / "k.jsonl")
    by = {r.metric: r for r in found}
    assert by["scr"].value == pytest.approx(3 / 5 - 2 / 5)
    assert by["scr"].value == pytest.approx(by["robust_accuracy@1"].value - by["robust_accuracy@-1"].value)
    assert by["scr"].stderr == pytest.approx(np.std([1, 1, 0, -1, 0], ddof=1) / np.sqrt(5))
    assert by["accuracy@1"].value == pytest.approx(8 / 10)
    assert by["log_odds_shift"].value == pytest.approx((up - down).mean())
    assert by["scr"].extra["validation_scr@2"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1, 1, 0, -1, 0]
    weigh = task.weighted("scr")
    assert weigh is not None
    scores, counts = np.array([1.0, 1, 0, -1, 0]), np.array([[2.0], [0], [1], [1], [1]])
    assert weigh(np.ones(5), scores, counts)[0] == pytest.approx(1 / 5)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
def test_every_family_steers_to_the_matching_answer_and_repeats(family, request, tmp_path):
    ref = f"path:{request.getfixturevalue(family)}"
    task = get_task("steering", length=2.0, validation=0.25, matching="agrees")
    assert isinstance(task, Task)
    model, run = task.fit(ref, CHOICES[:8], RECIPE, 1)
    again, _ = task.fit(ref, CHOICES[:8], RECIPE, 1)
    assert torch.equal(model.vector, again.vector) and model.layer == again.layer
    assert set(model.scores) == {1, 2}
    assert model.layer == max(model.scores, key=lambda layer: (*model.scores[layer], -layer))
    assert (run.n_trainable, run.curve) == (model.language.d_model, ())
    found = task.evaluate(model, Examples("held", tuple(CHOICES[8:])), tmp_path / "k.jsonl")
    assert found == task.evaluate(again, Examples("held", tuple(CHOICES[8:])), tmp_path / "k.jsonl")
    by = {r.metric: r for r in found}
    assert by["log_odds_shift"].value > 0, "+1 pushes to the matching answer"
    assert by["kl@1"].value > by["kl@0.5"].value > 0
    assert by["kl@1"].n == len(NEUTRAL)
    assert all(len(r.template) == 16 for r in found)
    with pytest.raises(TransferError, match="1 of 1 evaluation questions"):
        task.evaluate(model, Examples("seen", (CHOICES[0],)), tmp_path / "k.jsonl")


def test_a_vector_is_saved_and_read_again_for_its_own_model_only(llama, tiny_qwen, tmp_path):
    model, _ = find_vector(llama, CHOICES, layers=(2,), matching="agrees")
    model.save(tmp_path / "v")
    back = Steered.load(llama, tmp_path / "v")
    assert torch.equal(back.vector, model.vector)
    assert (back.layer, back.scores, back.seen, back.matching) == (2, {}, model.seen, "agrees")
    with pytest.raises(TransferError, match="was made with"):
        Steered.load(LanguageModel.load(f"path:{tiny_qwen}"), tmp_path / "v")


def test_lengths(llama):
    found, _ = find_vector(llama, CHOICES, layers=(2,), length=0.5)
    _, norms = contrast(llama, ask(llama, CHOICES), (2,), both=True)
    assert float(found.vector.norm()) == pytest.approx(0.5 * float(norms[0]), rel=1e-3)
    even = equalised({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 1.0])})
    assert [float(v.norm()) for v in even.values()] == pytest.approx([3.0, 3.0])
    assert torch.allclose(even["a"], torch.tensor([1.8, 2.4]))


def test_side_effects_are_those_of_full_distributions(llama):
    vector = torch.linspace(-1, 1, llama.d_model)
    kl, nll = drift(llama, list(NEUTRAL[:2]), 2, torch.zeros(llama.d_model))
    assert np.allclose(kl, 0) and np.allclose(nll, 0)
    kl, nll = drift(llama, list(NEUTRAL[:2]), 2, vector)
    line = llama.render(NEUTRAL[1])
    ids, first = torch.tensor([line.ids]), int(line.content[0])
    with torch.inference_mode():
        plain = llama.model(ids).logits[0].log_softmax(-1)
        with llama.steering(2, vector, start=torch.tensor([first])):
            moved = llama.model(ids).logits[0].log_softmax(-1)
    at = torch.from_numpy(line.content[1:]) - 1
    want = (plain[at].exp() * (plain[at] - moved[at])).sum(-1).mean()
    assert kl[1] == pytest.approx(float(want), rel=1e-3)
    token = ids[0, at + 1]
    lost = (plain[at, token] - moved[at, token]).sum() / len(NEUTRAL[1].encode())
    assert nll[1] == pytest.approx(float(lost), rel=1e-3, abs=1e-6)


def test_refusals(llama):
    with pytest.raises(TransferError, match="too few"):
        find_vector(llama, CHOICES[:3])
    with pytest.raises(TransferError, match="layers 1 to 2"):
        find_vector(llama, CHOICES, layers=(3,))
    with pytest.raises(TransferError, match="multipliers -1 and 1"):
        Steering(multipliers=(0.0, 1.0))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("model", ["zoo:llama", "zoo:mistral", "zoo:qwen"])
@pytest.mark.parametrize("behaviour", ["sycophancy", "survival-instinct"])
def test_real_data(public_data, tmp_path, model, behaviour, record_property):
    folder = public_data / "steering" / "caa"
    task = Steering(matching=steering_vector.BEHAVIOURS[behaviour], length=1.0)
    made, held = (task.load(str(folder / behaviour / f"{name}.json")) for name in ("generate", "test_dataset_ab"))
    assert len(made) + sum(made.left_out.values()) in (773, 677)
    steered, _ = task.fit(model, list(made.rows[:40]), RECIPE, 0)
    fresh = Examples(held.name, tuple(c for c in held if c.key not in steered.seen))
    by = {r.metric: r for r in task.evaluate(steered, fresh, tmp_path / "k.jsonl")}
    record_property("layer", steered.layer)
    for name in ("scr", "log_odds_shift", "kl@1", "nll_change@1"):
        record_property(name, f"{by[name].value:.4f} +- {by[name].stderr:.4f}")
    assert -1 <= by["scr"].value <= 1 and by["scr"].n == len(fresh) > 40
    assert by["kl@1"].value > 0

"""Instruction following: the loss on answers alone, likelihood a byte, IFEval checks, win rates by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.chat import Answer
from models.language import LanguageModel, kept_language
from transfer.core.errors import TransferError
from transfer.tasks import get_task
from transfer.tasks.base import Examples, Task
from transfer.tasks.chats import answer_ids
from transfer.tasks.demonstrations import Demonstration, load_demonstrations
from transfer.tasks.ifeval import CHECKS, Prompt, check_all, follows, load_ifeval
from transfer.tasks.instruction import Instruction, weighted_likelihood
from transfer.tasks.sft import AnswerLoss, Tuned, load_sft, train_sft
from transfer.tasks.winrate import export_alpaca_eval, judge, verdict, win_rate
from transfer.train.recipes import Recipe

torch.set_num_threads(1)

SHOWN = [
    Demonstration(f"d{i}", (("user", f"Tell me about {thing}."),), f"{thing} is good, and I like {thing}.")
    for i, thing in enumerate(["tea", "rain", "bread", "cake", "music", "snow", "ink", "the sea"])
]
LORA = Recipe("tiny", "lora", epochs=4, lr=1e-2, batch=4, rank=4, max_tokens=96)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return path


def test_layouts_say_the_same(tmp_path):
    asked, answer = "Who?\n\nMe?", "You."
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    shares = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    layouts = [
        {"prompt": asked, "completion": answer},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"messages": turns},
        {"conversations": shares},
        {"instruction": "Who?", "input": "Me?", "output": answer},
    ]
    for row in layouts:
        (found,) = load_demonstrations(write(tmp_path / "d.jsonl", [row])).rows
        assert found[1:] == ((("user", asked),), answer), row
    rows = [layouts[0], layouts[0], {"prompt": "a", "completion": " "}, {"prompt": "", "completion": "x"}]
    found = load_demonstrations(write(tmp_path / "d.jsonl", rows))
    assert found.left_out == {"empty answer": 1, "empty question": 1, "repeated": 1}
    with pytest.raises(TransferError, match="its columns are a"):
        load_demonstrations(write(tmp_path / "d.jsonl", [{"a": 1}]))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
def test_answer_tokens_are_those_that_trl_masks_in(family, request):
    """TRL's own preparation of prompt/completion columns is the yardstick; ours also knows where the answer ends."""
    from trl.data_utils import _tokenize

    language = LanguageModel.load(f"path:{request.getfixturevalue(family)}")
    for shown in SHOWN[:3]:
        ids, begin, end = answer_ids(language.tokenizer, shown.prompt, shown.answer)
        prompt = [{"role": r, "content": c} for r, c in shown.prompt]
        whole = [*prompt, {"role": "assistant", "content": shown.answer}]
        theirs = _tokenize(language.tokenizer, whole)["input_ids"]
        before = _tokenize(language.tokenizer, prompt, add_generation_prompt=True)["input_ids"]
        assert ids == theirs and ids[:begin] == before[:begin]
        written = language.renderer.bytes.join(ids[begin:end]).decode()
        assert written.strip() == shown.answer
        assert end < len(ids), "the end of turn is learnt, and not part of the answer"


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
@pytest.mark.parametrize("kind", ["lora", "head"])
def test_every_family_learns_repeats_and_loads_again(family, kind, request, tmp_path):
    language = LanguageModel.load(f"path:{request.getfixturevalue(family)}")
    before = {k: v.clone() for k, v in language.model.state_dict().items()}
    recipe = replace(LORA, kind=kind, epochs=3)
    model, run = train_sft(language, SHOWN[:6], recipe, 2, tmp_path / "run")
    again, _ = get_task("instruction").fit(language, SHOWN[:6], recipe, 2)
    one, two, three = (m.answer_loss(SHOWN).nats for m in (model, again, load_sft(language, tmp_path / "run")))
    assert np.array_equal(one, two) and np.array_equal(one, three)
    assert all(torch.equal(v, before[k]) for k, v in language.model.state_dict().items())
    base = Tuned(language, 96, frozenset())
    assert run.curve[-1] < run.curve[0]
    assert one.sum() < base.answer_loss(SHOWN).nats.sum() - 1
    if kind == "head":
        assert run.n_trainable == language.model.lm_head.weight.numel()
        changed = [k for k, v in model.language.model.state_dict().items() if not torch.equal(v, before[k].float())]
        assert changed == ["lm_head.weight"], "a tied embedding must stay as it was"
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names & {"adapter_model.safetensors", "lm_head.safetensors"}


def test_upper_layers_alone_get_adapters(tiny_llama):
    language = LanguageModel.load(f"path:{tiny_llama}")
    _, whole = train_sft(language, SHOWN[:4], replace(LORA, epochs=1), 0)
    model, upper = train_sft(language, SHOWN[:4], replace(LORA, epochs=1, layers="upper"), 0)
    assert upper.n_trainable * language.n_layers == whole.n_trainable
    names = [n for n, _ in model.language.model.named_parameters() if "lora_" in n]
    assert names and all(".layers.2." in n for n in names)


def test_prompts_give_no_loss(tiny_llama):
    """The first step's loss is the mean over the answer's tokens and its end of turn, and over no other."""
    language = LanguageModel.load(f"path:{tiny_llama}")
    recipe = replace(LORA, epochs=1, batch=1, dropout=0.0)
    ids, begin, _ = answer_ids(language.tokenizer, SHOWN[0].prompt, SHOWN[0].answer)
    _, run = train_sft(language, SHOWN[:1], recipe, 0)
    want = language.nll([ids], [np.arange(begin, len(ids))])[0] / (len(ids) - begin)
    assert run.curve[0] == pytest.approx(want, rel=1e-4)


def test_likelihood_per_byte_known_answer(tmp_path):
    class Known:
        seen, template = frozenset(), "t"

        def answer_loss(self, shown):
            return AnswerLoss(np.array([2.0, 6.0, 1.0]), np.array([4, 4, 2]), 1)

    model: Any = Known()
    (found,) = Instruction().evaluate(model, Examples("d", tuple(SHOWN[:3])), tmp_path / "k.jsonl")
    assert found.value == pytest.approx(-0.9)
    residual = (np.array([-2.0, -6, -1]) + 0.9 * np.array([4, 4, 2])) / (10 / 3)
    assert found.stderr == pytest.approx(residual.std(ddof=1) / math.sqrt(3))
    assert found.extra["nll_per_byte"] == pytest.approx(0.9)
    assert found.extra["nll_low"] < 0.9 < found.extra["nll_high"]
    assert found.extra["bits_per_byte"] == pytest.approx(0.9 / math.log(2))
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    labels, scores = (np.array([row[k] for row in rows]) for k in ("label", "score"))
    assert weighted_likelihood(labels, scores, np.ones((3, 1)))[0] == pytest.approx(found.value)
    assert isinstance(Instruction(), Task)


def test_evaluation_counts_cut_answers_and_refuses_what_was_trained_on(tiny_qwen, tmp_path):
    language = LanguageModel.load(f"path:{tiny_qwen}")
    model, _ = train_sft(language, SHOWN[:4], replace(LORA, epochs=1), 0)
    with pytest.raises(TransferError, match="1 of 2 questions"):
        Instruction().evaluate(model, Examples("d", (SHOWN[0], SHOWN[5])), tmp_path / "k.jsonl")
    ids, begin, end = answer_ids(language.tokenizer, SHOWN[5].prompt, SHOWN[5].answer)
    short = replace(model, max_tokens=end - 2)
    loss = short.answer_loss(SHOWN[5:6])
    assert loss.n_truncated == 1 and loss.n_bytes[0] < len(SHOWN[5].answer)
    with pytest.raises(TransferError, match="alone fills the limit"):
        replace(model, max_tokens=begin).answer_loss(SHOWN[5:6])
    _, run = train_sft(language, [SHOWN[0], SHOWN[7]._replace(prompt=(("user", "x " * 90),))], LORA, 0)
    assert (run.n_examples, run.n_dropped, run.n_truncated) == (1, 1, 1)
    with pytest.raises(TransferError, match="None of the 1 demonstrations"):
        train_sft(language, SHOWN[:1], replace(LORA, max_tokens=3), 0)


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "OK then, GO",
        "Ok GO",
    ),
    ("change_case:english_capital", {}, "ALL OF IT, NOW.", "All of it"),
    ("change_case:english_lowercase", {}, "all of it, now.", "All of it"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Here:", "Here: say it."),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a] and b"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. more", "Bye.\nP.S. more"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. P.S. more", "Bye. PS more"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 a Section 2 b",
        "Section 1",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:title", {}, "<<T>> text", "<< >> text"),
    ("keywords:existence", {"keywords": ["mom", "Mother"]}, "MOM and mother", "mom"),
    ("keywords:forbidden_words", {"forbidden_words": ["coop"]}, "cooperate", "a coop."),
    ("keywords:frequency", {"keyword": "x", "relation": "less than", "frequency": 2}, "x", "x X"),
    ("keywords:letter_frequency", {"letter": "!", "let_relation": "at least", "let_frequency": 2}, "a!!", "a!"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"first_word": "so", "num_paragraphs": 2, "nth_paragraph": 2},
        'a\n\n"So, b',
        "a\n\nb",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 3},
        "Mr. A is in. He sat!",
        "A. B? C.",
    ),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two, three", "one two"),
    ("punctuation:no_comma", {}, "one two", "one, two"),
    ("startend:end_checker", {"end_phrase": "Any more?"}, 'Yes. any more?"', "Any more? Yes."),
    ("startend:quotation", {}, '"All."', '"All.'),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[c[0] for c in CASES])
def test_every_check_by_hand(name, arguments, good, bad):
    assert follows(good, name, arguments) is True
    assert follows(bad, name, arguments) is False
    assert follows(" ", name, arguments, loose=True) is False


def test_every_check_has_a_case_and_bad_arguments_are_named():
    assert {c[0] for c in CASES} == set(CHECKS)
    with pytest.raises(TransferError, match="keywords:existence lacks an argument"):
        follows("x", "keywords:existence", {})


def test_strict_and_loose_accuracy_known_answer():
    prompts = [
        Prompt("a", "", ("punctuation:no_comma", "startend:quotation"), ({}, {})),
        Prompt("b", "", ("punctuation:no_comma",), ({},)),
        Prompt("c", "", ("language:response_language", "punctuation:no_comma"), ({"language": "de"}, {})),
    ]
    found = check_all(prompts, ['Sure, here it is:\n"No comma here"', "a, b", "fine"])
    assert found.unsupported == {"language:response_language": 1}
    assert found.scores("strict") == ([0.0, 0.0], [[0.0, 0.0], [0.0], [1.0]])
    assert found.scores("loose") == ([1.0, 0.0], [[1.0, 1.0], [0.0], [1.0]]), "without its first line it follows both"
    with pytest.raises(TransferError, match="3 prompts and 1"):
        check_all(prompts, ["x"])


def test_ifeval_runs_on_a_model_and_counts(tiny_mistral, tmp_path):
    rows = [
        {"key": 1, "prompt": "Say hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "x " * 600, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 3, "prompt": "Hi", "instruction_id_list": ["language:response_language"], "kwargs": [{}]},
    ]
    language = LanguageModel.load(f"path:{tiny_mistral}")
    model, _ = train_sft(language, SHOWN[:4], replace(LORA, epochs=1), 0)
    task = Instruction(ifeval=str(write(tmp_path / "i.jsonl", rows)), max_new_tokens=8)
    found = task.evaluate(model, Examples("d", tuple(SHOWN[6:])), tmp_path / "k.jsonl")
    assert found == task.evaluate(model, Examples("d", tuple(SHOWN[6:])), tmp_path / "k.jsonl")
    by = {r.metric: r for r in found}
    names = [f"ifeval_{u}_{c}" for c in ("strict", "loose") for u in ("prompt", "instruction")]
    assert list(by) == ["log_likelihood", *names]
    assert by["ifeval_prompt_strict"].n == by["ifeval_instruction_strict"].n == 2
    extra = by["ifeval_prompt_strict"].extra
    assert extra["n_prompts"] == 3 and extra["n_unsupported@language:response_language"] == 1
    assert extra["n_without_room"] == 1
    assert len((tmp_path / "k.jsonl").read_text().splitlines()) == 2 + 3


class Judge:
    name = "scripted"

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def complete(self, chats):
        self.asked += chats
        return [Answer(text, 1, 1) for text in self.answers]


def test_both_orders_make_one_preference_and_unclear_ones_are_counted():
    said = ["Verdict: A", "Verdict: B", "verdict: a", "Verdict: A"]
    said += ["I do not know", "Verdict: B", "**Verdict: tie**", "Verdict: B"]
    model = Judge(said)
    found = judge(model, ["q"] * 4, ["ours", "long ours", "o", "o"], ["t", "t", "t", "t"])
    assert "Answer A:\nours" in model.asked[0].messages[1][1] and "Answer B:\nours" in model.asked[1].messages[1][1]
    # Ours won both; A won both (a biased judge); no verdict; a tie, then ours as B.
    assert np.array_equal(found.preference, [1, 0.5, np.nan, 0.75], equal_nan=True)
    assert (found.n_unparsed, found.consistency) == (1, pytest.approx(1 / 3))
    rate = win_rate(found.preference, found.lengths)
    assert (rate.n, rate.n_left_out, rate.value) == (3, 1, 0.75)
    assert verdict("Verdict: A\nno: Verdict follows\nVerdict: B") == "b"


def test_length_controlled_rate_known_answers():
    rng = np.random.default_rng(0)
    equal = np.array([1.0] * 7 + [0.0] * 3)
    flat = win_rate(equal, np.full((10, 2), 50))
    assert flat.controlled == pytest.approx(flat.value) == pytest.approx(0.7)
    # Length alone decides, and ours is mostly longer: the raw rate shows it, the controlled one is a draw.
    gap = rng.normal(150, 200, 400)
    lengths = np.stack([2000 + gap, np.full(400, 2000)], axis=1)
    verbose = win_rate(1 / (1 + np.exp(-3 * np.tanh(gap / gap.std()))), lengths, draws=50)
    assert verbose.value > 0.65 and verbose.length_effect == pytest.approx(3, rel=0.1)
    assert verbose.controlled == pytest.approx(0.5, abs=0.005)
    # A true effect (log odds .8 at equal length) behind a bias for length is found again.
    gap = rng.normal(150, 200, 4000)
    p = 1 / (1 + np.exp(-(0.8 + 1.5 * np.tanh(gap / gap.std()))))
    wins = (rng.random(4000) < p).astype(float)
    found = win_rate(wins, np.stack([2000 + gap, np.full(4000, 2000)], axis=1), draws=50)
    assert found.controlled == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.03) and found.value > found.controlled + 0.03
    assert 0.005 < found.controlled_stderr < 0.03
    assert win_rate(np.ones(5), np.ones((5, 2))).controlled == 1
    with pytest.raises(TransferError, match="0 of 1"):
        win_rate(np.array([np.nan]), np.ones((1, 2)))


def test_alpaca_eval_export(tmp_path):
    export_alpaca_eval(tmp_path / "o.json", ["q"], ["a"], "mine", ["koala"])
    want = [{"instruction": "q", "output": "a", "generator": "mine", "dataset": "koala"}]
    assert json.loads((tmp_path / "o.json").read_text()) == want
    with pytest.raises(TransferError, match="1 requests, 2 answers"):
        export_alpaca_eval(tmp_path / "o.json", ["q"], ["a", "b"], "mine")


@pytest.mark.data
def test_ifeval_data_is_covered_but_for_languages(public_data):
    prompts = load_ifeval(public_data / "ifollow" / "ifeval.jsonl")
    found = check_all(prompts.rows, ["Word, word."] * len(prompts))
    assert found.unsupported == {"language:response_language": 21}
    ids = {name for p in prompts for name in p.instructions}
    assert ids - set(CHECKS) == {"language:response_language"} and len(ids) == 25


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("kind", ["lora", "head"])
@pytest.mark.parametrize("model", ["zoo:llama", "zoo:mistral", "zoo:qwen"])
def test_real_data(public_data, tmp_path, model, kind, record_property):
    """Dolly, 48 demonstrations: the training loss falls, the likelihood of held-out answers is recorded as it is.

    The zoo has read such data before, and a handful of steps need not help it.
    """
    data = Instruction().load(str(public_data / "instruct" / "dolly_3k.jsonl.xz"))
    short = [d for d in data if len(d.prompt[0][1]) + len(d.answer) < 300]
    held = Examples("held", tuple(short[48:96]))
    recipe = Recipe("brief", kind, 2, 2e-3 if kind == "lora" else 1e-3, 8, max_tokens=128)
    tuned, run = Instruction().fit(model, short[:48], recipe, 0)
    base = Tuned(kept_language(model), recipe.max_tokens, frozenset())
    values = [Instruction().evaluate(m, held, tmp_path / "k.jsonl")[0] for m in (base, tuned)]
    record_property("nats a byte", f"{values[0].value:.4f} -> {values[1].value:.4f} +- {values[1].stderr:.4f}")
    assert run.curve[-1] < run.curve[0]
    assert values[0].n == 48 and abs(values[1].value - values[0].value) < 1


@pytest.mark.data
def test_controlled_rates_of_real_preferences_agree_with_the_published_ones(public_data):
    """AlpacaEval 2: GPT-4-turbo's preferences over 17 models, on the requests whose texts are at hand."""
    import pandas as pd

    folder = public_data / "nc" / "alpaca_eval"
    outputs = pd.read_json(folder / "model_outputs.jsonl.xz", lines=True)
    lengths = outputs["output"].str.len().groupby([outputs["generator"], outputs["idx"]]).first()
    published = pd.read_csv(public_data / "published" / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv", index_col=0)
    ours, raw, theirs, base = [], [], [], []
    votes = pd.read_json(folder / "preferences.jsonl.xz", lines=True)
    for name, rows in votes.groupby("generator_2"):
        pairs = [(n, i) for n in (name, "gpt4_1106_preview") for i in rows["idx"]]
        sizes = lengths.reindex(pairs).to_numpy().reshape(2, -1).T
        known = ~np.isnan(sizes).any(axis=1)
        if str(name) in published.index and known.sum() > 300:
            found = win_rate(rows["preference"].to_numpy()[known] - 1, sizes[known], draws=20)
            ours.append(100 * found.controlled)
            raw.append(100 * found.value)
            theirs.append(published.loc[str(name), "length_controlled_winrate"])
            base.append(published.loc[str(name), "win_rate"])
    assert len(ours) > 10
    rank = pd.Series(ours).corr(pd.Series(theirs), method="spearman")
    gap = float(np.mean(np.abs(np.subtract(ours, theirs))))
    assert np.mean(np.abs(np.subtract(raw, base))) < 4, "the raw rates are of the same preferences, on fewer requests"
    assert rank > 0.9 and gap < 6, f"rank correlation {rank:.3f}, mean gap {gap:.2f} points"

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from models.cache import AnswerCache
from models.chat import Chat, ScriptedChat
from models.judges import Case, ChatJudge, Judged, Verdict, agreement, rank
from models.language import LanguageModel
from models.local_chat import LocalChat
from models.prompts import DETECT, EXPLAIN, GRADES, VERIFY
from models.replies import ask, asked_line, concept, grade, numbers
from models.rubric import load_rubric
from transfer.core.errors import TransferError
from transfer.core.span import Span


def span(text: str, token: str, value: float = 1.0) -> Span:
    start = text.index(token)
    return Span("d", text, start, start + len(token), value)


def case(feature: int = 7) -> Case:
    spans = (span("how to paint a fence", "paint", 4.0), span("paint it $rubric ${x}", "paint", 2.0))
    return Case(feature, spans, (Span("d2", "bake a cake", 0, 0, 0.0),), ("brush", "wall"))


# --- reading ---


@pytest.mark.parametrize(
    "text", ["Fit: Yes", "**Fit:** yes.", "I think so.\n\nFit: [[Yes]]\n", "- Fit : *Yes*", "Fit: No\nFit: Yes"]
)
def test_a_grade_is_read_from_its_line(text: str) -> None:
    assert grade(text, "Fit") == "Yes"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes",
        "Fit: yes, mostly",
        "Fit: Yes or No",
        "The fit: is it? Yes",
        "<think>Fit: Yes</think>",
        "<think>Fit: Yes",
        "Fit:",
        "Fit: Definitely",
    ],
)
def test_what_is_no_clear_grade_is_not_guessed(text: str) -> None:
    assert grade(text, "Fit") is None


def test_numbers_are_read_strictly() -> None:
    assert numbers("Active: 1, 3 and 4", "Active", 4) == {1, 3, 4}
    assert numbers("Active: none.", "Active", 4) == frozenset()
    for wrong in ("Active: 0", "Active: 5", "Active: one", "Active:", "1, 2", "Active: 1-3", "Active: all"):
        assert numbers(wrong, "Active", 4) is None, wrong


def test_a_concept_is_one_line_of_words() -> None:
    assert concept("…\nConcept:  words  about paint ", "Concept") == "words about paint"
    assert concept('**Concept:** "paint (not dye)."', "Concept") == "paint (not dye)"
    assert concept("Concept: <at most twenty words, or unclear>", "Concept") is None
    assert concept("Concept: " + "word " * 61, "Concept") is None and concept("paint", "Concept") is None


@given(st.text(max_size=60), st.sampled_from(GRADES))
def test_any_reasoning_before_the_line_is_allowed(before: str, label: str) -> None:
    if "<think>" not in before.casefold():
        assert grade(f"{before}\nRelevant: {label}", "Relevant") == label


def test_one_reminder_then_unparsable_never_dropped() -> None:
    model = ScriptedChat(
        lambda c: (
            "Fit: Yes" if "good" in c.messages[1][1] or len(c.messages) > 2 and "late" in c.messages[1][1] else "hm"
        )
    )
    chats = [VERIFY.chat(max_tokens=9, seed=0, description=d, spans="") for d in ("good", "late", "never")]
    found, texts, counts = ask(model, VERIFY, chats, lambda _, text: grade(text, "Fit"))
    assert found == ["Yes", "Yes", None] and len(texts) == 3
    assert (counts["asked"], counts["reminded"], counts["unparsable"]) == (3, 2, 1)
    reminder = model.asked[3].messages
    assert reminder[-2] == ("assistant", "hm") and reminder[-1][1].endswith("Fit: Yes, Probably, Maybe or No")


# --- the judge ---


def judge_by(explain: str, fit: str, relevant: str) -> ChatJudge:
    def write(chat: Chat) -> str:
        body = chat.messages[1][1]
        kind = re.findall(r"\n(Concept|Fit|Relevant):", body)[-1]
        return f"Because.\n{kind}: {dict(Concept=explain, Fit=fit, Relevant=relevant)[kind]}"

    return ChatJudge(ScriptedChat(write))


def test_three_separate_calls_give_a_verdict() -> None:
    judge = judge_by("painting things", "Probably", "Maybe")
    rubric = load_rubric("toxicity")
    judged = judge.judge([case(7), case(9)], rubric)
    assert [v.feature for v in judged.verdicts] == [7, 9]
    verdict = judged.verdicts[0]
    assert (verdict.description, verdict.fit, verdict.label) == ("painting things", "Probably", "Maybe")
    assert verdict.relevant() and not verdict.relevant("Probably")
    assert rubric.id == judged.rubric and rubric.hash in judged.rubric and EXPLAIN.hash in judged.judge
    assert judged.counts["explain_asked"] == judged.counts["verify_asked"] == judged.counts["relevance_asked"] == 2
    assert judged.counts["explain_unparsable"] == 0
    explain, _, verify, _, relevance, _ = [c.messages[1][1] for c in judge.model.asked]  # type: ignore[attr-defined]
    assert "1. [100%] how to «paint» a fence" in explain and "2. [50%]" in explain and "bake a cake" in explain
    assert "brush, wall" in explain and "painting things" not in explain
    assert "painting things" in verify and "painting things" in relevance and rubric.counts[0] in relevance
    assert "$rubric ${x}" in relevance  # what texts say is never read as a template
    assert rubric.counts[0] not in verify


def test_an_unclear_feature_is_not_judged_further() -> None:
    judge = judge_by("Unclear.", "Yes", "Yes")
    judged = judge.judge([case()], load_rubric("toxicity"))
    assert (judged.verdicts[0].fit, judged.verdicts[0].label) == ("No", "No") and not judged.relevant()
    assert judged.counts["verify_asked"] == 0


def test_what_cannot_be_read_is_kept_and_counted() -> None:
    judged = judge_by("", "Yes", "Yes").judge([case()], load_rubric("toxicity"))
    assert judged.verdicts[0].label == "unparsable" and judged.counts["explain_unparsable"] == 1
    judged = judge_by("paint", "Yes", "Surely").judge([case()], load_rubric("toxicity"))
    verdict = judged.verdicts[0]
    assert verdict.label == "unparsable" and not verdict.relevant() and judged.counts["relevance_unparsable"] == 1
    assert judged.counts["relevance_reminded"] == 1
    with pytest.raises(TransferError, match="fire on none"):
        judge_by("x", "Yes", "Yes").judge([Case(3, ())], load_rubric("toxicity"))
    with pytest.raises(TransferError, match="no grade"):
        rank("Surely")


def test_prompts_have_names_versions_and_hashes_of_their_words() -> None:
    import dataclasses

    prompts = (EXPLAIN, VERIFY, DETECT)
    assert len({p.hash for p in prompts}) == 3 and all(p.id == f"{p.name}-{p.version}#{p.hash}" for p in prompts)
    assert dataclasses.replace(EXPLAIN, system=EXPLAIN.system + " ").hash != EXPLAIN.hash
    assert asked_line(VERIFY.chat(max_tokens=1, seed=0, description="d", spans="s").messages[1][1], "Fit")


# --- agreement ---


def judged(labels: list[str], rubric: str = "r") -> Judged:
    verdicts = tuple(Verdict(i, "d", "Yes", label) for i, label in enumerate(labels))
    return Judged("j", rubric, verdicts)


def test_kappa_by_hand() -> None:
    first = judged(["Yes", "Yes", "No", "No", "unparsable", "Maybe"])
    second = judged(["Yes", "No", "No", "No", "Yes", "Probably"])
    found = agreement(first, second)
    assert (found.n, found.n_unread, found.agree) == (5, 1, 0.6)
    # Observed 3/5; by chance No 2·3, Yes 2·1, Maybe 1·0, Probably 0·1: 8/25.
    assert found.kappa == pytest.approx((0.6 - 0.32) / (1 - 0.32))
    assert found.table == ((2, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0), (1, 0, 0, 1))
    assert found.binary == pytest.approx(cohen_kappa_score([1, 1, 0, 0, 1], [1, 0, 0, 0, 1]))
    assert found.weighted > -1 and found.weighted != found.kappa
    assert math.isnan(agreement(judged(["No", "No"]), judged(["No", "No"])).kappa)
    same = agreement(judged(["No", "Yes"]), judged(["No", "Yes"]))
    assert same.kappa == same.weighted == same.binary == 1
    with pytest.raises(TransferError, match="different rubrics"):
        agreement(first, judged(["Yes"], "other"))
    with pytest.raises(TransferError, match="no feature in common"):
        agreement(judged([]), judged(["Yes"]))
    unread = agreement(judged(["unparsable", "No"]), judged(["Yes", "unparsable"]))
    assert (unread.n, unread.n_unread, sum(map(sum, unread.table))) == (0, 2, 0) and math.isnan(unread.kappa)


# --- a local model ---


@pytest.fixture(scope="module")
def tiny_chat(tiny_llama: Path) -> LanguageModel:
    return LanguageModel.load(f"path:{tiny_llama}")


def asked(n: int, **settings: float) -> list[Chat]:
    return [
        Chat((("system", "be brief"), ("user", f"{'tell me ' * i}a joke")), 8, seed=i, **settings) for i in range(n)
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_local_answer_depends_on_its_request_alone(tiny_chat: LanguageModel, temperature: float) -> None:
    chats = asked(5, temperature=temperature, top_p=0.9)
    together = LocalChat(tiny_chat, batch_size=4).complete(chats)
    alone = [LocalChat(tiny_chat, batch_size=1).complete([c])[0] for c in reversed(chats)][::-1]
    assert together == alone
    assert all(0 < a.n_written <= 8 and a.n_prompt > 0 for a in together)
    if temperature:
        other = [Chat(c.messages, 8, temperature, 0.9, seed=99) for c in chats]
        assert LocalChat(tiny_chat).complete(other) != together


def test_a_local_model_reads_its_template_once_and_draws_like_the_distribution(tiny_chat: LanguageModel) -> None:
    model = LocalChat(tiny_chat, batch_size=64)
    chat = Chat((("user", "hello"),), 1)
    (ids,) = model.prompts([chat])
    assert ids.count(tiny_chat.tokenizer.bos_token_id) == 1  # the template prints it, nobody adds another
    import torch

    with torch.inference_mode():
        logits = tiny_chat.model(torch.tensor([ids])).logits[0, -1].float()
    chances = (logits / 1.5).softmax(-1)
    best = int(chances.argmax())
    many = [Chat(chat.messages, 1, 1.5, 1.0, seed=s) for s in range(400)]
    from models.local_chat import _Draw

    draw = _Draw(many, model.name)
    drawn = draw(torch.zeros(1), logits.expand(400, -1)).argmax(-1)
    share = float((drawn == best).float().mean())
    expected = float(chances[best])
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 400) + 1e-3
    narrow = _Draw([Chat(chat.messages, 1, 1.5, 1e-6, seed=s) for s in range(20)], model.name)
    assert set(narrow(torch.zeros(1), logits.expand(20, -1)).argmax(-1).tolist()) == {best}


def test_a_local_model_refuses_what_does_not_fit_and_keeps_the_rest(tiny_chat: LanguageModel, tmp_path: Path) -> None:
    room = tiny_chat.model.config.max_position_embeddings
    long = Chat((("user", "word " * room),), 8)
    with AnswerCache(tmp_path / "a.sqlite") as cache:
        model = LocalChat(tiny_chat, cache=cache)
        answers = model.complete([*asked(2), long, asked(2)[0]])
        assert [a.finish == "refused" for a in answers] == [False, False, True, False]
        assert [a.cached for a in answers] == [False, False, False, True] and len(cache) == 2
        assert (model.usage.n_answered, model.usage.n_refused, model.usage.n_cached) == (2, 1, 1)
        assert all(a.cached for a in LocalChat(tiny_chat, cache=cache).complete(asked(2)))
    with pytest.raises(TransferError, match="None of 1 requests fits"):
        LocalChat(tiny_chat).complete([long])


def test_a_system_turn_is_folded_where_the_template_has_none(tiny_mistral: Path, tiny_qwen: Path) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    mistral = LocalChat(LanguageModel.load(f"path:{tiny_mistral}"))
    assert "[INST] be brief\n\nhello [/INST]" in mistral._rendered(list(chat))
    qwen = LocalChat(LanguageModel.load(f"path:{tiny_qwen}"))
    assert "<|im_start|>system\nbe brief<|im_end|>" in qwen._rendered(list(chat))

"""Generators: guided decoding is what it says, chat replies are read strictly, splits of chunks change nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import Adapter
from models.chat import Answer, Chat
from models.chat_generator import ChatGenerator
from models.decoding import Decoding, weighed
from models.fluency import log_perplexity
from models.generators import Prompt
from models.guided import GuidedGenerator, GuidedLanguage
from models.steered import SteeredGenerator
from transfer.core.errors import TransferError
from transfer.core.workers import Workers
from transfer.synth.verdicts import fault

torch.set_num_threads(1)
PROMPTS = ["Requests:\n- how do I bake bread\n-", "Requests:\n- tea\n-", "Requests:\n- why is the sky blue at noon\n-"]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen"])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    folder = request.getfixturevalue(f"tiny_{request.param}")
    return Adapter.load(f"path:{folder}", f"path:{folder}/sae")


@pytest.fixture(scope="module")
def llama(tiny_llama: Any) -> Adapter:
    return Adapter.load(f"path:{tiny_llama}", f"path:{tiny_llama}/sae")


# --- guided decoding ---


def decoding(adapter: Adapter, steer: torch.Tensor | None = None, weight: float = 3.0, k: int = 5) -> Decoding:
    return Decoding(
        adapter,
        adapter.language.renderer.plain(PROMPTS),
        steer,
        [(3, 0.5), (7, 1.0), (11, 2.0)],
        temperature=0.9,
        top_p=1.0,
        candidates=k,
        weight=weight,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("steered", [False, True])
def test_side_by_side_candidates_equal_a_plain_forward_pass(adapter: Adapter, steered: bool) -> None:
    language, sae = adapter.language, adapter.dictionary.sae
    torch.manual_seed(0)
    vectors = torch.randn(3, language.d_model) if steered else None
    with torch.inference_mode():
        run = decoding(adapter, vectors)
        special = torch.zeros(run.logits.shape[-1], dtype=torch.bool)
        best = torch.full((3,), -torch.inf)
        written = []
        for _ in range(6):
            token, best = run._step(special, best)
            written.append(token)
    tokens = torch.stack(written, 1).tolist()
    for row, prompt in enumerate(language.renderer.plain(PROMPTS)):
        line = torch.tensor([prompt + tokens[row]])
        with torch.inference_mode():
            if vectors is None:
                whole = language.model(input_ids=line).logits[0, -1]
            else:
                with language.steering(adapter.space.layer, vectors[row]):
                    whole = language.model(input_ids=line).logits[0, -1]
        assert torch.allclose(whole, run.logits[row], atol=2e-4)
        # The value that guided the choice is the feature's pre-activation in the unsteered stream, over the scale.
        x = language.capture([line[0].tolist()], adapter.space.layer)[0][len(prompt) :]
        feature, scale = [(3, 0.5), (7, 1.0), (11, 2.0)][row]
        pre = (x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc[:, feature] + sae.b_enc[feature]
        assert best[row].item() == pytest.approx((pre.max() / scale).item(), abs=1e-3)


def test_guidance_follows_its_law_and_stops_at_enough() -> None:
    inf = torch.inf
    logp = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]).log()
    value = torch.tensor([[1.0, 2.0, 0.0], [9.0, 5.0, -inf], [-inf, 1.0, 1.0]])
    law, reached = weighed(logp, value, torch.tensor([0.5, -inf, -inf]), 2.0)
    by_hand = torch.tensor([0.5 * np.exp(2.0), 0.3 * np.exp(4.0), 0.2 * np.exp(1.0)])
    assert torch.allclose(law[0].exp(), (by_hand / by_hand.sum()).float(), atol=1e-6)
    assert reached[0].tolist() == [1.0, 2.0, 0.5]
    # Beyond ENOUGH nothing more is gained; a token that ends the text gains as little as the worst.
    assert torch.allclose(law[1].exp()[:2] / law[1].exp()[:2].sum(), torch.tensor([0.625, 0.375]))
    assert law[1, 2] == pytest.approx(float(law[1, 1] + np.log(0.2 / 0.3)), abs=1e-5)
    assert torch.allclose(law[2].exp(), torch.tensor([0.6, 0.4, 0.0]), atol=1e-6)
    assert torch.allclose(weighed(logp, value, torch.zeros(3), 0.0)[0], logp)


def test_rows_that_end_leave_the_others_as_they_were(llama: Adapter) -> None:
    with torch.inference_mode():
        whole, part = decoding(llama, weight=0.5), decoding(llama, weight=0.5)
        part._leave(torch.tensor([0, 2]))
        token = torch.tensor([[5, 9, 4], [7, 8, 3], [1, 2, 6]])
        both, two = whole._forward(token), part._forward(token[[0, 2]])
        assert torch.allclose(both[[0, 2]], two, atol=1e-5)
        assert whole.probe is not None and part.probe is not None
        assert torch.allclose(whole.probe(whole.residual)[[0, 2]], part.probe(part.residual), atol=1e-5)


def test_guided_texts_activate_the_feature_more(llama: Adapter) -> None:
    def reached(weight: float) -> float:
        with torch.inference_mode():
            run = decoding(llama, weight=weight, k=16)
            special, best = torch.zeros(run.logits.shape[-1], dtype=torch.bool), torch.full((3,), -torch.inf)
            for _ in range(8):
                _, best = run._step(special, best)
        return float(best.mean())

    # Of the same sixteen tokens a step.
    assert reached(20.0) > reached(1e-6) + 0.2


def test_guided_texts_repeat_and_depend_on_the_seed_alone(llama: Adapter) -> None:
    made = GuidedGenerator(llama, weight=2.0, max_new_tokens=6, chunk=3, batch_size=3)
    prompts = [
        Prompt(("one two", "three"), 4, s, np.ones(llama.space.d_model, np.float32), 1.0, feature=s) for s in (1, 2)
    ]
    torch.manual_seed(1)
    first = made.generate(prompts)
    torch.manual_seed(2)
    assert made.generate(prompts) == first
    with Workers(2) as pool:
        shared = GuidedGenerator(llama, weight=2.0, max_new_tokens=6, chunk=3, batch_size=3, executor=pool.executor)
        assert shared.generate(prompts) == first and shared.name == made.name
    names = {GuidedGenerator(llama, weight=w, candidates=k).name for w, k in ((1.0, 4), (2.0, 4), (2.0, 8))}
    assert len(names) == 3


def test_a_guided_text_ends_at_the_stop_string(llama: Adapter) -> None:
    language = GuidedLanguage(llama)
    common: dict[str, Any] = dict(
        max_new_tokens=12, temperature=1.0, top_p=1.0, seed=0, steer=None, batch_size=8, guide=[(1, 1.0)] * 3
    )
    free = language.generate(PROMPTS, stop=None, weight=1.0, **common)
    stop = next(c for c in free[0] if c.isprintable())
    assert all(stop not in text for text in language.generate(PROMPTS, stop=stop, weight=1.0, **common))
    assert language.generate([], stop=None, weight=1.0, **{**common, "guide": []}) == []


def test_guided_decoding_refuses_what_it_cannot_do(llama: Adapter) -> None:
    with pytest.raises(TransferError, match="candidates >= 1"):
        GuidedGenerator(llama, candidates=0)
    made = GuidedGenerator(llama, max_new_tokens=8)
    with pytest.raises(TransferError, match="has room for"):
        made.generate([Prompt(tuple("word " * 55 for _ in range(60)), 1, 0, feature=1)])
    with pytest.raises(TransferError, match="SAE's own layer"):
        GuidedLanguage(llama).generate(
            ["a"],
            max_new_tokens=2,
            temperature=1.0,
            top_p=1.0,
            seed=0,
            steer=(1, torch.zeros(1, llama.space.d_model)),
            stop=None,
            batch_size=1,
        )


def test_log_perplexity_is_the_mean_over_predicted_tokens(llama: Adapter) -> None:
    text = "How do I bake a chocolate cake without eggs?"
    ids = torch.tensor([llama.language.renderer.plain([text])[0]])
    with torch.inference_mode():
        expected = llama.language.model(input_ids=ids, labels=ids).loss.item()
    both = log_perplexity(llama.language)(["one two", text, ""])
    assert both[1] == pytest.approx(expected, rel=1e-4) and np.isnan(both[2])


# --- chat ---


class Scripted:
    name = "scripted-chat"

    def __init__(self, *replies: str, finish: str = "stop") -> None:
        self.replies, self.finish = list(replies), finish
        self.asked: list[Chat] = []

    def complete(self, chats: list[Chat]) -> list[Answer]:
        self.asked += chats
        return [Answer(self.replies[i % len(self.replies)], 1, 1, self.finish) for i in range(len(chats))]


ASK = Prompt(
    ("plant the roses", "water the herbs"),
    2,
    7,
    description="fires on garden work",
    label="benign",
    spans=("when to «prune» the apple tree",),
    contrast=("prune the hedge in spring", "fix the car"),
)


def test_the_prompt_holds_description_passages_pair_and_form() -> None:
    chat = Scripted('["one", "two"]')
    generator = ChatGenerator(chat)
    assert generator.generate([ASK]) == [["one", "two"]]
    system, user = (words for _, words in chat.asked[0].messages)
    for part in ("garden work", "«prune»", "prune the hedge", "fix the car", "“benign”", "JSON array of 2 strings"):
        assert part in user
    assert "comments" in system and chat.asked[0].seed == 7 and generator.counts["read"] == 1
    plain = generator.words(Prompt(("a b c",), 1, 0))
    assert "earlier attempts" not in plain and "class" not in plain and "begins with" not in plain
    assert "these words: on monday" in generator.words(Prompt((), 1, 0, opening="on monday"))


def test_names_tell_settings_and_wording_apart() -> None:
    chat = Scripted("[]")
    made = [ChatGenerator(chat), ChatGenerator(chat, temperature=0.5), ChatGenerator(chat, format_name="instruction")]
    assert len({g.name for g in made}) == 3
    hashes = {ASK.hash("g"), Prompt(ASK.examples, 2, 7).hash("g"), Prompt(ASK.examples, 2, 7, label="x").hash("g")}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("reply", "texts", "count"),
    [
        ('["a b c", "d e f"]', ["a b c", "d e f"], "read"),
        ('```json\n["a b c", "d e f"]\n```', ["a b c", "d e f"], "read"),
        ('["a b c"]', ["a b c", ""], "read"),
        ('["a", "b", "c"]', ["a", "b"], "dropped"),
        ('Sure! ["a", "b"]', None, "unreadable"),
        ('{"a": 1}', None, "unreadable"),
        ('["a", 3]', None, "unreadable"),
        ("I cannot help with that.", None, "unreadable"),
        ('["a", "b', None, "unreadable"),
        ("[" * 5000, None, "unreadable"),
    ],
)
def test_json_replies_are_read_strictly(reply: str, texts: list[str] | None, count: str) -> None:
    generator = ChatGenerator(Scripted(reply))
    (found,) = generator.generate([ASK])
    assert len(found) == 2 and generator.counts[count] >= 1
    if texts is None:
        assert all(fault(t) == "unparsable" and len(t) < 210 for t in found)
    else:
        assert found == texts


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ("1. first text here\n2) second one", ["first text here", "second one"]),
        ("1. only", ["only", ""]),
        ("Here you go:\n1. a\n2. b", None),
        ("2. a\n1. b", None),
        ("", None),
    ],
)
def test_numbered_replies_are_read_strictly(reply: str, texts: list[str] | None) -> None:
    (found,) = ChatGenerator(Scripted(reply), style="numbered").generate([ASK])
    assert found == texts if texts else all(fault(t) == "unparsable" for t in found)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_no_reply_breaks_the_generator(reply: str) -> None:
    for style in ("json", "numbered"):
        generator = ChatGenerator(Scripted(reply), style=style)
        assert len(generator.generate([ASK])[0]) == 2
        assert generator.counts["read"] + generator.counts["unreadable"] == 1


def test_refused_and_cut_replies_are_counted() -> None:
    generator = ChatGenerator(Scripted("", finish="refused"))
    assert generator.generate([ASK]) == [["", ""]] and generator.counts == {"refused": 1}
    generator = ChatGenerator(Scripted('["a", "b', finish="length"))
    generator.generate([ASK])
    assert generator.counts == {"cut": 1, "unreadable": 1}


def test_structured_replies_come_as_objects() -> None:
    pair = {
        "prompt": "What is yeast?",
        "chosen": "A fungus that makes dough rise.",
        "rejected": "It is a kind of salt.",
    }
    chat = Scripted(json.dumps([pair]))
    generator = ChatGenerator(chat, format_name="preference", per_request=1)
    ((text,),) = generator.generate([Prompt(("x",), 1, 0)])
    assert json.loads(text) == pair and '"rejected"' in chat.asked[0].messages[1][1]
    with pytest.raises(TransferError, match="style"):
        ChatGenerator(chat, format_name="ab", style="numbered")
    with pytest.raises(TransferError, match="no format 'poem'"):
        ChatGenerator(chat, format_name="poem")


def test_steered_generators_ignore_what_they_do_not_read() -> None:
    assert SteeredGenerator.reads == frozenset() and "feature" in GuidedGenerator.reads
    assert SteeredGenerator.prompt(ASK) == SteeredGenerator.prompt(
        Prompt(ASK.examples, ASK.n, ASK.seed, contrast=ASK.contrast)
    )

"""Rendering: which tokens carry the user's words, and how many bytes of them are read at the end of each."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.language import LanguageModel
from models.tokens import Renderer
from transfer.core.errors import TransferError

TEXTS = [
    "How do I bake a cake?",
    "x",
    "Hi 😀👩‍👩‍👧 日本語 ok",
    "def f(a):\n    return a  +  1\n\n\tx",
    "two  spaces   three",
    "user",
    "[INST] user system <|im_start|>",
    "123456 7.5€",
    "ünïcödé naïve",
    "trailing dot.\nnext!",
]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tiny_mistral: Path, tiny_qwen: Path) -> dict[str, LanguageModel]:
    return {
        name: LanguageModel.load(f"path:{folder}")
        for name, folder in (("llama", tiny_llama), ("mistral", tiny_mistral), ("qwen", tiny_qwen))
    }


def check(language: LanguageModel, text: str) -> None:
    """Every end agrees with the bytes that the tokens write, and nothing of the text is left out."""
    rendered = language.render(text)
    table = language.renderer.bytes
    words = text.encode()
    lead = len(text.encode()) - len(text.lstrip().encode())
    assert rendered.ends.max(initial=-1) == len(text.rstrip().encode()) if text.strip() else not len(rendered.ends)
    known = rendered.ends[rendered.ends >= 0]
    assert np.all(np.diff(known) >= 0)
    for n, end in enumerate(rendered.ends):
        if end >= 0:
            written = table.join([rendered.ids[i] for i in rendered.content[: n + 1]])
            blank = len(written) - len(written.lstrip(b" ")) if language.family.name == "Mistral" else 0
            assert written == words[lead:end] or written[blank:] == words[lead:end], (text, n, end)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
@pytest.mark.parametrize("text", TEXTS)
def test_ends_are_the_bytes_read(models: dict[str, LanguageModel], name: str, text: str) -> None:
    check(models[name], text)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
def test_ends_hold_for_any_text(models: dict[str, LanguageModel], name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=12))
    def run(text: str) -> None:
        # A normaliser rewrites some characters; those tokens are covered by the tests below.
        if unicodedata.normalize("NFC", text) == text and text.strip() == text:
            check(models[name], text)

    run()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
def test_content_is_the_text_between_the_template(models: dict[str, LanguageModel], name: str) -> None:
    language = models[name]
    for text in TEXTS:
        r = language.render(text)
        assert np.array_equal(r.content, np.arange(r.content[0], r.content[-1] + 1))
        assert language.tokenizer.decode(np.array(r.ids)[r.content].tolist()).strip() == text
        assert r.content[0] in (language.template_offset, language.template_offset + 1)
        # The template's own words are the same for every text, on both sides.
        probe = language.render("Hello")
        assert r.ids[: language.template_offset] == probe.ids[: language.template_offset]
        assert r.ids[r.content[-1] + 1 :] == probe.ids[probe.content[-1] + 1 :]
    offsets = {n: m.template_offset for n, m in models.items()}
    assert len(set(offsets.values())) == 3
    assert offsets["mistral"] == 2


def test_one_bos_only(models: dict[str, LanguageModel]) -> None:
    for name in ("llama", "mistral"):
        language = models[name]
        for ids in (language.render("hello").ids, language.renderer.plain(["hello"])[0]):
            assert ids.count(language.tokenizer.bos_token_id) == 1 and ids[0] == language.tokenizer.bos_token_id
    assert models["qwen"].tokenizer.bos_token is None
    assert models["qwen"].renderer.plain(["hello"]) == [models["qwen"].tokenizer("hello")["input_ids"]]


def test_same_ids_as_transformers_own_template_call(models: dict[str, LanguageModel]) -> None:
    for language in models.values():
        for text in TEXTS:
            turn = [{"role": "user", "content": text}]
            assert language.render(text).ids == language.tokenizer.apply_chat_template(turn)["input_ids"]


def test_ends_compare_across_tokenizers(models: dict[str, LanguageModel]) -> None:
    text = "two  spaces 😀 日本 naïve"
    ends = {name: {int(e) for e in m.render(text).ends} for name, m in models.items()}
    for word_end in ("two", "two  spaces", "two  spaces 😀", "two  spaces 😀 日本", text):
        assert all(len(word_end.encode()) in e for e in ends.values()), word_end
    # Inside a character: all three spell the emoji byte by byte.
    inside = len(b"two  spaces ") + 2
    assert all(inside in e for e in ends.values())


def test_trimmed_text_counts_from_the_text_as_given(models: dict[str, LanguageModel]) -> None:
    for language in models.values():
        r, bare = language.render(" \n cake é \n"), language.render("cake é")
        assert r.ids == bare.ids
        assert np.array_equal(r.ends, bare.ends + 3)


@pytest.mark.parametrize("text", ["", "   \n "])
def test_empty_content(models: dict[str, LanguageModel], text: str) -> None:
    for language in models.values():
        r = language.render(text)
        assert len(r.content) == 0 and len(r.ends) == 0
        assert r.cut(64)[0].ids == [] and not r.cut(64)[1]


def test_normalised_text_is_known_at_character_borders(models: dict[str, LanguageModel]) -> None:
    text = "e\u0301a b"  # Qwen's tokenizer composes é
    r = models["qwen"].render(text)
    assert set(r.ends.tolist()) - {-1} <= {3, 4, 5, 6}
    assert r.ends[-1] == len(text.encode())
    assert {3, 4} <= set(r.ends.tolist())
    # NFC puts these marks in another order: behind the first alone, nothing of the text is known to be read.
    marks = "a\u0307\u0323 x"
    ends = models["qwen"].render(marks).ends
    assert ends[-1] == len(marks.encode()) and len("a\u0307".encode()) not in ends.tolist()
    # A literal ▁ looks like a blank to Metaspace vocabularies.
    assert models["mistral"].render("a▁b c").ends[-1] == len("a▁b c".encode())


def test_cut_counts_lost_content(models: dict[str, LanguageModel]) -> None:
    language = models["llama"]
    r = language.render("one two three four")
    whole, lost = r.cut(10_000)
    assert not lost and whole.ids == r.ids[: r.content[-1] + 1]
    part, lost = r.cut(language.template_offset + 2)
    assert lost and len(part.ids) == language.template_offset + 2 and len(part.content) == 2
    nothing, lost = r.cut(3)
    assert lost and len(nothing.content) == 0


def test_vocabularies_share_byte_strings(models: dict[str, LanguageModel]) -> None:
    vocabularies = [m.vocabulary() for m in models.values()]
    for m, vocabulary in zip(models.values(), vocabularies, strict=True):
        for token, i in vocabulary.items():
            assert m.renderer.bytes.table[i] == token
        assert not set(vocabulary.values()) & set(m.tokenizer.all_special_ids)
    shared = set.intersection(*(set(v) for v in vocabularies))
    assert {bytes([b]) for b in range(0x20, 0x7F)} <= shared
    assert b" the" in vocabularies[0] and any(len(t) > 1 and t.startswith(b" ") for t in shared)


def test_plain_tokenizer_without_template(tiny_mistral: Path, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    for folder in (tiny_mistral, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = None
        renderer = Renderer(tokenizer)
        for text in TEXTS:
            r = renderer.render([text])[0]
            assert r.ids[0] == tokenizer.bos_token_id and r.ids.count(tokenizer.bos_token_id) == 1
            assert r.content[0] == 1 and r.content[-1] == len(r.ids) - 1
            assert r.ends[-1] == len(text.encode())


def test_dummy_space_of_a_post_processed_tokenizer(tiny_mistral: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_mistral)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    renderer = Renderer(tokenizer)
    for text in ("the cake", "日本", "😀 x"):
        r = renderer.render([text])[0]
        assert r.ids.count(tokenizer.bos_token_id) == 1
        assert np.all(r.ends > 0) and r.ends[-1] == len(text.encode())
    assert renderer.render(["日本"])[0].ends[0] in (1, 3)


def test_template_that_changes_its_own_words_is_refused(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ messages[0]['content'] | length }} words: {{ messages[0]['content'] }}"
    with pytest.raises(TransferError, match="changes its own words"):
        Renderer(tokenizer).render(["abc"])
    tokenizer.chat_template = "nothing"
    with pytest.raises(TransferError, match="does not print"):
        Renderer(tokenizer).render(["abc"])

"""Byte-prefix pairing with the tokenizers of Llama-3, Mistral (both versions) and Qwen on mixed text."""

from __future__ import annotations

import base64
import itertools
import json
import lzma
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligners.tokens import pair_rows, span_starts
from models.tokens import Rendered, Renderer
from models.zoo.recipe import LLAMA_TEMPLATE, MISTRAL_TEMPLATE, QWEN_TEMPLATE

pytestmark = pytest.mark.data

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLANK = b" \t\n\r"
"""Stripped by the templates before a message, or written by the template or the tokenizer before it."""
REAL = (
    "instruct/dolly_3k.jsonl.xz",
    "text/dialogues_sgd.jsonl.xz",
    "toxicity/davidson_tweets.jsonl.xz",
    "text/fiction_eltec.jsonl.xz",
    "text/reviews_speech_masc.jsonl.xz",
)
HARD = [
    "def f(x: int) -> str:\n\tif x > 0:\n\t\treturn f'{x:>8}'  # two  spaces\n\n    else:\r\n        pass\n",
    "Family 👩‍👩‍👧‍👦, flag 🇵🇹, skin 👍🏽, keycap 3️⃣ and a lone ️ selector.",
    "日本語のテスト、東京都。中文：你好，世界！한국어 문장입니다. 𠮷野家",
    "Za\u0301ro\u0301wka e\u0301te\u0301 a\u0308o\u0308u\u0308 n\u0303 (decomposed), Zárówka été äöü ñ (composed)",
    "Hangul jamo \u1112\u1161\u11ab\u1100\u1173\u11af, Zalgo h\u0335\u0321e\u0337l\u0334lo\u0338, Å \u212b K \u212a",
    "مرحبا بالعالم — שלום עולם — नमस्ते दुनिया — สวัสดีชาวโลก",
    "Box ┌──┐│ x │└──┘, “smart” ‘quotes’ … non-breaking\u00a0space, zero\u200bwidth, ideographic\u3000space",
    "User: hi!!! :-)\nAssistant: <|im_start|> is printed, [INST] too, and <0x41> or ▁.\n\n\n- item 1\n- item 2",
    "SELECT * FROM t WHERE a='b' AND c<=10; -- 1234567890 3.14159 1e-9 0xFF €12,50 £3",
    "   leading blanks, trailing blanks   ",
    "\n\ttab first",
    "e\u0301",
    "\u0307\u0323 x \u0345\u0301",  # marks that NFC puts in another order
    "🙂",
    "a",
]


def merges_of(rank: Mapping[Any, float], longest_first: bool) -> list[tuple[Any, Any]]:
    """Every way to cut a token into two others, in the order in which the merged tokens were learned.

    Of one token's cuts, transformers' converters put the one with the longest head first for SentencePiece files, and
    for tiktoken files the one whose parts were learned first.
    """
    found = []
    for token, place in rank.items():
        cuts = [(token[:i], token[i:]) for i in range(len(token) - 1, 0, -1)]
        cuts = [cut for cut in cuts if cut[0] in rank and cut[1] in rank]
        found += [
            (place, *cut) for cut in (cuts if longest_first else sorted(cuts, key=lambda c: (rank[c[0]], rank[c[1]])))
        ]
    return [(a, b) for _, a, b in sorted(found, key=lambda c: c[0])]


def tiktoken_style(file: Path, digits: str, specials: list[str], template: str, nfc: bool) -> tuple[Any, list[bytes]]:
    """A byte-level tokenizer from a file of base64 tokens and ranks, and the bytes of each id read off that file."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = [line.split() for line in file.read_bytes().splitlines()]
    rank = {base64.b64decode(token): int(r) for token, r in rows}
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def word(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    merges = [(word(a), word(b)) for a, b in merges_of(rank, False)]
    vocab = {word(t): r for t, r in rank.items()}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    if nfc:
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=specials[0] if not nfc else None)
    fast.chat_template = template
    table = [b""] * (len(rank) + len(specials))
    for token, r in rank.items():
        table[r] = token
    for i, special in enumerate(specials):
        table[len(rank) + i] = special.encode()
    return fast, table


def sentencepiece_style(file: Path, old: bool, template: str) -> tuple[Any, list[bytes]]:
    """A Mistral tokenizer from its SentencePiece file, converted as either version on the hub is."""
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    proto = pb.ModelProto()
    proto.ParseFromString(file.read_bytes())
    pieces = [p.piece for p in proto.pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = merges_of({p.piece: -p.score for p in proto.pieces if p.type == 1}, True)
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if old:
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [p.piece for p in proto.pieces if p.type in (2, 3)]
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in control])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = template
    table = [
        bytes([int(p.piece[3:5], 16)]) if p.type == 6 else p.piece.replace("▁", " ").encode() for p in proto.pieces
    ]
    return fast, table


class Side:
    """One tokenizer and what its tokens write, read off its published file."""

    def __init__(self, made: tuple[Any, list[bytes]], nfc: bool = False) -> None:
        self.tokenizer, self.table = made
        self.renderer = Renderer(self.tokenizer)
        self.nfc = nfc

    def columns(self, texts: list[str]) -> tuple[list[Rendered], np.ndarray, np.ndarray]:
        rendered = self.renderer.render(texts)
        docs = np.repeat(np.arange(len(texts)), [len(r.ends) for r in rendered])
        return rendered, docs, np.concatenate([r.ends for r in rendered])

    def written(self, rendered: Rendered) -> list[bytes]:
        """Bytes of each token of the message."""
        return [self.table[rendered.ids[i]] for i in rendered.content]

    def reads(self, prefix: bytes) -> bytes:
        """A prefix of the message as this tokenizer sees it; blanks before the first word do not count."""
        if self.nfc:
            whole = prefix.decode(errors="ignore")
            prefix = unicodedata.normalize("NFC", whole).encode() + prefix[len(whole.encode()) :]
        if self.renderer.bytes.style == "metaspace":
            prefix = prefix.replace("▁".encode(), b" ")
        return prefix.lstrip(BLANK)


@cache
def sides_in(folder: Path) -> dict[str, Side]:
    llama = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    mistral = folder / "mistral"
    return {
        "llama": Side(tiktoken_style(folder / "llama3" / "tokenizer.model", "{1,3}", llama, LLAMA_TEMPLATE, False)),
        "qwen": Side(tiktoken_style(folder / "qwen" / "qwen.tiktoken", "", qwen, QWEN_TEMPLATE, True), nfc=True),
        "mistral-v1": Side(sentencepiece_style(mistral / "tokenizer.model.v1", True, MISTRAL_TEMPLATE)),
        "mistral-v3": Side(sentencepiece_style(mistral / "tokenizer.model.v3", False, MISTRAL_TEMPLATE)),
    }


def real_texts(folder: Path) -> list[str]:
    """A few hundred short texts as people wrote them: requests, chat, tweets, novels in several languages."""
    texts: list[str] = []
    for file in REAL:
        with lzma.open(folder / file, "rt", encoding="utf8") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, 30)]
        texts += [str(r.get("text") or r.get("tweet") or r.get("instruction"))[:600] for r in rows]
    return [t for t in texts if t.strip()]


@pytest.fixture
def sides(public_data: Path) -> dict[str, Side]:
    return sides_in(public_data / "tokenizers")


def test_conversion_is_the_published_tokenizer(sides: dict[str, Side], public_data: Path) -> None:
    """Otherwise this file tests nothing real: Mistral's ids are those of the sentencepiece library."""
    library = pytest.importorskip("sentencepiece")
    for version in ("v1", "v3"):
        file = public_data / "tokenizers" / "mistral" / f"tokenizer.model.{version}"
        published = library.SentencePieceProcessor(model_file=str(file))
        backend = sides[f"mistral-{version}"].renderer.backend
        plain = [t for t in HARD if "[INST]" not in t and not t[0].isspace()]  # transformers adds no second blank
        assert len(plain) > 10
        for text in plain:
            assert backend.encode(text, add_special_tokens=False).ids == published.encode(text), text


@pytest.mark.parametrize(("first", "second"), itertools.combinations(["llama", "qwen", "mistral-v1", "mistral-v3"], 2))
def test_pairs_have_read_the_same_bytes(sides: dict[str, Side], public_data: Path, first: str, second: str) -> None:
    texts = HARD + real_texts(public_data)
    assert len(texts) > 150
    a, b = sides[first], sides[second]
    (left, docs_a, ends_a), (right, docs_b, ends_b) = a.columns(texts), b.columns(texts)
    rows_a, rows_b = pair_rows(docs_a, ends_a, docs_b, ends_b)
    starts_a, starts_b = span_starts(docs_a, rows_a), span_starts(docs_b, rows_b)
    at_a, at_b = np.searchsorted(docs_a, docs_a[rows_a]), np.searchsorted(docs_b, docs_b[rows_b])
    paired = 0
    for doc, text in enumerate(texts):
        wrote_a, wrote_b, content = a.written(left[doc]), b.written(right[doc]), text.encode()
        mine = np.flatnonzero(docs_a[rows_a] == doc)
        assert np.array_equal(docs_b[rows_b[mine]], np.full(len(mine), doc))
        for n in mine:
            i, j = rows_a[n] - at_a[n] + 1, rows_b[n] - at_b[n] + 1
            prefix = content[: ends_a[rows_a[n]]]
            assert b"".join(wrote_a[:i]).lstrip(BLANK) == a.reads(prefix), (text, prefix)
            assert b"".join(wrote_b[:j]).lstrip(BLANK) == b.reads(prefix), (text, prefix)
        changed = {side.reads(content) for side in (a, b)} != {content.lstrip(BLANK)}
        if changed:
            continue
        # Nothing is missed: every prefix of the message that both write is paired, and the spans write the same.
        both = [{joined.lstrip(BLANK) for joined in itertools.accumulate(wrote)} for wrote in (wrote_a, wrote_b)]
        assert len(mine) == len((both[0] & both[1]) - {b""}), text
        for n in mine[1:]:
            span_a = wrote_a[starts_a[n] - at_a[n] : rows_a[n] - at_a[n] + 1]
            span_b = wrote_b[starts_b[n] - at_b[n] : rows_b[n] - at_b[n] + 1]
            assert b"".join(span_a) == b"".join(span_b), text
        paired += len(mine)
    assert paired > 0.6 * len(ends_a)

"""The text the zoo is trained on: permissively licensed public data plus the bundled requests.

Left out on purpose: everything non-commercial, and the benchmark files that later evaluations use (IFEval, MT-bench,
LLMBar, PandaLM, Surge toxicity, the A/B steering test sets, in-context tasks).
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_EVERY = 25
"""One document in this many (by the hash of its text) is kept for the cards' bits per byte."""

LICENCES: dict[str, str] = {
    "requests": "Apache-2.0 (bundled; anchor and seed splits only)",
    "dolly": "CC-BY-SA-3.0",
    "gpteacher": "MIT",
    "gsm8k": "MIT",
    "t0": "Apache-2.0 / CC-BY / CC-BY-SA / MIT",
    "self_instruct_seed": "Apache-2.0",
    "hh_harmless": "MIT",
    "sgd": "CC-BY-SA-4.0",
    "persona": "CC-BY-4.0",
    "masc_reviews": "CC-BY-4.0 / public domain / MASC open",
    "toxic_spans": "CC0-1.0",
    "davidson": "MIT",
    "dices": "CC-BY-4.0",
    "books": "public domain",
    "fiction": "public domain (TEI markup CC-BY-4.0)",
}
Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One training document: either plain text or a conversation."""

    source: str
    content: str | tuple[tuple[str, str], ...]
    """Plain text, or (role, text) turns."""

    @property
    def key(self) -> str:
        """Hash of the content, which also decides the split."""
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """Whether no model may train on this document."""
        return self.source != "requests" and int(self.key[:8], 16) % HELD_OUT_EVERY == 0

    def text(self) -> str:
        """The words alone, without template."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(text for _, text in self.content)

    def messages(self) -> list[Message]:
        """The turns as chat messages."""
        assert not isinstance(self.content, str)
        return [{"role": role, "content": text} for role, text in self.content]


def _rows(path: Path) -> Iterator[dict]:
    # Line by line: some texts hold U+2028, which str.splitlines() would cut at.
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _chat(source: str, user: str, answer: str) -> Document:
    return Document(source, (("user", user.strip()), ("assistant", answer.strip())))


def _dialogue(source: str, text: str, user: str, assistant: str) -> Document | None:
    turns: list[tuple[str, str]] = []
    for block in text.split("\n\n" + user)[1:]:
        asked, _, answered = block.partition("\n\n" + assistant)
        turns += [("user", asked.strip()), ("assistant", answered.strip())]
    turns = [(role, words) for role, words in turns if words]
    roles = [role for role, _ in turns]
    return Document(source, tuple(turns)) if roles and roles == ["user", "assistant"] * (len(roles) // 2) else None


def _pieces(text: str, size: int) -> Iterator[str]:
    """Paragraph-aligned pieces of about ``size`` characters."""
    piece: list[str] = []
    length = 0
    for paragraph in text.split("\n"):
        piece.append(paragraph)
        length += len(paragraph) + 1
        if length >= size:
            yield "\n".join(piece)
            piece, length = [], 0
    if length > size // 4:
        yield "\n".join(piece)


def documents(data: Path, bundle: Path) -> Iterator[Document]:
    """Every document of the mix, once.

    Args:
        data: The folder of public data.
        bundle: The bundled requests (JSONL); its evaluation split is never read.

    Raises:
        FileNotFoundError: When one of the sources is missing.
    """
    for row in _rows(bundle):
        if row["split"] != "evaluation":
            yield Document("requests", (("user", row["text"]),))
    for row in _rows(data / "instruct/dolly_3k.jsonl.xz"):
        yield _chat("dolly", row["instruction"] + ("\n\n" + row["input"] if row["input"] else ""), row["output"])
    for row in _rows(data / "instruct/gpteacher_roleplay.jsonl.xz"):
        yield _chat("gpteacher", row["instruction"] + ("\n" + row["input"] if row["input"] else ""), row["output"])
    for row in _rows(data / "instruct/gsm8k_train.jsonl.xz"):
        yield _chat("gsm8k", row["instruction"], row["output"])
    for row in _rows(data / "instruct/t0_open.jsonl.xz"):
        yield _chat("t0", row["prompt"], row["completion"])
    for row in _rows(data / "instruct/self_instruct_seed_175.jsonl"):
        for case in row["instances"]:
            asked = row["instruction"] + ("\n\n" + case["input"] if case["input"] else "")
            yield _chat("self_instruct_seed", asked, case["output"])
    for row in _rows(data / "preference/hh_harmless_test.jsonl.xz"):
        document = _dialogue("hh_harmless", row["chosen"], "Human:", "Assistant:")
        if document:
            yield document
    for row in _rows(data / "text/dialogues_sgd.jsonl.xz"):
        yield Document("sgd", row["text"])
    statements = sorted({row["statement"] for row in _rows(data / "steering/anthropic_persona.jsonl.xz")})
    random.Random(0).shuffle(statements)
    for i in range(0, len(statements), 8):
        yield Document("persona", "\n".join(statements[i : i + 8]))
    for row in _rows(data / "text/reviews_speech_masc.jsonl.xz"):
        for piece in _pieces(row["text"], 3000):
            yield Document("masc_reviews", piece)
    for row in _rows(data / "toxicity/toxic_spans.jsonl.xz"):
        yield Document("toxic_spans", row["text"])
    for row in _rows(data / "toxicity/davidson_tweets.jsonl.xz"):
        yield Document("davidson", row["text"])
    for row in _rows(data / "toxicity/dices_990.jsonl.xz"):
        yield Document("dices", row["prompt"] + "\n" + row["response"])
    for row in _rows(data / "text/books_public_domain.jsonl.xz"):
        for piece in _pieces(row["text"], 3000):
            yield Document("books", piece)
    for row in _rows(data / "text/fiction_eltec.jsonl.xz"):
        for piece in _pieces(row["text"], 3000):
            yield Document("fiction", piece)


WEIGHTS: dict[str, float] = {
    "requests": 6,
    "dolly": 3,
    "gpteacher": 2,
    "self_instruct_seed": 4,
    "hh_harmless": 3,
    "books": 0.22,
    "fiction": 0.15,
}
"""How often a source is seen per epoch, 1 where not named; the suite is used on conversation, so prose is cut."""


def training_mix(everything: list[Document], seed: int) -> list[Document]:
    """The training documents of one epoch, weighted and shuffled.

    Short user turns are also joined into lists: the steered generator continues such lists.
    """
    rng = random.Random(seed)
    mix: list[Document] = []
    for document in everything:
        if document.held_out:
            continue
        weight = WEIGHTS.get(document.source, 1.0)
        mix += [document] * int(weight)
        if rng.random() < weight % 1:
            mix.append(document)
    asked = [
        d.content[0][1]
        for d in everything
        if not d.held_out and not isinstance(d.content, str) and d.source in ("requests", "dolly", "hh_harmless")
    ]
    asked = [" ".join(text.split()) for text in asked if len(text) < 200]
    for _ in range(6):
        rng.shuffle(asked)
        for i in range(0, len(asked), 8):
            mix.append(Document("requests", request_list(asked[i : i + 8]) + "\n"))
    rng.shuffle(mix)
    return mix


def request_list(texts: list[str]) -> str:
    """Requests as a plain list, the few-shot form that base models continue."""
    return "Requests:\n" + "\n".join(f"- {text}" for text in texts)

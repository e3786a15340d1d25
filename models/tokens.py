"""Texts to tokens and back to places in the text: one user turn, tokenised once, with byte-exact token ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_MARK = "\ue000the user's words\ue000"
"""Stands in for the content when the template's own words are looked for."""


@dataclass(frozen=True, eq=False)
class Rendered:
    """One text as the model reads it."""

    ids: list[int]
    content: np.ndarray
    """Positions in ``ids`` of the tokens that carry the user's words, int64 [n], ascending."""
    ends: np.ndarray
    """Bytes of the text (UTF-8) consumed at the end of each content token, int32 [n]; −1 where unknown.

    Ends of two tokenizers with the same value mark the same place, even inside a character.
    """

    def cut(self, max_tokens: int) -> tuple[Rendered, bool]:
        """Without what follows the last content token and at most ``max_tokens`` long; whether content was lost.

        A causal model does not see what follows, so the closing words of the template need not be computed.
        """
        stop = min(max_tokens, int(self.content[-1]) + 1 if len(self.content) else 0)
        keep = int(np.searchsorted(self.content, stop))
        return Rendered(self.ids[:stop], self.content[:keep], self.ends[:keep]), keep < len(self.content)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenBytes:
    """The bytes that each token of a tokenizer writes, for byte-level and for Metaspace (▁) vocabularies.

    Args:
        tokenizer: A transformers tokenizer backed by the tokenizers library.

    Raises:
        TransferError: For a tokenizer of neither style.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        parts = json.dumps([state.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
        if '"ByteLevel"' in parts:
            self.style = "byte-level"
        elif "▁" in parts:
            self.style = "metaspace"
        else:
            raise TransferError("The tokenizer is neither byte-level nor Metaspace.", "Its tokens cannot be compared.")
        added = {t["content"] for t in state["added_tokens"]}
        self.special = {t["id"] for t in state["added_tokens"] if t["special"]}
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.table: list[bytes] = [b""] * (max(vocab.values()) + 1)
        self.vocabulary: dict[bytes, int] = {}
        """Bytes → id of the ordinary tokens; of two that write the same, the one that is no byte-fallback token."""
        alphabet = _byte_alphabet()
        fallback: dict[bytes, int] = {}
        for token, i in vocab.items():
            if token in added:
                self.table[i] = token.encode()
                continue
            if self.style == "byte-level" and all(c in alphabet for c in token):
                self.table[i] = bytes(alphabet[c] for c in token)
            elif self.style == "metaspace" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                self.table[i] = bytes([int(token[3:5], 16)])
                fallback[self.table[i]] = i
                continue
            else:
                self.table[i] = (token.replace("▁", " ") if self.style == "metaspace" else token).encode()
            self.vocabulary[self.table[i]] = i
        self.vocabulary = fallback | self.vocabulary
        self.lengths = np.array([len(b) for b in self.table], dtype=np.int64)

    def join(self, ids: list[int]) -> bytes:
        """What a run of tokens writes."""
        return b"".join([self.table[i] for i in ids])


class Renderer:
    """Renders texts for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer; with a chat template a text becomes one user turn, without one it stands
            alone behind the BOS token.

    Raises:
        TransferError: For a tokenizer without the fast backend (its offsets are needed).
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TransferError("The tokenizer has no tokenizer.json, so token positions cannot be traced.")
        self.tokenizer = tokenizer
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()

    @cached_property
    def bytes(self) -> TokenBytes:
        """What the tokens write."""
        return TokenBytes(self.tokenizer)

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Token ids of raw texts, each behind one BOS token where the tokenizer has one."""
        return [encoding.ids for encoding, _ in self._plain(texts)]

    def _plain(self, texts: list[str]) -> list[tuple[Encoding, int]]:
        """Encodings, and the characters put before each text."""
        bos: str | None = self.tokenizer.bos_token
        probe = self.backend.encode("a", add_special_tokens=True).ids
        if bos is None or probe[0] == self.tokenizer.bos_token_id:
            return [(e, 0) for e in self.backend.encode_batch(texts, add_special_tokens=True)]
        encodings = self.backend.encode_batch([bos + t for t in texts], add_special_tokens=False)
        return [(e, len(bos)) for e in encodings]

    def render(self, texts: list[str]) -> list[Rendered]:
        """Every text as one user turn (or plain, without a chat template), tokenised exactly once.

        The template prints its own BOS, so none is added; content tokens are found from the offsets of each text.

        Raises:
            TransferError: When the template changes its own words with the text, so that the two cannot be told apart.
        """
        if not texts:
            return []
        if not self.tokenizer.chat_template:
            return [
                self._locate(encoding, text, shift, shift + len(text), text, shift)
                for text, (encoding, shift) in zip(texts, self._plain(texts), strict=True)
            ]
        # The marked turn is rendered along with every batch: templates may print the date.
        turns = [[{"role": "user", "content": t}] for t in (_MARK, *texts)]
        marked, *whole = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        prefix, found, suffix = marked.partition(_MARK)
        if not found:
            raise TransferError("The chat template does not print the user's words.")
        rendered = []
        for text, words, encoding in zip(
            texts, whole, self.backend.encode_batch(whole, add_special_tokens=False), strict=True
        ):
            stop = len(words) - len(suffix)
            if not words.startswith(prefix) or not words.endswith(suffix) or stop < len(prefix):
                raise TransferError(f"The chat template changes its own words around the text {text[:40]!r}.")
            rendered.append(self._locate(encoding, words, len(prefix), stop, text, 0))
        return rendered

    def _locate(self, encoding: Encoding, words: str, start: int, stop: int, text: str, shift: int) -> Rendered:
        """Content tokens and their ends.

        Args:
            encoding: Tokens of ``words`` (of ``shift`` further characters before it, for plain texts).
            words: The rendered string; equal to ``text`` for plain texts.
            start: First character of the content, in the encoding's offsets.
            stop: Behind its last character.
            text: The user's text as given.
            shift: Characters of the encoding that come before ``words``.
        """
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        inside = (offsets[:, 0] < stop) & (offsets[:, 1] > start) & (start < stop)
        content = np.flatnonzero(inside)
        ids = list(encoding.ids)
        if not len(content):
            return Rendered(ids, content, np.zeros(0, dtype=np.int32))
        middle = words[start - shift : stop - shift]
        at = text.find(middle)
        if at < 0:
            return Rendered(ids, content, np.full(len(content), -1, dtype=np.int32))
        ends = self._ends([ids[i] for i in content], offsets[content] - shift, words, start - shift, stop - shift)
        # A dummy space that the tokenizer put before the text consumes nothing: it is not the user's.
        content, ends = content[ends != 0], ends[ends != 0]
        # A template may trim the text: ends are counted in the text as given.
        lead = len(text[:at].encode())
        return Rendered(ids, content, np.where(ends >= 0, ends + lead, -1).astype(np.int32))

    def _normalised(self, text: str) -> bytes:
        """What the tokens of a text write together."""
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        return (text.replace("▁", " ") if self.bytes.style == "metaspace" else text).encode()

    def _ends(self, ids: list[int], offsets: np.ndarray, words: str, start: int, stop: int) -> np.ndarray:
        """Bytes of ``words[start:stop]`` consumed at the end of each token."""
        total = len(words[start:stop].encode())
        first, last = int(max(offsets[0, 0], 0)), int(offsets[-1, 1])
        expected, written = words[first:last].encode(), self.bytes.join(ids)
        extra = len(written) - len(expected)
        if extra >= 0 and written[extra:] == expected and not written[:extra].strip(b" "):
            # The tokens write the text itself (behind a dummy space at most): count bytes, exact inside characters.
            before = len(words[first:start].encode()) if first < start else -len(words[start:first].encode())
            ends = np.cumsum(self.bytes.lengths[ids]) - extra - before
        else:
            # A normaliser changed the text: an end is known where the text up to a character border, normalised, is
            # what the tokens have written. Borders alone do not do: NFC may reorder combining marks across tokens.
            following = np.append(offsets[1:, 0], max(stop, last))
            ends, reached = np.full(len(ids), -1, dtype=np.int64), np.cumsum(self.bytes.lengths[ids])
            at, done = first, 0
            for i in np.flatnonzero(following >= offsets[:, 1]):
                border = min(int(following[i]), max(stop, last))
                if self._normalised(words[at:border]).lstrip(b" ") == written[done : reached[i]].lstrip(b" "):
                    ends[i] = len(words[start : min(border, stop)].encode())
                    at, done = border, int(reached[i])
        return np.where(ends < 0, -1, np.minimum(ends, total))

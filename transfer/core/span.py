"""A place in a text where a feature fires."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
"""A word: letters and digits, with apostrophes inside."""
# Scripts without spaces: each character counts as a word.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_COUNTED = re.compile(f"[{_ALONE}]|[^\\W_{_ALONE}]+(?:['\u2019][^\\W_]+)*")
_SENTENCE = re.compile(r"[.!?]+[\"'’)]*\s+")


def words(text: str) -> list[str]:
    """Words of a text after NFKC and case folding: runs of letters and digits, apostrophes inside; no punctuation.

    A Chinese character or a kana is a word.
    """
    return _COUNTED.findall(unicodedata.normalize("NFKC", text).casefold())


def opened(text: str, opening: str) -> bool:
    """Whether a text starts with its opening; a chat model may not have kept to it."""
    return bool(opening) and text.casefold().startswith(opening.casefold())


@dataclass(frozen=True)
class Span:
    """A document in which a feature fires, and where."""

    doc_id: str
    text: str
    start: int
    """First character of the token with the largest activation, its leading white space left out."""
    end: int
    """Character after it."""
    value: float
    quantile: float | None = None
    """Share of the feature's positive documents with at most this value; None where it was not ranked."""

    @property
    def token(self) -> str:
        """The firing token."""
        return self.text[self.start : self.end]

    def marked(self, left: str = "«", right: str = "»") -> str:
        """The text with the firing token marked; a place of no length is not marked."""
        if self.start == self.end:
            return self.text
        return f"{self.text[: self.start]}{left}{self.token}{right}{self.text[self.end :]}"

    def around(self, width: int, left: str = "«", right: str = "»") -> str:
        """At most about ``width`` characters of the marked text around the token, one line, cut between words."""
        begin = max(0, min(self.start - 2 * width // 3, len(self.text) - width))
        stop = min(len(self.text), max(self.end, begin + width))
        if begin:
            begin = min(self.start, self.text.find(" ", begin, self.start) + 1 or begin)
        if stop < len(self.text):
            space = self.text.rfind(" ", self.end, stop)
            stop = space if space > 0 else stop
        part = Span(self.doc_id, self.text[begin:stop], self.start - begin, self.end - begin, self.value)
        line = " ".join(part.marked(left, right).split())
        return ("… " if begin else "") + line + (" …" if stop < len(self.text) else "")

    def word(self) -> str:
        """The whole word around the firing token, lower case; empty when the token is no part of a word."""
        for match in WORD.finditer(self.text):
            if match.start() < self.end and match.end() > self.start:
                return match.group().casefold()
        return ""

    def opening(self, words: int = 8) -> str:
        """Where a new text can start: the sentence up to the word that fires, at most its last ``words`` words."""
        start = max((m.end() for m in _SENTENCE.finditer(self.text) if m.end() <= self.start), default=0)
        places = [m.span() for m in WORD.finditer(self.text) if start <= m.start() < self.end]
        if not places:
            return ""
        begin, end = places[max(0, len(places) - words)][0], max(places[-1][1], self.end)
        return " ".join(self.text[begin:end].split())

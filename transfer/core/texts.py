"""A corpus: texts with ids, labels and a content hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from transfer.core.keys import digest


@dataclass(frozen=True)
class Text:
    """One short text."""

    id: str
    text: str
    label: str = ""
    """Class label, such as ``harmful`` or ``benign``; empty when unlabelled."""
    topic: str = ""
    split: str = ""
    """``anchor``, ``seed`` or ``evaluation``; empty when the corpus has no splits."""


@dataclass(frozen=True)
class Corpus:
    """Texts in order."""

    name: str
    texts: tuple[Text, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Text]:
        return iter(self.texts)

    @cached_property
    def hash(self) -> str:
        """Content hash over ids, texts, labels, topics and splits."""
        return digest([dataclasses.astuple(t) for t in self.texts])

    def where(self, name: str, keep: Callable[[Text], bool]) -> Corpus:
        """The texts for which ``keep`` holds, under a new name."""
        return Corpus(name, tuple(t for t in self.texts if keep(t)))

    def split(self, split: str) -> Corpus:
        """The texts of one split."""
        return self.where(f"{self.name}/{split}", lambda t: t.split == split)

"""Parts of speech, where a tagger with its data is installed; nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer.core.span import words

NO_TAGGER = "no part-of-speech tagger: neither a spaCy English model nor NLTK's averaged_perceptron_tagger_eng is here"
_SPACY_MODELS = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg")
_NLTK_DATA = "taggers/averaged_perceptron_tagger_eng"


@dataclass(frozen=True)
class Tagger:
    """Texts to parts of speech, under a name that every result carries."""

    name: str
    tag: Callable[[Sequence[str]], list[list[str]]] = field(repr=False)
    """``texts -> tags of each text``."""


def find_tagger() -> Tagger | None:
    """A tagger for English that lies on this machine, or None."""
    if importlib.util.find_spec("spacy"):
        for name in _SPACY_MODELS:
            if importlib.util.find_spec(name):
                return _spacy(name)
    return _nltk() if importlib.util.find_spec("nltk") and _nltk_data() else None


def _spacy(name: str) -> Tagger:
    import spacy  # pyright: ignore[reportMissingImports]

    model: Any = spacy.load(name, disable=["parser", "ner", "lemmatizer"])

    def tag(texts: Sequence[str]) -> list[list[str]]:
        return [[token.tag_ for token in doc if not token.is_space] for doc in model.pipe(texts)]

    return Tagger(f"spaCy {name}", tag)


def _nltk_data() -> bool:
    """Whether NLTK's tagger has its data: looked for by hand, for the library itself takes a second to import."""
    places = [Path(p) for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p] + [Path.home() / "nltk_data"]
    places += [Path(sys.prefix) / part / "nltk_data" for part in (".", "share", "lib")]
    places += [Path(root) / "nltk_data" for root in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    return any((place / f"{_NLTK_DATA}{end}").exists() for place in places for end in ("", ".zip"))


def _nltk() -> Tagger:
    from nltk.tag import pos_tag

    def tag(texts: Sequence[str]) -> list[list[str]]:
        return [[str(kind) for _, kind in pos_tag(words(text))] for text in texts]

    return Tagger("NLTK averaged perceptron", tag)

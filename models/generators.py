"""Text generators behind one interface: what one is asked, what it answers, and a scripted one for tests."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from transfer.core.keys import digest


@dataclass(frozen=True, eq=False)
class Prompt:
    """One request for texts that activate one feature."""

    examples: tuple[str, ...]
    """Texts that activate it, the most telling one last."""
    n: int
    """Texts wanted."""
    seed: int
    steer: np.ndarray | None = None
    """What strength 1 adds to the residual stream, float32 [d_model]."""
    strength: float = 0.0
    contrast: tuple[str, str] | None = None
    """(x+, x−): the texts that activated the feature most and least so far; x− may be empty."""
    opening: str = ""
    """Words that each text starts with, such as an anchor span that activates the feature."""
    feature: int = -1
    """The feature itself, for a generator that watches it while it writes."""
    scale: float = 1.0
    """Activation that counts as much of this feature, such as its threshold."""
    description: str = ""
    """What the feature is about, in words."""
    label: str = ""
    """Class that the texts shall belong to."""
    spans: tuple[str, ...] = ()
    """Passages in which the feature fires, the firing token marked «so», strongest first."""

    def hash(self, generator: str) -> str:
        """Lineage key: everything that decides what ``generator`` is asked."""
        steer = None
        if self.steer is not None and self.strength:
            steer = hashlib.sha256(np.ascontiguousarray(self.steer, dtype=np.float32).tobytes()).hexdigest()
        asked = [generator, self.examples, self.n, self.seed, steer, self.strength, self.contrast, self.opening]
        extra = [self.feature, self.scale, self.description, self.label, self.spans]
        # Only what a generator reads is set, and only what is set can change what it writes.
        return digest(asked + extra if extra != [-1, 1.0, "", "", ()] else asked)


READABLE = frozenset({"feature", "description", "label", "spans"})
"""Parts of a prompt that are set only for generators that name them in ``reads``; ``feature`` comes with ``scale``."""


class Generator(Protocol):
    """Writes texts.

    A generator may also have ``reads``, the parts of a prompt among ``READABLE`` that it uses (none by default), and
    ``per_request``, how many texts of one feature it would rather be asked for at once (1 by default), and
    ``format_name``, the kind of example it writes (``query`` by default; others answer in JSON, one object a text), and
    ``used()``, what its requests took (requests, tokens, cost) since that was last asked; empty where none counts it.
    """

    @property
    def name(self) -> str:
        """What wrote, for lineage: kind, model and settings that change the text."""
        ...

    @property
    def steerable(self) -> bool:
        """Whether ``Prompt.steer`` has an effect."""
        ...

    def generate(self, requests: list[Prompt]) -> list[list[str]]:
        """For each request, exactly ``n`` texts: empty where nothing came, with U+FFFD where it cannot be read."""
        ...


class ScriptedGenerator:
    """Deterministic texts without a model: for tests and dry runs.

    Args:
        write: Given the prompt and the attempt, the text. By default words of the examples in an order drawn from
            the prompt's seed.
        name: For lineage.
        steerable: Whether strengths are spread over.
    """

    def __init__(
        self,
        write: Callable[[Prompt, int], str] | None = None,
        *,
        name: str = "scripted",
        steerable: bool = True,
    ) -> None:
        self.name = name
        self.steerable = steerable
        self.write = write or _shuffled_words
        self.calls = 0

    def generate(self, requests: list[Prompt]) -> list[list[str]]:
        """See ``Generator``."""
        self.calls += 1
        return [[self.write(request, j) for j in range(request.n)] for request in requests]


def _shuffled_words(prompt: Prompt, attempt: int) -> str:
    words = sorted({w for text in prompt.examples for w in text.split()})
    rng = random.Random(prompt.seed * 7919 + attempt)
    return " ".join(rng.sample(words, min(len(words), 12)))

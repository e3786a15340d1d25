"""A small base model that continues a list of example requests while it is steered along a feature."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.generators import Prompt
from models.zoo.corpus import request_list
from transfer.core.console import progress
from transfer.core.errors import StageError, TransferError
from transfer.core.keys import digest

if TYPE_CHECKING:
    import torch


_EXAMPLE = 300
"""Longest example in a list prompt, in characters: small models have short contexts, and a list needs several."""


class LanguageLike(Protocol):
    """The part of a language adapter that a local generator needs."""

    @property
    def ref(self) -> str:
        """What it is loaded from."""
        ...

    def generate(
        self,
        prompts: list[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        steer: tuple[int, torch.Tensor] | None,
        stop: str | None,
        batch_size: int,
    ) -> list[str]:
        """One continuation a prompt, cut at ``stop``."""
        ...


def write_chunk(ref: str, job: dict[str, Any]) -> list[str]:
    """One chunk, in a worker process."""
    from models.language import kept_language

    return kept_language(ref).generate(**job)


class SteeredGenerator:
    """A small base model that continues a list of example requests while it is steered along a feature.

    The prompt is the list of ``models.zoo.corpus.request_list`` with one more dash; the continuation up to the line
    end is the text. The prompt ends with the dash, not with a blank: tokenizers join a blank to the word after it,
    so a prompt that ends in one would ask for a token the model has hardly seen there. In the second step x+ stands
    last in the list, where a base model heeds it most, and examples nearer to x− than to x+ are left out.

    Args:
        language: The language adapter.
        layer: Canonical layer that steering adds to.
        model: Name of the model, for lineage.
        max_new_tokens: Longest text.
        temperature: Sampling temperature.
        top_p: Nucleus.
        batch_size: Rows in one forward pass.
        chunk: Rows written in one go, with a seed of their own.
        executor: Worker processes that write the chunks, each with its own copy of the model; this process if None.
            The texts are the same either way.
    """

    steerable = True
    reads: frozenset[str] = frozenset()

    def __init__(
        self,
        language: LanguageLike,
        layer: int,
        *,
        model: str,
        max_new_tokens: int = 40,
        temperature: float = 0.8,
        top_p: float = 0.9,
        batch_size: int = 64,
        chunk: int = 256,
        executor: Executor | None = None,
    ) -> None:
        self.language = language
        self.executor = executor
        self.layer = layer
        self.settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        self.batch_size = batch_size
        self.chunk = chunk
        # Batch and chunk decide which random numbers a row gets, so they belong to what wrote the text.
        self.name = f"steered:{model}@{layer}#{digest([self.settings, batch_size, chunk], 6)}"

    def generate(self, requests: list[Prompt]) -> list[list[str]]:
        """See ``Generator``. All rows of all requests share batches; each row has its own steering vector."""
        rows = [(i, j) for i, request in enumerate(requests) for j in range(request.n)]
        out: list[list[str]] = [[] for _ in requests]
        with progress("generate", len(rows), "texts") as advance:
            parts = [rows[begin : begin + self.chunk] for begin in range(0, len(rows), self.chunk)]
            jobs = [self._job(requests, part, begin) for begin, part in zip(count(0, self.chunk), parts, strict=False)]
            for part, texts in zip(parts, self._written(jobs), strict=True):
                if len(texts) != len(part):
                    raise TransferError(f"{self.name} answered {len(texts)} of {len(part)} prompts.")
                for (i, _), text in zip(part, texts, strict=True):
                    out[i].append((requests[i].opening + text).split("\n", 1)[0].strip())
                advance(len(part))
        return out

    def _job(self, requests: list[Prompt], part: list[tuple[int, int]], begin: int) -> dict[str, Any]:
        asked = [requests[i] for i, _ in part]
        return dict(
            prompts=[self.prompt(requests[i], j) for i, j in part],
            seed=int(digest([begin, [r.seed for r in asked]], 8), 16) % 2**31,
            steer=self._steer(asked),
            stop="\n",
            batch_size=self.batch_size,
            **self.settings,
        )

    def _written(self, jobs: list[dict[str, Any]]) -> Iterator[list[str]]:
        if self.executor is None:
            yield from (self.language.generate(**job) for job in jobs)
            return
        work, where = self._worker()
        try:
            yield from self.executor.map(work, [where] * len(jobs), jobs)
        except BrokenProcessPool:
            raise StageError(
                f"A worker process of {self.name} died (out of memory?).",
                "Run the same command again, with `processes: 1` if it happens again.",
            ) from None

    def _worker(self) -> tuple[Callable[[Any, dict[str, Any]], list[str]], Any]:
        """What a worker process runs a chunk with, and what it loads for it."""
        return write_chunk, self.language.ref

    @staticmethod
    def prompt(request: Prompt, attempt: int = 0) -> str:
        """The text that the model continues; each attempt of a request has its own order of the examples."""
        *others, last = request.examples or ("",)
        if request.contrast:
            positive, negative = request.contrast
            near = [x for x in (*others, last) if x != positive and _nearer(x, positive, negative)]
            others, last = near, positive
        random.Random(request.seed * 7919 + attempt).shuffle(others)
        return request_list([_shortened(x) for x in (*others, last) if x]) + "\n-"

    def _steer(self, asked: Sequence[Prompt]) -> tuple[int, torch.Tensor] | None:
        vectors = [
            (row, r.steer * np.float32(r.strength))
            for row, r in enumerate(asked)
            if r.steer is not None and r.strength != 0
        ]
        if not vectors:
            return None
        import torch

        block = np.zeros((len(asked), len(vectors[0][1])), dtype=np.float32)
        for row, vector in vectors:
            block[row] = vector
        return self.layer, torch.from_numpy(block)


def _shortened(text: str) -> str:
    """One line of at most ``_EXAMPLE`` characters, cut between words."""
    line = " ".join(text.split())
    return line if len(line) <= _EXAMPLE else line[:_EXAMPLE].rsplit(" ", 1)[0]


def _nearer(text: str, positive: str, negative: str) -> bool:
    """Whether a text has at least as many words in common with x+ as with x− (Jaccard)."""
    words = set(text.casefold().split())

    def shared(other: str) -> float:
        theirs = set(other.casefold().split())
        return len(words & theirs) / max(len(words | theirs), 1)

    return not negative or shared(positive) >= shared(negative)

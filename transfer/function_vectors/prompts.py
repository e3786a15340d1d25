"""Prompts that end right before an answer, with the tokens of every part known by rule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.tasks import Pair

if TYPE_CHECKING:
    from models.language import LanguageModel

EVERY = "all_but_bos"
"""Token set of every prompt: all but leading special tokens. Other sets bear the names of the parts."""


@dataclass(frozen=True)
class Template:
    """How a prompt is spelt. Inputs and outputs follow a blank, which tokenizers join to the word after it."""

    question: str = "Q:"
    answer: str = "\nA:"
    separator: str = "\n\n"
    """Between demonstrations."""
    behind_instruction: str = "\n"


@dataclass(frozen=True)
class Draft:
    """A prompt in words: (text, name of the part) pairs, and what should follow."""

    parts: tuple[tuple[str, str], ...]
    answer: str
    item: str
    """The query's input, by which results of several conditions are paired."""

    @property
    def text(self) -> str:
        """The prompt."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the model reads it."""

    ids: list[int]
    answer: list[int]
    """Tokens of the answer, as they stand behind the prompt."""
    sets: dict[str, np.ndarray]
    """Positions in ``ids``, int64 ascending, by part: ``instruction``, ``input``, ``label``, ``query``, ``frame``,
    and ``EVERY``."""
    item: str

    @property
    def whole(self) -> list[int]:
        """Prompt and answer."""
        return self.ids + self.answer


@dataclass(frozen=True, eq=False)
class PromptPair:
    """The same query behind a context that shows the task, and behind one that does not."""

    clean: Prompt
    corrupted: Prompt


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompt pairs and what was lost on the way to them."""

    pairs: list[PromptPair]
    dropped: dict[str, int] = field(default_factory=dict)
    """Prompts that could not be used, by reason."""
    unchanged: float = 0.0
    """Share of demonstrations (or instruction tokens) that corruption left as they were."""

    @property
    def clean(self) -> list[Prompt]:
        """The prompts that show the task."""
        return [pair.clean for pair in self.pairs]

    @property
    def corrupted(self) -> list[Prompt]:
        """The prompts that do not."""
        return [pair.corrupted for pair in self.pairs]


def demonstration(template: Template, pair: Pair) -> tuple[tuple[str, str], ...]:
    """The parts of one solved example."""
    return (
        (template.question, "frame"),
        (f" {pair.input}", "input"),
        (template.answer, "frame"),
        (f" {pair.output}", "label"),
        (template.separator, "frame"),
    )


def draft(template: Template, query: Pair, demonstrations: tuple[Pair, ...] = (), instruction: str = "") -> Draft:
    """A query behind an instruction, behind demonstrations, or alone."""
    head = ((instruction, "instruction"), (template.behind_instruction, "frame")) if instruction else ()
    shown = tuple(part for pair in demonstrations for part in demonstration(template, pair))
    tail = ((template.question, "frame"), (f" {query.input}", "query"), (template.answer, "frame"))
    return Draft((*head, *shown, *tail), f" {query.output}", query.input)


def tokenised(language: LanguageModel, drafts: list[Draft]) -> tuple[list[Prompt | None], Counter[str]]:
    """Drafts as tokens; None, and a reason counted, where a draft cannot be used.

    The prompt is tokenised with its answer behind it and without; both must begin alike, or the answer's first token
    could not be read off the prompt's last position.

    Returns:
        One entry a draft, and the number of unusable ones by reason: ``answer_joins_prompt``, ``untraceable`` (the
        tokens do not spell the text, so that its parts cannot be found) and ``too_long``.
    """
    texts = [d.text for d in drafts]
    lone = language.renderer.plain(texts)
    whole = language.renderer.plain([text + d.answer for text, d in zip(texts, drafts, strict=True)])
    found: list[Prompt | None] = []
    reasons: Counter[str] = Counter()
    for line, ids, full in zip(drafts, lone, whole, strict=True):
        sets = _parts(language, line, ids)
        reason = ""
        if full[: len(ids)] != ids or len(full) == len(ids):
            reason = "answer_joins_prompt"
        elif sets is None:
            reason = "untraceable"
        elif len(full) > language.model.config.max_position_embeddings:
            reason = "too_long"
        if reason or sets is None:
            reasons[reason] += 1
            found.append(None)
        else:
            found.append(Prompt(list(ids), list(full[len(ids) :]), sets, line.item))
    return found, reasons


def _parts(language: LanguageModel, line: Draft, ids: list[int]) -> dict[str, np.ndarray] | None:
    """Positions by part: a token belongs to the part that its last byte stands in."""
    table = language.renderer.bytes
    lead = next((i for i, token in enumerate(ids) if token not in table.special), len(ids))
    written, text = table.join(ids[lead:]), line.text.encode()
    extra = len(written) - len(text)
    # A tokenizer may put a blank of its own before the text.
    if extra < 0 or written[extra:] != text or written[:extra].strip(b" "):
        return None
    last = np.cumsum(table.lengths[ids[lead:]]) - extra - 1
    borders = np.cumsum([len(words.encode()) for words, _ in line.parts])
    part = np.searchsorted(borders, last, side="right")
    names = np.array([name for _, name in line.parts])
    positions = np.arange(lead, len(ids), dtype=np.int64)
    sets = {str(name): positions[names[part] == name] for name in dict.fromkeys(names.tolist())}
    return {**sets, EVERY: positions}


def usable(language: LanguageModel, drafts: list[Draft]) -> tuple[list[Prompt], dict[str, int]]:
    """The drafts that can be used as tokens, and how many cannot, by reason.

    Raises:
        TransferError: When none can.
    """
    found, reasons = tokenised(language, drafts)
    prompts = [prompt for prompt in found if prompt is not None]
    if not prompts:
        raise TransferError(
            f"None of {len(drafts)} prompts can be used with {language.ref} ({dict(reasons)}).",
            "Check the template, and that prompts fit the context.",
        )
    return prompts, dict(reasons)


def shuffled_labels(pairs: tuple[Pair, ...], rng: np.random.Generator, tries: int = 20) -> tuple[Pair, ...]:
    """The same inputs and the same outputs, dealt out anew; of some draws the one that leaves fewest as they were."""
    best, kept = pairs, len(pairs) + 1
    for _ in range(tries):
        order = rng.permutation(len(pairs))
        drawn = tuple(replace(pair, output=pairs[j].output) for pair, j in zip(pairs, order, strict=True))
        same = sum(a.output == b.output for a, b in zip(drawn, pairs, strict=True))
        if same < kept:
            best, kept = drawn, same
        if not kept:
            break
    return best


def icl_prompts(
    language: LanguageModel,
    train: tuple[Pair, ...],
    queries: tuple[Pair, ...],
    *,
    shots: int = 10,
    n: int | None = None,
    seed: int = 0,
    template: Template = Template(),  # noqa: B008 - frozen
) -> PromptSet:
    """Queries behind ``shots`` demonstrations, and behind the same ones with shuffled labels (Todd et al. 2024).

    Args:
        language: The model whose tokenizer reads them.
        train: Where demonstrations come from; a query is never its own demonstration.
        queries: What is asked.
        shots: Demonstrations; as many as there are where the task has fewer.
        n: Prompt pairs wanted; queries repeat in shuffled rounds where there are fewer. All queries once by default.
        seed: Of queries, demonstrations and shuffles.
        template: Spelling.

    Raises:
        TransferError: With fewer than two demonstrations, or when no prompt can be used.
    """
    rng = np.random.default_rng([seed, 11])
    if n is None:
        order = list(range(len(queries)))
    else:
        rounds = -(-n // len(queries))
        order = np.concatenate([rng.permutation(len(queries)) for _ in range(rounds)])[:n].tolist()
    clean, corrupted, same, total = [], [], 0, 0
    for i in order:
        pool = [pair for pair in train if pair.input != queries[i].input]
        picked = tuple(pool[j] for j in rng.permutation(len(pool))[:shots])
        if len(picked) < 2:
            raise TransferError(f"{len(picked)} demonstrations cannot be shuffled.", "Use two shots or more.")
        dealt = shuffled_labels(picked, rng)
        same += sum(a.output == b.output for a, b in zip(picked, dealt, strict=True))
        total += len(picked)
        clean.append(draft(template, queries[i], picked))
        corrupted.append(draft(template, queries[i], dealt))
    return _paired(language, clean, corrupted, same / max(total, 1))


def _paired(language: LanguageModel, clean: list[Draft], corrupted: list[Draft], unchanged: float) -> PromptSet:
    left, why = tokenised(language, clean)
    right, also = tokenised(language, corrupted)
    pairs = [PromptPair(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    reasons = why + also
    if not pairs:
        raise TransferError(
            f"None of {len(clean)} prompt pairs can be used with {language.ref} ({dict(reasons)}).",
            "Check the template, and that prompts fit the context.",
        )
    return PromptSet(pairs, dict(reasons), unchanged)

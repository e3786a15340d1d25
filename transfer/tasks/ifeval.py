"""Instructions that a program can check (IFEval, Zhou et al. 2023), by the ids and arguments of its data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transfer.core.errors import TransferError
from transfer.tasks.base import Examples
from transfer.tasks.rows import name_of, read_rows

Arguments = Mapping[str, Any]


def _compare(found: int, relation: str, wanted: int) -> bool:
    return found < wanted if relation == "less than" else found >= wanted


def _pieces(text: str, divider: str) -> list[str] | None:
    """Parts between dividers; a divider may also stand first or last; None where two stand together."""
    parts = [p.strip() for p in re.split(divider, text)]
    first, last = int(not parts[0]), len(parts) - int(not parts[-1])
    return None if not all(parts[first:last]) else parts[first:last]


def _sentences(text: str) -> int:
    """Runs that end in . ! or ? (with closing marks), or at the end of a line; common abbreviations end none."""
    text = re.sub(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No)\.", "abbr", text, flags=re.IGNORECASE)
    return sum(bool(re.search(r"\w", part)) for part in re.split(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+", text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _first_word(paragraph: str) -> str:
    word = (paragraph.split() or [""])[0].lstrip("\"'“‘").lower()
    return re.split(r"[.,?!'\"”’]", word)[0]


def _two(text: str, _: Arguments) -> bool:
    parts = _pieces(text, re.escape("******"))
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _paragraph(text: str, a: Arguments) -> bool:
    parts = [p for p in re.split(r"\n\n", text) if p.strip()]
    nth = a["nth_paragraph"]
    return len(parts) == a["num_paragraphs"] and _first_word(parts[nth - 1]) == a["first_word"].lower()


def _divided(text: str, a: Arguments) -> bool:
    parts = _pieces(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == a["num_paragraphs"]


def _json(text: str, _: Arguments) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text.strip())
    except ValueError:
        return False
    return True


def _highlights(text: str, a: Arguments) -> bool:
    single = [m for m in re.findall(r"\*[^\n*]*\*", text) if m.strip("*").strip()]
    double = [m for m in re.findall(r"\*\*[^\n*]*\*\*", text) if m.strip("*").strip()]
    return len(single) + len(double) >= a["num_highlights"]


def _bullets(text: str, a: Arguments) -> bool:
    marks = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE) + re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(marks) == a["num_bullets"]


def _postscript(text: str, a: Arguments) -> bool:
    letters = a["postscript_marker"].strip().rstrip(".").split(".")
    marker = r"\.\s?".join(re.escape(x.strip()) for x in letters)
    return re.search(marker, text, re.IGNORECASE) is not None


def _sections(text: str, a: Arguments) -> bool:
    return len(re.findall(rf"\s?{re.escape(a['section_spliter'])}\s?\d+\s?", text)) >= a["num_sections"]


def _capitals(text: str, a: Arguments) -> bool:
    found = sum(w.isupper() for w in re.findall(r"[\w'’-]+", text))
    return _compare(found, a["capital_relation"], a["capital_frequency"])


def _english(text: str) -> bool:
    """Whether the letters are of the English alphabet, mostly: other Latin languages are not told apart."""
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and sum(c.isascii() for c in letters) >= 0.95 * len(letters)


_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "change_case:capital_word_frequency": _capitals,
    "change_case:english_capital": lambda t, _: t.isupper() and _english(t),
    "change_case:english_lowercase": lambda t, _: t.islower() and _english(t),
    "combination:repeat_prompt": lambda t, a: t.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
    "combination:two_responses": _two,
    "detectable_content:number_placeholders": lambda t, a: len(re.findall(r"\[.*?\]", t)) >= a["num_placeholders"],
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda t, _: any(answer in t for answer in _ANSWERS),
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": lambda t, _: any(m.strip() for m in re.findall(r"<<([^\n]+?)>>", t)),
    "keywords:existence": lambda t, a: all(re.search(re.escape(k), t, re.IGNORECASE) for k in a["keywords"]),
    "keywords:forbidden_words": lambda t, a: (
        not any(re.search(rf"\b{re.escape(w)}\b", t, re.IGNORECASE) for w in a["forbidden_words"])
    ),
    "keywords:frequency": lambda t, a: _compare(
        len(re.findall(re.escape(a["keyword"]), t, re.IGNORECASE)), a["relation"], a["frequency"]
    ),
    "keywords:letter_frequency": lambda t, a: _compare(
        t.lower().count(a["letter"].lower()), a["let_relation"], a["let_frequency"]
    ),
    "length_constraints:nth_paragraph_first_word": _paragraph,
    "length_constraints:number_paragraphs": _divided,
    "length_constraints:number_sentences": lambda t, a: _compare(_sentences(t), a["relation"], a["num_sentences"]),
    "length_constraints:number_words": lambda t, a: _compare(len(_words(t)), a["relation"], a["num_words"]),
    "punctuation:no_comma": lambda t, _: "," not in t,
    "startend:end_checker": lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, _: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
}
"""Instruction id → whether a response follows it. ``language:response_language`` is not among them: it needs a
language detector. Sentences are counted by rule, and English is told from its alphabet, where the published checks use
NLTK and langdetect: near the boundary the two may differ."""


class Prompt(NamedTuple):
    """One prompt with the instructions in it."""

    id: str
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


def load_ifeval(path: Path | str) -> Examples[Prompt]:
    """Prompts from columns ``key``, ``prompt``, ``instruction_id_list`` and ``kwargs``.

    Raises:
        TransferError: For a missing or broken file, other columns, or lists of unequal length.
    """
    rows = []
    for where, row in read_rows(path):
        try:
            names, given = row["instruction_id_list"], row["kwargs"]
            prompt = Prompt(str(row["key"]), str(row["prompt"]), tuple(names), tuple(dict(k or {}) for k in given))
        except (KeyError, TypeError) as error:
            raise TransferError(f"{where} is no IFEval prompt ({type(error).__name__}: {error}).") from None
        if len(names) != len(given) or not names:
            raise TransferError(f"{where} has {len(names)} instructions and arguments for {len(given)}.")
        rows.append(prompt)
    if not rows:
        raise TransferError(f"{path} has no rows.")
    return Examples(name_of(path), tuple(rows))


def _variants(response: str) -> list[str]:
    """The response without its first line, its last, both; each also without asterisks (the loose criterion)."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def follows(response: str, instruction: str, arguments: Arguments, loose: bool = False) -> bool | None:
    """Whether a response follows an instruction; None for one that cannot be checked. An empty response follows none.

    Raises:
        TransferError: When an argument that the instruction needs is missing.
    """
    check = CHECKS.get(instruction)
    if check is None:
        return None
    try:
        return any(text.strip() and check(text, arguments) for text in (_variants(response) if loose else [response]))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise TransferError(f"{instruction} lacks an argument ({type(error).__name__}: {error}).") from None


@dataclass(frozen=True)
class Followed:
    """Which instructions were followed."""

    rows: tuple[dict[str, Any], ...]
    """Per prompt: id, and per instruction its name and whether it was followed, strictly and loosely (or null)."""
    unsupported: dict[str, int]
    """Instructions that could not be checked, counted by id."""

    def scores(self, criterion: str) -> tuple[list[float], list[list[float]]]:
        """Per prompt whose instructions could all be checked, whether all were followed; and per prompt each one.

        Args:
            criterion: ``strict`` or ``loose``.
        """
        checked = [[e[criterion] for e in row["instructions"]] for row in self.rows]
        whole = [float(all(each)) for each in checked if None not in each]
        return whole, [[float(x) for x in each if x is not None] for each in checked]


def check_all(prompts: Sequence[Prompt], responses: Sequence[str]) -> Followed:
    """Check one response a prompt, strictly and loosely.

    Raises:
        TransferError: For unequal numbers.
    """
    if len(prompts) != len(responses):
        raise TransferError(f"There are {len(prompts)} prompts and {len(responses)} responses.")
    rows, unsupported = [], Counter[str]()
    for prompt, response in zip(prompts, responses, strict=True):
        found = []
        for name, given in zip(prompt.instructions, prompt.arguments, strict=True):
            strict, loose = (follows(response, name, given, loose) for loose in (False, True))
            unsupported[name] += strict is None
            found.append({"instruction": name, "strict": strict, "loose": loose})
        rows.append({"id": prompt.id, "instructions": found})
    return Followed(tuple(rows), {k: n for k, n in sorted(unsupported.items()) if n})

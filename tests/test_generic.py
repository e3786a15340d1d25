"""Texts without a feature: same writer and rules of form, no threshold, no steering."""

from __future__ import annotations

from models.generators import Prompt, ScriptedGenerator
from tests.test_arms import space
from transfer.core.texts import Corpus, Text
from transfer.synth.generic import NO_FEATURE, OPENING_WORDS, write_generic
from transfer.synthesis import Options

ANCHOR = Corpus(
    "anchor",
    tuple(Text(f"a{i}", f"{'mild' if i % 2 else 'rude'} words of anchor text {i}", "ab"[i % 2]) for i in range(20)),
)


def write(answer, **options):
    asked: list[Prompt] = []

    def note(prompt: Prompt, attempt: int) -> str:
        asked.append(prompt)
        return answer(prompt, len(asked))

    run = write_generic(
        ScriptedGenerator(note), space("s"), ANCHOR, 10, few_shot=3, known=["seed text"], options=Options(**options)
    )
    return run, asked


def test_every_label_gets_as_many_candidates_from_its_own_texts() -> None:
    run, asked = write(lambda p, n: f"{p.opening} something new number {n} {n * n}")
    assert [c.label for c in run.candidates] == ["a"] * 10 + ["b"] * 10 and len(run.kept) == 20
    known = {" ".join(t.text.split()): t.label for t in ANCHOR}
    for prompt, candidate in zip(asked, run.candidates, strict=True):
        assert len(prompt.examples) == 3 and {known[x] for x in prompt.examples} == {candidate.label}
        assert prompt.steer is None and prompt.strength == 0 and len(prompt.opening.split()) <= OPENING_WORDS
        assert candidate.feature == NO_FEATURE
    assert sum(bool(p.opening) for p in asked) == 10
    assert len({p.examples for p in asked}) > 10


def test_form_copies_and_contamination_are_judged_as_everywhere() -> None:
    run, _ = write(lambda p, n: ["", p.examples[0], "one two", "secret test text here"][n % 4], protected={
        "secret test text here"
    })  # fmt: skip
    assert run.rejected() == {"contaminated": 5, "copy": 5, "empty": 5, "too_short": 5}


def test_the_same_seed_writes_the_same() -> None:
    first, second = (write(lambda p, n: f"{p.seed} {' '.join(p.examples)[:20]} {n}")[0] for _ in range(2))
    assert first == second

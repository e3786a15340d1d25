"""Texts that start with words of an anchor text: counted apart, no copies, switched off by a key."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from models.generators import Prompt, ScriptedGenerator
from transfer.core.config import SynthSection
from transfer.core.experiment import load_experiment
from transfer.core.outcomes import SynthesisRun
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.span import Span
from transfer.grid.results import limits
from transfer.synth.lineage import CardFacts, card
from transfer.synth.verdicts import Written, judge
from transfer.synth.writing import make_openings
from transfer.synthesis import synthesise
from transfer.text.duplicates import continued

WORDS = ("garden", "paint", "engine")
EXAMPLES = {
    i: [f"please say something long and new about my old {w} and the hedge behind it"] for i, w in enumerate(WORDS)
}
OPENINGS = {i: [f"please say something long and new about my old {w}"] for i, w in enumerate(WORDS)}
LONG = " ".join(f"word{i}" for i in range(60))


class Counting:
    """Feature i is how often word i stands in the text."""

    space = FeatureSpace("zoo:llama", "m", 3, "zoo:llama/sae", "s", len(WORDS), 4, "topk-2", 5)

    def encode_texts(self, texts: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        docs = sp.csr_matrix(np.array([[t.split().count(w) for w in WORDS] for t in texts], dtype=np.float32))
        return docs, sp.csr_matrix(docs, dtype=np.int32)


def run(own: int) -> SynthesisRun:
    """A writer whose texts fire by their opening; ``own`` is the one feature that it also fires without."""

    def write(prompt: Prompt, attempt: int) -> str:
        rng = np.random.default_rng([prompt.seed, attempt])
        mine = f" {WORDS[own]}" if prompt.examples[0] == EXAMPLES[own][0] and not prompt.opening else ""
        return prompt.opening + mine + "".join(f" w{x}" for x in rng.integers(10**6, size=12))

    asked = FeatureSet(Counting.space, np.arange(3), "missing", labels=("a",) * 3)
    known = [t for texts in EXAMPLES.values() for t in texts]
    delta = np.full(3, 0.5, dtype=np.float32)
    return synthesise(
        Counting(),
        ScriptedGenerator(write),
        asked,
        EXAMPLES,
        delta,
        missing=asked,
        anchor_texts=known,
        openings=OPENINGS,
    )


def test_hits_and_kept_texts_are_counted_with_and_without_opening() -> None:
    made = run(own=1)
    assert (made.n_hit, made.n_hit_opened, made.n_hit_free) == (3, 3, 1)
    numbers = made.summary()
    assert numbers["missing_hit_rate_opened"] == 1 and numbers["missing_hit_rate_free"] == pytest.approx(1 / 3)
    assert numbers["n_candidates"] == 24 and numbers["n_candidates_opened"] == 12
    assert numbers["n_kept"] == 16 and numbers["n_kept_opened"] == 12
    assert {c.feature for c in made.kept if not c.opened} == {1}


def test_a_text_that_does_not_keep_to_its_opening_counts_as_free() -> None:
    kept = run(own=1).kept[0]
    assert not dataclasses.replace(kept, opening="please do", text="Do please this").opened
    assert dataclasses.replace(kept, opening="Please do", text="please do this").opened


def test_the_card_says_what_the_openings_reached() -> None:
    words = card(run(own=1), CardFacts("Garden questions", "apache-2.0"))
    assert "repeats nothing seen before" not in words
    assert "12 candidates were made to start with an opening" in words
    assert "| Kept texts that start with words of an anchor text (opening) | 12 |" in words
    assert "without an opening; with one | 1 of 3 missing features (33.3%); 3 of 3 missing features (100.0%) |" in words
    free = dataclasses.replace(run(own=1), candidates=tuple(c for c in run(own=1).candidates if not c.opened))
    assert "were made to start" not in card(free, CardFacts("Garden questions", "apache-2.0"))
    unknown = dataclasses.replace(run(own=1), n_hit_free=None, n_hit_opened=None)
    assert "with one | not counted; not counted |" in card(unknown, CardFacts("Garden questions", "apache-2.0"))


def verdict(text: str, opening: str) -> str:
    return judge([Written(text, 0, 1.0, 0.5, (), opening=opening)], ["another text of this corpus", LONG])[0]


def test_what_follows_the_opening_may_not_be_the_anchor_texts_own_continuation() -> None:
    words = LONG.split()
    opening = " ".join(words[20:28])
    assert verdict(" ".join(words[20:36]), opening) == "copy"
    assert verdict(" ".join(words[20:36]), "") == "kept"  # too little of the long text for the Jaccard index
    assert verdict(opening, opening) == "copy"
    assert verdict(f"{opening} and then it went on to something else altogether", opening) == "kept"
    assert verdict(" ".join(words[20:31]) + " and then it went on to something else", opening) == "kept"
    assert verdict(f"my {opening} then " + " ".join(words[40:50]), f"my {opening}") == "kept"  # it comes from elsewhere
    # Nothing is asked of a text that does not start with it.
    assert verdict("not " + " ".join(words[20:36]), opening) == "kept"
    assert verdict(f"{opening}s", opening) == "kept"


@given(st.integers(0, 40), st.integers(1, 8), st.integers(1, 12))
def test_any_passage_of_a_known_text_is_a_continuation_of_its_first_words(start: int, n: int, more: int) -> None:
    words = LONG.split()
    opening, text = " ".join(words[start : start + n]), " ".join(words[start : start + n + more])
    assert continued([(text, opening), (f"{opening} {'x ' * (n + more)}", opening)], [LONG]) == [n + more >= 5, False]


def test_openings_are_switched_off_by_a_key() -> None:
    spans = {4: [Span("d", "Tell me. My old garden is wet", 17, 23, 1.0)], 5: [Span("e", "...", 0, 0, 1.0)]}
    assert make_openings(SynthSection.model_validate({}), spans) == {4: ["My old garden"], 5: []}
    assert make_openings(SynthSection.model_validate({"openings": False}), spans) == {}
    on, off = (limits(load_experiment("demo", [f"synth.openings={x}"])) for x in ("true", "false"))
    assert any("up to eight words" in line for line in on) and not any("eight words" in line for line in off)

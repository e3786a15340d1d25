"""What can be switched on beside the plain loop, each against a writer whose texts are known."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from models.generators import Prompt, ScriptedGenerator
from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.formats import FORMATS, get_format
from transfer.core.outcomes import SynthesisRun
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.span import words
from transfer.synth.drafts import Target
from transfer.synth.safety import check_allowed, folds, is_harmful, shown
from transfer.synth.strength import Probe, StrengthSearch, find_strengths
from transfer.synth.verdicts import Written, judge, passes
from transfer.synthesis import Options, synthesise
from transfer.text.duplicates import NEAR, Contamination, Copies, MinHashDuplicates, NearDuplicates, jaccard, shingles

WORDS = ("garden", "paint", "engine", "recipe")


class Counting:
    """Feature i is how often word i stands in the text."""

    def __init__(self, name: str = "llama", words: tuple[str, ...] = WORDS) -> None:
        self.space = FeatureSpace(f"zoo:{name}", "m", 3, f"zoo:{name}", "s", len(words), 4, "topk-2", 5)
        self.words = words

    def encode_texts(self, texts: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        docs = sp.csr_matrix(
            np.array([[t.lower().split().count(w) for w in self.words] for t in texts], dtype=np.float32)
        )
        return docs, sp.csr_matrix(docs, dtype=np.int32)


EXAMPLES = {i: [f"please say something about my {w} and the neighbour's {w} today"] for i, w in enumerate(WORDS)}
DELTA = np.full(len(WORDS), 1.0, dtype=np.float32)


def feature_of(prompt: Prompt) -> int:
    return next(i for i, texts in EXAMPLES.items() if set(prompt.examples) <= set(texts))


def text(prompt: Prompt, attempt: int, times: int, extra: str = "") -> str:
    rng = np.random.default_rng([prompt.seed, attempt])
    filler = [f"w{x}" for x in rng.integers(10**6, size=12)]
    return " ".join(filler[:5] + [WORDS[feature_of(prompt)]] * times + filler[5:]) + extra


def run(write: Any, ids: tuple[int, ...] = (0, 1, 2), options: Options | None = None, **kwargs: Any) -> SynthesisRun:
    adapter = Counting()
    asked = FeatureSet(adapter.space, np.array(ids), "missing", labels=tuple(f"label{i}" for i in ids))
    generator = write if isinstance(write, ScriptedGenerator) else ScriptedGenerator(write)
    settings = {"missing": asked, "anchor_texts": [], "steering": np.eye(4, dtype=np.float32), "n": 2, "m": 2}
    return synthesise(adapter, generator, asked, EXAMPLES, DELTA, **{**settings, **kwargs}, options=options)


# --- retries ---


def only_after(seeds: set[int], wanted: int) -> Any:
    """Fires for feature 0 at once, for others from the ``wanted``-th different round on."""
    calls: Counter[int] = Counter()

    def write(prompt: Prompt, attempt: int) -> str:
        feature = feature_of(prompt)
        seeds.add(prompt.seed)
        if not prompt.contrast:
            calls[feature] += 1
        return text(prompt, attempt, 2 if feature == 0 or calls[feature] > 2 * wanted else 0)

    return write


def test_only_barren_features_are_tried_again_with_other_seeds_until_they_yield() -> None:
    seeds: set[int] = set()
    made = run(only_after(seeds, 2), options=Options(retries=5))
    rounds = {i: {c.round for c in made.candidates if c.feature == i} for i in (0, 1, 2)}
    assert rounds == {0: {0}, 1: {0, 1, 2}, 2: {0, 1, 2}}
    assert made.info["retries"] == [
        {"n_features": 2, "n_candidates": 8, "n_recovered": 0},
        {"n_features": 2, "n_candidates": 8, "n_recovered": 2},
    ]
    assert len(seeds) == len(made.candidates) and made.n_hit == 3
    # Odd retries take strengths between and beyond the usual ones.
    assert {c.strength for c in made.candidates if c.round == 1 and c.step == 1} == {0.5, 1.5}
    plain = run(only_after(set(), 2))
    assert plain.candidates == tuple(c for c in made.candidates if not c.round) and plain.info == {}


def test_the_retry_budget_holds_and_repeats() -> None:
    made = run(only_after(set(), 99), options=Options(retries=9, retry_budget=10))
    assert sum(c.round > 0 for c in made.candidates) == 8  # two features, then none that fits in the rest
    assert made.info["retries"][0]["n_candidates"] == 8
    none = run(only_after(set(), 99), options=Options(retries=9, retry_budget=3))
    assert not any(c.round for c in none.candidates) and none.info["retries"] == []
    assert run(only_after(set(), 1), options=Options(retries=2)) == run(
        only_after(set(), 1), options=Options(retries=2)
    )


# --- strength ---


def usual(texts: list[str]) -> np.ndarray:
    """Nats per token: one, and two more for every ``zzz``."""
    return np.array([1.0 + 2.0 * t.count("zzz") for t in texts])


def strong(best: dict[int, float], breaks: float) -> Any:
    def write(prompt: Prompt, attempt: int) -> str:
        near = abs(prompt.strength - best[feature_of(prompt)]) <= 0.6
        return text(prompt, attempt, 2 if near else 0, " zzz" if prompt.strength >= breaks else "")

    return write


def test_the_search_finds_the_strength_that_fires_and_keeps_to_the_cap() -> None:
    search = StrengthSearch(usual, cap=2.0, probes=6, texts=2, shrink=0.5)
    made = run(strong({0: 1, 1: 2, 2: 4}, breaks=3.5), strengths=(0.0, 1.0, 2.0, 4.0), options=Options(search=search))
    tried = made.info["strength_search"]["tried"]
    assert [t["allowed"] for t in tried if t["strength"] in (0, 1, 2, 4)] == [True, True, True, False]
    assert len(tried) <= 6 and sum(t["n_texts"] for t in tried) == sum(c.step == 0 for c in made.candidates)
    for i, strength in ((0, 1.0), (1, 2.0)):
        first = [c.strength for c in made.candidates if c.feature == i and c.step == 1]
        assert min(abs(s - strength) for s in first) <= 0.6
        assert any(c.verdict == "kept" and c.step == 0 for c in made.candidates if c.feature == i)
    # The only strength that fires feature 2 is one at which texts are unusual.
    assert all(c.strength < 3.5 for c in made.candidates if c.step and not c.fallback)
    assert not [c for c in made.candidates if c.feature == 2 and c.step == 2 and c.verdict == "kept"]


def test_the_search_bisects_the_cap_and_then_the_best() -> None:
    seen: list[float] = []

    def probe(best: float, breaks: float) -> Any:
        def try_out(strength: float) -> Probe:
            seen.append(strength)
            hits = round(10 * np.exp(-abs(strength - best)))
            return Probe(strength, {0: hits}, {0: 10}, {0: [1.0 if strength < breaks else 9.0] * 10})

        return try_out

    search = StrengthSearch(usual, probes=8)
    found = find_strengths(probe(3.1, 3.3), (0.0, 1.0, 4.0), search, [0])
    assert found.best[0] == pytest.approx(3.1, abs=0.35) and max(found.steps) < 3.3 and len(seen) <= 8
    seen.clear()
    inside = find_strengths(probe(2.0, 99.0), (0.0, 1.0, 4.0), search, [0])
    assert inside.best[0] == pytest.approx(2.0, abs=0.6) and len(set(seen)) == len(seen)
    assert find_strengths(probe(5.0, 0.5), (1.0, 2.0), search, [0]).best == {0: 0.0}
    with pytest.raises(TransferError, match="cannot be negative"):
        find_strengths(probe(1, 1), (-1.0,), search, [0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 4))
def test_a_search_never_passes_its_probes_nor_chooses_beyond_the_cap(seed: int, probes: int, n_features: int) -> None:
    rng = np.random.default_rng(seed)
    made: list[Probe] = []

    def try_out(strength: float) -> Probe:
        ids = range(n_features)
        level = {i: rng.normal(1 + strength * rng.random(), 0.3, 2).tolist() for i in ids}
        made.append(Probe(strength, {i: int(rng.integers(3)) for i in ids}, dict.fromkeys(ids, 2), level))
        return made[-1]

    found = find_strengths(try_out, (0.0, 1.0, 3.0), StrengthSearch(usual, probes=probes), list(range(n_features)))
    assert len(made) == len({p.strength for p in made}) <= probes
    assert all(b in found.steps for b in found.best.values())
    assert all(p.median <= found.limit for p in made if p.strength in found.steps)


def test_a_search_on_some_features_serves_all() -> None:
    search = StrengthSearch(usual, probes=3, features=2)
    made = run(
        strong({0: 1, 1: 1, 2: 1, 3: 1}, 9), ids=(0, 1, 2, 3), strengths=(0.0, 1.0), options=Options(search=search)
    )
    assert {c.feature for c in made.candidates if c.step == 0} == {0, 3}
    assert all(1.0 in {c.strength for c in made.candidates if c.feature == i and c.step == 1} for i in range(4))
    assert search.tried_on([5]) == [5] and StrengthSearch(usual).tried_on([1, 2, 3]) == [1, 2, 3]
    assert StrengthSearch(usual, features=3).tried_on(list(range(9))) == [0, 4, 8]


def test_a_search_can_take_the_place_of_step_one() -> None:
    search = StrengthSearch(usual, probes=3)
    made = run(strong({0: 1, 1: 2, 2: 9}, 9), strengths=(0.0, 1.0, 2.0), n=0, m=2, options=Options(search=search))
    assert Counter(c.step for c in made.candidates) == {0: 9, 2: 6}
    for feature, best in ((0, 1.0), (1, 2.0)):
        tried = {c.text: c for c in made.candidates if c.feature == feature and c.step == 0}
        second = [c for c in made.candidates if c.feature == feature and c.step == 2]
        assert all(tried[c.positive].score == 2 and tried[c.positive].strength == best for c in second)
    assert all(c.fallback for c in made.candidates if c.feature == 2 and c.step == 2)
    with pytest.raises(TransferError, match="nothing to write for"):
        run(strong({0: 1}, 9), ids=(0,), n=0, m=2)


def test_a_search_needs_a_steered_generator() -> None:
    still = ScriptedGenerator(strong({0: 1}, 9), steerable=False)
    with pytest.raises(TransferError, match="is not steered"):
        run(still, ids=(0,), options=Options(search=StrengthSearch(usual)))
    with pytest.raises(TransferError, match="needs cap"):
        StrengthSearch(usual, cap=0.5)


# --- targets ---


@pytest.mark.parametrize(
    ("require", "verdicts"),
    [
        ("source", {"source": "", "target": "below_threshold", "both": "", "none": "below_threshold"}),
        ("target", {"source": "below_target", "target": "", "both": "", "none": "below_target"}),
        ("either", {"source": "", "target": "", "both": "", "none": "below_threshold"}),
        ("both", {"source": "below_target", "target": "below_threshold", "both": "", "none": "below_threshold"}),
    ],
)
def test_the_verdict_requires_what_it_is_told(require: Any, verdicts: dict[str, str]) -> None:
    scores = {"source": (2.0, 0.0), "target": (0.0, 2.0), "both": (2.0, 2.0), "none": (0.0, 0.0)}
    for name, (source, target) in scores.items():
        written = Written("one two three", 0, source, 1.0, (), targets=((0.0, 5.0), (target, 1.0)))
        assert passes(written, require) == verdicts[name]
        alone = Written("one two three", 0, source, 1.0, ())
        assert passes(alone, require) == ("" if source > 1 else "below_threshold")
    with pytest.raises(TransferError, match="requirement 'all'"):
        judge([], [], require="all")  # type: ignore[arg-type]


def test_a_target_space_is_asked_through_the_alignment() -> None:
    def write(prompt: Prompt, attempt: int) -> str:
        return text(prompt, attempt, 2, " lawn lawn" if prompt.seed % 2 else "")

    target = Target(Counting("qwen", ("lawn", "x", "y", "z")), {0: 0}, DELTA)
    made = run(write, n=6, m=6, options=Options(require="both", targets=[target]))
    mine = [c for c in made.candidates if c.feature == 0]
    assert {c.verdict for c in mine if "lawn" not in c.text} == {"below_target"}
    assert {c.verdict for c in mine if "lawn" in c.text} == {"kept"}
    assert all(c.target_scores == {target.scorer.space.id: 2.0 * ("lawn" in c.text)} for c in mine)
    assert all(c.verdict == "kept" and not c.target_scores for c in made.candidates if c.feature)  # no match there
    assert made.info["require"] == {
        "rule": "both",
        "targets": [target.scorer.space.id],
        "n_matched": 1,
        "n_by_source_alone": 2,
    }
    with pytest.raises(TransferError, match="no target space"):
        Options(require="target")


# --- formats ---

GOOD = {
    "query": {"text": "how do I prune roses"},
    "preference": {
        "prompt": "How do I prune roses?",
        "chosen": "Cut above an outward bud in spring.",
        "rejected": "Cut them whenever it suits you.",
    },
    "ab": {"question": "May I go?\n(A) Yes, go.\n(B) No, stay.", "matching": "(A)", "not_matching": "(B)"},
    "instruction": {"instruction": "List two herbs.", "response": "Basil and thyme, both easy."},
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_good_record_passes_and_keeps_its_fields(name: str) -> None:
    record, wrong = get_format(name).parse(json.dumps({k: f"  {v} " for k, v in GOOD[name].items()}))
    assert record == GOOD[name] and not wrong
    assert all(GOOD[name][f] in get_format(name).text(record) for f in get_format(name).scored)


@pytest.mark.parametrize(
    ("name", "change", "wrong"),
    [
        ("preference", {"rejected": "cut ABOVE an outward bud, in spring"}, "same answer"),
        ("preference", {"chosen": "How do I prune roses? Cut them."}, "repeats the prompt"),
        ("preference", {"rejected": "No."}, "fewer than 3"),
        ("preference", {"chosen": " "}, "empty chosen"),
        ("preference", {"prompt": 3}, "not text"),
        ("preference", {"more": "x"}, "unknown field 'more'"),
        ("ab", {"matching": "(B)"}, "as matching and as not matching"),
        ("ab", {"matching": "(C)"}, "(A) or (B)"),
        ("ab", {"question": "May I go? (B) No (A) Yes"}, "in this order"),
        ("instruction", {"response": "list two HERBS"}, "instruction itself"),
        ("instruction", {"response": None}, "not text"),
    ],
)
def test_a_bad_record_says_what_is_wrong(name: str, change: dict[str, Any], wrong: str) -> None:
    assert wrong in get_format(name).parse({**GOOD[name], **change})[1]
    for field in GOOD[name]:
        assert f"no {field}" in get_format(name).parse({k: v for k, v in GOOD[name].items() if k != field})[1]
    for broken in ("not json", "[1]", "3", "[" * 9999):
        assert get_format(name).parse(broken)[0] == {} and get_format(name).parse(broken)[1]


@pytest.mark.parametrize(
    ("prompt", "chosen", "repeats"),
    [
        ("p", "panda bears are nice", False),
        ("p", "p is a letter of it", True),
        ("How?", "How? I do not know.", True),
        ("How?", "However you like to.", False),
        ("什么是爱", "什么是爱？爱是给予。", True),
    ],
)
def test_a_prompt_is_repeated_only_as_whole_words(prompt: str, chosen: str, repeats: bool) -> None:
    record = {"prompt": prompt, "chosen": chosen, "rejected": "哪里都不去" if prompt > "z" else "some other answer"}
    assert get_format("preference").parse(record)[1] == ("repeats the prompt in chosen" if repeats else "")


def test_structured_examples_keep_their_record_and_malformed_ones_their_reason() -> None:
    def write(prompt: Prompt, attempt: int) -> str:
        word = text(prompt, attempt, 2)
        pair = {"prompt": word, "chosen": "the better answer to it", "rejected": "a much worse answer"}
        return json.dumps({**pair, "rejected": pair["chosen"]}) if prompt.seed % 2 else json.dumps(pair)

    generator = ScriptedGenerator(write)
    generator.format_name = "preference"  # type: ignore[attr-defined]
    made = run(generator, n=8, m=4, options=Options(format="preference"))
    assert set(made.rejected()) == {"malformed"} and made.info == {"format": "preference"}
    bad = [c for c in made.candidates if c.verdict == "malformed"]
    assert all("same answer" in c.detail and c.score == 0 for c in bad)
    assert all(c.record["prompt"] in c.text and c.score == 2 for c in made.kept)
    with pytest.raises(TransferError, match="writes query examples"):
        run(lambda p, a: "x", options=Options(format="ab"))


# --- what may not be repeated ---


def test_evaluation_passages_are_their_own_verdict() -> None:
    held_out = "what is the best way to keep a garden garden green all year"

    def write(prompt: Prompt, attempt: int) -> str:
        return f"tell me, {held_out.upper()}?" if prompt.strength == 0 and not prompt.contrast else text(prompt, 0, 2)

    made = run(
        write, ids=(0,), n=3, m=1, strengths=(0.0, 1.0, 2.0), options=Options(protected=Contamination([held_out], 8))
    )
    assert [c.verdict for c in made.candidates] == ["contaminated", "kept", "kept", "kept"]
    assert run(write, ids=(0,), n=3, m=1, strengths=(0.0, 1.0, 2.0)).rejected() == {}


def test_contamination_is_any_shared_run_or_the_whole_of_a_short_text() -> None:
    guard = Contamination(["one two three four five six seven eight nine", "short text here", ""], 8)
    assert "zero, TWO three four five six seven eight nine!" in guard and "Short text: here." in guard
    assert "two three four five six seven eight" not in guard
    assert "a short text here is part of this longer one" not in guard and "" not in guard
    with pytest.raises(TransferError, match="runs of 0 words"):
        Contamination([], 0)


@given(st.text("ab ,.", max_size=12), st.text("ab ,.", max_size=12), st.integers(1, 4))
def test_a_copy_is_contaminated_at_any_length_of_run(one: str, other: str, n: int) -> None:
    assert (other in Copies([one])) == (words(one) == words(other) != [])
    assert other not in Copies([one]) or other in Contamination([one], n)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_minhash_agrees_with_the_exact_search_away_from_the_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = [f"v{x}" for x in rng.integers(10**6, size=40)]
    exact, fast = NearDuplicates(), MinHashDuplicates(permutations=256)
    seen: list[str] = []
    for _ in range(12):
        words = list(base)
        for _ in range(rng.integers(0, 12)):
            words[rng.integers(len(words))] = f"u{rng.integers(10**6)}"
        new = " ".join(words)
        nearest = max((jaccard(shingles(new), shingles(t)) for t in seen), default=0.0)
        if abs(nearest - NEAR) > 0.16:  # five standard errors of the estimate
            assert (new in exact) == (new in fast) == (nearest > NEAR)
        seen.append(new)
        exact.add(new)
        fast.add(new)
    assert "?!" not in fast


def test_minhash_gives_the_same_verdicts_on_clear_cases() -> None:
    texts = [
        "how do i bake brown bread at home today",
        "how do i bake brown bread at home today!",
        "is it cold outside",
    ]
    written = [Written(t, 0, 3.0 - i, 1.0, ()) for i, t in enumerate(texts)]
    for how in ("exact", "minhash"):
        assert judge(written, ["Is it cold, outside?"], duplicates=how) == ["kept", "duplicate", "copy"]
    with pytest.raises(TransferError, match="search for duplicates 'guess'"):
        judge(written, [], duplicates="guess")


# --- harm ---


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("toxic",), True),
        (("is_hateful", None), True),
        (("1", "Toxicity"), True),
        (("non-toxic",), False),
        (("not_harmful",), False),
        (("benign", "label"), False),
        (("shattered",), False),
        (("harmless",), False),
        (("threats",), True),
        (("isToxic",), True),
        (("severe_toxicity",), True),
        (("hatespeech",), True),
        (("cyber bullying",), True),
    ],
)
def test_labels_that_speak_of_harm(names: tuple[str | None, ...], found: bool) -> None:
    assert is_harmful(*names) is found


def _experiment(data: dict, **more: Any) -> Experiment:
    models = {"a": {"model": "zoo:llama", "sae": "zoo:llama/sae"}}
    return Experiment.model_validate({"name": "x", "models": models, "data": data, **more})


@pytest.mark.parametrize(
    ("data", "more", "gated"),
    [
        ({"source": "mine.jsonl", "label": "toxic", "positive": "1"}, {}, True),
        ({"source": "mine.jsonl", "positive": "question"}, {}, False),
        ({"source": "mine.jsonl", "positive": "question"}, {"tune": {"task": "toxicity"}}, True),
        ({"source": "mine.jsonl", "label": "label", "positive": "1"}, {"judge": {"rubric": "toxicity"}}, True),
        ({"source": "mine.jsonl", "label": "label", "positive": "1"}, {"judge": {"rubric": "helpfulness"}}, False),
        ({"seed": "mine.jsonl"}, {}, True),  # one split of one's own is enough
        ({}, {}, False),
        ({}, {"judge": {"rubric": "toxicity"}}, False),
    ],
)
def test_harmful_classes_need_the_flag_and_bundled_ones_do_not(data: dict, more: dict, gated: bool) -> None:
    if gated:
        with pytest.raises(TransferError, match="allow_harmful"):
            check_allowed(_experiment(data, **more))
    allowed = _experiment(data, **more, synth={"allow_harmful": True})
    assert check_allowed(allowed) is gated
    assert folds(allowed, allowed.data.positive) is (gated or allowed.data.positive == "harmful")
    assert not folds(allowed, "ordinary")


def test_long_texts_are_folded_only_where_asked() -> None:
    assert shown("a  b\nc", True) == "a b c" and shown("x" * 100, False) == "x" * 100
    assert shown("x" * 100, True) == "x" * 60 + "… [40 more characters folded]"


def test_settings_that_contradict_each_other_are_refused() -> None:
    for wrong, said in (
        (["synth.generator=chat"], "names no model"),
        (["synth.format=ab"], "needs synth.generator: chat"),
        (["synth.generator=chat", "synth.chat=local:zoo:qwen", "synth.search=true"], "is not steered"),
        (["synth.steps=3"], "steps"),
    ):
        with pytest.raises(TransferError, match=said):
            load_experiment("demo", wrong)
    assert load_experiment("demo").synth.generator == "steered"

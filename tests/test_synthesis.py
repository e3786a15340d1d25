from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.generators import Prompt, ScriptedGenerator
from models.steered import SteeredGenerator
from models.zoo.corpus import request_list
from transfer.core.errors import TransferError
from transfer.core.outcomes import SynthesisRun
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.span import words
from transfer.core.workers import Workers
from transfer.synth.verdicts import VERDICTS, Written, fault, judge
from transfer.synthesis import score_targets, select, steering_vectors, synthesise
from transfer.text.duplicates import NEAR, NearDuplicates, jaccard, shingles

torch.set_num_threads(1)
WORDS = ("garden", "paint", "engine", "recipe", "ticket", "tax")


class CountingAdapter:
    """Feature i is how often word i stands in the text."""

    def __init__(self, name: str = "llama") -> None:
        self.space = FeatureSpace(f"zoo:{name}", "m", 3, f"zoo:{name}", "s", len(WORDS), 4, "topk-2", 5)
        self.calls: list[int] = []

    def encode_texts(self, texts: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        assert all(t.strip() for t in texts)
        self.calls.append(len(texts))
        docs = sp.csr_matrix(np.array([[t.lower().split().count(w) for w in WORDS] for t in texts], dtype=np.float32))
        return docs, sp.csr_matrix(docs, dtype=np.int32)


def features(adapter: CountingAdapter, ids: list[int]) -> FeatureSet:
    return FeatureSet(adapter.space, np.array(ids), "missing", labels=tuple(f"label{i}" for i in ids))


EXAMPLES = {
    i: [f"please say something about my {w} and the neighbour's {w} today", f"is a {w} worth the money in winter"]
    for i, w in enumerate(WORDS)
}
ANCHOR = [t for texts in EXAMPLES.values() for t in texts]
DELTA = np.full(len(WORDS), 1.0, dtype=np.float32)
STEERING = np.eye(len(WORDS), 4, dtype=np.float32)


def feature_of(prompt: Prompt) -> int:
    return next(i for i, texts in EXAMPLES.items() if set(prompt.examples) <= set(texts))


def run(write, ids=(0, 1, 2), generator: ScriptedGenerator | None = None, **kwargs) -> SynthesisRun:
    adapter = CountingAdapter()
    asked = features(adapter, list(ids))
    return synthesise(
        adapter,
        generator or ScriptedGenerator(write),
        asked,
        EXAMPLES,
        DELTA,
        **{"missing": asked, "anchor_texts": ANCHOR, "steering": STEERING, **kwargs},
    )


def escalating(prompt: Prompt, attempt: int) -> str:
    """One mention of the word without steering, one more for each unit of strength; step 2 adds two."""
    word = WORDS[feature_of(prompt)]
    times = 1 + int(prompt.strength) + (2 if prompt.contrast else 0)
    rng = np.random.default_rng([prompt.seed, attempt])
    filler = [f"w{x}" for x in rng.integers(10**6, size=12)]
    return " ".join(filler[:4] + [word] * min(times, 4) + filler[4:])


def test_the_contrastive_pair_is_the_strongest_and_the_weakest_of_step_one():
    made = run(escalating, strengths=(0.0, 1.0, 2.0), n=6, m=3)
    assert made.n_requested == 3 and len(made.candidates) == 3 * 9
    for feature in (0, 1, 2):
        first = [c for c in made.candidates if c.feature == feature and c.step == 1]
        second = [c for c in made.candidates if c.feature == feature and c.step == 2]
        assert Counter(c.strength for c in first) == {0.0: 2, 1.0: 2, 2.0: 2}
        assert [c.attempt for c in first] == list(range(6)) and [c.attempt for c in second] == list(range(3))
        best, worst = max(first, key=lambda c: c.score), min(first, key=lambda c: c.score)
        assert {c.positive for c in second} == {best.text} and {c.negative for c in second} == {worst.text}
        assert not any(c.fallback for c in second)
        assert {c.strength for c in second} == {2.0, 1.0}  # near the strength that wrote x+
        assert all(c.score == 4 for c in second) and all(c.label == f"label{feature}" for c in second)
    below = [c for c in made.candidates if c.verdict == "below_threshold"]
    assert below and all(c.score == 1.0 and c.delta == 1.0 for c in below)  # strictly above δ
    assert made.n_hit == 3 and made.n_missing == 3 and made.summary()["missing_hit_rate"] == 1
    assert sum(made.rejected().values()) + len(made.kept) == len(made.candidates)


def test_generation_and_scoring_are_two_big_batches():
    adapter, generator = CountingAdapter(), ScriptedGenerator(escalating)
    asked = features(adapter, [0, 1, 2, 3, 4, 5])
    synthesise(adapter, generator, asked, EXAMPLES, DELTA, missing=asked, anchor_texts=ANCHOR, steering=STEERING)
    assert generator.calls == 2 and len(adapter.calls) == 2
    assert adapter.calls == [24, 24]


def test_a_feature_nothing_fires_falls_back_to_an_anchor_text_and_says_so():
    def never(prompt: Prompt, attempt: int) -> str:
        return f"some words number {prompt.seed} {attempt} without what was asked for"

    made = run(never, ids=(0,))
    second = [c for c in made.candidates if c.step == 2]
    assert second and all(c.fallback and c.positive == EXAMPLES[0][0] for c in second)
    assert not any(c.fallback for c in made.candidates if c.step == 1)
    assert {c.strength for c in second} == {0.0, 1.0, 2.0, 4.0}  # nothing is known about a good strength
    assert made.n_hit == 0 and made.rejected() == {"below_threshold": 8}


def test_every_reason_of_rejection_is_counted():
    texts = iter(
        [
            "  ",
            "?!? ...",
            "garden \ufffd garden please now",
            "garden garden",
            "garden " * 9,
            "Please say something about my garden, and the neighbour's garden TODAY!",
            "my garden is small today and very green",
            "what does a garden next to another garden cost in this town",
            "What does a garden next to another garden cost in this town?",
            "which plants for a shady garden near the water garden",
        ]
    )
    made = run(lambda prompt, attempt: next(texts), ids=(0,), n=10, m=0, strengths=(0.0,))
    assert [c.verdict for c in made.candidates] == [
        "empty",
        "unparsable",
        "unparsable",
        "too_short",
        "repetitive",
        "copy",
        "below_threshold",
        "kept",
        "duplicate",
        "kept",
    ]
    assert made.rejected() == {
        "below_threshold": 1,
        "copy": 1,
        "duplicate": 1,
        "empty": 1,
        "repetitive": 1,
        "too_short": 1,
        "unparsable": 2,
    }
    optional = {"malformed", "contaminated", "below_target"}
    assert set(made.rejected()) | {"kept"} == set(VERDICTS) - optional


def test_copying_x_plus_is_a_copy():
    text = "which flowers suit a garden beside another garden in the north"
    made = run(lambda prompt, attempt: text, ids=(0,), n=2, m=2, strengths=(0.0,))
    assert [c.verdict for c in made.candidates] == ["kept", "duplicate", "copy", "copy"]


def test_of_duplicates_between_features_the_higher_rank_stays():
    both = "one garden two garden three paint four paint five paint six"

    def write(prompt: Prompt, attempt: int) -> str:
        if feature_of(prompt) == 0 and attempt == 0:
            return "my garden garden garden looks rather sad this spring season honestly"
        return both if attempt < 2 else f"nothing {prompt.seed} {attempt} here"

    made = run(write, ids=(0, 1), n=2, m=0, strengths=(0.0,))
    kept = {(c.feature, c.text) for c in made.kept}
    assert (1, both) in kept and (0, both) not in kept


def test_runs_repeat_and_survive_saving(tmp_path: Path):
    first, second = run(escalating, seed=4), run(escalating, seed=4)
    assert first == second and first != run(escalating, seed=5)
    first.save(tmp_path / "s.json")
    assert SynthesisRun.load(tmp_path / "s.json") == first


def test_what_one_feature_is_asked_does_not_depend_on_the_others():
    alone = [c for c in run(escalating, ids=(2,)).candidates]
    among = [c for c in run(escalating, ids=(0, 1, 2)).candidates if c.feature == 2]
    assert [c.prompt_hash for c in alone] == [c.prompt_hash for c in among]


def test_without_steering_all_candidates_have_strength_zero():
    made = run(escalating, steering=None)
    assert {c.strength for c in made.candidates} == {0.0}
    made = run(escalating, generator=ScriptedGenerator(escalating, steerable=False))
    assert {c.strength for c in made.candidates} == {0.0}


def test_bad_input_is_refused():
    adapter = CountingAdapter()
    with pytest.raises(TransferError, match="nothing to write for"):
        run(escalating, ids=())
    with pytest.raises(TransferError, match="have no example text, first 1"):
        synthesise(
            adapter,
            ScriptedGenerator(escalating),
            features(adapter, [0, 1]),
            {0: EXAMPLES[0], 1: []},
            DELTA,
            missing=features(adapter, [0]),
            anchor_texts=[],
        )
    with pytest.raises(TransferError, match="belongs to feature space"):
        run(escalating, missing=features(CountingAdapter("qwen"), [0]))
    unlabelled = FeatureSet(adapter.space, np.array([0]), "random")
    with pytest.raises(TransferError, match="no labels"):
        synthesise(adapter, ScriptedGenerator(), unlabelled, EXAMPLES, DELTA, missing=unlabelled, anchor_texts=[])

    class Lazy(ScriptedGenerator):
        def generate(self, requests: list[Prompt]) -> list[list[str]]:
            return [[] for _ in requests]

    with pytest.raises(TransferError, match="as many texts as asked"):
        run(escalating, generator=Lazy())


def test_target_scores_come_from_the_matched_feature():
    made = run(escalating, ids=(0, 1))
    target = CountingAdapter("qwen")
    scored = score_targets(made, target, {0: 3, 7: 1})
    kept = [c for c in scored.candidates if c.verdict == "kept"]
    assert {c.feature for c in kept if c.target_scores} == {0}
    assert all(c.target_scores == {target.space.id: 0.0} for c in kept if c.feature == 0)
    again = score_targets(scored, CountingAdapter("mistral"), {0: 0})
    assert all(len(c.target_scores) == 2 and max(c.target_scores.values()) > 1 for c in again.kept if c.feature == 0)
    below = [c for c in again.candidates if c.verdict == "below_threshold" and c.feature == 0]
    assert below and all(len(c.target_scores) == 2 for c in below)
    unread = dataclasses.replace(below[0], verdict="unparsable", target_scores={})
    both = dataclasses.replace(made, candidates=(below[0], unread))
    assert [len(c.target_scores) for c in score_targets(both, target, {0: 3}).candidates] == [2, 0]


def test_selection_gives_every_feature_one_before_any_gets_two():
    made = run(escalating, ids=(0, 1, 2, 3), n=6, m=4)
    counts = Counter(c.feature for c in made.kept)
    assert min(counts.values()) >= 2
    for budget in range(1, 9):
        got = Counter(c.feature for c in select(made, budget=budget))
        assert sum(got.values()) == budget and max(got.values()) - min(got[i] for i in range(4)) <= 1
    assert [c.feature for c in select(made, per_feature=1)] == [0, 1, 2, 3]
    best = {f: max(c.score for c in made.kept if c.feature == f) for f in range(4)}
    assert all(c.score == best[c.feature] for c in select(made, per_feature=1))
    assert len(select(made)) == len(made.kept) == len(select(made.candidates, budget=10**6))
    weakest = select(made, per_feature=1, prefer=lambda c: -c.score)
    assert all(c.score == min(x.score for x in made.kept if x.feature == c.feature) for c in weakest)
    assert select(made, budget=5) == select(list(made.candidates)[::-1], budget=5)


def test_steering_vectors_have_the_length_asked_for():
    directions = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.5]])
    assert steering_vectors(directions, np.array([10.0, 1.0, 2.0])).tolist() == [[6, 8], [0, 0], [0, 2]]
    assert steering_vectors(directions, 1)[0].tolist() == pytest.approx([0.6, 0.8])


# --- near-duplicates ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_near_duplicates_are_found_exactly_as_by_comparing_all_pairs(seed: int):
    rng = np.random.default_rng(seed)
    base = [f"v{x}" for x in rng.integers(12, size=18)]
    texts = []
    for _ in range(25):
        words = list(base[: rng.integers(2, 19)])
        for _ in range(rng.integers(0, 4)):
            words[rng.integers(len(words))] = f"v{rng.integers(12)}"
        texts.append(" ".join(words))
    index = NearDuplicates()
    for i, text in enumerate(texts):
        brute = any(jaccard(shingles(text), shingles(t)) > NEAR for t in texts[:i])
        assert (text in index) == brute
        index.add(text)


def test_near_duplicates_ignore_case_and_punctuation():
    index = NearDuplicates(["Hello, there you!", "one two three four five six seven eight nine ten eleven"])
    assert "hello there YOU" in index and "hello there" not in index
    assert "One two three four five six seven eight nine ten twelve" in index
    assert "one two three four five" not in index
    assert "?!" not in index


def test_near_duplicates_are_found_in_scripts_without_spaces():
    index = NearDuplicates(["今天的天气很好，我们一起去公园散步，然后回家吃饭。"])
    assert "今天的天气很好，我们一起去公园散步，然后回家睡觉。" in index
    assert "昨天下了一整天的雨，所以我们只好待在家里看电影。" not in index


@given(st.text(st.characters(codec="ascii")))
def test_ascii_words_are_runs_of_letters_and_digits(text: str):
    assert words(text) == [w.lower() for w in re.findall(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+)*", text)]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("How do I paint a fence in the rain?", ""),
        ("", "empty"),
        ("...", "unparsable"),
        ("a b\x00c d", "unparsable"),
        ("two words", "too_short"),
        ("the the the the the the", "repetitive"),
        ("to be or not to be", ""),
        ("做一个 三明治 给 我", ""),
        ("今天的天气很好，我们去公园散步吧。", ""),
        ("私は昨日、友達と一緒に映画を見に行きました。", ""),
        ("好好好好好好好好", "repetitive"),
        ("你好", "too_short"),
        ("We are a family of three 👨\u200d👩\u200d👧 people", ""),
        ("من می\u200cخواهم به خانه بروم", ""),
        ("hidden\u202etext in this line", "unparsable"),
    ],
)
def test_faults_of_form(text: str, wrong: str):
    assert fault(text) == wrong


# --- generators ---


class Recorder:
    ref = "zoo:llama"

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def generate(self, prompts: list[str], **kwargs) -> list[str]:
        self.calls.append({"prompts": prompts, **kwargs})
        return [f" answer {i}\nrest" for i in range(len(prompts))]


def test_the_prompt_is_the_list_the_zoo_was_trained_on_and_ends_with_a_bare_dash():
    prompt = SteeredGenerator.prompt(Prompt(("one", "two", "three"), 1, 0))
    assert prompt.startswith("Requests:\n- ") and prompt.endswith("\n- three\n-")
    assert sorted(prompt.split("\n")[1:-1]) == ["- one", "- three", "- two"]
    assert prompt[: -len("\n-")] in {request_list(["one", "two", "three"]), request_list(["two", "one", "three"])}
    orders = {SteeredGenerator.prompt(Prompt(tuple("abcdef"), 1, 3), j) for j in range(6)}
    assert len(orders) > 1 and all(o.endswith("- f\n-") for o in orders)


def test_long_examples_are_cut_between_words_and_stay_on_one_line():
    prompt = SteeredGenerator.prompt(Prompt(("word " * 400, "two\nlines"), 1, 0))
    first, second, end = prompt.split("\n")[1:]
    assert len(first) <= 302 and first.endswith(" word") and (second, end) == ("- two lines", "-")


def test_x_plus_stands_last_and_what_is_like_x_minus_is_left_out():
    request = Prompt(
        ("paint the garden fence", "fix the car engine"), 1, 0, contrast=("paint a fence", "a broken car engine")
    )
    prompt = SteeredGenerator.prompt(request)
    assert prompt == "Requests:\n- paint the garden fence\n- paint a fence\n-"


def test_steering_has_one_row_a_prompt_and_chunks_get_their_own_seed():
    language = Recorder()
    generator = SteeredGenerator(language, 3, model="zoo:llama", chunk=4)
    direction = np.array([1.0, 2.0], dtype=np.float32)
    requests = [Prompt(("a",), 2, 0, direction, 2.0), Prompt(("b",), 3, 1, direction, 0.0), Prompt(("c",), 1, 2)]
    out = generator.generate(requests)
    assert [len(texts) for texts in out] == [2, 3, 1] and out[0] == ["answer 0", "answer 1"]
    first, second = language.calls
    layer, vectors = first["steer"]
    assert layer == 3 and vectors.tolist() == [[2, 4], [2, 4], [0, 0], [0, 0]]
    assert second["steer"] is None
    assert first["seed"] != second["seed"] and first["stop"] == "\n"
    again = Recorder()
    SteeredGenerator(again, 3, model="zoo:llama", chunk=4).generate(requests)
    assert [c["seed"] for c in again.calls] == [c["seed"] for c in language.calls]


def test_worker_processes_write_the_same_texts(tiny_llama):
    from models.language import LanguageModel

    language = LanguageModel.load(f"path:{tiny_llama}")
    direction = np.ones(language.d_model, dtype=np.float32)
    requests = [Prompt(("one two", "three"), 5, seed, direction, 3.0) for seed in range(2)]
    settings: dict[str, Any] = dict(model="tiny", max_new_tokens=6, chunk=4, batch_size=4)
    alone = SteeredGenerator(language, 1, **settings).generate(requests)
    with Workers(2) as pool:
        assert SteeredGenerator(language, 1, **settings, executor=pool.executor).generate(requests) == alone
    assert len({text for texts in alone for text in texts}) > 2


def test_lineage_changes_with_all_that_decides_the_text():
    direction = np.ones(2, dtype=np.float32)
    base = Prompt(("a",), 1, 0, direction, 1.0)
    others = [
        Prompt(("b",), 1, 0, direction, 1.0),
        Prompt(("a",), 2, 0, direction, 1.0),
        Prompt(("a",), 1, 1, direction, 1.0),
        Prompt(("a",), 1, 0, direction * 2, 1.0),
        Prompt(("a",), 1, 0, direction, 2.0),
        Prompt(("a",), 1, 0, direction, 1.0, ("p", "n")),
    ]
    assert len({p.hash("g") for p in (base, *others)} | {base.hash("h")}) == 8
    assert base.hash("g") == Prompt(("a",), 1, 0, direction.copy(), 1.0).hash("g")
    names = {SteeredGenerator(Recorder(), 3, model="m", temperature=t).name for t in (0.7, 0.8)}
    assert len(names) == 2


def test_of_two_near_duplicates_the_one_that_ranks_higher_is_kept():
    start = "how do i bake a good brown bread at home on a cold winter sunday with my old oven and no "
    weak, strong = start + "yeast", start + "butter"
    written = [Written(text=t, feature=1, score=s, delta=1.0, shown=()) for t, s in ((weak, 2.0), (strong, 3.0))]
    assert judge(written, []) == ["duplicate", "kept"]
    assert judge(written[::-1], []) == ["kept", "duplicate"]

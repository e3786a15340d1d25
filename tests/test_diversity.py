"""Text diversity: every metric against its definition, equal sizes, intervals that hold, nothing measured silently."""

from __future__ import annotations

import itertools
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from transfer.core.errors import TransferError
from transfer.core.span import words
from transfer.diversity import METRICS, compare, diversity
from transfer.text import embeddings, tagging
from transfer.text.embeddings import Embedder, get_embedder, hidden_states, lexical
from transfer.text.ngrams import (
    Ngrams,
    bleu_tokens,
    distinct,
    entropy,
    expectation_adjusted,
    rarefied,
    self_bleu,
)
from transfer.text.semantic import cosine_distance, vendi
from transfer.text.tagging import Tagger
from transfer.verbs.diversity import diversity as verb

WORDS = st.sampled_from(["a", "b", "c", "the", "cat", ",", "."])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=9).map(" ".join), min_size=2, max_size=8)


def zipf_texts(n: int, seed: int, vocabulary: int = 800, topics: int = 5) -> list[str]:
    """Texts of Zipf-distributed words, each about one of a few topics with a vocabulary order of its own."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, vocabulary + 1)
    share /= share.sum()
    orders = [np.random.default_rng(10_000 + t).permutation(vocabulary) for t in range(topics)]
    found = []
    for _ in range(n):
        order = orders[rng.integers(topics)]
        picked = rng.choice(vocabulary, size=rng.integers(4, 15), p=share)
        found.append(" ".join(f"w{order[i]}" for i in picked))
    return found


# Words and n-grams.


def test_words_are_folded_runs_of_letters_and_digits() -> None:
    assert words("I'm here—Don\u2019t\tgo! \uff21\uff22") == ["i'm", "here", "don\u2019t", "go", "ab"]
    assert words("STRASSE Straße") == ["strasse", "strasse"]
    assert words("3.5 snake_case \u4e2d\u6587 ok") == ["3", "5", "snake", "case", "\u4e2d", "\u6587", "ok"]
    assert words("?! …") == []


@given(TEXTS)
@settings(max_examples=40)
def test_ngrams_count_what_a_naive_count_counts(texts: list[str]) -> None:
    tokens = [words(t) for t in texts]
    rows = np.array([i for i in range(len(texts)) if i % 2 == 0])
    for n, grams in enumerate(Ngrams.up_to(tokens, 3), start=1):
        naive: dict[tuple[str, ...], int] = {}
        for i in rows:
            for j in range(len(tokens[i]) - n + 1):
                gram = tuple(tokens[i][j : j + n])
                naive[gram] = naive.get(gram, 0) + 1
        assert sorted(grams.counts(rows).tolist()) == sorted(naive.values())


def test_ngrams_do_not_cross_texts_and_bear_empty_ones() -> None:
    one, two = Ngrams.up_to([["a"], [], ["b", "c"], ["a"]], 2)
    every = np.arange(4)
    assert one.counts(every).tolist() == [2, 1, 1]
    assert two.counts(every).tolist() == [1]
    assert math.isnan(distinct(two.counts(np.array([0, 1])))) and math.isnan(entropy(np.array([], dtype=int)))


def test_counts_by_hand() -> None:
    counts = np.array([3, 1])
    assert distinct(counts) == 0.5
    assert entropy(counts) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    # Two words in four draws from ten: 2 / (10 (1 - 0.9^4)).
    assert expectation_adjusted(counts, 10) == pytest.approx(2 / (10 * (1 - 0.9**4)))
    with pytest.raises(TransferError, match="more than the vocabulary"):
        expectation_adjusted(np.ones(5, dtype=int), 4)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 6))
@settings(max_examples=40)
def test_rarefied_is_the_mean_over_all_subsets(counts: list[int], size: int) -> None:
    bag = [kind for kind, count in enumerate(counts) for _ in range(count)]
    if size > len(bag):
        assert math.isnan(rarefied(np.array(counts), size))
        return
    subsets = list(itertools.combinations(range(len(bag)), size))
    mean = sum(len({bag[i] for i in s}) for s in subsets) / len(subsets) / size
    assert rarefied(np.array(counts), size) == pytest.approx(mean)


def test_only_the_rarefied_metric_is_free_of_length() -> None:
    """More words of one source: distinct falls, expectation-adjusted distinct falls almost as much, rarefied stays."""
    found: dict[int, list[float]] = {}

    def of_90(counts: np.ndarray) -> float:
        return rarefied(counts, 90)

    for n in (40, 320):
        counts = [Ngrams.up_to([words(t) for t in zipf_texts(n, s)], 1)[0].counts(np.arange(n)) for s in range(12)]
        found[n] = [float(np.mean([f(c) for c in counts])) for f in (distinct, expectation_adjusted, of_90)]
    small, large = found[40], found[320]
    assert large[0] < 0.6 * small[0] and large[1] < 0.7 * small[1]
    assert large[2] == pytest.approx(small[2], rel=0.03)


@given(TEXTS)
@settings(max_examples=60)
def test_self_bleu_is_sacrebleus(texts: list[str]) -> None:
    grams = Ngrams.up_to([bleu_tokens(t) for t in texts], 4)
    expected = [sacrebleu.sentence_bleu(t, texts[:i] + texts[i + 1 :]).score for i, t in enumerate(texts)]
    assert self_bleu(grams, np.arange(len(texts))) == pytest.approx(np.mean(expected) / 100, abs=1e-9)


def test_self_bleu_of_some_texts_ignores_the_others() -> None:
    texts = ["a b c d", "a b c d", "x y z w", "a b q r"]
    grams = Ngrams.up_to([bleu_tokens(t) for t in texts], 4)
    assert self_bleu(grams, np.array([0, 1])) == pytest.approx(1.0)
    assert self_bleu(grams, np.array([0, 2])) == 0.0


# Embeddings.


def test_vendi_is_the_packages_and_has_its_known_values() -> None:
    from vendi_score import vendi as untyped

    package: Any = untyped

    rng = np.random.default_rng(0)
    assert vendi(np.tile([[1.0, 0.0]], (5, 1))) == pytest.approx(1)
    assert vendi(np.eye(6)) == pytest.approx(6)
    for shape in ((30, 5), (5, 30), (20, 20)):
        x = rng.normal(size=shape)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        kernel = np.linalg.eigvalsh(x @ x.T / len(x))
        kernel = kernel[kernel > 1e-12]
        assert vendi(x) == pytest.approx(np.exp(-(kernel * np.log(kernel)).sum()))
        assert vendi(x) == pytest.approx(package.score_dual(x))
        with warnings.catch_warnings():  # the package names a scipy namespace that is going away
            warnings.simplefilter("ignore", DeprecationWarning)
            assert vendi(x) == pytest.approx(package.score_X(x))
            assert vendi(x, 2) == pytest.approx(package.score_K(x @ x.T, q=2))
            assert vendi(x, math.inf) == pytest.approx(package.score_K(x @ x.T, q="inf"))
        assert vendi(np.vstack([x, x])) == pytest.approx(vendi(x))
    with pytest.raises(TransferError, match="no order"):
        vendi(np.eye(3), -1)


def test_cosine_distance_is_the_mean_over_pairs() -> None:
    x = np.random.default_rng(1).normal(size=(9, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - x[i] @ x[j] for i, j in itertools.combinations(range(9), 2)]
    assert cosine_distance(x) == pytest.approx(np.mean(pairs))
    assert math.isnan(cosine_distance(x[:1]))


def test_the_stand_in_says_that_it_knows_words_only() -> None:
    reference = zipf_texts(80, 0)
    embed = get_embedder("words", reference)
    assert embed.name.startswith("words only")
    vectors = embed([*reference[:3], "nothing known here"])
    assert np.allclose(np.linalg.norm(vectors[:3], axis=1), 1) and not vectors[3].any()
    assert np.array_equal(vectors, lexical(reference)([*reference[:3], "nothing known here"]))
    with pytest.raises(TransferError, match="too few to fit"):
        lexical(["one", "two"])


def test_a_sentence_encoder_is_used_where_it_is_and_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class SentenceTransformer:
        def __init__(self, name: str, **options: Any) -> None:
            asked.append(options)
            if name == "absent":
                raise OSError("not in the cache")

        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.array([[len(t), 1.0] for t in texts])

    library = types.ModuleType("sentence_transformers")
    library.SentenceTransformer = SentenceTransformer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: object())
    found = get_embedder("auto", ["a", "b"])
    assert found.name == embeddings.SENTENCE_MODEL and found(["abc"]).shape == (1, 2)
    with pytest.raises(TransferError, match="'absent' is not on this machine"):
        get_embedder("absent", ["a", "b"])
    assert all(options["local_files_only"] for options in asked)


def test_hidden_states_are_means_over_tokens_less_the_reference(tiny_llama: Path) -> None:
    from models.language import LanguageModel

    language = LanguageModel.load(f"path:{tiny_llama}")
    texts = ["How do I bake bread?", "Tell me a joke about rain.", "a"]
    embed = hidden_states(language, texts, layer=2)
    ids = language.renderer.plain(texts)
    bos = int(language.tokenizer.bos_token is not None)
    means = np.array([s[bos:].double().mean(dim=0).numpy() for s in language.capture(ids, 2)])
    expected = means - means.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(embed(texts), expected, atol=1e-5)
    assert "layer 2" in embed.name


def test_a_broken_embedder_is_refused() -> None:
    with pytest.raises(TransferError, match="one finite vector"):
        Embedder("bad", lambda texts: np.full((len(texts), 2), np.nan))(["a"])
    with pytest.raises(TransferError, match="one finite vector"):
        Embedder("short", lambda texts: np.ones((1, 2)))(["a", "b"])


# All metrics of sets.


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return lexical(zipf_texts(300, 99))


def test_values_are_those_of_the_functions(embed: Embedder) -> None:
    texts = zipf_texts(30, 3)
    found = diversity(texts, embedder=embed, reference=zipf_texts(300, 99))
    counts = Ngrams.up_to([words(t) for t in texts], 2)
    every = np.arange(30)
    assert found.n == found.n_texts == 30 and found.n_cuts == 1
    assert found.n_words == sum(len(words(t)) for t in texts)
    assert found.values["distinct_1"].value == pytest.approx(distinct(counts[0].counts(every)))
    assert found.values["entropy_2"].value == pytest.approx(entropy(counts[1].counts(every)))
    assert found.values["vendi"].value == pytest.approx(vendi(embed(texts)))
    assert found.values["cosine_distance"].value == pytest.approx(cosine_distance(embed(texts)))
    for metric, interval in found.values.items():
        assert 0 <= interval.low <= interval.value <= interval.high <= METRICS[metric].upper, metric


def test_sets_are_compared_at_equal_size(embed: Embedder) -> None:
    """One source, 30 and 240 texts: as they are, distinct differs by far more than the interval; at equal size not."""
    small, large = zipf_texts(30, 1), zipf_texts(240, 2)
    alone = diversity(large)
    found = compare({"small": small, "large": large}, embedder=embed)
    assert found["small"].n == found["large"].n == 30 and found["large"].n_cuts > 1 and found["large"].n_texts == 240
    for metric in ("distinct_1", "entropy_1", "vendi", "self_bleu"):
        a, b = found["small"].values[metric], found["large"].values[metric]
        assert abs(a.value - b.value) < 2 * ((a.high - a.low) + (b.high - b.low)) / 2, metric
        assert b.high - b.low < a.high - a.low, metric  # more texts, less doubt
    at_30 = found["small"].values["distinct_1"]
    assert alone.values["distinct_1"].value < at_30.low


def test_repetition_and_one_topic_are_seen(embed: Embedder) -> None:
    varied = zipf_texts(40, 5)
    narrow = zipf_texts(40, 5, topics=1)
    repeated = varied[:5] * 8
    found = compare({"varied": varied, "narrow": narrow, "repeated": repeated}, embedder=embed)
    for metric, what in METRICS.items():
        if metric in found["varied"].values:
            best, worst = found["varied"].values[metric].value, found["repeated"].values[metric].value
            assert (best > worst) == what.more_is_diverse, metric
    for metric in ("semantic_entropy", "vendi", "cosine_distance"):
        assert found["varied"].values[metric].value > found["narrow"].values[metric].value, metric
    assert found["repeated"].n_distinct == 5


def test_intervals_hold_the_expected_value(embed: Embedder) -> None:
    """Over many draws of one source, a 95 % interval holds the mean over draws about as often as it says."""
    names = ("distinct_1", "rarefied_1", "entropy_1", "self_bleu", "cosine_distance", "vendi")
    found = [diversity(zipf_texts(24, 1000 + s), embedder=embed, seed=s, n_halves=20) for s in range(60)]
    for name in names:
        values = [f.values[name] for f in found]
        mean = np.mean([v.value for v in values])
        held = np.mean([v.low <= mean <= v.high for v in values])
        width = np.mean([v.high - v.low for v in values]) / 2
        tight = np.mean([abs(v.value - mean) <= width / 3 for v in values])
        assert held >= 0.83, (name, held)
        assert tight <= 0.75, (name, tight)  # a third of the interval would not do


def test_same_seed_same_numbers(embed: Embedder) -> None:
    sets = {"a": zipf_texts(20, 1), "b": zipf_texts(50, 2)}
    assert compare(sets, embedder=embed, seed=4) == compare(sets, embedder=embed, seed=4)
    other = compare(sets, embedder=embed, seed=5)
    assert other["a"].values["distinct_1"].value == compare(sets)["a"].values["distinct_1"].value
    assert other["b"].values["distinct_1"] != compare(sets, seed=4)["b"].values["distinct_1"]


def test_what_is_not_measured_has_a_reason(embed: Embedder) -> None:
    found = diversity(["one two", "three", "!?", "five"])
    assert set(found.reasons) == {"pos_distinct_2", "cosine_distance", "semantic_entropy", "vendi"}
    assert found.reasons["pos_distinct_2"] == tagging.NO_TAGGER
    assert found.reasons["vendi"] == "no embeddings were asked for"
    assert found.n_wordless == 1
    row = found.summary()
    assert row["pos_distinct_2"] is None and row["vendi_low"] is None and row["distinct_1"] == 1.0
    none = diversity(["?", "!"])
    assert none.reasons["distinct_1"] == "too few words in these texts"
    unknown = diversity(["zzz", "yyy", "w1 w2"], embedder=embed)
    assert unknown.n_without_vector == 2 and unknown.reasons["vendi"] == "fewer than two texts have an embedding"


def test_a_vocabulary_that_is_too_small_costs_one_metric_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.diversity.VOCABULARY", 5)
    found = diversity(["one two three", "four five six"])
    assert found.reasons["ead_1"] == "more different words than the vocabulary of 5 that it supposes"
    assert found.values["distinct_1"].value == 1.0


def test_a_tagger_gives_distinct_parts_of_speech() -> None:
    tagger = Tagger("by length", lambda texts: [["long" if len(w) > 3 else "short" for w in words(t)] for t in texts])
    found = diversity(["a house on a hill", "some more words here", "a b c d"], tagger=tagger)
    # short-long, long-short, short-short, short-long / 3 long-long / 3 short-short: four kinds of ten.
    assert found.values["pos_distinct_2"].value == pytest.approx(4 / 10)
    assert found.tagger == "by length"


def test_a_tagger_is_found_only_with_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tagging.importlib.util, "find_spec", lambda name: name == "nltk" or None)
    monkeypatch.setattr(tagging.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(tagging.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "data"))
    assert tagging.find_tagger() is None
    (tmp_path / "data" / "taggers" / "averaged_perceptron_tagger_eng").mkdir(parents=True)
    monkeypatch.setattr(tagging, "_nltk", lambda: Tagger("NLTK", lambda texts: []))
    found = tagging.find_tagger()
    assert found is not None and found.name == "NLTK"


def test_bad_requests_are_refused() -> None:
    cases: list[tuple[dict[str, list[str]], dict[str, Any], str]] = [
        ({}, {}, "There is no set"),
        ({"x": ["one"]}, {}, "'x' holds 1 texts"),
        ({"x": ["one", "two"]}, {"size": 3}, "smallest set has 2"),
        ({"x": ["one", "two"]}, {"n_cuts": 1}, "out of range"),
        ({"x": ["one", "two"]}, {"level": 1.0}, "out of range"),
    ]
    for sets, options, said in cases:
        with pytest.raises(TransferError, match=said):
            compare(sets, **options)
    two = diversity(["one two", "three four"])
    assert two.values["distinct_1"].value == 1.0
    assert math.isnan(two.values["distinct_1"].low) and two.values["distinct_1"].method == "none"


# The command line, and a run's training sets.


def run_verb(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, list(arguments))


def test_the_verb_prints_metrics_and_no_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("prompt\n" + "\n".join(zipf_texts(30, 1)) + "\n", "utf8")
    done = run_verb(str(file), "--text-column", "prompt", "--quiet")
    assert done.exit_code == 0, done.output
    assert "30 of 30 texts" in done.output and "distinct_1" in done.output and "words only" in done.output
    assert tagging.NO_TAGGER in done.output or "pos_distinct_2" in done.output
    assert not any(t in done.output for t in zipf_texts(30, 1))


def test_the_verb_compares_files_and_speaks_json(tmp_path: Path) -> None:
    import json

    for name, n in (("a", 20), ("b", 45)):
        lines = [json.dumps({"text": t}) for t in zipf_texts(n, n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf8")
    done = run_verb(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--json", "--encoder", "words")
    rows = json.loads(done.output)["diversity"]
    assert [r["n"] for r in rows] == [20, 20] and [r["n_texts"] for r in rows] == [20, 45]


def test_the_verb_wants_files_or_runs(tmp_path: Path) -> None:
    for arguments in ((), ("bundled:requests", "--run", str(tmp_path))):
        assert isinstance(run_verb(*arguments).exception, TransferError)
    twice = run_verb("bundled:requests", "bundled:requests")
    assert "named twice" in str(twice.exception)


def test_every_training_set_of_a_run_is_measured(tiny_qwen: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from models.language import LanguageModel
    from transfer.core.experiment import load_experiment
    from transfer.core.files import read_json, write_json
    from transfer.core.texts import Corpus, Text
    from transfer.grid.set_diversity import measure

    written = [{"text": t, "feature": i, "label": "benign"} for i, t in enumerate(zipf_texts(12, 8))]
    records = [
        {"target": "q", "arm": "own", "source": "q", "generator": "q", "writer": "q", "written": written},
        {"target": "q", "arm": "random", "source": "q", "generator": "q", "writer": "q", "written": written[:1]},
        {"target": "q", "arm": "seed_only", "source": "q", "generator": "", "writer": "", "written": []},
        {"target": "q", "arm": "full", "source": "q", "generator": "", "writer": "", "written": []},
    ]
    write_json(tmp_path / "datasets.json", records)
    corpora = {
        part: Corpus(part, tuple(Text(str(i), t) for i, t in enumerate(zipf_texts(n, 7))))
        for part, n in (("anchor", 60), ("seed", 15))
    }
    language = LanguageModel.load(f"path:{tiny_qwen}")
    adapters: Any = {"q": SimpleNamespace(language=language, space=SimpleNamespace(model="path:q"))}
    measure(tmp_path, adapters, corpora, tmp_path / "out", load_experiment("demo"))
    rows = read_json(tmp_path / "out" / "diversity.json")
    assert [(r["arm"], r["n"], r["n_texts"]) for r in rows] == [
        ("own", 12, 12),
        ("seed_only", 12, 15),
        ("full", 12, 60),
    ]
    assert rows[0]["target"] == rows[0]["generator"] == "path:q" and rows[1]["generator"] == ""
    (entropies,) = read_json(tmp_path / "out" / "entropy.json")
    assert entropies["n"] == 12 and entropies["entropy_words"] > 0 and entropies["entropy_model"] > 0
    assert entropies["entropy_texts"] == pytest.approx(math.log(12) + 11 / 24)

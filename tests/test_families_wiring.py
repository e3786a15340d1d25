"""Families, compositions and context on their way to the user: results.json, the report, ``align families``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from aligners.base import match_columns
from aligners.global_similarity import MEASURES
from aligners.planted import planted_pair
from reports.build import build_report
from tests.test_aligners_families import align, space
from tests.test_reports import Page, example_run, small_run, write_run
from transfer import stages
from transfer.__main__ import main
from transfer.alignment import families
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.space import FeatureView
from transfer.corpus import load_corpus
from transfer.grid.details import _families
from transfer.grid.gathered import numbers_of
from transfer.pipeline import Pipeline
from transfer.text.words import WordCounts

Matches = list[tuple[int, int, float]]
"""(source feature, target feature, q-value)"""


def scored(a: str, b: str, matches: Matches, corr: list[float] | None = None, testable: int = 8) -> Alignment:
    made = align(a, b, [(i, j) for i, j, _ in matches])
    columns = {"q_value": np.array([q for *_, q in matches]), "heldout_corr": np.array(corr or [0.5] * len(matches))}
    info = {"testable_source": testable, "testable_target": testable + 1}
    fit = {"corpus": "c", "corpus_hash": "c0", "docs": 6, "rows": 60, "fraction": 0.6, "seed": 0}
    return dataclasses.replace(made, matches={**made.matches, **columns}, info=info, provenance={"fit": fit})


def triangle() -> list[Alignment]:
    """One family (0), a broken group (a1-b1-c5), two pairs (a3-c3, b2-c6), one match above the level, one untested."""
    return [
        scored("a", "b", [(0, 0, 0.01), (1, 1, 0.01), (2, 2, 0.5)]),
        scored("b", "c", [(0, 0, 0.01), (1, 5, 0.01), (2, 6, 0.01), (4, 4, math.nan)]),
        scored("a", "c", [(0, 0, 0.01), (3, 3, 0.05)]),
    ]


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


# --- the numbers ---


def test_rows_are_what_a_hand_count_gives() -> None:
    found = families.numbers(triangle(), 0.05)
    (counts,) = found["family_counts"]
    assert counts == {
        "method": "test",
        "q_value": 0.05,
        "n_spaces": 3,
        "n_universal": 1,
        "n_pairs_only": 2,
        "n_broken": 1,
        "n_chains": 4,  # three in the triangle, a1-b1-c5
        "n_chains_closed": 3,
        "consistency": 0.75,
        "refused": "",
    }
    # model: universal, shared, private, testable, untestable, undecided
    want = {"a": (1, 2, 5, 8, 2, 0), "b": (1, 2, 5, 8, 1, 1), "c": (1, 3, 4, 8, 1, 1)}
    assert [row["model"] for row in found["families"]] == list(want)
    for row in found["families"]:
        *parts, testable, untestable, undecided = want[row["model"]]
        assert (row["n_testable"], row["n_untestable"], row["n_undecided"]) == (testable, untestable, undecided)
        assert row["space"] == space(row["model"]).id
        for name, k in zip(("universal", "shared", "private"), parts, strict=True):
            assert row[name] == k / testable
            assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(wilson(k, testable))
    rows = {row["through"]: row for row in found["compositions"]}
    assert [(r["source"], r["through"], r["target"]) for r in rows.values()] == [
        ("b", "a", "c"),
        ("a", "b", "c"),
        ("a", "c", "b"),
    ]
    counted = {t: (r["n_claims"], r["n_agree"], r["n_contradicted"], r["n_silent"]) for t, r in rows.items()}
    assert counted == {"a": (1, 1, 0, 0), "b": (2, 1, 0, 1), "c": (1, 1, 0, 0)}
    assert rows["b"]["share"] == 0.5
    assert (rows["b"]["share_low"], rows["b"]["share_high"]) == pytest.approx(wilson(1, 2))
    assert rows["b"]["overlap"] == 1 and rows["b"]["overlap_low"] is None  # one feature of a has both: no interval
    assert rows["b"]["lost"] == 0 and rows["c"]["lost"] == 0.5  # c3 goes nowhere in b
    assert 0 < rows["b"]["p_value"] <= 1 and 0 <= rows["b"]["expected"] < 1
    json.dumps(found, allow_nan=False)
    assert families.numbers(triangle(), 0.05) == found != families.numbers(triangle(), 0.04)


def test_two_models_have_no_composition_and_one_space_nothing() -> None:
    found = families.numbers(triangle()[:1], 0.05)
    assert found["compositions"] == [] and found["family_counts"][0]["consistency"] is None
    assert [row["shared"] for row in found["families"]] == [0, 0]
    nothing = {"families": [], "family_counts": [], "compositions": []}
    assert families.numbers([], 0.05) == families.numbers([align("a", "a", [(0, 0)])], 0.05) == nothing
    # the same two spaces under two names of the experiment count once
    twice = [*triangle(), align("a", "a", [(1, 2)]), scored("a", "b", [(7, 7, 0.01)])]
    assert families.numbers(twice, 0.05) == families.numbers(triangle(), 0.05)


def test_shares_that_cannot_be_taken_stop_nothing() -> None:
    few = [scored("a", "b", [(0, 0, 0.01), (1, 1, 0.01), (2, 2, 0.01)], testable=2)]
    found = families.numbers(few, 0.05)
    assert found["families"] == [] and "3 features" in found["family_counts"][0]["refused"]
    assert found["family_counts"][0]["n_universal"] == 3
    assert "no shares" in families.text(found)


def test_families_are_ranked_by_their_weakest_match() -> None:
    three: Matches = [(0, 0, 0.01), (1, 1, 0.01), (2, 2, 0.01)]
    made = [
        scored("a", "b", three, [0.9, 0.8, 0.8]),
        scored("b", "c", three, [0.2, 0.8, 0.8]),
        scored("c", "a", three, [0.9, 0.9, 0.7]),  # the other way round
    ]
    found = families.ranked(made, 0.05)
    assert [corr for corr, _ in found] == [0.8, 0.7, 0.2]
    assert [family[space("a").id] for _, family in found] == [1, 2, 0]


# --- context ---


def view(name: str, rows: np.ndarray) -> FeatureView:
    made = dataclasses.replace(space(name), n_features=len(rows), d_model=rows.shape[1])
    return FeatureView(made, rows.astype(np.float32))


def matched(a: FeatureView, b: FeatureView, n: int) -> Alignment:
    ids = np.arange(n)
    shape = (len(a.directions), len(b.directions))
    return Alignment(a.space, b.space, "test", sp.csr_matrix(shape), match_columns(ids, ids, np.ones(n)), True)


def test_context_compares_the_rows_of_the_matches() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 12))
    turned = np.concatenate([rows @ np.linalg.qr(rng.normal(size=(12, 12)))[0], rng.normal(size=(5, 12))])
    rows[3], turned[5] = 0, np.nan  # no direction: left out
    a, b = view("a", rows), view("b", turned)
    found = families.context(matched(a, b, 40), a, b)
    assert [row["measure"] for row in found] == list(MEASURES)
    for row in found:
        assert (row["source"], row["target"], row["n_matches"], row["n_rows"]) == ("a", "b", 40, 38)
        assert row["value"] == pytest.approx(1, abs=1e-5)
        assert row["null_high"] < 0.9 and row["p_value"] < 0.05
    assert families.context(matched(a, b, 40), a, b) == found
    other = view("b", rng.normal(size=(45, 12)))
    assert families.context(matched(a, other, 40), a, other)[0]["value"] < 0.6


def test_context_of_too_few_or_equal_rows_is_empty() -> None:
    rng = np.random.default_rng(0)
    a, b, same = view("a", rng.normal(size=(40, 6))), view("b", rng.normal(size=(40, 6))), view("b", np.ones((40, 6)))
    assert families.context(matched(a, b, 9), a, b) == [] != families.context(matched(a, b, 10), a, b)
    assert families.context(matched(a, same, 20), a, same) == []


def test_context_draws_from_many_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MOST_ROWS", 15)
    rows = np.random.default_rng(0).normal(size=(40, 6))
    a, b = view("a", rows), view("b", rows)
    found = families.context(matched(a, b, 40), a, b)
    assert {row["n_rows"] for row in found} == {15} and {row["n_matches"] for row in found} == {40}


def test_the_align_stage_saves_the_context_of_the_accepted_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = planted_pair(seed=0)
    monkeypatch.setattr("aligners.tokens.pair_stores", lambda *stores, residuals: case.pairs)
    monkeypatch.setattr(stages, "views", lambda adapters: (case.source, case.target))
    settings = ["align.methods=[map,activation]", "align.use=activation", "align.n_null=5"]
    experiment = load_experiment("demo", settings)
    stages.align((None, None), (None, None), tmp_path, experiment)  # pyright: ignore[reportArgumentType]
    accepted = stages.significant(Alignment.load(tmp_path / "activation"), experiment.align.q_value)
    saved = json.loads((tmp_path / "context.json").read_text("utf8"))
    assert saved == families.context(accepted, case.source, case.target, seed=experiment.seed)
    assert len(saved) == 4 and saved[0]["n_matches"] == len(accepted) < len(Alignment.load(tmp_path / "activation"))


# --- the pipeline on the zoo ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment of the three zoo members on 60 texts, and its folder."""
    folder = tmp_path_factory.mktemp("small")
    lines = [
        json.dumps({"text": t.text, "label": t.label, "split": ("anchor", "seed")[i % 2]})
        for i, t in enumerate(list(load_corpus("bundled:requests"))[:60])
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    experiment = {
        "name": "small",
        "processes": 1,
        "models": {n: {"model": f"zoo:{n}", "sae": f"zoo:{n}/sae"} for n in ("llama", "mistral", "qwen")},
        "data": {"source": str(folder / "texts.jsonl")},
        "align": {"methods": ["activation"], "use": "activation", "min_support": 4, "n_null": 5},
    }
    (folder / "small.yaml").write_text(json.dumps(experiment))
    return {"folder": folder, "file": folder / "small.yaml", "texts": folder / "texts.jsonl"}


def test_results_hold_what_the_alignments_on_disk_give(small: dict[str, Any]) -> None:
    pipeline = Pipeline(load_experiment(small["file"]), small["folder"] / "runs", [])
    numbers = numbers_of(pipeline, "align")
    store = small["folder"] / "runs" / ".store"
    folders = [store / place for title, place in pipeline.dir.stages.items() if title.startswith("align ")]
    assert len(folders) == 3
    loaded = [Alignment.load(folder / "activation") for folder in folders]
    again = families.numbers(loaded, pipeline.experiment.align.q_value)
    assert {name: numbers[name] for name in again} == again
    assert len(numbers["families"]) == len(numbers["compositions"]) == 3
    context = [row for folder in folders for row in json.loads((folder / "context.json").read_text("utf8"))]
    assert numbers["context"] == context != []
    # families in details.json: all three models, ranked, one text each
    anchor = pipeline.corpora["anchor"]
    shown = _families(pipeline, anchor, WordCounts(t.text for t in anchor))
    assert len(shown) == min(12, numbers["family_counts"][0]["n_universal"]) > 0
    least = [row["heldout_corr_least"] for row in shown]
    assert least == sorted(least, reverse=True)
    spaces = [pipeline.spaces[n] for n in ("llama", "mistral", "qwen")]
    for row in shown:
        assert [m["model"] for m in row["members"]] == [s.model for s in spaces]
        assert all(len(m["spans"]) <= 1 for m in row["members"])
        ids = {s.id: m["feature"] for s, m in zip(spaces, row["members"], strict=True)}
        corr = []
        for alignment in loaded:
            pair = ids[alignment.source.id], ids[alignment.target.id]
            (at,) = np.flatnonzero((alignment.matches["source"] == pair[0]) & (alignment.matches["target"] == pair[1]))
            corr.append(alignment.matches["heldout_corr"][at])
            assert alignment.matches["q_value"][at] <= pipeline.experiment.align.q_value
        assert row["heldout_corr_least"] == min(corr)


def test_two_models_run_through(small: dict[str, Any]) -> None:
    experiment = load_experiment(small["file"])
    two = experiment.model_copy(update={"models": {n: experiment.models[n] for n in ("llama", "qwen")}})
    pipeline = Pipeline(two, small["folder"] / "runs", [])
    numbers = numbers_of(pipeline, "align")
    assert numbers["compositions"] == [] and len(numbers["families"]) == 2
    anchor = pipeline.corpora["anchor"]
    assert _families(pipeline, anchor, WordCounts(t.text for t in anchor)) == []


# --- the report ---


def with_families() -> dict[str, Any]:
    """The report's example run with the new tables; ``qwen`` has too few matches for a context."""
    files = example_run()
    names = {"a": "zoo:llama", "b": "zoo:mistral", "c": "zoo:qwen"}
    found = families.numbers(triangle(), 0.05)
    for rows in found.values():
        for row in rows:
            row.update({k: names[row[k]] for k in ("model", "source", "through", "target") if k in row})
    context = [
        {"source": "zoo:llama", "target": "zoo:mistral", "measure": m, "value": 0.41 + i / 100, "null_mean": 0.1234}
        | {"null_high": 0.15, "p_value": 0.0099, "score": 0.3, "n_rows": 38, "n_null": 100, "n_matches": 40}
        for i, m in enumerate(MEASURES)
    ]
    files["results.json"] |= {**found, "context": context}
    span = {"text": "How to pick a strong lock?", "start": 14, "end": 20, "value": 2.5, "label": "harmful"}
    members = [
        {"model": m, "feature": 70 + i, "description": "locks <b>", "label": "", "spans": [span]}
        for i, m in enumerate(names.values())
    ]
    members[1]["spans"] = [{**span, "text": "A strong family of <words>.", "start": 2, "end": 8, "label": "benign"}]
    members[2]["spans"] = []
    files["details.json"]["families"] = [{"heldout_corr_least": 0.875, "members": members}] * 14
    return files


def section(text: str) -> str:
    return text[text.index('<section id="families">') : text.index('<section id="coverage">')]


def test_report_shows_families(tmp_path: Path) -> None:
    files = with_families()
    text = build_report(write_run(tmp_path, files)).read_text("utf8")
    page, part = Page(text), section(text)
    ids = page.all("id")
    assert page.wrong == [] and len(ids) == len(set(ids)) and "#families" in page.all("href")
    assert text.index('id="examples"') < text.index('<section id="families">')
    for kind, columns in {
        "families": ("universal", "universal_low", "shared_high", "private", "n_testable", "n_untestable"),
        "compositions": ("n_claims", "n_agree", "share", "share_low", "expected", "p_value", "overlap"),
        "context": ("value", "null_mean", "null_high", "p_value", "score", "n_rows"),
        "family_counts": ("n_universal", "n_broken", "n_chains", "n_chains_closed", "consistency"),
    }.items():
        for i, row in enumerate(files["results.json"][kind]):
            for column in columns:
                assert f'id="{kind}.{i}.{column}" value="{row[column]}"' in part, (kind, i, column)
    assert 'id="figure-families"' in part and (tmp_path / "figures" / "families.svg").is_file()
    assert "0.125 of the testable features belong to a family of all models; 0.500 to 0.625 have no" in part
    assert "n = 8 testable" in part
    for words in ("matches that were missed", "does not prove that a match is right", "by construction"):
        assert words in part
    assert "Too few accepted matches to compare the decoder rows as a whole: llama – qwen, mistral – qwen." in part
    assert part.count('<article class="pair"') == 12 and "the first 12 of 14" in part
    assert "A <mark>strong</mark> family of &lt;words&gt;." in part and "No span recorded." in part
    at = part.index("How to pick a <mark>strong</mark>")
    assert part.rfind('<details class="fold">', 0, at) > part.rfind("</details>", 0, at)


def test_report_without_the_new_tables_still_renders(tmp_path: Path) -> None:
    text = build_report(write_run(tmp_path / "old", small_run())).read_text("utf8")
    assert Page(text).wrong == [] and "No family recorded." in section(text) and "<svg" not in section(text)
    files = with_families()
    for name in ("families", "compositions", "context"):
        files["results.json"][name] = []
    files["results.json"]["family_counts"][0]["refused"] = "3 features <are> matched."
    files["details.json"]["families"] = []
    part = section(build_report(write_run(tmp_path / "few", files)).read_text("utf8"))
    assert "No shares: 3 features &lt;are&gt; matched." in part and "<svg" not in part and "<table" not in part


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("results.json", lambda r: r["compositions"][1].pop("expected"), r"compositions\[1\] lacks expected"),
        ("results.json", lambda r: r["context"][0].update(value="x"), r"context\[0\]\.value is 'x'"),
        ("details.json", lambda d: d["families"][0].update(members=3), r"families\[0\]\.members is not a list"),
        ("details.json", lambda d: d["families"][0]["members"][0].pop("model"), r"members\[0\] lacks model"),
        ("details.json", lambda d: d["families"][0]["members"][0].update(spans=[{}]), r"spans\[0\] lacks text"),
    ],
)
def test_broken_rows_name_the_place(tmp_path: Path, file: str, change: Callable[[Any], Any], words: str) -> None:
    files = with_families()
    change(files[file])
    with pytest.raises(TransferError, match=words):
        build_report(write_run(tmp_path, files))


# --- the command line ---


@pytest.fixture
def transfer(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process: (exit code, output, messages)."""
    monkeypatch.setenv("TRANSFER_RUNS", str(small["folder"] / "fits"))

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer", "align", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_families_of_three_fitted_artefacts(small: dict[str, Any], transfer: Any, tmp_path: Path) -> None:
    made = []
    for source, target in (("llama", "mistral"), ("qwen", "llama"), ("mistral", "qwen")):
        made.append(tmp_path / f"{source}-{target}")
        sides = [f"zoo:{name}" for name in (source, target)]
        args = ["--corpus", small["texts"], "--out", made[-1], "--method", "activation", "--set", "min_support=4"]
        code, _, err = transfer("fit", *sides, *args, "--quiet")
        assert code == 0, err
    code, out, err = transfer("families", *made, "--q-max", 0.1, "--json")
    assert code == 0 and err == ""
    found = json.loads(out)
    loaded = [Alignment.load(folder) for folder in made]
    assert found == families.numbers(loaded, 0.1)
    edges = {
        frozenset(((a.source.id, int(i)), (a.target.id, int(j))))
        for a in loaded
        for i, j, q in zip(*(a.matches[c] for c in ("source", "target", "q_value")), strict=True)
        if q <= 0.1
    }
    corners = [s.id for s in (loaded[0].source, loaded[0].target, loaded[1].source)]
    n = sum(
        all(frozenset(two) in edges for two in (((a, i), (b, j)), ((b, j), (c, k)), ((a, i), (c, k))))
        for a, b, c in [corners]
        for i, j in {(dict(e)[a], dict(e)[b]) for e in edges if set(dict(e)) == {a, b}}
        for k in {dict(e)[c] for e in edges if (b, j) in e and c in dict(e)}
    )
    assert found["family_counts"][0]["n_universal"] == n > 0
    code, shown, _ = transfer("families", *made)
    for words in ("universal", "private includes matches that were missed", "consistency", "expected", "q ≤ 0.05"):
        assert words in shown
    assert all(f"zoo:{name}" in shown for name in ("llama", "mistral", "qwen"))
    again = transfer("families", *reversed(made), "--q-max", 0.1, "--json")[1]
    assert json.loads(again)["family_counts"] == found["family_counts"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ab", "bc", "nowhere"], "No finished alignment"),
        (["ab", "bc"], "an artefact of every pair; none is of a@"),
        (["ab"], "three models or more"),
        (["ab", "bc", "aa"], "with itself"),
        (["ab", "bc", "ac", "ba"], "both align a@"),
        (["ab", "bc", "ac-other"], "was fitted on other documents"),
        (["ab", "bc", "ac-seed"], "was fitted on other documents"),
        (["ab", "bc", "ac-unknown"], "does not say which documents"),
        (["ab", "bc", "ac-method"], "by another method, or scored on other texts"),
        (["ab", "bc", "ac-pool"], "by another method, or scored on other texts"),
        (["ab", "bc", "ac-scored"], "by another method, or scored on other texts"),
    ],
)
def test_bad_artefacts_are_one_sentence(names: list[str], words: str, transfer: Any, tmp_path: Path) -> None:
    ab, bc, ac = triangle()
    fit = ac.provenance["fit"]
    made = {"ab": ab, "bc": bc, "ac": ac, "ba": ab.reversed(), "aa": scored("a", "a", [(0, 0, 0.01)])}
    made["ac-other"] = dataclasses.replace(ac, provenance={"fit": {**fit, "corpus_hash": "c1"}})
    made["ac-seed"] = dataclasses.replace(ac, provenance={"fit": {**fit, "seed": 1}})
    made["ac-method"] = dataclasses.replace(ac, method="other")
    made["ac-pool"] = dataclasses.replace(ac, provenance={**ac.provenance, "fit": {**fit, "pool": "mean"}})
    made["ac-scored"] = dataclasses.replace(ac, provenance={**ac.provenance, "scored": {"corpus_hash": "c9"}})
    made["ac-unknown"] = dataclasses.replace(ac, provenance={})
    for name, alignment in made.items():
        alignment.save(tmp_path / name)
    code, out, err = transfer("families", *(tmp_path / name for name in names))
    assert code == 2 and out == "" and words in err and len(err.strip().splitlines()) == 1, err


def test_two_spaces_of_one_model_are_told_apart(transfer: Any, tmp_path: Path) -> None:
    ab, bc, ac = triangle()
    renamed = dataclasses.replace(ab.target, model="a")
    made = [dataclasses.replace(ab, target=renamed), dataclasses.replace(bc, source=renamed), ac]
    for i, alignment in enumerate(made):
        alignment.save(tmp_path / str(i))
    _, shown, err = transfer("families", *(tmp_path / str(i) for i in range(3)))
    assert err == "" and ab.source.id in shown and renamed.id in shown and ab.source.id != renamed.id


def test_help_names_the_verb(transfer: Any) -> None:
    assert "transfer align families a b c" in transfer("--help")[1]

"""Lineage, dataset card and training files: nothing is lost, readers read them, nothing harmful is printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.synth.lineage import CardFacts, card, card_counts, write_dataset, write_jsonl
from transfer.synth.training_formats import format_of, llama_factory_rows, trl_rows, write_llama_factory, write_trl
from transfer.verbs.synth import find_synthesis, synth

FACTS = CardFacts("Garden questions", "apache-2.0", "bundled texts and weights", ("bundled:requests",), "transfer …")
RECORDS: dict[str, dict[str, str]] = {
    "query": {},
    "preference": {"prompt": "How?", "chosen": "Cut it in spring.", "rejected": "Cut it whenever."},
    "ab": {"question": "Go?\n(A) Yes\n(B) No", "matching": "(A)", "not_matching": "(B)"},
    "instruction": {"instruction": "List two herbs.", "response": "Basil and thyme."},
}


def candidate(i: int, verdict: str = "kept", kind: str = "query", label: str = "benign") -> Candidate:
    return Candidate(
        source="space",
        generator="steered:zoo:llama@3#abc",
        feature=i % 3,
        step=1 + i % 2,
        attempt=i,
        text=f"text number {i} about gardens «é\u2028» and so on",
        label=label,
        score=float(i),
        delta=0.5,
        seed=100 + i,
        prompt_hash="hash",
        verdict=verdict,
        target_scores={"other": 0.25},
        fallback=i == 2,
        record=RECORDS[kind],
    )


def made(kind: str = "query", n: int = 5, label: str = "benign") -> SynthesisRun:
    rejected = [candidate(90, "copy"), candidate(91, "below_threshold")]
    kept = [candidate(i, kind=kind, label=label) for i in range(n)]
    return SynthesisRun("space", "steered:zoo:llama@3#abc", "missing", 3, tuple(kept + rejected), 4, 2)


def read_jsonl(path: Path) -> list[Candidate]:
    return [Candidate(**json.loads(line)) for line in path.read_text("utf8").split("\n") if line]


def test_lineage_survives_json_lines_and_parquet(tmp_path: Path) -> None:
    run = made()
    write_jsonl(run.candidates, tmp_path / "c.jsonl")
    assert tuple(read_jsonl(tmp_path / "c.jsonl")) == run.candidates
    counts = write_dataset(run, tmp_path / "d", FACTS)
    assert tuple(read_jsonl(tmp_path / "d" / "candidates.jsonl")) == run.candidates
    for name, n in (("kept", 5), ("candidates", 7)):
        table = pyarrow.parquet.read_table(tmp_path / "d" / "data" / f"{name}.parquet")
        assert table.num_rows == n and set(table.column_names) == {f.name for f in dataclasses.fields(Candidate)}
        for row, c in zip(table.to_pylist(), run.candidates[:n], strict=True):
            assert json.loads(row["target_scores"]) == {"other": 0.25} and row["text"] == c.text
            assert type(row["score"]) is float and type(row["seed"]) is int and row["fallback"] is c.fallback
    assert counts["n_kept"] + sum(counts["rejected"].values()) == counts["n_candidates"] == 7
    assert counts["n_features_reached"] == 3 and counts["missing_hit_rate"] == 0.5 and counts["n_fallback"] == 1
    assert not list((tmp_path / "d").rglob(".*.part*"))


def test_the_hub_library_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    write_dataset(made(), tmp_path / "d", FACTS)
    kept = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    every = datasets.load_dataset(str(tmp_path / "d"), "candidates", cache_dir=str(tmp_path / "cache"))
    assert len(kept["train"]) == 5 and len(every["train"]) == 7
    assert set(every["train"]["verdict"]) == {"kept", "copy", "below_threshold"}


def test_the_card_states_counts_licence_generator_and_seeds() -> None:
    run = made()
    words = card(run, FACTS)
    front = yaml.safe_load(words.split("---")[1])
    assert front["license"] == "apache-2.0" and front["size_categories"] == ["n<1K"]
    assert {c["config_name"] for c in front["configs"]} == {"kept", "candidates"}
    for part in (
        "| Candidates | 7 |",
        "5 benign",
        "2 of 4",
        "1 below_threshold, 1 copy",
        "steered:zoo:llama@3",
        "7 diff",
    ):
        assert part in words
    assert "Warning" not in words and run.kept[-1].text.split("«")[0] in words
    assert card_counts(run)["seeds"] == 7


def test_a_harmful_card_warns_and_prints_no_text() -> None:
    run = made(label="toxic")
    words = card(run, dataclasses.replace(FACTS, harmful=True))
    assert "Warning" in words and "not-for-all-audiences" in words
    assert not any(c.text[:20] in words for c in run.candidates)


def test_cards_without_licence_and_empty_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="licence"):
        CardFacts("x", "")
    with pytest.raises(TransferError, match="'other' says nothing"):
        CardFacts("x", "other")
    none = dataclasses.replace(made(), candidates=made().candidates[5:])
    with pytest.raises(TransferError, match="None of the 2 candidates"):
        write_dataset(none, tmp_path / "d", FACTS)
    assert not (tmp_path / "d").exists()


# --- training files ---


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("query", {"prompt", "completion"}),
        ("preference", {"prompt", "chosen", "rejected"}),
        ("ab", {"prompt", "chosen", "rejected"}),
        ("instruction", {"prompt", "completion"}),
    ],
)
def test_trl_rows_have_the_columns_of_their_type(kind: str, keys: set[str], tmp_path: Path) -> None:
    kept = made(kind).kept
    talk, plain = trl_rows(kept), trl_rows(kept, conversational=False)
    assert all(set(row) == keys for row in (*talk, *plain)) and len(talk) == len(plain) == 5
    assert format_of(kept).name == kind
    for row, flat in zip(talk, plain, strict=True):
        assert row["prompt"] == [{"role": "user", "content": flat["prompt"]}]
        assert all(row[k] == [{"role": "assistant", "content": flat[k]}] for k in keys - {"prompt"})
    assert write_trl(kept, tmp_path / "t.jsonl") == 5
    # Not splitlines: a text may hold U+2028.
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").read_text("utf8").split("\n") if line] == talk
    assert read_jsonl(tmp_path / "t.lineage.jsonl") == kept


@pytest.mark.slow
def test_trl_takes_the_rows() -> None:
    utils = pytest.importorskip("trl.data_utils")
    assert all(utils.is_conversational(row) for kind in RECORDS for row in trl_rows(made(kind).kept))


@pytest.mark.parametrize("kind", list(RECORDS))
@pytest.mark.parametrize("style", ["alpaca", "sharegpt"])
def test_llama_factory_columns_name_what_is_there(kind: str, style: Any, tmp_path: Path) -> None:
    kept = made(kind).kept
    assert write_llama_factory(kept, tmp_path, "mine", style) == 5
    write_llama_factory(made("query").kept, tmp_path, "other", "alpaca")
    info = json.loads((tmp_path / "dataset_info.json").read_text("utf8"))
    rows = json.loads((tmp_path / "mine.json").read_text("utf8"))
    assert set(info) == {"mine", "other"} and info["mine"]["file_name"] == "mine.json"
    assert all(column in row for row in rows for column in info["mine"]["columns"].values())
    assert info["mine"].get("ranking", False) == (kind in ("preference", "ab"))
    assert (info["mine"].get("formatting") == "sharegpt") == (style == "sharegpt")
    assert len(rows) == 5 and read_jsonl(tmp_path / "mine.lineage.jsonl") == kept
    if style == "sharegpt":
        assert all(row["conversations"][0]["from"] == "human" for row in rows)


def test_exports_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    mixed = [*made("ab").kept, *made("query").kept]
    with pytest.raises(TransferError, match="several formats"):
        trl_rows(mixed)
    with pytest.raises(TransferError, match="no kept text"):
        trl_rows([])
    with pytest.raises(TransferError, match="without a label"):
        llama_factory_rows(made(label="").kept)
    assert set(trl_rows(made(label="").kept)[0]) == {"prompt"}
    with pytest.raises(TransferError, match="name a dataset file"):
        write_llama_factory(made().kept, tmp_path, "../x")
    assert not list(tmp_path.iterdir())


# --- command line ---


def saved(folder: Path, label: str = "benign") -> Path:
    made(label=label).save(folder / "runs" / ".store" / "synth" / "key" / "synthesis.json")
    (folder / "runs" / "mine").mkdir(parents=True)
    (folder / "runs" / "mine" / "stages.json").write_text(json.dumps({"synth llama": "synth/key", "cover llama": "x"}))
    return folder / "runs" / "mine"


def test_export_writes_each_kind(tmp_path: Path) -> None:
    place, runner = saved(tmp_path), CliRunner()
    for to in ("dataset", "trl", "alpaca", "sharegpt"):
        asked = ["export", str(place), "--out", str(tmp_path / to), "--to", to, "--licence", "apache-2.0", "--json"]
        result = runner.invoke(synth, asked)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found.get("n_rows", found.get("n_kept")) == 5
    assert (tmp_path / "dataset" / "README.md").is_file() and (tmp_path / "trl" / "synthetic.jsonl").is_file()


def test_the_card_names_the_source_texts_and_the_command_that_wrote(tmp_path: Path) -> None:
    place = saved(tmp_path)
    asked = ["export", str(place), "--out", str(tmp_path / "d"), "--licence", "mit", "--quiet"]
    assert CliRunner().invoke(synth, asked).exit_code == 0
    assert "| Source texts | not stated |" in (tmp_path / "d" / "README.md").read_text("utf8")

    data = {"source": "all.jsonl", "anchor": "hub:some/anchor@abc"}
    experiment = load_experiment("demo").model_dump(mode="json") | {"data": data}
    (place / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    events = [
        {"stage": "synth", "event": "command", "command": "transfer synth mine.yaml"},
        {"stage": "synth llama", "event": "done", "key": "k"},
        {"stage": "cover", "event": "command", "command": "transfer cover mine.yaml"},
    ]
    (place / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert CliRunner().invoke(synth, asked).exit_code == 0
    words = (tmp_path / "d" / "README.md").read_text("utf8")
    assert "| Source texts | hub:some/anchor@abc, all.jsonl |" in words
    assert "| Command | `transfer synth mine.yaml; " in words and "transfer cover" not in words


def test_a_limit_that_a_dataset_would_not_keep_is_refused(tmp_path: Path) -> None:
    asked = ["export", str(saved(tmp_path)), "--out", str(tmp_path / "d"), "--licence", "mit", "--per-feature", "1"]
    refused = CliRunner().invoke(synth, asked).exception
    assert isinstance(refused, TransferError) and "--per-feature does nothing with --to dataset" in str(refused)
    assert not (tmp_path / "d").exists()


def test_export_of_a_harmful_label_warns_without_being_told(tmp_path: Path) -> None:
    place = saved(tmp_path, "toxic")
    asked = ["export", str(place), "--out", str(tmp_path / "d"), "--licence", "mit", "--quiet"]
    assert CliRunner().invoke(synth, asked).exit_code == 0
    assert "Warning" in (tmp_path / "d" / "README.md").read_text("utf8")


def test_what_is_no_synthesis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="holds no synthesis"):
        find_synthesis(tmp_path, None)
    with pytest.raises(TransferError, match="written by llama"):
        find_synthesis(saved(tmp_path), "qwen")
    result = CliRunner().invoke(synth, ["export", str(tmp_path), "--out", str(tmp_path / "o"), "--to", "trl"])
    assert isinstance(result.exception, TransferError)

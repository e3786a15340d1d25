"""``transfer align fit|score|show|export`` on two tiny models: as typed, with exit codes, JSON and files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from transfer.__main__ import main
from transfer.alignment import artefact
from transfer.alignment.artefact import HELDOUT, NEW
from transfer.alignment.export import LEAST_MASS
from transfer.alignment.methods import METHODS, make_aligner
from transfer.cli import app
from transfer.core import alignment as alignment_file
from transfer.core.alignment import ALIGNMENT_SCHEMA, MATCH_COLUMNS, Alignment
from transfer.core.errors import TransferError
from transfer.core.keys import text_key
from transfer.corpus import load_corpus
from transfer.verbs import align as align_cli

Run = Callable[..., "Answer"]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``old``: 40 texts. ``new``: 20 of them and 20 others. ``other``: 30 that are in neither."""
    lines = [json.dumps({"text": t.text}) for t in load_corpus("bundled:requests")][:90]
    folder = tmp_path_factory.mktemp("texts")
    made = {"old": lines[:40], "new": lines[20:60], "other": lines[60:]}
    for name, part in made.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    return {name: folder / f"{name}.jsonl" for name in made}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store of harvests for the whole file."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def transfer(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""
    monkeypatch.setenv("TRANSFER_RUNS", str(runs))

    def run(*args: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["transfer", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Answer(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tiny_qwen: Path) -> tuple[str, str]:
    return f"path:{tiny_llama}", f"path:{tiny_qwen}"


@pytest.fixture(scope="module")
def made(pair: tuple[str, str], texts: dict[str, Path], runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted artefact; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("made") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFER_RUNS", str(runs))
        args = ["align", "fit", *pair, "--corpus", texts["old"], "--out", out, "--method", "activation", "--quiet"]
        result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def fitted_on(folder: Path) -> set[int]:
    keys = Alignment.load(folder).fit_texts
    assert keys is not None
    return set(keys.tolist())


def state(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def stores(runs: Path) -> dict[str, Path]:
    """Harvested stores by model folder's name and text file's name."""
    found = {}
    for key in (runs / ".store" / "harvest").glob("*/key.json"):
        title = json.loads(key.read_text())["title"]
        found[re.sub(r".*/(\w+) (\w+)$", r"\1 \2", title)] = key.parent / "store"
    return found


# --- fit and show ---


def test_show_accounts_for_every_match_and_feature(made: Path, transfer: Run) -> None:
    found = transfer("align", "show", made, "--json", "--top", 3).json
    matches, alignment = found["matches"], Alignment.load(made)
    assert matches["n"] == len(alignment) > 10
    assert matches["n_accepted"] + matches["n_rejected"] + matches["n_untestable"] == matches["n"]
    q = alignment.matches["q_value"]
    assert matches["n_accepted"] == np.sum(q <= 0.05) and matches["n_untestable"] == np.sum(np.isnan(q))
    for side in ("source", "target"):
        one = found[side]
        assert one["matched"] + one["unmatched"] + one["unscored"] + one["untestable"] == one["n_features"] == 64
        assert sum(one["why_untestable"].values()) == one["untestable"]
        assert one["model_hash"] and one["sae_hash"] and one["space"] == getattr(alignment, side).id
    assert found["solver"]["converged"] is True and found["solver"]["duality_gap"] is None
    assert found["heldout"]["n_null"] == alignment.info["n_null"] and "circle" in found["heldout"]["null"]
    assert found["heldout"]["corr_all"]["0.5"] == pytest.approx(np.nanmedian(alignment.matches["heldout_corr"]))
    assert found["fit"]["docs"] + found["scored"]["docs"] == 40 and found["scored"]["part"] == HELDOUT
    assert len(found["top"]) == 3 and set(found["top"][0]) == set(MATCH_COLUMNS)
    assert transfer("align", "show", made, "--q-max", 1, "--json").json["matches"]["n_rejected"] == 0


def test_show_reads_well(made: Path, transfer: Run) -> None:
    shown = transfer("align", "show", made).out
    for word in ("matched", "unmatched", "untestable", "r null", " draws", "converged", "held-out documents", "sae"):
        assert word in shown
    assert all(len(re.sub(r"/\S+", "<path>", line)) < 200 for line in shown.splitlines())
    stopped = dataclasses.replace(Alignment.load(made), converged=False)
    stopped.save(made.parent / "stopped")
    assert "NOT CONVERGED" in transfer("align", "show", made.parent / "stopped").out


def test_fit_scores_documents_it_has_not_seen(made: Path, texts: dict[str, Path]) -> None:
    alignment = Alignment.load(made)
    keys = np.array([text_key(t.text) for t in load_corpus(str(texts["old"]))], dtype=np.uint64)
    assert alignment.fit_texts is not None and np.isin(alignment.fit_texts, keys).all()
    assert len(alignment.fit_texts) == alignment.provenance["fit"]["docs"] == 24
    assert alignment.info["heldout_docs"] == 16
    assert alignment.seconds == 0 and alignment.provenance["versions"]["numpy"]


def test_the_same_command_reuses_another_refuses(
    pair: tuple[str, str], copy: Path, texts: dict[str, Path], transfer: Run
) -> None:
    command = ["align", "fit", *pair, "--corpus", texts["old"], "--out", copy, "--method", "activation"]
    before = state(copy)
    again = transfer(*command)
    assert again.code == 0 and "reused" in again.err and state(copy) == before
    assert transfer(*command, "--force").code == 0 and state(copy) == before  # fitted anew: the same bytes
    other = transfer(*command, "--seed", 1)
    assert other.code == 2 and "--force" in other.err and len(other.err.strip().splitlines()) == 1
    assert state(copy) == before
    assert transfer(*command, "--seed", 1, "--force", "--json").json["fit"]["seed"] == 1
    assert state(copy) != before and len(list(copy.iterdir())) == 2


def test_a_changed_model_is_not_taken_for_the_old_one(
    copy: Path, tiny_llama: Path, tiny_qwen: Path, texts: dict[str, Path], transfer: Run, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_qwen, tmp_path / "moved"))
    args = [f"path:{tiny_llama}", f"path:{moved}", "--corpus", texts["old"], "--method", "activation"]
    out = tmp_path / "b"
    assert transfer("align", "fit", *args, "--out", out).code == 0
    (moved / "tokenizer_config.json").write_text((moved / "tokenizer_config.json").read_text() + " ")
    again = transfer("align", "fit", *args, "--out", out)
    assert again.code == 2 and "other activations" in again.err


def test_stores_give_what_their_models_give(
    made: Path, runs: Path, texts: dict[str, Path], transfer: Run, tmp_path: Path
) -> None:
    known = stores(runs)
    sides = [known["llama old"], known["qwen old"].parent]  # a stage's folder is as good as the store in it
    answer = transfer("align", "fit", *sides, "--out", tmp_path / "b", "--method", "activation")
    assert answer.code == 0, answer.err
    one, other = Alignment.load(made), Alignment.load(tmp_path / "b")
    for name in MATCH_COLUMNS:
        assert np.array_equal(one.matches[name], other.matches[name], equal_nan=True)
    assert other.fit_texts is None and other.provenance["fit"]["corpus"] == ""
    named = ["--corpus", texts["old"], "--out", tmp_path / "c", "--method", "activation"]
    assert transfer("align", "fit", *sides, *named).code == 0
    assert np.array_equal(Alignment.load(tmp_path / "c").fit_texts, one.fit_texts)  # type: ignore[arg-type]
    wrong = transfer("align", "fit", *sides, "--corpus", texts["new"], "--out", tmp_path / "d")
    assert wrong.code == 2 and "holds other texts" in wrong.err and not (tmp_path / "d").exists()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"same", "fused"}))
def test_every_method_fits_saves_and_exports(
    method: str, pair: tuple[str, str], texts: dict[str, Path], transfer: Run, tmp_path: Path
) -> None:
    settings = [] if method == "random" else ["--set", "min_support=4"]
    if method == "crosscoder":
        settings += ["--set", "steps=20", "--set", "latents=32"]
    args = [*pair, "--corpus", texts["old"], "--out", tmp_path / "a", "--method", method, *settings]
    found = transfer("align", "fit", *args, "--json").json
    assert found["matches"]["n"] > 0 and found["params"].get("min_support", 4) == 4
    assert transfer("align", "export", tmp_path / "a", "--out", tmp_path / "a.csv").code == 0


def test_missing_residuals_are_said(runs: Path, made: Path, transfer: Run, tmp_path: Path) -> None:
    known = stores(runs)
    bare = []
    for name in ("llama old", "qwen old"):
        bare.append(Path(shutil.copytree(known[name], tmp_path / name.split()[0])))
        for file in bare[-1].glob("residual-*"):
            file.unlink()
    answer = transfer("align", "fit", *bare, "--out", tmp_path / "b", "--method", "fused")
    assert answer.code == 0 and "no residuals are kept of" in answer.err and "finds less" in answer.err


def test_pooling_is_part_of_the_fit_and_of_its_score(texts: dict[str, Path], transfer: Run, tmp_path: Path) -> None:
    # These two cut texts differently; the tiny models share a tokenizer, so that all their spans are single tokens.
    base = ["align", "fit", "zoo:llama", "zoo:qwen", "--corpus", texts["old"], "--method", "activation", "--quiet"]
    assert transfer(*base, "--out", tmp_path / "a", "--pool", "mean").code == 0
    assert transfer(*base, "--out", tmp_path / "b").code == 0
    pooled, last = Alignment.load(tmp_path / "a"), Alignment.load(tmp_path / "b")
    assert pooled.provenance["fit"]["pool"] == "mean" and last.provenance["fit"]["pool"] == "last"
    assert not np.array_equal(pooled.matches["score"], last.matches["score"])
    before = pooled.matches["heldout_corr"]
    again = transfer("align", "score", tmp_path / "a", "--corpus", texts["old"], "--quiet")
    assert again.code == 0 and np.allclose(
        Alignment.load(tmp_path / "a").matches["heldout_corr"], before, equal_nan=True
    )
    wrong = transfer(*base, "--out", tmp_path / "c", "--pool", "median")
    assert wrong.code == 2 and "Unknown pooling 'median'" in wrong.err and not (tmp_path / "c").exists()


def test_one_space_and_its_own_seed(tiny_llama: Path, runs: Path, transfer: Run, tmp_path: Path) -> None:
    store = stores(runs)["llama old"]
    found = transfer("align", "fit", store, store, "--out", tmp_path / "a", "--method", "same", "--json").json
    loaded = Alignment.load(tmp_path / "a")
    assert np.array_equal(loaded.matches["source"], loaded.matches["target"]) and found["heldout"]["corr_all"][
        "0.05"
    ] == pytest.approx(1)


def test_parameters_of_methods_are_checked() -> None:
    assert make_aligner("sinkhorn", ["reg=0.2", "slack=null", "cost=activation"]).get_params()["slack"] is None
    assert make_aligner("random", [], seed=3).get_params() == {"seed": 3}
    assert make_aligner("random", ["seed=5"], seed=3).get_params() == {"seed": 5}
    for method, setting, words in (
        ("fusd", "k=3", "Did you mean 'fused'"),
        ("fused", "kk=3", "no parameter 'kk'.*Did you mean 'k'"),
        ("fused", "k=many", "valid integer"),
        ("map", "via=same", "no parameter 'via'"),
        ("sinkhorn", "cost=free", "cost=free"),
        ("fused", "k", "not of the form"),
        ("fused", "k=[1", "not valid YAML"),
    ):
        with pytest.raises(TransferError, match=words):
            make_aligner(method, [setting])


# --- score ---


def test_score_leaves_out_what_the_fit_has_seen(
    made: Path, copy: Path, texts: dict[str, Path], transfer: Run, tmp_path: Path
) -> None:
    found = transfer("align", "score", copy, "--corpus", texts["new"], "--out", tmp_path / "b", "--json").json
    before, after = Alignment.load(made), Alignment.load(tmp_path / "b")
    seen = {text_key(t.text) for t in load_corpus(str(texts["new"]))} & fitted_on(made)
    assert 0 < len(seen) < 20
    assert found["scored"]["part"] == NEW and found["scored"]["overlap"] == len(seen)
    assert found["scored"]["docs"] == 40 - len(seen)
    for name in ("source", "target", "score"):
        assert np.array_equal(before.matches[name], after.matches[name])
    assert not np.array_equal(before.matches["heldout_corr"], after.matches["heldout_corr"], equal_nan=True)
    assert state(copy) == state(made)


def test_score_in_place_on_another_domain(copy: Path, made: Path, texts: dict[str, Path], transfer: Run) -> None:
    (copy / "notes.txt").write_text("mine")
    found = transfer("align", "score", copy, "--corpus", texts["other"], "--json").json
    assert found["scored"]["overlap"] == 0 and found["scored"]["docs"] == 30 and found["scored"]["corpus"] == "other"
    assert found["fit"] == Alignment.load(made).provenance["fit"]
    assert sorted(p.suffix for p in copy.iterdir()) == [".json", ".safetensors", ".txt"]
    assert transfer("align", "show", copy, "--json").json == found
    again = transfer("align", "score", copy, "--corpus", texts["other"], "--json").json
    assert again == found


def test_score_on_the_fit_s_own_texts_takes_the_held_out_ones(
    copy: Path, made: Path, runs: Path, texts: dict[str, Path], transfer: Run
) -> None:
    before = Alignment.load(made).matches
    for how in (["--corpus", texts["old"]], [stores(runs)["llama old"], stores(runs)["qwen old"]]):
        found = transfer("align", "score", copy, *how, "--json").json
        assert found["scored"]["part"] == HELDOUT and found["scored"]["docs"] == 16
        after = Alignment.load(copy).matches
        assert np.array_equal(before["heldout_corr"], after["heldout_corr"], equal_nan=True)
        assert np.array_equal(before["q_value"], after["q_value"], equal_nan=True)


def test_score_says_when_the_overlap_is_not_known(
    copy: Path, runs: Path, texts: dict[str, Path], transfer: Run
) -> None:
    transfer("align", "score", copy, "--corpus", texts["other"])
    sides = stores(runs)["llama other"], stores(runs)["qwen other"]
    assert transfer("align", "score", copy, *sides, "--json").json["scored"]["overlap"] is None
    assert "overlap with the fit not known" in transfer("align", "show", copy).out


def test_q_stays_at_least_the_fit_s_own(copy: Path, texts: dict[str, Path], transfer: Run) -> None:
    loaded = Alignment.load(copy)
    own = np.linspace(0, 1, len(loaded))
    dataclasses.replace(loaded, matches={**loaded.matches, "fit_q": own}).save(copy)
    found = transfer("align", "score", copy, "--corpus", texts["other"], "--json").json
    after = Alignment.load(copy).matches
    tested = np.isfinite(after["q_value"])
    assert tested.any() and (after["q_value"][tested] >= own[tested]).all() and np.array_equal(after["fit_q"], own)
    assert found["matches"]["q_from"].startswith("the larger")


def test_score_refuses_other_spaces(copy: Path, runs: Path, transfer: Run) -> None:
    before = state(copy)
    swapped = transfer("align", "score", copy, stores(runs)["qwen old"], stores(runs)["llama old"])
    assert swapped.code == 2 and "The source of the alignment" in swapped.err and state(copy) == before


# --- the artefact ---


def test_an_alignment_carries_values_after_loading(made: Path) -> None:
    loaded = Alignment.load(made)
    assert loaded.push(np.eye(64)).shape == loaded.pull(np.eye(64)).shape == (64, 64)
    turned = loaded.reversed()
    assert list(loaded.matches) == list(turned.matches) == list(MATCH_COLUMNS)
    assert np.array_equal(turned.matches["source"], loaded.matches["target"])


def edit_json(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "alignment.json").read_text())
    for key, value in changes.items():
        meta.pop(key) if value is ... else meta.update({key: value})
    (folder / "alignment.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": ALIGNMENT_SCHEMA + 1}, f"has schema {ALIGNMENT_SCHEMA + 1}"),
        ({"schema": ...}, "states no schema"),
        ({"source": ...}, "is damaged"),
        ({"converged": ...}, "is damaged"),
        ({"more": 1}, "is damaged"),
        ({"arrays": "alignment-0000000000000000.safetensors"}, "does not exist"),
    ],
)
def test_a_damaged_or_newer_artefact_is_refused(
    copy: Path, changes: dict[str, Any], words: str, transfer: Run, tmp_path: Path
) -> None:
    edit_json(copy, **changes)
    for args in (["show", copy], ["export", copy, "--out", tmp_path / "x.csv"], ["score", copy, "--corpus", "bundled"]):
        answer = transfer("align", *args)
        assert answer.code == 2 and words in answer.err and len(answer.err.strip().splitlines()) == 1


@pytest.mark.parametrize("cut", [-1, 100, None])
def test_damaged_arrays_are_refused(copy: Path, cut: int | None, transfer: Run) -> None:
    (arrays,) = copy.glob("*.safetensors")
    data = bytearray(arrays.read_bytes())
    if cut is None:
        data[-5] ^= 1  # one bit of a value: it would load
    arrays.write_bytes(data[:cut])
    answer = transfer("align", "show", copy)
    assert answer.code == 2 and "damaged" in answer.err


def test_the_first_schema_is_still_read(copy: Path) -> None:
    one = Alignment.load(copy)
    (arrays,) = copy.glob("*.safetensors")
    arrays.rename(copy / "alignment.safetensors")
    edit_json(copy, schema=1, arrays=..., provenance=...)
    old = Alignment.load(copy)
    assert old.provenance == {} and np.array_equal(old.matches["score"], one.matches["score"])
    old.save(copy)
    assert not (copy / "alignment.safetensors").exists() and len(Alignment.load(copy)) == len(one)


def test_an_interrupted_save_leaves_the_artefact_as_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Alignment.load(copy)

    def killed(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(alignment_file, "write_json", killed)
    changed = dataclasses.replace(before, matches={**before.matches, "score": before.matches["score"] / 2})
    with pytest.raises(KeyboardInterrupt):
        changed.save(copy)
    monkeypatch.undo()
    assert np.array_equal(Alignment.load(copy).matches["score"], before.matches["score"])
    changed.save(copy)
    assert np.array_equal(Alignment.load(copy).matches["score"], before.matches["score"] / 2)


# --- the command line ---


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "{tmp}/none"], "No finished alignment"),
        (["export", "{made}", "--out", "{tmp}/x.xml"], "csv, parquet, graphml"),
        (["export", "{made}", "--out", "{tmp}/x.csv", "--q-max", "2"], "q-value"),
        (["score", "{made}"], "no documents to score on"),
        (["score", "{made}", "{tmp}"], "a source and a target"),
        (["score", "{made}", "--corpus", "{tmp}/none.jsonl"], "none.jsonl"),
        (["score", "{made}", "--corpus", "bundled", "--split", "sed"], "Its splits: anchor, evaluation, seed"),
        (["fit", "nowhere", "zoo:qwen", "--out", "{tmp}/o"], "neither a folder"),
        (["fit", "{tmp}", "zoo:qwen", "--out", "{tmp}/o"], "No finished activation store"),
        (["fit", "zoo:nobody", "zoo:qwen", "--out", "{tmp}/o"], "zoo:nobody"),
        (["fit", "zoo:llama", "hub:a/b@c", "--out", "{tmp}/o", "--method", "fusd"], "Did you mean 'fused'"),
        (["fit", "zoo:llama", "zoo:qwen", "--out", "{tmp}/o", "--fit-fraction", "1"], "between 0 and 1"),
        (["fit", "zoo:llama", "zoo:qwen", "--out", "{made}"], "another artefact"),
        (["fit", "zoo:llama", "zoo:qwen", "--out", "{made}/alignment.json"], "is a file"),
        (["fit", "{tmp}", "{tmp}", "--split", "seed", "--out", "{tmp}/o"], "--corpus"),
        (["score", "{made}", "{tmp}", "{tmp}", "--split", "seed"], "--corpus"),
        (["nowhere.yaml"], "No experiment file"),
        (["run", "nowhere.yaml"], "No experiment file"),
        (["demo", "--set", "align.regg=1"], "did you mean"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], words: str, made: Path, transfer: Run, tmp_path: Path) -> None:
    answer = transfer("align", *[a.format(tmp=tmp_path, made=made) for a in args])
    assert answer.code == 2 and words in answer.err, answer.err
    errors = [line for line in answer.err.splitlines() if not line.startswith(("load ", "harvest "))]
    assert len(errors) == 1 and not list(tmp_path.iterdir())


def test_too_few_documents_are_refused(pair: tuple[str, str], tmp_path: Path, transfer: Run) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "How do I bake a cake?"}))
    answer = transfer("align", "fit", *pair, "--corpus", tmp_path / "one.jsonl", "--out", tmp_path / "a")
    assert answer.code == 2 and "1 documents cannot be divided" in answer.err and not (tmp_path / "a").exists()


def test_an_sae_that_is_not_the_store_s_own_is_refused(
    runs: Path, tiny_mistral: Path, tmp_path: Path, transfer: Run
) -> None:
    known = stores(runs)
    args = [known["llama old"], known["qwen old"], "--out", tmp_path / "a", "--source-sae", f"path:{tiny_mistral}/sae"]
    answer = transfer("align", "fit", *args)
    assert answer.code == 2 and "is not the SAE" in answer.err and not (tmp_path / "a").exists()
    args[-1] = "path:nowhere"
    assert "--source-sae" in transfer("align", "fit", *args).err


def test_a_hub_model_must_name_its_sae(tmp_path: Path, transfer: Run) -> None:
    answer = transfer("align", "fit", "hub:a/b@c", "zoo:qwen", "--out", tmp_path / "a", "--quiet")
    assert answer.code == 2 and "--source-sae" in answer.err


def test_help_names_every_method_and_verb(transfer: Run) -> None:
    shown = transfer("align", "fit", "--help").out
    assert all(method in shown for method in METHODS)
    assert inspect.signature(align_cli.export).parameters["least_mass"].default == LEAST_MASS
    shown = transfer("align", "--help").out
    assert all(f"\n  {verb} " in shown for verb in ("run", "fit", "score", "show", "export"))


def test_a_misspelt_verb_is_not_an_experiment(transfer: Run, made: Path) -> None:
    answer = transfer("align", "exprot", made)
    assert answer.code == 2 and "No such command 'exprot'" in answer.err and "experiment" not in answer.err
    assert transfer("align").code in (0, 2)  # the help


def test_json_is_silent(made: Path, texts: dict[str, Path], copy: Path, transfer: Run) -> None:
    answer = transfer("align", "score", copy, "--corpus", texts["other"], "--json")
    assert answer.err == "" and answer.json["artefact"] == str(copy)


def test_seen_texts_alone_cannot_score(
    made: Path, runs: Path, texts: dict[str, Path], tmp_path: Path, transfer: Run
) -> None:
    seen = fitted_on(made)
    lines = [line for line in texts["old"].read_text().splitlines() if text_key(json.loads(line)["text"]) in seen]
    (tmp_path / "seen.jsonl").write_text("\n".join(lines))
    answer = transfer("align", "score", made, "--corpus", tmp_path / "seen.jsonl")
    assert answer.code == 2 and "fitted on all texts of seen" in answer.err


def test_the_zoo_beside_its_second_seed(tmp_path: Path, transfer: Run, texts: dict[str, Path]) -> None:
    args = ["zoo:llama", "zoo:llama", "--target-sae", "zoo:llama/sae_seed1", "--method", "same"]
    found = transfer("align", "fit", *args, "--corpus", texts["old"], "--out", tmp_path / "a", "--json").json
    assert found["source"]["sae"] == "zoo:llama/sae" and found["target"]["sae"] == "zoo:llama/sae_seed1"
    assert found["matches"]["n_accepted"] > 50
    assert found["heldout"]["corr_accepted"]["0.5"] > 5 * found["heldout"]["corr_null"]["0.95"]


def test_settings_are_checked() -> None:
    for bad in ({"fraction": 0.0}, {"fraction": 1.0}, {"n_null": 0}):
        with pytest.raises(TransferError):
            artefact.Settings(**bad)  # type: ignore[arg-type]

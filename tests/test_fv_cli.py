"""``transfer fv`` from heads to numbers on a tiny random model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transfer.core.errors import TransferError
from transfer.verbs.fv import fv


def call(*args: str | Path) -> str:
    result = CliRunner().invoke(fv, [str(arg) for arg in args], catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_select_build_eval(tiny_mistral: Path, tmp_path: Path) -> None:
    model = f"path:{tiny_mistral}"
    few = ["--shots", "3", "--n-mean", "4", "--n-score", "2", "--heads", "3"]
    names = ["--task", "copy", "--task", "plural"]
    out = call("select", model, *names, *few, "--method", "attribution", "--out", tmp_path / "h", "--json")
    found = json.loads(out)
    assert found["tasks"] == ["copy", "plural"] and len(found["heads"]) == 3 and found["prompts"] == [2, 2]
    with pytest.raises(TransferError, match="Pass --force"):
        call("select", model, "--task", "copy", *few, "--out", tmp_path / "h")
    made = json.loads(call("build", model, tmp_path / "h", "--heads", "3", "--out", tmp_path / "v", "--json"))
    assert [row["task"] for row in made["vectors"]] == ["copy", "plural"]
    place = ["--out", tmp_path / "e.json", "--n", "3", "--n-valid", "2", "--n-texts", "2"]
    wrong = ["--wrong", tmp_path / "v" / "plural"]
    shown = call("eval", model, tmp_path / "v" / "copy", *wrong, *place, "--quiet")
    assert "zero_shot+distributed/wrong_task" in shown and "clean_icl" in shown and "instruction" in shown
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["n_test"] == 3 and record["missing"] == {} and len(record["sweep"]) == sum(record["tried"].values())


def test_another_model_is_refused(tiny_mistral: Path, tiny_llama: Path, tmp_path: Path) -> None:
    few = ["--shots", "2", "--n-mean", "2", "--n-score", "2", "--heads", "2", "--task", "copy"]
    call("select", f"path:{tiny_mistral}", *few, "--method", "gradient", "--out", tmp_path / "h", "--quiet")
    with pytest.raises(TransferError, match="mean nothing in another model"):
        call("build", f"path:{tiny_llama}", tmp_path / "h", "--heads", "2", "--out", tmp_path / "v")
    with pytest.raises(TransferError, match="There is no selector 'magic'"):
        call("select", f"path:{tiny_llama}", "--method", "magic", "--out", tmp_path / "x")
    with pytest.raises(TransferError, match="does not exist"):
        call("build", f"path:{tiny_llama}", tmp_path / "nothing", "--out", tmp_path / "v")

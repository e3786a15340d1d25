"""The command line: cheap help, exit codes, one sentence for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def transfer(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "transfer", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRANSFER_RUNS": str(cwd / "runs"), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "sae_lens", "ot", "sklearn", "pandas")
    code = f"import sys, transfer.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_lists_the_verbs(tmp_path: Path) -> None:
    start = time.monotonic()
    out = transfer("--help", cwd=tmp_path)
    assert out.returncode == 0
    for verb in ("run", "zoo", "harvest", "align", "cover", "synth", "tune", "eval", "report", "doctor", "ls"):
        assert verb in out.stdout
    assert time.monotonic() - start < 20  # a hang, not the half-second goal, which the benchmark measures


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "nowhere.yaml"], "No experiment file"),
        (["harvest", "demo", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["cover", "demo", "--set", "align.regg=1"], "did you mean"),
        (["run", "demo", "--set", "tune.recipes=[loraa]"], "lora"),
        (["run", "demo", "--set", "cover.delta=often"], "often"),
        (["report", "nowhere"], "nowhere"),
        (["ls", "nowhere"], "no folder"),
        (["harvest", "demo", "--set", "models.llama.model=path:nowhere"], "nowhere"),
        (["harvest", "demo", "--set", "models.llama.sae=zoo:qwen/sae"], "160"),
        (["harvest", "demo", "--set", "models.llama.layer=2"], "layer 3"),
        (["cover", "demo", "--json", "--set", "align.regg=1"], "did you mean"),
        (["report", "nowhere", "--quiet"], "nowhere"),
        (["run", "demo", "--set", "seed=[1"], "not valid YAML"),
        (["run", "demo", "--set", "seed=-1"], "seed"),
        (["run", "demo", "--set", "tune.seeds=[0,0,1]"], "repeats"),
        (["run", "demo", "--set", "name=.."], "name"),
        (["run", "x" * 400], "400 characters"),
        (["cover", "demo", "--set", "data.positive=bad"], "'bad'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, args: list[str], words: str) -> None:
    out = transfer(*args, cwd=tmp_path)
    assert out.returncode == 2, out.stderr
    assert words in out.stderr and "Traceback" not in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1, out.stderr
    left = [p for p in (tmp_path / "runs").rglob("*") if p.is_file() and p.name not in ("events.jsonl", "key.json")]
    assert left == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ('{"text": ""}\n', "empty"),
        ('{"text": "a b c"\n', "line 1"),
        ('{"txt": "a b c"}\n', "text"),
    ],
)
def test_bad_data(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    out = transfer("harvest", "demo", "--data", "x.jsonl", cwd=tmp_path)
    assert out.returncode == 2 and words in out.stderr.lower() and "Traceback" not in out.stderr


def test_texts_of_unknown_splits_are_named_and_half_labels_refused(tmp_path: Path) -> None:
    rows: list[dict] = [
        {"text": f"a text about {i}", "label": "ab"[i % 2], "split": s} for s in ("anchor", "val") for i in range(4)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = transfer("cover", "demo", "--data", "x.jsonl", cwd=tmp_path)
    assert out.returncode == 2 and "4 texts of split 'val' are not used" in out.stderr and "seed texts" in out.stderr
    rows[2]["label"] = None
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = transfer("cover", "demo", "--data", "x.jsonl", cwd=tmp_path)
    assert out.returncode == 2 and "1 of 4 anchor texts have no label" in out.stderr


def test_runs_are_listed_from_where_they_are_written(tmp_path: Path) -> None:
    run = tmp_path / "elsewhere" / "mine"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{")
    listed = json.loads(transfer("ls", "--json", cwd=tmp_path, TRANSFER_RUNS=str(run.parent)).stdout)["runs"]
    assert [(r["run"], r["state"]) for r in listed] == [("mine", "broken manifest")]


def test_full_or_closed_output_is_said_once_or_not_at_all(tmp_path: Path) -> None:
    command = f"{sys.executable} -m transfer"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for line, code, said in (
        (f"{command} doctor > /dev/full", 2, "Cannot write to standard output"),
        (f"{command} --help > /dev/full", 2, "standard output"),
        (f"{command} models ls | true; exit ${{PIPESTATUS[0]}}", 0, ""),
    ):
        out = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert out.returncode == code and said in out.stderr, (line, out)
        assert len(out.stderr.splitlines()) == bool(said), out.stderr


def test_json_is_json(tmp_path: Path) -> None:
    out = transfer("doctor", "--json", cwd=tmp_path)
    assert out.returncode == 0 and json.loads(out.stdout)["python"]
    assert json.loads(transfer("ls", str(tmp_path), "--json", cwd=tmp_path).stdout) == {"runs": []}


def test_a_foreign_models_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    out = subprocess.run(
        [sys.executable, "-m", "transfer", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 2 and str(tmp_path) in out.stderr

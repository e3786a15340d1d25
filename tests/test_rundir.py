"""Stages: reuse by content, resume after a kill, refusal of damaged files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from transfer.core.errors import StageError, TransferError
from transfer.core.files import read_json, replacing
from transfer.core.rundir import RunDir, finished


def test_same_inputs_are_reused(tmp_path: Path) -> None:
    calls: list[Path] = []

    def work(out: Path) -> None:
        calls.append(out)
        (out / "x.txt").write_text("1")

    first = RunDir(tmp_path, "run").stage("a", {"n": 1}, work)
    second = RunDir(tmp_path, "other").stage("a", {"n": 1}, work)
    assert first == second and len(calls) == 1
    assert RunDir(tmp_path, "run").stage("a", {"n": 2}, work) != first and len(calls) == 2


def test_a_killed_stage_goes_on(tmp_path: Path) -> None:
    def killed(out: Path) -> None:
        (out / "part1").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunDir(tmp_path, "run").stage("a", {}, killed)

    dead = subprocess.Popen(["true"])
    dead.wait()
    stage = next((tmp_path / ".store" / "a").iterdir())
    (stage / f".x.json.part{dead.pid}").write_text("half")

    def rest(out: Path) -> None:
        assert not list(out.glob(".*.part*"))
        assert (out / "part1").read_text() == "kept"
        (out / "part2").write_text("new")

    folder = RunDir(tmp_path, "run").stage("a", {}, rest)
    assert finished(folder)


@pytest.mark.parametrize("damage", ["changed", "deleted", "done-cut"])
def test_damaged_stages_are_redone(tmp_path: Path, damage: str) -> None:
    def work(out: Path) -> None:
        (out / "x.txt").write_text("right")

    folder = RunDir(tmp_path, "run").stage("a", {}, work)
    if damage == "changed":
        (folder / "x.txt").write_text("wrong")
    elif damage == "deleted":
        (folder / "x.txt").unlink()
    else:
        (folder / "DONE").write_text('{"seconds"')
    assert not finished(folder)
    RunDir(tmp_path, "run").stage("a", {}, work)
    assert (folder / "x.txt").read_text() == "right" and finished(folder)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "x.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_one_sentence(tmp_path: Path) -> None:
    import errno

    from transfer.core.errors import TransferError

    with pytest.raises(TransferError, match="No space left"), replacing(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_events_are_kept(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "run")
    run.stage("a", {}, lambda out: None, "llama")
    run.stage("a", {}, lambda out: None, "llama")
    lines = (run.path / "events.jsonl").read_text().splitlines()
    assert ['"event": "started"' in lines[0], '"event": "done"' in lines[1], '"event": "reused"' in lines[2]] == [
        True
    ] * 3
    assert read_json(run.store / run.stages["a llama"] / "key.json")["stage"] == "a"


def test_a_refused_input_leaves_nothing_behind(tmp_path):
    def refuse(out):
        raise TransferError("wrong model")

    run = RunDir(tmp_path, "r")
    run.event("cover", "command", command="transfer cover")
    with pytest.raises(TransferError, match="wrong model"):
        run.stage("cover", {"a": 1}, refuse)
    assert not run.path.exists() and not any((tmp_path / ".store" / "cover").iterdir())


def test_what_a_failed_stage_has_written_stays(tmp_path):
    def fail(out):
        (out / "cell.json").write_text("{}")
        raise StageError("one cell failed")

    def refuse_late(out):
        (out / "part.json").write_text("{}")
        raise TransferError("wrong label")

    for name, work, file in (("tune", fail, "cell.json"), ("synth", refuse_late, "part.json")):
        run = RunDir(tmp_path, name)
        run.event(name, "command", command=name)
        run.stage("harvest", {"n": name}, lambda out: None)
        with pytest.raises(TransferError):
            run.stage(name, {"a": 1}, work)
        assert list((tmp_path / ".store" / name).glob(f"*/{file}")) and (run.path / "events.jsonl").exists()

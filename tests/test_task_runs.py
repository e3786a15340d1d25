"""One task on its own data from the command line: every task trains, is judged, opened again, and its data counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from models.chat import Answer
from transfer.cli import app
from transfer.core.errors import TransferError
from transfer.tasks.answers import compare, write_answers
from transfer.train.task_runs import judge_again, reopen

torch.set_num_threads(1)

THINGS = ["tea", "rain", "bread", "cake", "music", "snow", "ink", "the sea", "a dog", "the moon", "a bicycle", "bees"]


def rows_of(task: str) -> list[dict[str, Any]]:
    """A dozen good rows in the task's layout."""
    if task == "toxicity":
        return [{"text": f"{'you fool' if i % 2 else 'thank you'}, {t}", "toxic": i % 2} for i, t in enumerate(THINGS)]
    if task == "reward":
        return [{"prompt": f"Tell me about {t}.", "chosen": f"Gladly: {t}.", "rejected": "No."} for t in THINGS]
    if task == "instruction":
        return [{"instruction": f"Tell me about {t}.", "output": f"I like {t}."} for t in THINGS]
    text = "I like {}. Do you?\n\nChoices:\n (A) Yes, {}\n (B) No, not {}"
    asked = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    return [dict(zip(asked, (text.format(t, t, t), "(A)", "(B)"), strict=True)) for t in THINGS]


BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "reward": [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal answers"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "empty answer"),
    ],
    "instruction": [
        ({"instruction": "q", "output": ""}, "empty answer"),
        ({"instruction": " ", "output": "a"}, "empty question"),
        (rows_of("instruction")[0], "repeated"),
    ],
    "steering": [
        (rows_of("steering")[0], "repeated"),
        ({**rows_of("steering")[0], "question": "No letters"}, "no lettered answers"),
        ({**rows_of("steering")[1], "answer_matching_behavior": "(Z)"}, "answer is none of the letters"),
    ],
}
OPTIONS = {"toxicity": {"layout": "surge", "draws": 20}, "steering": {"layers": [2], "length": 2.0, "neutral": []}}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf8")
    return str(path)


def experiment(folder: Path, ref: str, task: str, recipe: str = "head") -> str:
    tune = {"task": task, "recipes": [recipe], "seeds": [0, 1, 2], "options": OPTIONS.get(task, {})}
    data = {"name": "own", "models": {"tiny": {"model": ref, "sae": f"{ref}/sae"}}, "tune": tune}
    (folder / "own.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "own.yaml")


def call(*args: str) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


@pytest.mark.parametrize("task", ["toxicity", "reward", "instruction", "steering"])
def test_every_task_runs_counts_and_is_used_again(task, tiny_qwen, tmp_path):
    ref, bad = f"path:{tiny_qwen}", BAD.get(task, [])
    config = experiment(tmp_path, ref, task)
    rows = rows_of(task)
    train = write(tmp_path / "train.jsonl", rows[:8] + [row for row, _ in bad])
    held = write(tmp_path / "held.jsonl", rows[8:])
    command = ["tune", "task", config, "--model", "tiny", "--train", train, "--evaluation", held]
    found = call(*command, "--out", str(tmp_path / "out"))
    assert len(found["runs"]) == 3
    for record in found["runs"]:
        (data,) = record["train"]
        assert data["n"] == 8 and data["left_out"] == {reason: 1 for _, reason in bad}
        assert record["evaluation"]["n"] == 4 and record["run"]["data_hash"] and record["run"]["base_hash"]
        for e in record["evals"]:
            assert e["n"] >= 4 and "stderr" in e and e["template"] and e["per_example"] == "examples.jsonl"
    folder = tmp_path / "out" / "head-seed0"
    assert len((folder / "examples.jsonl").read_text().splitlines()) == 4
    assert list((folder / "model").glob("*.safetensors"))
    before = (folder / "results.json").stat().st_mtime_ns
    again = call(*command, "--out", str(tmp_path / "out"))
    assert again == found and (folder / "results.json").stat().st_mtime_ns == before, "finished runs are not repeated"
    evals, about = judge_again(folder, held)
    assert [(e.metric, e.value) for e in evals] == [(e["metric"], e["value"]) for e in found["runs"][0]["evals"]]
    assert about["n"] == 4 and Path(about["per_example"]).is_file()
    shown = call("eval", "task", str(folder), "--evaluation", held)
    assert shown["evals"][0]["value"] == evals[0].value
    if task == "toxicity":
        with pytest.raises(TransferError, match="8 of 8 evaluation texts were trained on, first number 0"):
            call(*command[:-1], train, "--out", str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()
    else:
        with pytest.raises(TransferError, match="were (trained on|used to find)"):
            judge_again(folder, train)


def test_another_recipe_or_other_data_is_trained_anew(tiny_qwen, tmp_path):
    config = experiment(tmp_path, f"path:{tiny_qwen}", "reward")
    rows = rows_of("reward")
    held = write(tmp_path / "held.jsonl", rows[8:])
    command = ["tune", "task", config, "--model", "tiny", "--evaluation", held, "--out", str(tmp_path / "out")]
    one = call(*command, "--train", write(tmp_path / "a.jsonl", rows[:4]))
    two = call(*command, "--train", str(tmp_path / "a.jsonl"), "--train", write(tmp_path / "b.jsonl", rows[4:8]))
    assert [r["run"]["n_examples"] for r in (one["runs"][0], two["runs"][0])] == [4, 8]
    assert one["runs"][0]["key"] != two["runs"][0]["key"]
    scores = tmp_path / "out" / "head-seed0" / "examples.jsonl"
    scores.write_text("changed\n")
    three = call(*command, "--train", str(tmp_path / "a.jsonl"), "--train", str(tmp_path / "b.jsonl"))
    assert three["runs"] == two["runs"] or three["runs"][0]["evals"] == two["runs"][0]["evals"]
    assert scores.read_text() != "changed\n"


def test_what_is_missing_is_one_sentence(tiny_qwen, tmp_path):
    config = experiment(tmp_path, f"path:{tiny_qwen}", "reward")
    for args, words in [
        (["--model", "tinny"], "no model 'tinny'.*tiny"),
        ([], "No model is named.*tiny"),
        (["--model", "tiny"], "names no train data for reward"),
        (["--model", "tiny", "--train", "x.jsonl"], "names no evaluation data"),
        (["--model", "tiny", "--train", "x.jsonl", "--evaluation", "y.jsonl"], "x.jsonl does not exist"),
        (
            ["--model", "tiny", "--set", "tune.recipes=[heed]", "--train", "x", "--evaluation", "y"],
            "Did you mean 'head'",
        ),
    ]:
        with pytest.raises(TransferError, match=words):
            call("tune", "task", config, *args)
    with pytest.raises(TransferError, match="holds no trained task"):
        reopen(tmp_path)


class Judge:
    """Prefers the longer answer, whichever stands first."""

    name = "scripted"

    def complete(self, chats):
        said = []
        for chat in chats:
            a, b = chat.messages[1][1].split("Answer A:\n")[1].split("\n\nWhich answer")[0].split("\n\nAnswer B:\n")
            said.append(Answer(f"Verdict: {'A' if len(a) > len(b) else 'B'}", 1, 1))
        return said


def test_answers_are_written_for_alpaca_eval_and_compared(tiny_qwen, tmp_path):
    config = experiment(tmp_path, f"path:{tiny_qwen}", "instruction")
    rows = rows_of("instruction")
    train, held = (write(tmp_path / f"{n}.jsonl", part) for n, part in (("t", rows[:8]), ("h", rows[8:])))
    call(
        "tune", "task", config, "--model", "tiny", "--train", train, "--evaluation", held, "--out", str(tmp_path / "o")
    )
    folder, out = tmp_path / "o" / "head-seed0", tmp_path / "mine.json"
    found = call("eval", "answers", str(folder), "--prompts", held, "--out", str(out), "--max-new-tokens", "5")
    assert found["n"] == 4
    mine = json.loads(out.read_text())
    assert [set(row) for row in mine] == [{"instruction", "output", "generator", "dataset"}] * 4
    assert [row["instruction"] for row in mine] == [row["instruction"] for row in rows[8:]]
    theirs = [{**row, "output": "x" * 400 if i < 3 else ""} for i, row in enumerate(mine)]
    theirs.append({"instruction": "another", "output": "x"})
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "mine.json").write_text(json.dumps([{**row, "output": "12345"} for row in mine]))
    rate = compare(out, tmp_path / "theirs.json", Judge())  # type: ignore[arg-type]
    assert (rate["win_rate"], rate["win_rate_n"], rate["n_not_shared"], rate["consistency"]) == (0.25, 4, 1, 1.0)
    judged = [json.loads(line) for line in Path(rate["per_example"]).read_text().splitlines()]
    assert [row["score"] for row in judged] == [0, 0, 0, 1]
    with pytest.raises(TransferError, match="has no instruction"):
        write_answers(folder, write(tmp_path / "bad.jsonl", [{"question": "x"}]), out, 5)
    (tmp_path / "twice.json").write_text(json.dumps([mine[0], mine[0]]))
    with pytest.raises(TransferError, match="1 instructions twice"):
        compare(tmp_path / "twice.json", out, Judge())  # type: ignore[arg-type]

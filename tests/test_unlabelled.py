"""The way of three of the 8B presets: texts without labels, a served judge and writer, then the task on its own."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.test_endpoint import Reply, completion, serving
from transfer.cli import app
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.pipeline import Pipeline

NOUNS = ("bread", "boats", "rain", "poems", "knives", "bees")
SERIAL = itertools.count()
FIELDS = {"preference": "rejected", "ab": "not_matching", "instruction": "response"}
"""A field by which each kind of example is known."""
HELD: dict[str, list[dict[str, str]]] = {
    "reward": [{"prompt": f"What of {x}?", "chosen": f"Gladly: {x}.", "rejected": "No idea."} for x in NOUNS],
    "steering": [
        {"prompt": f"What of {x}?\n (A) Good, {x}\n (B) Bad, {x}", "correct": "(A)", "incorrect": "(B)"} for x in NOUNS
    ],
    "instruction": [{"prompt": f"What of {x}?", "completion": f"I like {x}."} for x in NOUNS],
}


def example(form: str, noun: str) -> dict[str, str]:
    """One example as a writer would give it; no two are alike."""
    ask = f"Tell me how people like {noun}, number {next(SERIAL)}, please."
    if form == "preference":
        return {"prompt": ask, "chosen": f"Gladly, people like {noun} much.", "rejected": f"No idea about {noun}."}
    if form == "instruction":
        return {"instruction": ask, "response": f"Gladly, people like {noun} very much."}
    return {"question": f"{ask}\n (A) Yes, {noun}\n (B) No, not {noun}", "matching": "(A)", "not_matching": "(B)"}


def obedient(body: dict[str, Any], _: int) -> Reply:
    """Judges in the asked form, and writes as many examples as are asked for."""
    asked = body["messages"][1]["content"]
    if match := re.search(r"JSON array of (\d+) object", asked):
        form = next(f for f, field in FIELDS.items() if f'"{field}"' in asked)
        return completion(json.dumps([example(form, noun) for noun in NOUNS[: int(match[1])]]))
    kind = re.findall(r"\n(Concept|Fit|Relevant):", asked)[-1]
    return completion(f"Well.\n{kind}: { {'Concept': 'likes', 'Fit': 'Yes', 'Relevant': 'Yes'}[kind] }")


def call(*args: str) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("form", "task"),
    [
        ("preference", "reward"),
        pytest.param("ab", "steering", marks=pytest.mark.slow),
        pytest.param("instruction", "instruction", marks=pytest.mark.slow),
    ],
)
def test_examples_are_written_for_unlabelled_texts_and_trained_on(
    form: str, task: str, tiny_llama: Path, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TRANSFER_PLACES", "{}")
    for split, n in (("anchor", 60), ("seed", 4)):
        rows = [{"text": f"Tell me {'how' if i % 2 else 'why'} people like {NOUNS[i % 6]} {i}."} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf8")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in HELD[task]), "utf8")
    models = {n: {"model": f"path:{f}", "sae": f"path:{f}/sae"} for n, f in (("a", tiny_llama), ("b", tiny_qwen))}
    with serving(obedient) as stub:
        config = {
            "name": "pairs",
            "processes": 1,
            "models": models,
            "data": {"source": None, **{s: str(tmp_path / f"{s}.jsonl") for s in ("anchor", "seed")}, "positive": ""},
            "align": {"methods": ["activation"], "use": "activation", "q_value": 1.0},
            "judge": {"kind": "endpoint", "base_url": stub.url, "model": "m", "rubric": "helpfulness", "spans": 2},
            "cover": {"delta": "constant:0", "min_docs": 2},
            "synth": {
                "generator": "chat",
                "chat": f"{stub.url}#m",
                "format": form,
                "features": 4,
                "budget": 6,
            },
            "tune": {
                "task": task,
                "recipes": ["head"],
                "seeds": [0, 1, 2],
                "evaluation": str(tmp_path / "held.jsonl"),
                "options": {"layers": [2], "neutral": []} if task == "steering" else {},
            },
        }
        file = tmp_path / "pairs.yaml"
        file.write_text(yaml.safe_dump(config))
        found = call("synth", str(file))
        assert any(row["n_kept"] for row in found["synthesis"])
        with pytest.raises(TransferError, match="`transfer tune task`"):
            Pipeline(load_experiment(file), tmp_path / "runs", []).run("run")
    writer = next(row["writer"] for row in found["synthesis"] if row["n_kept"])
    exported = call(
        "synth",
        "export",
        str(tmp_path / "runs" / "pairs"),
        "--model",
        writer,
        "--out",
        str(tmp_path / "t"),
        "--to",
        "trl",
    )
    trained = call("tune", "task", str(file), "--model", writer, "--train", str(tmp_path / "t" / "synthetic.jsonl"))
    (data,) = trained["runs"][0]["train"]
    assert data["n"] + sum(data["left_out"].values()) == exported["n_rows"] > 0
    assert trained["runs"][0]["evals"][0]["n"] == 6

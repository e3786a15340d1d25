"""An experiment is checked before it runs: all problems at once, true shapes without weights, estimates that count."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from typer.testing import CliRunner

from models.headers import model_header, sae_header
from transfer.check import check
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.estimate import GIB, Side, training_gib
from transfer.hub import UnreachableError
from transfer.train.recipes import Recipe

SHAPES: dict[str, tuple[Any, int]] = {
    # Configuration with the true shapes, and the parameters the published model has.
    "llama": (
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        8_030_261_248,
    ),
    "mistral": (
        MistralConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        7_241_732_096,
    ),
    "qwen": (
        Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        7_615_616_512,
    ),
}


def big(folder: Path, *, width: int = 65536, device: str = "cuda", **changes: Any) -> Path:
    """An experiment on the paper's three models and SAEs: configurations only, weights are empty files."""
    models = {}
    for name, (config, _) in SHAPES.items():
        model, sae = folder / name, folder / name / "sae"
        config.save_pretrained(model)
        (model / "model.safetensors").write_bytes(b"")
        sae.mkdir()
        layer = config.num_hidden_layers // 2
        cfg = {
            "architecture": "topk",
            "d_in": config.hidden_size,
            "d_sae": width,
            "k": 20,
            "metadata": {"layer": layer},
        }
        (sae / "cfg.json").write_text(json.dumps(cfg))
        (sae / "sae_weights.safetensors").write_bytes(b"")
        models[name] = {"model": f"path:{model}", "sae": f"path:{sae}", "dtype": "bfloat16", "device": device}
    file = folder / "big.yaml"
    settings = {"name": "big", "models": models, "align": {"methods": ["fused"], "use": "fused"}, **changes}
    file.write_text(yaml.safe_dump(settings))
    return file


def test_true_shapes_are_counted_without_weights(tmp_path):
    file = big(tmp_path)
    for name, (config, parameters) in SHAPES.items():
        header = model_header(f"path:{tmp_path / name}")
        assert header.n_params == parameters and header.n_layers == config.num_hidden_layers
        assert 0.4 < (header.lower(config.num_hidden_layers // 2) or 0) / parameters < 0.5
    found = check(load_experiment(file), tflops=100.0)
    assert found.problems == []
    rows = {row["name"]: row for row in found.models}
    assert rows["llama"]["weights_gib"] == pytest.approx(2 * 8_030_261_248 / 2**30)
    assert rows["qwen"]["sae_gib"] == pytest.approx(2 * 4 * 3584 * 65536 / 2**30)
    assert rows["qwen"]["layer"] == 14 and rows["llama"]["layer"] == 16
    stages = {row["stage"]: row for row in found.stages}
    assert 1 < stages["align llama-qwen fused"]["memory_gib"] < 6
    # 2 FLOP a parameter and token up to the layer, and the encoder.
    llama = rows["llama"]
    lower = model_header(f"path:{tmp_path / 'llama'}").lower(16) or 0
    assert stages["harvest llama"]["tflop"] == pytest.approx(2 * llama["tokens"] * (lower + 4096 * 65536) / 1e12)
    assert stages["tune llama"]["hours"] == pytest.approx(stages["tune llama"]["tflop"] / 100 / 3600)


def test_all_problems_at_once(tmp_path):
    align = {"methods": ["fused", "sinkhorn"], "use": "sinkhorn"}
    file = big(tmp_path, width=131072, align=align, tune={"recipes": ["head", "lorra"]})
    data = yaml.safe_load(file.read_text())
    data["models"]["llama"]["layer"] = 12
    data["models"]["mistral"]["sae"] = f"path:{tmp_path / 'qwen' / 'sae'}"
    data["models"]["qwen"]["sae"] = "saelens:llama_scope_lxm_8x/l3m_8x"
    (tmp_path / "llama" / "model.safetensors").unlink()
    file.write_text(yaml.safe_dump(data))
    problems = check(load_experiment(file), tflops=1.0).problems
    for expected in (
        "Unknown recipe 'lorra'",
        "trained on layer 16, the configuration says layer 12",
        "reads a residual stream of width 3584, but that of path:.*mistral is 4096 wide",
        "reads the output of an MLP",
        "weights of path:.*llama are missing",
        "`sinkhorn` takes at most 4,096",
    ):
        assert any(re.search(expected, p) for p in problems), (expected, problems)
    assert len(problems) == 6


def test_the_demo_passes_and_its_counts_are_near_the_truth():
    found = check(load_experiment("demo"), tflops=0.1)
    assert found.problems == [] and found.notes == []
    tokens = {row["name"]: row["tokens"] for row in found.models}
    # What the demo's harvest counts.
    assert tokens == {
        "llama": pytest.approx(29349, rel=0.02),
        "mistral": pytest.approx(30334, rel=0.02),
        "qwen": pytest.approx(28234, rel=0.02),
    }


def test_what_is_on_the_hub_is_said_not_guessed(tmp_path):
    file = big(tmp_path)
    data = yaml.safe_load(file.read_text())
    data["models"]["llama"] = {
        "model": "hub:meta-llama/Llama-3.3-70B-Instruct@main",
        "sae": "saelens:goodfire-llama-3.1-8b-instruct/layer_19",
    }
    file.write_text(yaml.safe_dump(data))
    found = check(load_experiment(file), tflops=1.0)
    notes = " ".join(found.notes)
    assert "was trained on meta-llama/Llama-3.1-8B-Instruct, not on meta-llama/Llama-3.3-70B-Instruct" in notes
    assert "are on the Hub, they were not looked at" in notes and "no time is estimated" in notes
    assert found.problems == []
    with pytest.raises(TransferError, match="could not be read"):
        model_header("hub:gpt2@main")
    with pytest.raises(TransferError, match="No release saelens:nothing/here"):
        sae_header("saelens:nothing/here")


@pytest.mark.parametrize("task", ["toxicity", "reward", "steering", "instruction"])
def test_the_presets_of_8b_models_pass_without_a_network(task, monkeypatch):
    """Nothing of it is cached: shapes are still the true ones, and the rest is said to be unseen."""
    monkeypatch.setattr("transfer.hub.load_hub", unreachable)
    experiment = load_experiment(f"{task}-8b")
    assert experiment.tune.task == task
    found = check(experiment)
    assert found.problems == []
    rows = {row["name"]: row for row in found.models}
    assert {n: rows[n]["parameters"] for n in SHAPES} == {n: count for n, (_, count) in SHAPES.items()}
    assert {n: (rows[n]["layer"], rows[n]["features"]) for n in SHAPES} == {
        "llama": (16, 65536),
        "mistral": (16, 65536),
        "qwen": (14, 65536),
    }
    assert {row["device"] for row in found.memory} == {"cuda:0", "cuda:1", "cuda:2"}
    assert all(10 < row["gib"] < 79 for row in found.memory), "an 80 GB GPU holds each"
    assert all(row["hours"] > 0 for row in found.stages)
    stages = {row["stage"] for row in found.stages}
    assert ("tune llama" in stages) == (task == "toxicity")
    assert ("tune task base" in stages) == (task == "instruction")
    assert sum("is not here" in note for note in found.notes) == (3 if task == "toxicity" else 4)


def unreachable(ref: str) -> Any:
    raise UnreachableError(f"Cannot load {ref}.")


def test_memory_of_fine_tuning_is_counted_by_hand(tmp_path):
    llama = model_header(f"path:{big(tmp_path).parent / 'llama'}")
    gpu, cpu = (Side("llama", llama, None, 16, "bfloat16", device) for device in ("cuda", "cpu"))
    weights = 4 * 8_030_261_248 / GIB
    head = Recipe("h", "head", epochs=1, lr=1.0, batch=4)
    assert training_gib(gpu, head, "toxicity") == pytest.approx(weights)
    assert training_gib(cpu, head, "toxicity") == pytest.approx(2 * weights), "a processor trains a copy"
    lora = Recipe("l", "lora", epochs=1, lr=1.0, batch=8, accumulate=2, max_tokens=100, dtype="bfloat16")
    kept = 4 * 100 * 4096 * 32 * 34 / GIB
    assert training_gib(gpu, lora, "toxicity") == pytest.approx(weights + kept)
    assert training_gib(gpu, lora, "reward") == pytest.approx(weights + 2 * kept)
    thin = dataclasses.replace(lora, checkpointing=True)
    assert training_gib(gpu, thin, "toxicity") == pytest.approx(weights + 4 * 100 * 4096 * (32 * 2 + 34) / GIB)
    full = dataclasses.replace(lora, kind="full")
    assert training_gib(gpu, full, "toxicity") == pytest.approx(5 * weights + kept)


def test_what_does_not_fit_is_a_problem(tmp_path):
    problems = check(load_experiment(big(tmp_path, device="cpu")), tflops=1.0).problems
    assert len(problems) == 1 and re.search(r"llama, mistral, qwen on cpu need about \d+ GiB", problems[0])


def test_settings_that_nothing_would_read_are_problems():
    problems = check(load_experiment("demo", ["tune.evaluation=x.jsonl"]), tflops=0.1).problems
    assert any("does not read tune.evaluation" in p for p in problems)
    problems = check(load_experiment("demo", ["tune.options.draws=5"]), tflops=0.1).problems
    assert len(problems) == 1 and "does not read tune.options" in problems[0]
    problems = check(
        load_experiment("demo", ["tune.task=steering", "tune.options.layer=[1]", "tune.train=missing.json"])
    ).problems
    assert any("no option 'layer'" in p and "'layers'" in p for p in problems)
    task = load_experiment("demo", ["tune.task=reward", "tune.train=missing.jsonl"])
    assert any("missing.jsonl does not exist" in p for p in check(task, tflops=0.1).problems)


def test_check_on_the_command_line(tmp_path):
    from transfer.__main__ import main  # noqa: F401 - the entry point that turns errors into sentences
    from transfer.cli import app

    file = big(tmp_path, tune={"recipes": ["lorra"]})
    result = CliRunner().invoke(app, ["check", str(file), "--json", "--tflops", "10"])
    data = json.loads(result.stdout)
    assert not data["ok"] and isinstance(result.exception, TransferError) and "1 problem" in str(result.exception)
    good = CliRunner().invoke(app, ["check", "demo", "--tflops", "10"])
    assert good.exit_code == 0 and "ok: yes" in good.stdout

"""An experiment is checked before it runs: all problems at once, true shapes without weights, estimates that count."""

from __future__ import annotations

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
from transfer.core.config import load_experiment
from transfer.core.errors import TransferError

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


def big(folder: Path, *, width: int = 65536, **changes: Any) -> Path:
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
        models[name] = {"model": f"path:{model}", "sae": f"path:{sae}"}
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
    assert rows["llama"]["weights_gib"] == pytest.approx(29.9, abs=0.1)
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
        "model": "hub:meta-llama/Meta-Llama-3-8B-Instruct@main",
        "sae": "saelens:llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1",
    }
    file.write_text(yaml.safe_dump(data))
    found = check(load_experiment(file), tflops=1.0)
    notes = " ".join(found.notes)
    assert "was trained on meta-llama/Llama-3.1-8B-Instruct, not on meta-llama/Meta-Llama-3-8B-Instruct" in notes
    assert "are on the Hub, they were not looked at" in notes and "no time is estimated" in notes
    assert found.problems == []
    with pytest.raises(TransferError, match="could not be read"):
        model_header("hub:gpt2@main")
    with pytest.raises(TransferError, match="No release saelens:nothing/here"):
        sae_header("saelens:nothing/here")


def test_check_on_the_command_line(tmp_path):
    from transfer.__main__ import main  # noqa: F401 - the entry point that turns errors into sentences
    from transfer.cli import app

    file = big(tmp_path, tune={"recipes": ["lorra"]})
    result = CliRunner().invoke(app, ["check", str(file), "--json", "--tflops", "10"])
    data = json.loads(result.stdout)
    assert not data["ok"] and isinstance(result.exception, TransferError) and "1 problem" in str(result.exception)
    good = CliRunner().invoke(app, ["check", "demo", "--tflops", "10"])
    assert good.exit_code == 0 and "ok: yes" in good.stdout

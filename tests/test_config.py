"""Configuration errors are one clear sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment

MODELS = "models:\n  a: {model: 'zoo:llama', sae: 'zoo:llama/sae'}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text, "utf8")
    return path


def test_demo_preset_loads() -> None:
    experiment = load_experiment("demo")
    assert isinstance(experiment, Experiment)
    assert set(experiment.models) == {"llama", "mistral", "qwen"}


def test_set_overrides() -> None:
    assert load_experiment("demo", ["align.reg=0.2", "tune.seeds=[1,2,3]"]).align.reg == 0.2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nalgin: {}\n" + MODELS, ["unknown key `algin`", "did you mean `align`"]),
        ("name: x\nalign: {regg: 1}\n" + MODELS, ["`align.regg`", "did you mean `reg`"]),
        (
            "name: x\nmodels:\n  a: {model: m, saee: s}\n",
            ["`models.a.saee`", "did you mean `sae`", "`models.a.sae` is missing"],
        ),
        ("name: x\nalign: {use: map, methods: [activation]}\n" + MODELS, ["align.use"]),
        ("name: x\ntune: {seeds: [1]}\n" + MODELS, ["`tune.seeds`: give at least 3, it has 1"]),
        (
            "name: x\ntune: {seeds: [0, 1, a]}\n" + MODELS,
            ["x.yaml: `tune.seeds.2`: should be a whole number, got 'a'."],
        ),
        ("name: x\nalign: 3\n" + MODELS, ["`align`: should be a section of keys and values, got 3"]),
        ("name: [1\n", ["not valid YAML at line 2, column 1", "begins at line 1, column 7"]),
        ("name: \0\n", ["not valid YAML: unacceptable character"]),
        ("just text", ["keys and values"]),
        ("name: a/b\n" + MODELS, ["`name`"]),
    ],
)
def test_problems_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(TransferError) as error:
        load_experiment(write(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(TransferError) as error:
        load_experiment(write(tmp_path, "name: x\nfoo: 1\nalign: {reg: -1}\n" + MODELS))
    assert "`foo`" in str(error.value) and "`align.reg`" in str(error.value)


def test_missing_file_names_presets() -> None:
    with pytest.raises(TransferError, match="demo"):
        load_experiment("nowhere.yaml")


def test_bad_override() -> None:
    with pytest.raises(TransferError, match="key=value"):
        load_experiment("demo", ["align.reg"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["tune.arms=[own, full]"], "tune.arms lacks seed_only"),
        (["tune.arms=[seed_only, own, own]"], "tune.arms repeats a value"),
        (["tune.arms=[seed_only, best]"], "tune.arms.1"),
        (
            ["tune.writers=all", "synth.generator=chat", "synth.chat=local:zoo:llama"],
            "one chat model writes everything",
        ),
        (["data.draw={anchor: 5, seed: 2, evaluation: 5, facet: 3}"], "did you mean `facets`"),
    ],
)
def test_grids_that_make_no_sense_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(TransferError, match=words):
        load_experiment("demo", settings)

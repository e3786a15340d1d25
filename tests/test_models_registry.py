"""Published SAEs: every release of the three families resolves to a model, a canonical layer and a verdict."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from models.fac import fac_file
from models.registry import (
    DEPTH,
    MODELS,
    comparable_pairs,
    find_sae,
    hub_id,
    known_model,
    known_saes,
    select_saes,
    summary,
)
from models.sae import Dictionary
from transfer.core.errors import TransferError


def test_every_release_of_the_families_is_known():
    """No release of SAELens' registry on a LLaMA, Mistral or Qwen model is left out."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    ours = {r for r, e in directory.items() if any(w in e.model.casefold() for w in ("llama", "mistral", "qwen"))}
    listed = Counter(
        s.ref.removeprefix("saelens:").partition("/")[0] for s in known_saes() if s.ref.startswith("saelens:")
    )
    assert set(listed) == ours and len(ours) >= 35
    assert all(listed[r] == len(directory[r].saes_map) for r in ours)


@pytest.mark.parametrize(
    ("ref", "model", "layer"),
    [
        ("saelens:llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1", "meta-llama/Llama-3.1-8B-Instruct", 16),
        ("saelens:llama_scope_lxr_8x/l15r_8x", "meta-llama/Llama-3.1-8B", 16),
        ("saelens:mistral-7b-res-wg/blocks.16.hook_resid_pre", "mistralai/Mistral-7B-v0.1", 16),
        ("saelens:goodfire-llama-3.1-8b-instruct/layer_19", "meta-llama/Llama-3.1-8B-Instruct", 20),
        ("saelens:llama-3-8b-it-res-jh/blocks.25.hook_resid_post", "meta-llama/Meta-Llama-3-8B-Instruct", 26),
        ("saelens:qwen-scope-3-8b-base-w64k-l50/layer0", "Qwen/Qwen3-8B-Base", 1),
        ("saelens:llama_scope_r1_distill/l0r_800m_slimpajama", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 1),
        ("fac:Zhongzhi1228/sae_llama_l16_h65536", "meta-llama/Llama-3.1-8B-Instruct", 16),
        ("fac:Zhongzhi1228/sae_qwen_l14_h65536", "Qwen/Qwen2-7B-Instruct", 14),
    ],
)
def test_layers_are_hidden_states_indices(ref: str, model: str, layer: int):
    """The same place has one number, however a release counts: FAC l16, andyrdt layer 15, resid_pre 16."""
    found = find_sae(ref)
    assert found is not None and (found.model, found.layer, found.refused) == (model, layer, "")


def test_layers_stay_inside_their_models():
    depth = {m.hub: m.n_layers for m in MODELS}
    for sae in known_saes():
        assert 0 <= sae.layer <= depth[sae.model] and sae.depth == sae.layer / depth[sae.model]


def test_what_is_no_residual_sae_is_refused_with_the_reason():
    why = {s.ref: s.refused for s in known_saes()}
    assert "MLP" in why["saelens:llama_scope_lxm_8x/l3m_8x"]
    assert "attention" in why["saelens:llama_scope_lxa_8x/l3a_8x"]
    assert "transcoder" in why["saelens:mwhanna-qwen3-4b-transcoders/layer_7"]
    assert "sequences" in why["saelens:temporal-sae-llama-3.1-8b/blocks.15.hook_resid_post"]
    assert not any(s.refused for s in select_saes()) and any(s.refused for s in select_saes(usable=False))


def test_placeholders_of_the_registry_are_not_expectations():
    known = {s.ref: (s.l0, s.explained) for s in known_saes()}
    assert known["saelens:mistral-7b-res-wg/blocks.8.hook_resid_pre"] == (92, 0.94)
    assert known["saelens:llama-3.1-8b-instruct-andyrdt/resid_post_layer_3_trainer_1"] == (None, None)
    assert known["saelens:goodfire-llama-3.1-8b-instruct/layer_19"] == (91, None)


def test_pairs_across_families_are_at_like_depth_and_of_one_kind():
    pairs = comparable_pairs()
    assert pairs
    for pair in pairs:
        a, b = pair.source, pair.target
        assert a.family != b.family and a.chat == b.chat and pair.apart <= DEPTH and not (a.refused or b.refused)
    # The two that share recipe and width on chat models: FAC's own, and one author's LLaMA and Qwen.
    best = {frozenset(s.partition("/")[0].partition("-")[0] for s in (p.source.ref, p.target.ref)) for p in pairs[:7]}
    assert best == {frozenset({"fac:Zhongzhi1228"}), frozenset({"saelens:llama", "saelens:qwen2.5"})}
    fac = {
        frozenset((p.source.family, p.target.family))
        for p in pairs
        if p.source.ref.startswith("fac:") and p.target.ref.startswith("fac:")
    }
    assert fac == {frozenset(x) for x in (("LLaMA", "Mistral"), ("LLaMA", "Qwen"), ("Mistral", "Qwen"))}


def test_short_names_lead_to_hub_ids():
    assert hub_id("mistral-7b") == "mistralai/Mistral-7B-v0.1"
    assert hub_id("qwen3-8b") == "Qwen/Qwen3-8B"
    assert hub_id("someone/else") == "someone/else"
    assert known_model("META-LLAMA/llama-3.1-8b") is not None
    names = [n.casefold() for m in MODELS for n in (m.hub, *m.short)]
    assert len(names) == len(set(names))


def test_selection_and_its_errors():
    assert {s.family for s in select_saes(family="mistral")} == {"Mistral"}
    assert {s.layer for s in select_saes(model="Qwen/Qwen2.5-7B-Instruct", layer=16)} == {16}
    assert {s.model for s in select_saes(model="Qwen3.5")} >= {"Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-2B-Base"}
    with pytest.raises(TransferError, match="no family 'gpt'"):
        select_saes(family="gpt")
    with pytest.raises(TransferError, match="No SAE is known of 'gpt2'"):
        select_saes(model="gpt2")
    (row,) = summary(select_saes(model="Qwen/Qwen2.5-7B-Instruct"))
    assert row["layers"] == "4, 8, 12, 16, 20, 24, 28" and row["n"] == 7


@pytest.mark.parametrize(
    "args",
    [[], ["--pairs"], ["--layer", "16", "--family", "llama"], ["--pairs", "--model", "mistral-7b", "--limit", "3"]],
)
def test_models_ls(args: list[str]):
    from transfer.cli import app

    plain = CliRunner().invoke(app, ["models", "ls", *args])
    assert plain.exit_code == 0 and plain.stdout.strip()
    data = json.loads(CliRunner().invoke(app, ["models", "ls", *args, "--json"]).stdout)
    rows = data.get("saes") or data["pairs"]
    assert rows
    if "--model" in args:
        assert len(rows) == 3 and all("mistral" in r["source"] + r["target"] for r in rows) and data["n"] > 3


def test_fac_references(tmp_path):
    file = tmp_path / "TopK7_l16_h4096_epoch3.pth"
    file.write_bytes(b"x")
    assert fac_file(str(file)) == file
    with pytest.raises(TransferError, match="There is no FAC checkpoint .*absent.pth"):
        fac_file(str(tmp_path / "absent.pth"))
    with pytest.raises(TransferError, match="could not be fetched"):
        fac_file("someone/nothing")
    with pytest.raises(TransferError, match="could not be read as a checkpoint"):
        Dictionary.load(f"fac:{file}")


def test_fac_repository_is_searched_for_its_one_checkpoint(tmp_path, monkeypatch):
    import huggingface_hub

    listed = ["README.md", "TopK7_l14_h3584_epoch3.pth"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision=None: str(tmp_path / file))
    assert fac_file("a/b@main").name == "TopK7_l14_h3584_epoch3.pth"
    listed.append("second.pth")
    with pytest.raises(TransferError, match="holds 2 checkpoints"):
        fac_file("a/b")

"""The bundled zoo: small enough, described by its cards, differing as real families do, and guarded against mix-ups."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from models.adapter import Adapter
from models.language import LanguageModel
from models.zoo.card import check_cards
from transfer.core.errors import TransferError
from transfer.core.files import file_hash

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "models" / "zoo"
MEMBERS = ("llama", "mistral", "qwen")


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {name: Adapter.load(f"zoo:{name}", f"zoo:{name}/sae") for name in MEMBERS}


def test_the_zoo_is_small() -> None:
    files = [p for p in ZOO.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 40e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_cards_hold_what_they_promise() -> None:
    for name in MEMBERS:
        card = json.loads((ZOO / name / "card.json").read_text("utf8"))
        assert card["texts"]["bundled"] == file_hash(ROOT / "transfer" / "data" / "requests.jsonl")
        assert card["training"]["tokens_seen"] > 0 and card["data"]
        for quality in card["measured"]["sae"].values():
            for texts in ("bundled_evaluation", "public_held_out"):
                assert {"nmse", "l0", "dead", "ce_recovered"} <= set(quality[texts])
                assert quality[texts]["ce_recovered"] > 0.9
        assert card["measured"]["bits_per_byte"]["public_held_out"] < 2


def test_evaluation_sees_what_does_not_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The summary too, which is what reports quote; and what cannot be measured without the public texts is said."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for path in (ZOO / "llama").iterdir():
        if path.name != "card.json":
            (folder / path.name).symlink_to(path)
    card = json.loads((ZOO / "llama" / "card.json").read_text("utf8"))
    bundled = copy.deepcopy(
        {
            "bits_per_byte": {"bundled_evaluation": card["measured"]["bits_per_byte"]["bundled_evaluation"]},
            "sae": {k: {"bundled_evaluation": v["bundled_evaluation"]} for k, v in card["measured"]["sae"].items()},
        }
    )
    monkeypatch.setattr("models.zoo.card.ZOO_FOLDER", tmp_path)
    monkeypatch.setattr("models.zoo.card.measure", lambda folder, data: bundled)

    def wrong() -> list[str]:
        (folder / "card.json").write_text(json.dumps(card))
        return [r["number"] for r in check_cards(None, []) if r["agrees"] is False]

    assert wrong() == []
    rows = {r["number"]: r for r in check_cards(None, [])}
    assert rows["bits_per_byte.public_held_out"]["agrees"] is None and rows["summary.parameters"]["agrees"]
    card["summary"] |= {"bits_per_byte": 0.9, "parameters": 5}
    card["measured"]["sae"]["sae"]["bundled_evaluation"]["nmse"] *= 1.1
    assert wrong() == ["sae.sae.bundled_evaluation.nmse", "summary.bits_per_byte", "summary.parameters"]


def test_members_differ_as_families_do(adapters: dict[str, Adapter]) -> None:
    configs = [a.language.model.config for a in adapters.values()]
    assert [c.model_type for c in configs] == ["llama", "mistral", "qwen3"]
    assert len({c.hidden_size for c in configs}) == len({c.num_hidden_layers for c in configs}) == 3
    assert len({a.space.template_offset for a in adapters.values()}) == 3
    assert any(c.head_dim != c.hidden_size // c.num_attention_heads for c in configs)
    assert all(a.space.n_features >= 2048 for a in adapters.values())


def test_self_check_accepts_the_right_layer_and_refuses_another(adapters: dict[str, Adapter]) -> None:
    for adapter in adapters.values():
        assert adapter.self_check()["checked"]
        for off in (-1, 1):
            wrong = dataclasses.replace(
                adapter, space=dataclasses.replace(adapter.space, layer=adapter.space.layer + off)
            )
            with pytest.raises(TransferError, match="does not fit"):
                wrong.self_check()


def test_second_seed_is_another_sae() -> None:
    first, second = (Adapter.load("zoo:llama", f"zoo:llama/{name}") for name in ("sae", "sae_seed1"))
    assert first.space.sae_hash != second.space.sae_hash and first.space.layer == second.space.layer


def test_generation_is_text(adapters: dict[str, Adapter]) -> None:
    language: LanguageModel = adapters["qwen"].language
    options = dict(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=1, steer=None, stop="\n", batch_size=4)
    first = language.generate(["Requests:\n- How do I bake bread?\n-"] * 3, **options)  # type: ignore[arg-type]
    again = language.generate(["Requests:\n- How do I bake bread?\n-"] * 3, **options)  # type: ignore[arg-type]
    assert first == again and any(text.strip() for text in first)

"""SAE training through SAELens, and the numbers on its card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.adapter import Adapter
from models.sae import Dictionary
from models.train_sae import sae_quality, train_sae
from tests.conftest import SENTENCES
from transfer.core.errors import TransferError

D, TRUE, K = 16, 24, 3


@pytest.fixture(scope="module")
def planted() -> torch.Tensor:
    """Sparse sums of known directions, far from the origin and on a large scale."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=g), dim=-1)
    on = torch.rand(6000, TRUE, generator=g).argsort(-1) < K
    return 40 * ((on * (torch.rand(6000, TRUE, generator=g) + 0.5)) @ directions) + 100


def train(x: object, out: Path, **options: object) -> dict[str, float]:
    settings = {"d_in": D, "width": 32, "k": K, "tokens": 60_000, "lr": 4e-3, "batch": 256, "seed": 0, **options}
    return train_sae(x, out=out, **settings)  # type: ignore[arg-type]


def nmse(x: torch.Tensor, made: torch.Tensor) -> float:
    return float((x - made).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def test_trained_sae_reads_raw_residuals(planted: torch.Tensor, tmp_path: Path) -> None:
    from sae_lens import SAE

    state = torch.get_rng_state()
    figures = train(planted[:5000], tmp_path / "sae", metadata={"layer": 3, "model_name": "planted"})
    assert torch.equal(state, torch.get_rng_state())
    ours = Dictionary.load(f"path:{tmp_path / 'sae'}")
    held_out = planted[5000:]
    assert nmse(held_out, ours.reconstruct(held_out)) < 0.15
    assert nmse(held_out, ours.reconstruct(held_out)) == pytest.approx(figures["final_mse"], abs=0.05)
    saved = SAE.load_from_disk(tmp_path / "sae")
    torch.testing.assert_close(ours.reconstruct(held_out), saved(held_out), rtol=1e-4, atol=1e-2)
    assert saved.cfg.dtype == "float32" and saved.cfg.normalize_activations == "none"
    assert (ours.layer, ours.k, ours.rule) == (3, K, "topk-3")
    np.testing.assert_allclose(np.linalg.norm(ours.directions(), axis=1), 1, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]


def test_training_repeats_bit_for_bit(planted: torch.Tensor, tmp_path: Path) -> None:
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(planted, tmp_path / name, tokens=5000, seed=seed)
        hashes.append(Dictionary.load(f"path:{tmp_path / name}").hash)
    assert hashes[0] == hashes[1] != hashes[2]
    # A second training replaces the first as a whole.
    train(planted.numpy(), tmp_path / "a", tokens=5000, seed=1)
    assert Dictionary.load(f"path:{tmp_path / 'a'}").hash == hashes[2]


def test_iterators_are_gone_through_again(planted: torch.Tensor, tmp_path: Path) -> None:
    starts = 0

    def blocks():
        nonlocal starts
        starts += 1
        yield from planted[:5000].half().split(700)

    train(blocks, tmp_path / "sae")
    assert starts > 2
    ours = Dictionary.load(f"path:{tmp_path / 'sae'}")
    assert nmse(planted[5000:], ours.reconstruct(planted[5000:])) < 0.15


def test_bad_activations(planted: torch.Tensor, tmp_path: Path) -> None:
    for x, words in (
        (planted[:, :4], "expected"),
        (torch.zeros(0, D), "no activations"),
        (torch.zeros(10, D), "constant or not finite"),
        (planted * float("nan"), "constant or not finite"),
    ):
        with pytest.raises(TransferError, match=words):
            train(x, tmp_path / "sae")
    with pytest.raises(TransferError, match="less than one batch"):
        train(planted, tmp_path / "sae", tokens=10)
    assert not list(tmp_path.iterdir())


def test_quality_of_a_good_and_a_bad_sae(tiny_qwen: Path, tmp_path: Path) -> None:
    random = Adapter.load(f"path:{tiny_qwen}", f"path:{tiny_qwen}/sae")
    language = random.language
    x = random.encode(language.render_many(SENTENCES), residual=True).residual
    assert x is not None
    train_sae(
        x, d_in=48, width=96, k=32, tokens=60_000, lr=2e-3, batch=128, out=tmp_path / "sae", metadata={"layer": 2}
    )
    good = sae_quality(Adapter.join(language, Dictionary.load(f"path:{tmp_path / 'sae'}")), SENTENCES)
    bad = sae_quality(random, SENTENCES)
    assert good["nmse"] < 0.2 < bad["nmse"] and good["l0"] <= 32
    assert good["ce_clean"] == pytest.approx(bad["ce_clean"])
    assert abs(good["ce_recovered"] - 1) < abs(bad["ce_recovered"] - 1)
    assert good["ce_recovered"] == pytest.approx(
        (good["ce_zero"] - good["ce_reconstructed"]) / (good["ce_zero"] - good["ce_clean"])
    )
    with pytest.raises(TransferError, match="two content tokens"):
        sae_quality(random, ["", " "])


def test_cross_entropy_by_hand(tiny_llama: Path) -> None:
    """Zero-ablation at the content positions, computed with transformers alone."""
    adapter = Adapter.load(f"path:{tiny_llama}", f"path:{tiny_llama}/sae")
    r = adapter.language.render(SENTENCES[0])
    content, line = torch.from_numpy(r.content), torch.tensor([r.ids])
    site = adapter.language.family.site(adapter.language.model, 2)

    def zero(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, content] = 0
        return out

    for key, hook in (("ce_clean", lambda _m, _a, out: out), ("ce_zero", zero)):
        handle = site.register_forward_hook(hook)
        with torch.no_grad():
            logits = adapter.language.model(line).logits[0, content[:-1]]
        handle.remove()
        expected = torch.nn.functional.cross_entropy(logits, line[0, content[1:]])
        assert sae_quality(adapter, SENTENCES[:1])[key] == pytest.approx(float(expected), rel=1e-4)

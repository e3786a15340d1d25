"""The SAE adapter equals SAELens, sparsely; the FAC checkpoint format; references and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

from models.sae import Dictionary, decoder_rows, largest
from transfer.core.errors import TransferError
from transfer.core.files import write_json

D, WIDTH = 24, 96
NORM_RESCALE: dict[str, Any] = {"normalize_activations": "constant_norm_rescale"}


def make(folder: Path, config: Any, kind: Any, **metadata: Any) -> Path:
    torch.manual_seed(1)
    sae = kind(config)
    for parameter in sae.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(std=0.1)
    if hasattr(sae, "threshold"):
        sae.threshold.data.uniform_(0.1, 0.5)
    sae.W_dec.data.mul_(torch.rand(WIDTH, 1) + 0.5)
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value
    sae.save_model(folder)
    return folder


def topk(**options: Any) -> Any:
    return TopKSAEConfig(d_in=D, d_sae=WIDTH, k=5, **options)


CASES: dict[str, tuple[Any, Any]] = {
    "topk": (topk(), TopKSAE),
    "topk without b_dec": (topk(apply_b_dec_to_input=False), TopKSAE),
    "topk, decoder norms": (topk(rescale_acts_by_decoder_norm=True), TopKSAE),
    "topk, expected_average_only_in": (topk(normalize_activations="expected_average_only_in"), TopKSAE),
    "topk, constant_norm_rescale": (topk(normalize_activations="constant_norm_rescale"), TopKSAE),
    "topk, layer_norm": (topk(normalize_activations="layer_norm"), TopKSAE),
    "relu, constant_norm_rescale": (
        StandardSAEConfig(d_in=D, d_sae=WIDTH, **NORM_RESCALE),
        StandardSAE,
    ),
    "relu": (StandardSAEConfig(d_in=D, d_sae=WIDTH), StandardSAE),
    "jumprelu": (JumpReLUSAEConfig(d_in=D, d_sae=WIDTH), JumpReLUSAE),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(2)) * 3 + 0.5


@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode_equal_saelens(case: str, x: torch.Tensor, tmp_path: Path) -> None:
    folder = make(tmp_path / "sae", *CASES[case])
    ours, theirs = Dictionary.load(f"path:{folder}"), SAE.load_from_disk(folder)
    with torch.no_grad():
        dense = theirs.encode(x)
        made = theirs.decode(dense)
    for chunk_bytes in (1, 4 * WIDTH * 7, 1 << 20):
        codes = ours.encode(x, chunk_bytes=chunk_bytes)
        assert np.array_equal(codes.toarray() != 0, dense.numpy() != 0)
        np.testing.assert_allclose(codes.toarray(), dense.numpy(), atol=1e-5)
        assert codes.has_canonical_format and codes.dtype == np.float32 and np.all(codes.data > 0)
    torch.testing.assert_close(ours.decode(codes, x), made, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), made, rtol=1e-4, atol=1e-5)
    # No state: decoding twice, or after another batch, changes nothing.
    ours.encode(x[:3])
    torch.testing.assert_close(ours.decode(codes, x), made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["topk", "topk, decoder norms", "relu", "jumprelu"])
def test_directions_are_what_one_unit_adds(case: str, tmp_path: Path) -> None:
    ours = Dictionary.load(f"path:{make(tmp_path / 'sae', *CASES[case])}")
    nothing = sp.csr_matrix((WIDTH, WIDTH), dtype=np.float32)
    added = ours.decode(sp.csr_matrix(np.eye(WIDTH, dtype=np.float32))) - ours.decode(nothing)
    np.testing.assert_allclose(ours.directions(), added.numpy(), atol=1e-5)
    assert ours.directions().dtype == np.float32


def test_negative_tops_are_dropped(tmp_path: Path) -> None:
    folder = make(tmp_path / "sae", topk(), TopKSAE)
    sae: Any = SAE.load_from_disk(folder)
    sae.b_enc.data -= 100
    sae.save_model(folder)
    codes = Dictionary.load(f"path:{folder}").encode(torch.randn(4, D))
    assert codes.shape == (4, WIDTH) and codes.nnz == 0


def test_empty_input_and_nan(tmp_path: Path) -> None:
    ours = Dictionary.load(f"path:{make(tmp_path / 'sae', topk(), TopKSAE)}")
    assert ours.encode(torch.zeros(0, D)).shape == (0, WIDTH)
    assert ours.decode(sp.csr_matrix((0, WIDTH), dtype=np.float32)).shape == (0, D)
    with pytest.raises(TransferError, match="not finite"):
        ours.encode(torch.full((1, D), float("inf")))
    with pytest.raises(TransferError, match="reads width 24, got 3"):
        ours.encode(torch.zeros(1, 3))


def test_memory_stays_within_the_chunk(tmp_path: Path) -> None:
    ours = Dictionary.load(f"path:{make(tmp_path / 'sae', topk(), TopKSAE)}")
    sizes = []
    inner = torch.topk

    def watched(pre: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(pre.numel() * 4)
        return inner(pre, *args, **kwargs)

    torch.topk = watched  # type: ignore[assignment]
    try:
        ours.encode(torch.randn(100, D), chunk_bytes=4 * WIDTH * 10)
    finally:
        torch.topk = inner
    assert len(sizes) == 10 and max(sizes) <= 4 * WIDTH * 10


@pytest.mark.parametrize("case", CASES)
def test_the_decoder_alone_equals_that_of_the_whole(tmp_path: Path, case: str) -> None:
    folder = make(tmp_path / "sae", *CASES[case])
    whole = Dictionary.load(f"path:{folder}")
    rows, found = decoder_rows(f"path:{folder}")
    assert found == whole.hash and rows.dtype == np.float32
    np.testing.assert_allclose(rows, whole.directions(), rtol=1e-6)
    config = json.loads((folder / "cfg.json").read_text())
    for wrong in ({**config, "d_sae": WIDTH + 1}, []):
        (folder / "cfg.json").write_text(json.dumps(wrong))
        with pytest.raises(TransferError, match="could not be loaded"):
            decoder_rows(f"path:{folder}")
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "sae_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(TransferError, match="could not be loaded"):
        decoder_rows(f"path:{folder}")


def test_a_decoder_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    folder = make(tmp_path / "sae", topk(rescale_acts_by_decoder_norm=True), TopKSAE)
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][3] = 0
    save_file(weights, folder / "sae_weights.safetensors")
    rows, _ = decoder_rows(f"path:{folder}")
    whole = Dictionary.load(f"path:{folder}")
    assert np.isfinite(rows).all() and not rows[3].any() and np.isfinite(whole.directions()).all()
    np.testing.assert_allclose(rows, whole.directions(), rtol=1e-6)
    assert np.isfinite(whole.encode(torch.randn(9, D)).data).all()


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from([64, 512, 4096, 1000]), st.integers(0, 2**16), st.booleans())
def test_largest_entries_equal_a_full_selection(k: int, width: int, seed: int, coarse: bool) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(seed))
    x = x.round() if coarse else x  # many ties: the values are still the k largest
    values, columns = largest(x, k)
    assert torch.equal(values.sort(-1).values, torch.topk(x, k).values.flip(-1))
    assert torch.equal(x.gather(1, columns), values)
    assert all(len(set(row.tolist())) == k for row in columns)


def test_facts_and_card(tmp_path: Path) -> None:
    folder = make(tmp_path / "sae", topk(), TopKSAE, layer=7, hook_name="blocks.6.hook_resid_post")
    ours = Dictionary.load(f"path:{folder}")
    assert (ours.n_features, ours.d_model, ours.k, ours.rule, ours.layer, ours.card) == (WIDTH, D, 5, "topk-5", 7, {})
    write_json(folder / "card.json", {"sae": {"check": {"nmse": 0.5}}})
    again = Dictionary.load(f"path:{folder}")
    assert again.card["sae"]["check"]["nmse"] == 0.5 and again.hash == ours.hash
    other = Dictionary.load(f"path:{make(tmp_path / 'relu', *CASES['relu'])}")
    assert other.rule == "relu" and other.k is None and other.hash != ours.hash


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.15.hook_resid_post", 16),
        ("blocks.16.hook_resid_pre", 16),
        ("blocks.0.hook_resid_pre", 0),
        ("model.layers.15", 16),
        ("", None),
    ],
)
def test_canonical_layer_from_hook_names(hook: str, layer: int | None, tmp_path: Path) -> None:
    metadata = {"hook_name": hook} if hook else {}
    assert Dictionary.load(f"path:{make(tmp_path / 'sae', topk(), TopKSAE, **metadata)}").layer == layer


def test_other_places_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "sae", topk(), TopKSAE, hook_name="blocks.3.hook_mlp_out")
    with pytest.raises(TransferError, match="not the residual stream"):
        _ = Dictionary.load(f"path:{folder}").layer


def fac_checkpoint(path: Path, **config: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    weight = {
        "mask": torch.ones(WIDTH),
        "W_enc": torch.randn(D, WIDTH, generator=g),
        "b_enc": torch.randn(WIDTH, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    torch.save({"weight": weight, "config": {"d_inp": D, "d_hide": WIDTH, "topK": 6, **config}}, path)
    return weight


def test_fac_checkpoint_against_a_hand_computation(x: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "TopK7_l16_h24_epoch3.pth"
    weight = fac_checkpoint(path)
    ours = Dictionary.load(f"path:{path}")
    assert (ours.rule, ours.layer, ours.n_features) == ("topk-6", 16, WIDTH)
    # h = (x − b_dec) W_enc + b_enc; the six largest, signed; ReLU; x̂ = h W_encᵀ + b_dec.
    pre = (x - weight["b_dec"]) @ weight["W_enc"] + weight["b_enc"]
    h = torch.zeros_like(pre)
    for row, line in enumerate(pre):
        for i in sorted(range(WIDTH), key=lambda i: -float(line[i]))[:6]:
            h[row, i] = max(float(line[i]), 0.0)
    codes = ours.encode(x)
    assert np.array_equal(codes.toarray() != 0, h.numpy() != 0)
    np.testing.assert_allclose(codes.toarray(), h.numpy(), atol=1e-4)
    torch.testing.assert_close(ours.decode(codes), h @ weight["W_enc"].T + weight["b_dec"], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(ours.directions(), weight["W_enc"].T.numpy())


def test_fac_checkpoint_defaults_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "renamed.pth"
    weight = fac_checkpoint(path)
    torch.save({"weight": weight, "config": {"d_inp": D, "d_hide": WIDTH}}, path)
    ours = Dictionary.load(f"path:{path}")
    assert ours.k == 20 and ours.layer is None
    torch.save({"weight": weight, "config": {"d_inp": D + 1, "d_hide": WIDTH}}, path)
    with pytest.raises(TransferError, match="W_enc is"):
        Dictionary.load(f"path:{path}")
    torch.save({"weight": {"W_enc": weight["W_enc"]}, "config": {"d_inp": D}}, path)
    with pytest.raises(TransferError, match="lacks b_dec, b_enc, d_hide"):
        Dictionary.load(f"path:{path}")
    torch.save([1], path)
    with pytest.raises(TransferError, match="not a FAC checkpoint"):
        Dictionary.load(f"path:{path}")
    path.write_bytes(b"nothing")
    with pytest.raises(TransferError, match="could not be read"):
        Dictionary.load(f"path:{path}")


class Runs:
    def __reduce__(self) -> Any:
        return (print, ("a checkpoint ran code",))


def test_fac_checkpoint_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"weight": Runs(), "config": {}}, path)
    with pytest.raises(TransferError, match="could not be read"):
        Dictionary.load(f"path:{path}")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("sae", "is not a SAE reference"),
        ("zoo:llama/nothing", "no SAE zoo:llama/nothing"),
        ("path:nowhere", "no SAE at nowhere"),
        ("saelens:qwen-scope-3-1.7b-base-w32k-l50", "names no SAE"),
        ("saelens:qwen-scope-3-1.7b-base-w32k-l50/layer3", "could not be loaded"),
        ("saelens:some/repo/blocks.3", "could not be loaded"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_references(ref: str, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        Dictionary.load(ref)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"lacks cfg.json, sae_weights.safetensors"):
        Dictionary.load(f"path:{tmp_path}")
    folder = make(tmp_path / "sae", topk(), TopKSAE)
    (folder / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(TransferError, match="could not be loaded"):
        Dictionary.load(f"path:{folder}")

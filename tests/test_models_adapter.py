"""Model and SAE tied together: features of content tokens only, pooling, and the load-time self-check."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import Adapter, max_over_tokens
from models.train_sae import train_sae
from tests.conftest import SENTENCES
from transfer.core.errors import TransferError
from transfer.core.files import write_json
from transfer.core.texts import Corpus, Text

TEXTS = ["How do I bake a cake?", "x", "", "Tell me a joke about computers, coffee and dogs 🙂", "two  words", "user"]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_" + request.param)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Adapter:
    return Adapter.load(f"path:{folder}", f"path:{folder}/sae")


def by_hand(adapter: Adapter, text: str) -> torch.Tensor:
    """Dense codes of the content tokens, the slow way."""
    r = adapter.language.render(text)
    with torch.no_grad():
        out = adapter.language.model(torch.tensor([r.ids]), output_hidden_states=True)
        return adapter.dictionary.sae.encode(out.hidden_states[adapter.space.layer][0][torch.from_numpy(r.content)])


def test_space(adapter: Adapter, folder: Path) -> None:
    space = adapter.space
    assert (space.layer, space.n_features, space.rule) == (2, 64, "topk-4")
    assert space.d_model == adapter.language.d_model and space.template_offset == adapter.language.template_offset
    assert Adapter.load(f"path:{folder}", f"path:{folder}/sae").space == space
    with pytest.raises(TransferError, match="trained on layer 2, the configuration says layer 1"):
        Adapter.load(f"path:{folder}", f"path:{folder}/sae", layer=1)


def test_features_of_texts(adapter: Adapter) -> None:
    docs, peaks = adapter.encode_texts(TEXTS, token_budget=64)
    assert docs.shape == peaks.shape == (len(TEXTS), 64)
    assert np.array_equal(docs.indptr, peaks.indptr) and np.array_equal(docs.indices, peaks.indices)
    for i, text in enumerate(TEXTS):
        if not text:
            assert docs[i].nnz == 0
            continue
        dense = by_hand(adapter, text)
        values, where = dense.max(0)
        np.testing.assert_allclose(docs[i].toarray()[0], values.numpy(), atol=1e-3)
        at = peaks[i].toarray()[0]
        assert np.array_equal(at > 0, values.numpy() > 0)
        for feature in np.flatnonzero(at):
            assert float(dense[at[feature] - 1, feature]) == pytest.approx(float(values[feature]), abs=1e-3)
    assert adapter.encode_texts(["", " "])[0].nnz == 0


def test_template_tokens_never_count(adapter: Adapter) -> None:
    """The features of the template's own words must not leak into any text."""
    codes = adapter.encode(adapter.language.render_many(TEXTS), residual=True)
    n = [len(adapter.language.render(t).content) for t in TEXTS]
    assert np.array_equal(np.bincount(codes.docs, minlength=len(TEXTS)), n)
    assert codes.residual is not None and codes.residual.shape == (sum(n), adapter.space.d_model)
    np.testing.assert_allclose(codes.tokens[: n[0]].toarray(), by_hand(adapter, TEXTS[0]).numpy(), atol=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_pooling_equals_the_loop(data: st.DataObject) -> None:
    n_docs, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    docs = np.array(sorted(data.draw(st.lists(st.integers(0, n_docs - 1), max_size=12))), dtype=np.int32)
    cells = st.lists(st.integers(0, 3), min_size=width, max_size=width)
    dense = np.array([data.draw(cells) for _ in docs], dtype=np.float32).reshape(len(docs), width)
    maxima, peaks = max_over_tokens(sp.csr_matrix(dense), docs, n_docs)
    for d in range(n_docs):
        mine = dense[docs == d]
        expected = mine.max(0) if len(mine) else np.zeros(width)
        assert np.array_equal(maxima[d].toarray()[0], expected)
        first = [int(mine[:, f].argmax()) + 1 if expected[f] > 0 else 0 for f in range(width)]
        assert peaks[d].toarray()[0].tolist() == first
    assert maxima.has_sorted_indices and maxima.dtype == np.float32 and peaks.dtype == np.int32


def test_widths_must_agree(tiny_llama: Path, tiny_qwen: Path) -> None:
    with pytest.raises(TransferError, match="width 48, but that of .* is 32 wide"):
        Adapter.load(f"path:{tiny_llama}", f"path:{tiny_qwen}/sae")


def test_layer_must_be_known(tiny_llama: Path, tmp_path: Path) -> None:
    from sae_lens import SAE

    sae = SAE.load_from_disk(tiny_llama / "sae")
    sae.cfg.metadata.layer = None
    sae.cfg.metadata.hook_name = None
    sae.save_model(tmp_path / "sae")
    with pytest.raises(TransferError, match="does not say which layer"):
        Adapter.load(f"path:{tiny_llama}", f"path:{tmp_path}/sae")
    assert Adapter.load(f"path:{tiny_llama}", f"path:{tmp_path}/sae", layer=3).space.layer == 3
    with pytest.raises(TransferError, match="Layer 9 does not exist"):
        Adapter.load(f"path:{tiny_llama}", f"path:{tmp_path}/sae", layer=9)


def test_reconstruction_numbers(adapter: Adapter) -> None:
    found = adapter.reconstruction(TEXTS)
    codes = adapter.encode(adapter.language.render_many(TEXTS), residual=True)
    x = torch.from_numpy(codes.residual)
    error = (x - adapter.dictionary.sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert found["nmse"] == pytest.approx(float(error), rel=1e-3)
    assert found["l0"] == pytest.approx(codes.tokens.nnz / len(x))
    assert found["tokens"] == len(x) and found["dead"] == np.mean(codes.tokens.getnnz(0) == 0)
    with pytest.raises(TransferError, match="None of the texts"):
        adapter.reconstruction(["", " "])


def test_self_check_finds_a_wrong_base_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    refs = (f"path:{copy}", f"path:{copy}/sae")
    loose = Adapter.load(*refs)
    x = loose.encode(loose.language.render_many(SENTENCES), residual=True).residual
    assert x is not None
    d = loose.space.d_model
    train_sae(x, d_in=d, width=64, k=16, tokens=20_000, batch=128, lr=2e-3, out=copy / "sae", metadata={"layer": 2})
    assert Adapter.load(*refs).self_check() == {"checked": False}
    alone = Adapter.load(*refs).reconstruction(TEXTS)
    check = {"nmse": alone["nmse"], "l0": alone["l0"], "texts": TEXTS}
    write_json(copy / "sae" / "card.json", {"sae": {"check": check}})
    assert Adapter.load(*refs).self_check()["checked"]
    # The same width, other weights: what loading a neighbouring checkpoint looks like.
    weights = load_file(copy / "model.safetensors")
    for name, tensor in weights.items():
        if "down_proj" in name:
            weights[name] = tensor * 4 + 0.1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(TransferError, match="does not fit .* at layer 2: .*card says"):
        Adapter.load(*refs).self_check()
    write_json(copy / "sae" / "card.json", {"sae": {"check": {**check, "l0": check["l0"] * 2}}})
    shutil.copy(folder / "model.safetensors", copy)
    with pytest.raises(TransferError, match="mean L0"):
        Adapter.load(*refs).self_check()


def test_corpus_objects_fit(adapter: Adapter) -> None:
    corpus = Corpus("c", tuple(Text(str(i), t) for i, t in enumerate(TEXTS)))
    assert adapter.encode_texts([t.text for t in corpus])[0].get_shape()[0] == len(corpus)

"""Stitched cross-entropy: exact on a turned copy of a model, sensible across families, and only where bytes agree."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.maps import ResidualMap, fit_map
from models.adapter import Adapter
from models.interventions import replacing
from models.tokens import Rendered
from tests.conftest import SENTENCES
from transfer.alignment.stitch import ARMS, StitchedLoss, paired_positions, ratio_of_means, rotation, stitched_loss
from transfer.core.errors import TransferError
from transfer.corpus import load_corpus


def tiny(folder: Path) -> Adapter:
    return Adapter.load(f"path:{folder}", f"path:{folder / 'sae'}")


def linear(matrix: np.ndarray, bias: np.ndarray | float = 0.0) -> ResidualMap:
    return ResidualMap(
        matrix=matrix,
        bias=np.zeros(matrix.shape[1]) + bias,
        kind="ridge",
        strength=0.0,
        floor=0.0,
        rank=min(matrix.shape),
        heldout_r2=1.0,
        n_rows=1,
        n_outliers=0,
    )


def turned_copy(adapter: Adapter, turn: np.ndarray, order: np.ndarray) -> Adapter:
    """The same model with its residual stream turned (rung G0) and the features of its SAE in another order.

    Norm weights are folded into what reads them: a plain RMS norm does not see a rotation.
    """
    q = torch.from_numpy(turn).float()
    model: Any = copy.deepcopy(adapter.language.model)
    readers = [(model.model.norm, [model.lm_head])]
    writers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        readers.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
        writers += [attention.o_proj, mlp.down_proj]
    with torch.no_grad():
        head = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # may be tied to the embeddings
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.detach().clone() @ q)
        model.lm_head.weight = head
        for norm, parts in readers:
            for part in parts:
                part.weight.copy_((part.weight * norm.weight) @ q)
            norm.weight.fill_(1.0)
        for part in writers:
            part.weight.copy_(q.T @ part.weight)
        sae = copy.deepcopy(adapter.dictionary.sae)
        at = torch.from_numpy(order)
        sae.W_dec.data = sae.W_dec.data[at] @ q
        sae.W_enc.data = q.T @ sae.W_enc.data[:, at]
        sae.b_enc.data, sae.b_dec.data = sae.b_enc.data[at], sae.b_dec.data @ q
    model.requires_grad_(False)
    language = dataclasses.replace(adapter.language, model=model, hash="turned")
    return Adapter.join(language, dataclasses.replace(adapter.dictionary, sae=sae, hash="turned"))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Adapter:
    return tiny(tiny_llama)


@pytest.fixture(scope="module")
def mistral(tiny_mistral: Path) -> Adapter:
    return tiny(tiny_mistral)


def test_a_turned_copy_is_stitched_without_loss(llama: Adapter) -> None:
    turn = rotation(32, 3)
    other = turned_copy(llama, turn, np.arange(64))
    found = stitched_loss(llama, other, linear(turn), SENTENCES)
    assert found.r2 == pytest.approx(1, abs=1e-6) and found.n_unpaired == 0
    assert np.allclose(found.nats["stitched"], found.nats["native"], rtol=1e-4)
    assert np.allclose(
        found.nats["native"], stitched_loss(llama, llama, linear(np.eye(32)), SENTENCES).nats["native"], rtol=1e-4
    )
    assert found.recovered().value == pytest.approx(1, abs=1e-3)
    # the same map without its turn is no map at all
    wrong = stitched_loss(llama, other, linear(np.eye(32)), SENTENCES)
    assert wrong.r2 < 0 and wrong.loss("stitched") > found.loss("stitched") + 0.02
    assert not np.allclose(wrong.nats["stitched"], wrong.nats["native"], rtol=1e-2)


def test_a_constant_map_is_the_ablation(llama: Adapter, mistral: Adapter) -> None:
    texts = SENTENCES[:6]
    own = stitched_loss(llama, mistral, linear(np.zeros((32, 40))), texts)
    lines = [[r.cut(512)[0] for r in a.language.render_many(texts)] for a in (llama, mistral)]
    _, places = paired_positions(*lines)
    states = mistral.language.capture([r.ids for r in lines[1]], mistral.space.layer)
    at = [r.content[p] for r, p in zip(lines[1], places, strict=True)]
    mean = torch.cat([s[p] for s, p in zip(states, at, strict=True)]).numpy().mean(axis=0)
    found = stitched_loss(llama, mistral, linear(np.zeros((32, 40)), mean), texts)
    assert np.allclose(found.nats["stitched"], found.nats["ablated"], rtol=1e-5)
    assert np.allclose(found.nats["ablated"], own.nats["ablated"])
    assert found.r2 == pytest.approx(0, abs=1e-5)
    assert not np.allclose(own.nats["stitched"], own.nats["ablated"], rtol=1e-3)


def test_pairs_end_at_the_same_bytes_and_are_content(llama: Adapter, mistral: Adapter) -> None:
    lines = [a.language.render_many(SENTENCES) for a in (llama, mistral)]
    places = paired_positions(*lines)
    assert len(places[0]) == len(places[1]) == len(SENTENCES)
    for text, a, b, p, q in zip(SENTENCES, *lines, *places, strict=True):
        assert len(p) == len(q) > 0 and np.all(np.diff(p) > 0)
        assert np.array_equal(a.ends[p], b.ends[q])
        for line, place, side in ((a, p[-1], llama), (b, q[-1], mistral)):
            written = side.language.renderer.bytes.join([line.ids[i] for i in line.content[: place + 1]])
            assert written.strip() == text.encode()[: line.ends[place]].strip()


def test_counts_and_what_is_scored(llama: Adapter, mistral: Adapter) -> None:
    texts = [*SENTENCES[:4], "", "x"]
    found = stitched_loss(llama, mistral, linear(np.zeros((32, 40))), texts)
    assert found.n_empty == 2 and len(found.tokens) == 4
    lines = [r.cut(512)[0] for r in mistral.language.render_many(texts[:4])]
    content = sum(len(r.content) for r in lines)
    assert found.n_replaced + found.n_unpaired == content
    assert 0 < found.tokens.sum() <= content - 4  # the first content token follows no replaced position
    row = found.summary()
    assert row["n_tokens"] == found.tokens.sum() and row["loss_native"] == found.loss("native")
    assert set(found.nats) == set(ARMS)


def test_batches_do_not_matter(llama: Adapter, mistral: Adapter) -> None:
    mapping = linear(np.random.default_rng(0).normal(size=(32, 40)))
    one, two = (stitched_loss(llama, mistral, mapping, SENTENCES, token_budget=b) for b in (64, 8192))
    for arm in ARMS:
        assert np.allclose(one.nats[arm], two.nats[arm], rtol=1e-4)


def test_stitch_refuses(llama: Adapter, mistral: Adapter) -> None:
    with pytest.raises(TransferError, match=r"map is \(32, 32\).*\(32, 40\)"):
        stitched_loss(llama, mistral, linear(np.eye(32)), SENTENCES)
    with pytest.raises(TransferError, match="No text"):
        stitched_loss(llama, mistral, linear(np.zeros((32, 40))), ["", "x"])
    with pytest.raises(TransferError, match="Row 0 has 2 positions"):
        replacing([np.array([1, 2])], [torch.zeros(1, 4)])


def test_replacing_touches_its_positions_only() -> None:
    hidden = torch.arange(24.0).reshape(2, 3, 4)
    edit = replacing([np.array([0, 2]), np.zeros(0, int), np.array([1])], [torch.full((n, 4), -1.0) for n in (2, 0, 1)])
    before = hidden.clone()
    got = edit(np.array([2, 0]), hidden)
    assert torch.equal(hidden, before)
    assert torch.equal((got == -1).all(-1), torch.tensor([[False, True, False], [True, False, True]]))
    assert torch.equal(got[0, 0], hidden[0, 0]) and torch.equal(edit(np.array([1]), hidden[:1]), hidden[:1])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4), st.integers(0, 99))
def test_paired_positions_of_any_ends(ends: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)

    def line(found: list[int]) -> Rendered:
        return Rendered([0] * (len(found) + 1), np.arange(len(found)) + 1, np.array(sorted(found), dtype=np.int32))

    left = [line(e) for e in ends]
    right = [line([x for x in e if rng.uniform() < 0.7] + [7]) for e in ends]
    for a, b, p, q in zip(left, right, *paired_positions(left, right), strict=True):
        assert sorted(set(a.ends.tolist()) & set(b.ends.tolist())) == a.ends[p].tolist() == b.ends[q].tolist()


def test_ratio_of_means() -> None:
    exact = ratio_of_means(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert (exact.value, exact.low, exact.high) == (0.5, 0.5, 0.5)
    assert np.isnan(ratio_of_means(np.ones(3), -np.ones(3)).value)
    assert ratio_of_means(np.ones(1), np.ones(1)).method == "none"
    rng = np.random.default_rng(0)
    x = rng.normal(1, 1, size=400)
    got = ratio_of_means(x, np.full(400, 2.0), seed=1)
    half = 1.96 * x.std() / 20 / 2
    assert got.low == pytest.approx(x.mean() / 2 - half, abs=0.02) and got.high == pytest.approx(
        x.mean() / 2 + half, abs=0.02
    )
    assert got == ratio_of_means(x, np.full(400, 2.0), seed=1)


def test_rotations_are_rotations() -> None:
    q = rotation(12, 0)
    assert (
        np.allclose(q @ q.T, np.eye(12)) and np.array_equal(q, rotation(12, 0)) and not np.allclose(q, rotation(12, 1))
    )


def zoo_map(source: Adapter, target: Adapter, n: int = 160) -> tuple[ResidualMap, list[str]]:
    """A residual map between two zoo members from ``n`` bundled texts, and texts that it has not seen."""
    corpus = load_corpus("bundled:requests")
    texts = [t.text for t in corpus if t.split == "anchor"][:n]
    lines = [a.language.render_many(texts) for a in (source, target)]
    places = paired_positions(*lines)
    residuals = []
    for side, found, place in zip((source, target), lines, places, strict=True):
        states = side.language.capture([r.ids for r in found], side.space.layer)
        residuals.append(
            np.concatenate([s[r.content[p]].numpy() for s, r, p in zip(states, found, place, strict=True)])
        )
    docs = np.repeat(np.arange(n), [len(p) for p in places[0]])
    return fit_map(residuals[0], residuals[1], docs), [t.text for t in corpus if t.split == "evaluation"]


def test_families_of_the_zoo_can_be_stitched() -> None:
    llama, mistral = (Adapter.load(f"zoo:{name}", f"zoo:{name}/sae") for name in ("llama", "mistral"))
    mapping, texts = zoo_map(llama, mistral)
    found: StitchedLoss = stitched_loss(llama, mistral, mapping, texts[:30])
    assert found.loss("native") < found.loss("stitched") < found.loss("ablated")
    assert found.recovered().low > 0.6  # measured .80 with a map from 1,092 texts
    assert found.recovered("rotated").high < 0.2

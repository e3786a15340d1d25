"""The causal check of matches: exact on a turned copy of a model, silent about wrong matches, positive on the zoo."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.base import coupling_of, match_columns
from models.adapter import Adapter
from models.hooks import steering
from models.interventions import Probe, steered_logits
from tests.conftest import SENTENCES
from tests.test_stitch import linear, tiny, turned_copy, zoo_map
from transfer.alignment.causal import CausalCheck, across, check_matches, permutation_p
from transfer.alignment.stitch import rotation
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError


def aligned(source: Adapter, target: Adapter, src: np.ndarray, tgt: np.ndarray) -> Alignment:
    matches = match_columns(src, tgt, np.ones(len(src)))
    shape = (source.space.n_features, target.space.n_features)
    return Alignment(source.space, target.space, "test", coupling_of(matches, shape), matches, True)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Adapter:
    return tiny(tiny_llama)


@pytest.fixture(scope="module")
def mistral(tiny_mistral: Path) -> Adapter:
    return tiny(tiny_mistral)


ORDER = np.random.default_rng(5).permutation(64)
"""Feature of the source that each feature of the turned copy is."""


@pytest.fixture(scope="module")
def turned(llama: Adapter) -> Adapter:
    return turned_copy(llama, rotation(32, 3), ORDER)


@pytest.fixture(scope="module")
def right(llama: Adapter, turned: Adapter) -> CausalCheck:
    found = aligned(llama, turned, ORDER, np.arange(64))
    return check_matches(llama, turned, found, linear(rotation(32, 3)), SENTENCES, n_matches=20, n_random=8)


def test_a_turned_copy_reaches_the_ceiling(right: CausalCheck) -> None:
    for arm in ("mapped", "matched"):
        assert np.allclose(right.agreement[arm], right.agreement["ceiling"], atol=2e-3)
        assert np.allclose(right.ratio(arm)[np.isfinite(right.ratio(arm))], 1, atol=0.05)
        assert right.transfer(arm).value == pytest.approx(1, abs=5e-3)
    assert np.allclose(right.rise["mapped"], right.rise["matched"], atol=1e-2 * right.rise["matched"].max())
    assert right.raised().value == pytest.approx(1, abs=0.01) and right.beyond.mean() > 0.9
    assert right.agreement["ceiling"].mean() > right.agreement["random"].mean() + 0.3
    assert right.agreement["mapped_shuffled"].mean() < right.agreement["mapped"].mean() - 0.3
    assert max(right.p_values.values()) < 0.01
    assert right.sizes[0] == pytest.approx(right.sizes[1], rel=1e-4)


def test_wrong_matches_and_a_wrong_map_do_not_transfer(llama: Adapter, turned: Adapter) -> None:
    shifted = aligned(llama, turned, ORDER, np.roll(np.arange(64), 7))
    found = check_matches(llama, turned, shifted, linear(rotation(32, 4)), SENTENCES, n_matches=24, n_random=8)
    for arm in ("mapped", "matched"):
        interval = found.transfer(arm)
        assert interval.low < 0.15 and interval.high < 0.5
    assert found.p_values["agreement_matched"] > 0.01 and found.p_values["rise_mapped"] > 0.01
    assert found.raised().value < 0.2


def test_widths_and_vocabularies_may_differ(llama: Adapter, mistral: Adapter) -> None:
    ids = np.arange(12)
    mapping = linear(np.random.default_rng(0).normal(size=(32, 40)))
    texts = [*SENTENCES, "", "x " * 600]
    options = dict(n_matches=5, n_random=8)
    found = check_matches(llama, mistral, aligned(llama, mistral, ids, ids), mapping, texts, **options)  # type: ignore[arg-type]
    assert (found.n_available, len(found.pairs), found.n_texts, found.n_dropped) == (12, 5, 12, 2)
    shared = set(llama.language.vocabulary()) & set(mistral.language.vocabulary())
    assert found.n_tokens == len(shared) < len(llama.language.vocabulary())
    again = check_matches(llama, mistral, aligned(llama, mistral, ids, ids), mapping, texts, **options)  # type: ignore[arg-type]
    assert found.summary() == again.summary() and found.to_rows() == again.to_rows()
    small = check_matches(
        llama,
        mistral,
        aligned(llama, mistral, ids, ids),
        mapping,
        texts,
        n_matches=5,
        n_random=8,
        token_budget=64,
    )
    for name, values in found.agreement.items():
        assert np.allclose(values, small.agreement[name], atol=1e-4), name
    other = check_matches(llama, mistral, aligned(llama, mistral, ids, ids), mapping, texts, seed=1, **options)  # type: ignore[arg-type]
    assert not np.array_equal(found.pairs, other.pairs)


def test_rows_and_summary(right: CausalCheck) -> None:
    rows = right.to_rows()
    assert len(rows) == 20 and all(ORDER[int(r["target"])] == r["source"] for r in rows)
    assert rows[3]["agreement_mapped"] == right.agreement["mapped"][3]
    summary = right.summary()
    for name in ("agreement_random", "rise_mapped", "transfer_mapped", "transfer_matched", "raised"):
        assert summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"]
    assert summary["n_matches"] == 20 and summary["n_available"] == 64 and 0 <= summary["beyond_random"] <= 1


def test_a_match_without_headroom_has_no_ratio(right: CausalCheck) -> None:
    flat = dataclasses.replace(right, agreement={**right.agreement, "ceiling": right.agreement["random"] + 0.01})
    assert np.isnan(flat.ratio()).all() and flat.summary()["n_no_ratio"] == 20
    below = dataclasses.replace(right, agreement={**right.agreement, "ceiling": right.agreement["random"] - 0.1})
    assert np.isnan(below.transfer().value)


def test_steered_logits_equal_a_plain_steered_pass(mistral: Adapter) -> None:
    language, layer = mistral.language, mistral.space.layer
    lines = language.render_many(SENTENCES[:3])
    vectors = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 5
    vectors[1] = 0
    tokens = np.array([7, 3, 100])
    got = torch.zeros(3, 3)
    for rows, logits in steered_logits(language, lines, layer, vectors, tokens, token_budget=40):
        got[torch.from_numpy(rows)] = logits
    for i, line in enumerate(lines):
        ids = torch.tensor([line.ids[: int(line.content[-1]) + 1]])
        start = torch.tensor([int(line.content[0])])
        with torch.no_grad(), steering(language.family.site(language.model, layer), vectors[i], 1.0, start):
            expected = language.model(ids).logits[0, -1, torch.from_numpy(tokens)]
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-4)
    assert not any(m._forward_hooks for m in language.model.modules())
    with pytest.raises(TransferError, match=r"expected \(3, 40\)"):
        next(steered_logits(language, lines, layer, vectors[:2], tokens))
    with pytest.raises(TransferError, match="1 texts hold no content"):
        next(steered_logits(language, language.render_many(["a b", ""]), layer, vectors[:2], tokens))


def test_rises_equal_codes_of_the_moved_stream(mistral: Adapter) -> None:
    lines = [r.cut(512)[0] for r in mistral.language.render_many(SENTENCES[:5])]
    probe = Probe(mistral, lines, 0.5, 64)
    rng = np.random.default_rng(0)
    vectors = probe.vectors(rng.normal(size=(20, 40)))
    assert np.allclose(np.linalg.norm(vectors, axis=1), probe.size, rtol=1e-5)
    features = np.array([5, 0, 5])
    got = probe.rises(vectors, features)
    states = mistral.language.capture([r.ids for r in lines], mistral.space.layer)
    norms = torch.cat([s[r.content].norm(dim=1) for s, r in zip(states, lines, strict=True)])
    assert probe.size == pytest.approx(0.5 * np.median(norms.numpy()), rel=1e-5)
    last = torch.stack([s[r.content[-1]] for s, r in zip(states, lines, strict=True)])
    before = mistral.dictionary.encode(last).toarray()
    for n, vector in enumerate(vectors):
        after = mistral.dictionary.encode(last + torch.from_numpy(vector)).toarray()
        assert np.allclose(got[n], (after - before).mean(axis=0)[features], atol=1e-4)
    with pytest.raises(TransferError, match="1 directions .* are zero"):
        probe.vectors(np.stack([np.ones(40), np.zeros(40)]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_across_is_the_correlation_over_halves(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(2, 2, n, 12))
    unit = raw - raw.mean(axis=-1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    got = across(unit[0], unit[1])
    i, j = rng.integers(n, size=2)
    one, two = (np.corrcoef(raw[0, h, i], raw[1, 1 - h, j])[0, 1] for h in (0, 1))
    assert got.shape == (n, n) and got[i, j] == pytest.approx((one + two) / 2)


def test_permutation_p() -> None:
    rng = np.random.default_rng(0)
    assert permutation_p(np.eye(8), 0) < 0.002
    assert permutation_p(np.full((8, 8), 0.3), 0) == 1.0
    assert permutation_p(-np.eye(8), 0) == 1.0
    noise = [permutation_p(rng.normal(size=(6, 6)), s) for s in range(20)]
    assert np.mean(np.array(noise) < 0.1) < 0.35


def test_check_refuses(llama: Adapter, turned: Adapter, mistral: Adapter) -> None:
    ids = np.arange(8)
    found, mapping = aligned(llama, turned, ids, ids), linear(rotation(32, 3))
    with pytest.raises(TransferError, match="alignment's target belongs to"):
        check_matches(llama, mistral, found, mapping, SENTENCES)
    with pytest.raises(TransferError, match=r"map is \(32, 40\)"):
        check_matches(llama, turned, found, linear(np.zeros((32, 40))), SENTENCES)
    with pytest.raises(TransferError, match="n_random is 4"):
        check_matches(llama, turned, found, mapping, SENTENCES, n_random=4)
    with pytest.raises(TransferError, match="1 matches"):
        check_matches(llama, turned, aligned(llama, turned, ids[:1], ids[:1]), mapping, SENTENCES)
    with pytest.raises(TransferError, match="3 of 4 probe texts"):
        check_matches(llama, turned, found, mapping, [*SENTENCES[:3], ""])
    with pytest.raises(TransferError, match="8 directions .* are zero"):
        check_matches(llama, turned, found, linear(np.zeros((32, 32))), SENTENCES)


def test_matches_of_the_zoo_carry_effects() -> None:
    from aligners.activation import ActivationAligner
    from aligners.correlation import dims
    from aligners.tokens import pair_rows
    from transfer.core.store import PairedActivations
    from transfer.corpus import load_corpus
    from transfer.stages import views

    llama, mistral = (Adapter.load(f"zoo:{name}", f"zoo:{name}/sae") for name in ("llama", "mistral"))
    adapters = (llama, mistral)
    mapping, texts = zoo_map(llama, mistral)
    fit = [t.text for t in load_corpus("bundled:requests") if t.split == "anchor"][:160]
    lines = [a.language.render_many(fit) for a in adapters]
    codes = [a.encode(found) for a, found in zip(adapters, lines, strict=True)]
    ends = [np.concatenate([r.ends for r in found]) for found in lines]
    rows = pair_rows(codes[0].docs, ends[0], codes[1].docs, ends[1])
    pairs = PairedActivations(codes[0].tokens[rows[0]], codes[1].tokens[rows[1]], codes[0].docs[rows[0]])
    assert dims(pairs.source)[0] > 2000
    alignment = ActivationAligner(min_support=20).fit(*views((llama, mistral)), pairs=pairs).alignment_
    best = np.argsort(-alignment.matches["score"], kind="stable")[:100]
    strong = dataclasses.replace(alignment, matches={c: v[best] for c, v in alignment.matches.items()})
    short = [t for t in texts if len(t) < 80][:8]
    found = check_matches(llama, mistral, strong, mapping, short, n_matches=16, n_random=8)
    assert found.transfer("mapped").low > 0.15 and found.transfer("matched").low > 0.05
    assert found.agreement["mapped"].mean() > found.agreement["mapped_shuffled"].mean() + 0.15
    assert max(found.p_values.values()) < 0.01

"""Which activations and which tokens count: dense codes against the SAE's own, and filters from the tokenizer."""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from models.activations import harvest
from models.adapter import Adapter
from models.sae import Dictionary
from models.token_filter import counted
from tests.conftest import SENTENCES
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus, Text
from transfer.cover.delta import floor_of

TEXTS = [*SENTENCES, "", "12 34, 56!", "?!...--", "One, two; 3 and 4.5 (five)."]
CORPUS = Corpus("tiny", tuple(Text(f"d{i}", t) for i, t in enumerate(TEXTS)))


def load(folder: Path, **options: object) -> Adapter:
    return Adapter.load(f"path:{folder}", f"path:{folder}/sae", **options)  # type: ignore[arg-type]


def test_dense_codes_are_the_positive_pre_activations(tiny_llama: Path) -> None:
    dictionary = Dictionary.load(f"path:{tiny_llama}/sae")
    sae, x = dictionary.sae, torch.randn(300, dictionary.d_model, generator=torch.Generator().manual_seed(0))
    pre = ((x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc).numpy()
    for floor in (0.0, 0.3):
        found = dictionary.encode_dense(x, floor)
        expected = np.where(pre > floor, pre, 0)
        np.testing.assert_allclose(found.toarray(), expected, atol=1e-5)
        assert found.has_canonical_format and found.data.min() > floor
    # The SAE's own codes are the largest of them.
    own, dense = dictionary.encode(x).toarray(), dictionary.encode_dense(x).toarray()
    assert np.allclose(own[own > 0], dense[own > 0], atol=1e-5) and (dense > 0).sum() > 3 * (own > 0).sum()
    with pytest.raises(TransferError, match="not finite"):
        dictionary.encode_dense(x * float("nan"))


def test_dense_codes_of_other_architectures() -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        standard = Dictionary("s", "s", StandardSAE(StandardSAEConfig(d_in=8, d_sae=32)))
        jump = Dictionary("j", "j", JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=32)))
    assert (abs(standard.encode_dense(x) - standard.encode(x)) > 1e-6).nnz == 0
    jump.sae.threshold.data.fill_(0.5)
    dense, own = jump.encode_dense(x).toarray(), jump.encode(x).toarray()
    assert (own > 0).sum() < (dense > 0).sum() and np.allclose(own[own > 0], dense[own > 0], atol=1e-6)


def test_two_rules_are_two_spaces(tiny_llama: Path) -> None:
    own, dense, floor = (load(tiny_llama, codes=codes) for codes in ("sae", "dense", "dense:0.25"))
    assert (own.space.rule, dense.space.rule, floor.space.rule) == ("topk-4", "dense-0", "dense-0.25")
    assert (floor_of(own.space), floor_of(dense.space), floor_of(floor.space)) == (0, 0, 0.25)
    with pytest.raises(TransferError, match="rule is"):
        own.space.check(dense.space, "The store")
    a, b = own.encode_texts(TEXTS)[0].toarray(), dense.encode_texts(TEXTS)[0].toarray()
    assert np.all(b >= a - 1e-5) and (b > 0).sum() > (a > 0).sum()
    c = floor.encode_texts(TEXTS)[0].toarray()
    assert np.allclose(c, np.where(b > 0.25, b, 0), atol=1e-5)
    # Quality is that of the SAE, whatever rule coverage uses.
    assert own.reconstruction(TEXTS) == dense.reconstruction(TEXTS)
    for codes in ("topk", "dense:", "dense:-1", "dense:x", "sae:1", "dense:inf"):
        with pytest.raises(TransferError, match="Unknown rule"):
            load(tiny_llama, codes=codes)


def test_pooling_in_parts_changes_nothing(tiny_qwen: Path) -> None:
    adapter = load(tiny_qwen, codes="dense")
    many = TEXTS * 5
    docs, peaks = adapter.encode_texts(many)
    assert docs.shape == (len(many), 64) and (docs[: len(TEXTS)] != docs[-len(TEXTS) :]).sum() <= len(TEXTS) * 64
    np.testing.assert_allclose(docs[: len(TEXTS)].toarray(), docs[-len(TEXTS) :].toarray(), atol=1e-4)
    assert np.array_equal(docs.indptr, peaks.indptr) and peaks.dtype == np.int32
    assert adapter.encode_texts([])[0].shape == (0, 64)


def test_a_dense_store_is_that_of_its_texts(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = load(tiny_llama, codes="dense:0.1", skip=("punctuation",))
    store = harvest(adapter, CORPUS, tmp_path, shard_docs=5)
    assert store.space.rule == "dense-0.1, without punctuation"
    np.testing.assert_allclose(store.docs.toarray(), adapter.encode_texts(TEXTS)[0].toarray(), atol=1e-3)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mistral", "tiny_qwen"])
def test_filters_come_from_what_each_piece_writes(name: str, request: pytest.FixtureRequest) -> None:
    adapter = load(request.getfixturevalue(name))
    table = adapter.language.renderer.bytes
    everything = counted(table, ("space", "punctuation", "digits"))
    for kinds, letters in ((("punctuation",), "PS"), (("digits",), "N"), (("space",), "ZC")):
        keep = counted(table, kinds)
        assert 0 < (~keep).sum() < len(keep)
        for piece in np.flatnonzero(~keep):
            text = table.table[piece].decode()
            written = {unicodedata.category(c)[0] for c in text if not c.isspace()}
            assert written <= set(letters) and (written or kinds == ("space",))
        assert not np.any(everything & ~keep)
    for piece in np.flatnonzero(everything):
        try:
            text = table.table[piece].decode()
        except UnicodeDecodeError:
            continue  # part of a character
        assert any(unicodedata.category(c)[0] in "LM" and not c.isspace() for c in text), text
    assert counted(table, ()).all()
    with pytest.raises(TransferError, match="commas"):
        counted(table, ("commas",))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mistral"])
def test_skipped_tokens_are_counted_and_do_not_count(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    whole, some = load(folder), load(folder, skip=("digits", "punctuation"))
    assert some.space.rule == "topk-4, without punctuation digits"
    assert some.space.id == load(folder, skip=("punctuation", "digits")).space.id != whole.space.id
    stores = [harvest(a, CORPUS, tmp_path / str(i)) for i, a in enumerate((whole, some))]
    assert "skipped" not in stores[0].counts
    assert stores[1].counts["skipped"] == stores[0].n_tokens - stores[1].n_tokens > 10
    # The kept tokens are those whose pieces count, with the codes they had: context is not changed.
    ids = [i for r in whole.language.render_many(TEXTS) for i in np.array(r.ids)[r.content]]
    keep = counted(whole.language.renderer.bytes, some.skip)[np.array(ids)]
    assert np.array_equal(stores[0].token_ends[keep], stores[1].token_ends)
    same = stores[0].tokens[np.flatnonzero(keep)].toarray(), stores[1].tokens.toarray()
    np.testing.assert_allclose(*same, atol=2e-3)
    # A text of nothing else has no tokens left.
    row = CORPUS.texts.index(next(t for t in CORPUS if t.text == "?!...--"))
    assert stores[1].docs[row].nnz == 0 and stores[0].docs[row].nnz > 0
    assert stores[1].counts["empty"] > stores[0].counts["empty"]
    assert dataclasses.asdict(stores[1].space)["rule"] == some.space.rule

"""Harvesting: the store equals a direct computation, resumes shard by shard, and never goes dense."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import models.activations
from models.activations import harvest
from models.adapter import Adapter
from tests.conftest import SENTENCES
from transfer.core.errors import TransferError
from transfer.core.files import load_arrays, read_json, save_arrays, write_json
from transfer.core.keys import SCHEMA
from transfer.core.rows import chosen
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text

TEXTS = [*SENTENCES, "", "a b c " * 60, "   ", "last one 🙂"]
CORPUS = Corpus("tiny", tuple(Text(f"d{i}", t) for i, t in enumerate(TEXTS)))


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path) -> Adapter:
    return Adapter.load(f"path:{tiny_llama}", f"path:{tiny_llama}/sae")


def run(adapter: Adapter, out: Path, corpus: Corpus = CORPUS, **options: object) -> ActivationStore:
    return harvest(adapter, corpus, out, **{"shard_docs": 5, "token_budget": 256, "max_tokens": 96, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_store_equals_the_direct_computation(adapter: Adapter, tmp_path: Path) -> None:
    store = run(adapter, tmp_path, keep_residual=True)
    assert store.doc_ids == tuple(t.id for t in CORPUS) and store.space == adapter.space
    assert store.corpus_hash == CORPUS.hash and store.shards == 4
    assert store.counts == {"empty": 2, "truncated": 1, "clipped": 0}
    docs, peaks = adapter.encode_texts(TEXTS, max_tokens=96)
    np.testing.assert_allclose(store.docs.toarray(), docs.toarray(), atol=1e-3)
    assert np.array_equal(store.peaks.toarray(), peaks.toarray())
    rendered = [r.cut(96)[0] for r in adapter.language.render_many(TEXTS)]
    assert store.tokens.shape == (store.n_tokens, 64) and store.n_tokens == sum(len(r.content) for r in rendered)
    assert np.array_equal(store.token_docs, np.repeat(np.arange(len(TEXTS)), [len(r.content) for r in rendered]))
    assert np.array_equal(store.token_ends, np.concatenate([r.ends for r in rendered]))
    assert np.all(np.diff(store.token_docs) >= 0) and store.docs[12].nnz == 0
    states = adapter.language.capture([r.ids for r in rendered], adapter.space.layer)
    expected = np.concatenate([s[r.content].numpy() for s, r in zip(states, rendered, strict=True) if len(r.content)])
    assert store.residuals.dtype == np.float16
    np.testing.assert_allclose(store.residuals[:].astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    whole = np.concatenate([load_arrays(f)["residual"] for f in sorted(store.path.glob("residual-*"))])
    assert store.residuals.shape == whole.shape and np.array_equal(store.residuals[:], whole)
    for rows in (np.arange(0, store.n_tokens, 3), np.array([5, 2, 2, 40]), np.array([], dtype=np.int64)):
        assert np.array_equal(store.residuals[rows], whole[rows])
        some = chosen(chosen(store.residuals, rows), np.arange(len(rows))[::-1])
        assert some.shape == (len(rows), 32) and np.array_equal(some[:2], whole[rows][::-1][:2])
    # The kept codes are those of the kept residuals.
    again = adapter.dictionary.encode(torch.from_numpy(expected))
    assert np.mean((again.toarray() > 0) != (store.tokens.toarray() > 0)) < 0.001


def test_every_run_writes_the_same_bytes(adapter: Adapter, tmp_path: Path) -> None:
    run(adapter, tmp_path / "a")
    run(adapter, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not any("residual" in name for name in contents(tmp_path / "a"))
    with pytest.raises(TransferError, match="keeps no residuals"):
        _ = ActivationStore.load(tmp_path / "a").residuals


def count_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []
    inner = models.activations._shard

    def counted(adapter: Adapter, texts: list[str], begin: int, *rest: object) -> object:
        done.append(begin)
        return inner(adapter, texts, begin, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(models.activations, "_shard", counted)
    return done


def test_an_interrupted_harvest_continues(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(adapter, tmp_path / "whole", keep_residual=True)
    done = count_shards(monkeypatch)
    inner = models.activations.save_arrays
    written = 0

    def killed(*args: object) -> None:
        nonlocal written
        written += 1
        if written == 6:  # in the middle of the second shard
            raise KeyboardInterrupt
        inner(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(models.activations, "save_arrays", killed)
    with pytest.raises(KeyboardInterrupt):
        run(adapter, tmp_path / "cut", keep_residual=True)
    with pytest.raises(TransferError, match="No finished activation store"):
        ActivationStore.load(tmp_path / "cut")
    monkeypatch.setattr(models.activations, "save_arrays", inner)
    done.clear()
    run(adapter, tmp_path / "cut", keep_residual=True)
    assert done == [5, 10, 15]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    done.clear()
    run(adapter, tmp_path / "cut", keep_residual=True)
    assert done == []


def test_only_what_changed_is_done_again(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(adapter, tmp_path)
    done = count_shards(monkeypatch)
    texts = list(CORPUS.texts)
    texts[7] = Text("d7", "another text")
    run(adapter, tmp_path, Corpus("changed", tuple(texts)))
    assert done == [5]
    done.clear()
    run(adapter, tmp_path, Corpus("changed", tuple(texts)), max_tokens=95)
    assert done == [0, 5, 10, 15]
    (tmp_path / "docs-00002.safetensors").write_bytes(b"damaged")
    done.clear()
    run(adapter, tmp_path, Corpus("changed", tuple(texts)), max_tokens=95)
    assert done == [10]
    done.clear()
    store = run(adapter, tmp_path, Corpus("short", CORPUS.texts[:3]), keep_residual=True)
    assert done == [0] and store.docs.get_shape()[0] == 3
    assert sorted(contents(tmp_path)) == [
        "docs-00000.safetensors", "meta.json", "residual-00000.safetensors", "tokens-00000.safetensors",
    ]  # fmt: skip


def test_another_space_is_not_mixed_in(
    adapter: Adapter, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(adapter, tmp_path)
    done = count_shards(monkeypatch)
    other = dataclasses.replace(adapter, space=dataclasses.replace(adapter.space, layer=1))
    store = run(other, tmp_path)
    assert done == [0, 5, 10, 15] and store.space.layer == 1


def test_bad_corpora(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="holds no texts"):
        run(adapter, tmp_path, Corpus("none", ()))
    with pytest.raises(TransferError, match="ids that occur twice"):
        run(adapter, tmp_path, Corpus("twice", (Text("a", "x"), Text("a", "y"))))
    assert not list(tmp_path.iterdir())


def test_damaged_stores_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    good = run(adapter, tmp_path / "a", keep_residual=True)
    meta = read_json(good.path / "meta.json")
    for wrong in (
        {**meta, "space": {**meta["space"], "colour": 1}},
        {**meta, "shards": "many"},
        [],
        {"schema": SCHEMA},
    ):
        write_json(tmp_path / "b" / "meta.json", wrong)
        with pytest.raises(TransferError, match="is damaged"):
            ActivationStore.load(tmp_path / "b")
    arrays = load_arrays(good.path / "tokens-00000.safetensors")
    n = len(arrays["end"])

    def read(store: ActivationStore) -> None:
        _ = store.tokens, store.token_docs, store.token_ends

    for name, values in {
        "indices": np.where(np.arange(len(arrays["indices"])) == 3, 999_999, arrays["indices"]),
        "indptr": arrays["indptr"][::-1],
        "doc": np.where(np.arange(n) == n - 1, 99_999, arrays["doc"]),
        "end": arrays["end"][1:],
    }.items():
        copy = Path(shutil.copytree(good.path, tmp_path / name))
        save_arrays(copy / "tokens-00000.safetensors", {**arrays, name: values})
        with pytest.raises(TransferError, match="is damaged"):
            read(ActivationStore.load(copy))
    whole = load_arrays(good.path / "residual-00000.safetensors")["residual"]
    save_arrays(good.path / "residual-00000.safetensors", {"residual": whole[1:]})
    with pytest.raises(TransferError, match="its residuals are"):
        _ = good.residuals
    (good.path / "meta.json").write_text(json.dumps({**meta, "n_tokens": meta["n_tokens"] + 1}))
    with pytest.raises(TransferError, match="is damaged"):
        read(ActivationStore.load(good.path))


def test_a_corpus_of_empty_texts_is_kept(adapter: Adapter, tmp_path: Path) -> None:
    store = run(adapter, tmp_path, Corpus("blank", (Text("a", ""), Text("b", " "))), keep_residual=True)
    assert store.counts["empty"] == 2 and store.docs.shape == (2, 64) and store.tokens.shape == (0, 64)
    assert store.peaks.nnz == 0 and store.residuals.shape == (0, 32)


def test_residuals_beyond_float16_are_counted(adapter: Adapter, tmp_path: Path) -> None:
    site = adapter.language.family.site(adapter.language.model, 2)

    def scaled(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
        return out * 1e5

    handle = site.register_forward_hook(scaled)
    try:
        store = run(adapter, tmp_path, keep_residual=True)
    finally:
        handle.remove()
    assert store.counts["clipped"] > 0 and np.isfinite(store.residuals[:]).all()

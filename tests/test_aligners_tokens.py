"""Token pairing against brute force, and stores paired on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners.tokens import pair_rows, pair_stores
from transfer.core.errors import TransferError
from transfer.core.files import save_arrays
from transfer.core.objects import ActivationStore, FeatureSpace

tokens = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 6)), max_size=25)


def brute(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Last row of each (document, end) on both sides, in order of the key."""
    last_a = {key: row for row, key in enumerate(a) if key[1] >= 0}
    last_b = {key: row for row, key in enumerate(b) if key[1] >= 0}
    return [(last_a[key], last_b[key]) for key in sorted(last_a) if key in last_b]


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    found = np.array(rows, dtype=np.int32).reshape(-1, 2)
    return found[:, 0], found[:, 1]


@settings(max_examples=150, deadline=None)
@given(tokens, tokens)
def test_pair_rows_is_brute_force(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    rows_a, rows_b = pair_rows(*columns(a), *columns(b))
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == brute(a, b)


def test_every_pair_has_read_the_same_bytes() -> None:
    """Two ways to cut the same UTF-8 text: each pair ends on the same prefix, and every shared end is found."""
    rng = np.random.default_rng(0)
    texts = ["naïve café 🙂 done", "日本語 and code: x = [1, 2]\n", "plain words only"]
    sides = []
    for _ in range(2):
        docs, ends = [], []
        for number, text in enumerate(texts):
            size = len(text.encode())
            cuts = np.union1d(rng.choice(np.arange(1, size), size // 2, replace=False), [size])
            docs += [number] * len(cuts)
            ends += cuts.tolist()
        sides.append((np.array(docs), np.array(ends)))
    (docs_a, ends_a), (docs_b, ends_b) = sides
    rows_a, rows_b = pair_rows(docs_a, ends_a, docs_b, ends_b)
    for i, j in zip(rows_a, rows_b, strict=True):
        assert docs_a[i] == docs_b[j]
        text = texts[docs_a[i]].encode()
        assert text[: ends_a[i]] == text[: ends_b[j]]
    shared = set(zip(docs_a, ends_a, strict=True)) & set(zip(docs_b, ends_b, strict=True))
    assert len(rows_a) == len(shared) >= len(texts)


def test_last_token_of_a_split_character_counts() -> None:
    docs = np.zeros(4, dtype=np.int32)
    rows_a, rows_b = pair_rows(docs, np.array([-1, 3, 3, 5]), docs[:2], np.array([3, 5]))
    assert rows_a.tolist() == [2, 3]
    assert rows_b.tolist() == [0, 1]


def test_lengths_must_agree() -> None:
    with pytest.raises(TransferError, match="document marks"):
        pair_rows(np.zeros(2, int), np.zeros(3, int), np.zeros(1, int), np.zeros(1, int))


def write_store(path: Path, name: str, ends: list[list[int]], residual: bool = True) -> ActivationStore:
    """A store with one active feature a token: its row number."""
    flat = np.array(sum(ends, []), dtype=np.int32)
    n, width = len(flat), 4
    space = FeatureSpace(name, name, 1, name, name, 8, width, "topk-1", 0)
    save_arrays(
        path / "tokens-00000.safetensors",
        {
            "values": np.arange(1, n + 1, dtype=np.float32),
            "indices": (np.arange(n) % 8).astype(np.int32),
            "indptr": np.arange(n + 1, dtype=np.int64),
            "doc": np.repeat(np.arange(len(ends)), [len(e) for e in ends]).astype(np.int32),
            "end": flat,
        },
    )
    if residual:
        rows = np.arange(n, dtype=np.float16)[:, None] * np.ones(width, dtype=np.float16)
        save_arrays(path / "residual-00000.safetensors", {"residual": rows})
    return ActivationStore(path, space, "corpus", tuple(f"d{i}" for i in range(len(ends))), n, 1)


def test_pair_stores(tmp_path: Path) -> None:
    a = write_store(tmp_path / "a", "a", [[2, 5, 9], [4, 8]])
    b = write_store(tmp_path / "b", "b", [[5, 7, 9], [3, 4]])
    pairs = pair_stores(a, b)
    assert pairs.docs.tolist() == [0, 0, 1]
    assert pairs.source.sum(axis=1).ravel().tolist() == [[2, 3, 4]]
    assert pairs.target.sum(axis=1).ravel().tolist() == [[1, 3, 5]]
    assert pairs.source_residual is not None and pairs.target_residual is not None
    assert pairs.source_residual[:, 0].tolist() == [1, 2, 3]
    assert pairs.target_residual[:, 0].tolist() == [0, 2, 4]
    assert sp.issparse(pairs.source)
    assert pair_stores(a, b, residuals=False).source_residual is None


def test_pair_stores_refuses(tmp_path: Path) -> None:
    a = write_store(tmp_path / "a", "a", [[2, 5]])
    b = write_store(tmp_path / "b", "b", [[3, 4]])
    bare = write_store(tmp_path / "c", "c", [[2, 5]], residual=False)
    with pytest.raises(TransferError, match="different corpora"):
        pair_stores(a, dataclasses.replace(b, corpus_hash="other"))
    with pytest.raises(TransferError, match="other documents"):
        pair_stores(a, dataclasses.replace(b, doc_ids=("x",)))
    with pytest.raises(TransferError, match="no position"):
        pair_stores(a, b)
    with pytest.raises(TransferError, match="keeps no residuals"):
        pair_stores(a, bare)

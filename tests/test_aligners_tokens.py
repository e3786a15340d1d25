"""Token pairing against brute force, and stores paired on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from aligners import tokens as module
from aligners.tokens import Pooling, pair_rows, pair_stores, pool_codes, pool_residuals, span_starts
from transfer.core.errors import TransferError
from transfer.core.files import save_arrays
from transfer.core.space import FeatureSpace
from transfer.core.store import ActivationStore

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


cuts = st.lists(
    st.tuples(
        st.lists(st.integers(1, 12), min_size=1, max_size=8), st.lists(st.integers(1, 12), min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def in_order(ends: list[list[int]], unknown: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Documents and ends as a store has them: reading order, repeats allowed, some ends unknown."""
    docs = np.repeat(np.arange(len(ends)), [len(e) for e in ends])
    flat = np.concatenate([np.sort(e) for e in ends])
    return docs, np.where(unknown.uniform(size=len(flat)) < 0.15, -1, flat)


def brute_pool(codes: np.ndarray, docs: np.ndarray, rows: np.ndarray, how: Pooling) -> np.ndarray:
    """One span after the other, one token after the other."""
    out = []
    for n, row in enumerate(rows):
        span = [int(row)]
        while span[0] > 0 and docs[span[0] - 1] == docs[row] and (n == 0 or span[0] - 1 > rows[n - 1]):
            span.insert(0, span[0] - 1)
        total, largest = np.zeros(codes.shape[1], codes.dtype), np.full(codes.shape[1], -np.inf, codes.dtype)
        for token in span:
            total, largest = total + codes[token], np.maximum(largest, codes[token])
        mean = total / codes.dtype.type(len(span))
        out.append({"last": codes[row], "sum": total, "mean": mean, "max": largest}[how])
    return np.array(out, dtype=codes.dtype).reshape(len(rows), codes.shape[1])


@settings(max_examples=60, deadline=None)
@given(cuts, st.sampled_from(["last", "max", "mean", "sum"]), st.integers(0, 99), st.sampled_from([1, 9, 10**6]))
def test_pooling_is_brute_force(
    documents: list[tuple[list[int], list[int]]], how: Pooling, seed: int, block: int
) -> None:
    """Bit for bit, whatever the blocks, negative codes and spans of many tokens included."""
    rng = np.random.default_rng(seed)
    sides = [in_order([d[side] for d in documents], rng) for side in (0, 1)]
    both = pair_rows(*sides[0], *sides[1])
    for (docs, _), rows in zip(sides, both, strict=True):
        dense = np.where(rng.uniform(size=(len(docs), 5)) < 0.5, rng.normal(size=(len(docs), 5)), 0).astype(np.float32)
        residual = rng.normal(size=(len(docs), 3)).astype(np.float32)
        starts = span_starts(docs, rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BLOCK_VALUES", block)
            pooled = pool_codes(sp.csr_matrix(dense), starts, rows, how)
            points = pool_residuals(residual, starts, rows, how)
        assert sp.issparse(pooled) and pooled.shape == (len(rows), 5) and not np.any(pooled.data == 0)
        assert np.array_equal(pooled.toarray(), brute_pool(dense, docs, rows, how))
        assert np.allclose(points, brute_pool(residual, docs, rows, "last" if how == "last" else "mean"), atol=1e-6)


def test_spans_hold_each_token_once() -> None:
    docs = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    rows = np.array([1, 3, 5, 8])
    assert span_starts(docs, rows).tolist() == [0, 2, 4, 7]
    assert span_starts(docs, rows[:0]).tolist() == []
    for bad in ((docs[::-1], rows), (docs, rows[::-1])):
        with pytest.raises(TransferError, match="reading order"):
            span_starts(*bad)
    with pytest.raises(TransferError, match="Unknown way"):
        pool_codes(sp.csr_matrix((9, 2)), rows, rows, "median")  # type: ignore[arg-type]


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
    assert pairs.source_residual[:][:, 0].tolist() == [1, 2, 3]
    assert pairs.target_residual[:][:, 0].tolist() == [0, 2, 4]
    assert sp.issparse(pairs.source)
    assert pair_stores(a, b, residuals=False).source_residual is None


def test_pair_stores_pools(tmp_path: Path) -> None:
    """Feature = row number, value = row number + 1 (mod 8): the last tokens of document 0 are behind all boundaries."""
    a = write_store(tmp_path / "a", "a", [[2, 5, 9, 11], [1, 2, 4]])
    b = write_store(tmp_path / "b", "b", [[5, 7, 9], [3, 4]])
    expected = {
        "last": ([2, 3, 7], [1, 3, 5], [1, 2, 6], [0, 2, 4]),
        "sum": ([3, 3, 18], [1, 5, 9], [0.5, 2, 5], [0, 1.5, 3.5]),
        "mean": ([1.5, 3, 6], [1, 2.5, 4.5], [0.5, 2, 5], [0, 1.5, 3.5]),
        "max": ([3, 3, 18], [1, 5, 9], [0.5, 2, 5], [0, 1.5, 3.5]),
    }
    for how, (left, right, left_point, right_point) in expected.items():
        pairs = pair_stores(a, b, pool=how)  # type: ignore[arg-type]
        assert pairs.docs.tolist() == [0, 0, 1]
        assert np.allclose(pairs.source.sum(axis=1).ravel(), left), how
        assert np.allclose(pairs.target.sum(axis=1).ravel(), right), how
        assert pairs.source_residual is not None and pairs.target_residual is not None
        assert np.allclose(pairs.source_residual[:][:, 0], left_point), how
        assert np.allclose(pairs.target_residual[:][:, 0], right_point), how
    assert pair_stores(a, b, residuals=False, pool="max").target_residual is None


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

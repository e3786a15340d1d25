"""Sparse activations of one corpus: of one space on disk, and of two spaces at the same places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.files import array_shape, load_arrays, load_rows, map_arrays, read_json
from transfer.core.keys import SCHEMA
from transfer.core.rows import Rows, chosen
from transfer.core.space import FeatureSpace


def csr(arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> sp.csr_matrix:
    """The matrix of saved ``values``, ``indices`` and ``indptr``.

    Raises:
        ValueError: When they make no matrix of this shape.
    """
    bounds, columns = arrays["indptr"], arrays["indices"]
    whole = len(bounds) == shape[0] + 1 and bounds[0] == 0 and bounds[-1] == len(columns) == len(arrays["values"])
    if not whole or np.any(np.diff(bounds) < 0):
        raise ValueError("its rows do not fit its values")
    if len(columns) and not 0 <= columns.min() <= columns.max() < shape[1]:
        raise ValueError(f"it names columns outside 0..{shape[1] - 1}")
    return sp.csr_matrix((arrays["values"], arrays["indices"], arrays["indptr"]), shape=shape, copy=False)


def _rows(matrix: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Consecutive rows, without a copy of their codes."""
    low, high = matrix.indptr[start], matrix.indptr[stop]
    shape = (stop - start, matrix.get_shape()[1])
    bounds = (matrix.indptr[start : stop + 1] - low).astype(np.int32)
    return sp.csr_matrix((matrix.data[low:high], matrix.indices[low:high], bounds), shape=shape, copy=False)


@dataclass(frozen=True)
class ActivationStore:
    """Sparse SAE activations of one corpus in one space, on disk.

    A folder with ``meta.json`` and, per shard ``n``: ``tokens-n.safetensors`` (token-level CSR of the true codes, with
    the document and the number of UTF-8 bytes of its content read so far), ``docs-n.safetensors`` (documents ×
    features, max over tokens, with the token position of the maximum) and, where asked for,
    ``residual-n.safetensors`` (float16 residual stream of the same tokens). Codes are read whole when first asked for
    and kept, 8 bytes a code; residuals are read anew each time.
    """

    path: Path
    space: FeatureSpace
    corpus_hash: str
    doc_ids: tuple[str, ...]
    n_tokens: int
    shards: int
    counts: dict[str, int] = field(default_factory=dict)
    """What was dropped or cut: ``empty``, ``truncated``."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Open a finished store.

        Raises:
            TransferError: When it is missing, unfinished or of another schema.
        """
        meta_path = Path(path) / "meta.json"
        if not meta_path.is_file():
            raise TransferError(f"No finished activation store in {path}.", "Run `transfer harvest` first.")
        meta = read_json(meta_path)
        try:
            if meta["schema"] != SCHEMA:
                raise TransferError(
                    f"The store in {path} has schema {meta['schema']}, this version reads {SCHEMA}.", "Harvest again."
                )
            return cls(
                path=Path(path),
                space=FeatureSpace(**meta["space"]),
                corpus_hash=meta["corpus_hash"],
                doc_ids=tuple(meta["doc_ids"]),
                n_tokens=int(meta["n_tokens"]),
                shards=int(meta["shards"]),
                counts=dict(meta["counts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"{meta_path} is damaged ({error}).", "Harvest again.") from None

    def _shards(self, kind: str) -> Iterator[dict[str, np.ndarray]]:
        return (load_arrays(self.path / f"{kind}-{i:05d}.safetensors") for i in range(self.shards))

    def _damaged(self, how: str) -> TransferError:
        return TransferError(f"The store {self.path} is damaged: {how}.", "Harvest again.")

    def _column(self, kind: str, name: str) -> np.ndarray:
        parts = [shard.get(name) for shard in self._shards(kind)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or sum(map(len, found)) != self.n_tokens:
            raise self._damaged(f"{name!r} does not hold one entry a token")
        return np.concatenate(found)

    def _matrix(self, kind: str, values: str, rows: int) -> sp.csr_matrix:
        try:
            parts = [
                csr({**a, "values": a[values]}, (len(a["indptr"]) - 1, self.space.n_features))
                for a in self._shards(kind)
            ]
        except (KeyError, ValueError) as error:
            raise self._damaged(f"a {kind} file is no matrix ({error})") from None
        whole = sp.csr_matrix(sp.vstack(parts, format="csr"))
        if len(whole.indptr) - 1 != rows:
            raise self._damaged(f"it holds {len(whole.indptr) - 1} rows of {kind}, not {rows}")
        return whole

    @cached_property
    def tokens(self) -> sp.csr_matrix:
        """Token-level codes, float32 CSR [tokens, n_features].

        Raises:
            TransferError: As the other arrays, when a file is missing or damaged.
        """
        return self._matrix("tokens", "values", self.n_tokens)

    @cached_property
    def token_docs(self) -> np.ndarray:
        """Row into ``doc_ids`` of each token, int32 [tokens]."""
        docs = self._column("tokens", "doc")
        if len(docs) and (np.any(np.diff(docs) < 0) or not 0 <= docs[0] <= docs[-1] < len(self.doc_ids)):
            raise self._damaged("its tokens name documents that are not there or out of order")
        return docs

    @cached_property
    def token_ends(self) -> np.ndarray:
        """UTF-8 bytes of the document's content consumed at the end of each token, int32 [tokens]."""
        return self._column("tokens", "end")

    @cached_property
    def docs(self) -> sp.csr_matrix:
        """Max over tokens, float32 CSR [docs, n_features]."""
        return self._matrix("docs", "values", len(self.doc_ids))

    def doc_blocks(self, nnz: int = 1 << 22) -> Iterator[tuple[int, sp.csr_matrix]]:
        """``docs`` block by block, for stores larger than memory: first row, and CSR [rows, n_features].

        Shards are mapped. Small ones are joined (copied, 8 bytes a code), large ones cut, so that each block but the
        last holds between a half and one and a half times ``nnz`` codes, or one document where that is larger.

        Raises:
            TransferError: When a file is missing or damaged.
        """
        waiting: list[sp.csr_matrix] = []
        first = done = 0
        for i in range(self.shards):
            path = self.path / f"docs-{i:05d}.safetensors"
            try:
                arrays = map_arrays(path)
                shard = csr(arrays, (len(arrays["indptr"]) - 1, self.space.n_features))
            except (KeyError, ValueError) as error:
                raise self._damaged(f"{path.name} is no matrix ({error})") from None
            rows = len(shard.indptr) - 1
            done += rows
            cuts = np.searchsorted(shard.indptr, np.arange(1, shard.nnz // nnz + 1) * nnz, side="right") - 1
            bounds = np.unique([0, *np.maximum(cuts, 1), rows])
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                waiting.append(_rows(shard, int(start), int(stop)))
                if sum(part.nnz for part in waiting) >= nnz // 2:
                    block = waiting[0] if len(waiting) == 1 else sp.csr_matrix(sp.vstack(waiting, format="csr"))
                    yield first, block
                    first += len(block.indptr) - 1
                    waiting = []
        if done != len(self.doc_ids):
            raise self._damaged(f"it holds {done} rows of docs, not {len(self.doc_ids)}")
        if waiting:
            yield first, sp.csr_matrix(sp.vstack(waiting, format="csr"))

    @cached_property
    def peaks(self) -> sp.csr_matrix:
        """Content-token position of each document maximum, plus one (so that 0 stays 'absent'), CSR like ``docs``."""
        peaks = self._matrix("docs", "position", len(self.doc_ids))
        peaks.data = peaks.data.astype(np.int32) + 1
        return peaks

    @property
    def residuals(self) -> StoredResiduals:
        """Residual stream of the stored tokens, float16 [tokens, d_model], read from disk where it is sliced.

        Raises:
            TransferError: When the harvest did not keep them.
        """
        if not self.keeps_residuals:
            raise TransferError(f"The store {self.path} keeps no residuals.", "Harvest again with keep_residual: true.")
        found = StoredResiduals.of(self.path, self.shards)
        if found.shape != (self.n_tokens, self.space.d_model):
            raise self._damaged(f"its residuals are {found.shape}, not {(self.n_tokens, self.space.d_model)}")
        return found

    @property
    def keeps_residuals(self) -> bool:
        """Whether the harvest kept the residual stream."""
        return (self.path / "residual-00000.safetensors").exists()

    def support(self) -> np.ndarray:
        """Documents in which each feature fires, int64 [n_features]."""
        return np.bincount(self.docs.indices, minlength=self.space.n_features)

    def rows(self, ids: list[str]) -> np.ndarray:
        """Row numbers of document ids.

        Raises:
            TransferError: For an id the store does not hold.
        """
        where = {d: i for i, d in enumerate(self.doc_ids)}
        missing = [d for d in ids if d not in where]
        if missing:
            raise TransferError(f"{len(missing)} documents are not in the store {self.path}, first {missing[0]!r}.")
        return np.array([where[d] for d in ids], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class StoredResiduals:
    """Residual stream of a store; reading takes the memory of the rows asked for and of what lies between them."""

    files: tuple[Path, ...]
    first: np.ndarray
    """First token of each file, and the number of all, int64 [files + 1]."""
    width: int

    @classmethod
    def of(cls, folder: Path, shards: int) -> Self:
        """Read the shapes only."""
        files = tuple(folder / f"residual-{i:05d}.safetensors" for i in range(shards))
        shapes = [array_shape(file, "residual") for file in files]
        return cls(files, np.concatenate([[0], np.cumsum([n for n, _ in shapes])]), shapes[0][1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(tokens, d_model)."""
        return (len(self), self.width)

    @property
    def dtype(self) -> np.dtype[np.float16]:
        """Of the values."""
        return np.dtype(np.float16)

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """float16 [rows, d_model] of a slice or of token numbers."""
        rows = np.arange(len(self))[rows]
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), self.width), dtype=np.float16)
        bounds = np.searchsorted(rows[order], self.first)
        for file, first, low, high in zip(self.files, self.first, bounds[:-1], bounds[1:], strict=False):
            if low < high:
                wanted = order[low:high]
                at = rows[wanted] - first
                out[wanted] = load_rows(file, "residual", int(at[0]), int(at[-1]) + 1)[at - at[0]]
        return out


@dataclass(frozen=True)
class PairedActivations:
    """Codes of two spaces at the same places of the same corpus."""

    source: sp.csr_matrix
    """[rows, d_src]"""
    target: sp.csr_matrix
    """[rows, d_tgt]"""
    docs: np.ndarray
    """Document of each row, int32 [rows], non-decreasing; splits and nulls move whole documents."""
    source_residual: Rows | None = None
    """[rows, d_model_src]"""
    target_residual: Rows | None = None

    def __post_init__(self) -> None:
        n = len(self.docs)
        if n == 0:
            raise TransferError("No paired rows: the two stores share no position.", "Check that the corpora match.")
        n_source, n_target = len(self.source.indptr) - 1, len(self.target.indptr) - 1
        if n_source != n or n_target != n:
            raise TransferError(f"Paired rows differ: {n_source} source, {n_target} target, {n} document marks.")
        for side, m in (("source", self.source), ("target", self.target)):
            if not np.all(np.isfinite(m.data)):
                raise TransferError(f"The {side} activations hold NaN or infinity.", "Harvest again.")

    def take(self, rows: np.ndarray) -> PairedActivations:
        """These rows only."""
        return PairedActivations(
            self.source[rows],
            self.target[rows],
            self.docs[rows],
            None if self.source_residual is None else chosen(self.source_residual, rows),
            None if self.target_residual is None else chosen(self.target_residual, rows),
        )

    def split(self, fraction: float, seed: int) -> tuple[PairedActivations, PairedActivations]:
        """Two parts with no document in common; the first holds about ``fraction`` of the documents."""
        ids = np.unique(self.docs)
        chosen = np.random.default_rng(seed).permutation(ids)[: max(1, round(fraction * len(ids)))]
        first = np.isin(self.docs, chosen)
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))

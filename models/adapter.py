"""A language model with its SAE: texts in, sparse features out."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from models.language import LanguageModel
from models.placement import place
from models.sae import Dictionary
from models.token_filter import counted, name
from models.tokens import Rendered
from transfer.core.errors import TransferError
from transfer.core.space import FeatureSpace

AHEAD = 2
"""Batches of the residual stream that may wait to be encoded."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Features of the content tokens of some texts, in text order."""

    tokens: sp.csr_matrix
    """float32 CSR [tokens, n_features]"""
    docs: np.ndarray
    """Text of each token, int32 [tokens], non-decreasing."""
    residual: np.ndarray | None = None
    """float32 or float16 [tokens, d_model], where asked for."""


def max_over_tokens(tokens: sp.csr_matrix, docs: np.ndarray, n_docs: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Largest code of each feature in each document, in time linear in the codes.

    Args:
        tokens: Non-negative codes, CSR [tokens, n_features].
        docs: Document of each token [tokens], non-decreasing.
        n_docs: Documents, also those without a token.

    Returns:
        Maxima, float32 CSR [docs, n_features], and the content-token position of each (its first, on ties) plus one,
        int32 CSR with the same pattern.
    """
    shape = (n_docs, tokens.get_shape()[1])
    columns = tokens.tocsc()
    if columns.nnz == 0:
        return sp.csr_matrix(shape, dtype=np.float32), sp.csr_matrix(shape, dtype=np.int32)
    # Column by column and token by token: the codes of one feature in one document lie together.
    doc = docs[columns.indices]
    feature = np.repeat(np.arange(shape[1], dtype=np.int32), np.diff(columns.indptr))
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(doc) != 0) | (np.diff(feature) != 0)]))
    largest = np.maximum.reduceat(columns.data, starts)
    sizes = np.diff(np.append(starts, columns.nnz))
    group = np.repeat(np.arange(len(starts)), sizes)
    at = np.flatnonzero(columns.data == largest[group])
    at = at[np.concatenate([[True], np.diff(group[at]) != 0])]
    first_token = np.searchsorted(docs, np.arange(n_docs))
    position = columns.indices[at] - first_token[doc[at]] + 1
    ends = np.concatenate([[0], np.cumsum(np.bincount(feature[starts], minlength=shape[1]))])
    maxima = sp.csc_matrix((largest, doc[starts], ends), shape=shape)
    peaks = sp.csc_matrix((position.astype(np.int32), doc[starts], ends), shape=shape)
    return sp.csr_matrix(maxima), sp.csr_matrix(peaks)


def _joined(parts: list[sp.csr_matrix]) -> sp.csr_matrix:
    return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))


def _floor(codes: str) -> float | None:
    """The floor that ``dense:<floor>`` names, 0 for ``dense``, None for ``sae``."""
    kind, colon, value = codes.partition(":")
    try:
        floor = float(value) if colon else 0.0
    except ValueError:
        floor = -1.0
    if kind not in ("sae", "dense") or (kind == "sae" and colon) or not 0 <= floor < float("inf"):
        raise TransferError(f"Unknown rule for codes {codes!r}.", "Use sae, dense or dense:<floor>, such as dense:0.5.")
    return floor if kind == "dense" else None


@dataclass(frozen=True, eq=False)
class Adapter:
    """One model, one SAE, one layer."""

    language: LanguageModel
    dictionary: Dictionary
    space: FeatureSpace
    floor: float | None = None
    """Codes are the ReLU of every pre-activation above it; None for the SAE's own rule."""
    skip: tuple[str, ...] = ()
    """Kinds of tokens that do not count, see ``models.token_filter``."""

    @classmethod
    def load(
        cls,
        model: str,
        sae: str,
        layer: int | None = None,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        codes: str = "sae",
        skip: Sequence[str] = (),
    ) -> Self:
        """Load and tie together; whatever loads the same model again by name does it in the same way.

        Args:
            model: Model reference, see ``LanguageModel.load``.
            sae: SAE reference, see ``Dictionary.load``.
            layer: Canonical layer; from the SAE's metadata when left out.
            dtype: The model's dtype; the SAE runs in float32.
            device: A torch device.
            codes: ``sae`` for the SAE's own activation rule, ``dense`` or ``dense:<floor>`` for every pre-activation
                above 0 or above a floor. Part of the space, as ``skip``: two rules never mix.
            skip: Kinds of tokens that do not count: ``space``, ``punctuation``, ``digits``.

        Raises:
            TransferError: When the widths differ, the layer is unknown, out of range or not the SAE's own, or ``codes``
                or ``skip`` are none of these.
        """
        place(model, dtype=dtype, device=device)
        language, dictionary = LanguageModel.load(model, dtype=dtype, device=device), Dictionary.load(sae, device)
        return cls.join(language, dictionary, layer, codes=codes, skip=skip)

    @classmethod
    def join(
        cls,
        language: LanguageModel,
        dictionary: Dictionary,
        layer: int | None = None,
        *,
        codes: str = "sae",
        skip: Sequence[str] = (),
    ) -> Self:
        """Tie a loaded model and a loaded SAE together; see ``load``."""
        floor = _floor(codes)
        if dictionary.d_model != language.d_model:
            raise TransferError(
                f"{dictionary.ref} reads a residual stream of width {dictionary.d_model}, "
                f"but that of {language.ref} is {language.d_model} wide.",
                "Pair each model with an SAE that was trained on it.",
            )
        stated = dictionary.layer
        if layer is not None and stated is not None and layer != stated:
            raise TransferError(
                f"{dictionary.ref} was trained on layer {stated}, the configuration says layer {layer}.",
                "Leave the layer out, or name the SAE of that layer.",
            )
        if layer is None:
            layer = stated
        if layer is None:
            raise TransferError(f"{dictionary.ref} does not say which layer it reads.", "Give the layer.")
        language.family.site(language.model, layer)
        space = FeatureSpace(
            model=language.ref,
            model_hash=language.hash,
            layer=layer,
            sae=dictionary.ref,
            sae_hash=dictionary.hash,
            n_features=dictionary.n_features,
            d_model=dictionary.d_model,
            rule=(dictionary.rule if floor is None else f"dense-{floor:g}") + name(skip),
            template_offset=language.template_offset,
        )
        adapter = cls(language, dictionary, space, floor, tuple(skip))
        _ = adapter.counted  # a wrong kind is told now
        return adapter

    @cached_property
    def counted(self) -> np.ndarray | None:
        """Whether each token of the vocabulary counts, bool [vocabulary]; None where all do."""
        return counted(self.language.renderer.bytes, self.skip) if self.skip else None

    def rendered(self, texts: list[str], max_tokens: int) -> list[tuple[Rendered, bool, int]]:
        """Texts as read, with the tokens that count as content; whether each was cut, and tokens left out by kind."""
        found = []
        for whole in self.language.render_many(texts):
            line, lost = whole.cut(max_tokens)
            if self.counted is None:
                found.append((line, lost, 0))
                continue
            keep = self.counted[np.asarray(line.ids, dtype=np.int64)[line.content]]
            kept = Rendered(line.ids, line.content[keep], line.ends[keep])
            found.append((kept, lost, int(np.count_nonzero(~keep))))
        return found

    def encode(
        self,
        rendered: list[Rendered],
        *,
        token_budget: int = 8192,
        residual: bool = False,
        half: bool = False,
        advance: Callable[[int], None] | None = None,
        own: bool = False,
    ) -> Codes:
        """Features of the content tokens of rendered texts, sparse at once.

        A thread of its own encodes while the model reads the next batch: with one torch thread each, the usual setting
        on a few cores, the SAE then takes no time beside the forward pass. The codes are the same.

        Memory: the codes themselves, ``AHEAD`` padded batches of the residual stream, and ``models.sae.CHUNK_BYTES``.

        Args:
            rendered: Texts.
            token_budget: Padded tokens in one forward pass at most.
            residual: Keep the residual stream of the content tokens too.
            half: Keep it in float16 (values beyond its range become infinite).
            advance: Called with the content tokens done after each batch.
            own: By the SAE's own rule even where the space is dense.
        """
        waiting: list[Future[sp.csr_matrix]] = []
        docs: list[np.ndarray] = []
        states: list[np.ndarray] = []
        # No content token sees what stands behind the last one, and what stands before the first is often the same.
        wanted = [r.ids[: r.content[-1] + 1] if len(r.content) else [] for r in rendered]
        begun = [r.ids[: r.content[0]] for r in rendered if len(r.content)]
        shared = len(os.path.commonprefix(begun))
        with ThreadPoolExecutor(1, "encode", torch.set_num_threads, (torch.get_num_threads(),)) as beside:
            for rows, hidden in self.language.stream(wanted, self.space.layer, token_budget, shared):
                width = hidden.shape[1]
                pick = np.concatenate([j * width + rendered[i].content - shared for j, i in enumerate(rows)])
                x = hidden.reshape(-1, self.space.d_model)[torch.from_numpy(pick).to(hidden.device)].float()
                if len(waiting) >= AHEAD:
                    waiting[-AHEAD].result()
                waiting.append(beside.submit(self._codes, x, own))
                docs.append(np.concatenate([np.full(len(rendered[i].content), i, dtype=np.int32) for i in rows]))
                if residual:
                    states.append((x.half() if half else x).cpu().numpy())
                if advance:
                    advance(len(pick))
            parts = [each.result() for each in waiting]
        if not parts:
            empty = np.zeros((0, self.space.d_model), np.float32) if residual else None
            return Codes(sp.csr_matrix((0, self.space.n_features), dtype=np.float32), np.zeros(0, np.int32), empty)
        doc = np.concatenate(docs)
        order = np.argsort(doc, kind="stable")
        tokens = sp.csr_matrix(sp.csr_matrix(sp.vstack(parts, format="csr"))[order])
        return Codes(tokens, doc[order], np.concatenate(states)[order] if residual else None)

    def _codes(self, x: Tensor, own: bool) -> sp.csr_matrix:
        if own or self.floor is None:
            return self.dictionary.encode(x)
        return self.dictionary.encode_dense(x, self.floor)

    def encode_texts(
        self, texts: list[str], *, max_tokens: int = 512, token_budget: int = 8192
    ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Max-pooled features of texts, in memory.

        Args:
            texts: Texts; each becomes one user turn.
            max_tokens: Longer ones are cut here.
            token_budget: Padded tokens in one forward pass at most.

        Returns:
            Maxima over content tokens, float32 CSR [texts, n_features], and their positions plus one, int32 CSR with
            the same pattern.
        """
        rendered = [line for line, _, _ in self.rendered(texts, max_tokens)]
        # Dense codes of many tokens are large; their maxima are not.
        step = max(len(texts) if self.floor is None else 32, 1)
        parts = [rendered[i : i + step] for i in range(0, len(texts), step)] or [[]]
        pooled = []
        for part in parts:
            codes = self.encode(part, token_budget=token_budget)
            pooled.append(max_over_tokens(codes.tokens, codes.docs, len(part)))
        return _joined([maxima for maxima, _ in pooled]), _joined([peaks for _, peaks in pooled])

    def _cut(self, texts: list[str], max_tokens: int) -> list[Rendered]:
        return [r.cut(max_tokens)[0] for r in self.language.render_many(texts)]

    def reconstruction(self, texts: list[str], *, max_tokens: int = 512) -> dict[str, float]:
        """How well the SAE reconstructs the content tokens of texts.

        Returns:
            ``nmse`` (squared error over squared deviation from the mean), ``l0`` (mean active features per token),
            ``dead`` (fraction of features that never fire), ``tokens``.

        Raises:
            TransferError: When the texts hold no token.
        """
        d = self.space.d_model
        error, square, n, total = 0.0, 0.0, 0, np.zeros(d)
        fired, active = np.zeros(self.space.n_features, dtype=bool), 0
        rendered = self._cut(texts, max_tokens)
        for i in range(0, len(rendered), 256):
            codes = self.encode(rendered[i : i + 256], residual=True, own=True)
            assert codes.residual is not None
            x = torch.from_numpy(codes.residual)
            made: Tensor = self.dictionary.decode(codes.tokens, x).cpu()
            error += float((x - made).double().pow(2).sum())
            square += float(x.double().pow(2).sum())
            total += x.double().sum(0).numpy()
            n += len(x)
            fired[codes.tokens.indices] = True
            active += codes.tokens.nnz
        if n == 0:
            raise TransferError("None of the texts holds a token to reconstruct.")
        spread = square - float(total @ total) / n
        return {
            "nmse": error / max(spread, 1e-12),
            "l0": active / n,
            "dead": float(1 - fired.mean()),
            "tokens": float(n),
        }

    def self_check(self) -> dict[str, Any]:
        """Compare reconstruction error and L0 with the SAE's card, on the texts the card was made with.

        Returns:
            ``nmse``, ``l0``, ``dead``, ``tokens`` and ``checked``; only ``checked: False`` without a card.

        Raises:
            TransferError: When the error differs by more than 10 % and 0.01, or L0 by more than 10 %: then the SAE
                most likely belongs to another model or layer.
        """
        expected = (self.dictionary.card.get("sae") or {}).get("check")
        if not expected or not expected.get("texts"):
            return {"checked": False}
        found = self.reconstruction(expected["texts"])
        off = [
            f"{name} is {found[key]:.3g}, its card says {expected[key]:.3g}"
            for name, key, slack in (("reconstruction error", "nmse", 0.01), ("mean L0", "l0", 0.0))
            if abs(found[key] - expected[key]) > 0.1 * abs(expected[key]) + slack
        ]
        if off:
            raise TransferError(
                f"{self.space.sae} does not fit {self.space.model} at layer {self.space.layer}: {'; '.join(off)}.",
                "Check the base model, its revision and the layer.",
            )
        return {**found, "checked": True}

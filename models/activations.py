"""Harvest a corpus into an ActivationStore: shard by shard, sparse, resumable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.adapter import Adapter, max_over_tokens
from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.files import save_arrays, write_json
from transfer.core.keys import SCHEMA, digest
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus

_LARGEST = np.finfo(np.float16).max


def harvest(
    adapter: Adapter,
    corpus: Corpus,
    out: Path,
    *,
    keep_residual: bool = False,
    token_budget: int = 8192,
    shard_docs: int = 2000,
    max_tokens: int = 512,
) -> ActivationStore:
    """Encode a corpus and write an ``ActivationStore``; ``meta.json`` comes last.

    A shard that is there under the same key (space, texts, settings) is kept, so the same call continues an
    interrupted one. Memory: one shard's codes (and residuals, where kept), one padded batch, and
    ``models.sae.CHUNK_BYTES``; never tokens × features. Dense codes above a low floor come near that: give them small
    shards.

    Args:
        adapter: Model and SAE.
        corpus: Texts; the store keeps their order.
        out: Folder of the store.
        keep_residual: Keep the residual stream of the same tokens, in float16.
        token_budget: Padded tokens in one forward pass at most.
        shard_docs: Documents a shard.
        max_tokens: Longer renderings are cut here.

    Returns:
        The store. ``counts``: ``empty`` texts without a content token (kept as empty rows), ``truncated`` texts that
        lost content tokens, ``clipped`` residual values beyond float16, and, where the adapter skips kinds of tokens,
        ``skipped`` content tokens.

    Raises:
        TransferError: For a corpus without texts or with repeated ids.
    """
    if not len(corpus):
        raise TransferError(f"The corpus {corpus.name} holds no texts.")
    if len({t.id for t in corpus}) < len(corpus):
        raise TransferError(f"The corpus {corpus.name} has ids that occur twice.", "Give each text its own id.")
    out = Path(out)
    # Until the last shard is written there is no finished store here.
    (out / "meta.json").unlink(missing_ok=True)
    kinds = ("tokens", "docs", "residual") if keep_residual else ("tokens", "docs")
    settings = {"max_tokens": max_tokens, "token_budget": token_budget, "kinds": kinds, "schema": SCHEMA}
    totals = {"empty": 0, "truncated": 0, "clipped": 0, "tokens": 0, **({"skipped": 0} if adapter.skip else {})}
    shards = range(0, len(corpus), shard_docs)
    expected = _expected_tokens(adapter, corpus, max_tokens)
    with progress(f"harvest {adapter.space.model}", expected, "tokens") as advance:
        for n, begin in enumerate(shards):
            texts = [t.text for t in corpus.texts[begin : begin + shard_docs]]
            key = digest([dataclasses.asdict(adapter.space), begin, texts, settings])
            files = {kind: out / f"{kind}-{n:05d}.safetensors" for kind in kinds}
            counts = _counts_of(files, key)
            if counts is None:
                arrays, counts = _shard(adapter, texts, begin, keep_residual, token_budget, max_tokens, advance)
                # One entry only: safetensors writes several in random order, and equal runs must give equal bytes.
                stamp = {"shard": json.dumps({"key": key, "counts": counts})}
                for kind, path in files.items():
                    save_arrays(path, arrays[kind], stamp)
            else:
                advance(counts["tokens"])
            totals = {name: totals[name] + counts[name] for name in totals}
    _remove_others(out, kinds, len(shards))
    n_tokens = totals.pop("tokens")
    write_json(
        out / "meta.json",
        {
            "schema": SCHEMA,
            "space": dataclasses.asdict(adapter.space),
            "corpus_hash": corpus.hash,
            "doc_ids": [t.id for t in corpus],
            "n_tokens": n_tokens,
            "shards": len(shards),
            "counts": totals,
        },
    )
    return ActivationStore.load(out)


def _shard(
    adapter: Adapter,
    texts: list[str],
    begin: int,
    keep_residual: bool,
    token_budget: int,
    max_tokens: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """Arrays of one shard by kind, and its counts."""
    cut = adapter.rendered(texts, max_tokens)
    rendered = [line for line, _, _ in cut]
    codes = adapter.encode(rendered, token_budget=token_budget, residual=keep_residual, half=True, advance=advance)
    docs, peaks = max_over_tokens(codes.tokens, codes.docs, len(texts))
    counts = {
        "empty": sum(not len(r.content) and not lost for r, lost, _ in cut),
        "truncated": sum(lost for _, lost, _ in cut),
        "clipped": 0,
        "tokens": len(codes.docs),
    }
    if adapter.skip:
        counts["skipped"] = sum(skipped for _, _, skipped in cut)
    arrays = {
        "tokens": {
            "indptr": codes.tokens.indptr.astype(np.int64),
            "indices": codes.tokens.indices.astype(np.int32),
            "values": codes.tokens.data.astype(np.float32),
            "doc": (codes.docs + begin).astype(np.int32),
            "end": np.concatenate([np.zeros(0, np.int32), *(r.ends for r in rendered)]),
        },
        "docs": {
            "indptr": docs.indptr.astype(np.int64),
            "indices": docs.indices.astype(np.int32),
            "values": docs.data.astype(np.float32),
            "position": (peaks.data - 1).astype(np.int32),
        },
    }
    if codes.residual is not None:
        beyond = np.isinf(codes.residual)
        counts["clipped"] = int(beyond.sum())
        arrays["residual"] = {"residual": np.clip(codes.residual, -_LARGEST, _LARGEST)}
    return arrays, counts


def _counts_of(files: dict[str, Path], key: str) -> dict[str, int] | None:
    """Counts of a shard that is already there under this key; ``None`` when any of its files is not."""
    from safetensors import SafetensorError, safe_open

    counts = None
    for path in files.values():
        try:
            with safe_open(path, "np") as file:
                stamp = json.loads((file.metadata() or {}).get("shard", "{}"))
        except (OSError, SafetensorError):
            return None
        if stamp.get("key") != key:
            return None
        counts = stamp["counts"]
    return counts


def _remove_others(out: Path, kinds: tuple[str, ...], shards: int) -> None:
    """Delete shards of an earlier harvest with other settings, which this store does not name."""
    keep = {f"{kind}-{n:05d}.safetensors" for kind in kinds for n in range(shards)}
    for kind in ("tokens", "docs", "residual"):
        for path in out.glob(f"{kind}-*.safetensors"):
            if path.name not in keep:
                path.unlink()


def _expected_tokens(adapter: Adapter, corpus: Corpus, max_tokens: int) -> int:
    """Content tokens of the corpus, extrapolated from an even sample; for the progress line only."""
    sample = [t.text for t in corpus.texts[:: max(1, len(corpus) // 100)]]
    tokens = sum(len(r.cut(max_tokens)[0].content) for r in adapter.language.render_many(sample))
    share = sum(len(t) for t in sample) / max(1, sum(len(t.text) for t in corpus))
    return max(1, round(tokens / share)) if share else 1

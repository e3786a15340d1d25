"""A saved alignment's life: fitted on a share of the documents, scored on the rest, scored again on other texts."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from aligners.base import Aligner
from aligners.calibrate import score_matches
from aligners.tokens import Pooling, pair_stores
from transfer.alignment.sides import SIDES, Pair
from transfer.core.alignment import Alignment
from transfer.core.console import say
from transfer.core.env import versions
from transfer.core.errors import TransferError
from transfer.core.keys import text_key
from transfer.core.space import FeatureView
from transfer.core.store import ActivationStore, PairedActivations
from transfer.core.texts import Corpus

HELDOUT = "held-out documents of the fit's own corpus"
NEW = "new documents"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an artefact is fitted and scored."""

    fraction: float = 0.6
    """Share of the documents to fit on; the rest is held out."""
    n_null: int = 20
    """Draws of the shuffled-corpus null."""
    seed: int = 0
    pool: Pooling = "last"
    """How the tokens between two shared boundaries become one row (``aligners.tokens.Pooling``)."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise TransferError(f"The share of documents to fit on is {self.fraction}; it must lie between 0 and 1.")
        if self.n_null < 1:
            raise TransferError(f"n_null is {self.n_null}; the null needs at least one draw.")
        if self.pool not in get_args(Pooling):
            raise TransferError(f"Unknown pooling {self.pool!r}.", f"Use one of {', '.join(get_args(Pooling))}.")


def writable(out: Path) -> None:
    """Raise before any work when ``out`` cannot become a folder to write in.

    Raises:
        TransferError: Naming the folder or file in the way.
    """
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise TransferError(
            f"Cannot write to {out}: {place} is {'not writable' if place.is_dir() else 'a file'}.",
            "Name another folder with --out.",
        )


def existing(out: Path, request: dict[str, Any]) -> Alignment | None:
    """The artefact in ``out`` when it answers the same request; None when the folder holds none.

    Raises:
        TransferError: When it holds another artefact, or a damaged one.
    """
    if not (out / "alignment.json").exists():
        return None
    found = Alignment.load(out)
    scored = found.provenance.get("scored", {})
    if found.provenance.get("request") != request or scored.get("part") != HELDOUT:
        raise TransferError(
            f"{out} already holds another artefact ({found.method}, {found.source.id} to {found.target.id}).",
            "Pass --force to replace it, or name another folder.",
        )
    return found


def same_inputs(found: Alignment, stores: Pair) -> bool:
    """Whether a fit on these stores would be the fit that was found."""
    here = (found.source, found.target, found.provenance["fit"]["corpus_hash"])
    return here == (stores[0].space, stores[1].space, stores[0].corpus_hash)


def fit(
    aligner: Aligner,
    views: tuple[FeatureView, FeatureView],
    stores: Pair,
    settings: Settings,
    *,
    corpus: Corpus | None = None,
    request: dict[str, Any] | None = None,
) -> Alignment:
    """Fit on a seeded share of the documents and score the frozen matches on the others.

    Args:
        aligner: Unfitted.
        views: Source and target.
        stores: Source and target, of one corpus.
        settings: Share, null and seed.
        corpus: The texts of the stores where they are known; keys of those fitted on are kept, so that a later score
            can leave them out.
        request: What was asked for, kept to recognise the same request.

    Raises:
        TransferError: When the documents do not suffice for both parts, or the aligner refuses its input.
    """
    kept = all(s.keeps_residuals for s in stores)
    if "residuals" in aligner.takes() and "residuals" not in aligner.needs() and not kept:
        bare = ", ".join(s.space.id for s in stores if not s.keeps_residuals)
        say(f"no residuals are kept of {bare}: {aligner.name()} learns its space from feature pairs and finds less")
    wanted = "residuals" in aligner.needs() or ("residuals" in aligner.takes() and kept)
    pairs = pair_stores(*stores, residuals=wanted, pool=settings.pool)
    docs = np.unique(pairs.docs)
    if len(docs) < 2 or round(settings.fraction * len(docs)) >= len(docs):
        raise TransferError(
            f"{len(docs)} documents cannot be divided into a fit ({settings.fraction:.0%}) and a held-out part.",
            "Give more texts or lower the share to fit on.",
        )
    part, heldout = pairs.split(settings.fraction, seed=settings.seed)
    fit_docs = np.unique(part.docs)
    say(
        f"fit {aligner.name()}  {stores[0].space.id} ({stores[0].space.n_features:,}) to {stores[1].space.id} "
        f"({stores[1].space.n_features:,})  {len(part.docs):,} paired positions of {len(fit_docs):,} documents"
    )
    start = time.monotonic()
    aligner.fit(*views, pairs=part)
    say(f"fit {aligner.name()}  {len(aligner.alignment_):,} matches in {time.monotonic() - start:.1f} s")
    scored = aligner.score(heldout, n_null=settings.n_null, seed=settings.seed)
    name = corpus.name if corpus else ""
    return dataclasses.replace(
        scored,
        # Seconds differ from run to run; an artefact must not.
        seconds=0.0,
        provenance={
            "request": request or {},
            "versions": versions(),
            "fit": {
                "corpus": name,
                "corpus_hash": stores[0].corpus_hash,
                "docs": len(fit_docs),
                "rows": len(part.docs),
                "fraction": settings.fraction,
                "seed": settings.seed,
                "pool": settings.pool,
            },
            "scored": _scored(HELDOUT, name, stores[0], heldout, settings, overlap=0),
        },
        fit_texts=None if corpus is None else _keys(corpus, fit_docs),
    )


def score(alignment: Alignment, stores: Pair, settings: Settings, *, corpus: Corpus | None = None) -> Alignment:
    """Score the frozen matches on other documents; the matches stay, ``heldout_corr``, p and q are replaced.

    Documents that the fit has seen are left out: those of its own corpus by its seed, texts known to both by their
    keys. Where neither side knows its texts, ``provenance["scored"]["overlap"]`` is None: not known.

    Raises:
        TransferError: When the stores are of other spaces, or no unseen document remains.
    """
    for side, space, store in zip(SIDES, (alignment.source, alignment.target), stores, strict=True):
        space.check(store.space, f"The {side} of the alignment")
    before = alignment.provenance.get("fit", {})
    pairs = pair_stores(*stores, residuals=False, pool=before.get("pool", "last"))
    part, overlap = NEW, None
    if stores[0].corpus_hash == before.get("corpus_hash"):
        pairs = pairs.split(before["fraction"], seed=before["seed"])[1]
        part, overlap = HELDOUT, 0
    elif corpus is not None and alignment.fit_texts is not None:
        seen = np.isin(_document_keys(corpus), alignment.fit_texts)
        overlap = int(np.count_nonzero(seen[np.unique(pairs.docs)]))
        rows = np.flatnonzero(~seen[pairs.docs])
        if not len(rows):
            raise TransferError(f"The alignment was fitted on all texts of {corpus.name}.", "Score it on other texts.")
        pairs = pairs.take(rows)
    say(
        f"score {alignment.method}  {len(alignment):,} matches on {len(pairs.docs):,} paired positions of "
        f"{len(np.unique(pairs.docs)):,} documents ({part}"
        + (f"; {overlap} that the fit has seen are left out)" if overlap else ")")
    )
    scored = score_matches(alignment, pairs, n_null=settings.n_null, seed=settings.seed)
    account = _scored(part, corpus.name if corpus else "", stores[0], pairs, settings, overlap)
    return dataclasses.replace(scored, provenance={**alignment.provenance, "scored": account})


def _scored(
    part: str, name: str, store: ActivationStore, pairs: PairedActivations, settings: Settings, overlap: int | None
) -> dict[str, Any]:
    return {
        "part": part,
        "corpus": name,
        "corpus_hash": store.corpus_hash,
        "docs": len(np.unique(pairs.docs)),
        "rows": len(pairs.docs),
        "seed": settings.seed,
        "overlap": overlap,
    }


def _document_keys(corpus: Corpus) -> np.ndarray:
    return np.array([text_key(t.text) for t in corpus], dtype=np.uint64)


def _keys(corpus: Corpus, docs: np.ndarray | Sequence[int]) -> np.ndarray:
    return np.unique(_document_keys(corpus)[np.asarray(docs)])

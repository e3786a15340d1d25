"""The two sides of an alignment: activation stores in folders, or harvested first from models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transfer.core.config import HarvestSection
from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.rundir import RunDir
from transfer.core.space import FeatureSpace, FeatureView
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.corpus import BUNDLED, load_corpus

if TYPE_CHECKING:
    from models.adapter import Adapter

MODEL_SCHEMES = ("zoo:", "path:", "hub:")
SIDES = ("source", "target")
Pair = tuple[ActivationStore, ActivationStore]


@dataclass(frozen=True)
class SideRef:
    """How one side is named on the command line."""

    side: str
    """``source`` or ``target``."""
    ref: str
    """Folder of an activation store, or a model reference."""
    sae: str | None = None
    """SAE reference; for a store, where its SAE now is, when it has moved."""
    layer: int | None = None

    @property
    def is_model(self) -> bool:
        """Whether it has to be harvested first."""
        return self.ref.startswith(MODEL_SCHEMES)

    def model_sae(self) -> str:
        """The SAE of a model reference: the one named, else ``sae`` in the model's own folder.

        Raises:
            TransferError: For a Hub model without a named SAE.
        """
        if self.sae:
            return self.sae
        if self.ref.startswith("hub:"):
            raise TransferError(f"{self.ref} does not say which SAE reads it.", f"Name one with --{self.side}-sae.")
        return f"{self.ref.rstrip('/')}/sae"


def read_corpus(ref: str | None, *, text_column: str | None = None, splits: Sequence[str] = ()) -> Corpus | None:
    """A corpus to align on; None for None.

    Args:
        ref: A file, ``hub:<dataset>@<revision>``, ``bundled:<name>``, or ``bundled`` for the bundled requests.
        text_column: Column of the text.
        splits: Only these splits, in this order; all texts when empty.

    Raises:
        TransferError: When it cannot be read, a split holds no text, or a column or split of no corpus is named.
    """
    if ref is None:
        if text_column or splits:
            raise TransferError("--split and --text-column choose from a corpus, and none is named.", "Add --corpus.")
        return None
    ref = f"{BUNDLED}requests" if ref == "bundled" else ref
    corpus = load_corpus(ref, text_column=text_column) if text_column else load_corpus(ref)
    if not splits:
        return corpus
    parts = [corpus.split(name) for name in splits]
    for name, part in zip(splits, parts, strict=True):
        if not len(part):
            known = ", ".join(sorted({t.split for t in corpus} - {""})) or "none"
            raise TransferError(f"{ref} has no text of split {name!r}.", f"Its splits: {known}.")
    return Corpus(f"{corpus.name}/{'+'.join(splits)}", tuple(itertools.chain.from_iterable(parts)))


def open_stores(refs: tuple[SideRef, SideRef], corpus: Corpus | None, runs: Path, *, residual: bool) -> Pair:
    """Open the stores, harvesting where a side is a model; a harvest made before on the same texts is reused.

    Args:
        refs: Source and target.
        corpus: What models are harvested on; a store must hold the same texts.
        runs: Folder of runs; harvests lie in its ``.store``.
        residual: Keep the residual stream in a new harvest.

    Raises:
        TransferError: For a missing store, a model without corpus, or a store of other texts.
    """
    stores = [None if r.is_model else _opened(r) for r in refs]
    for ref, store in zip(refs, stores, strict=True):
        if store is None and corpus is None:
            raise TransferError(f"{ref.ref} has to be harvested first.", "Name texts with --corpus.")
        if store is not None and corpus is not None and store.corpus_hash != corpus.hash:
            raise TransferError(
                f"The store {ref.ref} holds other texts ({store.corpus_hash}) than {corpus.name} ({corpus.hash}).",
                "Name the texts it was harvested on, or give the model in place of the store.",
            )
    # Both are loaded before any is harvested: a wrong name is told at once, not after minutes.
    adapters = [_loaded(ref) if store is None else None for ref, store in zip(refs, stores, strict=True)]
    for i, adapter in enumerate(adapters):
        if adapter is not None:
            assert corpus is not None
            stores[i] = stored(adapter, corpus, runs, residual)
    source, target = stores
    assert source is not None and target is not None
    return source, target


def _opened(ref: SideRef) -> ActivationStore:
    folder = Path(ref.ref)
    if not folder.is_dir():
        raise TransferError(
            f"The {ref.side} {ref.ref!r} is neither a folder with an activation store nor a model reference.",
            "Write a folder, zoo:<name>, path:<folder> or hub:<org/name>@<revision>.",
        )
    inner = folder / "store"  # a folder of the harvest stage
    return ActivationStore.load(inner if not (folder / "meta.json").is_file() and inner.is_dir() else folder)


def _loaded(ref: SideRef) -> Adapter:
    say(f"load {ref.ref}")
    from models.adapter import Adapter

    return Adapter.load(ref.ref, ref.model_sae(), ref.layer)


def stored(adapter: Adapter, corpus: Corpus, runs: Path, residual: bool) -> ActivationStore:
    """Activations of a corpus, harvested once and kept in the folder of runs.

    Args:
        adapter: Model and SAE.
        corpus: Texts.
        runs: Folder of runs; harvests lie in its ``.store``.
        residual: Keep the residual stream too.
    """
    from transfer import stages

    settings = HarvestSection.model_validate({"keep_residual": residual})
    inputs = {
        "space": dataclasses.asdict(adapter.space),
        "corpus": corpus.hash,
        "harvest": settings.model_dump(mode="json"),
    }
    folder = RunDir(runs, ".align").stage(
        "harvest",
        inputs,
        lambda out: stages.harvest(adapter, corpus, out, settings),
        f"{adapter.space.model} {corpus.name}",
    )
    return ActivationStore.load(folder / "store")


def open_views(
    spaces: tuple[FeatureSpace, FeatureSpace], saes: tuple[str | None, str | None], *, unembedding: bool
) -> tuple[FeatureView, FeatureView]:
    """What an aligner may see of both spaces, read from the SAEs (and, for the unembedding, models) they name.

    Args:
        spaces: Source and target.
        saes: Other places of the same SAEs, where they have moved.
        unembedding: Also the unembedding rows of the tokens that both vocabularies hold; loads both models.

    Raises:
        TransferError: When an SAE or model cannot be loaded or is not the one that the space was harvested with.
    """
    made = []
    for side, space, sae in zip(SIDES, spaces, saes, strict=True):
        made.append(FeatureView(space, _directions(side, space, sae or space.sae)))
    if not unembedding:
        return made[0], made[1]
    from models.language import LanguageModel

    models = [LanguageModel.load(space.model) for space in spaces]
    for space, model in zip(spaces, models, strict=True):
        _same(space, "model", model.ref, model.hash, space.model_hash)
    words = [model.vocabulary() for model in models]
    shared = sorted(set(words[0]) & set(words[1]))
    rows = [
        np.asarray(m.unembedding(np.array([w[s] for s in shared], dtype=np.int64)), dtype=np.float32)
        for m, w in zip(models, words, strict=True)
    ]
    source, target = (dataclasses.replace(v, unembedding=u) for v, u in zip(made, rows, strict=True))
    return source, target


def _directions(side: str, space: FeatureSpace, ref: str) -> np.ndarray:
    say(f"load {ref}")
    from models.sae import decoder_rows

    try:
        rows, found = decoder_rows(ref)
    except TransferError as error:
        raise TransferError(str(error), f"Say with --{side}-sae where the SAE of {space.id} is.") from None
    _same(space, "SAE", ref, found, space.sae_hash)
    return rows


def _same(space: FeatureSpace, what: str, ref: str, found: str, expected: str) -> None:
    if found != expected:
        raise TransferError(
            f"{ref} is not the {what} that {space.id} was harvested with ({found}, not {expected}).",
            "Harvest again.",
        )

"""What the rungs on real models work with: models with SAEs, their stores of one corpus, parts of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from aligners.base import Aligner
from aligners.tokens import pair_stores
from models.adapter import Adapter
from transfer.alignment.sides import SideRef, open_views, stored
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import ActivationStore, PairedActivations
from transfer.core.texts import Corpus

FIT = 0.6
"""Share of the documents of seen topics to fit on; the rest is held out."""
UNSEEN = 0.25
"""Share of the topics that no fit sees."""
NULL_DRAWS = 20


@dataclass(frozen=True)
class Parts:
    """Paired activations by what they are for; no document is in two parts."""

    fit: PairedActivations
    heldout: PairedActivations
    unseen: PairedActivations | None
    """Another domain; None where the corpus has no topics and no other corpus was named."""


@dataclass
class Zoo:
    """Models with SAEs on one corpus; loads and harvests each once, when it is first asked for."""

    models: tuple[str, ...]
    second_sae: str | None
    """Another SAE of the first model, for the seed ceiling."""
    corpus: Corpus
    runs: Path
    unseen: Corpus | None = None
    """Another domain; without it whole topics of the corpus are held out."""
    seed: int = 0
    _sides: dict[str, Adapter] = field(default_factory=dict, repr=False)
    _stores: dict[tuple[str, str], ActivationStore] = field(default_factory=dict, repr=False)

    def adapter(self, ref: str, sae: str | None = None) -> Adapter:
        """A model with an SAE; its own one when none is named."""
        key = sae or SideRef("source", ref).model_sae()
        if key not in self._sides:
            self._sides[key] = Adapter.load(ref, key)
        return self._sides[key]

    @property
    def first(self) -> Adapter:
        """The model that the single-model rungs use."""
        return self.adapter(self.models[0])

    @cached_property
    def seeds(self) -> tuple[Adapter, Adapter]:
        """Two SAEs of the first model.

        Raises:
            TransferError: When no second SAE was named.
        """
        if self.second_sae is None:
            raise TransferError("There is no second SAE of the first model.", "Name one with --second-sae.")
        return self.first, self.adapter(self.models[0], self.second_sae)

    def pairs_of_models(self) -> list[tuple[Adapter, Adapter]]:
        """All pairs of different models, in the order named."""
        sides = [self.adapter(ref) for ref in self.models]
        return [(a, b) for i, a in enumerate(sides) for b in sides[i + 1 :]]

    def store(self, side: Adapter, corpus: Corpus | None = None) -> ActivationStore:
        """Activations and residuals of a corpus; made once, and shared with ``transfer align fit``."""
        corpus = corpus or self.corpus
        key = (side.space.id, corpus.hash)
        if key not in self._stores:
            self._stores[key] = stored(side, corpus, self.runs, residual=True)
        return self._stores[key]

    def pairs(self, a: Adapter, b: Adapter) -> PairedActivations:
        """Both sides at shared positions of the corpus, residuals too."""
        return pair_stores(self.store(a), self.store(b))

    def parts(self, a: Adapter, b: Adapter) -> Parts:
        """Paired activations to fit on, held-out ones of the same topics, and unseen topics or the other corpus."""
        pairs = self.pairs(a, b)
        if self.unseen is not None:
            other = pair_stores(self.store(a, self.unseen), self.store(b, self.unseen), residuals=False)
            return Parts(*pairs.split(FIT, seed=self.seed), other)
        hidden = np.isin([t.topic for t in self.corpus], self.unseen_topics)[pairs.docs]
        if not hidden.any():
            return Parts(*pairs.split(FIT, seed=self.seed), None)
        seen, other = pairs.take(np.flatnonzero(~hidden)), pairs.take(np.flatnonzero(hidden))
        return Parts(*seen.split(FIT, seed=self.seed), other)

    @cached_property
    def unseen_topics(self) -> list[str]:
        """Topics that no fit sees; none when texts have fewer than two, or another corpus plays the part."""
        topics = sorted({t.topic for t in self.corpus} - {""})
        if self.unseen is not None or len(topics) < 2:
            return []
        n = max(1, round(UNSEEN * len(topics)))
        return sorted(np.random.default_rng(self.seed).permutation(topics)[:n].tolist())

    def unseen_texts(self) -> list[str]:
        """Texts of the unseen topics or of the other corpus; all texts when there is neither."""
        if self.unseen is not None:
            return [t.text for t in self.unseen]
        return [t.text for t in self.corpus if not self.unseen_topics or t.topic in self.unseen_topics]

    def views(self, a: Adapter, b: Adapter, *, unembedding: bool = False) -> tuple[FeatureView, FeatureView]:
        """What an aligner may see of both."""
        if unembedding:
            return open_views((a.space, b.space), (None, None), unembedding=True)
        return view(a), view(b)


def view(side: Adapter) -> FeatureView:
    """The decoder of a loaded SAE."""
    return FeatureView(side.space, side.dictionary.directions())


def fitted(aligner: Aligner, views: tuple[FeatureView, FeatureView], parts: Parts, seed: int) -> Alignment:
    """Fitted on one part of the documents, scored on the held-out ones."""
    return aligner.fit(*views, pairs=parts.fit).score(parts.heldout, n_null=NULL_DRAWS, seed=seed)


def title(a: Adapter, b: Adapter) -> str:
    """Both sides as a reader names them."""
    if a.space.model == b.space.model:
        return f"{a.space.sae} ↔ {b.space.sae}"
    return f"{a.space.model} ↔ {b.space.model}"

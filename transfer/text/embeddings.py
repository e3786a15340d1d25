"""One vector a text: a sentence encoder where one is installed, mean hidden states, or a lexical stand-in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.span import words

if TYPE_CHECKING:
    from models.language import LanguageModel

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Small sentence encoder that ``auto`` looks for on this machine."""
COLUMNS = 1 << 15
"""Hash buckets of the lexical stand-in."""
DIMENSIONS = 100
"""Components kept of the lexical stand-in."""


@dataclass(frozen=True)
class Embedder:
    """Texts to vectors, under a name that every result carries."""

    name: str
    encode: Callable[[Sequence[str]], np.ndarray] = field(repr=False)
    """``texts -> float [texts, dimensions]``, not normalised."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float64 [texts, dimensions]; a row of zeros where a text has no vector.

        Raises:
            TransferError: For a wrong number of vectors, NaN or infinity.
        """
        found = np.asarray(self.encode(list(texts)), dtype=np.float64)
        if found.ndim != 2 or len(found) != len(texts) or not np.all(np.isfinite(found)):
            raise TransferError(f"{self.name} did not give one finite vector for each of {len(texts)} texts.")
        norm = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found, norm, out=np.zeros_like(found), where=norm > 1e-12)


def lexical(reference: Sequence[str], *, dimensions: int = DIMENSIONS, seed: int = 0) -> Embedder:
    """TF-IDF over hashed words, cut to its first components (LSA): tells texts by their words, not by what they mean.

    Both weights and components are fitted on ``reference``; words that never occur there have no vector. Memory is
    the reference's words plus ``(words that occur, at most 2^15) x dimensions`` floats, several times over.

    Args:
        reference: Texts to fit on, at least three that hold words.
        dimensions: Components; fewer where the reference is smaller.
        seed: Of the randomised decomposition.

    Raises:
        TransferError: When the reference is too small to fit.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    # Typed as Any: the stubs know one type of each setting, and no sparse matrix.
    settings: dict[str, Any] = {"n_features": COLUMNS, "analyzer": words, "alternate_sign": False, "norm": None}
    hashed: Any = HashingVectorizer(**settings)
    counts = hashed.transform(reference).tocsc()
    used = np.flatnonzero(np.diff(counts.indptr))
    size = min(dimensions, len(used) - 1, len(reference) - 1)
    if size < 2:
        raise TransferError(
            f"{len(reference)} texts with {len(used)} different words are too few to fit embeddings on.",
            "Give more reference texts.",
        )
    weights: Any = TfidfTransformer(sublinear_tf=True)
    rows = weights.fit_transform(counts[:, used].tocsr())
    parts = TruncatedSVD(size, random_state=seed).fit(rows)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return parts.transform(weights.transform(hashed.transform(texts).tocsc()[:, used].tocsr()))

    return Embedder(f"words only: hashed TF-IDF, {size} components", encode)


def hidden_states(language: LanguageModel, reference: Sequence[str], *, layer: int | None = None) -> Embedder:
    """Mean residual stream of a language model over a text's tokens, less the mean of ``reference``.

    Without the mean taken off, all texts of a language model point the same way. Memory is one padded batch.

    Args:
        language: The model.
        reference: Texts whose mean is taken off.
        layer: Canonical layer; by default the middle one. Texts longer than the context are cut there.
    """
    at = language.n_layers // 2 if layer is None else layer
    context = int(language.model.config.max_position_embeddings)
    bos = int(language.tokenizer.bos_token is not None)

    def raw(texts: Sequence[str]) -> np.ndarray:
        ids = [line[:context] for line in language.renderer.plain(list(texts))]
        found = np.zeros((len(ids), language.d_model))
        for rows, hidden in language.stream(ids, at):
            for i, states in zip(rows, hidden, strict=True):
                if len(ids[i]) > bos:
                    found[i] = states[bos : len(ids[i])].double().mean(dim=0).cpu().numpy()
        return found

    centre = raw(reference).mean(axis=0)
    ref = language.card.get("name", language.model.config.model_type)
    return Embedder(f"mean hidden states of {ref}, layer {at}", lambda texts: raw(texts) - centre)


def sentence_encoder(name: str = SENTENCE_MODEL) -> Embedder | None:
    """A sentence-transformers model that lies on this machine; None where it does not. Nothing is downloaded."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    import sentence_transformers  # pyright: ignore[reportMissingImports]

    try:
        model: Any = sentence_transformers.SentenceTransformer(name, local_files_only=True)
    except Exception:  # noqa: BLE001 - the library raises a dozen kinds for "not on this machine"
        return None
    return Embedder(name, lambda texts: model.encode(list(texts), show_progress_bar=False))


def get_embedder(wanted: str, reference: Sequence[str], *, seed: int = 0) -> Embedder:
    """An embedder by name.

    Args:
        wanted: ``auto`` (the small sentence encoder where it is installed, else ``words``), ``words``, a model
            reference such as ``zoo:llama`` (its hidden states), or the name of a sentence-transformers model.
        reference: Texts to fit or centre on.
        seed: Of the fit.

    Raises:
        TransferError: When what was asked for is not on this machine.
    """
    if wanted.partition(":")[0] in ("zoo", "path", "hub"):
        from models.language import LanguageModel

        return hidden_states(LanguageModel.load(wanted), reference)
    if wanted == "words":
        return lexical(reference, seed=seed)
    found = sentence_encoder(SENTENCE_MODEL if wanted == "auto" else wanted)
    if found is None and wanted != "auto":
        raise TransferError(
            f"The sentence encoder {wanted!r} is not on this machine.",
            "Install sentence-transformers and fetch the model, or use words, auto or a model such as zoo:llama.",
        )
    return found or lexical(reference, seed=seed)

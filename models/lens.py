"""Which tokens a feature's direction makes likelier: the logit lens on decoder rows."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

BLOCK_BYTES = 64 * 2**20


class Vocabulary(Protocol):
    """The part of a language model that the lens reads; ``LanguageModel`` is one."""

    def unembedding(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Unembedding rows with the final norm's weight folded in, float32 [tokens, d_model]."""
        ...

    def vocabulary(self) -> dict[bytes, int]:
        """Bytes that each ordinary token writes, and its id."""
        ...


def promoted_tokens(
    language: Vocabulary, directions: np.ndarray, features: np.ndarray, n: int = 6
) -> dict[int, tuple[tuple[str, float], ...]]:
    """Tokens whose logit rises most along each feature's direction (nostalgebraist 2020, on decoder rows).

    The direction is read as if it stood alone before the unembedding: through the final norm's weight, but not its
    scale, which is the same for all tokens, and past the layers in between, which makes it a hint for late layers
    only. Values are z-scores over the vocabulary; tokens below √(2 ln V), about the largest of V normal draws, are
    left out, so that a direction without clear tokens has none. Tokens that write no letter or digit are left out too.

    Args:
        language: The unembedding and the vocabulary.
        directions: Decoder rows, float32 [n_features, d_model].
        features: Ids wanted.
        n: Tokens a feature at most.

    Returns:
        Text and z of each token, best first. Memory: the unembedding and blocks of 64 MiB.
    """
    words = {i: w.decode("utf8", "replace").strip() for w, i in language.vocabulary().items()}
    ids = np.array(sorted(i for i, w in words.items() if any(c.isalnum() for c in w)), dtype=np.int64)
    rows = language.unembedding(ids)
    least = math.sqrt(2 * math.log(max(len(ids), 2)))
    block = max(1, BLOCK_BYTES // (4 * max(len(ids), 1)))
    out: dict[int, tuple[tuple[str, float], ...]] = {}
    features = np.asarray(features, dtype=np.int64)
    for begin in range(0, len(features), block):
        part = features[begin : begin + block]
        logits = directions[part].astype(np.float32) @ rows.T
        spread = logits.std(axis=1, keepdims=True)
        z = (logits - logits.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
        best = np.argpartition(-z, min(4 * n, z.shape[1] - 1), axis=1)[:, : 4 * n]
        for feature, row, places in zip(part, z, best, strict=True):
            found: dict[str, float] = {}
            for place in sorted(places.tolist(), key=lambda j: (-row[j], j)):
                # Tokens that differ in case or in a leading blank only are one word to a reader.
                found.setdefault(words[int(ids[place])].casefold(), float(row[place]))
            out[int(feature)] = tuple((w, v) for w, v in found.items() if v >= least)[:n]
    return out

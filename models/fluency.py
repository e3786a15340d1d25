"""How usual a text is to a model that is left alone: what a cap on steering is measured in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from models.language import LanguageModel


def log_perplexity(language: LanguageModel, token_budget: int = 8192) -> Callable[[list[str]], np.ndarray]:
    """Log-perplexity under the unsteered model.

    Args:
        language: The model.
        token_budget: Padded tokens in one forward pass at most.

    Returns:
        A function from raw texts to nats per token, float64 [texts]: each text stands alone behind BOS (without a BOS
        its first token is not scored) and is cut at the context. NaN for a text without a token to score.
    """

    def of(texts: list[str]) -> np.ndarray:
        context = language.model.config.max_position_embeddings
        ids = [line[:context] for line in language.renderer.plain(texts)]
        counts = np.array([max(len(line) - 1, 0) for line in ids], dtype=np.float64)
        nats = language.nll(ids, [np.arange(1, max(len(line), 1)) for line in ids], token_budget=token_budget)
        return np.where(counts > 0, nats / np.maximum(counts, 1), np.nan)

    return of

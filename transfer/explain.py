"""What a feature is about, and whether it matters for a task."""

from __future__ import annotations

from transfer.associations import associate, false_discovery
from transfer.core.span import Span
from transfer.relevance import judge_relevance, majority_labels
from transfer.spans import top_spans
from transfer.words import WordCounts, describe

__all__ = [
    "Span",
    "WordCounts",
    "associate",
    "describe",
    "false_discovery",
    "judge_relevance",
    "majority_labels",
    "top_spans",
]

"""What a report shows beside the numbers: example matches with spans, generated samples, missing features, cards."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from transfer.alignment.families import ranked
from transfer.core.config import Experiment
from transfer.core.span import Span
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.evidence.spans import top_spans
from transfer.synth.safety import folds
from transfer.text.words import WordCounts, describe

if TYPE_CHECKING:
    from transfer.pipeline import Pipeline

EXAMPLES = 8
"""Matched features shown per pair of models."""
FAMILIES = 12
"""Features that all models share, shown side by side."""
SPANS = 4
SAMPLES = 12
"""Generated texts shown per writer."""


def details(pipeline: Pipeline) -> dict[str, Any]:
    """``details.json`` of a finished run."""
    anchor = pipeline.corpora["anchor"]
    background = WordCounts(t.text for t in anchor)
    return {
        "examples": [
            row
            for source, target in itertools.combinations(pipeline.experiment.models, 2)
            for row in _examples(pipeline, source, target, anchor, background)
        ],
        "families": _families(pipeline, anchor, background),
        "samples": [row for name in pipeline.experiment.models for row in _samples(pipeline, name)],
        "missing": [row for name in pipeline.experiment.models for row in _missing(pipeline, name, anchor, background)],
        "cards": [_card(pipeline, name) for name in pipeline.experiment.models],
    }


def _spans(store: ActivationStore, corpus: Corpus, features: list[int]) -> dict[int, list[Span]]:
    return top_spans(store, corpus, features, k=SPANS)


def _span_row(span: Span, labels: dict[str, str], experiment: Experiment) -> dict[str, Any]:
    return {
        "text": span.text,
        "start": span.start,
        "end": span.end,
        "value": float(span.value),
        "label": labels[span.doc_id],
        "fold": folds(experiment, labels[span.doc_id]),
    }


def _examples(
    pipeline: Pipeline, source: str, target: str, anchor: Corpus, background: WordCounts
) -> list[dict[str, Any]]:
    """The best matches of one pair by held-out correlation, side by side."""
    alignment = pipeline.matches(source, target)
    columns = alignment.matches
    order = sorted(range(len(alignment)), key=lambda i: (-columns["heldout_corr"][i], columns["source"][i]))[:EXAMPLES]
    here = _spans(pipeline.stores[source], anchor, [int(columns["source"][i]) for i in order])
    there = _spans(pipeline.stores[target], anchor, [int(columns["target"][i]) for i in order])
    labels = {t.id: t.label for t in anchor}
    rows = []
    for i in order:
        a, b = int(columns["source"][i]), int(columns["target"][i])
        rows.append(
            {
                "source": pipeline.spaces[source].model,
                "target": pipeline.spaces[target].model,
                "source_feature": a,
                "target_feature": b,
                "score": float(columns["score"][i]),
                "heldout_corr": float(columns["heldout_corr"][i]),
                "q_value": float(columns["q_value"][i]),
                "source_description": describe(here[a], background),
                "target_description": describe(there[b], background),
                "label": _usual([labels[s.doc_id] for s in here[a] + there[b]]),
                "source_spans": [_span_row(s, labels, pipeline.experiment) for s in here[a]],
                "target_spans": [_span_row(s, labels, pipeline.experiment) for s in there[b]],
            }
        )
    return rows


def _usual(tags: list[str]) -> str:
    """The most frequent label; empty without any."""
    return max(sorted(set(tags)), key=tags.count) if tags else ""


def _families(pipeline: Pipeline, anchor: Corpus, background: WordCounts) -> list[dict[str, Any]]:
    """Families over all of three models or more, best first by their weakest match, with each model's strongest text.

    Two models have none: theirs are the examples.
    """
    spaces = {name: space.id for name, space in pipeline.spaces.items()}
    if len(set(spaces.values())) < max(3, len(spaces)):
        return []
    best = ranked(pipeline.in_use, pipeline.experiment.align.q_value)[:FAMILIES]
    spans = {n: _spans(pipeline.stores[n], anchor, [family[i] for _, family in best]) for n, i in spaces.items()}
    labels = {t.id: t.label for t in anchor}
    rows = []
    for corr, family in best:
        members = []
        for name, space in spaces.items():
            found = spans[name][family[space]]
            members.append(
                {
                    "model": pipeline.spaces[name].model,
                    "feature": family[space],
                    "description": describe(found, background),
                    "label": _usual([labels[s.doc_id] for s in found]),
                    "spans": [_span_row(s, labels, pipeline.experiment) for s in found[:1]],
                }
            )
        rows.append({"heldout_corr_least": corr, "members": members})
    return rows


def _samples(pipeline: Pipeline, writer: str) -> list[dict[str, Any]]:
    """Kept and rejected candidates for the writer's own missing features, evenly over the run."""
    run, _ = pipeline.written[writer, writer]
    own = set(pipeline.plans[writer]["own"])
    kept = [c for c in run.kept if c.feature in own]
    rejected = [c for c in run.candidates if c.verdict != "kept" and c.feature in own]
    chosen = kept[:: max(1, len(kept) // SAMPLES)][:SAMPLES] + rejected[:: max(1, len(rejected) // 4)][:4]
    return [
        {
            "source": pipeline.spaces[writer].model,
            "generator": c.generator,
            "feature": c.feature,
            "label": c.label,
            "fold": folds(pipeline.experiment, c.label),
            "text": c.text,
            "score": c.score,
            "delta": c.delta,
            "step": c.step,
            "strength": c.strength,
            "positive": c.positive,
            "verdict": c.verdict,
        }
        for c in chosen
    ]


def _missing(pipeline: Pipeline, name: str, anchor: Corpus, background: WordCounts) -> list[dict[str, Any]]:
    """Every missing feature of one model, described from its anchor texts."""
    report, _ = pipeline.coverage[name]
    missing = report.missing
    ids = missing.features.tolist()
    spans = _spans(pipeline.stores[name], anchor, ids)
    support = pipeline.stores[name].support()
    return [
        {
            "model": report.space.model,
            "feature": i,
            "label": label,
            "description": describe(spans[i], background),
            "n_anchor_docs": int(support[i]),
        }
        for i, label in zip(ids, missing.labels or [""] * len(ids), strict=True)
    ]


def _card(pipeline: Pipeline, name: str) -> dict[str, Any]:
    adapter = pipeline.adapters[name]
    card = adapter.language.card or {}
    return {
        "name": pipeline.spaces[name].model,
        "layer": adapter.space.layer,
        "sae": pipeline.experiment.models[name].sae,
        "rule": adapter.space.rule,
        "d_model": adapter.space.d_model,
        "n_features": adapter.space.n_features,
        "template_offset": adapter.space.template_offset,
        **card.get("summary", {}),
    }

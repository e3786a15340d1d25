"""What the written texts of a run's training sets are like: diversity and entropy, arm by arm (stage ``diversity``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.adapter import Adapter
from models.language import LanguageModel
from transfer.bounds import model_entropy, text_entropy, word_entropy
from transfer.core.config import Experiment
from transfer.core.files import read_json, write_json
from transfer.core.keys import digest
from transfer.core.stats import Interval
from transfer.core.texts import Corpus
from transfer.diversity import compare
from transfer.text.embeddings import get_embedder
from transfer.text.tagging import find_tagger

SCORED = 64
"""Texts of each writer that its own model scores for the entropy."""


def installed() -> dict[str, bool]:
    """What the numbers depend on beside the texts: which optional libraries this machine has."""
    return {name: importlib.util.find_spec(name) is not None for name in ("sentence_transformers", "spacy", "nltk")}


def measure(
    datasets: Path, adapters: Mapping[str, Adapter], corpora: Mapping[str, Corpus], out: Path, experiment: Experiment
) -> None:
    """Write ``diversity.json`` (one row a training set) and ``entropy.json`` (one row a set of written texts).

    A training set stands for what it adds to the seed data, which all of one run share: the written texts, or the
    anchor for ``full``; ``seed_only`` stands for the seed data. All are measured at the size of the smallest. Sets with
    equal texts (the random arm of one writer, for several targets) are measured once.
    """
    texts = {part: [t.text for t in corpora[part]] for part in ("anchor", "seed")}
    records = [r for r in read_json(datasets / "datasets.json") if "dose" not in r]
    sets: dict[str, Sequence[str]] = {}
    keys = []
    for record in records:
        plain = {"seed_only": texts["seed"], "full": texts["anchor"]}
        added = [w["text"] for w in (*record["written"], *record.get("picked", []))] or plain.get(record["arm"], [])
        keys.append(digest(added))
        # An arm that nobody could write two texts for has no diversity, and must not cut the others down.
        if len(added) >= 2:
            sets[keys[-1]] = added
    known = texts["anchor"] + texts["seed"]
    embedder = get_embedder("auto", known, seed=experiment.seed)
    found = compare(sets, embedder=embedder, tagger=find_tagger(), reference=known, seed=experiment.seed)
    rows, entropies = [], []
    references = {name: adapter.space.model for name, adapter in adapters.items()}
    of_writer: dict[str, Interval] = {}
    for name, adapter in adapters.items():
        own = sorted({w["text"] for r in records if r["generator"] == name for w in r["written"]})
        chosen = np.random.default_rng([experiment.seed, 3]).permutation(len(own))[:SCORED]
        if len(own) >= 2:
            of_writer[name] = likelihood_entropy(adapter.language, [own[i] for i in np.sort(chosen)])
    for record, key in zip(records, keys, strict=True):
        at = {
            "target": references[record["target"]],
            "arm": record["arm"],
            "writer": record["writer"],
            "source": references.get(record["source"], ""),
            "generator": references.get(record["generator"], ""),
        }
        if key in found:
            rows.append({**found[key].summary(), **at, "name": record["arm"]})
        if record["written"] and key in found:
            entropies.append({**at, **_entropies(sets[key], of_writer[record["generator"]])})
    write_json(out / "diversity.json", rows)
    write_json(out / "entropy.json", entropies)


def likelihood_entropy(language: LanguageModel, texts: Sequence[str]) -> Interval:
    """Cross-entropy of texts under a model, as ``bounds.model_entropy`` wants it; cut at the model's context.

    Without a BOS token the first token is unpredicted, and counted as one of the vocabulary's, all alike.
    """
    context = int(language.model.config.max_position_embeddings)
    ids = [line[:context] for line in language.renderer.plain(list(texts))]
    nats = language.nll(ids, [np.arange(1, len(line)) for line in ids])
    if language.tokenizer.bos_token is None:
        nats = nats + np.log(language.model.config.vocab_size)
    return model_entropy(nats, [len(line) for line in ids])


def _entropies(texts: Sequence[str], by_model: Interval) -> dict[str, Any]:
    by_words = word_entropy(texts)
    return {
        "n": len(texts),
        "entropy_words": by_words.value,
        "entropy_words_low": by_words.low,
        "entropy_words_high": by_words.high,
        "entropy_model": by_model.value,
        "entropy_model_low": by_model.low,
        "entropy_model_high": by_model.high,
        "n_model": by_model.n,
        "entropy_texts": text_entropy(texts),
    }

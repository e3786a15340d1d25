"""What the stages up to coverage do with their inputs; every function writes only into the folder it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from models.activations import harvest as harvest_store
from models.adapter import Adapter
from transfer.alignment import families
from transfer.alignment.methods import make_aligner, parameters
from transfer.core.alignment import Alignment
from transfer.core.config import Experiment, HarvestSection
from transfer.core.console import progress
from transfer.core.files import load_arrays, save_arrays, write_json
from transfer.core.space import FeatureView
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.cover.curves import curves
from transfer.cover.delta import DeltaRule, check_floor, thresholds
from transfer.coverage import alive, coverage
from transfer.evidence.judging import relevant_by_chat
from transfer.evidence.relevance import judge_relevance


def harvest(adapter: Adapter, corpus: Corpus, out: Path, settings: HarvestSection) -> None:
    """Check the adapter against its card, store the corpus' activations, and say how well the SAE fits the corpus."""
    check = {
        "card": adapter.self_check(),
        "corpus": adapter.reconstruction([t.text for t in corpus][:256], max_tokens=settings.max_tokens),
    }
    harvest_store(
        adapter,
        corpus,
        out / "store",
        keep_residual=settings.keep_residual,
        token_budget=settings.token_budget,
        max_tokens=settings.max_tokens,
    )
    write_json(out / "check.json", check)


def store_summary(name: str, store: ActivationStore, check: dict[str, Any]) -> dict[str, Any]:
    """What a harvest gave; ``nmse`` is the SAE's error on these texts, ``card_nmse`` that on its card's."""
    alive = int(np.count_nonzero(store.support()))
    return {
        "model": name,
        "space": store.space.id,
        "layer": store.space.layer,
        "docs": len(store.doc_ids),
        "tokens": store.n_tokens,
        "features_alive": alive,
        "features": store.space.n_features,
        "active_per_token": store.tokens.nnz / max(store.n_tokens, 1),
        "nmse": check["corpus"]["nmse"],
        "card_nmse": check["card"].get("nmse"),
        **store.counts,
    }


def views(adapters: tuple[Adapter, Adapter]) -> tuple[FeatureView, FeatureView]:
    """Decoder directions of both models and the unembedding rows of the tokens that both vocabularies hold."""
    words = [a.language.vocabulary() for a in adapters]
    shared = sorted(set(words[0]) & set(words[1]))
    made = []
    for adapter, vocabulary in zip(adapters, words, strict=True):
        rows = adapter.language.unembedding()[[vocabulary[w] for w in shared]]
        made.append(FeatureView(adapter.space, adapter.dictionary.directions(), np.asarray(rows, dtype=np.float32)))
    return made[0], made[1]


def align(
    adapters: tuple[Adapter, Adapter],
    stores: tuple[ActivationStore, ActivationStore],
    out: Path,
    experiment: Experiment,
) -> None:
    """Fit every method on one part of the documents, and score its frozen matches on the other.

    ``context.json`` compares the decoder rows of the accepted matches of the method in use as a whole.
    """
    from aligners.assignment import counterparts
    from aligners.calibrate import score_matches
    from aligners.tokens import pair_stores

    settings = experiment.align
    known = {"min_support": settings.min_support, "reg": settings.reg, "max_iter": settings.max_iter}
    aligners = {
        method: make_aligner(method, [f"{k}={v}" for k, v in known.items() if k in parameters(method)], experiment.seed)
        for method in settings.methods
    }
    pairs = pair_stores(*stores, residuals=any("residuals" in a.takes() for a in aligners.values()))
    fit, heldout = pairs.split(settings.fit_fraction, seed=experiment.seed)
    source, target = views(adapters)

    def score(alignment: Alignment, name: str) -> Alignment:
        scored = score_matches(alignment, heldout, n_null=settings.n_null, seed=experiment.seed)
        kept = np.flatnonzero(scored.matches["q_value"] <= settings.q_value)
        info = {
            **scored.info,
            "n_rows_fit": len(fit.docs),
            "n_rows_heldout": len(heldout.docs),
            "n_significant": len(kept),
            "heldout_corr_significant": float(np.median(scored.matches["heldout_corr"][kept])) if len(kept) else None,
        }
        # Seconds differ from run to run; results must not.
        scored = dataclasses.replace(scored, method=name, info=info, seconds=0.0)
        scored.save(out / name)
        return scored

    with progress(f"align {source.space.model} {target.space.model}", len(aligners), "methods") as advance:
        for method, aligner in aligners.items():
            aligner.fit(source, target, pairs=fit)
            scored = score(aligner.alignment_, method)
            if method == settings.use:
                score(counterparts(aligner.alignment_), f"{method}-best")
                accepted = significant(scored, settings.q_value)
                rows = families.context(accepted, source, target, seed=experiment.seed)
                write_json(out / "context.json", rows)
            advance(1)


def significant(alignment: Alignment, q_value: float) -> Alignment:
    """Only the matches with a q-value of at most ``q_value``; untestable ones are out."""
    q = alignment.matches["q_value"]
    keep = np.flatnonzero(np.isfinite(q) & (q <= q_value))
    return dataclasses.replace(alignment, matches={c: v[keep] for c, v in alignment.matches.items()})


def split_docs(store: ActivationStore, corpus: Corpus) -> sp.csr_matrix:
    """Max-over-tokens rows of one split."""
    return store.docs[store.rows([t.id for t in corpus])]


def cover(
    store: ActivationStore, corpora: Mapping[str, Corpus], out: Path, experiment: Experiment, answers: Path
) -> None:
    """Thresholds and relevant features from the anchor; coverage of the seed data against it, and its curves.

    ``answers`` is the folder in which a language model's answers are kept, where one is the judge.
    """
    settings = experiment.cover
    anchor, seed = split_docs(store, corpora["anchor"]), split_docs(store, corpora["seed"])
    rule = DeltaRule.parse(settings.delta)
    delta = thresholds(anchor, rule)
    check_floor(store.space, delta, ~alive(anchor).dead)
    if experiment.judge.kind == "statistical":
        relevant = judge_relevance(
            store.space,
            anchor,
            [t.label for t in corpora["anchor"]],
            [t.topic for t in corpora["anchor"]] if any(t.topic for t in corpora["anchor"]) else (),
            delta=delta,
            fdr=settings.fdr,
            min_support=settings.min_docs,
            always_on=settings.always_on,
            test=experiment.judge.test,
            seed=experiment.seed,
        )
    else:
        relevant = relevant_by_chat(store, corpora["anchor"], experiment, answers, out, always_on=settings.always_on)
    report = coverage(
        store.space,
        anchor,
        seed,
        relevant,
        delta,
        dataset="seed",
        delta_rule=str(rule),
        always_on=settings.always_on,
        eps=settings.smoothing,
        seed=experiment.seed,
    )
    found = curves(
        anchor,
        seed,
        relevant,
        rule,
        always_on=settings.always_on,
        eps=settings.smoothing,
        seed=experiment.seed,
    )
    write_json(out / "curves.json", curve_rows(found, store.space.model, "seed"))
    save_arrays(out / "delta.safetensors", {"delta": delta})
    report.save(out / "seed.json")


def curve_rows(found: dict[str, list[dict[str, Any]]], model: str, dataset: str) -> list[dict[str, Any]]:
    """Points of both curves as rows of one table."""
    return [{"model": model, "dataset": dataset, "curve": name, **row} for name, rows in found.items() for row in rows]


def load_delta(folder: Path) -> np.ndarray:
    """Thresholds of one model, float32 [n_features]."""
    return load_arrays(folder / "delta.safetensors")["delta"]

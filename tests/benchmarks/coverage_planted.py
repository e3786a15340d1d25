"""A dataset whose missing features are known: SAELens' synthetic model, real codes, the pipeline's own cover stage."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from models.adapter import max_over_tokens
from transfer import stages
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.files import save_arrays, write_json
from transfer.core.keys import SCHEMA
from transfer.core.outcomes import CoverageReport
from transfer.core.space import FeatureSpace
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text

TOKENS = 20
"""Rows of a document."""


def planted_store(folder: Path, gone: np.ndarray, *, n: int, width: int, docs: int, k: int, noise: float, seed: int):
    """A store of ``docs`` anchor documents and as many seed documents, the features ``gone`` absent from the latter.

    One half of the features fires in documents of either label. The SAE is the synthetic model's own dictionary, so
    its codes are the planted events up to noise on the residual stream (in units of a feature's mean activation) and,
    where ``width < n``, interference of features that are not orthogonal.
    """
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, init_sae_to_match_feature_dict

    from models.sae import Dictionary

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        generator = ActivationGenerator(n, torch.full((n,), 0.04), std_firing_magnitudes=0.2)
        model = FeatureDictionary(n, width, initializer=None, seed=seed)
        if width >= n:
            model.feature_vectors.data = torch.linalg.qr(model.feature_vectors.data.T)[0].T.contiguous()
        sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=n, k=k))
        init_sae_to_match_feature_dict(sae, model)
        sae.b_enc.data.fill_(-0.5)  # as training would: without it spare places of the top k hold rounding errors
        events = generator.sample(2 * docs * TOKENS)
        label = np.arange(2 * docs) % 2
        mine = torch.from_numpy((np.arange(n)[None] % 2 == label[:, None]).astype(np.float32))
        events *= mine.repeat_interleave(TOKENS, 0)
        events[docs * TOKENS :, torch.from_numpy(gone)] = 0
        residual = model(events)
        residual += noise * torch.randn_like(residual)
        dictionary = Dictionary("synthetic", f"synthetic-{seed}", sae)
        codes = dictionary.encode(residual)
    found, _ = max_over_tokens(codes, np.repeat(np.arange(2 * docs, dtype=np.int32), TOKENS), 2 * docs)
    arrays = {"indptr": found.indptr.astype(np.int64), "indices": found.indices.astype(np.int32), "values": found.data}
    save_arrays(folder / "docs-00000.safetensors", arrays)
    space = FeatureSpace("synthetic:m", "m", 1, "synthetic:m", dictionary.hash, n, width, dictionary.rule, 0)
    meta = {"schema": SCHEMA, "space": dataclasses.asdict(space), "corpus_hash": "planted", "shards": 1, "counts": {}}
    ids = [f"d{i}" for i in range(2 * docs)]
    write_json(folder / "meta.json", {**meta, "doc_ids": ids, "n_tokens": 2 * docs * TOKENS})
    texts = [Text(d, d, "harmful" if lab else "benign") for d, lab in zip(ids, label, strict=True)]
    corpora = {"anchor": Corpus("anchor", tuple(texts[:docs])), "seed": Corpus("seed", tuple(texts[docs:]))}
    return ActivationStore.load(folder), corpora


def planted_coverage(
    *,
    n: int = 240,
    width: int = 256,
    docs: int = 300,
    k: int = 16,
    noise: float = 0.0,
    n_gone: int = 40,
    delta: str = "scale:0.5",
    seed: int = 0,
) -> dict[str, float]:
    """Precision and recall of the cover stage's missing features, with ``fac`` and its true value."""
    gone = np.sort(np.random.default_rng([seed, 7]).choice(n, size=n_gone, replace=False))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, corpora = planted_store(folder, gone, n=n, width=width, docs=docs, k=k, noise=noise, seed=seed)
        experiment = load_experiment("demo", [f"cover.delta={delta}", f"seed={seed}"])
        try:
            stages.cover(store, corpora, folder / "out", experiment, folder)
        except TransferError:  # so much noise that nothing is relevant any more
            return {"precision": float("nan"), "recall": 0.0, "fac": float("nan"), "n_relevant": 0.0}
        report = CoverageReport.load(folder / "out" / "seed.json")
    missing = report.missing.features
    right = len(np.intersect1d(missing, gone))
    return {
        "precision": right / len(missing) if len(missing) else float("nan"),
        "recall": right / n_gone,
        "fac": report.fac,
        "truth": 1 - n_gone / n,
        "n_relevant": float(len(report.relevant)),
    }

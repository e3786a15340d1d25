"""A planted pair that is not ours: SAELens' activation generator, feature dictionaries and SAEs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from aligners.base import Aligner
from aligners.metrics import false_share, is_right
from aligners.planted import Planted
from transfer.core.space import FeatureSpace, FeatureView
from transfer.core.stats import mean_interval
from transfer.core.store import PairedActivations
from transfer.ladder.planted import accepted, with_q_values
from transfer.ladder.row import LEVEL, Finding

BATCH = 2000
"""Rows drawn at once: SAELens makes them dense over all concepts."""


def synthetic_pair(
    *,
    n_shared: int = 300,
    n_own: int = 150,
    d_source: int = 192,
    d_target: int = 256,
    rows: int = 20_000,
    k: int = 8,
    seed: int = 0,
) -> Planted:
    """One generator of concepts, two feature dictionaries of different width, a TopK SAE for a part of each.

    Both models represent every concept, in random directions of their own; each SAE holds the shared concepts and some
    that the other lacks, so what it does not hold is noise in its codes. No linear map relates the two models exactly:
    their dictionaries are overcomplete and independent. Memory: ``BATCH`` × concepts, and rows × width on either side.

    Args:
        n_shared: Concepts that both SAEs hold.
        n_own: Concepts that one SAE holds alone, on each side.
        d_source: Width of the source model.
        d_target: Width of the target model.
        rows: Rows.
        k: Features active in a row.
        seed: Of everything.
    """
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.synthetic import (
        ActivationGenerator,
        FeatureDictionary,
        init_sae_to_match_feature_dict,
        zipfian_firing_probabilities,
    )

    from models.sae import Dictionary

    rng = np.random.default_rng(seed)
    n = n_shared + 2 * n_own
    concepts = rng.permutation(n)
    rest = concepts[n_shared:]
    mine = [rng.permutation(np.concatenate([concepts[:n_shared], own])) for own in (rest[:n_own], rest[n_own:])]
    probabilities = zipfian_firing_probabilities(n, exponent=0.7, max_prob=0.1, min_prob=0.003)
    sides = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        generator = ActivationGenerator(n, probabilities, std_firing_magnitudes=0.3)
        drawn = [generator.sample(min(BATCH, rows - start)) for start in range(0, rows, BATCH)]
        for side, (held, width) in enumerate(zip(mine, (d_source, d_target), strict=True)):
            model = FeatureDictionary(n, width, initializer=None, seed=2 * seed + side)
            sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=len(held), k=k))
            init_sae_to_match_feature_dict(sae, model, feature_ordering=torch.from_numpy(held))
            residual = torch.cat([model(batch) for batch in drawn])
            dictionary = Dictionary("synthetic", f"synthetic-{side}", sae)
            sides.append((dictionary.encode(residual), residual.numpy(), dictionary.directions()))
    where = np.full(n, -1)
    where[mine[1]] = np.arange(len(mine[1]))
    truth = np.stack([np.arange(len(mine[0])), where[mine[0]]], axis=1)
    views = []
    for name, (_, _, directions) in zip(("synthetic:source", "synthetic:target"), sides, strict=True):
        n_features, width = directions.shape
        space = FeatureSpace(name, name, 1, name, name, n_features, width, f"topk-{k}", 0)
        views.append(FeatureView(space, directions))
    docs = np.arange(rows, dtype=np.int32) // 40
    pairs = PairedActivations(sides[0][0], sides[1][0], docs, sides[0][1], sides[1][1])
    return Planted(views[0], views[1], pairs, truth[truth[:, 1] >= 0])


def synthetic(make: Callable[[], Aligner], seeds: Sequence[int]) -> Finding:
    """False discoveries and recall over several draws."""
    shares, recalls, n = [], [], 0
    for seed in seeds:
        case = synthetic_pair(seed=seed)
        found = with_q_values(make(), case.source, case.target, case.pairs)
        src, tgt = accepted(found)
        shares.append(false_share(found, case.truth, LEVEL))
        recalls.append(float(is_right(src, tgt, case.truth).sum() / len(case.truth)))
        n += len(src)
    fdr = mean_interval(shares)
    measured = {"fdr": fdr.value, "fdr_low": max(fdr.low, 0.0), "fdr_high": fdr.high}
    return measured | {"recall": float(np.mean(recalls)), "accepted": n, "draws": len(shares)}, fdr.value <= LEVEL

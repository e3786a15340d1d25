"""Two models that share nothing but related features: the level of "the same" must not come from the best pairs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from aligners.canonical import canonical_space
from aligners.coactivation import PairedCodes
from aligners.counterpart import counterpart_cosine
from aligners.fused import FusedAligner
from aligners.planted import planted_view
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

WIDTHS = (48, 64)
N_DOCS, ROWS = 120, 50


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def models(
    n_shared: int, n_siblings: int, seed: int = 0, noise: float = 0.35, cosine: float = 0.5
) -> tuple[FeatureView, FeatureView, PairedActivations, np.ndarray]:
    """Both streams hold every concept; of each pair of siblings, either model has a feature for one of the two.

    Siblings fire together on 85 % of the rows and their directions have the given cosine. Shared concepts come first.
    """
    rng = np.random.default_rng(seed)
    n = n_shared + 2 * n_siblings
    docs = np.repeat(np.arange(N_DOCS, dtype=np.int32), ROWS)
    rate = np.exp(rng.uniform(np.log(0.005), np.log(0.04), n))
    fires = rng.random((len(docs), n)) < rate
    concepts = unit(rng.normal(size=(n, WIDTHS[0])))
    mine, theirs = np.arange(n_shared, n_shared + n_siblings), np.arange(n_shared + n_siblings, n)
    fires[:, theirs] = fires[:, mine] & (rng.random((len(docs), n_siblings)) < 0.85)
    aside = rng.normal(size=(n_siblings, WIDTHS[0]))
    aside -= np.einsum("nd,nd->n", aside, concepts[mine])[:, None] * concepts[mine]
    concepts[theirs] = cosine * concepts[mine] + np.sqrt(1 - cosine**2) * unit(aside)
    mapping = rng.normal(size=WIDTHS) / np.sqrt(WIDTHS[0])
    strength = fires * rng.lognormal(0, 0.4, fires.shape)
    streams = [
        (strength @ d + 0.15 * rng.normal(size=(len(docs), d.shape[1]))).astype(np.float32)
        for d in (concepts, concepts @ mapping)
    ]
    shared = np.arange(n_shared)
    ids = [np.concatenate([shared, mine]), np.concatenate([shared, theirs])]
    rows = [
        unit(unit(d[i]) + noise * unit(rng.normal(size=d[i].shape)))
        for d, i in zip((concepts, concepts @ mapping), ids, strict=True)
    ]
    codes = [sp.csr_matrix((strength[:, i] * (rng.random((len(docs), len(i))) > 0.25)).astype(np.float32)) for i in ids]
    pairs = PairedActivations(codes[0], codes[1], docs, streams[0], streams[1])
    views = [planted_view(name, x.astype(np.float32)) for name, x in zip(("source", "target"), rows, strict=True)]
    return views[0], views[1], pairs, shared


@pytest.mark.parametrize("cosine", [0.5, 0.7])
def test_two_models_that_share_only_related_features_give_no_match(cosine: float) -> None:
    source, target, pairs, _ = models(0, 120, cosine=cosine)
    found = FusedAligner().fit(source, target, pairs=pairs).alignment_
    # Without the check every sibling is accepted: the level of "the same" is then that of the siblings.
    assert np.count_nonzero(found.matches["q_value"] <= 0.05) == 0
    assert found.coupling.nnz == 0


def test_shared_features_are_all_found_beside_the_related_ones() -> None:
    source, target, pairs, shared = models(120, 120)
    found = FusedAligner().fit(source, target, pairs=pairs).alignment_
    good = found.matches["q_value"] <= 0.05
    got = set(zip(found.matches["source"][good].tolist(), found.matches["target"][good].tolist(), strict=True))
    truth = {(i, i) for i in shared.tolist()}
    assert len(got & truth) >= 0.98 * len(truth)
    assert len(got - truth) <= 0.05 * len(got)


def level(source: FeatureView, target: FeatureView, pairs: PairedActivations, chunks: int = 1) -> float:
    x, y = pairs.source_residual, pairs.target_residual
    assert x is not None and y is not None
    cuts = np.linspace(0, len(pairs.docs), chunks + 1).astype(int)
    parts = [(pairs.source[a:b], pairs.target[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    space = canonical_space(source.directions, target.directions, x, y, pairs.docs)
    return counterpart_cosine(space, PairedCodes.of(parts), x, y)


def test_the_level_does_not_ask_whether_there_are_counterparts() -> None:
    with_them, without = level(*models(120, 120)[:3]), level(*models(0, 120)[:3])
    assert with_them == pytest.approx(without, abs=0.06)
    assert 0.7 < without < 0.95


def test_the_level_falls_with_the_noise_of_the_dictionaries() -> None:
    clean, noisy = (level(*models(120, 0, noise=noise)[:3]) for noise in (0.1, 1.0))
    assert noisy < 0.8 * clean


def test_the_level_of_streams_that_have_nothing_to_do_with_each_other_is_low() -> None:
    source, target, pairs, _ = models(60, 60)
    assert pairs.target_residual is not None
    other = np.random.default_rng(1).normal(size=pairs.target_residual.shape).astype(np.float32)
    assert (
        level(source, target, PairedActivations(pairs.source, pairs.target, pairs.docs, pairs.source_residual, other))
        < 0.3
    )


def test_the_level_is_the_same_from_chunks() -> None:
    source, target, pairs, _ = models(60, 60)
    # Sums of a block are float32.
    assert level(source, target, pairs, 3) == pytest.approx(level(source, target, pairs), rel=1e-6)

"""Real texts that a selection baseline takes from the anchor, with labels: the arms ``transfer.grid.arms.PICKED``.

``k_center`` takes the text farthest from all that is there (Sener and Savarese 2018), ``facility_location`` the one
that brings the rest of the pool nearest (Lin and Bilmes 2011), ``coverage_selection`` the one that activates most
missing features (``transfer.cover.selection``). The first two start from the seed data and see texts by embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from transfer.core.texts import Corpus, Text
from transfer.cover.delta import fires
from transfer.cover.selection import Candidates, Saturation, select


def k_center(
    pool: Float[np.ndarray, "pool d"],
    there: Float[np.ndarray, "there d"],
    labels: Sequence[str],
    quota: Mapping[str, int],
) -> list[int]:
    """Greedy k-center by cosine distance: at most twice the best possible radius, without a quota of labels.

    Args:
        pool: Unit vectors of the texts to choose from.
        there: Unit vectors of the texts that are there already.
        labels: Of the pool.
        quota: Texts wanted of each label.

    Returns:
        Rows of the pool in the order taken; fewer than asked where a label runs out.
    """
    far = 1 - (pool @ there.T).max(axis=1) if len(there) else np.full(len(pool), 2.0)

    def take(i: int) -> None:
        np.minimum(far, 1 - pool @ pool[i], out=far)

    return _greedy(lambda: far, take, labels, quota)


def facility_location(
    pool: Float[np.ndarray, "pool d"],
    there: Float[np.ndarray, "there d"],
    labels: Sequence[str],
    quota: Mapping[str, int],
) -> list[int]:
    """Greedy maximum of Σ over the pool of the cosine to the nearest text taken or there; negative ones count as 0.

    Memory: ``16 pool²`` bytes (36 MB for 1,500 texts). Arguments and result as of ``k_center``.
    """
    near = np.maximum(pool @ pool.T, 0)
    best = np.maximum((pool @ there.T).max(axis=1), 0) if len(there) else np.zeros(len(pool))

    def take(i: int) -> None:
        np.maximum(best, near[i], out=best)

    return _greedy(lambda: np.maximum(near - best, 0).sum(axis=1), take, labels, quota)


def _greedy(
    gains: Callable[[], np.ndarray], take: Callable[[int], None], labels: Sequence[str], quota: Mapping[str, int]
) -> list[int]:
    left, free, taken = dict(quota), np.ones(len(labels), dtype=bool), []
    while True:
        allowed = free & np.array([left.get(label, 0) > 0 for label in labels], dtype=bool)
        if not allowed.any():
            return taken
        i = int(np.argmax(np.where(allowed, gains(), -np.inf)))
        free[i] = False
        left[labels[i]] -= 1
        taken.append(i)
        take(i)


def by_coverage(
    pool: sp.csr_matrix,
    there: sp.csr_matrix,
    delta: np.ndarray,
    features: np.ndarray,
    labels: Sequence[str],
    quota: Mapping[str, int],
) -> list[int]:
    """Greedy coverage of ``features``, label by label; where nothing is missing any more, a second document for each.

    Args:
        pool: Max over tokens of the texts to choose from, [pool, n_features].
        there: Of the texts that are there already, [there, n_features].
        delta: Thresholds, [n_features].
        features: Ids that count, sorted.
        labels: Of the pool.
        quota: Texts wanted of each label.
    """
    candidates = Candidates.of(pool, delta, features)
    counts = np.bincount(fires(there, delta).indices, minlength=len(delta))[features]
    taken: list[int] = []
    for label, wanted in sorted(quota.items()):
        other = np.flatnonzero(np.array(labels) != label)
        end, cap = len(taken) + wanted, 1
        while len(taken) < end and cap <= counts.max(initial=0) + 1:
            found = select(
                candidates,
                end - len(taken),
                saturation=Saturation("cap", cap),
                counts=counts,
                without=np.concatenate([other, np.array(taken, dtype=np.int64)]),
            ).documents.tolist()
            for document in found:
                counts[candidates.row(document)] += 1
            taken += found
            cap += 1
    return taken


def picker(
    corpora: Mapping[str, Corpus],
    embed: Callable[[Sequence[str]], np.ndarray] | None,
    docs: tuple[sp.csr_matrix, sp.csr_matrix],
    delta: np.ndarray,
    features: np.ndarray,
) -> Callable[[str, dict[str, int]], list[Text]]:
    """What ``transfer.grid.arms.training_sets`` picks real texts with, for one target.

    Args:
        corpora: With ``anchor``, the pool, and ``seed``, which is there already. Pool texts of the seed are out.
        embed: Texts to unit vectors; coverage selection needs none.
        docs: Max over tokens of both in the target's space, [docs, n_features].
        delta: Thresholds of the target.
        features: The target's relevant features that the anchor activates, sorted.
    """
    known = {t.text for t in corpora["seed"]}
    rows = np.array([i for i, t in enumerate(corpora["anchor"]) if t.text not in known], dtype=np.int64)
    texts = [corpora["anchor"].texts[i] for i in rows]
    labels = [t.label for t in texts]

    def pick(arm: str, quota: dict[str, int]) -> list[Text]:
        if arm == "coverage_selection":
            found = by_coverage(docs[0][rows], docs[1], delta, features, labels, quota)
        else:
            assert embed is not None, f"{arm} needs embeddings"
            how = {"k_center": k_center, "facility_location": facility_location}[arm]
            found = how(embed([t.text for t in texts]), embed([t.text for t in corpora["seed"]]), labels, quota)
        return [texts[i] for i in found]

    return pick

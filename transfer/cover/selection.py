"""Which documents to take: lazy greedy selection of those that add most coverage (Minoux 1978).

A set S of documents is worth Σ_i w_i φ(c_i(S)), where c_i counts the documents of S that activate feature i and φ is
concave: ``cap:1`` is coverage itself, ``cap:r`` wants r documents for each feature, ``sqrt`` and ``log`` never stop
wanting more, only less. The sum is monotone and submodular, so taking the best document at each step reaches at least
1 − 1/e of the best set of the same size (Nemhauser, Wolsey and Fisher 1978).

A document's gain can only fall. Gains found earlier are therefore upper bounds, and only documents whose bound reaches
above the best gain known have to be looked at again: the result is that of the plain greedy method, step for step.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.store import ActivationStore
from transfer.cover.delta import fires, size

AT_ONCE = 4096
"""Documents whose gains are found in one go."""


@dataclass(frozen=True)
class Saturation:
    """φ: what the n-th document that activates a feature is still worth."""

    kind: Literal["cap", "sqrt", "log"] = "cap"
    value: float = 1

    def __post_init__(self) -> None:
        bad = self.kind not in ("cap", "sqrt", "log")
        if bad or (self.kind == "cap" and not (math.isfinite(self.value) and self.value >= 1)):
            raise TransferError(f"Unknown saturation {self}.", "Use cap:<documents from 1 on>, sqrt or log.")

    def __str__(self) -> str:
        return f"cap:{self.value:g}" if self.kind == "cap" else self.kind

    @classmethod
    def parse(cls, text: str) -> Saturation:
        """Read ``cap:3``, ``sqrt`` or ``log``.

        Raises:
            TransferError: For anything else.
        """
        kind, colon, value = text.partition(":")
        try:
            return cls(kind, float(value) if colon else 1.0)  # pyright: ignore[reportArgumentType]
        except ValueError:
            raise TransferError(f"The saturation {text!r} has no number.", "Write cap:3, sqrt or log.") from None

    def worth(self, counts: np.ndarray) -> np.ndarray:
        """φ(counts), with φ(0) = 0 and φ(1) = 1."""
        counts = np.asarray(counts, dtype=np.float64)
        if self.kind == "cap":
            return np.minimum(counts, self.value)
        return np.sqrt(counts) if self.kind == "sqrt" else np.log2(1 + counts)

    def more(self, counts: np.ndarray) -> np.ndarray:
        """φ(counts + 1) − φ(counts)."""
        return self.worth(np.asarray(counts, dtype=np.float64) + 1) - self.worth(counts)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Which of the chosen features each candidate document activates: rows of feature numbers, values left out."""

    features: np.ndarray
    """Ids of the features, int64 [F]; documents name them by their row here."""
    bounds: np.ndarray
    """Start of each document in ``ids``, int64 [docs + 1]."""
    ids: np.ndarray
    """uint16 where that is enough, else int32 [non-zeros]; in memory or mapped."""

    @classmethod
    def of(cls, docs: sp.csr_matrix, delta: np.ndarray, features: np.ndarray) -> Candidates:
        """From a matrix in memory, max over tokens [docs, n_features]."""
        found = _numbered(fires(docs, delta), _places(features, size(docs)[1]))
        return cls(np.asarray(features, dtype=np.int64), *found)

    @classmethod
    def of_store(
        cls,
        store: ActivationStore,
        delta: np.ndarray,
        features: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        folder: Path | None = None,
    ) -> Candidates:
        """From a store of any size: one pass, into a temporary file that is mapped and goes when it is let go.

        Memory: 8 bytes a document, and a few copies of a small block; the file takes 2 bytes (above 65,536
        features 4) an activation.

        Args:
            store: Activations.
            delta: Thresholds, [n_features].
            features: Ids that count, sorted, [F].
            rows: Only these documents, bool [docs]; the others become empty rows.
            folder: Where the temporary file lies; the system's place by default.

        Raises:
            TransferError: For a damaged store or a width that differs.
        """
        places = _places(features, store.space.n_features)
        lengths: list[np.ndarray] = []
        with tempfile.TemporaryFile(dir=folder) as file:
            # Blocks that fit the processor's cache.
            for first, block in store.doc_blocks(1 << 17):
                if rows is not None:
                    keep = np.repeat(rows[first : first + len(block.indptr) - 1], np.diff(block.indptr))
                    data = np.where(keep, block.data, 0).astype(np.float32)
                    block = sp.csr_matrix((data, block.indices, block.indptr), shape=block.shape, copy=False)
                bounds, ids = _numbered(fires(block, delta), places)
                lengths.append(np.diff(bounds))
                file.write(ids.data)
            file.flush()
            bounds = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
            kind = _kind(len(features))
            ids = np.memmap(file, kind, "r", shape=(int(bounds[-1]),)) if bounds[-1] else np.zeros(0, kind)
        return cls(np.asarray(features, dtype=np.int64), bounds, np.asarray(ids))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, document: int) -> np.ndarray:
        """Features of one document, as rows of ``features``."""
        return self.ids[self.bounds[document] : self.bounds[document + 1]]

    def gains(self, worth: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
        """Summed worth of each document's features, float64 [documents].

        Args:
            worth: Of each feature, float64 [F].
            documents: Document numbers; all when left out, read in order.
        """
        ids, bounds = self.ids, self.bounds
        if documents is None:
            out = np.empty(len(self))
            for start in range(0, len(self), AT_ONCE):
                at = bounds[start : start + AT_ONCE + 1]
                out[start : start + AT_ONCE] = self._sums(ids[at[0] : at[-1]], np.diff(at), worth)
            return out
        lists = [ids[a:b] for a, b in zip(bounds[documents].tolist(), bounds[documents + 1].tolist(), strict=True)]
        return self._sums(np.concatenate(lists) if lists else ids[:0], bounds[documents + 1] - bounds[documents], worth)

    @staticmethod
    def _sums(ids: np.ndarray, lengths: np.ndarray, worth: np.ndarray) -> np.ndarray:
        out = np.zeros(len(lengths))
        some = np.flatnonzero(lengths)
        if len(some):
            starts = np.cumsum(lengths[some]) - lengths[some]
            out[some] = np.add.reduceat(worth.take(ids, mode="clip"), starts)
        return out


def _kind(n_features: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    return np.uint16 if n_features <= 1 << 16 else np.int32


def _places(features: np.ndarray, n_features: int) -> np.ndarray:
    """Row of each id in ``features``, −1 for the others, int32 [n_features]."""
    places = np.full(n_features, -1, dtype=np.int32)
    places[features] = np.arange(len(features), dtype=np.int32)
    return places


def _numbered(fired: sp.csr_matrix, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds and feature numbers of the chosen features in each row."""
    ids = places[fired.indices]
    keep = ids >= 0
    bounds = np.concatenate(([0], np.cumsum(keep)))[fired.indptr].astype(np.int64)
    return bounds, ids[keep].astype(_kind(int(places.max(initial=-1)) + 1))


@dataclass(frozen=True, eq=False)
class Selection:
    """Documents in the order in which they were taken."""

    documents: np.ndarray
    """Document numbers, int64 [picks]."""
    gains: np.ndarray
    """What each added to the objective, float64 [picks], falling."""
    covered: np.ndarray
    """Features with at least one document after each pick, those covered before included, int64 [picks]."""
    covered_before: int
    """Features with a document before the first pick."""
    objective: float
    """Σ_i w_i φ(c_i) at the end, what was there before included."""
    possible: float
    """The same if all candidates were taken."""
    n_features: int
    n_candidates: int
    budget: int
    saturation: str
    evaluations: int
    """Gains that were computed after the first pass; the plain method needs candidates × picks."""

    @property
    def exhausted(self) -> bool:
        """Whether it ended before the budget because no candidate adds anything."""
        return len(self.documents) < min(self.budget, self.n_candidates)


def select(
    candidates: Candidates,
    budget: int,
    *,
    weights: np.ndarray | None = None,
    saturation: Saturation | None = None,
    counts: np.ndarray | None = None,
    without: Iterable[int] = (),
) -> Selection:
    """Take up to ``budget`` documents greedily; ties go to the one that comes first.

    It ends early where no document adds anything: with ``cap:r`` every feature is then as full as the candidates can
    make it.

    Memory: 17 bytes a document, and ``AT_ONCE`` documents' features.

    Args:
        candidates: Documents to choose from.
        budget: Documents to take at most.
        weights: Worth of each feature, non-negative, [F]; 1 each by default.
        saturation: φ; ``cap:1`` by default.
        counts: Documents that activate each feature already, such as those of the data at hand, [F].
        without: Documents not to take.

    Raises:
        TransferError: For a budget below one, weights that are negative or not finite, or lengths that differ.
    """
    saturation = saturation or Saturation()
    n = len(candidates.features)
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    filled = np.zeros(n) if counts is None else np.asarray(counts, dtype=np.float64).copy()
    if budget < 1:
        raise TransferError(f"A budget of {budget} documents selects nothing.", "Use one or more.")
    if len(weights) != n or len(filled) != n:
        raise TransferError(f"There are {n} features, {len(weights)} weights and {len(filled)} counts.")
    if not np.all(np.isfinite(weights)) or weights.min(initial=0) < 0:
        raise TransferError("Weights of features must be finite and not negative.")
    before = int(np.count_nonzero(filled))
    worth = weights * saturation.more(filled)
    bound = candidates.gains(worth)
    left_out = np.array(sorted(set(without)), dtype=np.int64)
    bound[left_out] = -1.0
    fresh = np.zeros(len(candidates), dtype=np.int32)
    documents: list[int] = []
    gains: list[float] = []
    covered: list[int] = []
    evaluations = 0
    # Sums of the same numbers in another order differ by rounding; what is below this is no gain.
    nothing = 1e-12 * max(float(worth.sum()), 1e-300)
    while len(documents) < min(budget, len(candidates) - len(left_out)) and worth.any():
        step = len(documents)
        top = int(bound.argmax())
        while fresh[top] != step:
            evaluations += _look(candidates, worth, bound, fresh, top, step)
            top = int(bound.argmax())
        if bound[top] <= nothing:
            break
        row = candidates.row(top)
        documents.append(top)
        gains.append(float(bound[top]))
        filled[row] += 1
        worth[row] = weights[row] * saturation.more(filled[row])
        covered.append(int(np.count_nonzero(filled)))
        bound[top] = -1.0
    return Selection(
        np.array(documents, dtype=np.int64),
        np.array(gains),
        np.array(covered, dtype=np.int64),
        before,
        float(weights @ saturation.worth(filled)),
        float(weights @ saturation.worth(_full(candidates, counts))),
        n,
        len(candidates),
        budget,
        str(saturation),
        evaluations,
    )


def _look(candidates: Candidates, worth: np.ndarray, bound: np.ndarray, fresh: np.ndarray, top: int, step: int) -> int:
    """Bring the bounds of ``top`` and of what may beat it up to date; how many gains were computed."""
    level = float(candidates.gains(worth, np.array([top]))[0])
    bound[top], fresh[top] = level, step
    rivals = np.flatnonzero(bound >= level)
    rivals = rivals[fresh[rivals] != step]
    if len(rivals) > AT_ONCE:
        rivals = rivals[np.argpartition(-bound[rivals], AT_ONCE)[:AT_ONCE]]
    if len(rivals):
        bound[rivals] = candidates.gains(worth, rivals)
        fresh[rivals] = step
    return 1 + len(rivals)


def _full(candidates: Candidates, counts: np.ndarray | None) -> np.ndarray:
    """Documents that activate each feature if all candidates are taken, [F]."""
    total = np.zeros(len(candidates.features)) if counts is None else np.asarray(counts, dtype=np.float64).copy()
    for start in range(0, len(candidates.ids), 1 << 20):
        total += np.bincount(candidates.ids[start : start + (1 << 20)], minlength=len(total))
    return total

"""Match features of SAEs in one residual space by their weights alone: seeds, widths, layers, fine-tunes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.assignment import DENSE_LIMIT, Rule, mutual_nearest, one_to_one
from aligners.base import check_finite
from aligners.correlation import dims
from aligners.sparse_assignment import sparse_one_to_one
from aligners.topk import TopK, topk_cosine, unit_rows
from transfer.core.errors import TransferError

Pairs = Int[np.ndarray, "pairs 2"]
"""Ids of matched features, source and target, by source id."""
SHARED = 0.7
"""Least cosine of both encoder and decoder of a shared feature (Paulo and Belrose, arXiv 2501.16615)."""
CANDIDATES = 32
"""Best partners of each row and column that assignment looks at where all pairs are too many."""
EDGES = 4096
"""Candidate pairs whose rows are held at once."""


@dataclass(frozen=True)
class SaeWeights:
    """What one SAE reads and writes: ``codes = act(x @ encoder.T + encoder_bias)``, ``x̂ = codes @ decoder + …``."""

    encoder: Float[np.ndarray, "n d"]
    encoder_bias: Float[np.ndarray, " n"]
    decoder: Float[np.ndarray, "n d"]
    threshold: Float[np.ndarray, " n"] | None = None
    """Of JumpReLU; ``None`` for other rules."""

    def __post_init__(self) -> None:
        n = len(self.encoder)
        if self.encoder.ndim != 2 or self.decoder.shape != self.encoder.shape or self.encoder_bias.shape != (n,):
            raise TransferError(
                f"SAE weights do not belong together: encoder {self.encoder.shape}, bias {self.encoder_bias.shape}, "
                f"decoder {self.decoder.shape}.",
                "Give one row a feature, [n_features, d_model], on both sides.",
            )
        if not self.encoder.size:
            raise TransferError("The SAE has no features or no width.")
        parts = {"encoder": self.encoder, "encoder bias": self.encoder_bias, "decoder": self.decoder}
        for name, values in parts.items():
            check_finite(values, f"The {name} of an SAE")
        if self.threshold is not None:
            _check_scale(self.threshold, n, "threshold")

    def __len__(self) -> int:
        return len(self.encoder)

    def folded(self, scale: Float[np.ndarray, " n"] | None = None) -> SaeWeights:
        """The same function with each feature's scale moved from its code to its decoder row (SAE Match, 2410.07656).

        ``encoder / s``, ``bias / s``, ``decoder · s``, ``threshold / s``. With s = θ, the default, all thresholds are 1
        and the decoder rows carry the scale on which features fire. Top-K has no θ: give ``activation_scale``; codes
        are then divided by s, and the reconstruction stays the same for the same set of active features.

        Raises:
            TransferError: Without both threshold and scale, or for a scale that is not positive.
        """
        s = self.threshold if scale is None else scale
        if s is None:
            raise TransferError("This SAE has no thresholds to fold.", "Pass scale=, such as activation_scale(codes).")
        s = _check_scale(s, len(self), "scale")
        return SaeWeights(
            self.encoder / s[:, None],
            self.encoder_bias / s,
            self.decoder * s[:, None],
            None if self.threshold is None else self.threshold / s,
        )


def activation_scale(codes: sp.csr_matrix) -> Float[np.ndarray, " n"]:
    """Median of each feature's non-zero codes [rows, n]; 1 for features that never fire. Memory: 24 bytes a code."""
    columns = sp.csc_matrix(codes, copy=True)
    columns.eliminate_zeros()
    feature = np.repeat(np.arange(dims(codes)[1]), np.diff(columns.indptr))
    values = columns.data[np.lexsort((columns.data, feature))].astype(np.float64)
    count = np.diff(columns.indptr)
    live = count > 0
    low, high = columns.indptr[:-1] + (count - 1) // 2, columns.indptr[:-1] + count // 2
    scale = np.ones(len(count))
    scale[live] = (values[low[live]] + values[high[live]]) / 2
    return scale


@dataclass(frozen=True)
class Matching:
    """One-to-one (or mutual) pairs of rows and how alike they are."""

    pairs: Pairs
    score: Float[np.ndarray, " pairs"]
    n_source: int
    n_target: int
    zero_source: int
    """Rows without a direction, which match nothing."""
    zero_target: int
    exact: bool
    """All pairs were looked at, not the best ``CANDIDATES`` of each row and column only."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def mean(self) -> float:
        """Total score over the smaller side's rows; rows without a partner count 0."""
        return float(self.score.sum()) / min(self.n_source, self.n_target)


def match_rows(
    x: Float[np.ndarray, "n_src d"],
    y: Float[np.ndarray, "n_tgt d"],
    *,
    rule: Rule = "one_to_one",
    absolute: bool = False,
    k: int = CANDIDATES,
) -> Matching:
    """Pair rows by cosine: the one-to-one pairs with the largest total, or mutual nearest neighbours.

    Pairs of cosine 0 or below stay unmatched. Up to ``DENSE_LIMIT`` rows a side all pairs are looked at (20 bytes a
    pair); above, the best ``k`` of each row and column (``topk_cosine`` and about 250 bytes an edge), which gives the
    best assignment along those.

    Args:
        x: Source rows, such as decoder directions.
        y: Target rows of the same width.
        rule: ``one_to_one`` or ``mutual``.
        absolute: Take |cos|: a direction and its opposite are the same.
        k: Partners looked at, for large sides.

    Raises:
        TransferError: For different widths, a side of zero rows only, or an unknown rule.
    """
    (a, left), (b, right) = _live(x, "source"), _live(y, "target")
    return _assigned(unit_rows(a), unit_rows(b), left, right, (len(x), len(y)), rule, absolute, k)


def pw_mcc(x: Float[np.ndarray, "n_src d"], y: Float[np.ndarray, "n_tgt d"], *, k: int = CANDIDATES) -> Matching:
    """Pairwise mean correlation coefficient (arXiv 2505.20254): ``.mean`` of the one-to-one |cos| assignment.

    Divided by the smaller side's features. Above ``DENSE_LIMIT`` rows a side it is a lower bound, with ``exact`` false.
    """
    return match_rows(x, y, absolute=True, k=k)


def folded_match(a: SaeWeights, b: SaeWeights, *, k: int = CANDIDATES) -> Matching:
    """SAE Match (arXiv 2410.07656): the pairs with the least squared distance of encoder, bias and decoder together.

    Lengths count here, so fold the scales first (``SaeWeights.folded``). Maximises the inner products (the scores),
    which is the same as least squares with an unmatched feature compared with zero. Memory: copies of all weights, and
    as ``match_rows``.

    Raises:
        TransferError: For different widths.
    """
    (x, left), (y, right) = (
        _live(np.hstack([w.encoder, w.encoder_bias[:, None], w.decoder]), side)
        for w, side in ((a, "source"), (b, "target"))
    )
    return _assigned(x, y, left, right, (len(a), len(b)), "one_to_one", False, k)


@dataclass(frozen=True)
class DualMatch:
    """Features that encoder and decoder pair alike."""

    pairs: Pairs
    encoder_cosine: Float[np.ndarray, " pairs"]
    decoder_cosine: Float[np.ndarray, " pairs"]
    n_source: int
    n_target: int
    n_agreed: int
    """Pairs on which both matchings agree, at any cosine."""
    encoder: Matching
    decoder: Matching

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def source_share(self) -> float:
        """Share of the source's features that are shared."""
        return len(self.pairs) / self.n_source

    @property
    def target_share(self) -> float:
        """Share of the target's features that are shared."""
        return len(self.pairs) / self.n_target


def dual_match(
    a: SaeWeights,
    b: SaeWeights,
    *,
    least: float = SHARED,
    rule: Rule = "one_to_one",
    k: int = CANDIDATES,
) -> DualMatch:
    """Shared features by the dual rule of Paulo and Belrose (arXiv 2501.16615).

    Encoders and decoders are matched on their own; a pair is shared when both matchings hold it and both cosines reach
    ``least``. Cosines do not feel scales, so folding changes nothing here.

    Args:
        a: Source SAE.
        b: Target SAE of the same width.
        least: Least cosine of both.
        rule: Of both matchings: ``one_to_one`` as in the paper, or ``mutual``.
        k: Partners looked at, for large sides.

    Raises:
        TransferError: As ``match_rows``, or for a ``least`` outside 0..1.
    """
    if not 0 <= least <= 1:
        raise TransferError(f"The least cosine of a shared feature is {least}; it must lie in 0..1.")
    reads = match_rows(a.encoder, b.encoder, rule=rule, k=k)
    writes = match_rows(a.decoder, b.decoder, rule=rule, k=k)
    keys = [m.pairs[:, 0] * len(b) + m.pairs[:, 1] for m in (reads, writes)]
    _, i, j = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    keep = (reads.score[i] >= least) & (writes.score[j] >= least)
    return DualMatch(
        pairs=reads.pairs[i[keep]],
        encoder_cosine=reads.score[i[keep]],
        decoder_cosine=writes.score[j[keep]],
        n_source=len(a),
        n_target=len(b),
        n_agreed=len(i),
        encoder=reads,
        decoder=writes,
    )


def compose(*steps: Pairs) -> Pairs:
    """Pairs of the first space and the last along a chain A→B→C→…; a feature that loses its way is left out.

    Layers and fine-tunes drift a little with every step, so a chain reaches where one matching does not (SAE Match,
    arXiv 2410.07656).

    Raises:
        TransferError: Without steps, or when a step uses a feature twice.
    """
    if not steps:
        raise TransferError("A chain needs at least one matching.")
    for number, step in enumerate(steps):
        for side, ids in zip(("source", "target"), np.asarray(step).reshape(-1, 2).T, strict=True):
            if len(np.unique(ids)) < len(ids):
                raise TransferError(f"Step {number + 1} of the chain uses a {side} feature twice.", "Match one to one.")
    found = np.asarray(steps[0], dtype=np.int64).reshape(-1, 2)
    for step in steps[1:]:
        onward = np.asarray(step, dtype=np.int64).reshape(-1, 2)
        _, i, j = np.intersect1d(found[:, 1], onward[:, 0], assume_unique=True, return_indices=True)
        found = np.stack([found[i, 0], onward[j, 1]], axis=1)
    return found[np.argsort(found[:, 0])]


def _live(x: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a direction, in the precision they came in, and their ids."""
    if x.ndim != 2:
        raise TransferError(f"The {side} rows have shape {x.shape}, expected [n_features, d].")
    ids = np.flatnonzero(np.einsum("nd,nd->n", x, x, dtype=np.float64) > 0)
    if not len(ids):
        raise TransferError(f"No {side} row has a direction; all are zero.", "Check the SAE.")
    return x[ids], ids


def _assigned(
    x: np.ndarray,
    y: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    shape: tuple[int, int],
    rule: Rule,
    absolute: bool,
    k: int,
) -> Matching:
    """Match live rows by inner product and give them their ids."""
    if x.shape[1] != y.shape[1]:
        raise TransferError(f"Rows of one space have one width, got {x.shape[1]} and {y.shape[1]}.")
    if rule not in ("one_to_one", "mutual"):
        raise TransferError(f"Unknown matching rule {rule!r}.", "Use 'mutual' or 'one_to_one'.")
    exact = rule == "mutual" or max(len(x), len(y)) <= DENSE_LIMIT
    if rule == "mutual":
        rows, cols = mutual_nearest(_nearest(x, y, 1, absolute))
    elif exact:
        similarity = x.astype(np.float64) @ y.T.astype(np.float64)
        rows, cols = one_to_one(np.abs(similarity, out=similarity) if absolute else similarity)
    else:
        graph = _candidates(x, y, k, absolute)
        rows, cols = sparse_one_to_one(graph)
    score = _inner(x, y, rows, cols, absolute)
    keep = score > 0
    rows, cols, score = rows[keep], cols[keep], score[keep]
    order = np.argsort(left[rows])
    pairs = np.stack([left[rows], right[cols]], axis=1)[order].astype(np.int64)
    return Matching(pairs, score[order], *shape, shape[0] - len(left), shape[1] - len(right), exact)


def _nearest(x: np.ndarray, y: np.ndarray, k: int, absolute: bool) -> TopK:
    """Best partners by (absolute) cosine."""
    top = topk_cosine(x, y, k)
    if not absolute:
        return top
    other = topk_cosine(x, -y, k)
    sides = []
    for ids, scores, more_ids, more in (
        (top.row_ids, top.row_scores, other.row_ids, other.row_scores),
        (top.col_ids, top.col_scores, other.col_ids, other.col_scores),
    ):
        both, values = np.hstack([ids, more_ids]), np.hstack([scores, more])
        order = np.argsort(-values, axis=1, kind="stable")[:, : ids.shape[1]]
        sides += [np.take_along_axis(both, order, axis=1), np.take_along_axis(values, order, axis=1)]
    return replace(top, row_ids=sides[0], row_scores=sides[1], col_ids=sides[2], col_scores=sides[3])


def _candidates(x: np.ndarray, y: np.ndarray, k: int, absolute: bool) -> sp.csr_matrix:
    """Inner products of the best partners of every row and column, by cosine."""
    top = _nearest(x, y, k, absolute)
    rows = np.concatenate([np.repeat(np.arange(len(x)), top.row_ids.shape[1]), top.col_ids.ravel()])
    cols = np.concatenate([top.row_ids.ravel(), np.repeat(np.arange(len(y)), top.col_ids.shape[1])])
    rows, cols = np.divmod(np.unique(rows * len(y) + cols), len(y))
    return sp.csr_matrix((_inner(x, y, rows, cols, absolute), (rows, cols)), shape=(len(x), len(y)))


def _inner(x: np.ndarray, y: np.ndarray, rows: np.ndarray, cols: np.ndarray, absolute: bool) -> np.ndarray:
    out = np.empty(len(rows))
    for start in range(0, len(rows), EDGES):
        part = slice(start, start + EDGES)
        out[part] = np.einsum("nd,nd->n", x[rows[part]], y[cols[part]], dtype=np.float64)
    return np.abs(out) if absolute else out


def _check_scale(scale: np.ndarray, n: int, what: str) -> np.ndarray:
    scale = np.asarray(scale)
    if scale.shape != (n,) or not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        raise TransferError(f"The {what} of an SAE must be {n} positive numbers, got shape {scale.shape}.")
    return scale

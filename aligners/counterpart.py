"""How well a counterpart could do: what the other stream does while a feature fires, against its direction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from aligners.canonical import BLOCK, CanonicalSpace
from aligners.coactivation import PairedCodes
from aligners.correlation import dims
from aligners.seeded import centred
from transfer.core.rows import Rows

SAMPLE = 512
"""Features a side that are looked at."""


def counterpart_cosine(space: CanonicalSpace, codes: PairedCodes, residual_x: Rows, residual_y: Rows) -> float:
    """Cosine that a feature with a counterpart may be expected to have with it, without using any counterpart.

    While a feature fires, the other stream moves, on average, along its counterpart's direction if there is one, and
    along what the other model makes of the same thing if there is none. That move is blurred by whatever else fires
    then; a counterpart's decoder row is not blurred, but has the noise of a dictionary. The two errors are of like
    size, on planted pairs and on the zoo, so the median cosine between a feature and the other stream's move says
    how near "the same" can be expected to come. Best matches that stay far below it are merely related.

    Memory: ``SAMPLE`` × both widths in float64 and ``BLOCK`` rows of both residuals.

    Args:
        space: Canonical space of the residuals, with the directions of both sides.
        codes: Codes of the features whose directions are in ``space``, on the rows of the residuals.
        residual_x: Source residuals [rows, d_src].
        residual_y: Target residuals [rows, d_tgt].

    Returns:
        The smaller of the two sides' medians over up to ``SAMPLE`` features each.
    """
    picks = [_sample(len(side)) for side in space.joint]
    moves = [np.zeros((len(pick), width.shape[1])) for pick, width in zip(picks, (residual_y, residual_x), strict=True)]
    fired = [np.zeros(len(pick)) for pick in picks]
    totals = [np.zeros(residual_y.shape[1]), np.zeros(residual_x.shape[1])]
    rows = 0
    for a, b, x, y in _blocks(codes, picks, residual_x, residual_y):
        rows += len(x)
        for i, (code, other) in enumerate(((a, y), (b, x))):
            moves[i] += code.T @ other
            fired[i] += np.asarray(code.sum(axis=0)).ravel()
            totals[i] += other.sum(axis=0, dtype=np.float64)
    medians = []
    for i, own in enumerate(space.joint):
        moved = (moves[i] - np.outer(fired[i], totals[i] / rows)) @ space.into[1 - i]
        some = np.flatnonzero(np.any(moved != 0, axis=1))
        if len(some) < 2:
            return 0.0
        medians.append(float(np.median(np.einsum("nd,nd->n", own[picks[i][some]], centred(moved[some])))))
    return max(min(medians), 0.0)


def _sample(n: int) -> Int[np.ndarray, " n"]:
    """Features spread evenly over all of them: their order says nothing."""
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))


def _blocks(
    codes: PairedCodes, picks: list[Int[np.ndarray, " n"]], residual_x: Rows, residual_y: Rows
) -> Iterator[tuple[sp.csr_matrix, sp.csr_matrix, Float[np.ndarray, "rows d_src"], Float[np.ndarray, "rows d_tgt"]]]:
    at = 0
    for a, b in codes.parts:
        chosen = a[:, picks[0]].tocsr(), b[:, picks[1]].tocsr()
        n = dims(a)[0]
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            part = slice(at + start, at + stop)
            yield chosen[0][start:stop], chosen[1][start:stop], residual_x[part], residual_y[part]
        at += n

"""Latent scaling: whether a crosscoder's latent that looks exclusive to one model is (arXiv 2504.02922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from aligners.crosscoder import Crosscoder

BLOCK = 4096
"""Rows encoded at once."""
LOPSIDED = 0.1
"""A latent with less than this share of its decoder norm on one side looks exclusive to the other."""
ERROR_RATIO, RECONSTRUCTION_RATIO = 0.2, 0.5
"""Below both, a latent is exclusive (arXiv 2504.02922)."""
CHUNKS = 16
"""Runs of rows that go alternately to one and the other half, so that halves share almost no document."""


@dataclass(frozen=True)
class LatentScaling:
    """How strongly each latent acts in both models, whatever its decoder rows say (arXiv 2504.02922).

    Sparse training can leave a decoder row at nothing although the model has the concept: the row shrank, or another
    latent took the concept over on that side. Both make a latent look exclusive. The first shows in what the other
    latents leave unexplained on that side, the second in what they reconstruct there.
    """

    relative_norm: Float[np.ndarray, " latents"]
    """The target's share of the decoder norms."""
    error: Float[np.ndarray, "latents 2"]
    """β of (source, target): what one unit of the latent moves in the model, among what other latents leave."""
    reconstruction: Float[np.ndarray, "latents 2"]
    """β of what one unit of the latent goes with in the reconstruction, all latents together."""
    fires: Int[np.ndarray, " latents"]
    """Rows it is on; β are NaN below two in either half."""

    @property
    def side(self) -> Int[np.ndarray, " latents"]:
        """Side with the longer decoder row: 0 source, 1 target."""
        return (self.relative_norm > 0.5).astype(np.int64)

    @property
    def nu_error(self) -> Float[np.ndarray, " latents"]:
        """β of the other side over β of the own side, in the error; near 1 for a concept of both."""
        return self._ratio(self.error)

    @property
    def nu_reconstruction(self) -> Float[np.ndarray, " latents"]:
        """The same in the reconstruction."""
        return self._ratio(self.reconstruction)

    @property
    def looks_exclusive(self) -> Bool[np.ndarray, " latents"]:
        """By decoder norms alone."""
        return (self.relative_norm < LOPSIDED) | (self.relative_norm > 1 - LOPSIDED)

    @property
    def exclusive(self) -> Bool[np.ndarray, " latents"]:
        """By decoder norms and both ratios; the others that look exclusive are artefacts of training, or untestable."""
        return self.looks_exclusive & (self.nu_error < ERROR_RATIO) & (self.nu_reconstruction < RECONSTRUCTION_RATIO)

    def _ratio(self, beta: np.ndarray) -> np.ndarray:
        at = np.arange(len(beta))
        own, other = beta[at, self.side], beta[at, 1 - self.side]
        return np.divide(other, own, out=np.full(len(beta), np.nan), where=own > 0)


def latent_scaling(
    crosscoder: Crosscoder, x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"]
) -> LatentScaling:
    """Regress both models' residuals on every latent in closed form, the latent's own part put back.

    With error ε and activation f of a latent, its effect on a side is ``d + Σ f ε / Σ f²`` (a vector, as the two sides
    have no direction in common; the paper regresses on one decoder row), and ``cov(f, x̂) / var(f)`` for the
    reconstruction x̂. β is its length, from the inner product of the effects in two halves of the rows, so that noise
    adds nothing to it. In the crosscoder's units, in which both sides have a mean norm of one.

    Memory: six float64 arrays of latents × (d_src + d_tgt), and 4,096 rows. Work: ``8 · rows · latents · (d_src +
    d_tgt)`` FLOP.
    """
    latents, d = crosscoder.decoder.shape
    count, total, square = np.zeros((2, latents)), np.zeros((2, latents)), np.zeros((2, latents))
    with_error, with_rebuilt = np.zeros((2, latents, d)), np.zeros((2, latents, d))
    rebuilt_sum, n_rows = np.zeros((2, d)), np.zeros(2)
    length = -(-len(x) // CHUNKS)
    for start, rows, active in crosscoder.blocks(x, y, min(BLOCK, length)):
        half = start // length % 2
        rebuilt = crosscoder.decode(active)
        count[half] += np.sum(active > 0, axis=0)
        total[half] += active.sum(axis=0, dtype=np.float64)
        square[half] += np.sum(active.astype(np.float64) ** 2, axis=0)
        with_error[half] += active.T @ (rows - rebuilt)
        with_rebuilt[half] += active.T @ rebuilt
        rebuilt_sum[half] += rebuilt.sum(axis=0, dtype=np.float64)
        n_rows[half] += len(rows)
    # In place, because these are the large arrays.
    with_error /= np.maximum(square, 1e-300)[:, :, None]
    with_error += crosscoder.decoder
    n_rows = np.maximum(n_rows, 1)
    for half in range(2):
        with_rebuilt[half] -= np.outer(total[half], rebuilt_sum[half] / n_rows[half])
    with_rebuilt /= np.maximum(square - total**2 / n_rows[:, None], 1e-300)[:, :, None]
    enough = np.all(count >= 2, axis=0)
    return LatentScaling(
        relative_norm=crosscoder.relative_norm,
        error=_lengths(with_error, crosscoder.d_source, enough),
        reconstruction=_lengths(with_rebuilt, crosscoder.d_source, enough),
        fires=count.sum(axis=0).astype(np.int64),
    )


def _lengths(effects: np.ndarray, cut: int, enough: np.ndarray) -> Float[np.ndarray, "latents 2"]:
    """Length of each side's effect, from the inner product of both halves'; NaN where there is too little."""
    product = effects[0] * effects[1]
    square = np.stack([product[:, :cut].sum(axis=1), product[:, cut:].sum(axis=1)], axis=1)
    return np.where(enough[:, None], np.sqrt(np.maximum(square, 0)), np.nan)

"""The trained baseline: a BatchTopK crosscoder on paired residuals, whose latents join features of both sides.

One dictionary is trained for both models together, so a latent's two decoder rows correspond by index. It answers what
a shared dictionary would look like, not which features of two given SAEs correspond; the latter is read off it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from aligners.base import Aligner, coupling_of, match_columns
from aligners.fused import mutual_best
from aligners.latent_scaling import latent_scaling
from aligners.maps import OUTLIER
from aligners.relative import usable_directions
from aligners.topk import topk_cosine
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

BLOCK = 4096
"""Rows encoded at once."""
DECAY = 0.3
"""Share of the steps, at the end, over which the learning rate falls to 0."""
SETTLED = 0.05
"""The loss may still fall by this share between the last two tenths of the steps of a converged fit."""


@dataclass(frozen=True)
class Crosscoder:
    """One dictionary of two residual streams, source coordinates first, each side scaled to a mean norm of one."""

    encoder: Float[np.ndarray, "d latents"]
    encoder_bias: Float[np.ndarray, " latents"]
    decoder: Float[np.ndarray, "latents d"]
    decoder_bias: Float[np.ndarray, " d"]
    d_source: int
    source_scale: float
    """Factor from residuals to the crosscoder's units."""
    target_scale: float
    threshold: float
    """A latent is on where its activation times ``strength`` reaches this: what BatchTopK let pass in training."""

    @property
    def source(self) -> Float[np.ndarray, "latents d_src"]:
        """Decoder rows of the source."""
        return self.decoder[:, : self.d_source]

    @property
    def target(self) -> Float[np.ndarray, "latents d_tgt"]:
        """Decoder rows of the target."""
        return self.decoder[:, self.d_source :]

    @property
    def strength(self) -> Float[np.ndarray, " latents"]:
        """Sum of both decoder norms."""
        return np.linalg.norm(self.source, axis=1) + np.linalg.norm(self.target, axis=1)

    @property
    def relative_norm(self) -> Float[np.ndarray, " latents"]:
        """The target's share of the decoder norms: 0 = only the source has it, 1 = only the target; NaN = neither."""
        strength = self.strength
        share = np.full(len(strength), np.nan)
        return np.divide(np.linalg.norm(self.target, axis=1), strength, out=share, where=strength > 0)

    def joint(self, x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"]) -> Float[np.ndarray, "n d"]:
        """Residuals side by side in the crosscoder's units, float32."""
        return np.hstack([np.float32(self.source_scale) * x, np.float32(self.target_scale) * y], dtype=np.float32)

    def encode(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n latents"]:
        """Activations of joint rows."""
        active = np.maximum((rows - self.decoder_bias) @ self.encoder + self.encoder_bias, 0)
        active[active * self.strength.astype(np.float32) < self.threshold] = 0
        return active

    def decode(self, active: Float[np.ndarray, "n latents"]) -> Float[np.ndarray, "n d"]:
        """Joint rows from activations."""
        return active @ self.decoder + self.decoder_bias

    def blocks(
        self, x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"], step: int = BLOCK
    ) -> Iterator[tuple[int, Float[np.ndarray, "block d"], Float[np.ndarray, "block latents"]]]:
        """First row, joint rows and activations, one block after the other."""
        for start in range(0, len(x), step):
            rows = self.joint(x[start : start + step], y[start : start + step])
            yield start, rows, self.encode(rows)


@dataclass(frozen=True)
class Training:
    """A trained crosscoder and how training went."""

    crosscoder: Crosscoder
    losses: Float[np.ndarray, " steps"]
    """Squared error of both sides, mean over the batch, in the crosscoder's units."""
    n_outliers: int
    """Rows left out because the norm of a side passes ``maps.OUTLIER`` medians."""

    @property
    def converged(self) -> bool:
        """20 steps or more, finite, and no fall by more than ``SETTLED`` and two standard errors in the last tenth."""
        tenth = len(self.losses) // 10
        if tenth < 2 or not np.isfinite(self.losses).all():
            return False
        before, last = self.losses[-2 * tenth : -tenth], self.losses[-tenth:]
        noise = 2 * np.sqrt((before.var() + last.var()) / tenth)
        return bool(last.mean() >= (1 - SETTLED) * before.mean() - noise)


def train_crosscoder(
    x: Float[np.ndarray, "n d_src"],
    y: Float[np.ndarray, "n d_tgt"],
    *,
    latents: int,
    k: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> Training:
    """Train a crosscoder with BatchTopK (arXiv 2504.02922, 2412.06410) by Adam on random rows.

    ``f = ReLU(E (x, y) + b)``; the ``batch · k`` largest ``f · Σ‖d‖`` of a batch reconstruct both sides.

    Both decoder rows of a latent start at the two sides of one random paired row, so that they mean the same from the
    first step, and the encoder at their transpose. There is no auxiliary loss for latents that never fire: with this
    start, planted concepts were found as well without AuxK as with it.

    Memory: eight times ``latents · (d_src + d_tgt)`` floats (weights, gradients and Adam's moments: 4 GiB at 16,384
    latents and widths of 8,192 together), and a few times ``batch · (latents + d_src + d_tgt)``; residuals may be
    memory-mapped and are read a batch at a time. Work: about ``10 · batch · latents · (d_src + d_tgt)`` FLOP a step.

    Args:
        x: Source residuals.
        y: Target residuals of the same positions.
        latents: Size of the dictionary.
        k: Latents on per row, on average.
        steps: Of Adam; the rate falls to 0 over the last 30 %.
        batch: Rows a step.
        rate: Of learning.
        seed: Of the start and the batches.

    Raises:
        TransferError: For numbers out of range, or residuals that are zero or too few.
    """
    import torch

    if min(latents, k, steps, batch) < 1 or k > latents or not rate > 0:
        raise TransferError(
            f"A crosscoder needs 1 ≤ k ≤ latents, steps, batch ≥ 1 and rate > 0; got latents={latents}, k={k}, "
            f"steps={steps}, batch={batch}, rate={rate}."
        )
    if len(x) != len(y):
        raise TransferError(f"Paired residuals differ in rows: {len(x)} source, {len(y)} target.")
    sides = [_norms(x), _norms(y)]
    good = np.flatnonzero(np.all([norm <= OUTLIER * np.median(norm) for norm in sides], axis=0))
    scales = [1 / norm[good].mean() if norm[good].any() else 0.0 for norm in sides]
    if not all(scales):
        raise TransferError("The residuals of one side are zero; a crosscoder cannot be trained.", "Harvest again.")
    rng = np.random.default_rng(seed)
    start = _start(x, y, rng, good, latents, scales)
    weights = [torch.from_numpy(w).requires_grad_() for w in start]
    encoder, bias, decoder, centre = weights
    optimiser = torch.optim.Adam(weights, lr=rate, fused=True)
    losses, floors = np.empty(steps), np.empty(steps)
    d_source = x.shape[1]
    frame = Crosscoder(start[0], start[1], start[2], start[3], d_source, scales[0], scales[1], 0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (steps - step) / (DECAY * steps))
        rows = good[rng.integers(len(good), size=batch)]
        data = torch.from_numpy(frame.joint(x[rows], y[rows]))
        active = torch.relu(torch.addmm(bias, data - centre, encoder))
        norms = decoder[:, :d_source].norm(dim=1) + decoder[:, d_source:].norm(dim=1)
        worth = (active * norms).detach()
        floor = torch.topk(worth.flatten(), batch * k, sorted=False).values.min()
        on = (worth >= floor) & (worth > 0)
        error = data - torch.addmm(centre, active * on, decoder)
        loss = error.square().sum() / batch
        losses[step], floors[step] = float(loss.detach()), float(floor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    threshold = float(floors[-max(1, steps // 10) :].mean())
    e, b, d, c = (w.detach().numpy() for w in weights)
    model = Crosscoder(e, b, d, c, d_source, scales[0], scales[1], threshold)
    return Training(model, losses, len(x) - len(good))


def joined_features(
    crosscoder: Crosscoder,
    alive: Int[np.ndarray, " alive"],
    source: Float[np.ndarray, "n_src d_src"],
    target: Float[np.ndarray, "n_tgt d_tgt"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """One-to-one pairs of features that are the nearest to the two decoder rows of one latent, with the smaller cosine.

    Several latents may propose pairs with one feature: a pair stays if it is the best of both its features.

    Args:
        crosscoder: Of both models.
        alive: Latents that may join.
        source: Directions, none zero.
        target: Directions, none zero.
    """
    a, b = crosscoder.source[alive], crosscoder.target[alive]
    both = np.flatnonzero((np.linalg.norm(a, axis=1) > 0) & (np.linalg.norm(b, axis=1) > 0))
    if not len(both):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    left = topk_cosine(a[both].astype(np.float64), source.astype(np.float64), 1)
    right = topk_cosine(b[both].astype(np.float64), target.astype(np.float64), 1)
    score = np.minimum(left.row_scores[:, 0], right.row_scores[:, 0])
    src, tgt = left.row_ids[:, 0], right.row_ids[:, 0]
    good = np.flatnonzero(score > 0)
    good = good[mutual_best(src[good], tgt[good], score[good])]
    return src[good], tgt[good], np.minimum(score[good], 1.0)


class CrosscoderAligner(Aligner):
    """A crosscoder trained on the paired residuals; a feature of either side is joined to the other through a latent.

    ``score`` is the smaller cosine of the two features with their latent's decoder rows; a pair with a low score shares
    a latent that neither SAE has. A high one is no proof either: a latent can merge one concept of either side that
    have nothing in common, and does so even on shuffled rows (see the tests), so score on held-out documents. The SAEs'
    codes are used only to leave out rare features. ``info`` tells the share of variance explained, how many latents
    live, and how many look exclusive to a side against how many are (latent scaling).

    The defaults take 45 s on one core for residuals 192 and 224 wide; there, between the zoo's LLaMA and Mistral, pairs
    with a score of .5 to .7 have a median held-out correlation of .66, and pairs below .5 one of .22. What it finds
    depends on training: rare concepts need rows and steps, and ``k`` should be near the concepts that a row holds; with
    more to spare, latents stand for mixtures. Memory and work: ``train_crosscoder``, and two passes over the residuals.

    Args:
        latents: Size of the joint dictionary.
        k: Latents on per row, on average.
        steps: Of training.
        batch: Rows a step.
        rate: Of learning (Adam).
        min_support: Rows a feature must fire on to be testable.
        seed: Of the start and the batches.
    """

    method = "crosscoder"

    def __init__(
        self,
        *,
        latents: int = 2048,
        k: int = 16,
        steps: int = 1000,
        batch: int = 256,
        rate: float = 2e-3,
        min_support: int = 3,
        seed: int = 0,
    ) -> None:
        self.latents = latents
        self.k = k
        self.steps = steps
        self.batch = batch
        self.rate = rate
        self.min_support = min_support
        self.seed = seed

    def needs(self) -> frozenset[str]:
        """Residuals of paired positions."""
        return frozenset({"pairs", "residuals"})

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        assert pairs is not None and pairs.source_residual is not None and pairs.target_residual is not None
        src, tgt, counts = usable_directions(source, target, pairs, self.min_support)
        x, y = pairs.source_residual[:], pairs.target_residual[:]  # batches are drawn from all of them
        training = {name: value for name, value in self.get_params().items() if name != "min_support"}
        trained = train_crosscoder(x, y, **training)
        model = trained.crosscoder
        scaling = latent_scaling(model, x, y)
        alive = np.flatnonzero(scaling.fires)
        rows, cols, score = joined_features(model, alive, source.directions[src], target.directions[tgt])
        matches = match_columns(src[rows], tgt[cols], score)
        explained = explained_variance(model, x, y)
        info: dict[str, Any] = {
            **counts,
            "explained_source": explained[0],
            "explained_target": explained[1],
            "latents_alive": len(alive),
            "rows_left_out": trained.n_outliers,
        }
        for side, name in enumerate(("source", "target")):
            mine = (scaling.side == side) & (scaling.fires > 0)
            info[f"looks_exclusive_{name}"] = int(np.sum(mine & scaling.looks_exclusive))
            info[f"exclusive_{name}"] = int(np.sum(mine & scaling.exclusive))
        return self._alignment(
            source,
            target,
            matches,
            coupling_of(matches, (source.space.n_features, target.space.n_features)),
            converged=trained.converged,
            n_iter=self.steps,
            info=info,
        )


def explained_variance(
    crosscoder: Crosscoder, x: Float[np.ndarray, "n d_src"], y: Float[np.ndarray, "n d_tgt"]
) -> tuple[float, float]:
    """Share of each side's variance that the reconstruction explains on these rows, all coordinates together."""
    wrong, square, total, n = np.zeros(2), np.zeros(2), np.zeros(crosscoder.decoder.shape[1]), 0
    cut = crosscoder.d_source
    for _, rows, active in crosscoder.blocks(x, y):
        error, rows = (rows - crosscoder.decode(active)).astype(np.float64), rows.astype(np.float64)
        for side, part in enumerate((slice(cut), slice(cut, None))):
            wrong[side] += np.sum(error[:, part] ** 2)
            square[side] += np.sum(rows[:, part] ** 2)
        total += rows.sum(axis=0)
        n += len(rows)
    mean = total / n
    spread = square - n * np.array([mean[:cut] @ mean[:cut], mean[cut:] @ mean[cut:]])
    left, right = 1 - wrong / np.maximum(spread, 1e-300)
    return float(left), float(right)


def _norms(x: np.ndarray) -> Float[np.ndarray, " n"]:
    """Length of each row, float64, a block at a time."""
    return np.concatenate(
        [np.linalg.norm(x[i : i + BLOCK].astype(np.float64), axis=1) for i in range(0, len(x), BLOCK)]
    )


def _start(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, good: np.ndarray, latents: int, scales: list[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Encoder, its bias, decoder and its bias before training: decoder halves of length 1/2 at random paired rows."""
    chosen = good[rng.integers(len(good), size=latents)]
    centres, halves = [], []
    for side, scale in ((x, scales[0]), (y, scales[1])):
        total = np.zeros(side.shape[1])
        for i in range(0, len(good), BLOCK):
            total += side[good[i : i + BLOCK]].sum(axis=0, dtype=np.float64)
        centre = scale * total / len(good)
        rows = scale * side[chosen].astype(np.float64) - centre
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        halves.append(np.divide(rows, 2 * length, out=np.zeros_like(rows), where=length > 0))
        centres.append(centre)
    decoder = np.hstack(halves).astype(np.float32)
    bias = np.concatenate(centres).astype(np.float32)
    return np.ascontiguousarray(decoder.T), np.zeros(latents, dtype=np.float32), decoder, bias

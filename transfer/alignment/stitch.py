"""Stitched cross-entropy: how well one model's residual stream, mapped, carries on in another model.

Stitching after Sec. 3 of arXiv 2506.06609 (Chen et al.), across tokenizers: only positions at which both models have
read the same bytes of the text are stitched, and only what is predicted from them is scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.stats import Interval, bootstrap_counts

if TYPE_CHECKING:
    from aligners.maps import ResidualMap
    from models.adapter import Adapter
    from models.tokens import Rendered

ARMS = ("native", "stitched", "rotated", "ablated")
"""The residual stream of the paired positions: as it is; the source's, mapped; the same turned at random about its mean
(right size and mean, no content); the target's mean."""


@dataclass(frozen=True)
class StitchedLoss:
    """Cross-entropy of the target model with a part of its residual stream replaced, by document."""

    source: str
    """Space id."""
    target: str
    """Space id."""
    nats: dict[str, np.ndarray]
    """Per arm of ``ARMS``, summed over the scored tokens of each document, float64 [docs]."""
    tokens: np.ndarray
    """Scored tokens of each document, int64 [docs]: content tokens predicted from a replaced position."""
    n_replaced: int
    """Positions replaced, over all documents."""
    n_unpaired: int
    """Content positions of the target that the source has no equal prefix for; they keep their own residual."""
    n_empty: int
    """Texts left out, with no token to score."""
    r2: float
    """Share of the target's variance at the replaced positions that the mapped source explains."""
    seed: int

    def loss(self, arm: str) -> float:
        """Cross-entropy in nats per scored token."""
        return float(self.nats[arm].sum() / self.tokens.sum())

    def recovered(self, arm: str = "stitched", *, level: float = 0.95) -> Interval:
        """(ablated − arm) / (ablated − native): 1 = as good as the target's own stream, 0 = as bad as its mean.

        The interval is a percentile bootstrap over documents, arms paired; it covers other documents of the same kind
        for this one map. NaN where ablation does not hurt, or with a single document.
        """
        gain, room = (self.nats["ablated"] - self.nats[name] for name in (arm, "native"))
        return ratio_of_means(gain, room, level=level, seed=self.seed)

    def summary(self) -> dict[str, Any]:
        """One row of a table."""
        row: dict[str, Any] = {"source": self.source, "target": self.target, "n_docs": len(self.tokens)}
        row |= {"n_tokens": int(self.tokens.sum()), "n_replaced": self.n_replaced, "n_unpaired": self.n_unpaired}
        row |= {"n_empty": self.n_empty, "r2": self.r2} | {f"loss_{arm}": self.loss(arm) for arm in ARMS}
        for arm in ("stitched", "rotated"):
            got = self.recovered(arm)
            row |= {f"recovered_{arm}": got.value, f"recovered_{arm}_low": got.low, f"recovered_{arm}_high": got.high}
        return row


def paired_positions(source: list[Rendered], target: list[Rendered]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per text, the content tokens of either side that end at the same byte: places in ``content``, int64 [n] each."""
    from aligners.tokens import pair_rows

    docs, ends, starts = [], [], []
    for side in (source, target):
        sizes = [len(r.content) for r in side]
        docs.append(np.repeat(np.arange(len(side)), sizes))
        ends.append(np.concatenate([np.zeros(0, np.int32), *(r.ends for r in side)]))
        starts.append(np.concatenate([[0], np.cumsum(sizes)]))
    rows_a, rows_b = pair_rows(docs[0], ends[0], docs[1], ends[1])
    cuts = np.searchsorted(docs[0][rows_a], np.arange(1, len(source)))
    return tuple(  # type: ignore[return-value]
        [part - start for part, start in zip(np.split(rows, cuts), first[:-1], strict=True)]
        for rows, first in ((rows_a, starts[0]), (rows_b, starts[1]))
    )


def stitched_loss(
    source: Adapter,
    target: Adapter,
    mapping: ResidualMap,
    texts: list[str],
    *,
    max_tokens: int = 512,
    seed: int = 0,
    token_budget: int = 8192,
) -> StitchedLoss:
    """Run the target on from the source's mapped residual stream.

    Both models read each text as one user turn, at their spaces' layers. At content positions where both have read the
    same bytes the target's residual stream is replaced; the template and unpaired positions keep the target's own.
    Scored are content tokens right behind a replaced position.

    Memory: replaced positions × (3·d_src + 6·d_tgt) float32, three d_tgt² float64, and one padded batch.

    Args:
        source: Model and SAE whose layer is left.
        target: Model and SAE whose layer is entered.
        mapping: Map of residuals fitted on other texts (``aligners.maps.fit_map``).
        texts: Held-out texts.
        max_tokens: Longer renderings are cut here.
        seed: Of the random rotation and the bootstrap.
        token_budget: Padded tokens in one forward pass at most.

    Raises:
        TransferError: When the map does not fit the widths, or no text has a token to score.
    """
    from models.interventions import replacing

    expected = (source.space.d_model, target.space.d_model)
    if mapping.matrix.shape != expected:
        raise TransferError(f"The residual map is {mapping.matrix.shape}, the models are {expected} wide.")
    lines = [[r.cut(max_tokens)[0] for r in side.language.render_many(texts)] for side in (source, target)]
    places = paired_positions(*lines)
    positions = [[r.content[p] for r, p in zip(*both, strict=True)] for both in zip(lines, places, strict=True)]
    scored = [np.intersect1d(at + 1, r.content) for at, r in zip(positions[1], lines[1], strict=True)]
    use = [i for i, tokens in enumerate(scored) if len(tokens)]
    if not use:
        raise TransferError(
            "No text has a content token behind a position that both models share.", "Use longer texts."
        )
    x, own = (
        _residuals(side, [line[i] for i in use], [at[i] for i in use], token_budget)
        for side, line, at in zip((source, target), lines, positions, strict=True)
    )
    mapped = mapping.points(x).astype(np.float32)
    mean = own.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    centre = mapped.mean(axis=0, keepdims=True)
    arms = {
        "stitched": mapped,
        "rotated": centre + (mapped - centre) @ rotation(expected[1], seed).astype(np.float32),
        "ablated": np.broadcast_to(mean, own.shape),
    }
    at = [positions[1][i] for i in use]
    ids, targets = [lines[1][i].ids for i in use], [scored[i] for i in use]
    nats = {"native": target.language.nll(ids, targets, token_budget=token_budget)}
    for arm, values in arms.items():
        edit = replacing(at, _tensors(values, at))
        nats[arm] = target.language.nll(ids, targets, edit=(target.space.layer, edit), token_budget=token_budget)
    return StitchedLoss(
        source=source.space.id,
        target=target.space.id,
        nats=nats,
        tokens=np.array([len(t) for t in targets], dtype=np.int64),
        n_replaced=len(own),
        n_unpaired=sum(len(lines[1][i].content) for i in use) - len(own),
        n_empty=len(texts) - len(use),
        r2=float(1 - np.sum((own - mapped) ** 2, dtype=np.float64) / np.sum((own - mean) ** 2, dtype=np.float64)),
        seed=seed,
    )


def rotation(width: int, seed: int) -> np.ndarray:
    """A random rotation, float64 [width, width]."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return q * np.sign(np.diag(r))


def _residuals(side: Adapter, lines: list[Rendered], positions: list[np.ndarray], token_budget: int) -> np.ndarray:
    """Residual stream at some positions of each line, float32 [positions, d_model], lines in order."""
    found: list[np.ndarray] = [np.zeros((0, side.space.d_model), np.float32)] * len(lines)
    for rows, hidden in side.language.stream([r.ids for r in lines], side.space.layer, token_budget):
        for i, states in zip(rows, hidden, strict=True):
            found[i] = states[positions[i]].float().cpu().numpy()
    return np.concatenate(found)


def _tensors(values: np.ndarray, positions: list[np.ndarray]) -> list[Any]:
    import torch

    return list(torch.from_numpy(np.array(values)).split([len(at) for at in positions]))


def ratio_of_means(
    above: np.ndarray, below: np.ndarray, *, level: float = 0.95, seed: int = 0, draws: int = 2000
) -> Interval:
    """Mean of ``above`` over mean of ``below``, entries paired [n], with a percentile bootstrap over the pairs.

    NaN where the mean of ``below`` is not positive; draws in which it is not are left out of the interval.
    """
    n = len(above)
    value = float(above.sum() / below.sum()) if below.sum() > 0 else float("nan")
    if n < 2 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"), n, "none")
    drawn = []
    for counts in bootstrap_counts(n, draws, seed):
        room = below @ counts
        drawn.append((above @ counts)[room > 0] / room[room > 0])
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n, "bootstrap")

"""Train a TopK SAE with SAELens' own trainer, and measure one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.adapter import Adapter
from transfer.core.console import progress
from transfer.core.errors import TransferError

Activations = Callable[[], Iterator[Tensor]] | np.ndarray | Tensor
_SAMPLE = 50_000
"""Vectors that mean and scale are estimated from."""


def train_sae(
    activations: Activations,
    *,
    d_in: int,
    width: int,
    k: int,
    tokens: int,
    lr: float = 1e-3,
    batch: int = 1024,
    seed: int = 0,
    out: Path,
    metadata: dict[str, Any] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a TopK SAE and save it in SAELens' inference format, float32, decoder rows of unit norm.

    It is trained on centred activations scaled to a mean square of one; both are folded into the weights afterwards,
    so the saved SAE reads raw residuals.

    Args:
        activations: All vectors [n, d_in], or a function that starts an iterator over blocks of them [m, d_in];
            both are gone through as often as needed, the array in a new order each time, blocks through SAELens'
            mixing buffer.
        d_in: Width of the residual stream.
        width: Features.
        k: Active features per token.
        tokens: Vectors to train on.
        lr: Adam's peak rate: 2 % warm-up, then constant, and linearly down to a tenth over the last 20 %.
        batch: Vectors a step.
        seed: Decides initialisation and order; the global random state is left as it was.
        out: Folder; replaced as a whole at the end.
        metadata: Kept in ``cfg.json``; ``layer`` is the canonical layer, ``hook_name`` SAELens' name of it.
        device: A torch device.

    Returns:
        Figures for the card: ``steps``, ``tokens_seen``, ``final_mse`` (of normalised inputs, last 5 % of the steps),
        ``dead_in_training``, ``scale``, and the settings.

    Raises:
        TransferError: For activations that are empty, of another width or not finite, or fewer tokens than a batch.
    """
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    steps = tokens // batch
    if steps < 1:
        raise TransferError(f"{tokens} tokens are less than one batch of {batch}.")
    mean, scale = _moments(activations, d_in)
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        config = TopKTrainingSAEConfig(d_in=d_in, d_sae=width, k=k, device=device, decoder_init_norm=0.1)
        sae = TopKTrainingSAE(config)
        for name, value in (metadata or {}).items():
            sae.cfg.metadata[name] = value
        settings = SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr / 10,
            lr_warm_up_steps=steps // 50,
            lr_decay_steps=steps // 5,
            dead_feature_window=min(1000, max(1, steps // 8)),
            feature_sampling_window=steps + 1,
            device=device,
        )
        feed = ((block.to(device) - mean) * scale for block in _feed(activations, batch, seed))
        trainer = SAETrainer(cfg=settings, sae=sae, data_provider=feed)
        losses: list[float] = []
        # The trainer's public step instead of fit(): the same loop, with progress on our own line.
        with progress("train SAE", steps * batch, "tokens") as advance:
            for _ in range(steps):
                step = trainer.step(next(feed))
                trainer.n_training_steps += 1
                losses.append(float(step.losses["mse_loss"].detach()) / d_in)
                advance(batch)
        trainer.set_final_sae_metadata()
    with torch.no_grad():
        sae.fold_activation_norm_scaling_factor(float(scale))
        sae.b_dec.add_(mean)
    # A folder cannot be renamed over another one: write beside it, then swap.
    out = Path(out)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    sae.to("cpu").save_inference_model(part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return {
        "steps": steps,
        "tokens_seen": steps * batch,
        "final_mse": float(np.mean(losses[-max(1, steps // 20) :])),
        "dead_in_training": int(trainer.dead_neurons.sum()),
        "scale": float(scale),
        "width": width,
        "k": k,
        "lr": lr,
        "batch": batch,
        "seed": seed,
    }


def _blocks(activations: Activations) -> Iterator[Tensor]:
    """One pass over the activations."""
    if callable(activations) and not isinstance(activations, Tensor):
        yield from activations()
        return
    data = torch.as_tensor(activations)
    for i in range(0, len(data), 8192):
        yield data[i : i + 8192]


def _moments(activations: Activations, d_in: int) -> tuple[Tensor, Tensor]:
    """Mean [d_in], and the factor that gives centred vectors a mean square of one."""
    parts, n = [], 0
    for block in _blocks(activations):
        if block.ndim != 2 or block.shape[1] != d_in:
            raise TransferError(f"Activations are {tuple(block.shape)}, expected [n, {d_in}].")
        parts.append(block[: _SAMPLE - n].double().cpu())
        n += len(parts[-1])
        if n >= _SAMPLE:
            break
    if n < 2:
        raise TransferError("There are no activations to train an SAE on.")
    sample = torch.cat(parts)
    mean = sample.mean(0)
    scale = 1 / (sample - mean).pow(2).mean().sqrt()
    if not bool(torch.isfinite(scale)):
        raise TransferError("The activations are constant or not finite.")
    return mean.float(), scale.float()


def _feed(activations: Activations, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless float32 batches [batch, d_in]."""
    if callable(activations) and not isinstance(activations, Tensor):
        from sae_lens.training.mixing_buffer import mixing_buffer

        def endless() -> Iterator[Tensor]:
            while True:
                yield from (block.float() for block in activations())

        yield from mixing_buffer(max(32 * batch, 65_536), batch, endless())
        return
    data = torch.as_tensor(activations)
    generator = torch.Generator().manual_seed(seed)
    rest = torch.zeros(0, dtype=torch.int64)
    while True:
        rest = torch.cat([rest, torch.randperm(len(data), generator=generator)])
        while len(rest) >= batch:
            yield data[rest[:batch]].float()
            rest = rest[batch:]


def sae_quality(adapter: Adapter, texts: list[str], *, max_tokens: int = 512) -> dict[str, float]:
    """The numbers of an SAE's card, on the content tokens of texts.

    Cross-entropy is that of each content token that follows another one, with the residual stream at the SAE's layer
    as it is, replaced by its reconstruction, or by zeros, at all content positions.

    Args:
        adapter: Model and SAE.
        texts: Texts.
        max_tokens: Longer ones are cut here.

    Returns:
        ``nmse`` (squared error over squared deviation from the mean), ``l0``, ``dead`` (fraction of the features that
        never fire on these texts), ``tokens``, ``ce_clean``, ``ce_reconstructed``, ``ce_zero`` (nats per token), and
        ``ce_recovered`` = (zero − reconstructed) / (zero − clean).

    Raises:
        TransferError: When no text has two content tokens.
    """
    language, layer = adapter.language, adapter.space.layer
    rendered = [r.cut(max_tokens)[0] for r in language.render_many(texts)]
    ids = [r.ids for r in rendered]
    targets = [r.content[1:][np.diff(r.content) == 1] for r in rendered]
    n = sum(map(len, targets))
    if n == 0:
        raise TransferError("No text has two content tokens to measure cross-entropy on.")

    def replaced(change: Callable[[Tensor], Tensor]) -> float:
        def edit(rows: np.ndarray, hidden: Tensor) -> Tensor:
            at_row = np.concatenate([np.full(len(rendered[i].content), j) for j, i in enumerate(rows)])
            where = (torch.from_numpy(at_row), torch.from_numpy(np.concatenate([rendered[i].content for i in rows])))
            edited = hidden.clone()
            edited[where] = change(hidden[where].float()).to(hidden.dtype)
            return edited

        return float(language.nll(ids, targets, edit=(layer, edit)).sum()) / n

    clean = float(language.nll(ids, targets).sum()) / n
    made, zero = replaced(adapter.dictionary.reconstruct), replaced(torch.zeros_like)
    return {
        **adapter.reconstruction(texts, max_tokens=max_tokens),
        "ce_clean": clean,
        "ce_reconstructed": made,
        "ce_zero": zero,
        "ce_recovered": (zero - made) / (zero - clean),
    }

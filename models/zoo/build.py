"""Train the whole zoo: language models, SAEs, cards."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from models.zoo.card import BUNDLE, ZOO_FOLDER, write_card
from models.zoo.corpus import LICENCES, documents, training_mix
from models.zoo.recipe import ZOO, ZooModel
from transfer.core.console import progress, say
from transfer.core.errors import TransferError
from transfer.core.files import read_json, write_json

SAE_WIDTH = 2048
SAE_K = 16
SAE_SEEDS = {"llama": (0, 1)}
"""A second-seed SAE of one member is the ceiling that matches between families are compared with."""


def build_zoo(data: Path, out: Path | None, only: list[str], *, tokens: int, sae_tokens: int) -> dict[str, Any]:
    """Train every member that has no card yet; a killed run goes on where it stopped.

    Args:
        data: Folder of public data.
        out: Target folder; the zoo itself when None.
        only: Members to train; all when empty.
        tokens: Training tokens per language model.
        sae_tokens: Training tokens per SAE.

    Returns:
        Card per member.

    Raises:
        TransferError: For an unknown member or a missing data folder.
    """
    if unknown := set(only) - set(ZOO):
        raise TransferError(f"Unknown zoo member {', '.join(sorted(unknown))}.", f"Known: {', '.join(ZOO)}.")
    if not (data / "instruct").is_dir():
        raise TransferError(f"{data} does not hold the public training data.", "Give its folder with --data.")
    cards: dict[str, Any] = {}
    for name, spec in ZOO.items():
        if only and name not in only:
            continue
        folder = (out or ZOO_FOLDER) / name
        cards[name] = (
            read_json(folder / "card.json")
            if (folder / "card.json").exists()
            else build_member(spec, data, folder, tokens=tokens, sae_tokens=sae_tokens)
        )
    return cards


def build_member(spec: ZooModel, data: Path, folder: Path, *, tokens: int, sae_tokens: int) -> dict[str, Any]:
    """Train one member with its SAEs, and write its card."""
    from models.zoo.train import train_language_model

    facts_file = folder / "training.json"
    if not facts_file.exists():
        say(f"zoo {spec.name}  language model, {tokens:,} tokens")
        write_json(facts_file, train_language_model(spec, data, BUNDLE, folder, tokens=tokens))
    training = read_json(facts_file)
    seeds = SAE_SEEDS.get(spec.name, (0,))
    if not all((folder / _sae_name(seed) / "card.json").exists() for seed in seeds):
        activations = sae_activations(folder, spec.hook_layer, data, sae_tokens)
        for seed in seeds:
            build_sae(folder, spec, activations, seed)
    card = write_card(
        folder,
        data,
        {
            "family": spec.style,
            "hook_layer": spec.hook_layer,
            "training": training,
            "licence": "Apache-2.0 (weights); training data under the licences listed",
            "data": LICENCES,
            "sae": {"width": SAE_WIDTH, "k": SAE_K, "tokens": sae_tokens, "seeds": list(seeds)},
        },
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    facts_file.unlink()
    return card


def _sae_name(seed: int) -> str:
    return "sae" if seed == 0 else f"sae_seed{seed}"


def sae_activations(folder: Path, layer: int, data: Path, tokens: int) -> np.ndarray:
    """Residuals at content positions of training documents, each rendered as one user turn.

    Returns:
        float16 [tokens, d_model]; memory 2 · tokens · d_model bytes.
    """
    from models.language import LanguageModel

    language = LanguageModel.load(f"path:{folder}")
    mix = training_mix(list(documents(data, BUNDLE)), seed=1)
    found: list[np.ndarray] = []
    count = 0
    with progress(f"zoo {folder.name} activations", tokens, "tokens") as advance:
        for start in range(0, len(mix), 256):
            texts = [d.text()[:900].strip() for d in mix[start : start + 256]]
            rendered = [r.cut(512)[0] for r in language.render_many([text for text in texts if text])]
            rows = language.capture([r.ids for r in rendered], layer)
            parts = [residual[r.content].half().numpy() for r, residual in zip(rendered, rows, strict=True)]
            found += parts
            count += sum(map(len, parts))
            advance(sum(map(len, parts)))
            if count >= tokens:
                break
    return np.concatenate(found)[:tokens]


def build_sae(folder: Path, spec: ZooModel, activations: np.ndarray, seed: int) -> None:
    """Train one SAE through SAELens, and write the figures its load-time self-check compares with."""
    from models.adapter import Adapter
    from models.train_sae import train_sae
    from models.zoo.card import bundled_texts

    out = folder / _sae_name(seed)
    say(f"zoo {spec.name}  SAE seed {seed}, {len(activations):,} tokens")
    trained = train_sae(
        activations,
        d_in=activations.shape[1],
        width=SAE_WIDTH,
        k=SAE_K,
        tokens=len(activations),
        lr=1e-3,
        batch=1024,
        seed=seed,
        out=out,
        metadata={
            "layer": spec.hook_layer,
            "model_name": f"zoo:{spec.name}",
            "hook_name": f"blocks.{spec.hook_layer - 1}.hook_resid_post",
        },
    )
    texts = random.Random(0).sample(bundled_texts(), 64)
    found = Adapter.load(f"path:{folder}", f"path:{out}").reconstruction(texts)
    check = {"nmse": found["nmse"], "l0": found["l0"], "texts": texts}
    write_json(out / "card.json", {"sae": {"check": check, "seed": seed, "training": trained}})

"""Measure a zoo member and keep the numbers on its card; ``transfer zoo eval`` measures them again."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from models.adapter import Adapter
from models.language import LanguageModel
from models.train_sae import sae_quality
from models.zoo.corpus import documents
from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.files import file_hash, read_json

ZOO_FOLDER = Path(__file__).resolve().parent
BUNDLE = ZOO_FOLDER.parents[1] / "transfer" / "data" / "requests.jsonl"
HELD_OUT_TEXTS = 400
TEXT_BYTES = 1000
"""Held-out texts are cut here, so that every tokenizer sees the same bytes and none passes the context."""
TOLERANCE = 0.01
"""Relative difference up to which a recomputed number agrees with its card (bfloat16 kernels differ by machine)."""


def bundled_texts() -> list[str]:
    """The bundled evaluation split, which no zoo model was trained on."""
    rows = [json.loads(line) for line in BUNDLE.read_text("utf8").split("\n") if line]
    return [r["text"] for r in rows if r["split"] == "evaluation"]


def held_out_texts(data: Path) -> dict[str, list[str]]:
    """A fixed sample of the public documents kept out of training, by source."""
    if not Path(data).is_dir():
        raise TransferError(f"There is no data folder {data}.", "Give --data, or leave it out for the bundled numbers.")
    found: dict[str, list[str]] = {}
    for document in documents(Path(data), BUNDLE):
        if document.held_out:
            text = document.text().encode()[:TEXT_BYTES].decode("utf8", "ignore").strip()
            if text:
                found.setdefault(document.source, []).append(text)
    each = HELD_OUT_TEXTS // len(found)
    return {source: random.Random(0).sample(texts, min(each, len(texts))) for source, texts in sorted(found.items())}


def bits_per_byte(language: LanguageModel, texts: list[str]) -> float:
    """Bits a model needs per UTF-8 byte of plain texts; comparable across tokenizers."""
    nats, n_bytes = language.log_likelihood(texts)
    return nats / math.log(2) / n_bytes


def measure(folder: Path, data: Path | None) -> dict[str, Any]:
    """All recomputable numbers of one member.

    Args:
        folder: The member's folder, with one subfolder per SAE (``sae``, ``sae_seed1`` …).
        data: Public data; without it only the bundled numbers are measured.

    Returns:
        ``bits_per_byte`` by text set, and per SAE its quality by text set.
    """
    language = LanguageModel.load(f"path:{folder}")
    sets = {"bundled_evaluation": bundled_texts()}
    by_source: dict[str, float] = {}
    if data is not None:
        sources = held_out_texts(data)
        sets["public_held_out"] = [t for texts in sources.values() for t in texts]
        by_source = {source: bits_per_byte(language, texts) for source, texts in sources.items()}
    numbers: dict[str, Any] = {"bits_per_byte": {n: bits_per_byte(language, t) for n, t in sets.items()}, "sae": {}}
    if by_source:
        numbers["bits_per_byte_by_source"] = by_source
    for sae in sorted(p.name for p in folder.glob("sae*") if p.is_dir()):
        adapter = Adapter.load(f"path:{folder}", f"path:{folder / sae}")
        numbers["sae"][sae] = {name: sae_quality(adapter, texts) for name, texts in sets.items()}
    return numbers


def _flat(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: float(value)} if isinstance(value, (int, float)) else {}


def check_cards(data: Path | None, only: list[str]) -> list[dict[str, Any]]:
    """Measure every member again and compare with its card.

    Returns:
        One row a number of the card: model, number, card, now, agrees. ``now`` and ``agrees`` are None for a number on
        public texts when there is no ``data``. The summary is checked too, against the card's own measurements, and
        the parameters against the weights.

    Raises:
        TransferError: For an unknown member or a missing card.
    """
    members = sorted(p.parent for p in ZOO_FOLDER.glob("*/card.json"))
    unknown = set(only) - {m.name for m in members}
    if unknown or not members:
        known = ", ".join(m.name for m in members) or "none trained yet"
        raise TransferError(f"No card for {', '.join(sorted(unknown)) or 'any member'} (known: {known}).")
    rows = []
    chosen = [m for m in members if not only or m.name in only]
    with progress("zoo eval", len(chosen), "models") as advance:
        for folder in chosen:
            card = read_json(folder / "card.json")
            rows += _compared(folder.name, _flat(card["measured"]), _flat(measure(folder, data)))
            summary = {**summarised(card["measured"]), **_counted(folder, card)}
            rows += _compared(folder.name, _flat(card["summary"], "summary"), _flat(summary, "summary"))
            advance(1)
    return rows


def _compared(model: str, card: dict[str, float], now: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for number in sorted(card.keys() | now.keys()):
        old, new = card.get(number), now.get(number)
        agrees = None
        if new is not None:
            agrees = old is not None and abs(new - old) <= TOLERANCE * max(abs(old), 0.01)
        rows.append({"model": model, "number": number, "card": old, "now": new, "agrees": agrees})
    return rows


def _counted(folder: Path, card: dict[str, Any]) -> dict[str, float]:
    language = LanguageModel.load(f"path:{folder}")
    parameters = sum(p.numel() for p in language.model.parameters())
    return {"parameters": parameters, "tokens_seen": card["training"]["tokens_seen"]}


def summarised(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers that reports and the README show: those on public texts kept out of training."""
    return {
        "bits_per_byte": measured["bits_per_byte"]["public_held_out"],
        **{
            f"{sae}_{key}": sets["public_held_out"][key]
            for sae, sets in measured["sae"].items()
            for key in ("nmse", "l0", "dead", "ce_recovered")
        },
    }


def write_card(folder: Path, data: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure and write ``card.json``.

    Args:
        folder: The member's folder.
        data: Public data.
        facts: What measuring cannot know: training figures, data and licences.
    """
    from transfer.core.files import write_json

    measured = measure(folder, data)
    card = {
        "name": folder.name,
        **facts,
        "texts": {"bundled": file_hash(BUNDLE), "held_out_bytes": TEXT_BYTES, "held_out_texts": HELD_OUT_TEXTS},
        "measured": measured,
        "summary": {
            "parameters": facts["training"]["parameters"],
            "tokens_seen": facts["training"]["tokens_seen"],
            **summarised(measured),
        },
    }
    write_json(folder / "card.json", card)
    return card

"""What was written, with where each text comes from: JSON lines, parquet, and a card that a Hugging Face reader knows.

The folder is a Hugging Face dataset as it stands: ``datasets.load_dataset(folder)`` reads the kept texts,
``load_dataset(folder, "candidates")`` every candidate with its verdict.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transfer.core.errors import TransferError
from transfer.core.files import plain, replacing
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.synth.safety import shown

WARNING = (
    "This dataset holds texts written to contain what the label names as harmful. Keep them out of general training "
    "mixtures, and do not show them to people who did not agree to read them."
)
EXAMPLES = 3
"""Kept texts that the card of a harmless dataset shows."""
_FROM, _UPTO = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M"), (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the candidates do not know."""

    title: str
    licence: str
    """An identifier that the Hub knows, such as ``apache-2.0`` or ``cc-by-4.0``; ``other`` with ``licence_note``."""
    licence_note: str = ""
    """Which licences of model outputs and source texts led to it."""
    sources: tuple[str, ...] = ()
    """Where the anchor and seed texts come from."""
    command: str = ""
    """The command that wrote it."""
    language: str = "en"
    harmful: bool = False
    """Adds the warning and the tag for it, and prints no text."""

    def __post_init__(self) -> None:
        if not self.title.strip() or not self.licence.strip():
            raise TransferError("A dataset card needs a title and a licence.", "Name the licence, such as apache-2.0.")
        if self.licence == "other" and not self.licence_note:
            raise TransferError("The licence 'other' says nothing.", "Add a note that names the terms.")


def rows(run: SynthesisRun) -> Iterator[dict[str, Any]]:
    """Every candidate as one flat row; what varies in shape (``target_scores``, ``record``) is JSON text."""
    for c in run.candidates:
        row = dataclasses.asdict(c)
        for name in ("target_scores", "record"):
            row[name] = json.dumps(plain(row[name]), ensure_ascii=False, sort_keys=True)
        yield row


def write_jsonl(candidates: Iterable[Candidate], path: Path) -> None:
    """Candidates with their lineage, one JSON object a line, atomically."""
    with replacing(Path(path)) as part, part.open("w", encoding="utf8") as lines:
        for c in candidates:
            lines.write(json.dumps(plain(dataclasses.asdict(c)), ensure_ascii=False, sort_keys=True) + "\n")


def write_parquet(run: SynthesisRun, path: Path, *, kept: bool = False) -> int:
    """Candidates as parquet, atomically; returns their number.

    Args:
        run: The synthesis.
        path: The file.
        kept: Only the kept ones.
    """
    import pyarrow
    import pyarrow.parquet

    chosen = [row for row in rows(run) if not kept or row["verdict"] == "kept"]
    kinds = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema([(f.name, kinds.get(str(f.type), pyarrow.string())) for f in dataclasses.fields(Candidate)])
    with replacing(Path(path)) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chosen, schema=schema), part)
    return len(chosen)


def write_dataset(run: SynthesisRun, folder: Path, facts: CardFacts) -> dict[str, Any]:
    """A folder that can be uploaded or loaded as it is; the card is written last.

    Args:
        run: The synthesis; at least one text must have been kept.
        folder: ``candidates.jsonl``, ``data/kept.parquet``, ``data/candidates.parquet`` and ``README.md`` go here.
        facts: For the card.

    Returns:
        The counts on the card.

    Raises:
        TransferError: When nothing was kept.
    """
    if not run.kept:
        raise TransferError(
            f"None of the {len(run.candidates)} candidates was kept, so there is no dataset to write.",
            "Look at the reasons of rejection first.",
        )
    folder = Path(folder)
    write_jsonl(run.candidates, folder / "candidates.jsonl")
    write_parquet(run, folder / "data" / "kept.parquet", kept=True)
    write_parquet(run, folder / "data" / "candidates.parquet")
    counts = card_counts(run)
    with replacing(folder / "README.md") as part:
        part.write_text(card(run, facts), "utf8")
    return counts


def card_counts(run: SynthesisRun) -> dict[str, Any]:
    """The numbers that a card states."""
    return {
        "n_candidates": len(run.candidates),
        "n_kept": len(run.kept),
        "n_features_asked": run.n_requested,
        "n_features_reached": len({c.feature for c in run.kept}),
        "labels": dict(sorted(Counter(c.label for c in run.kept).items())),
        "rejected": run.rejected(),
        "n_fallback": sum(c.fallback for c in run.kept),
        "n_opened": sum(c.opened for c in run.candidates),
        "n_kept_opened": sum(c.opened for c in run.kept),
        "generators": sorted({c.generator for c in run.candidates}),
        "seeds": len({c.seed for c in run.candidates}),
        "missing_hit_rate": run.n_hit / run.n_missing if run.n_missing else None,
    }


def card(run: SynthesisRun, facts: CardFacts) -> str:
    """The card as Markdown with the front matter that the Hub reads."""
    counts = card_counts(run)
    at = sum(counts["n_kept"] >= limit for limit in _UPTO)
    front: dict[str, Any] = {
        "pretty_name": facts.title,
        "license": facts.licence,
        "language": [facts.language],
        "size_categories": [_FROM[min(at, len(_FROM) - 1)]],
        "tags": ["synthetic", "sparse-autoencoder", *(["not-for-all-audiences"] if facts.harmful else [])],
        "configs": [
            {"config_name": "kept", "default": True, "data_files": "data/kept.parquet"},
            {"config_name": "candidates", "data_files": "data/candidates.parquet"},
        ],
    }
    if facts.licence == "other":
        front["license_name"] = "see-below"
    opening = (
        f" {counts['n_opened']} candidates were made to start with an opening: up to eight words of an anchor text "
        "that end where the feature fires there. Such a text can fire by the words it copies."
        if counts["n_opened"]
        else ""
    )
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", f"# {facts.title}", ""]
    if facts.harmful:
        lines += [f"> **Warning.** {WARNING}", ""]
    lines += [
        "Texts written by a model for features of a sparse autoencoder, each scored by that autoencoder. A text is "
        "kept when its feature fires above its threshold and neither the text nor what follows its opening is a "
        f"near-duplicate of a text seen before.{opening}",
        "",
        "| | |",
        "|---|---|",
        f"| Candidates | {counts['n_candidates']} |",
        f"| Kept | {counts['n_kept']} ({', '.join(f'{n} {name}' for name, n in counts['labels'].items())}) |",
        f"| Features asked for, reached | {counts['n_features_asked']}, {counts['n_features_reached']} |",
        f"| Missing features that a kept text fires | {_hit(run.n_hit, run.n_missing)} |",
        f"| The same, by texts without an opening; with one | {_hit(run.n_hit_free, run.n_missing)}; "
        f"{_hit(run.n_hit_opened, run.n_missing)} |",
        f"| Kept texts that start with words of an anchor text (opening) | {counts['n_kept_opened']} |",
        f"| Kept texts whose x+ in the prompt is an anchor text (fallback) | {counts['n_fallback']} |",
        f"| Rejected | {', '.join(f'{n} {why}' for why, n in counts['rejected'].items()) or 'none'} |",
        f"| Generators | {', '.join(f'`{g}`' for g in counts['generators'])} |",
        f"| Feature space | `{run.source}` |",
        f"| Seeds | one a prompt, {counts['seeds']} different ones, in the column `seed` |",
        f"| Source texts | {', '.join(facts.sources) or 'not stated'} |",
        f"| Licence | {facts.licence}{': ' + facts.licence_note if facts.licence_note else ''} |",
        *([f"| Command | `{facts.command}` |"] if facts.command else []),
        "",
        "Columns: the text and its `label`; `feature`, `score` and `delta` (activation and threshold); `step` (0 "
        "search, 1 exploration, 2 contrast), `round` and `attempt`; `strength`, `opening`, `positive`, `negative`, "
        "`fallback` (what the prompt was made of); `seed`, `prompt_hash` and `generator`; `verdict` and `detail`; "
        "`target_scores` and `record` as JSON.",
        "",
    ]
    if not facts.harmful:
        best = sorted(run.kept, key=lambda c: (-c.score, c.feature, c.text))[:EXAMPLES]
        lines += ["Strongest examples:", "", *(f"- {shown(c.text, fold=False)}" for c in best), ""]
    return "\n".join(lines)


def _hit(n: int | None, n_missing: int) -> str:
    if n is None:
        return "not counted"
    return f"{n} of {n_missing} missing features ({n / n_missing:.1%})" if n_missing else "nothing was missing"

"""The files of a run directory, read and checked before anything is drawn."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer.core.errors import TransferError
from transfer.core.files import read_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """What the rows of one list hold."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    """Columns that must be a number or null."""
    lists: tuple[str, ...] = ()
    """Columns that must be a list (null counts as empty)."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TEXT_METRICS = _words(
    "distinct_1 distinct_2 ead_1 rarefied_1 rarefied_2 entropy_1 entropy_2 self_bleu pos_distinct_2 cosine_distance "
    "semantic_entropy vendi"
)
"""In the order shown."""
DIVERSITY = tuple(f"{metric}{end}" for metric in TEXT_METRICS for end in ("", "_low", "_high"))
RESULTS: dict[str, Columns] = {
    "alignments": Columns(
        _words("source target method n_matches heldout_corr_median null_corr_median q_value_max"),
        _words("n_features converged row_error col_error heldout_r2 n_untestable n_significant"),
        _words(
            "n_matches heldout_corr_median null_corr_median q_value_max row_error col_error heldout_r2 "
            "n_untestable n_significant"
        ),
        ("n_features",),
    ),
    "coverage": Columns(
        _words("model dataset fac n_anchor n_covered n_missing"),
        _words("fac_uncapped ci_low ci_high n_relevant n_docs delta_rule kl arm writer missing_hit_rate"),
        _words("fac n_anchor n_covered n_missing fac_uncapped ci_low ci_high n_relevant n_docs kl missing_hit_rate"),
    ),
    "synthesis": Columns(
        _words("source generator n_requested n_kept missing_hit_rate rejected"),
        _words("pool n_candidates n_hit n_missing"),
        _words("n_requested n_kept missing_hit_rate n_candidates n_hit n_missing"),
    ),
    "transfer": Columns(
        _words("source target task arm metric mean ci_low ci_high n_seeds"),
        _words("generator recipe values seeds n_train control delta delta_low delta_high"),
        _words("mean ci_low ci_high n_seeds n_train delta delta_low delta_high"),
        ("values", "seeds"),
    ),
    "comparisons": Columns(
        _words("target arm control delta low high"),
        _words(
            "source generator recipe metric control_source p p_holm n_seeds n_train n_train_control mde seeds_needed "
            "boot_low boot_high verdict p_grid"
        ),
        _words("delta low high p p_holm p_grid n_seeds n_train n_train_control mde seeds_needed boot_low boot_high"),
    ),
    "families": Columns(
        _words("model universal shared private n_testable"),
        _words(
            "space universal_low universal_high shared_low shared_high private_low private_high n_untestable "
            "n_undecided"
        ),
        _words(
            "universal shared private n_testable universal_low universal_high shared_low shared_high private_low "
            "private_high n_untestable n_undecided"
        ),
    ),
    "family_counts": Columns(
        _words("n_universal n_broken n_chains n_chains_closed"),
        _words("method q_value n_spaces n_pairs_only consistency refused"),
        _words("n_universal n_broken n_chains n_chains_closed q_value n_spaces n_pairs_only consistency"),
    ),
    "compositions": Columns(
        _words("source through target n_claims n_agree n_contradicted share expected p_value"),
        _words("share_low share_high overlap overlap_low overlap_high overlap_expected n_silent lost"),
        _words(
            "n_claims n_agree n_contradicted share expected p_value share_low share_high overlap overlap_low "
            "overlap_high overlap_expected n_silent lost"
        ),
    ),
    "context": Columns(
        _words("source target measure value null_mean p_value score n_rows"),
        _words("null_high n_null n_matches"),
        _words("value null_mean p_value score n_rows null_high n_null n_matches"),
    ),
    "diversity": Columns(
        _words("target arm n"),
        (*_words("writer generator name n_texts n_distinct n_words n_cuts embedding tagger reasons"), *DIVERSITY),
        (*_words("n n_texts n_distinct n_words n_cuts"), *DIVERSITY),
    ),
    "diversity_correlations": Columns(
        _words("recipe metric predictor statistic within verdict"),
        _words("pooled pooled_low pooled_high within_low within_high p p_holm n_points n_groups least_to_find"),
        _words("pooled pooled_low pooled_high within within_low within_high p p_holm n_points n_groups least_to_find"),
    ),
    "bounds": Columns(
        _words("target arm writer kl tv"),
        _words(
            "surrogate_tv pinsker bretagnolle_huber tv_from tv_loss n entropy_words entropy_words_low "
            "entropy_words_high entropy_model entropy_model_low entropy_model_high entropy_texts n_model information "
            "information_from gap gap_low gap_high gap_absolute transfer vacuous"
        ),
        _words(
            "kl tv surrogate_tv pinsker bretagnolle_huber tv_loss n entropy_words entropy_words_low entropy_words_high "
            "entropy_model entropy_model_low entropy_model_high entropy_texts n_model information gap gap_low gap_high "
            "gap_absolute transfer"
        ),
        ("vacuous",),
    ),
    "bound_notes": Columns(
        _words("quantity assumes said"), _words("least largest limit n n_vacuous"), _words("least largest limit n")
    ),
    "efficiency": Columns(
        _words("target arm recipe metric score des pes"),
        _words("generator n_written n_trainable des_low des_high pes_low pes_high"),
        _words("score des pes n_written n_trainable des_low des_high pes_low pes_high"),
    ),
    "room": Columns(_words("model n_anchor n_missing least informative"), (), _words("n_anchor n_missing least")),
    "failed_cells": Columns(_words("cell problem")),
    "transfer_efficiency": Columns(
        _words("target source generator recipe gain_mapped gain_own efficiency low high"),
        _words("n_seeds said"),
        _words("gain_mapped gain_own efficiency low high n_seeds"),
    ),
    "quality_correlations": Columns(
        _words("recipe predictor statistic within verdict"),
        _words("pooled pooled_low pooled_high within_low within_high p p_holm n_points n_groups least_to_find"),
        _words("pooled pooled_low pooled_high within within_low within_high p p_holm n_points n_groups least_to_find"),
    ),
    "dose": Columns(
        _words("recipe target metric n_seed mean low high fac n_missing"),
        ("n_seeds",),
        _words("n_seed mean low high fac n_missing n_seeds"),
    ),
    "claims": Columns(("sentence",), _words("verdict number low high control anchor"), _words("number low high")),
    "alerts": Columns(_words("level text")),
}
DETAILS: dict[str, Columns] = {
    "examples": Columns(
        _words("source target source_feature target_feature"),
        _words("score heldout_corr q_value source_description target_description label source_spans target_spans"),
        _words("score heldout_corr q_value"),
        _words("source_spans target_spans"),
    ),
    "families": Columns(("members",), ("heldout_corr_least",), ("heldout_corr_least",), ("members",)),
    "samples": Columns(
        _words("source generator feature text"),
        _words("label score delta step strength positive verdict fold"),
        _words("score delta strength"),
    ),
    "missing": Columns(_words("model feature"), _words("label description n_anchor_docs"), ("n_anchor_docs",)),
    "cards": Columns(("name",)),
}
MEMBER = Columns(_words("model feature"), _words("description label spans"), lists=("spans",))
"""One model's feature of a family."""
SPAN = Columns(("text",), _words("start end value label fold"), _words("start end value"))
_UNWRITABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]")
FILES = ("results.json", "details.json", "manifest.json", "experiment.yaml")


MAIN = ("alignments", "coverage", "synthesis", "transfer")
"""Lists that every finished run has; they may be empty."""


@dataclass(frozen=True)
class Run:
    """Everything a report may show."""

    results: dict[str, list[Row]]
    limits: list[str]
    details: dict[str, list[Row]]
    manifest: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    files: tuple[str, ...]
    """Files of the run directory that exist and may be linked."""
    absent: tuple[str, ...] = field(default=())
    """Files that were expected and are not there; the report says so."""


def clean(value: Any) -> Any:
    """Strings that any HTML or XML reader accepts, and null for numbers that are not finite.

    Lone surrogates cannot be written as UTF-8 and raw control characters are not allowed in markup; both are replaced
    by a visible sign instead of being dropped.
    """
    if isinstance(value, dict):
        return {str(clean(str(k))): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _UNWRITABLE.sub(_visible, value)
    return value


def _visible(found: re.Match[str]) -> str:
    char = found.group()
    if char == "\r":
        return "\n"
    return chr(0x2400 + ord(char)) if ord(char) < 0x20 else "\ufffd"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _row(row: Any, columns: Columns, place: str) -> Row:
    if not isinstance(row, dict):
        raise TransferError(f"{place} is not an object.", "Run `transfer run` again to rewrite it.")
    absent = [name for name in columns.required if name not in row]
    if absent:
        raise TransferError(f"{place} lacks {', '.join(absent)}.", "Run `transfer run` again to rewrite it.")
    full = {**dict.fromkeys(columns.required + columns.optional), **row}
    for name in columns.numbers:
        if not _is_number(full[name]):
            raise TransferError(f"{place}.{name} is {full[name]!r}, not a number.", "Repair the file or run again.")
    for name in columns.lists:
        full[name] = [] if full[name] is None else full[name]
        if not isinstance(full[name], list):
            raise TransferError(f"{place}.{name} is not a list.", "Repair the file or run again.")
    return full


def _rows(data: dict[str, Any], name: str, columns: Columns, file: str) -> list[Row]:
    rows = data.get(name) or []
    if not isinstance(rows, list):
        raise TransferError(f"{file}: {name} is not a list.", "Repair the file or run again.")
    return [_row(row, columns, f"{file}: {name}[{i}]") for i, row in enumerate(rows)]


def _object(path: Path) -> dict[str, Any]:
    data = clean(read_json(path))
    if not isinstance(data, dict):
        raise TransferError(f"{path} does not hold an object.", "Repair the file or run again.")
    return data


def check_results(data: dict[str, Any]) -> dict[str, list[Row]]:
    """The lists of ``results.json`` with every known column present (null where it was not recorded).

    Raises:
        TransferError: Naming the row and column that is absent or is not a number.
    """
    results = {name: _rows(data, name, columns, "results.json") for name, columns in RESULTS.items()}
    for i, row in enumerate(results["synthesis"]):
        rejected = row["rejected"] or {}
        if not isinstance(rejected, dict) or not all(map(_is_number, rejected.values())):
            raise TransferError(f"results.json: synthesis[{i}].rejected is not a count by reason.", "Run again.")
        row["rejected"] = rejected
    for i, row in enumerate(results["transfer"]):
        if not all(map(_is_number, row["values"])):
            raise TransferError(f"results.json: transfer[{i}].values holds something that is no number.", "Run again.")
    return results


def _read_yaml(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    text = clean(path.read_text("utf8", errors="replace"))
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        raise TransferError(f"{path} is not valid YAML.", "Copy it from the run again.") from None
    return text, config if isinstance(config, dict) else {}


def load_run(run_dir: Path) -> Run:
    """Read a run directory.

    ``results.json`` is required. The other files may be absent (a copied run, say); what they would have shown is then
    listed in ``absent``.

    Raises:
        TransferError: When ``results.json`` is missing, or a file is broken or lacks a column.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "results.json").is_file():
        raise TransferError(
            f"No results.json in {run_dir}.",
            "Pass the directory of a finished run, or finish it with the same `transfer run` command.",
        )
    data = _object(run_dir / "results.json")
    if absent := [name for name in MAIN if name not in data]:
        raise TransferError(
            f"{run_dir / 'results.json'} lacks {', '.join(absent)}.", "Run `transfer run` again to rewrite it."
        )
    results = check_results(data)
    limits = data.get("limits") or []
    if not isinstance(limits, list):
        raise TransferError("results.json: limits is not a list.", "Repair the file or run again.")
    there = {name: (run_dir / name).is_file() for name in FILES}
    more = _object(run_dir / "details.json") if there["details.json"] else {}
    details = {name: _rows(more, name, columns, "details.json") for name, columns in DETAILS.items()}
    for i, example in enumerate(details["examples"]):
        for side in ("source_spans", "target_spans"):
            place = f"details.json: examples[{i}].{side}"
            example[side] = [_row(span, SPAN, f"{place}[{j}]") for j, span in enumerate(example[side])]
    for i, family in enumerate(details["families"]):
        place = f"details.json: families[{i}].members"
        family["members"] = [_row(member, MEMBER, f"{place}[{j}]") for j, member in enumerate(family["members"])]
        for j, member in enumerate(family["members"]):
            member["spans"] = [_row(s, SPAN, f"{place}[{j}].spans[{k}]") for k, s in enumerate(member["spans"])]
    manifest = _object(run_dir / "manifest.json") if there["manifest.json"] else {}
    config_text, config = _read_yaml(run_dir / "experiment.yaml") if there["experiment.yaml"] else ("", {})
    return Run(
        results=results,
        limits=[str(limit) for limit in limits],
        details=details,
        manifest=manifest,
        config_text=config_text,
        config=config,
        files=tuple(name for name in FILES if there[name]),
        absent=tuple(name for name in FILES if not there[name]),
    )

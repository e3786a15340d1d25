"""``transfer diversity``: text metrics of any files, or what a run's FAC and text metrics say about its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from transfer.core.console import say, set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet, TextColumn


def diversity(
    files: Annotated[
        list[str] | None, typer.Argument(help="JSONL, CSV or parquet paths, bundled:… or hub:<id>@<rev>.")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of a finished run, instead of files; repeatable.")
    ] = None,
    text_column: TextColumn = None,
    encoder: Annotated[
        str, typer.Option(help="auto, words, a model such as zoo:llama, or a sentence-transformers name.")
    ] = "auto",
    size: Annotated[int | None, typer.Option(help="Texts each number is for; default: the smallest file.")] = None,
    metric: Annotated[str | None, typer.Option(help="With --run: the score; default: the run's first.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Text-diversity metrics of files, at equal size; with --run, how they and FAC go with the scores (Table 8)."""
    set_quiet(quiet or as_json)
    if bool(files) == bool(run):
        raise TransferError("Name files or runs, one of the two.", "Try `transfer diversity bundled:requests`.")
    if run:
        rows = _of_runs(run, metric, seed)
        show({"diversity_correlations": rows} if as_json else _table(rows))
        return
    rows = _of_files(files or [], text_column, encoder, size, seed)
    show({"diversity": rows} if as_json else "\n\n".join(map(_block, rows)))


def _of_runs(folders: Sequence[Path], metric: str | None, seed: int) -> list[dict[str, Any]]:
    from transfer.core.files import read_json
    from transfer.grid.correlations import table

    results: dict[str, Any] = {}
    for folder in folders:
        if str(folder) in results:
            raise TransferError(f"The run {folder} is named twice.", "Name each run once.")
        results[str(folder)] = read_json(folder / "results.json")
    rows = table(results, metric, seed)
    if not rows:
        raise TransferError(
            f"No cell of {', '.join(results)} has coverage, diversity and a score.",
            "Run `transfer run` with this version, which writes all three.",
        )
    return rows


def _of_files(refs: Sequence[str], column: str | None, encoder: str, size: int | None, seed: int) -> list[dict]:
    from transfer.core.files import plain
    from transfer.corpus import load_corpus
    from transfer.diversity import MOST_TEXTS, compare
    from transfer.text.embeddings import get_embedder
    from transfer.text.tagging import find_tagger

    sets: dict[str, list[str]] = {}
    for ref in refs:
        if ref in sets:
            raise TransferError(f"{ref} is named twice.", "Name each file once.")
        sets[ref] = [t.text for t in load_corpus(ref, **({"text_column": column} if column else {}))]
    pool = list(dict.fromkeys(t for texts in sets.values() for t in texts))
    if len(pool) > 4 * MOST_TEXTS:
        import numpy as np

        say(f"embeddings are fitted on {4 * MOST_TEXTS} of {len(pool)} texts")
        pool = [pool[i] for i in np.sort(np.random.default_rng([seed, 4]).permutation(len(pool))[: 4 * MOST_TEXTS])]
    embedder = get_embedder(encoder, pool, seed=seed)
    found = compare(sets, embedder=embedder, tagger=find_tagger(), reference=pool, size=size, seed=seed)
    return [plain(d.summary()) for d in found.values()]


def _block(row: Mapping[str, Any]) -> str:
    """One file's metrics, a line each."""
    from transfer.diversity import METRICS

    cut = f", mean of {row['n_cuts']} random cuts" if row["n_cuts"] > 1 else ""
    lines = [
        f"{row['name']}: {row['n']} of {row['n_texts']} texts{cut}; {row['n_distinct']} different, "
        f"{row['n_wordless']} without a word, {row['n_words']:.0f} words; embeddings: {row['embedding']}"
    ]
    for metric, what in METRICS.items():
        less = "" if what.more_is_diverse else "; lower is more diverse"
        said = row["reasons"].get(metric) or _number(row, metric)
        lines.append(f"  {metric:<17} {said}   ({what.label}{less})")
    return "\n".join(lines)


def _number(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table 8 as lines: within the targets, and over all cells."""
    first = rows[0]
    lines = [
        f"{first['metric'].upper()} against FAC and text metrics, within targets [95 % interval] (over all cells): "
        f"{first['n_points']} cells, {first['n_groups']} targets; least |r| to find {first['least_to_find']:.2f}"
    ]
    for row in rows:
        head = f"  {row['recipe']:<11} {row['statistic']:<9} {row['predictor']:<17} "
        if row["within"] is None:
            lines.append(head + row["verdict"])
        else:
            within, pooled = _number(row, "within"), _number(row, "pooled")
            lines.append(f"{head}{within}  ({pooled})  p {row['p']:.3f}, Holm {row['p_holm']:.3f}  {row['verdict']}")
    return "\n".join(lines)

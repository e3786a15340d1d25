"""What the alignments of several models say together, as rows: families, shares, compositions, context."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligners.associativity import associativity
from aligners.families import families, shares
from aligners.global_similarity import FEWEST, global_similarity
from transfer.core.alignment import Alignment
from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.files import plain
from transfer.core.space import FeatureSpace, FeatureView
from transfer.core.stats import Interval

Rows = list[dict[str, Any]]
MOST_ROWS = 1024
"""Matches that a pair's context is computed from, drawn by seed where there are more."""


def numbers(alignments: Iterable[Alignment], q_max: float, *, seed: int = 0) -> dict[str, Rows]:
    """``families``, ``family_counts`` and ``compositions`` of ``results.json``.

    ``families`` holds the shares of each space, ``family_counts`` one row of totals, ``compositions`` every three
    spaces that have all their pairs, with each of them as the one in the middle. Alignments of a space with itself, and
    second ones of the same two spaces, are left out; without any other, all lists are empty. Where the shares cannot be
    taken, ``families`` is empty and ``family_counts`` says why (``refused``).

    Args:
        alignments: One method's, scored, one each two spaces.
        q_max: Matches above this q-value do not count.
        seed: Of the shuffles behind the compositions.
    """
    pairs: dict[frozenset[str], Alignment] = {}
    for alignment in alignments:
        if alignment.source.id != alignment.target.id:
            pairs.setdefault(_ends(alignment), alignment)
    if not pairs:
        return {"families": [], "family_counts": [], "compositions": []}
    spaces = {space.id: space for a in pairs.values() for space in (a.source, a.target)}
    chosen = list(pairs.values())
    rows: Rows = []
    refused = ""
    try:
        rows = _share_rows(chosen, spaces, q_max)
    except TransferError as error:  # the rest still holds
        refused = str(error)
    counts = {**_counts(chosen, q_max), "refused": refused}
    compositions = _compositions(pairs, spaces, q_max, seed)
    return plain({"families": rows, "family_counts": [counts], "compositions": compositions})


def _counts(alignments: list[Alignment], q_max: float) -> dict[str, Any]:
    found = families(alignments, q_max)
    return {
        "method": ", ".join(sorted({a.method for a in alignments})),
        "q_value": q_max,
        "n_spaces": len(found.spaces),
        "n_universal": len(found.universal),
        "n_pairs_only": found.pairs_only,
        "n_broken": found.broken,
        "n_chains": found.chains,
        "n_chains_closed": found.chains_closed,
        "consistency": found.consistency,
    }


def _share_rows(alignments: list[Alignment], spaces: dict[str, FeatureSpace], q_max: float) -> Rows:
    by_space = {share.space: share for share in shares(alignments, q_max)}
    rows: Rows = []
    for space in spaces.values():
        share = by_space[space.id]
        parts = {k: v for part in ("universal", "shared", "private") for k, v in _with_ends(share, part).items()}
        sizes = {name: getattr(share, name) for name in ("n_testable", "n_untestable", "n_undecided")}
        rows.append({"model": space.model, "space": space.id, **parts, **sizes})
    return rows


def _compositions(
    pairs: dict[frozenset[str], Alignment], spaces: dict[str, FeatureSpace], q_max: float, seed: int
) -> Rows:
    names = _names(spaces.values())
    rows: Rows = []
    for triple in itertools.combinations(spaces, 3):
        for through in triple:
            source, target = (space for space in triple if space != through)
            if any(frozenset(two) not in pairs for two in itertools.combinations(triple, 2)):
                continue
            ab, bc, ac = (pairs[frozenset(two)] for two in ((source, through), (through, target), (source, target)))
            found = associativity(ab, bc, ac, q_max, seed=seed)
            rows.append(
                {
                    "source": names[source],
                    "through": names[through],
                    "target": names[target],
                    **{n: getattr(found, n) for n in ("n_claims", "n_agree", "n_contradicted", "n_silent")},
                    **_with_ends(found, "share"),
                    "expected": found.expected,
                    "p_value": found.p_value,
                    **_with_ends(found, "overlap"),
                    "overlap_expected": found.overlap_expected,
                    "lost": found.lost,
                }
            )
    return rows


def _ends(alignment: Alignment) -> frozenset[str]:
    return frozenset((alignment.source.id, alignment.target.id))


def _names(spaces: Iterable[FeatureSpace]) -> dict[str, str]:
    """Space id → its model, or the id itself where two spaces are of one model."""
    spaces = list(spaces)
    often = Counter(space.model for space in spaces)
    return {space.id: space.model if often[space.model] == 1 else space.id for space in spaces}


def _with_ends(found: Any, name: str) -> dict[str, float]:
    interval: Interval = getattr(found, name)
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def ranked(alignments: Sequence[Alignment], q_max: float) -> list[tuple[float, dict[str, int]]]:
    """Universal families, best first: by the smallest held-out correlation among their matches, then by feature ids.

    Args:
        alignments: As for ``aligners.families.families``, scored.
        q_max: Matches above this q-value do not count.

    Returns:
        (smallest held-out correlation, space id → feature id) of each.
    """
    corr: dict[frozenset[tuple[str, int]], float] = {}
    for alignment in alignments:
        columns = (alignment.matches[c].tolist() for c in ("source", "target", "heldout_corr"))
        for i, j, value in zip(*columns, strict=True):
            corr[frozenset(((alignment.source.id, i), (alignment.target.id, j)))] = value
    found = []
    for family in families(alignments, q_max).universal:
        edges = [corr[frozenset(two)] for two in itertools.combinations(family.items(), 2)]
        found.append((float(min(edges)), family))
    return sorted(found, key=lambda f: (-f[0], sorted(f[1].items())))


def context(alignment: Alignment, source: FeatureView, target: FeatureView, *, seed: int = 0) -> Rows:
    """How alike the decoder rows of the matches are as a whole: rows of ``context.json``, one a measure.

    Context and no evidence: rows that were matched by geometry beat the null by construction. At most ``MOST_ROWS``
    matches are compared. Time: products of rows × d_src × d_tgt, a hundred times.

    Args:
        alignment: The accepted matches.
        source: View of its source.
        target: View of its target.
        seed: Of the draw and the shuffles.

    Returns:
        Nothing for fewer than ten matches with a direction on both sides, or rows that are all the same.
    """
    usable = np.flatnonzero(_directed(alignment, "source", source) & _directed(alignment, "target", target))
    pair = f"{alignment.source.model} {alignment.target.model}"
    if len(usable) < FEWEST:
        say(f"align {pair}  {len(usable)} accepted matches are too few to compare the decoders as a whole")
        return []
    some = np.sort(np.random.default_rng(seed).permutation(usable)[:MOST_ROWS])
    rows = (view.directions[alignment.matches[side][some]] for side, view in (("source", source), ("target", target)))
    try:
        found = global_similarity(*rows, max_rows=MOST_ROWS, seed=seed)
    except TransferError as error:
        say(f"align {pair}  the decoders were not compared as a whole: {error}")
        return []
    return [
        {
            "source": alignment.source.model,
            "target": alignment.target.model,
            "measure": measure,
            "n_matches": len(alignment),
            **dataclasses.asdict(one),
        }
        for measure, one in found.items()
    ]


def _directed(alignment: Alignment, side: str, view: FeatureView) -> np.ndarray:
    """Whether each match's feature has a direction at all, bool [matches]; copies no row."""
    squared = np.einsum("nd,nd->n", view.directions, view.directions)[alignment.matches[side]]
    return np.isfinite(squared) & (squared > 0)


def load(folders: Sequence[Path]) -> list[Alignment]:
    """Artefacts of ``transfer align fit`` that may be taken together.

    Raises:
        TransferError: For a missing or damaged artefact, one of a space with itself, two of the same spaces, fits on
            different documents or by different methods, scores on different texts, or a pair of spaces without an
            artefact.
    """
    pairs: dict[frozenset[str], tuple[Path, Alignment]] = {}
    documents: dict[tuple[Any, ...], Path] = {}
    kinds: list[tuple[Path, tuple[Any, ...]]] = []
    for folder in folders:
        alignment = Alignment.load(folder)
        if alignment.source.id == alignment.target.id:
            raise TransferError(f"{folder} aligns {alignment.source.id} with itself.", "Name artefacts of two spaces.")
        if before := pairs.get(_ends(alignment)):
            raise TransferError(
                f"{before[0]} and {folder} both align {' with '.join(sorted(_ends(alignment)))}.", "Name one of them."
            )
        fit = alignment.provenance.get("fit")
        if not fit:
            raise TransferError(
                f"{folder} does not say which documents it was fitted on.", "Fit it with `transfer align fit`."
            )
        documents.setdefault((fit["corpus_hash"], fit["fraction"], fit["seed"]), folder)
        if len(documents) > 1:
            raise TransferError(
                f"{folder} was fitted on other documents than {next(iter(documents.values()))}.",
                "Fit all pairs with the same --corpus, --split, --fit-fraction and --seed.",
            )
        scored = alignment.provenance.get("scored", {})
        kind = (alignment.method, alignment.params, fit.get("pool", "last"), scored.get("corpus_hash"))
        kinds.append((folder, kind))
        if kind != kinds[0][1]:
            raise TransferError(
                f"{folder} was fitted by another method, or scored on other texts, than {kinds[0][0]}.",
                "Fit all pairs alike, and score all of them on the same texts.",
            )
        pairs[_ends(alignment)] = (folder, alignment)
    spaces = sorted({space for ends in pairs for space in ends})
    if len(spaces) < 3:
        raise TransferError(
            "One artefact is one pair; families need three models or more.", "Name the artefacts of all their pairs."
        )
    for two in itertools.combinations(spaces, 2):
        if frozenset(two) not in pairs:
            raise TransferError(
                f"Families of {len(spaces)} spaces need an artefact of every pair; none is of {two[0]} with {two[1]}.",
                "Fit it with `transfer align fit`.",
            )
    return [alignment for _, alignment in pairs.values()]


def text(found: dict[str, Rows]) -> str:
    """The result of ``numbers`` to read."""
    counts = found["family_counts"][0]
    lines = [
        f"{counts['method']}, q ≤ {counts['q_value']:g}, {counts['n_spaces']} spaces",
        f"families     {counts['n_universal']} with a feature of every space · {counts['n_broken']} connected groups "
        f"of three spaces or more without one · {counts['n_pairs_only']} groups of two",
        f"consistency  {_number(counts['consistency'])}: {counts['n_chains_closed']} of {counts['n_chains']} chains "
        "a–b–c are matched a–c too",
        "",
    ]
    if counts["refused"]:
        lines.append(f"no shares: {counts['refused']}")
    else:
        parts = ("universal", "shared", "private")
        sizes = ("n_testable", "n_untestable", "n_undecided")
        names = _unique(found["families"])
        cells = [
            [name, *(_interval(row, p) for p in parts), *(str(row[n]) for n in sizes)]
            for name, row in zip(names, found["families"], strict=True)
        ]
        lines += _table(["model", *parts, "testable", "untestable", "undecided"], cells)
        lines.append("private includes matches that were missed")
    lines.append("")
    cells = [
        [
            f"{row['source']} to {row['target']}",
            row["through"],
            f"{row['n_agree']} of {row['n_claims']}",
            _interval(row, "share"),
            _number(row["expected"]),
            _number(row["p_value"]),
            _interval(row, "overlap"),
            _number(row["overlap_expected"]),
        ]
        for row in found["compositions"]
    ]
    heads = ["composition", "through", "agree", "share", "expected", "p", "overlap", "expected"]
    return "\n".join([*lines, *_table(heads, cells), "composed matches that agree may share an error"])


def _unique(rows: Rows) -> list[str]:
    often = Counter(row["model"] for row in rows)
    return [row["model"] if often[row["model"]] == 1 else row["space"] for row in rows]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return _number(row[name]) + ("" if low is None else f" [{_number(low)}, {_number(high)}]")


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]

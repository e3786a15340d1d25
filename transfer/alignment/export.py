"""An alignment as a table (CSV, parquet) or a graph (GraphML): matches, and the splits that the coupling adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from transfer.core.alignment import Alignment
from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.files import replacing

if TYPE_CHECKING:
    import pandas

LEAST_MASS = 0.1
"""Coupling below this is no split: entropic plans put a little mass everywhere."""
GRAPH_RATE = 10_000
"""Edges that networkx writes as GraphML in a second, measured."""


def split_edges(alignment: Alignment, least_mass: float = LEAST_MASS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, target and mass of the coupling's edges that are no match, by source and target.

    They make a one-to-one list many-to-many: a feature that is one here and two there has a match and a split.
    """
    edges = sp.coo_matrix(sp.csr_matrix(alignment.coupling))
    row, col, mass = edges.row.astype(np.int64), edges.col.astype(np.int64), edges.data.astype(np.float64)
    width = alignment.target.n_features
    matched = alignment.matches["source"] * width + alignment.matches["target"]
    keep = np.flatnonzero((mass >= least_mass) & ~np.isin(row * width + col, matched))
    keep = keep[np.lexsort((col[keep], row[keep]))]
    return row[keep], col[keep], mass[keep]


def table(
    alignment: Alignment, *, q_max: float | None = None, least_mass: float = LEAST_MASS
) -> tuple[pandas.DataFrame, dict[str, int]]:
    """One row a match or split, with both space ids in every row.

    Args:
        alignment: To list.
        q_max: Only matches with at most this q-value, and the splits that share a feature with one of them. A match
            without q-value (untestable, or never scored) is then left out.
        least_mass: Coupling below this is no split.

    Returns:
        Columns ``kind`` (``match`` or ``split``), ``source_space``, ``source``, ``target_space``, ``target``, the other
        columns of the matches (NaN for splits, which were not scored), ``mass`` in the coupling and ``method``; and
        counts of what is in it and what was left out.
    """
    import pandas as pd

    matches = alignment.matches
    q = matches["q_value"]
    keep = np.arange(len(alignment)) if q_max is None else np.flatnonzero(np.isfinite(q) & (q <= q_max))
    row, col, mass = split_edges(alignment, least_mass)
    if q_max is not None:
        near = np.isin(row, matches["source"][keep]) | np.isin(col, matches["target"][keep])
        row, col, mass, far = row[near], col[near], mass[near], int(np.count_nonzero(~near))
    else:
        far = 0
    n, m = len(keep), len(row)
    coupling = sp.csr_matrix(alignment.coupling)
    at = (matches["source"][keep], matches["target"][keep])
    own = np.asarray(coupling[at], dtype=np.float64).ravel() if n else np.empty(0)  # scipy: no ids, a sparse matrix
    columns: dict[str, Any] = {
        "kind": np.repeat(["match", "split"], [n, m]),
        "source_space": alignment.source.id,
        "source": np.concatenate([matches["source"][keep], row]),
        "target_space": alignment.target.id,
        "target": np.concatenate([matches["target"][keep], col]),
    }
    for name in (c for c in matches if c not in ("source", "target")):
        columns[name] = np.concatenate([matches[name][keep], np.full(m, np.nan)])
    columns["mass"] = np.concatenate([own, mass])
    columns["method"] = alignment.method
    counts = {
        "matches": n,
        "splits": m,
        "matches_left_out": len(alignment) - n,
        "matches_without_q": int(np.count_nonzero(~np.isfinite(q))),
        "splits_left_out": far,
    }
    return pd.DataFrame(columns), counts


def _csv(frame: pandas.DataFrame, alignment: Alignment, path: Path) -> None:
    frame.to_csv(path, index=False, lineterminator="\n")


def _parquet(frame: pandas.DataFrame, alignment: Alignment, path: Path) -> None:
    frame.to_parquet(path, index=False)


def _graphml(frame: pandas.DataFrame, alignment: Alignment, path: Path) -> None:
    """Undirected: nodes with ``side``, ``space`` and ``feature``, edges with the other columns (NaN left out)."""
    import networkx as nx

    # Within one space both sides have the same features, and they are two nodes all the same.
    prefix = ("", "") if alignment.source.id != alignment.target.id else ("source:", "target:")
    graph: Any = nx.Graph(method=alignment.method, converged=alignment.converged)
    for record in frame.to_dict("records"):
        ends = []
        for side, mark in zip(("source", "target"), prefix, strict=True):
            space, feature = str(record.pop(f"{side}_space")), int(record.pop(side))
            ends.append(f"{mark}{space}:{feature}")
            graph.add_node(ends[-1], side=side, space=space, feature=feature)
        # NaN is not equal to itself, and readers of GraphML disagree on how to spell it.
        graph.add_edge(*ends, **{k: v for k, v in record.items() if v == v and k != "method"})
    nx.write_graphml(graph, path)


WRITERS: dict[str, Callable[[Any, Alignment, Path], None]] = {"csv": _csv, "parquet": _parquet, "graphml": _graphml}


def format_of(out: Path, wanted: str | None) -> str:
    """The format asked for, or the one that the file's name ends in.

    Raises:
        TransferError: For a format that is not one of ``WRITERS``.
    """
    found = wanted or out.suffix.lower().removeprefix(".")
    if found not in WRITERS:
        raise TransferError(
            f"Unknown export format {wanted!r}." if wanted else f"The name {out.name} does not say which format.",
            f"Use --format {', '.join(WRITERS)}.",
        )
    return found


def export(
    alignment: Alignment,
    out: Path,
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    q_max: float | None = None,
    least_mass: float = LEAST_MASS,
    force: bool = False,
) -> dict[str, Any]:
    """Write the matches and splits of an alignment to one file, atomically.

    Memory beyond the alignment: about 150 bytes a row, for GraphML 4 KiB, since networkx holds the whole document.

    Args:
        alignment: To write.
        out: The file.
        format: ``csv``, ``parquet`` or ``graphml``; by default the file's suffix.
        q_max: See ``table``.
        least_mass: See ``table``.
        force: Replace a file that is there.

    Returns:
        The file, its format, and the counts of ``table``.

    Raises:
        TransferError: For an unknown format, a q-value or mass out of range, or a file in the way.
    """
    kind = format_of(out, format)
    if q_max is not None and not 0 < q_max <= 1:
        raise TransferError(f"--q-max is {q_max}; a q-value lies between 0 and 1.")
    if not least_mass > 0:
        raise TransferError(f"--least-mass is {least_mass}; it must be positive.")
    if out.is_dir():
        raise TransferError(f"{out} is a folder.", "Name a file in it.")
    if out.exists() and not force:
        raise TransferError(f"{out} exists.", "Pass --force to replace it, or name another file.")
    frame, counts = table(alignment, q_max=q_max, least_mass=least_mass)
    slow = kind == "graphml" and len(frame) > 2 * GRAPH_RATE
    say(f"export {kind}  {len(frame):,} rows" + (f", about {len(frame) / GRAPH_RATE:.0f} s" if slow else ""))
    with replacing(out) as part:
        WRITERS[kind](frame, alignment, part)
    return {"file": str(out), "format": kind, **counts}

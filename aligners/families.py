"""Feature families across models: which features are matched all the way round, and how many are shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.stats import Interval

if TYPE_CHECKING:
    import networkx as nx

Node = tuple[str, int]
"""(space id, feature id)"""


@dataclass(frozen=True)
class Families:
    """What the pairwise alignments of several spaces say together."""

    spaces: tuple[str, ...]
    """Space ids, sorted."""
    universal: tuple[dict[str, int], ...]
    """Space id → feature id, one entry a space; every pair of members is a match (cycle-consistent)."""
    pairs: dict[str, int]
    """Matches per pair of spaces (``id|id``), families included."""
    pairs_only: int
    """Connected groups that reach exactly two spaces."""
    broken: int
    """Connected groups that reach three spaces or more and hold no universal family."""
    chains: int
    """Paths a–b–c over three spaces."""
    chains_closed: int
    """Of these, how many have a–c as a match too."""

    @property
    def consistency(self) -> float | None:
        """Share of chains that close; None when there is no chain."""
        return self.chains_closed / self.chains if self.chains else None


def match_graph(alignments: Sequence[Alignment], q_max: float | None = None) -> nx.Graph:
    """Undirected graph with a node per matched feature and an edge per match.

    Args:
        alignments: Any number, each over two different spaces.
        q_max: Drop matches whose q-value is above, or was not computed; None keeps all.

    Raises:
        TransferError: For an alignment of a space with itself.
    """
    import networkx as nx

    graph = nx.Graph()
    for alignment in alignments:
        a, b = alignment.source.id, alignment.target.id
        if a == b:
            raise TransferError(f"Families need alignments between different spaces, got {a} with itself.")
        for i, j, score, q in zip(
            *(alignment.matches[c].tolist() for c in ("source", "target", "score", "q_value")), strict=True
        ):
            if q_max is None or q <= q_max:
                graph.add_edge((a, i), (b, j), score=score)
    return graph


def families(alignments: Sequence[Alignment], q_max: float | None = None) -> Families:
    """Families over two spaces or more from the alignments of their pairs.

    A family is universal when it has one feature in every space and all its pairs are matches. Where splits give a
    feature several candidates, each full set counts once.

    Raises:
        TransferError: Without an alignment, or for an alignment of a space with itself.
    """
    import networkx as nx

    if not alignments:
        raise TransferError("Families need at least one alignment.")
    graph = match_graph(alignments, q_max)
    spaces = tuple(sorted({s.id for a in alignments for s in (a.source, a.target)}))
    counts = {f"{a}|{b}": 0 for a, b in combinations(spaces, 2)}
    for left, right in graph.edges:
        counts["|".join(sorted((left[0], right[0])))] += 1
    universal: list[dict[str, int]] = []
    pairs_only = broken = 0
    for part in nx.connected_components(graph):
        reached = {space for space, _ in part}
        # Matches never join two features of one space, so a clique holds at most one feature of each.
        whole = [dict(c) for c in nx.find_cliques(graph.subgraph(part)) if len(c) == len(spaces)]
        universal.extend(whole)
        pairs_only += len(reached) == 2
        broken += len(reached) > 2 and not whole
    chains, closed = _chains(graph)
    return Families(
        spaces=spaces,
        universal=tuple(sorted(universal, key=lambda f: [f[s] for s in spaces])),
        pairs=counts,
        pairs_only=pairs_only,
        broken=broken,
        chains=chains,
        chains_closed=closed,
    )


def _chains(graph: nx.Graph) -> tuple[int, int]:
    """Paths of two edges over three different spaces, and how many of them close."""
    chains = closed = 0
    for middle in graph:
        for left, right in combinations(graph[middle], 2):
            if left[0] != right[0]:
                chains += 1
                closed += graph.has_edge(left, right)
    return chains, closed


@dataclass(frozen=True)
class Shares:
    """How the testable features of one space divide; the three shares add up to one."""

    space: str
    """Space id."""
    universal: Interval
    """Members of a universal family."""
    shared: Interval
    """Matched in another space, but in no universal family."""
    private: Interval
    """Testable and matched nowhere; matches that ``q_max`` or the aligner missed count here too."""
    n_testable: int
    """Features the shares are taken over."""
    n_untestable: int
    """Features too rare, dead or always on to be matched: neither matched nor private."""
    n_undecided: int
    """Features whose only matches could not be tested on held-out documents; apart from both of the above."""
    n_testable_least: int
    """Testable features in the pair that could test fewest of them."""


def shares(alignments: Sequence[Alignment], q_max: float | None = None) -> tuple[Shares, ...]:
    """Universal, shared and private features of every space, over testable features only.

    Testable are as many features as the pair could test that had most of them (``info["testable_source"]`` and
    ``_target`` of the alignments; all features where an aligner tests none): a feature that only one pair could test
    and did not match counts as private. Intervals are Wilson's at 95 %. They cover other features of the same kind and
    not the errors of the matches, for which ``q_max`` is the bound. Memory: the match graphs, about 2 KB a match.

    Args:
        alignments: As for ``families``.
        q_max: As for ``match_graph``; with it, a feature whose q-values are all NaN is undecided.

    Returns:
        One entry a space, sorted by id.

    Raises:
        TransferError: As ``families``; or when more features are matched than the alignments call testable.
    """
    found, graph = families(alignments, q_max), match_graph(alignments, q_max)
    unscored = match_graph(alignments)
    counts: dict[str, list[int]] = {space: [] for space in found.spaces}
    width: dict[str, int] = {}
    for alignment in alignments:
        for side in ("source", "target"):
            space = getattr(alignment, side)
            counts[space.id].append(int(alignment.info.get(f"testable_{side}", space.n_features)))
            width[space.id] = space.n_features
            if q_max is not None:  # what has a q-value was tested, and is decided
                tested = alignment.matches[side][np.isfinite(alignment.matches["q_value"])]
                unscored.remove_nodes_from([(space.id, i) for i in tested.tolist()])
    parts = []
    for space in found.spaces:
        universal = len({family[space] for family in found.universal})
        matched = sum(node[0] == space for node in graph)
        undecided = 0 if q_max is None else sum(n[0] == space and n not in graph for n in unscored)
        testable = max(counts[space]) - undecided
        if matched > testable:
            raise TransferError(
                f"{matched} features of {space} are matched, but its alignments call {testable} testable.",
                "Fit all pairs on the same documents.",
            )
        split = (universal, matched - universal, testable - matched)
        parts.append(
            Shares(
                space,
                *(wilson(n, testable) for n in split),
                n_testable=testable,
                n_untestable=width[space] - max(counts[space]),
                n_undecided=undecided,
                n_testable_least=min(counts[space]),
            )
        )
    return tuple(parts)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Share ``k / n`` with Wilson's interval; NaN for ``n`` = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0, "none")
    ci = binomtest(k, n).proportion_ci(level, method="wilson")
    return Interval(k / n, float(ci.low), float(ci.high), n, "wilson")

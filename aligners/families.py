"""Feature families across models: which features are matched all the way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from transfer.core.errors import TransferError
from transfer.core.objects import Alignment

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

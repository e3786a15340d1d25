"""Match features by how their activations correlate on a shared corpus."""

from __future__ import annotations

from aligners.assignment import Rule, select
from aligners.base import Aligner, coupling_of, match_columns
from aligners.correlation import Codes, correlation_blocks, listed_correlations, usable_features
from transfer.core.alignment import Alignment
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations


class ActivationAligner(Aligner):
    """Mutual nearest neighbours (or one-to-one assignment) by Pearson correlation of the codes at shared positions.

    It needs no geometry and no common width, but it confuses a feature with its children and says little about rare
    ones. Work grows with joint events; memory is bounded by ``topk.BLOCK_BYTES`` beyond the codes.

    Args:
        min_support: Rows a feature must fire on to be testable.
        rule: ``mutual`` or ``one_to_one`` (the latter for at most 4,096 testable features a side).
    """

    method = "activation"

    def __init__(self, *, min_support: int = 10, rule: Rule = "mutual") -> None:
        self.min_support = min_support
        self.rule: Rule = rule

    def needs(self) -> frozenset[str]:
        """Paired activations."""
        return frozenset({"pairs"})

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        assert pairs is not None
        left, right, info = usable_features(pairs, self.min_support)
        a, b = Codes.of(pairs.source, left.ids), Codes.of(pairs.target, right.ids)
        rows, cols = select(correlation_blocks(a, b), (len(a.ids), len(b.ids)), self.rule)
        score = listed_correlations(
            Codes.of(a.matrix, rows),
            Codes.of(b.matrix, cols),
        )
        keep = score > 0
        matches = match_columns(a.ids[rows[keep]], b.ids[cols[keep]], score[keep])
        coupling = coupling_of(matches, (source.space.n_features, target.space.n_features))
        return self._alignment(source, target, matches, coupling, info={**info, "rows": len(pairs.docs)})

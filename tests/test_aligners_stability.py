"""Matches that another half of the corpus would give are told from those that it would not."""

from __future__ import annotations

import numpy as np
import pytest

from aligners.activation import ActivationAligner
from aligners.fused import FusedAligner
from aligners.metrics import is_right
from aligners.planted import planted_pair
from aligners.stability import stability
from transfer.core.errors import TransferError


def test_right_matches_come_back_and_wrong_ones_do_not() -> None:
    case = planted_pair(n_source=60, n_target=50, overlap=0.5, seed=3)
    found = stability(ActivationAligner(min_support=3), case.source, case.target, case.pairs, draws=3)
    right = is_right(found.pairs[:, 0], found.pairs[:, 1], case.truth)
    assert right.any() and not right.all()
    assert found.share[right].mean() > 0.9 > 0.5 > found.share[~right].mean()
    assert len(found.overlap) == 3 and np.all((found.overlap > 0.2) & (found.overlap < 1))
    assert 0 < found.stable < 1


def test_only_accepted_matches_count_and_the_draws_are_seeded() -> None:
    case = planted_pair(n_source=60, n_target=50, overlap=0.5, seed=3)
    one, two = (
        stability(FusedAligner(), case.source, case.target, case.pairs, draws=2, seed=s, level=0.05) for s in (1, 1)
    )
    assert np.array_equal(one.share, two.share) and np.array_equal(one.overlap, two.overlap)
    assert is_right(one.pairs[:, 0], one.pairs[:, 1], case.truth).all()
    none = stability(FusedAligner(), case.source, case.target, case.pairs, draws=1, level=-1.0)
    assert none.stable == 0 and none.pairs.shape == (0, 2) and none.overlap[0] == 0


def test_no_draw_is_refused() -> None:
    case = planted_pair(n_source=20, n_target=20)
    with pytest.raises(TransferError, match="at least one draw"):
        stability(ActivationAligner(), case.source, case.target, case.pairs, draws=0)

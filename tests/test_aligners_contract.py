"""The contract suite over all aligners, and proof that the suite can fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from aligners import checks
from aligners.activation import ActivationAligner
from aligners.base import Aligner
from aligners.chance import RandomAligner
from aligners.decoder import DecoderAligner
from aligners.fused import FusedAligner
from aligners.planted import Planted, planted_pair
from aligners.sinkhorn import SinkhornAligner
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

ALIGNERS: list[Aligner] = [
    FusedAligner(),
    FusedAligner(min_support=10, k=4, rule="one_to_one"),
    FusedAligner(rule="transport"),
    FusedAligner(rule="exact"),
    FusedAligner(geometry="pairs"),
    ActivationAligner(),
    ActivationAligner(rule="one_to_one"),
    DecoderAligner(),
    DecoderAligner(via="unembedding"),
    DecoderAligner(via="same"),
    DecoderAligner(kind="procrustes", csls=False, rule="one_to_one"),
    DecoderAligner(kind="cca"),
    SinkhornAligner(),
    SinkhornAligner(cost="activation", slack=None),
    SinkhornAligner(cost="map", reg=0.1),
    SinkhornAligner(cost="unembedding", slack=0.5),
]


@pytest.mark.parametrize("aligner", ALIGNERS, ids=repr)
def test_contract(aligner: Aligner) -> None:
    checks.check_aligner(aligner)


@pytest.fixture(scope="module")
def case() -> Planted:
    return planted_pair(n_source=60, n_target=50, d_source=32, d_target=40)


def test_random_fails_the_identity(case: Planted) -> None:
    with pytest.raises(AssertionError, match="precision"):
        checks.recovers_identity(RandomAligner(), case)
    with pytest.raises(AssertionError, match="RandomAligner"):
        checks.check_aligner(RandomAligner(), case)
    for check in (checks.returns_self, checks.is_deterministic, checks.refuses_unfitted, checks.survives_saving):
        check(RandomAligner(), case)


class _Broken(ActivationAligner):
    """Breaks one promise at a time."""

    def __init__(self, *, how: str = "", min_support: int = 10, calls: list[int] | None = None) -> None:
        super().__init__(min_support=min_support)
        self.how = how
        self.calls = calls

    def fit(self, source: FeatureView, target: FeatureView, *, pairs: PairedActivations | None = None) -> _Broken:
        if self.how == "refuses nothing":
            try:
                super().fit(source, target, pairs=pairs)
            except TransferError:
                self.alignment_ = RandomAligner().fit(source, source).alignment_
            return self
        super().fit(source, target, pairs=pairs)
        if self.how == "edits parameters":
            self.min_support += 1
        if self.how == "edits input":
            assert pairs is not None
            pairs.source.data[0] *= 2
        if self.how == "other object":
            return _Broken().fit(source, target, pairs=pairs)
        return self

    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        found = super()._fit(source, target, pairs)
        if self.how == "drifts":
            assert self.calls is not None
            self.calls.append(1)
            found.matches["score"][:] += 1e-3 * len(self.calls)
        if self.how == "by position":
            found.matches["target"][:] = np.arange(len(found)) % found.target.n_features
        if self.how == "unsaveable":
            found = dataclasses.replace(found, info={"array": np.zeros(2)})
        if self.how == "marginals":
            found = dataclasses.replace(found, row_error=0.5)
        return found


@pytest.mark.parametrize(
    ("how", "check"),
    [
        ("other object", checks.returns_self),
        ("edits parameters", checks.leaves_everything_alone),
        ("edits input", checks.leaves_everything_alone),
        ("drifts", checks.is_deterministic),
        ("by position", checks.follows_permutation),
        ("refuses nothing", checks.refuses_bad_input),
        ("unsaveable", checks.survives_saving),
        ("marginals", checks.tells_convergence),
    ],
)
def test_each_check_can_fail(how: str, check: checks.Check) -> None:
    case = planted_pair(n_source=40, n_target=30, n_docs=60)
    with pytest.raises((AssertionError, ValueError)):
        check(_Broken(how=how, calls=[]), case)


def test_one_iteration_check_can_fail(case: Planted) -> None:
    class Liar(SinkhornAligner):
        def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
            return dataclasses.replace(super()._fit(source, target, pairs), converged=True, row_error=0.0)

    with pytest.raises(AssertionError, match="max_iter=1"):
        checks.admits_one_iteration(
            Liar(cost="activation", slack=0.8, reg=0.05, max_iter=9, tol=1e-4, min_support=10, seed=0), case
        )


def test_assertion_helpers_can_fail(case: Planted) -> None:
    one = ActivationAligner().fit(case.source, case.target, pairs=case.pairs).alignment_
    checks.assert_same(one, one)
    changes = (
        {"converged": False},
        {"row_error": 0.1},
        {"coupling": one.coupling * 2},
        {"matches": {**one.matches, "target": one.matches["target"][::-1]}},
        {"matches": {name: values[:-1] for name, values in one.matches.items()}},
    )
    for change in changes:
        with pytest.raises(AssertionError):
            checks.assert_same(one, dataclasses.replace(one, **change))
    with pytest.raises(AssertionError, match="not refused"):
        checks.assert_refused(lambda: None, "nothing")

    def mumble() -> None:
        raise TransferError("no")

    with pytest.raises(AssertionError, match="only says"):
        checks.assert_refused(mumble, "a short refusal")


def test_refusals_name_what_is_needed(case: Planted) -> None:
    bare = dataclasses.replace(case.pairs, source_residual=None, target_residual=None)
    with pytest.raises(TransferError, match="DecoderAligner.*residuals"):
        DecoderAligner().fit(case.source, case.target, pairs=bare)
    with pytest.raises(TransferError, match="ActivationAligner.*paired activations"):
        ActivationAligner().fit(case.source, case.target)
    with pytest.raises(TransferError, match="one space.*32 and 40"):
        DecoderAligner(via="same").fit(case.source, case.target)
    with pytest.raises(TransferError, match="target unembedding"):
        DecoderAligner(via="unembedding").fit(case.source, dataclasses.replace(case.target, unembedding=None))
    with pytest.raises(TransferError, match="No source feature fires"):
        ActivationAligner(min_support=10**6).fit(case.source, case.target, pairs=case.pairs)
    for bad in (DecoderAligner(via="psychic"), SinkhornAligner(cost="love"), ActivationAligner(rule="any")):  # type: ignore[arg-type]
        with pytest.raises(TransferError, match="Unknown"):
            bad.fit(case.source, case.target, pairs=case.pairs)


def test_sklearn_clones_them() -> None:
    from sklearn.base import clone

    for aligner in ALIGNERS:
        copy: Any = clone(aligner)
        assert type(copy) is type(aligner) and copy.get_params() == aligner.get_params()

"""The contract: one suite of checks that every aligner passes, in the manner of scikit-learn's estimator checks."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from aligners.base import Aligner
from aligners.metrics import agreement
from aligners.planted import Planted, planted_pair
from transfer.core.alignment import MATCH_COLUMNS, Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

Check = Callable[[Aligner, Planted], None]


def fresh(aligner: Aligner, **changes: object) -> Aligner:
    """An unfitted copy, with some parameters changed."""
    return type(aligner)(**{**aligner.get_params(), **changes})


def assert_same(one: Alignment, other: Alignment, tolerance: float = 0.0) -> None:
    """Fail unless two alignments agree in matches, coupling and account of themselves (not in seconds).

    Raises:
        AssertionError: Naming what differs.
    """
    for name in ("source", "target", "method", "converged", "n_iter", "params", "seed"):
        assert getattr(one, name) == getattr(other, name), f"{name} differs"
    for name in MATCH_COLUMNS:
        a, b = one.matches[name], other.matches[name]
        assert a.shape == b.shape, f"number of matches differs: {a.shape} and {b.shape}"
        assert np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True), f"match column {name} differs"
    gap = abs(one.coupling - other.coupling)
    assert (gap.max() if gap.nnz else 0.0) <= tolerance, "coupling differs"
    for name in ("row_error", "col_error", "cost"):
        a, b = getattr(one, name), getattr(other, name)
        assert np.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True), f"{name} differs"


def assert_refused(work: Callable[[], object], why: str) -> None:
    """Fail unless ``work`` raises a TransferError with a sentence.

    Raises:
        AssertionError: When it passes, or says next to nothing.
    """
    try:
        work()
    except TransferError as error:
        assert len(str(error).split()) >= 4, f"{why}: refused, but only says {str(error)!r}"
        return
    raise AssertionError(f"{why}: not refused")


def returns_self(aligner: Aligner, case: Planted) -> None:
    """``fit`` returns the aligner, which then holds an Alignment of the right shape with something in it."""
    new = fresh(aligner)
    assert new.fit(case.source, case.target, pairs=case.pairs) is new, "fit does not return self"
    found = new.alignment_
    assert isinstance(found, Alignment), "alignment_ is no Alignment"
    assert found.source == case.source.space and found.target == case.target.space, "alignment_ has other spaces"
    assert len(found), "no match found on a planted pair"
    assert np.all(np.isfinite(found.coupling.data)) and np.all(found.coupling.data >= 0), "coupling is negative or NaN"
    assert np.all(np.isfinite(found.matches["score"])), "a score is not finite"
    assert found.method, "the method has no name"


def leaves_everything_alone(aligner: Aligner, case: Planted) -> None:
    """Two fits change neither parameters nor inputs."""
    new = fresh(aligner)
    before, arrays = new.get_params(), [a.copy() for a in _arrays(case)]
    for _ in range(2):
        new.fit(case.source, case.target, pairs=case.pairs)
    assert new.get_params() == before, "fit changed its parameters"
    for old, now in zip(arrays, _arrays(case), strict=True):
        assert np.array_equal(old, now), "fit changed its input"


def is_deterministic(aligner: Aligner, case: Planted) -> None:
    """Two fits give the same, bit for bit."""
    assert_same(_fit(fresh(aligner), case), _fit(fresh(aligner), case))


def follows_permutation(aligner: Aligner, case: Planted) -> None:
    """Permuting the target's features permutes the result."""
    order = np.random.default_rng(1).permutation(case.target.space.n_features)
    moved = dataclasses.replace(
        case,
        target=dataclasses.replace(case.target, directions=case.target.directions[order]),
        pairs=dataclasses.replace(case.pairs, target=case.pairs.target[:, order]),
    )
    plain, permuted = _fit(fresh(aligner), case), _fit(fresh(aligner), moved)
    columns = {**permuted.matches, "target": order[permuted.matches["target"]]}
    back = np.lexsort((columns["target"], columns["source"]))
    inverse = np.argsort(order)
    assert_same(
        plain,
        dataclasses.replace(
            permuted,
            matches={name: values[back] for name, values in columns.items()},
            coupling=sp.csr_matrix(permuted.coupling[:, inverse]),
        ),
        tolerance=1e-5,
    )


def recovers_identity(aligner: Aligner, case: Planted) -> None:
    """A space aligned with itself gives the identity, without a wrong match."""
    pairs = case.pairs
    alone = Planted(
        case.source,
        case.source,
        PairedActivations(pairs.source, pairs.source, pairs.docs, pairs.source_residual, pairs.source_residual),
        np.repeat(np.arange(case.source.space.n_features)[:, None], 2, axis=1),
    )
    got = agreement(_fit(fresh(aligner), alone), alone.truth)
    assert got.precision == 1 and got.recall == 1, f"precision {got.precision:.3f}, recall {got.recall:.3f} on itself"


def tells_convergence(aligner: Aligner, case: Planted) -> None:
    """Marginal errors are finite, and below ``tol`` where the fit says it converged."""
    found = _fit(fresh(aligner), case)
    for error in (found.row_error, found.col_error):
        assert np.isfinite(error) and error >= 0, f"marginal error is {error}"
        assert not found.converged or error < aligner.get_params().get("tol", 1e-9), "converged, with marginals off"


def admits_one_iteration(aligner: Aligner, case: Planted) -> None:
    """An iterative aligner given a single iteration says that it did not converge, and ``top`` then refuses."""
    if "max_iter" not in aligner.get_params():
        return
    found = _fit(fresh(aligner, max_iter=1), case)
    assert not found.converged, "max_iter=1 claims to have converged"
    assert_refused(lambda: found.top(1), "top of an unconverged fit")


def refuses_bad_input(aligner: Aligner, case: Planted) -> None:
    """NaN, empty and misshapen input is refused with a sentence."""
    bad = case.source.directions.copy()
    bad[0, 0] = np.nan
    broken = dataclasses.replace(case.source, directions=bad)
    assert_refused(lambda: fresh(aligner).fit(broken, case.target, pairs=case.pairs), "NaN directions")
    assert_refused(lambda: fresh(aligner).fit(_empty(case.source), case.target, pairs=_no_columns(case.pairs)), "empty")
    short = dataclasses.replace(case.source, directions=case.source.directions[:-1])
    assert_refused(lambda: fresh(aligner).fit(short, case.target, pairs=case.pairs), "missing directions")
    fewer = dataclasses.replace(case.pairs, source=case.pairs.source[:, :-1])
    assert_refused(lambda: fresh(aligner).fit(case.source, case.target, pairs=fewer), "missing paired features")
    if case.pairs.source_residual is not None:
        spoilt = case.pairs.source_residual[:].copy()
        spoilt[3, 0] = np.inf
        pairs = dataclasses.replace(case.pairs, source_residual=spoilt)
        assert_refused(lambda: fresh(aligner).fit(case.source, case.target, pairs=pairs), "infinite residual")
    for part in sorted(aligner.needs() - {"one_space"}):
        source, pairs = case.source, case.pairs
        if part == "unembedding":
            source = dataclasses.replace(source, unembedding=None)
        elif part == "residuals":
            pairs = dataclasses.replace(pairs, source_residual=None)
        else:
            pairs = None
        assert_refused(lambda s=source, p=pairs: fresh(aligner).fit(s, case.target, pairs=p), f"absent {part}")


def refuses_unfitted(aligner: Aligner, case: Planted) -> None:
    """Before ``fit``, everything that needs its result refuses and names ``fit``."""
    new = fresh(aligner)
    uses = (
        lambda: new.transform(case.pairs.source),
        lambda: new.inverse_transform(case.pairs.target),
        lambda: new.score(case.pairs),
    )
    for use in uses:
        assert_refused(use, "use before fit")
        try:
            use()
        except TransferError as error:
            assert "fit" in str(error), "the refusal does not name fit"


def survives_saving(aligner: Aligner, case: Planted) -> None:
    """Saved and loaded, the alignment, scored or not, is the same."""
    fitted = fresh(aligner).fit(case.source, case.target, pairs=case.pairs)
    with tempfile.TemporaryDirectory() as folder:
        for number, found in enumerate((fitted.alignment_, fitted.score(case.pairs, n_null=2))):
            found.save(Path(folder) / str(number))
            loaded = Alignment.load(Path(folder) / str(number))
            assert_same(found, loaded)
            assert found.info == loaded.info, "info differs after saving"
            assert (found.null_corr is None) == (loaded.null_corr is None), "the null was lost"


def agrees_across_precision(aligner: Aligner, case: Planted) -> None:
    """float64 inputs give the matches of float32 inputs."""

    def wide(view: FeatureView) -> FeatureView:
        tokens = view.unembedding
        return FeatureView(
            view.space, view.directions.astype(np.float64), None if tokens is None else tokens.astype(np.float64)
        )

    p = case.pairs
    pairs = PairedActivations(
        sp.csr_matrix(p.source, dtype=np.float64),
        sp.csr_matrix(p.target, dtype=np.float64),
        p.docs,
        None if p.source_residual is None else p.source_residual[:].astype(np.float64),
        None if p.target_residual is None else p.target_residual[:].astype(np.float64),
    )
    assert_same(
        _fit(fresh(aligner), case),
        _fit(fresh(aligner), Planted(wide(case.source), wide(case.target), pairs, case.truth)),
        1e-5,
    )


def treats_sparse_as_dense(aligner: Aligner, case: Planted) -> None:
    """``transform`` and ``inverse_transform`` give the same for sparse and dense values, and refuse a wrong width."""
    new = fresh(aligner).fit(case.source, case.target, pairs=case.pairs)
    for use, values in ((new.transform, case.pairs.source[:5]), (new.inverse_transform, case.pairs.target[:5])):
        sparse, dense = use(values), use(values.toarray())
        assert np.allclose(sparse.toarray(), dense.toarray()), f"{use.__name__} differs between sparse and dense"
        assert_refused(lambda u=use, v=values: u(v[:, :-1]), "a wrong width")


CHECKS: tuple[Check, ...] = (
    returns_self,
    leaves_everything_alone,
    is_deterministic,
    follows_permutation,
    recovers_identity,
    tells_convergence,
    admits_one_iteration,
    refuses_bad_input,
    refuses_unfitted,
    survives_saving,
    agrees_across_precision,
    treats_sparse_as_dense,
)


def check_aligner(aligner: Aligner, case: Planted | None = None) -> None:
    """Run the whole contract on one aligner.

    Args:
        aligner: Any aligner, fitted or not; it is copied.
        case: A planted pair it should manage; by default a small one, in one space where the aligner needs that.

    Raises:
        AssertionError: Naming the check that failed and why.
    """
    if case is None:
        one_space = "one_space" in aligner.needs()
        case = planted_pair(
            n_source=60, n_target=50, d_source=32, d_target=32 if one_space else 40, same_space=one_space
        )
    for check in CHECKS:
        try:
            check(aligner, case)
        except AssertionError as error:
            raise AssertionError(f"{aligner!r} fails {check.__name__}: {error}") from error


def _fit(aligner: Aligner, case: Planted) -> Alignment:
    return aligner.fit(case.source, case.target, pairs=case.pairs).alignment_


def _arrays(case: Planted) -> list[np.ndarray]:
    p = case.pairs
    found = [case.source.directions, case.target.directions, p.docs]
    for codes in (p.source, p.target):
        found += [codes.data, codes.indices, codes.indptr]
    optional = (case.source.unembedding, case.target.unembedding, p.source_residual, p.target_residual)
    return found + [a[:] for a in optional if a is not None]


def _empty(view: FeatureView) -> FeatureView:
    space = dataclasses.replace(view.space, n_features=0)
    return dataclasses.replace(view, space=space, directions=view.directions[:0])


def _no_columns(pairs: PairedActivations) -> PairedActivations:
    return dataclasses.replace(pairs, source=pairs.source[:, :0])

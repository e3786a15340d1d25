"""What every aligner is: keyword parameters, ``fit``, one learned ``alignment_``, and the checks on its input."""

from __future__ import annotations

import dataclasses
import inspect
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from aligners.correlation import dims
from transfer.core.alignment import MATCH_COLUMNS, Alignment
from transfer.core.errors import TransferError
from transfer.core.rows import Rows
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations

CHECK_ROWS = 4096
"""Rows looked at in one go when arrays are checked for NaN."""


class Aligner(ABC):
    """Base of all aligners, in the manner of a scikit-learn estimator.

    A subclass stores keyword parameters in its constructor and does nothing else there, names its method, says which
    parts of the input it needs, and implements ``_fit``. ``fit`` validates, times, and keeps the result; it changes
    neither parameters nor inputs.
    """

    method: ClassVar[str] = ""
    """Name of the method in alignments and reports."""
    alignment_: Alignment
    """The only learned public result; set by ``fit``."""

    def needs(self) -> frozenset[str]:
        """Parts this aligner cannot do without: of ``pairs``, ``residuals``, ``unembedding``, ``one_space``."""
        return frozenset()

    def takes(self) -> frozenset[str]:
        """Parts this aligner makes use of where they are there; those it needs, and perhaps more."""
        return self.needs()

    def name(self) -> str:
        """Method name with the variant that matters to a reader."""
        return self.method

    @abstractmethod
    def _fit(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> Alignment:
        """The method itself, on checked input."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's keyword parameters (scikit-learn's contract, so ``sklearn.base.clone`` works)."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"

    def fit(self, source: FeatureView, target: FeatureView, *, pairs: PairedActivations | None = None) -> Self:
        """Learn ``alignment_``.

        Args:
            source: The space whose features are looked for.
            target: The space they are looked for in.
            pairs: Both spaces' codes at the same places of a corpus; fitting documents only.

        Raises:
            TransferError: When a part this aligner needs is absent, or an input is empty, not finite or of the wrong
                shape.
        """
        start = time.monotonic()
        self._check_needs(source, target, pairs)
        check_view(source, "source")
        check_view(target, "target")
        if pairs is not None:
            check_pairs(pairs, source, target)
        alignment = self._fit(source, target, pairs)
        self.alignment_ = dataclasses.replace(alignment, seconds=time.monotonic() - start)
        return self

    def transform(self, values: sp.csr_matrix | np.ndarray) -> sp.csr_matrix:
        """Source activations in the target's features, through the coupling: [docs, d_src] → [docs, d_tgt]."""
        alignment = self._fitted("transform")
        _check_width(values, alignment.source.n_features, "transform", "source")
        return alignment.push(values)

    def inverse_transform(self, values: sp.csr_matrix | np.ndarray) -> sp.csr_matrix:
        """Target activations in the source's features: [docs, d_tgt] → [docs, d_src]."""
        alignment = self._fitted("inverse_transform")
        _check_width(values, alignment.target.n_features, "inverse_transform", "target")
        return alignment.pull(values)

    def score(self, heldout: PairedActivations, *, n_null: int = 20, seed: int = 0) -> Alignment:
        """The alignment with its held-out columns filled; see ``aligners.calibrate.score_matches``.

        Args:
            heldout: Paired activations of documents that ``fit`` never saw.
            n_null: Draws of the shuffled-corpus null.
            seed: Of those draws.
        """
        from aligners.calibrate import score_matches

        return score_matches(self._fitted("score"), heldout, n_null=n_null, seed=seed)

    def _fitted(self, what: str) -> Alignment:
        if not hasattr(self, "alignment_"):
            raise TransferError(f"{type(self).__name__}.{what} was called before fit.", "Call fit first.")
        return self.alignment_

    def _check_needs(self, source: FeatureView, target: FeatureView, pairs: PairedActivations | None) -> None:
        needs = self.needs()
        if needs & {"pairs", "residuals"} and pairs is None:
            raise TransferError(f"{self!r} needs paired activations.", "Pass pairs= to fit.")
        if "residuals" in needs and (pairs is None or pairs.source_residual is None or pairs.target_residual is None):
            raise TransferError(
                f"{self!r} needs the residuals of the paired positions.", "Harvest with keep_residual: true."
            )
        if "unembedding" in needs:
            for side, view in (("source", source), ("target", target)):
                if view.unembedding is None:
                    raise TransferError(
                        f"{self!r} needs the {side} unembedding of shared tokens.", "Pass FeatureView.unembedding."
                    )
        if "one_space" in needs and source.space.d_model != target.space.d_model:
            raise TransferError(
                f"{self!r} compares directions in one space, but the widths are {source.space.d_model} and "
                f"{target.space.d_model}.",
                "Use a learned map or the unembedding across models.",
            )

    def _alignment(
        self,
        source: FeatureView,
        target: FeatureView,
        matches: dict[str, np.ndarray],
        coupling: sp.csr_matrix,
        **more: Any,
    ) -> Alignment:
        more.setdefault("converged", True)
        return Alignment(
            source=source.space,
            target=target.space,
            method=self.name(),
            coupling=coupling,
            matches=matches,
            params=self.get_params(),
            seed=int(getattr(self, "seed", 0)),
            **more,
        )


def match_columns(source: np.ndarray, target: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
    """The ``MATCH_COLUMNS`` of matches that have not been scored on held-out documents, sorted by source id."""
    order = np.lexsort((target, source))
    columns: dict[str, np.ndarray] = {
        "source": np.asarray(source, dtype=np.int64)[order],
        "target": np.asarray(target, dtype=np.int64)[order],
        "score": np.asarray(score, dtype=np.float64)[order],
    }
    for name in MATCH_COLUMNS[3:]:
        columns[name] = np.full(len(order), np.nan)
    return columns


def coupling_of(matches: dict[str, np.ndarray], shape: tuple[int, int]) -> sp.csr_matrix:
    """Coupling with each match's score as its mass, float32 (what a saved alignment keeps) [d_src, d_tgt]."""
    mass = np.asarray(matches["score"], dtype=np.float32)
    return sp.csr_matrix((mass, (matches["source"], matches["target"])), shape=shape)


def check_finite(values: Rows, what: str) -> None:
    """Raise when an array holds NaN or infinity; block by block, so that no mask of its size is built.

    Raises:
        TransferError: Naming ``what`` and the first bad row.
    """
    for start in range(0, len(values), CHECK_ROWS):
        good = np.isfinite(values[start : start + CHECK_ROWS])
        if not good.all():
            row = start + int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
            raise TransferError(f"{what} holds NaN or infinity, first in row {row}.", "Harvest or load it again.")


def check_view(view: FeatureView, side: str) -> None:
    """Raise when a view is empty, of the wrong shape, or not finite.

    Raises:
        TransferError: Saying which.
    """
    expected = (view.space.n_features, view.space.d_model)
    if view.directions.shape != expected:
        raise TransferError(f"The {side} directions are {view.directions.shape}, space {view.space.id} has {expected}.")
    if 0 in expected:
        raise TransferError(f"The {side} space {view.space.id} is empty: {expected[0]} features, width {expected[1]}.")
    check_finite(view.directions, f"The {side} directions of {view.space.id}")
    if view.unembedding is not None:
        if view.unembedding.ndim != 2 or view.unembedding.shape[1] != expected[1] or len(view.unembedding) < 2:
            raise TransferError(
                f"The {side} unembedding is {view.unembedding.shape}; it needs 2 tokens × {expected[1]}."
            )
        check_finite(view.unembedding, f"The {side} unembedding of {view.space.id}")


def check_pairs(pairs: PairedActivations, source: FeatureView, target: FeatureView) -> None:
    """Raise when paired activations do not belong to these views.

    Raises:
        TransferError: Saying what differs.
    """
    sides = (
        ("source", source.space, pairs.source, pairs.source_residual),
        ("target", target.space, pairs.target, pairs.target_residual),
    )
    for side, space, codes, residual in sides:
        if dims(codes)[1] != space.n_features:
            raise TransferError(
                f"The paired {side} activations have {dims(codes)[1]} features, {space.id} has {space.n_features}."
            )
        if residual is not None:
            if residual.shape != (len(pairs.docs), space.d_model):
                raise TransferError(
                    f"The paired {side} residuals are {residual.shape}, expected {(len(pairs.docs), space.d_model)}."
                )
            check_finite(residual, f"The paired {side} residuals")
    if np.any(np.diff(pairs.docs) < 0):
        raise TransferError("The rows of paired activations are not grouped by document.", "Sort them by document.")


def _check_width(values: sp.csr_matrix | np.ndarray, width: int, what: str, side: str) -> None:
    if values.ndim != 2 or (values.shape or (0, 0))[1] != width:
        raise TransferError(f"{what} takes activations [docs, {width}] of the {side} space, got {values.shape}.")

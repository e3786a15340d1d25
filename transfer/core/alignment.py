"""A fitted alignment between two spaces: matches, coupling, convergence and provenance, saved and loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.files import file_hash, load_arrays, read_json, save_arrays, write_json
from transfer.core.space import FeatureSpace
from transfer.core.store import csr

MATCH_COLUMNS = ("source", "target", "score", "heldout_corr", "p_value", "q_value")


ALIGNMENT_SCHEMA = 2
"""Version of a saved alignment; 1, without a hash of its arrays and without provenance, is still read."""


@dataclass(frozen=True)
class Alignment:
    """A fitted alignment between two spaces."""

    source: FeatureSpace
    target: FeatureSpace
    method: str
    coupling: sp.csr_matrix
    """Mass between features, CSR [d_src, d_tgt]; non-negative."""
    matches: dict[str, np.ndarray]
    """Columns of ``MATCH_COLUMNS``, one row a match; source and target int64, the rest float64 (NaN = not scored).

    More columns of the same length may follow; ``fit_q`` is the q-value that the fit itself gave, before any held-out
    score.
    """
    converged: bool
    n_iter: int = 0
    row_error: float = 0.0
    col_error: float = 0.0
    cost: float = float("nan")
    duality_gap: float = float("nan")
    """How much more than the best plan a transport may cost, as a share; NaN where nothing is moved."""
    seed: int = 0
    seconds: float = 0.0
    null_corr: np.ndarray | None = None
    """Held-out correlations of the same matches under the shuffled-corpus null, [null draws × matches] flattened."""
    params: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    """Diagnostics such as held-out R² of the residual map, untestable features."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What it was fitted and scored on: corpora, documents, versions."""
    fit_texts: np.ndarray | None = None
    """``text_key`` of every text fitted on, uint64, sorted; None where the texts are unknown."""

    def __post_init__(self) -> None:
        if self.coupling.shape != (self.source.n_features, self.target.n_features):
            raise TransferError(
                f"Coupling is {self.coupling.shape}, the spaces have "
                f"({self.source.n_features}, {self.target.n_features}) features."
            )
        for name in MATCH_COLUMNS:
            if name not in self.matches:
                raise TransferError(f"Alignment matches lack the column {name!r}.")
        if len({len(column) for column in self.matches.values()}) > 1:
            raise TransferError("The columns of the alignment's matches differ in length.")
        for side, space in (("source", self.source), ("target", self.target)):
            ids = self.matches[side]
            if len(ids) and not 0 <= ids.min() <= ids.max() < space.n_features:
                raise TransferError(f"The alignment's matches name {side} features outside 0..{space.n_features - 1}.")

    def __len__(self) -> int:
        return len(self.matches["source"])

    def top(self, k: int, *, allow_unconverged: bool = False) -> list[dict[str, float]]:
        """The ``k`` best matches by score.

        Raises:
            TransferError: For a fit that did not converge, unless ``allow_unconverged``.
        """
        if not self.converged and not allow_unconverged:
            raise TransferError(
                f"The {self.method} fit of {self.source.id} to {self.target.id} did not converge "
                f"(row error {self.row_error:.2g}, column error {self.col_error:.2g}).",
                "Allow more iterations, give more texts, or pass allow_unconverged=True.",
            )
        order = np.argsort(-self.matches["score"], kind="stable")[:k]
        return [{c: self.matches[c][i].item() for c in MATCH_COLUMNS} for i in order]

    def push(self, values: sp.csr_matrix | np.ndarray) -> sp.csr_matrix:
        """Source activations through the row-normalised coupling: [docs, d_src] → [docs, d_tgt]."""
        return sp.csr_matrix(values) @ _normalised(self.coupling)

    def pull(self, values: sp.csr_matrix | np.ndarray) -> sp.csr_matrix:
        """Target activations back: [docs, d_tgt] → [docs, d_src]."""
        return sp.csr_matrix(values) @ _normalised(sp.csr_matrix(self.coupling.T))

    def reversed(self) -> Alignment:
        """The same alignment seen from the target."""
        swap = {"source": "target", "target": "source"}
        return dataclasses.replace(
            self,
            source=self.target,
            target=self.source,
            coupling=sp.csr_matrix(self.coupling.T),
            matches={c: self.matches[swap.get(c, c)] for c in self.matches},
            row_error=self.col_error,
            col_error=self.row_error,
            info={_mirrored(k): v for k, v in self.info.items()},
        )

    def mapping(self) -> dict[int, int]:
        """Source feature → target feature of its best match."""
        order = np.argsort(self.matches["score"], kind="stable")
        return {int(self.matches["source"][i]): int(self.matches["target"][i]) for i in order}

    def summary(self) -> dict[str, Any]:
        """The numbers of ``results.json``."""

        def median(x: np.ndarray | None) -> float | None:
            x = np.asarray([] if x is None else x, dtype=float)
            x = x[np.isfinite(x)]
            return float(np.median(x)) if x.size else None

        q = self.matches["q_value"][np.isfinite(self.matches["q_value"])]
        return {
            "source": self.source.model,
            "target": self.target.model,
            "method": self.method,
            "n_features": [self.source.n_features, self.target.n_features],
            "n_matches": len(self),
            "heldout_corr_median": median(self.matches["heldout_corr"]),
            "null_corr_median": median(self.null_corr),
            "q_value_max": float(q.max()) if q.size else None,
            "converged": self.converged,
            "row_error": self.row_error,
            "col_error": self.col_error,
            **self.info,
        }

    def save(self, path: Path) -> None:
        """Write ``path/alignment-<hash>.safetensors``, then ``path/alignment.json``, which names it.

        An alignment that was there before stays whole until the second file replaces its own; then its arrays go.
        """
        path = Path(path)
        coupling = sp.csr_matrix(self.coupling)
        arrays = {
            "indptr": coupling.indptr.astype(np.int64),
            "indices": coupling.indices.astype(np.int32),
            "values": coupling.data.astype(np.float32),
            **{f"match_{c}": np.asarray(values) for c, values in self.matches.items()},
        }
        if self.fit_texts is not None:
            arrays["fit_texts"] = np.asarray(self.fit_texts, dtype=np.uint64)
        if self.null_corr is not None:
            arrays["null_corr"] = np.asarray(self.null_corr, dtype=np.float64)
        fresh = path / ".alignment.safetensors"
        save_arrays(fresh, arrays)
        named = path / f"alignment-{file_hash(fresh)}.safetensors"
        fresh.replace(named)
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("source", "target", "coupling", "matches", "null_corr", "fit_texts")
        }
        write_json(
            path / "alignment.json",
            {
                "schema": ALIGNMENT_SCHEMA,
                "arrays": named.name,
                "source": dataclasses.asdict(self.source),
                "target": dataclasses.asdict(self.target),
                **plain,
            },
        )
        for old in (path / "alignment.safetensors", *path.glob(f"alignment-{'?' * 16}.safetensors")):
            if old != named:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            TransferError: When it is missing, damaged, or written by a newer version.
        """
        path = Path(path)
        if not (path / "alignment.json").is_file():
            raise TransferError(f"No finished alignment in {path}.", "Run `transfer align` first.")
        meta = read_json(path / "alignment.json")
        schema = meta.pop("schema", None) if isinstance(meta, dict) else None
        if not isinstance(schema, int):
            raise TransferError(f"{path / 'alignment.json'} states no schema, so it is no alignment or damaged.")
        if schema > ALIGNMENT_SCHEMA:
            raise TransferError(
                f"The alignment in {path} has schema {schema}, this version reads up to {ALIGNMENT_SCHEMA}.",
                "Update the suite.",
            )
        file = path / Path(str(meta.pop("arrays", "alignment.safetensors"))).name
        arrays = load_arrays(file)
        if schema > 1 and file.stem != f"alignment-{file_hash(file)}":
            raise TransferError(f"{file} is damaged: its content is not what its name says.", "Fit it again.")
        more = sorted(k.removeprefix("match_") for k in arrays if k.startswith("match_"))
        columns = (*MATCH_COLUMNS, *(c for c in more if c not in MATCH_COLUMNS))
        try:
            source, target = FeatureSpace(**meta.pop("source")), FeatureSpace(**meta.pop("target"))
            # JSON has no NaN.
            numbers = ("cost", "duality_gap", "row_error", "col_error")
            for name, kind in (("params", dict), ("info", dict), ("provenance", dict), ("converged", bool)):
                if not isinstance(meta.get(name, kind()), kind):
                    raise TypeError(f"{name} is no {kind.__name__}")
            fields: dict[str, Any] = {k: float("nan") if v is None and k in numbers else v for k, v in meta.items()}
            return cls(
                source=source,
                target=target,
                coupling=csr(arrays, (source.n_features, target.n_features)),
                matches={c: arrays[f"match_{c}"] for c in columns},
                null_corr=arrays.get("null_corr"),
                fit_texts=arrays.get("fit_texts"),
                **fields,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"The alignment in {path} is damaged ({error}).", "Fit it again.") from None


def _mirrored(name: str) -> str:
    """``dead_source`` → ``dead_target`` and back."""
    for here, there in (("_source", "_target"), ("_target", "_source")):
        if name.endswith(here):
            return name.removesuffix(here) + there
    return name


def _normalised(coupling: sp.csr_matrix) -> sp.csr_matrix:
    mass = np.asarray(coupling.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(np.divide(1.0, mass, out=np.zeros_like(mass), where=mass > 0)) @ coupling)

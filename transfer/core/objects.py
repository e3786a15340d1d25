"""The objects that flow between the stages: frozen dataclasses with provenance, ``save`` and ``load``.

Axis words used everywhere: docs, tokens, d_model, d_src, d_tgt, k.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.files import file_hash, load_arrays, read_json, save_arrays, write_json

SCHEMA = 2
"""Version of everything written here; part of every content key."""


def digest(value: Any, length: int = 16) -> str:
    """Short sha256 of a JSON-able value, or of the bytes given."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:length]


def text_key(text: str) -> int:
    """First eight bytes of a text's sha256, as an integer: it tells whether a text was seen, without keeping it."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


@dataclass(frozen=True)
class FeatureSpace:
    """One SAE on one layer of one model: the space its feature ids live in."""

    model: str
    """Typed model reference, such as ``zoo:llama`` or ``hub:Qwen/Qwen2-7B-Instruct@<rev>``."""
    model_hash: str
    layer: int
    """Canonical layer: the index into transformers' ``hidden_states``."""
    sae: str
    """Typed SAE reference."""
    sae_hash: str
    n_features: int
    d_model: int
    rule: str
    """Activation rule, such as ``topk-16`` or ``relu``."""
    template_offset: int
    """Tokens that the chat template puts before the user's words; excluded from all statistics."""

    @cached_property
    def id(self) -> str:
        """Short content id."""
        return f"{self.model.split(':')[-1].split('@')[0].replace('/', '--')}@{digest(dataclasses.asdict(self), 8)}"

    def check(self, other: FeatureSpace, where: str) -> None:
        """Raise when ``other`` is another space.

        Raises:
            TransferError: Naming the first field that differs.
        """
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        for name, value in mine.items():
            if value != theirs[name]:
                raise TransferError(
                    f"{where} belongs to feature space {self.id} but was used with {other.id}: "
                    f"{name} is {value!r} there and {theirs[name]!r} here.",
                    "Run the stage that made it again, or pass the space it was made in.",
                )


def _csr(arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> sp.csr_matrix:
    return sp.csr_matrix((arrays["values"], arrays["indices"], arrays["indptr"]), shape=shape, copy=False)


@dataclass(frozen=True)
class ActivationStore:
    """Sparse SAE activations of one corpus in one space, on disk.

    A folder with ``meta.json`` and, per shard ``n``: ``tokens-n.safetensors`` (token-level CSR of the true codes, with
    the document and the number of UTF-8 bytes of its content read so far), ``docs-n.safetensors`` (documents ×
    features, max over tokens, with the token position of the maximum) and, where asked for,
    ``residual-n.safetensors`` (float16 residual stream of the same tokens). Codes are read whole when first asked for
    and kept, 8 bytes a code; residuals are read anew each time (``residual_rows``).
    """

    path: Path
    space: FeatureSpace
    corpus_hash: str
    doc_ids: tuple[str, ...]
    n_tokens: int
    shards: int
    counts: dict[str, int] = field(default_factory=dict)
    """What was dropped or cut: ``empty``, ``truncated``."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Open a finished store.

        Raises:
            TransferError: When it is missing, unfinished or of another schema.
        """
        meta_path = Path(path) / "meta.json"
        if not meta_path.is_file():
            raise TransferError(f"No finished activation store in {path}.", "Run `transfer harvest` first.")
        meta = read_json(meta_path)
        if meta["schema"] != SCHEMA:
            raise TransferError(
                f"The store in {path} has schema {meta['schema']}, this version reads {SCHEMA}.", "Harvest again."
            )
        return cls(
            path=Path(path),
            space=FeatureSpace(**meta["space"]),
            corpus_hash=meta["corpus_hash"],
            doc_ids=tuple(meta["doc_ids"]),
            n_tokens=meta["n_tokens"],
            shards=meta["shards"],
            counts=meta["counts"],
        )

    def _shards(self, kind: str) -> Iterator[dict[str, np.ndarray]]:
        return (load_arrays(self.path / f"{kind}-{i:05d}.safetensors") for i in range(self.shards))

    @cached_property
    def tokens(self) -> sp.csr_matrix:
        """Token-level codes, float32 CSR [tokens, n_features]."""
        parts = [_csr(a, (len(a["indptr"]) - 1, self.space.n_features)) for a in self._shards("tokens")]
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    @cached_property
    def token_docs(self) -> np.ndarray:
        """Row into ``doc_ids`` of each token, int32 [tokens]."""
        return np.concatenate([a["doc"] for a in self._shards("tokens")])

    @cached_property
    def token_ends(self) -> np.ndarray:
        """UTF-8 bytes of the document's content consumed at the end of each token, int32 [tokens]."""
        return np.concatenate([a["end"] for a in self._shards("tokens")])

    @cached_property
    def docs(self) -> sp.csr_matrix:
        """Max over tokens, float32 CSR [docs, n_features]."""
        parts = [_csr(a, (len(a["indptr"]) - 1, self.space.n_features)) for a in self._shards("docs")]
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    @cached_property
    def peaks(self) -> sp.csr_matrix:
        """Content-token position of each document maximum, plus one (so that 0 stays 'absent'), CSR like ``docs``."""
        parts = [
            sp.csr_matrix(
                (a["position"].astype(np.int32) + 1, a["indices"], a["indptr"]),
                shape=(len(a["indptr"]) - 1, self.space.n_features),
            )
            for a in self._shards("docs")
        ]
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    @property
    def residuals(self) -> np.ndarray:
        """Residual stream of the stored tokens, float16 [tokens, d_model]; read anew each time, not kept.

        Raises:
            TransferError: When the harvest did not keep them.
        """
        return self.residual_rows(None)

    def residual_rows(self, rows: np.ndarray | None) -> np.ndarray:
        """Residual stream of these tokens (all if None), float16 [rows, d_model]; one shard in memory beside it.

        Rows that do not ascend cost the whole stream at once.

        Raises:
            TransferError: When the harvest did not keep them.
        """
        if not (self.path / "residual-00000.safetensors").exists():
            raise TransferError(f"The store {self.path} keeps no residuals.", "Harvest again with keep_residual: true.")
        if rows is not None and np.any(np.diff(rows) < 0):
            return self.residual_rows(None)[rows]
        count = self.n_tokens if rows is None else len(rows)
        out = np.empty((count, self.space.d_model), dtype=np.float16)
        first = filled = 0
        for shard in self._shards("residual"):
            part = shard["residual"]
            last = first + len(part)
            if rows is not None:
                part = part[rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)] - first]
            out[filled : filled + len(part)] = part
            first, filled = last, filled + len(part)
        return out

    def support(self) -> np.ndarray:
        """Documents in which each feature fires, int64 [n_features]."""
        return np.bincount(self.docs.indices, minlength=self.space.n_features)

    def rows(self, ids: list[str]) -> np.ndarray:
        """Row numbers of document ids.

        Raises:
            TransferError: For an id the store does not hold.
        """
        where = {d: i for i, d in enumerate(self.doc_ids)}
        missing = [d for d in ids if d not in where]
        if missing:
            raise TransferError(f"{len(missing)} documents are not in the store {self.path}, first {missing[0]!r}.")
        return np.array([where[d] for d in ids], dtype=np.int64)


@dataclass(frozen=True)
class FeatureSet:
    """Features of one space, with why they were chosen."""

    space: FeatureSpace
    features: np.ndarray
    """Feature ids, int64 [n], sorted and distinct."""
    why: str
    judge: str = ""
    """Who said so: judge name and version."""
    labels: tuple[str, ...] = ()
    """Per feature, the label it is associated with (empty when not judged)."""
    scores: np.ndarray | None = None
    """Per feature, the judge's strength."""
    descriptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = np.asarray(self.features, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.space.n_features):
            raise TransferError(f"Feature ids outside 0..{self.space.n_features - 1} in {self.space.id}.")
        if len(np.unique(ids)) != len(ids) or np.any(np.diff(ids) < 0):
            raise TransferError("A feature set must be sorted and distinct.")
        object.__setattr__(self, "features", ids)

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, keep: np.ndarray, why: str) -> FeatureSet:
        """The members whose ids are in ``keep``."""
        mask = np.isin(self.features, keep)
        rows = np.flatnonzero(mask)
        return dataclasses.replace(
            self,
            features=self.features[mask],
            why=why,
            labels=tuple(self.labels[i] for i in rows) if self.labels else (),
            scores=None if self.scores is None else self.scores[mask],
            descriptions=tuple(self.descriptions[i] for i in rows) if self.descriptions else (),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "space": dataclasses.asdict(self.space),
            "features": self.features.tolist(),
            "why": self.why,
            "judge": self.judge,
            "labels": list(self.labels),
            "scores": None if self.scores is None else [float(s) for s in self.scores],
            "descriptions": list(self.descriptions),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        return cls(
            space=FeatureSpace(**data["space"]),
            features=np.array(data["features"], dtype=np.int64),
            why=data["why"],
            judge=data["judge"],
            labels=tuple(data["labels"]),
            scores=None if data["scores"] is None else np.array(data["scores"]),
            descriptions=tuple(data["descriptions"]),
        )


@dataclass(frozen=True)
class FeatureView:
    """What an aligner may see of one space: plain arrays."""

    space: FeatureSpace
    directions: np.ndarray
    """Decoder rows, float32 [n_features, d_model]; not necessarily unit norm."""
    unembedding: np.ndarray | None = None
    """Unembedding rows of the tokens that both vocabularies share, in one order, float32 [shared, d_model]."""


@dataclass(frozen=True)
class PairedActivations:
    """Codes of two spaces at the same places of the same corpus."""

    source: sp.csr_matrix
    """[rows, d_src]"""
    target: sp.csr_matrix
    """[rows, d_tgt]"""
    docs: np.ndarray
    """Document of each row, int32 [rows], non-decreasing; splits and nulls move whole documents."""
    source_residual: np.ndarray | None = None
    """[rows, d_model_src]"""
    target_residual: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.docs)
        if n == 0:
            raise TransferError("No paired rows: the two stores share no position.", "Check that the corpora match.")
        n_source, n_target = len(self.source.indptr) - 1, len(self.target.indptr) - 1
        if n_source != n or n_target != n:
            raise TransferError(f"Paired rows differ: {n_source} source, {n_target} target, {n} document marks.")
        for side, m in (("source", self.source), ("target", self.target)):
            if not np.all(np.isfinite(m.data)):
                raise TransferError(f"The {side} activations hold NaN or infinity.", "Harvest again.")

    def take(self, rows: np.ndarray) -> PairedActivations:
        """These rows only."""
        return PairedActivations(
            self.source[rows],
            self.target[rows],
            self.docs[rows],
            None if self.source_residual is None else self.source_residual[rows],
            None if self.target_residual is None else self.target_residual[rows],
        )

    def split(self, fraction: float, seed: int) -> tuple[PairedActivations, PairedActivations]:
        """Two parts with no document in common; the first holds about ``fraction`` of the documents."""
        ids = np.unique(self.docs)
        chosen = np.random.default_rng(seed).permutation(ids)[: max(1, round(fraction * len(ids)))]
        first = np.isin(self.docs, chosen)
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))


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
                "Raise max_iter or reg, or pass allow_unconverged=True.",
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
            fields: dict[str, Any] = {k: float("nan") if v is None and k in numbers else v for k, v in meta.items()}
            return cls(
                source=source,
                target=target,
                coupling=_csr(arrays, (source.n_features, target.n_features)),
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


@dataclass(frozen=True)
class CoverageReport:
    """Feature Activation Coverage of one dataset against an anchor, in one space."""

    space: FeatureSpace
    dataset: str
    anchor: str
    relevant: FeatureSet
    """The task-relevant features F (live ones)."""
    anchor_features: FeatureSet
    """F(P): relevant features that the anchor activates."""
    covered: FeatureSet
    missing: FeatureSet
    fac: float
    """|F(Q) ∩ F(P)| / |F(P)|."""
    fac_uncapped: float
    """The paper's |F(Q)| / |F(P)|, which can pass 1."""
    ci_low: float
    ci_high: float
    delta_rule: str
    n_docs: int
    kl: float
    """Smoothed surrogate KL(P_F || Q_F), Eq. 47 of arXiv 2602.10388."""

    def summary(self) -> dict[str, Any]:
        """The numbers of ``results.json``."""
        return {
            "model": self.space.model,
            "dataset": self.dataset,
            "fac": self.fac,
            "fac_uncapped": self.fac_uncapped,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "n_anchor": len(self.anchor_features),
            "n_covered": len(self.covered),
            "n_missing": len(self.missing),
            "n_relevant": len(self.relevant),
            "n_docs": self.n_docs,
            "delta_rule": self.delta_rule,
            "kl": self.kl,
        }

    def save(self, path: Path) -> None:
        """One JSON file."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in data.items():
            if isinstance(value, FeatureSet):
                data[name] = value.to_dict()
        data["space"] = dataclasses.asdict(self.space)
        write_json(Path(path), {"schema": SCHEMA, **data})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote."""
        data = read_json(Path(path))
        data.pop("schema")
        data["space"] = FeatureSpace(**data["space"])
        for name in ("relevant", "anchor_features", "covered", "missing"):
            data[name] = FeatureSet.from_dict(data[name])
        return cls(**data)


@dataclass(frozen=True)
class Candidate:
    """One generated text with its lineage."""

    source: str
    """Space id whose feature it was written for."""
    generator: str
    feature: int
    step: int
    """1 = exploration, 2 = contrast-conditioned."""
    attempt: int
    text: str
    label: str
    score: float
    """g_i(x) in the source space."""
    delta: float
    """The feature's threshold."""
    seed: int
    prompt_hash: str
    verdict: str
    """``kept`` or the reason of the rejection."""
    strength: float = 0.0
    """Steering strength used, in units of the feature's own activation scale."""
    opening: str = ""
    """Anchor span that the text was made to start with; empty for a free text."""
    positive: str = ""
    """x+ that conditioned step 2."""
    negative: str = ""
    fallback: bool = False
    """x+ is an anchor text, because no text of step 1 activated the feature."""
    target_scores: dict[str, float] = field(default_factory=dict)
    """Per target space id: activation of the matched feature there."""


@dataclass(frozen=True)
class SynthesisRun:
    """Every candidate of one synthesis, kept or not."""

    source: str
    generator: str
    pool: str
    """Which features were asked for: ``missing`` or ``random``."""
    n_requested: int
    """Features asked for."""
    candidates: tuple[Candidate, ...]
    n_missing: int
    """Missing features the hit rate refers to."""
    n_hit: int
    """Of these, how many some kept text activates above its threshold."""

    def __post_init__(self) -> None:
        for c in self.candidates:
            if not (c.generator and c.prompt_hash and c.verdict):
                raise TransferError(f"A candidate for feature {c.feature} has no lineage.")

    @property
    def kept(self) -> list[Candidate]:
        """The accepted ones."""
        return [c for c in self.candidates if c.verdict == "kept"]

    def rejected(self) -> dict[str, int]:
        """Count by reason."""
        counts: dict[str, int] = {}
        for c in self.candidates:
            if c.verdict != "kept":
                counts[c.verdict] = counts.get(c.verdict, 0) + 1
        return dict(sorted(counts.items()))

    def summary(self) -> dict[str, Any]:
        """The numbers of ``results.json``."""
        return {
            "source": self.source,
            "generator": self.generator,
            "pool": self.pool,
            "n_requested": self.n_requested,
            "n_candidates": len(self.candidates),
            "n_kept": len(self.kept),
            "missing_hit_rate": self.n_hit / self.n_missing if self.n_missing else None,
            "n_hit": self.n_hit,
            "n_missing": self.n_missing,
            "rejected": self.rejected(),
        }

    def save(self, path: Path) -> None:
        """One JSON file."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "candidates"}
        write_json(
            Path(path), {"schema": SCHEMA, **data, "candidates": [dataclasses.asdict(c) for c in self.candidates]}
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote."""
        data = read_json(Path(path))
        data.pop("schema")
        data["candidates"] = tuple(Candidate(**c) for c in data["candidates"])
        return cls(**data)


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning: what went in, how the loss went."""

    base: str
    base_hash: str
    recipe: str
    data_hash: str
    n_examples: int
    n_dropped: int
    n_trainable: int
    """Trainable parameters."""
    n_tokens: int
    seed: int
    curve: tuple[float, ...]
    seconds: float
    n_truncated: int = 0
    """Texts cut to the recipe's token limit."""

    def __post_init__(self) -> None:
        if self.n_tokens <= 0 or self.n_trainable <= 0:
            raise TransferError(f"Fine-tuning {self.base} had nothing to train on or no trainable parameter.")


@dataclass(frozen=True)
class EvalResult:
    """One metric of one model on one split."""

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    n_missing: int
    per_example: str
    """File with one row an example."""
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_missing:
            raise TransferError(f"{self.n_missing} evaluation examples of {self.task} were not scored.")


@dataclass(frozen=True)
class TransferResult:
    """One cell of the transfer matrix."""

    source: str
    generator: str
    target: str
    task: str
    arm: str
    recipe: str
    metric: str
    values: tuple[float, ...]
    """One per seed, seeds in ``seeds``' order."""
    seeds: tuple[int, ...]
    mean: float
    ci_low: float
    ci_high: float
    n_train: int
    control: str = ""
    """Arm the delta is taken against; empty for the reference arm itself."""
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None

    def __post_init__(self) -> None:
        if self.delta is not None and not self.control:
            raise TransferError(f"Arm {self.arm} of {self.target} has a delta without a control.")

    def summary(self) -> dict[str, Any]:
        """The numbers of ``results.json``."""
        return {**dataclasses.asdict(self), "n_seeds": len(self.seeds)}

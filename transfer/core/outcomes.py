"""What the stages behind an alignment find: coverage, candidates, fine-tuned models and transfer results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from transfer.core.errors import TransferError
from transfer.core.files import read_json, write_json
from transfer.core.keys import SCHEMA
from transfer.core.space import FeatureSet, FeatureSpace
from transfer.core.span import opened


def _read(path: Path, kind: type[Any], what: str) -> dict[str, Any]:
    """The fields that ``kind.save`` wrote.

    Raises:
        TransferError: When the file holds something else.
    """
    data = read_json(path)
    if not isinstance(data, dict) or "schema" not in data:
        raise TransferError(f"{path} is no {what}.", f"Name a file that a stage wrote as its {what}.")
    del data["schema"]
    known = {f.name for f in dataclasses.fields(kind)}
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if odd := sorted((data.keys() - known) | (needed - data.keys())):
        raise TransferError(
            f"{path} is no {what}: {odd[0]!r} is unknown or missing.", f"Name a {what} of this version."
        )
    return data


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
    ci_low: float | None
    """None with too few documents for an interval."""
    ci_high: float | None
    delta_rule: str
    n_docs: int
    kl: float
    """Smoothed surrogate KL(P_F || Q_F), Eq. 47 of arXiv 2602.10388."""
    kl_frequency: float | None = None
    """Smoothed KL(P_Z || Q_Z) over features by how often each is activated."""
    fac_frequency: float | None = None
    """Mean over F(P) of min(1, share of the data's documents that activate i / share of the anchor's)."""
    fac_magnitude: float | None = None
    """The same of the mean activation above the threshold (0 where below), over all documents."""
    intervals: dict[str, list[float | None]] = field(default_factory=dict)
    """Lower and upper bound of every number but ``fac``, whose are ``ci_low`` and ``ci_high``."""
    n_dead: int = 0
    """Features left out of F because no document fires them."""
    n_always_on: int = 0
    """Features left out of F because more than ``always_on`` of the anchor's documents fire them."""
    always_on: float | None = None
    costs: tuple[dict[str, Any], ...] = ()
    """The features that cost most of ``kl_frequency``, with what each adds to it and to ``kl``."""

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
            "kl_frequency": self.kl_frequency,
            "fac_frequency": self.fac_frequency,
            "fac_magnitude": self.fac_magnitude,
            "n_dead": self.n_dead,
            "n_always_on": self.n_always_on,
            "always_on": self.always_on,
            **{
                f"{name}_{end}": v
                for name, ci in self.intervals.items()
                for end, v in zip(("low", "high"), ci, strict=True)
            },
            "costs": list(self.costs),
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
        data = _read(Path(path), cls, "coverage report")
        data["space"] = FeatureSpace(**data["space"])
        for name in ("relevant", "anchor_features", "covered", "missing"):
            data[name] = FeatureSet.from_dict(data[name])
        data["costs"] = tuple(data.get("costs", ()))
        return cls(**data)


@dataclass(frozen=True)
class Candidate:
    """One generated text with its lineage."""

    source: str
    """Space id whose feature it was written for."""
    generator: str
    feature: int
    step: int
    """0 = search of the strength, 1 = exploration, 2 = contrast-conditioned."""
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
    round: int = 0
    """0 in the first pass, then which retry of its feature it belongs to."""
    record: dict[str, str] = field(default_factory=dict)
    """Fields of a structured example (a preference pair and so on), of which ``text`` is what the SAE read."""
    detail: str = ""
    """What exactly was wrong, where the verdict alone does not say it."""

    @property
    def opened(self) -> bool:
        """Whether the text does start with its opening."""
        return opened(self.text, self.opening)


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
    info: dict[str, Any] = field(default_factory=dict)
    """What the options that were switched on did and counted; empty with all of them off."""
    n_hit_opened: int | None = None
    """Missing features that kept texts with an opening activate; None where it was not counted."""
    n_hit_free: int | None = None
    """The same of kept texts without one: what was reached without copying an anchor span."""

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

    def _rate(self, n_hit: int | None) -> float | None:
        return n_hit / self.n_missing if n_hit is not None and self.n_missing else None

    def summary(self) -> dict[str, Any]:
        """The numbers of ``results.json``; ``_opened`` and ``_free`` are with and without an opening."""
        return {
            "source": self.source,
            "generator": self.generator,
            "pool": self.pool,
            "n_requested": self.n_requested,
            "n_candidates": len(self.candidates),
            "n_kept": len(self.kept),
            "missing_hit_rate": self._rate(self.n_hit),
            "n_hit": self.n_hit,
            "n_missing": self.n_missing,
            "n_candidates_opened": sum(c.opened for c in self.candidates),
            "n_kept_opened": sum(c.opened for c in self.kept),
            "n_hit_opened": self.n_hit_opened,
            "missing_hit_rate_opened": self._rate(self.n_hit_opened),
            "n_hit_free": self.n_hit_free,
            "missing_hit_rate_free": self._rate(self.n_hit_free),
            "rejected": self.rejected(),
            **({"info": self.info} if self.info else {}),
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
        data = _read(Path(path), cls, "synthesis")
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
    base_revision: str = ""
    """Commit on the Hub that was loaded, where ``base`` may name a branch; empty for files."""

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
    template: str = ""
    """Hash of the chat template, or of what else stood around the data; empty where the model does not say."""

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

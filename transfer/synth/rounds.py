"""Coverage, synthesis, perhaps fine-tuning, and coverage again, until it stops paying (App. L.14 of the paper).

A round measures what the data lack, writes for it, and adds the best of what was kept. It ends when nothing is missing,
when the marginal coverage (or the task score, where one is measured) has stalled for some rounds, when the budget of
candidates is spent, or after the last round asked for. Every round is a stage of the run directory: keyed by all it
depends on, so that the same command goes on behind the last finished one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import TransferError
from transfer.core.files import read_json, write_json
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.rundir import RunDir
from transfer.core.space import FeatureSet
from transfer.cover.delta import size
from transfer.coverage import coverage
from transfer.synth.drafts import Scorer, encode
from transfer.synthesis import select, with_hits

Stopped = Literal["covered", "stalled", "budget", "rounds"]


@dataclass(frozen=True)
class RoundSettings:
    """When to go on."""

    rounds: int = 5
    """Rounds at most."""
    patience: int = 2
    """Rounds in a row without enough gain after which it stops."""
    least_gain: float = 0.01
    """Gain of coverage (and of the score, where there is one) below which a round does not count as one."""
    budget: int | None = None
    """Candidates of all rounds together; the last round may pass it, none begins behind it."""
    per_feature: int = 2
    """Kept texts of one feature that one round adds at most."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.patience, self.per_feature) < 1 or self.least_gain < 0:
            raise TransferError("Rounds, patience and per_feature must be 1 or more, least_gain 0 or more.")


@dataclass(frozen=True)
class Round:
    """What one round did."""

    number: int
    fac_before: float
    fac_after: float
    n_missing_before: int
    n_missing_after: int
    n_candidates: int
    n_kept: int
    n_added: int
    score: float | None
    """Task score after the round; None where it is not measured."""

    @property
    def gain(self) -> float:
        """Marginal coverage."""
        return self.fac_after - self.fac_before


@dataclass(frozen=True)
class Rounds:
    """All rounds, what they added, and why they ended."""

    rounds: tuple[Round, ...]
    added: tuple[Candidate, ...]
    stopped: Stopped
    fac_start: float
    score_start: float | None = None
    folders: tuple[str, ...] = field(default=())
    """Where each round's candidates are."""
    written: SynthesisRun | None = None
    """All candidates in the order of the rounds; kept are those that were added, other kept ones are ``surplus``."""
    place: str = ""
    """Folder in which ``written`` was saved."""

    def summary(self) -> dict[str, Any]:
        """Numbers for the result."""
        return {
            "stopped": self.stopped,
            "n_rounds": len(self.rounds),
            "n_added": len(self.added),
            "n_candidates": sum(r.n_candidates for r in self.rounds),
            "fac_start": self.fac_start,
            "fac_end": self.rounds[-1].fac_after if self.rounds else self.fac_start,
            "score_start": self.score_start,
            "score_end": self.rounds[-1].score if self.rounds else self.score_start,
            "rounds": [{**dataclasses.asdict(r), "gain": r.gain} for r in self.rounds],
            "folders": list(self.folders),
            "place": self.place,
        }


Write = Callable[[FeatureSet, list[str], int], SynthesisRun]
"""(missing features, texts that may not be repeated, round number from 1) → candidates for them."""
Score = Callable[[Sequence[Candidate], Path], float]
"""(all texts added so far, folder for its files) → task score, higher is better: fine-tune and evaluate."""


def run_rounds(
    adapter: Scorer,
    anchor_docs: sp.csr_matrix,
    seed_docs: sp.csr_matrix,
    relevant: FeatureSet,
    delta: np.ndarray,
    write: Write,
    run_dir: RunDir,
    inputs: dict[str, Any],
    *,
    always_on: float = 0.5,
    settings: RoundSettings | None = None,
    score: Score | None = None,
) -> Rounds:
    """Run rounds until they stop paying.

    Args:
        adapter: Scores the texts that are added.
        anchor_docs: Max over tokens of the anchor, [docs, n_features].
        seed_docs: The same for the data to begin with.
        relevant: Task-relevant features.
        delta: Thresholds, [n_features].
        write: Writes for missing features; must depend on its arguments and on ``inputs`` alone.
        run_dir: Where the rounds are kept.
        inputs: Everything else that a round depends on (JSON-able): space, corpora, settings of ``write`` and of
            ``score``, seed.
        always_on: As ``coverage``.
        settings: When to go on.
        score: Task score after a round, also taken once before the first; None to go by coverage alone. A stop then
            needs both to have stalled.

    Raises:
        TransferError: As ``coverage``; when ``write`` answers for another space.
    """
    settings = settings or RoundSettings()

    def covered(added: Sequence[Candidate]) -> tuple[float, FeatureSet]:
        docs = encode(adapter, [c.text for c in added], "cover")[0]
        both = sp.csr_matrix(sp.vstack([seed_docs, docs], format="csr")) if size(docs)[0] else seed_docs
        report = coverage(adapter.space, anchor_docs, both, relevant, delta, always_on=always_on)
        return report.fac, report.missing

    added: list[Candidate] = []
    rounds: list[Round] = []
    folders: list[str] = []
    made: list[SynthesisRun] = []
    fac, missing = covered(added)
    lacking_first = missing
    fac_start, score_start = fac, None
    if score is not None:
        folder = run_dir.stage(
            "round", {**inputs, "round": 0}, lambda out: write_json(out / "score.json", score((), out)), "0"
        )
        score_start = float(read_json(folder / "score.json"))
    before, spent, idle = score_start, 0, 0
    stopped: Stopped = "rounds"
    for number in range(1, settings.rounds + 1):
        if not len(missing):
            stopped = "covered"
            break
        if settings.budget is not None and spent >= settings.budget:
            stopped = "budget"
            break
        lacking, so_far = missing, tuple(added)

        def work(
            out: Path, lacking: FeatureSet = lacking, so_far: Sequence[Candidate] = so_far, number: int = number
        ) -> None:
            run = write(lacking, [c.text for c in so_far], number)
            if run.source != adapter.space.id:
                raise TransferError(f"Round {number} was written for {run.source}, not for {adapter.space.id}.")
            run.save(out / "synthesis.json")
            if score is not None:
                write_json(out / "score.json", score((*so_far, *_best(run, settings)), out))

        folder = run_dir.stage(
            "round",
            {
                **inputs,
                "round": number,
                "missing": lacking.features.tolist(),
                "added": [c.text for c in so_far],
                "per_feature": settings.per_feature,
            },
            work,
            str(number),
        )
        run = SynthesisRun.load(folder / "synthesis.json")
        best = _best(run, settings)
        added += best
        made.append(run)
        folders.append(str(folder))
        after, missing = covered(added)
        now = float(read_json(folder / "score.json")) if score is not None else None
        rounds.append(
            Round(
                number=number,
                fac_before=fac,
                fac_after=after,
                n_missing_before=len(lacking),
                n_missing_after=len(missing),
                n_candidates=len(run.candidates),
                n_kept=len(run.kept),
                n_added=len(best),
                score=now,
            )
        )
        gained = after - fac >= settings.least_gain
        if now is not None and before is not None:
            gained |= now - before >= settings.least_gain
            before = max(before, now)
        fac, spent = after, spent + len(run.candidates)
        idle = 0 if gained else idle + 1
        if idle >= settings.patience:
            stopped = "stalled"
            break
    else:
        stopped = "rounds" if len(missing) else "covered"
    written = _together(made, added) if made else None
    if written:
        docs, place = encode(adapter, [c.text for c in written.kept], "score")
        written = with_hits(written, lacking_first, docs[[place[c.text] for c in written.kept]], delta)
    return Rounds(tuple(rounds), tuple(added), stopped, fac_start, score_start, tuple(folders), written)


def _together(made: Sequence[SynthesisRun], added: Sequence[Candidate]) -> SynthesisRun:
    """All rounds as one synthesis; what passed every check but was not added is ``surplus``."""
    chosen = {id(c) for c in added}
    return dataclasses.replace(
        made[0],
        pool="rounds",
        candidates=tuple(
            dataclasses.replace(c, verdict="surplus") if c.verdict == "kept" and id(c) not in chosen else c
            for run in made
            for c in run.candidates
        ),
        info={"candidates_of_round": [len(run.candidates) for run in made]},
    )


def _best(run: SynthesisRun, settings: RoundSettings) -> list[Candidate]:
    return select(run, per_feature=settings.per_feature)

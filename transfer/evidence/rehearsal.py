"""What a dry run needs: prompts as they may be printed, and a coverage stage that asks nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.prompts import DETECT, EXPLAIN, FUZZ, RELEVANCE, VERIFY
from models.rubric import Rubric
from transfer.core.rundir import RunDir, finished
from transfer.synth.safety import shown

if TYPE_CHECKING:
    from models.chat import ChatModel
    from transfer.pipeline import Pipeline


def folded(prompt: str, rubric: Rubric) -> str:
    """A prompt with every line cut that neither its own wording nor the rubric holds: those are texts of the data."""
    own = "\n".join([*(part for p in (EXPLAIN, VERIFY, RELEVANCE, DETECT, FUZZ) for part in (p.system, p.user))])
    own += "\n" + rubric.text()
    return "\n".join(line if line in own else shown(line, fold=True) for line in prompt.split("\n"))


class Rehearsal(RunDir):
    """The folder of an experiment in a dry run: a coverage stage that is not finished is rehearsed, and not kept.

    Args:
        runs: Folder of runs.
        name: Name of the experiment.
        scratch: Where rehearsed stages lie meanwhile.
        cover: Writes that of one model into a folder.
    """

    def __init__(self, runs: Path, name: str, scratch: Path, cover: Callable[[str, Path], None]) -> None:
        super().__init__(runs, name)
        self.scratch = scratch
        self.cover = cover

    def stage(self, name: str, inputs: dict[str, Any], work: Callable[[Path], None], label: str = "") -> Path:
        """As ``RunDir.stage``, but for coverage."""
        if name != "cover" or finished(self.place(name, inputs)):
            return super().stage(name, inputs, work, label)
        folder = self.scratch / label
        folder.mkdir()
        self.cover(label, folder)
        return folder


def rehearse_cover(pipeline: Pipeline, model: str, chat: ChatModel, out: Path) -> None:
    """Coverage of one model with ``chat`` as the judge: with one that calls everything relevant, the most that can be.

    Every set of a coverage grows with the relevant features, so no real judge leaves more features missing.
    """
    from transfer.cover.delta import DeltaRule, thresholds
    from transfer.coverage import coverage
    from transfer.evidence.judging import relevant_to
    from transfer.stages import split_docs

    experiment, store, corpora = pipeline.experiment, pipeline.stores[model], pipeline.corpora
    settings = experiment.cover
    anchor, seed = split_docs(store, corpora["anchor"]), split_docs(store, corpora["seed"])
    relevant = relevant_to(chat, store, corpora["anchor"], experiment, always_on=settings.always_on)
    delta = thresholds(anchor, DeltaRule.parse(settings.delta))
    report = coverage(store.space, anchor, seed, relevant, delta, always_on=settings.always_on)
    report.save(out / "seed.json")

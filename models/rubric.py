"""What makes a feature matter for a task, in words: read from YAML, hashed into every verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import yaml

from transfer.core.config import PRESETS
from transfer.core.errors import TransferError
from transfer.core.keys import digest

RUBRICS = PRESETS / "rubrics"
FIELDS = ("name", "version", "task", "counts", "excludes", "sign", "positive", "harmful")


@dataclass(frozen=True)
class Rubric:
    """The question that judges of task relevance are asked."""

    name: str
    version: int
    task: str
    """One or two sentences: what is trained or tested."""
    counts: tuple[str, ...]
    """What a relevant feature may be about, one point each."""
    excludes: tuple[str, ...] = ()
    """What is close, but does not count."""
    sign: str = ""
    """Which direction of the behaviour counts, where that can be mistaken."""
    positive: tuple[str, ...] = ()
    """Labels of data that stand for the task's side, for judges that go by labelled texts."""
    harmful: bool = False
    """Whether texts of those labels are harmful, so that writing them is gated and showing them folded."""

    @cached_property
    def hash(self) -> str:
        """Of all that a judge is asked; whether it is about harm changes no verdict."""
        return digest({k: v for k, v in asdict(self).items() if k != "harmful"}, 8)

    @property
    def id(self) -> str:
        """Name, version and hash, for lineage."""
        return f"{self.name}-{self.version}#{self.hash}"

    def text(self) -> str:
        """As prompts show it."""
        lines = [f"Task: {self.task}", "What counts:", *(f"- {c}" for c in self.counts)]
        if self.excludes:
            lines += ["What does not count:", *(f"- {c}" for c in self.excludes)]
        return "\n".join([*lines, *([f"Note: {self.sign}"] if self.sign else [])])


def load_rubric(ref: str | Path) -> Rubric:
    """A rubric by name (one of those that come with the package) or from a YAML file.

    Raises:
        TransferError: When it is not found, is not YAML, or lacks or misspells a field.
    """
    known = sorted(p.stem for p in RUBRICS.glob("*.yaml"))
    path = RUBRICS / f"{ref}.yaml" if str(ref) in known else Path(ref)
    if not path.is_file():
        raise TransferError(f"There is no rubric {ref}.", f"Give a YAML file or one of {', '.join(known)}.")
    try:
        data = yaml.safe_load(path.read_text("utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise TransferError(f"The rubric {path} is not valid YAML ({said}).") from None
    if not isinstance(data, dict):
        raise TransferError(f"The rubric {path} must hold keys and values.", f"Its keys: {', '.join(FIELDS)}.")
    unknown = sorted(set(map(str, data)) - set(FIELDS))
    lacking = [f for f in ("name", "task", "counts") if not data.get(f)]
    if unknown or lacking:
        said = [f"has the unknown keys {', '.join(unknown)}"] if unknown else []
        said += [f"lacks {', '.join(lacking)}"] if lacking else []
        raise TransferError(f"The rubric {path} {' and '.join(said)}.", f"Its keys: {', '.join(FIELDS)}.")
    for field in ("counts", "excludes", "positive"):
        if not isinstance(data.get(field, []), list):
            raise TransferError(f"The rubric {path}: `{field}` must be a list.")
    if not isinstance(data.get("version", 1), int):
        raise TransferError(f"The rubric {path}: `version` must be a whole number.")
    if not isinstance(data.get("harmful", False), bool):
        raise TransferError(f"The rubric {path}: `harmful` must be true or false.")
    return Rubric(
        name=str(data["name"]),
        version=data.get("version", 1),
        task=" ".join(str(data["task"]).split()),
        counts=tuple(str(x) for x in data["counts"]),
        excludes=tuple(str(x) for x in data.get("excludes", [])),
        sign=" ".join(str(data.get("sign", "")).split()),
        positive=tuple(str(x) for x in data.get("positive", [])),
        harmful=data.get("harmful", False),
    )

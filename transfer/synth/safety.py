"""Texts of a harmful class: written only when allowed, and never printed in full by default.

The rule: when the data is not bundled, and the class to detect (``data.positive``) or its column names harm, or the
task is toxicity, or the judge's rubric is one of harm and names that class, writing texts for it needs
``synth.allow_harmful``. The bundled requests are mild by construction, so the demo needs no flag. Texts of the other
class are not gated.
"""

from __future__ import annotations

import re

from models.rubric import load_rubric
from transfer.core.config import DataSection, Experiment
from transfer.core.errors import TransferError

HARM = frozenset(
    {
        "abuse", "abusive", "attack", "bias", "biased", "csam", "dangerous", "discrimination", "erotica", "exploit",
        "extremism", "fraud", "harassment", "harm", "harmful", "hate", "hateful", "illegal", "insult", "jailbreak",
        "malicious", "malware", "misogyny", "nsfw", "obscene", "offensive", "phishing", "profanity", "racism",
        "racist", "scam", "selfharm", "sexism", "sexist", "sexual", "slur", "suicide", "terrorism", "threat", "toxic",
        "toxicity", "unsafe", "violence", "violent", "vulgar",
    }
)  # fmt: skip
"""Words of a label, or of the name of its column, that mark a class as harmful."""
STEMS = (
    "abus", "bully", "extremis", "harass", "hate", "insult", "jailbreak", "malicious", "misogyn", "nsfw", "obscen",
    "offensive", "porn", "profan", "racis", "sexis", "terroris", "threat", "toxic", "violen",
)  # fmt: skip
"""Beginnings of such words, for compounds and other forms: ``hatespeech``, ``threatening``, ``severetoxicity``."""
_NOT = frozenset({"non", "not", "no", "without"})
SHOWN = 60
"""Characters of a harmful text that are printed."""


def is_harmful(*names: str | None) -> bool:
    """Whether a label or column name speaks of harm: ``toxic`` and ``is_hateful`` do, ``non-toxic`` does not."""
    for name in names:
        apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name or "")  # isToxic
        words = [w.casefold() for w in re.findall(r"[^\W_]+", apart)]
        if any(_of_harm(w) and (i == 0 or words[i - 1] not in _NOT) for i, w in enumerate(words)):
            return True
    return False


def _of_harm(word: str) -> bool:
    return word in HARM or word.removesuffix("s") in HARM or word.startswith(STEMS)


def bundled(data: DataSection) -> bool:
    """Whether all texts come with this package."""
    named = [ref for ref in (data.source, data.anchor, data.seed, data.evaluation) if ref]
    return all(ref.startswith("bundled:") for ref in named)


def harmful(experiment: Experiment) -> bool:
    """Whether the class to detect is one whose texts are gated and folded.

    Raises:
        TransferError: When the judge's rubric cannot be read.
    """
    data = experiment.data
    if bundled(data):
        return False
    rubric = load_rubric(experiment.judge.rubric)
    judged = rubric.harmful and data.positive in rubric.positive
    return is_harmful(data.positive, data.label) or experiment.tune.task == "toxicity" or judged


def folds(experiment: Experiment, label: str) -> bool:
    """Whether texts of this label are shown only when a reader asks for them."""
    return is_harmful(label) or (label == experiment.data.positive and harmful(experiment))


def check_allowed(experiment: Experiment) -> bool:
    """Refuse to write texts of a harmful class without ``synth.allow_harmful``.

    Returns:
        Whether the class is harmful, so that its texts are to be folded.

    Raises:
        TransferError: When it is and the flag is not set.
    """
    found = harmful(experiment)
    if found and not experiment.synth.allow_harmful:
        raise TransferError(
            f"The class {experiment.data.positive!r} is taken for harmful (by its name, its column, the task or the "
            f"rubric {experiment.judge.rubric}), and synthesis would write texts of it.",
            "Set synth.allow_harmful: true if you are entitled to and know where the texts will go, or name another "
            "judge.rubric if it is not.",
        )
    return found


def shown(text: str, fold: bool) -> str:
    """A text as it may be printed: whole, or its beginning with the number of characters left out."""
    line = " ".join(text.split())
    return line if not fold or len(line) <= SHOWN else f"{line[:SHOWN]}… [{len(line) - SHOWN} more characters folded]"

"""Texts of a harmful class: written only when allowed, and never printed in full by default.

The rule: when the data is not bundled and the class to detect (``data.positive``) or the label column names harm, or
the caller says that a rubric is harmful, writing texts for it needs ``synth.allow_harmful``. The bundled requests are
mild by construction, so the demo needs no flag. Texts of the other class are not gated.
"""

from __future__ import annotations

import re

from transfer.core.config import DataSection
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
_NOT = frozenset({"non", "not", "no", "without"})
SHOWN = 60
"""Characters of a harmful text that are printed."""


def is_harmful(*names: str | None) -> bool:
    """Whether a label or column name speaks of harm: ``toxic`` and ``is_hateful`` do, ``non-toxic`` does not."""
    for name in names:
        words = [w.casefold() for w in re.findall(r"[^\W_]+", name or "")]
        if any(w in HARM and (i == 0 or words[i - 1] not in _NOT) for i, w in enumerate(words)):
            return True
    return False


def bundled(data: DataSection) -> bool:
    """Whether all texts come with this package."""
    named = [ref for ref in (data.source, data.anchor, data.seed, data.evaluation) if ref]
    return all(ref.startswith("bundled:") for ref in named)


def harmful(data: DataSection) -> bool:
    """Whether the class to detect is one whose texts are gated and folded."""
    return not bundled(data) and is_harmful(data.positive, data.label)


def check_allowed(data: DataSection, allow: bool, *, rubric_harmful: bool = False) -> bool:
    """Refuse to write texts of a harmful class without the flag.

    Args:
        data: The experiment's data.
        allow: ``synth.allow_harmful``.
        rubric_harmful: Whether the task's rubric marks itself as harmful.

    Returns:
        Whether the class is harmful, so that its texts are to be folded.

    Raises:
        TransferError: When it is and the flag is not set.
    """
    found = harmful(data) or rubric_harmful
    if found and not allow:
        raise TransferError(
            f"The class {data.positive!r} is marked as harmful, and synthesis would write texts of it.",
            "Set synth.allow_harmful: true if you are entitled to and know where the texts will go.",
        )
    return found


def shown(text: str, fold: bool) -> str:
    """A text as it may be printed: whole, or its beginning with the number of characters left out."""
    line = " ".join(text.split())
    return line if not fold or len(line) <= SHOWN else f"{line[:SHOWN]}… [{len(line) - SHOWN} more characters folded]"

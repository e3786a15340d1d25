"""The texts of an experiment by what they are for: anchor, seed and evaluation, loaded and checked before any work."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from transfer.core.config import DataSection
from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus
from transfer.corpus import load_corpus

SPLITS = ("anchor", "seed", "evaluation")


def load_corpora(data: DataSection) -> tuple[dict[str, Corpus], dict[str, int]]:
    """Anchor, seed and evaluation texts; a source without splits is all anchor.

    Returns:
        Corpus by split, and how many texts other splits of the source hold: those are not used.

    Raises:
        TransferError: When there is no data, splits share a text, or only some texts of a split have a label.
    """

    def load(ref: str) -> Corpus:
        return load_corpus(
            ref, text_column=data.text, label_column=data.label, topic_column=data.topic, split_column=data.split
        )

    found: dict[str, Corpus] = {}
    unused: dict[str, int] = {}
    if data.source:
        whole = load(data.source)
        known = {t.split for t in whole} & set(SPLITS)
        found = {s: whole.split(s) for s in SPLITS if s in known} or {"anchor": whole}
        if known:
            unused = dict(sorted(Counter(t.split for t in whole if t.split not in SPLITS).items()))
    for split, n in unused.items():
        say(f"data  {n} texts of split {split!r} are not used (splits are {', '.join(SPLITS)})")
    for split in SPLITS:
        ref = getattr(data, split)
        if ref:
            part = load(ref)
            # Ids of different files may collide.
            found[split] = Corpus(part.name, tuple(dataclasses.replace(t, id=f"{split}/{t.id}") for t in part))
    if not found:
        raise TransferError("The experiment names no data.", "Set data.source, or data.anchor and data.seed.")
    if "evaluation" in found:
        held_out = {t.text for t in found["evaluation"]}
        leaked = [t.id for s in ("anchor", "seed") if s in found for t in found[s] if t.text in held_out]
        if leaked:
            raise TransferError(
                f"{len(leaked)} evaluation texts also stand in the anchor or seed data, first {leaked[0]}.",
                "Remove them from one side: an evaluation on them would be worthless.",
            )
    for split, corpus in found.items():
        bare = [t.id for t in corpus if not t.label]
        if bare and len(bare) < len(corpus):
            raise TransferError(
                f"{len(bare)} of {len(corpus)} {split} texts have no label, first {bare[0]}.", "Label all or none."
            )
    return found, unused


def check_corpora(corpora: Mapping[str, Corpus], positive: str, *, evaluate: bool, labelled: bool = True) -> None:
    """Refuse data that coverage (and with ``evaluate`` fine-tuning) cannot work with, before any work is done.

    Args:
        corpora: By split.
        positive: The label to detect.
        evaluate: Whether classifiers are trained and judged.
        labelled: Whether labels say which features are relevant; a language model that judges needs none.

    Raises:
        TransferError: For a missing split, or labels other than two with ``positive`` among them.
    """
    for split in SPLITS if evaluate else SPLITS[:2]:
        if split not in corpora:
            raise TransferError(
                f"{'Fine-tuning' if split == 'evaluation' else 'Coverage'} needs {split} texts, and the data has none.",
                f"Name them in data.{split}, or give the data a split column with the value {split!r}.",
            )
    for split in ("anchor", "evaluation") if evaluate else ("anchor",):
        if not (evaluate or labelled or any(t.label for t in corpora[split])):
            continue
        labels = sorted({t.label for t in corpora[split]})
        if len(labels) != 2 or positive not in labels:
            raise TransferError(
                f"The {split} texts have the labels {labels}; two are needed, and {positive!r} (data.positive) must be "
                "one of them.",
                "Name the label column with data.label and the label to detect with data.positive.",
            )

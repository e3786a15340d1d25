"""The texts of an experiment by what they are for: anchor, seed and evaluation, loaded and checked before any work."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from transfer.core.config import DataSection, DrawSection
from transfer.core.console import say
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus, Text
from transfer.corpus import load_corpus
from transfer.tasks.toxicity import load_toxicity

SPLITS = ("anchor", "seed", "evaluation")


def load_corpora(data: DataSection) -> tuple[dict[str, Corpus], dict[str, int]]:
    """Anchor, seed and evaluation texts; a source without splits is dealt out (``data.draw``), or is all anchor.

    Returns:
        Corpus by split, and how many texts other splits of the source hold: those are not used.

    Raises:
        TransferError: When there is no data, splits share a text, or only some texts of a split have a label.
    """

    def load(ref: str) -> Corpus:
        if data.layout:
            return load_toxicity(ref, data.layout)
        return load_corpus(
            ref, text_column=data.text, label_column=data.label, topic_column=data.topic, split_column=data.split
        )

    found: dict[str, Corpus] = {}
    unused: dict[str, int] = {}
    if data.source:
        whole = load(data.source)
        if data.draw:
            whole = deal(whole, data.draw)
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


def deal(corpus: Corpus, settings: DrawSection) -> Corpus:
    """The texts with topics and splits: drawn at random in the balance of labels, the seed's from some topics only.

    Texts that repeat another (but for case and outer blanks) have the split ``duplicate``, those left over ``spare``.

    Args:
        corpus: Labelled texts; splits of its own are passed over.
        settings: How many, and which topics the seed data lacks.

    Raises:
        TransferError: For texts without label, a topic that is not there, or too few texts.
    """
    texts = list(corpus)
    if not all(t.label for t in texts):
        raise TransferError(f"{corpus.name} has texts without label.", "data.draw needs one for each.")
    if settings.facets:
        texts = _with_facets(texts, settings.facets, settings.random)
    topics = sorted({t.topic for t in texts if t.topic})
    rng = np.random.default_rng(settings.random)
    if isinstance(settings.lacks, int):
        if settings.lacks >= max(len(topics), 1):
            raise TransferError(
                f"The seed data shall lack {settings.lacks} of {len(topics)} topics.", "Lower data.draw.lacks."
            )
        lacking = set(rng.permutation(topics)[: settings.lacks].tolist()) if settings.lacks else set()
    else:
        lacking = set(settings.lacks)
        if lacking - set(topics):
            raise TransferError(
                f"No text has the topic {min(lacking - set(topics))!r}.", f"Known: {', '.join(topics)}."
            )
    split = dict.fromkeys(range(len(texts)), "spare")
    seen: set[str] = set()
    for i, t in enumerate(texts):
        if t.text.casefold() in seen:
            split[i] = "duplicate"
        seen.add(t.text.casefold())
    order = rng.permutation(len(texts)).tolist()
    # The seed first: it has the least to choose from. Topics it lacks stay in the anchor and in the evaluation.
    for name, size in (("seed", settings.seed), ("evaluation", settings.evaluation), ("anchor", settings.anchor)):
        free = [i for i in order if split[i] == "spare" and not (name == "seed" and texts[i].topic in lacking)]
        for i in _balanced(free, texts, size):
            split[i] = name
        if len(free) < size:
            raise TransferError(
                f"Only {len(free)} texts of {corpus.name} are left for the {name} split, {size} are wanted.",
                f"Lower data.draw.{name}.",
            )
    return Corpus(corpus.name, tuple(dataclasses.replace(t, split=split[i]) for i, t in enumerate(texts)))


def _balanced(free: list[int], texts: list[Text], size: int) -> list[int]:
    """The first ``size``, label by label in the balance of the whole."""
    share = Counter(texts[i].label for i in free)
    ends = {label: round(size * n / max(len(free), 1)) for label, n in sorted(share.items())}
    if ends:
        ends[max(sorted(ends), key=lambda label: share[label])] += size - sum(ends.values())
    taken: Counter[str] = Counter()
    chosen = []
    for i in free:
        if taken[texts[i].label] < ends[texts[i].label]:
            taken[texts[i].label] += 1
            chosen.append(i)
    return chosen


def _with_facets(texts: list[Text], n: int, seed: int) -> list[Text]:
    """Topics from k-means on word embeddings (LSA), named ``facet 0`` and so on; texts are only told apart by words."""
    from sklearn.cluster import KMeans

    from transfer.text.embeddings import lexical

    words = [t.text for t in texts]
    means: Any = KMeans
    found = means(n, n_init=4, random_state=seed).fit_predict(lexical(words, seed=seed)(words))
    return [dataclasses.replace(t, topic=f"facet {k}") for t, k in zip(texts, found.tolist(), strict=True)]


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

"""Which judge an experiment asks: the language model behind it, its part in a stage's key, its relevant features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.cache import AnswerCache
from models.chat import ChatModel
from models.endpoint import Endpoint
from models.judges import ChatJudge
from models.local_chat import LocalChat
from models.prompts import EXPLAIN, RELEVANCE, VERIFY
from models.rubric import load_rubric
from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.files import write_json
from transfer.core.space import FeatureSet
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.evidence.asking import CACHE, local_chat, served_chat
from transfer.explain import judged_relevance

USAGE = "usage.json"
"""File of a stage that says what its judge took."""

CHAT_KEYS = ("rubric", "threshold", "model", "spans", "silent")
"""Keys of ``judge`` that only a language model reads in the cover stage."""


def refuse_unread_keys(experiment: Experiment, settings: Sequence[str]) -> None:
    """Refuse overrides that the statistical judge of the cover stage would not read.

    Raises:
        TransferError: Naming the first.
    """
    if experiment.judge.kind != "statistical":
        return
    for key in (text.partition("=")[0] for text in settings):
        if key.removeprefix("judge.") in CHAT_KEYS and key.startswith("judge."):
            raise TransferError(
                f"{key} does nothing here: the statistical judge goes by labels and topics.",
                "Leave it out, set judge.kind=endpoint or local, or use `transfer explain`.",
            )


def chat_model(experiment: Experiment, kind: str, cache: AnswerCache | None) -> Endpoint | LocalChat:
    """The language model that the experiment's ``judge`` section names.

    Caps count over everything that earlier runs of the experiment have paid for.

    Raises:
        TransferError: When it names none, or it cannot be used.
    """
    settings = experiment.judge
    if not settings.model:
        raise TransferError(f"The judge {kind!r} needs a model.", "Name one with --set judge.model=….")
    if kind == "local":
        return local_chat(settings.model, settings, cache)
    return served_chat(settings.base_url, settings.model, settings, cache, experiment.name)


def judge_inputs(experiment: Experiment) -> dict[str, Any]:
    """What of the ``judge`` section decides which features are relevant, for a stage's key; nothing by default.

    How an answer is fetched (concurrency, prices) is not part of it, but who serves it is.
    """
    settings = experiment.judge
    if settings.kind == "statistical":
        return {} if settings.test == "enrichment" else {"judge": {"test": settings.test}}
    decisive = ("kind", "model", "threshold", "spans", "silent", *(("dtype",) if settings.kind == "local" else ()))
    served = {"served_by": settings.served_by or settings.base_url.rstrip("/")} if settings.kind == "endpoint" else {}
    return {
        "judge": {name: getattr(settings, name) for name in decisive} | served,
        "rubric": load_rubric(settings.rubric).id,
        "prompts": [p.id for p in (EXPLAIN, VERIFY, RELEVANCE)],
    }


def relevant_by_chat(
    store: ActivationStore, anchor: Corpus, experiment: Experiment, folder: Path, out: Path, *, always_on: float = 0.5
) -> FeatureSet:
    """The relevant features as the experiment's language model judges them.

    Args:
        store: Activations.
        anchor: The anchor's texts.
        experiment: Its ``judge`` section names the model, the rubric and the least label.
        folder: Where answers are kept.
        out: Gets ``usage.json``: what was asked and what it took (requests, tokens, cost), cached or not.
        always_on: Features firing on more than this share of the texts are not judged.

    Raises:
        TransferError: As the model; the same call continues with what was not answered yet.
    """
    settings = experiment.judge
    with AnswerCache(folder / CACHE) as cache:
        chat = chat_model(experiment, settings.kind, cache)
        found = relevant_to(chat, store, anchor, experiment, always_on=always_on)
    write_json(out / USAGE, {"judge": chat.name, **chat.usage.to_dict()})
    return found


def relevant_to(
    chat: ChatModel, store: ActivationStore, anchor: Corpus, experiment: Experiment, *, always_on: float = 0.5
) -> FeatureSet:
    """The relevant features as one chat model judges them by the experiment's rubric; see ``relevant_by_chat``."""
    return judged_relevance(
        store,
        anchor,
        ChatJudge(chat, seed=experiment.seed),
        load_rubric(experiment.judge.rubric),
        experiment.judge,
        min_support=experiment.cover.min_docs,
        always_on=always_on,
        seed=experiment.seed,
    )

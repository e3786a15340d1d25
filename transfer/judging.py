"""Which judge an experiment asks: the language model behind it, its part in a stage's key, its relevant features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.cache import AnswerCache
from models.chat import ChatModel
from models.judges import ChatJudge
from models.prompts import EXPLAIN, RELEVANCE, VERIFY
from models.rubric import load_rubric
from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureSet
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus
from transfer.explain import judged_relevance

CACHE = "answers.sqlite"
"""File of all answers, beside the finished stages."""

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


def chat_model(experiment: Experiment, kind: str, cache: AnswerCache | None) -> ChatModel:
    """The language model that the experiment's ``judge`` section names.

    Caps count over everything that earlier runs of the experiment have paid for.

    Raises:
        TransferError: When it names none, or it cannot be used.
    """
    settings = experiment.judge
    if not settings.model:
        raise TransferError(f"The judge {kind!r} needs a model.", "Name one with --set judge.model=….")
    if kind == "local":
        from models.language import LanguageModel
        from models.local_chat import LocalChat

        language = LanguageModel.load(settings.model, dtype=settings.dtype, device=settings.device)
        return LocalChat(language, batch_size=settings.batch, cache=cache)
    from models.endpoint import Endpoint

    return Endpoint(
        settings.base_url,
        settings.model,
        cache=cache,
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout=settings.timeout,
        prices=(settings.price_prompt, settings.price_written),
        max_cost=settings.max_cost,
        max_tokens=settings.max_tokens,
        account=experiment.name,
        limit_field=settings.limit_field,
        omit=settings.omit,
    )


def judge_inputs(experiment: Experiment) -> dict[str, Any]:
    """What of the ``judge`` section decides which features are relevant, for a stage's key; nothing by default.

    How an answer is fetched (address, concurrency, prices) is not part of it.
    """
    settings = experiment.judge
    if settings.kind == "statistical":
        return {} if settings.test == "enrichment" else {"judge": {"test": settings.test}}
    decisive = ("kind", "model", "threshold", "spans", "silent", *(("dtype",) if settings.kind == "local" else ()))
    return {
        "judge": {name: getattr(settings, name) for name in decisive},
        "rubric": load_rubric(settings.rubric).id,
        "prompts": [p.id for p in (EXPLAIN, VERIFY, RELEVANCE)],
    }


def relevant_by_chat(
    store: ActivationStore, anchor: Corpus, experiment: Experiment, folder: Path, *, always_on: float = 0.5
) -> FeatureSet:
    """The relevant features as the experiment's language model judges them.

    Args:
        store: Activations.
        anchor: The anchor's texts.
        experiment: Its ``judge`` section names the model, the rubric and the least label.
        folder: Where answers are kept.
        always_on: Features firing on more than this share of the texts are not judged.

    Raises:
        TransferError: As the model; the same call continues with what was not answered yet.
    """
    settings = experiment.judge
    with AnswerCache(folder / CACHE) as cache:
        judge = ChatJudge(chat_model(experiment, settings.kind, cache), seed=experiment.seed)
        return judged_relevance(
            store,
            anchor,
            judge,
            load_rubric(settings.rubric),
            settings,
            min_support=experiment.cover.min_docs,
            always_on=always_on,
            seed=experiment.seed,
        )

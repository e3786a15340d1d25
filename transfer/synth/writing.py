"""The generator and the options that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.adapter import Adapter
from models.cache import AnswerCache
from models.chat import ChatModel
from models.generators import Generator
from models.steered import SteeredGenerator
from transfer.core.config import SynthSection
from transfer.core.errors import TransferError
from transfer.core.rundir import runs_folder
from transfer.core.span import Span
from transfer.core.texts import Text
from transfer.core.workers import Workers
from transfer.evidence.asking import CACHE, local_chat, served_chat
from transfer.synth.drafts import Target
from transfer.synth.strength import StrengthSearch
from transfer.synthesis import Options
from transfer.text.duplicates import Contamination, Copies
from transfer.text.words import WordCounts, describe


def make_generator(
    settings: SynthSection,
    adapter: Adapter,
    pool: Workers | None = None,
    chat: ChatModel | None = None,
    *,
    account: str = "",
) -> Generator:
    """The generator that writes for the features of ``adapter``.

    Args:
        settings: What is asked for.
        adapter: Model and SAE whose features are asked for; ``steered`` and ``guided`` write with that model.
        pool: Worker processes, for local generators.
        chat: The chat model of a ``chat`` generator; by default the one that the settings name.
        account: Name of the experiment, over whose runs the caps of ``synth.asking`` count.

    Raises:
        TransferError: When the chat model cannot be used.
    """
    if settings.generator == "chat":
        from models.chat_generator import ChatGenerator

        return ChatGenerator(
            chat or make_chat(settings, account),
            format_name=settings.format,
            per_request=settings.per_request,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
    common: dict[str, Any] = dict(
        model=adapter.space.model,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch,
        chunk=settings.batch,
        executor=pool.executor if pool else None,
    )
    if settings.generator == "guided":
        from models.guided import GuidedGenerator

        return GuidedGenerator(adapter, weight=settings.guide, candidates=settings.guide_tokens, **common)
    return SteeredGenerator(adapter.language, adapter.space.layer, **common)


def make_chat(settings: SynthSection, account: str = "") -> ChatModel:
    """The chat model that ``synth.chat`` names, asked as ``synth.asking`` says.

    Its answers are kept beside the finished stages. What writing takes is booked apart from what judging takes, so
    each section's caps count its own requests.

    Raises:
        TransferError: For a reference of no known kind, or settings that the server's adapter refuses.
    """
    ref = settings.chat
    address, _, model = ref.partition("#")
    local = ref.startswith("local:")
    if not local and (not address.startswith(("http://", "https://")) or not model):
        raise TransferError(
            f"synth.chat is {ref!r}.", "Write local:<model reference> or http(s)://<address>/v1#<model>."
        )
    cache = AnswerCache(runs_folder() / ".store" / CACHE)
    if local:
        return local_chat(ref.removeprefix("local:"), settings.asking, cache)
    return served_chat(address, model, settings.asking, cache, f"{account}/synth" if account else "")


def make_openings(settings: SynthSection, spans: Mapping[int, Sequence[Span]]) -> dict[int, list[str]]:
    """Per feature, what every other text starts with; nothing where openings are switched off."""
    if not settings.openings:
        return {}
    return {i: [o for span in found[: settings.examples] if (o := span.opening())] for i, found in spans.items()}


def make_options(
    settings: SynthSection,
    adapter: Adapter,
    *,
    targets: Sequence[Target] = (),
    evaluation: Iterable[Text] = (),
    spans: Mapping[int, Sequence[Span]] | None = None,
    background: WordCounts | None = None,
) -> Options:
    """The options that the settings switch on.

    Args:
        settings: What is asked for.
        adapter: The model that steering is searched for; it says how usual the texts are.
        targets: Spaces that the verdict may require.
        evaluation: Texts to keep out.
        spans: Per feature, where it fires; for generators that are asked in words.
        background: Words of the corpus, for the descriptions made from the spans.
    """
    search = None
    if settings.search:
        from models.fluency import log_perplexity

        search = StrengthSearch(
            log_perplexity(adapter.language),
            cap=settings.perplexity_cap,
            probes=settings.probes,
            features=settings.search_features,
        )
    held_out = [t.text for t in evaluation]
    asked = spans if spans and settings.generator == "chat" else {}
    return Options(
        format=settings.format,
        search=search,
        retries=settings.retries,
        retry_budget=settings.retry_budget,
        require=settings.require,
        targets=targets if settings.require != "source" else (),
        # Copies of evaluation texts are never kept, whether or not shared passages are looked for.
        protected=Contamination(held_out, settings.decontaminate) if settings.decontaminate else Copies(held_out),
        duplicates=settings.duplicates,
        descriptions={i: describe(s, background) for i, s in asked.items()} if background else {},
        spans={i: [span.marked() for span in s[: settings.examples]] for i, s in asked.items()},
    )

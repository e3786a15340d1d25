"""Instruction prompts, and their corruption by random tokens that the model finds just as likely."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from transfer.core.errors import TransferError
from transfer.function_vectors.prompts import Draft, Prompt, PromptPair, PromptSet, Template, draft, usable
from transfer.function_vectors.tasks import Pair

if TYPE_CHECKING:
    import torch

    from models.language import LanguageModel

FEWEST = 10
"""Tokens that the margin around a log-probability must hold before one is drawn."""
MARGIN = 0.25
"""Nats; doubled until ``FEWEST`` tokens lie within."""


def instruction_prompts(
    language: LanguageModel,
    instructions: tuple[str, ...],
    queries: tuple[Pair, ...],
    *,
    seed: int = 0,
    template: Template = Template(),  # noqa: B008 - frozen
) -> PromptSet:
    """Every instruction before every query, and the same behind equally probable random tokens (Davidson et al. 2025).

    One random string is drawn for each instruction and serves all of its queries.

    Raises:
        TransferError: Without instructions or queries, or when no prompt can be used.
    """
    if not instructions or not queries:
        raise TransferError(
            f"{len(instructions)} instructions and {len(queries)} queries make no prompt.",
            "Name instructions for the task.",
        )
    rng = np.random.default_rng([seed, 12])
    pairs: list[PromptPair] = []
    reasons: dict[str, int] = {}
    same = total = 0
    for instruction in instructions:
        drafts: list[Draft] = [draft(template, query, instruction=instruction) for query in queries]
        prompts, dropped = usable(language, drafts)
        for reason, n in dropped.items():
            reasons[reason] = reasons.get(reason, 0) + n
        at = prompts[0].sets.get("instruction", np.zeros(0, np.int64))
        if not len(at):
            raise TransferError(f"No token belongs to the instruction {instruction!r} alone.", "Use a longer one.")
        drawn = equally_probable(language, prompts[0].ids[: int(at[-1]) + 1], at, rng)
        same += int(np.sum(np.array(prompts[0].ids)[at] == drawn))
        total += len(at)
        pairs += [PromptPair(prompt, _replaced(prompt, drawn)) for prompt in prompts]
    return PromptSet(pairs, reasons, same / total)


def _replaced(prompt: Prompt, drawn: np.ndarray) -> Prompt:
    ids = np.array(prompt.ids)
    ids[prompt.sets["instruction"]] = drawn
    return replace(prompt, ids=ids.tolist())


def equally_probable(
    language: LanguageModel, ids: list[int], positions: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Random tokens for some positions, each as probable behind what was drawn before it as the original was.

    Where nothing stands before a position (a tokenizer without BOS) no probability is defined: any token may be drawn.

    Args:
        language: Whose probabilities count.
        ids: Tokens; those not replaced stay where they are.
        positions: What to replace, ascending.
        rng: Of the draws.

    Returns:
        Token ids, int64 [positions].
    """
    import torch

    table = language.renderer.bytes
    ordinary = np.array(sorted(table.vocabulary.values()), dtype=np.int64)
    ordinary = ordinary[ordinary < language.model.config.vocab_size]
    line = list(ids)
    wanted = _log_probabilities(language, line)
    drawn = []
    for at in positions.tolist():
        allowed = ordinary[ordinary != ids[at]]
        if at > 0:
            # The line is short; running it anew for each token keeps this free of cache bookkeeping.
            now = _log_probabilities(language, line[: at + 1])[at - 1][torch.from_numpy(allowed)].numpy()
            gap = np.abs(now - float(wanted[at - 1, ids[at]]))
            margin = MARGIN
            while np.sum(gap <= margin) < min(FEWEST, len(allowed)):
                margin *= 2
            allowed = allowed[gap <= margin]
        line[at] = int(rng.choice(allowed))
        drawn.append(line[at])
    return np.array(drawn, dtype=np.int64)


def _log_probabilities(language: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Of every next token, float32 [len, vocabulary]."""
    import torch

    with torch.inference_mode():
        logits = language.model(input_ids=language.padded([ids]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()

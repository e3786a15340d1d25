"""A local model as a chat model: its own chat template, many rows at once, a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.cache import AnswerCache
from models.chat import Answer, Chat, Usage
from transfer.core.console import progress
from transfer.core.errors import TransferError
from transfer.core.keys import digest

if TYPE_CHECKING:
    from torch import Tensor

    from models.language import LanguageModel


class LocalChat:
    """Answers chats with a local model.

    A row's answer depends on its own request alone: each row draws from its own random numbers (by the Gumbel
    maximum), so neither the batch nor the order changes what is sampled, up to rounding in the forward pass.

    Args:
        language: The model; its tokenizer must have a chat template.
        batch_size: Rows in one forward pass at most; the memory is that of their key-value cache.
        cache: Where answers are kept; not at all when None.

    Raises:
        TransferError: For a tokenizer without chat template.
    """

    def __init__(self, language: LanguageModel, *, batch_size: int = 16, cache: AnswerCache | None = None) -> None:
        if not language.tokenizer.chat_template:
            raise TransferError(f"{language.ref} has no chat template, so it cannot be asked.", "Name a chat model.")
        self.language = language
        self.batch_size = batch_size
        self.cache = cache
        dtype = str(language.model.dtype).removeprefix("torch.")
        self.name = f"local:{language.ref}#{language.hash[:8]}-{dtype}"
        self.usage = Usage()

    def complete(self, chats: list[Chat]) -> list[Answer]:
        """One answer a chat, in order; equal chats are answered once, and those too long for the context refused.

        Raises:
            TransferError: When no chat fits into the context.
        """
        found: dict[Chat, Answer] = {}
        for chat in dict.fromkeys(chats):
            kept = self.cache.get(self.name, chat) if self.cache is not None else None
            if kept is not None:
                found[chat] = kept
                self.usage.from_cache(kept)
        todo = [c for c in dict.fromkeys(chats) if c not in found]
        self.usage.n_cached += len(chats) - len(todo)
        lines = dict(zip(todo, self.prompts(todo), strict=True))
        room = self.language.model.config.max_position_embeddings
        fitting = [c for c in todo if len(lines[c]) + c.max_tokens <= room]
        for chat in todo:
            if len(lines[chat]) + chat.max_tokens > room:
                found[chat] = Answer("", 0, 0, "refused")
                self.usage.n_refused += 1
        if todo and len(found) == self._refused(found) and not fitting:
            longest = max(len(lines[c]) + c.max_tokens for c in todo)
            raise TransferError(
                f"None of {len(todo)} requests fits into the {room} tokens of {self.language.ref} (longest {longest}).",
                "Show fewer or shorter examples, or ask a model with a longer context.",
            )
        with progress(f"ask {self.language.ref}", len(fitting), "requests") as advance:
            for rows in self._batches(fitting, lines):
                for chat, answer in zip(rows, self._written(rows, [lines[c] for c in rows]), strict=True):
                    if self.cache is not None:
                        self.cache.put(self.name, chat, answer)
                    found[chat] = answer
                    self._count(answer)
                advance(len(rows))
        first = set(todo)
        out = []
        for chat in chats:
            answer = found[chat]
            fresh = chat in first
            first.discard(chat)
            out.append(answer if fresh else Answer(answer.text, answer.n_prompt, answer.n_written, answer.finish, True))
        return out

    @staticmethod
    def _refused(found: dict[Chat, Answer]) -> int:
        return sum(a.finish == "refused" for a in found.values())

    def _count(self, answer: Answer) -> None:
        self.usage.n_answered += 1
        self.usage.n_cut += answer.finish == "length"
        self.usage.n_prompt += answer.n_prompt
        self.usage.n_written += answer.n_written

    def prompts(self, chats: list[Chat]) -> list[list[int]]:
        """Token ids of each chat up to where the answer begins; the template prints its own BOS, none is added.

        A system turn that the template does not know is put before the first user turn.
        """
        texts = [self._rendered([{"role": r, "content": c} for r, c in chat.messages]) for chat in chats]
        encoded = self.language.renderer.backend.encode_batch(texts, add_special_tokens=False)
        return [list(e.ids) for e in encoded]

    def _rendered(self, turns: list[dict[str, str]]) -> str:
        if turns[0]["role"] == "system" and len(turns) > 1 and not self._knows_system:
            system, user, *rest = turns
            turns = [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return self._template(turns)

    def _template(self, turns: list[dict[str, str]]) -> str:
        return self.language.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    @property
    def _knows_system(self) -> bool:
        """Whether the template prints a system turn as one; some refuse it, some print it as the assistant's."""
        from jinja2 import TemplateError

        if self._system is None:
            probe = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}]
            answer = [{"role": "assistant", "content": "SYSTEM"}, {"role": "user", "content": "USER"}]
            try:
                printed = self._template(probe)
                self._system = "SYSTEM" in printed and printed != self._safely(answer)
            except TemplateError:
                self._system = False
        return self._system

    _system: bool | None = None

    def _safely(self, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self._template(turns)
        except TemplateError:
            return ""

    def _batches(self, chats: list[Chat], lines: dict[Chat, list[int]]) -> list[list[Chat]]:
        """Chats of like settings and like length together."""
        order = sorted(chats, key=lambda c: (c.max_tokens, c.temperature, c.top_p, -len(lines[c])))
        groups: list[list[Chat]] = []
        for chat in order:
            last = groups[-1] if groups else []
            same = bool(last) and _settings(last[0]) == _settings(chat) and len(last) < self.batch_size
            if same:
                last.append(chat)
            else:
                groups.append([chat])
        return groups

    def _written(self, chats: list[Chat], ids: list[list[int]]) -> list[Answer]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        language = self.language
        table = language.renderer.bytes
        block = language.padded(ids, left=True)
        width = torch.tensor([len(line) for line in ids], device=block.device)
        mask = (torch.arange(block.shape[1], device=block.device) >= block.shape[1] - width[:, None]).long()
        first = chats[0]
        drawn = LogitsProcessorList([_Draw(chats, self.name)] if first.temperature > 0 else [])
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=first.max_tokens,
            eos_token_id=sorted(table.special) or None,
            pad_token_id=language.pad_id,
            repetition_penalty=1.0,  # what is left unset comes from the model's own file
            use_cache=True,
            cache_implementation="static",
        )
        with torch.inference_mode():
            out: Any = language.model.generate(
                input_ids=block, attention_mask=mask, generation_config=config, logits_processor=drawn
            )
        answers = []
        for line, written in zip(ids, out[:, block.shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(written) if token in table.special), len(written))
            ended = end < len(written) or len(written) < first.max_tokens
            text = table.join(written[:end]).decode("utf8", errors="replace").strip()
            answers.append(Answer(text, len(line), min(end + ended, len(written)), "stop" if ended else "length"))
        return answers


def _settings(chat: Chat) -> tuple[int, float, float]:
    return chat.max_tokens, chat.temperature, chat.top_p


class _Draw:
    """Turns greedy decoding into sampling with random numbers of each row's own: argmax of logits + Gumbel noise."""

    def __init__(self, chats: list[Chat], model: str) -> None:
        import torch

        self.temperature = chats[0].temperature
        self.top_p = chats[0].top_p
        self.draws = [torch.Generator().manual_seed(int(digest(c.hash(model), 15), 16)) for c in chats]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        scaled = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, index = scaled.sort(dim=-1, descending=True)
            chances = ordered.softmax(dim=-1)
            # The token that crosses the share stays in, so that one always does.
            beyond = chances.cumsum(dim=-1) - chances >= self.top_p
            scaled = scaled.scatter(-1, index, ordered.masked_fill(beyond, -torch.inf))
        noise = torch.stack([torch.rand(scaled.shape[1], generator=g) for g in self.draws]).to(scaled.device)
        return scaled - (-noise.clamp_min(1e-20).log()).log()

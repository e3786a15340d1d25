"""One language model behind one interface: render, capture a layer, steer, generate, score."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import read_model
from models.family import Family, family_of
from models.hooks import editing, output_at, steering
from models.placement import placed
from models.refs import local, parse
from models.registry import hub_id
from models.tokens import Rendered, Renderer
from transfer.core.errors import TransferError
from transfer.core.files import file_hash, read_json
from transfer.core.keys import digest

SCHEMES = {"zoo": "zoo:<name>", "path": "path:<folder>", "hub": "hub:<org/name>@<revision>"}
_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "chat_template*", "special_tokens*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CPU_TOKENS = 1024
"""On a CPU more positions at once only push activations out of the cache (measured: 8192 take 1.5 times as long)."""


def batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Rows grouped by falling length so that no padded batch holds more than ``token_budget`` positions.

    A single row longer than the budget forms its own batch; empty rows belong to none.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    groups, i = [], 0
    while i < len(order):
        n = max(1, token_budget // int(lengths[order[i]]))
        groups.append(order[i : i + n])
        i += n
    return groups


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A loaded causal language model with its tokenizer; weights are frozen and the model is in evaluation mode."""

    ref: str
    hash: str
    family: Family
    model: Any
    """The transformers causal language model."""
    tokenizer: Any
    card: dict[str, Any] = field(default_factory=dict)
    """``card.json`` of the model's folder; empty when there is none."""

    @classmethod
    def load(cls, ref: str, *, dtype: str = "float32", device: str = "cpu") -> Self:
        """Load a model.

        Args:
            ref: ``zoo:<name>``, ``path:<folder>`` or ``hub:<org/name>@<revision>`` (or a short name that
                ``models.registry`` knows, such as ``hub:mistral-7b@main``).
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            device: A torch device.

        Raises:
            TransferError: When the reference, the files or the family cannot be used.
        """
        scheme, rest = parse(ref, SCHEMES, "model")
        if dtype not in DTYPES:
            raise TransferError(f"Unknown dtype {dtype!r}.", f"Use {', '.join(DTYPES)}.")
        if scheme == "hub":
            name, _, revision = rest.partition("@")
            if not revision:
                raise TransferError(f"{ref} names no revision.", f"Pin one, such as hub:{name}@main.")
            place, options = hub_id(name), {"revision": revision}
        else:
            folder = local(scheme, rest, ref, "model")
            if not (folder / "config.json").is_file():
                raise TransferError(f"{folder} holds no model (no config.json).", f"Check the reference {ref}.")
            if not any(folder.glob("*.safetensors")):
                raise TransferError(f"{folder} holds no weights (*.safetensors).", "Save the model as safetensors.")
            place, options = str(folder), {"local_files_only": True}
        config, model, tokenizer = read_model(ref, place, options, DTYPES[dtype])
        if scheme == "hub":
            revision = getattr(config, "_commit_hash", None) or options["revision"]
            content = digest([revision, digest(config.to_dict())])
        else:
            content = file_hash(*sorted({f for pattern in _FILES for f in Path(place).glob(pattern)}))
        if dtype != "float32":  # other numbers come out, so it is another model to every content key
            content = digest([content, dtype])
        card_file = Path(place) / "card.json"
        card = read_json(card_file) if scheme != "hub" and card_file.is_file() else {}
        try:
            model.requires_grad_(False).eval().to(device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            first = str(error).strip().split("\n")[0]
            raise TransferError(
                f"{ref} cannot be put on {device!r} ({first}).", "Set its device to one there is."
            ) from None
        return cls(ref=ref, hash=content, family=family_of(config), model=model, tokenizer=tokenizer, card=card)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.config.hidden_size

    @property
    def n_layers(self) -> int:
        """Decoder layers; canonical layers run from 0 (embeddings) to this number."""
        return len(self.family.part(self.model, self.family.layers))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    # Text in.

    @cached_property
    def renderer(self) -> Renderer:
        """Texts to tokens for this tokenizer."""
        return Renderer(self.tokenizer)

    def render(self, text: str) -> Rendered:
        """One text as one user turn of the chat template; see ``Renderer.render``."""
        return self.renderer.render([text])[0]

    def render_many(self, texts: list[str]) -> list[Rendered]:
        """Several texts at once, which is much faster."""
        return self.renderer.render(texts)

    @cached_property
    def template_offset(self) -> int:
        """Tokens before the user's words, found from a probe text."""
        return int(self.render("Hello").content[0])

    @cached_property
    def pad_id(self) -> int:
        """A token to fill rows with; what it stands for does not matter, no result depends on it."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else 0

    def padded(self, ids: list[list[int]], left: bool = False) -> Tensor:
        """One block [rows, longest] of token ids, pad ids behind (or before) each line."""
        width = max(map(len, ids))
        block = np.full((len(ids), width), self.pad_id, dtype=np.int64)
        for row, line in zip(block, ids, strict=True):
            row[width - len(line) if left else 0 : width if left else len(line)] = line
        return torch.from_numpy(block).to(self.device)

    def batches(self, ids: list[list[int]], token_budget: int) -> list[np.ndarray]:
        """Row numbers of each padded batch, see ``batches``; smaller on a processor, whose caches like it."""
        budget = min(token_budget, CPU_TOKENS) if self.device.type == "cpu" else token_budget
        return batches(np.array([len(line) for line in ids], dtype=np.int64), budget)

    # Residual stream out.

    def stream(
        self, ids: list[list[int]], layer: int, token_budget: int = 8192, shared: int = 0
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The residual stream at one layer, batch by batch; the forward pass stops there.

        Rows are padded on the right. Causal attention keeps padding out of all real positions, so no mask is built.

        Args:
            ids: Token ids per row.
            layer: Canonical layer.
            token_budget: Padded positions in one forward pass at most (one longer row alone may exceed it).
            shared: Tokens that all rows begin with, such as those of a chat template: they run once, their keys and
                values serve every batch, and they are left out of what is yielded.

        Yields:
            Row numbers [B], and their residual stream [B, T, d_model] in the model's dtype, from position ``shared``.

        Raises:
            TransferError: For a layer out of range.
        """
        from transformers import DynamicCache

        site = self.family.site(self.model, layer)
        base = self.family.part(self.model, self.family.base)

        def run(lines: list[list[int]], past: Any = None) -> Tensor:
            with torch.inference_mode():
                options = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
                return output_at(site, lambda: base(input_ids=self.padded(lines), **options))

        past = None
        if shared and any(ids):
            past = DynamicCache(config=self.model.config)
            run([next(line for line in ids if line)[:shared]], past)
            ids = [line[shared:] for line in ids]
        for rows in self.batches(ids, token_budget):
            own = copy.deepcopy(past)
            if own is not None:
                own.batch_repeat_interleave(len(rows))
            yield rows, run([ids[i] for i in rows], own)

    def capture(self, ids: list[list[int]], layer: int, *, token_budget: int = 8192) -> list[Tensor]:
        """The residual stream at ``layer``: equal to transformers' ``hidden_states[layer]`` before any final norm.

        Returns:
            Per row, float32 [len, d_model], in input order.

        Raises:
            TransferError: For a layer out of range.
        """
        found = [torch.zeros(0, self.d_model)] * len(ids)
        for rows, hidden in self.stream(ids, layer, token_budget):
            for i, states in zip(rows, hidden, strict=True):
                found[i] = states[: len(ids[i])].float().clone()
        return found

    def steering(
        self, layer: int, vectors: Tensor, *, strength: float = 1.0, start: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Add ``strength × vectors`` to the residual stream at ``layer`` inside the block; see ``models.hooks``.

        Args:
            layer: Canonical layer.
            vectors: One vector a row [B, d_model], or one for all [d_model].
            strength: Factor.
            start: First position to steer per row [B] in the padded sequence; all positions when left out.

        Raises:
            TransferError: For a layer out of range, or when the block ran no forward pass.
        """
        return steering(self.family.site(self.model, layer), vectors, strength, start)

    # Text out.

    def with_room(self, prompts: list[str], max_new_tokens: int, window: int | None = None) -> list[list[int]]:
        """Token ids of raw texts that leave room for a continuation in the context, or in a shorter ``window``.

        Raises:
            TransferError: When one does not.
        """
        ids = self.renderer.plain(prompts)
        room = min(self.model.config.max_position_embeddings, window or 10**9) - max_new_tokens
        longest = max(map(len, ids), default=0)
        if longest > room:
            raise TransferError(
                f"A prompt has {longest} tokens, {self.ref} has room for {room}.", "Shorten the examples."
            )
        return ids

    def generate(
        self,
        prompts: list[str],
        *,
        max_new_tokens: int = 40,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        steer: tuple[int, Tensor] | None = None,
        stop: str | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """Continue raw texts (no chat template; behind BOS where the tokenizer has one).

        Args:
            prompts: One row each.
            max_new_tokens: Longest continuation.
            temperature: 0 decodes greedily.
            top_p: Nucleus.
            seed: Decides all sampling; the global random state is left as it was.
            steer: Canonical layer and what is added to the residual stream there at every position [B, d_model].
            stop: Continuations end before this string.
            batch_size: Rows in one forward pass; part of what decides the random numbers a row gets.

        Returns:
            Continuations without the prompt, ended before the first special token or ``stop``.

        Raises:
            TransferError: When a prompt does not fit, or steering rows do not match.
        """
        from models.sampling import sample

        ids = self.with_room(prompts, max_new_tokens)
        if steer is not None and steer[1].shape != (len(prompts), self.d_model):
            raise TransferError(
                f"Steering vectors are {tuple(steer[1].shape)}, expected ({len(prompts)}, {self.d_model})."
            )
        texts: list[str] = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            for begin in range(0, len(ids), batch_size):
                rows = slice(begin, begin + batch_size)
                block = self.padded([line or [self.pad_id] for line in ids[rows]], left=True)
                width = torch.tensor([max(len(line), 1) for line in ids[rows]], device=self.device)
                mask = torch.arange(block.shape[1], device=self.device) >= block.shape[1] - width[:, None]
                hook = contextlib.nullcontext() if steer is None else self.steering(steer[0], steer[1][rows])
                with hook:
                    texts += sample(
                        self.model,
                        self.renderer.bytes,
                        block,
                        mask.long(),
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        stop=stop,
                        pad_id=self.pad_id,
                    )
        return texts

    # Scores.

    def nll(
        self,
        ids: list[list[int]],
        targets: list[np.ndarray],
        *,
        edit: tuple[int, Callable[[np.ndarray, Tensor], Tensor]] | None = None,
        token_budget: int = 8192,
    ) -> np.ndarray:
        """Negative log-likelihood of chosen tokens; the unembedding runs on the positions that predict them only.

        Args:
            ids: Token ids per row.
            targets: Per row, positions (≥ 1) of the tokens to score; each is predicted from the position before it.
            edit: Canonical layer, and a function of (row numbers [B], residual stream [B, T, d_model]) that replaces
                the residual stream there.
            token_budget: Padded positions in one forward pass at most.

        Returns:
            Nats per row, float64 [rows].
        """
        total = np.zeros(len(ids))
        base = self.family.part(self.model, self.family.base)
        head = self.family.part(self.model, self.family.unembedding)
        for rows in self.batches(ids, token_budget):
            at_row = np.concatenate([np.full(len(targets[i]), j) for j, i in enumerate(rows)])
            at = np.concatenate([targets[i] for i in rows]).astype(np.int64)
            if not len(at):
                continue
            block = self.padded([ids[i] for i in rows])
            hook: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if edit is not None:
                layer, change = edit
                hook = editing(self.family.site(self.model, layer), lambda h, c=change, r=rows: c(r, h))
            with torch.inference_mode(), hook:
                hidden = base(input_ids=block, use_cache=False).last_hidden_state
                for begin in range(0, len(at), 1024):
                    i, j = torch.from_numpy(at_row[begin : begin + 1024]), torch.from_numpy(at[begin : begin + 1024])
                    logits = head(hidden[i, j - 1]).float()
                    loss = torch.nn.functional.cross_entropy(logits, block[i, j], reduction="none")
                    np.add.at(total, rows[i.numpy()], loss.double().cpu().numpy())
        return total

    def log_likelihood(self, texts: list[str], *, token_budget: int = 8192) -> tuple[float, int]:
        """Negative log-likelihood of raw texts, for bits per byte = nats / bytes / ln 2.

        Texts longer than the context are scored in windows that share one token. A tokenizer without BOS leaves the
        first token unpredicted; its bytes are not counted then.

        Returns:
            Total nats, and the UTF-8 bytes they predict.
        """
        context = self.model.config.max_position_embeddings
        lines = self.renderer.plain(texts)
        windows = [line[i : i + context] for line in lines for i in range(0, max(len(line) - 1, 0), context - 1)]
        nats = self.nll(windows, [np.arange(1, len(w)) for w in windows], token_budget=token_budget)
        n_bytes = sum(len(text.encode()) for text in texts)
        if self.tokenizer.bos_token is None:
            n_bytes -= sum(int(self.renderer.bytes.lengths[line[0]]) for line in lines if line)
        return float(nats.sum()), n_bytes

    # Weights.

    def unembedding(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Unembedding rows with the final norm's weight folded in, so that they read the residual stream directly.

        Args:
            ids: Token ids wanted; all when left out.

        Returns:
            float32 [tokens, d_model].
        """
        weight: Tensor = self.family.part(self.model, self.family.unembedding).weight
        gain: Tensor = self.family.part(self.model, self.family.norm).weight
        if ids is not None:
            weight = weight[torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(weight.device)]
        return (weight.float() * gain.float()).detach().cpu().numpy()

    def vocabulary(self) -> dict[bytes, int]:
        """Bytes that each ordinary token writes → its id; byte strings compare across tokenizer styles."""
        return self.renderer.bytes.vocabulary


def kept_language(ref: str) -> LanguageModel:
    """``LanguageModel.load`` as ``models.placement`` says; the last one stays in memory, for work done job by job."""
    return _kept(ref, *placed(ref))


@lru_cache(maxsize=1)
def _kept(ref: str, dtype: str, device: str) -> LanguageModel:
    return LanguageModel.load(ref, dtype=dtype, device=device)

"""What differs between LLaMA, Mistral and Qwen: where the parts of the network are and how heads are laid out."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transfer.core.errors import TransferError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads of one model."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    """From the configuration: it need not be ``hidden_size / n_heads``."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; every path starts at the causal language model."""

    name: str
    model_types: tuple[str, ...]
    """``model_type`` values of transformers configurations."""
    base: str = "model"
    """The network without the unembedding."""
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    """Decoder layers; the output of entry ``i`` is ``hidden_states[i + 1]``."""
    norm: str = "model.norm"
    """Final RMS norm, whose weight multiplies the residual stream before the unembedding."""
    unembedding: str = "lm_head"
    attention: str = "self_attn"
    """Attention, seen from a decoder layer; what it returns is added to the residual stream."""
    head_mixer: str = "self_attn.o_proj"
    """Linear map that mixes the heads, seen from a decoder layer; its input is the heads' outputs side by side."""

    def part(self, model: torch.nn.Module, path: str) -> Any:
        """The submodule at one of the paths above."""
        return operator.attrgetter(path)(model)

    def site(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The module whose output is ``hidden_states[layer]`` (before any final norm).

        Raises:
            TransferError: When the model has no such layer.
        """
        layers = self.part(model, self.layers)
        if not 0 <= layer <= len(layers):
            raise TransferError(
                f"Layer {layer} does not exist: this {self.name} model has layers 0 (embeddings) to {len(layers)}.",
                "Layers are transformers' hidden_states indices.",
            )
        return self.part(model, self.embedding) if layer == 0 else layers[layer - 1]

    def attentions(self, model: torch.nn.Module) -> list[Any]:
        """The attention module of each decoder layer."""
        return [operator.attrgetter(self.attention)(layer) for layer in self.part(model, self.layers)]

    def head_mixers(self, model: torch.nn.Module) -> list[Any]:
        """The linear map behind the heads of each decoder layer."""
        return [operator.attrgetter(self.head_mixer)(layer) for layer in self.part(model, self.layers)]

    def heads_of(self, model: Any) -> HeadLayout:
        """Head layout of a loaded model, with ``head_dim`` as the weights have it.

        Raises:
            TransferError: When the width behind the heads is no multiple of their number.
        """
        layout = self.heads(model.config)
        width = self.head_mixers(model)[0].in_features
        if width % layout.n_heads:
            raise TransferError(f"{layout.n_heads} heads do not divide a width of {width} in this {self.name} model.")
        return replace(layout, head_dim=width // layout.n_heads)

    def heads(self, config: Any) -> HeadLayout:
        """Head layout of a configuration; a configuration without ``head_dim`` defines it as hidden / heads."""
        n_heads = config.num_attention_heads
        return HeadLayout(
            n_heads=n_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        )


FAMILIES: tuple[Family, ...] = (
    Family("LLaMA", ("llama",)),
    Family("Mistral", ("mistral",)),
    Family("Qwen", ("qwen2", "qwen3")),
)


def family_of(config: Any) -> Family:
    """The family of a transformers configuration.

    Raises:
        TransferError: For a model type without an entry in ``FAMILIES``.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise TransferError(
        f"Models of type {config.model_type!r} are not supported (supported: {known}).",
        "A new family is one entry in models/family.py.",
    )

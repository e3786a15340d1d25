"""Shapes of published models, from their configurations: what can be counted without a network."""

from __future__ import annotations

from typing import Any

_LLAMA_8B = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
_MISTRAL_7B = {**_LLAMA_8B, "model_type": "mistral", "vocab_size": 32000}
_QWEN2_7B = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4,
)  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "Qwen/Qwen2-7B-Instruct": _QWEN2_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2_7B,
}
"""Hub id → the fields of its ``config.json`` that decide how many parameters there are."""


def known_config(name: str) -> Any | None:
    """A transformers configuration of these shapes, or None for a model that is not listed."""
    from transformers import AutoConfig

    shape = dict(SHAPES.get(name, {}))
    return AutoConfig.for_model(shape.pop("model_type"), **shape) if shape else None

"""What the three zoo models are: architecture, tokenizer style, chat template, hook layer.

They differ in the ways the real families differ: hidden size, depth, head layout (Qwen has
``head_dim != hidden / heads``), vocabulary, tokenizer style and chat-template prefix length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nYou answer the user.<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Qwen3 writes no system turn of its own: the three templates put different numbers of tokens before the user's words.
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ZooModel:
    """One zoo member."""

    name: str
    style: Literal["llama", "mistral", "qwen"]
    """Tokenizer style: Llama-3 byte-level, Mistral Metaspace with byte fallback, or Qwen2 byte-level."""
    vocab_size: int
    hook_layer: int
    """Canonical layer (transformers' ``hidden_states`` index) that the SAE reads."""
    chat_template: str
    specials: tuple[str, ...]
    """Special tokens; the first two are BOS and EOS (BOS may equal padding where a family has none)."""
    shape: dict[str, Any] = field(default_factory=dict)

    def config(self, bos: int | None, eos: int, pad: int) -> PretrainedConfig:
        """The transformers configuration of this member."""
        from transformers import LlamaConfig, MistralConfig, Qwen3Config

        common: dict[str, Any] = dict(
            vocab_size=self.vocab_size,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
            **self.shape,
        )
        if self.style == "llama":
            return LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, **common)
        if self.style == "mistral":
            return MistralConfig(sliding_window=None, **common)
        return Qwen3Config(**common)


ZOO: dict[str, ZooModel] = {
    m.name: m
    for m in (
        ZooModel(
            name="llama",
            style="llama",
            vocab_size=4096,
            hook_layer=3,
            chat_template=LLAMA_TEMPLATE,
            specials=(
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|pad|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
            ),
            shape=dict(
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=6,
                num_attention_heads=6,
                num_key_value_heads=2,
            ),
        ),
        ZooModel(
            name="mistral",
            style="mistral",
            vocab_size=3584,
            hook_layer=3,
            chat_template=MISTRAL_TEMPLATE,
            specials=("<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]"),
            shape=dict(
                hidden_size=224,
                intermediate_size=640,
                num_hidden_layers=5,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=28,
            ),
        ),
        ZooModel(
            name="qwen",
            style="qwen",
            vocab_size=5120,
            hook_layer=4,
            chat_template=QWEN_TEMPLATE,
            specials=("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
            shape=dict(
                hidden_size=160,
                intermediate_size=448,
                num_hidden_layers=8,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=32,
            ),
        ),
    )
}

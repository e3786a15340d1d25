"""Train one family-style tokenizer (Llama-3, Mistral or Qwen2 recipe) with the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.zoo.recipe import ZooModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Our own wording of the two families' word-splitting rule; they differ in how many digits stay together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(spec: ZooModel, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer of ``spec`` and save it as a transformers folder.

    Args:
        spec: The zoo member.
        texts: Training text.
        folder: Where ``tokenizer.json`` and its configuration go.

    Returns:
        The tokenizer as transformers loads it again from ``folder``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    specials = list(spec.specials)
    if spec.style == "mistral":
        byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
        tok = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tok.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=spec.vocab_size, special_tokens=specials + byte_tokens, show_progress=False
        )
    else:
        byte_tokens = []
        tok = Tokenizer(models.BPE(ignore_merges=spec.style == "llama"))
        if spec.style == "qwen":
            tok.normalizer = normalizers.NFC()
        digits = 3 if spec.style == "llama" else 1
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=spec.vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tok.train_from_iterator(texts, trainer)
    # Byte tokens belong to the vocabulary but must not act as added tokens, or "<0x41>" in a text would match.
    state: dict[str, Any] = json.loads(tok.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in set(byte_tokens)]
    tok = Tokenizer.from_str(json.dumps(state))

    bos, eos = specials[0], specials[1]
    pad = {"llama": "<|pad|>", "mistral": "<pad>", "qwen": "<|endoftext|>"}[spec.style]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=None if spec.style == "qwen" else bos,
        eos_token="<|eot_id|>" if spec.style == "llama" else eos,
        pad_token=pad,
        padding_side="right",
        model_max_length=1024,
    )
    fast.chat_template = spec.chat_template
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)

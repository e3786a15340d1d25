"""Read llama2.c checkpoints (version 0, such as stories260K) into a transformers LLaMA folder."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import no_bars
from transfer.core.errors import TransferError


def convert(checkpoint: Path, tokenizer: Path, out: Path) -> Path:
    """Write model and tokenizer so that ``LanguageModel.load("path:<out>")`` reads them.

    Args:
        checkpoint: The ``.bin`` of the weights: seven int32 (dim, hidden, layers, heads, kv heads, vocabulary,
            sequence), then float32 tensors; a positive vocabulary means that the classifier is the embedding.
        tokenizer: The ``.bin`` of the vocabulary: longest token, then score, length and bytes of each.
        out: Folder to write.

    Returns:
        ``out``.

    Raises:
        TransferError: When a file does not have this form.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config, state = _weights(Path(checkpoint).read_bytes(), str(checkpoint))
    model = LlamaForCausalLM(LlamaConfig(**config))
    lacking, unknown = model.load_state_dict(state, strict=False)
    if unknown or set(lacking) - {"lm_head.weight"}:
        raise TransferError(f"{checkpoint} does not fill a LLaMA model ({(*lacking, *unknown)[0]}).")
    pieces = _pieces(Path(tokenizer).read_bytes(), config["vocab_size"], str(tokenizer))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(pieces), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with no_bars():
        model.save_pretrained(out)
    fast.save_pretrained(out)
    return Path(out)


def _weights(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict."""
    if len(data) < 28:
        raise TransferError(f"{name} is no llama2.c checkpoint.")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    if min(dim, hidden, layers, heads, kv_heads, length) < 1 or dim % heads or heads % kv_heads:
        raise TransferError(f"{name} is no llama2.c checkpoint of version 0.")
    shared, vocab, head = vocab > 0, abs(vocab), dim // heads
    kv = kv_heads * head
    floats = np.frombuffer(data, dtype="<f4", offset=28)
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        if at + size > len(floats):
            raise TransferError(f"{name} is cut short.")
        at += size
        return torch.from_numpy(floats[at - size : at].reshape(shape).copy())

    def half_split(weight: Tensor) -> Tensor:
        # llama2.c rotates neighbouring pairs, transformers the first half of a head against the second.
        rows, columns = weight.shape
        return weight.view(rows // head, head // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    stacks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv, dim),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for part, stack in stacks.items():
        for i, weight in enumerate(stack):
            rotary = part.endswith(("q_proj", "k_proj"))
            state[f"model.layers.{i}.{part}.weight"] = half_split(weight) if rotary else weight
    state["model.norm.weight"] = take(dim)
    take(length, head)  # cosines and sines of the rotary embedding, which transformers computes itself
    if not shared:
        state["lm_head.weight"] = take(vocab, dim)
    if at != len(floats):
        raise TransferError(f"{name} holds {len(floats) - at} numbers too many.")
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shared,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }, state


def _pieces(data: bytes, vocab: int, name: str) -> list[tuple[str, float]]:
    """(piece, score) by id, in sentencepiece's spelling."""
    pieces: list[tuple[str, float]] = []
    at = 4
    try:
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            pieces.append((data[at - length : at].decode(), score))
    except (struct.error, UnicodeDecodeError):
        raise TransferError(f"{name} is no llama2.c tokenizer of {vocab} tokens.") from None
    if at != len(data):
        raise TransferError(f"{name} holds more than {vocab} tokens.")
    # The export writes ▁ as a blank and puts the control tokens on lines of their own.
    return [(text.strip("\n") if i < 3 else text.replace(" ", "▁"), score) for i, (text, score) in enumerate(pieces)]


def _tokenizer(pieces: list[tuple[str, float]]) -> Any:
    """A byte-pair tokenizer whose merges are all the ways to build a piece from two others, best score first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {text: i for i, (text, _) in enumerate(pieces)}
    merges = [
        (-score, i, (text[:cut], text[cut:]))
        for i, (text, score) in enumerate(pieces[259:], 259)
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    bpe = models.BPE(
        vocab, [pair for _, _, pair in sorted(merges)], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tok = Tokenizer(bpe)
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tok.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tok

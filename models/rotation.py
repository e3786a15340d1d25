"""The same model in turned coordinates: a rotation of the residual stream absorbed into the weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.adapter import Adapter
from models.language import LanguageModel
from models.sae import Dictionary
from transfer.core.errors import TransferError
from transfer.core.keys import digest

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a decoder layer, and the linear maps that read the stream behind each."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Linear maps that write into the stream."""


def rotated(adapter: Adapter, rotation: np.ndarray, order: np.ndarray | None = None) -> Adapter:
    """A copy of model and SAE whose residual stream is the original's times ``rotation``.

    Codes are the same up to rounding, feature ``j`` of the copy being feature ``order[j]`` of the original.

    Args:
        adapter: Is not changed.
        rotation: Orthogonal, [d_model, d_model].
        order: Permutation of the features; as they were when left out.

    Raises:
        TransferError: When the matrix is not orthogonal, the order no permutation, or the network has other parts.
    """
    order = np.arange(adapter.dictionary.n_features) if order is None else np.asarray(order)
    return Adapter.join(
        rotated_model(adapter.language, rotation),
        rotated_dictionary(adapter.dictionary, rotation, order),
        adapter.space.layer,
    )


def rotated_model(language: LanguageModel, rotation: np.ndarray) -> LanguageModel:
    """A copy that computes the same logits from a residual stream times ``rotation``.

    RMS norms do not feel a rotation, but their gains do: each gain is first folded into the linear maps that read
    behind it. Embeddings and writing maps turn forwards, reading maps backwards; embedding and head, if tied, part.
    Products are made in float64. Memory: a copy of the model and one float64 copy of its largest matrix.

    Raises:
        TransferError: When the matrix is not orthogonal, or a layer lacks one of the parts named above.
    """
    family = language.family
    turn = torch.from_numpy(_orthogonal(rotation, language.d_model))
    model = copy.deepcopy(language.model)
    embedding, head = family.part(model, family.embedding), family.part(model, family.unembedding)
    final = family.part(model, family.norm)
    # The head first: where it shares the embedding's tensor it still holds the old one.
    head.weight = _parameter(_reading(head.weight, final.weight, turn), head.weight)
    embedding.weight = _parameter(embedding.weight.double() @ turn, embedding.weight)
    _no_gain(final)
    for number, layer in enumerate(family.part(model, family.layers)):
        for norm_name, readers in READERS.items():
            norm = _part(layer, norm_name, number)
            for name in readers:
                linear = _part(layer, name, number)
                linear.weight = _parameter(_reading(linear.weight, norm.weight, turn), linear.weight)
            _no_gain(norm)
        for name in WRITERS:
            linear = _part(layer, name, number)
            linear.weight = _parameter(turn.T @ linear.weight.double(), linear.weight)
            if linear.bias is not None:
                linear.bias = _parameter(linear.bias.double() @ turn, linear.bias)
    model.config.tie_word_embeddings = False
    model.requires_grad_(False).eval()
    return dataclasses.replace(
        language, ref=f"{language.ref}+rotated", hash=digest([language.hash, _key(rotation)]), model=model
    )


def rotated_dictionary(dictionary: Dictionary, rotation: np.ndarray, order: np.ndarray) -> Dictionary:
    """A copy that reads and writes the turned stream, its features reordered.

    Raises:
        TransferError: When the matrix is not orthogonal, the order no permutation, or the SAE normalises its input by
            coordinate.
    """
    if not np.array_equal(np.sort(order), np.arange(dictionary.n_features)):
        raise TransferError(f"The order is no permutation of {dictionary.n_features} features.")
    if dictionary.sae.cfg.normalize_activations == "layer_norm":
        raise TransferError(f"{dictionary.ref} subtracts the mean over coordinates, which a rotation changes.")
    turn = torch.from_numpy(_orthogonal(rotation, dictionary.d_model))
    sae = copy.deepcopy(dictionary.sae)
    rows = torch.from_numpy(np.asarray(order, dtype=np.int64))
    sae.W_enc.data = (turn.T @ sae.W_enc.double())[:, rows].to(sae.W_enc.dtype).contiguous()
    sae.W_dec.data = (sae.W_dec.double() @ turn)[rows].to(sae.W_dec.dtype).contiguous()
    sae.b_dec.data = (sae.b_dec.double() @ turn).to(sae.b_dec.dtype)
    for name in ("b_enc", "threshold", "b_gate", "b_mag", "r_mag"):
        values = getattr(sae, name, None)
        if isinstance(values, Tensor):
            values.data = values.data[rows].clone()
    return dataclasses.replace(
        dictionary,
        ref=f"{dictionary.ref}+rotated",
        hash=digest([dictionary.hash, _key(rotation), np.asarray(order).tolist()]),
        sae=sae,
    )


def _reading(weight: Tensor, gain: Tensor, turn: Tensor) -> Tensor:
    return (weight.double() * gain.double()) @ turn


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=False)


def _no_gain(norm: Any) -> None:
    norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)


def _part(layer: nn.Module, name: str, number: int) -> Any:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        raise TransferError(
            f"Decoder layer {number} has no {name}, so no rotation can be folded into it.",
            "Only LLaMA, Mistral and Qwen layers are known.",
        ) from None


def _orthogonal(rotation: np.ndarray, width: int) -> np.ndarray:
    matrix = np.asarray(rotation, dtype=np.float64)
    if matrix.shape != (width, width) or not np.allclose(matrix.T @ matrix, np.eye(width), atol=1e-8):
        raise TransferError(f"The rotation {matrix.shape} is not orthogonal or not of width {width}.")
    return matrix


def _key(rotation: np.ndarray) -> str:
    return digest(np.ascontiguousarray(rotation, dtype=np.float64).tobytes())

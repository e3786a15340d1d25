"""Head selection: seconds a task for each selector against the loop that runs the model once a head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.language import LanguageModel
from transfer.function_vectors.aie import answer_metric
from transfer.function_vectors.heads import heads_edited, shape_of
from transfer.function_vectors.prompts import Prompt


def naive_indirect_effects(language: LanguageModel, prompts: list[Prompt], mean: Tensor) -> np.ndarray:
    """The published procedure: one forward pass for every head of every prompt; float64 [prompts, layers, heads]."""
    n_layers, n_heads, width = shape_of(language)
    found = np.zeros((len(prompts), n_layers, n_heads))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        answer = torch.tensor(prompt.answer[:1])
        with torch.inference_mode():
            plain = answer_metric(language.model(ids, use_cache=False).logits[:, -1], answer, "probability")
            for layer in range(n_layers):
                for head in range(n_heads):

                    def change(at: int, x: Tensor, layer: int = layer, head: int = head) -> Tensor:
                        if at == layer:
                            x = x.clone()
                            x[:, -1, head * width : (head + 1) * width] = mean[layer, head].to(x.dtype)
                        return x

                    with heads_edited(language, change):
                        logits = language.model(ids, use_cache=False).logits[:, -1]
                    found[i, layer, head] = float(answer_metric(logits, answer, "probability") - plain)
    return found

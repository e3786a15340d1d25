"""A model that learns five symbol maps in context, where function vectors must be found: selectors, modes, controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.family import family_of
from models.language import LanguageModel
from transfer.function_vectors.evaluate import draw, evaluate
from transfer.function_vectors.prompts import Template
from transfer.function_vectors.select import Recipe, prepare, select
from transfer.function_vectors.tasks import Pair, Task
from transfer.function_vectors.tuning import tune
from transfer.function_vectors.vectors import build

SYMBOLS, TASKS, SHOTS, STEPS = 20, 5, 5, 450
NAMES = [chr(ord("a") + i) for i in range(SYMBOLS)]
TEMPLATE = Template(question="Q", answer=" A", separator="")
RECIPE = Recipe(shots=SHOTS, n_mean=60, n_score=12, template=TEMPLATE)


def tokenizer() -> Any:
    """One token for each of ``Q``, `` A`` and `` a`` …, byte-level so that parts of prompts can be traced."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["Q", "ĠA", *("Ġ" + name for name in NAMES), "Ġ", "A", *NAMES]
    merges = [("Ġ", "A"), *(("Ġ", name) for name in NAMES)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def train(maps: np.ndarray, vocab: int) -> Any:
    """A three-layer LLaMA on sequences of up to ``SHOTS`` + 1 solved examples of one random map."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = rng.integers(TASKS, size=64)
        x = np.stack([rng.permutation(SYMBOLS)[: SHOTS + 1] for _ in chosen])
        y = np.take_along_axis(maps[chosen], x, axis=1)
        block = np.stack([np.zeros_like(x), x + 2, np.ones_like(x), y + 2], axis=2).reshape(len(x), -1)
        ids = torch.from_numpy(block)
        at = torch.arange(2, ids.shape[1], 4)
        logits = model(ids).logits[:, at]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, at + 1].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.requires_grad_(False).eval()


@pytest.mark.slow
def test_vectors_of_a_trained_model_carry_their_task() -> None:
    # No two maps send a symbol to the same one, so that one map's answer is never another's.
    base = np.random.default_rng(0).permutation(SYMBOLS)
    maps = np.stack([np.roll(base, 3 * t + 1)[np.argsort(base)] for t in range(TASKS)])
    assert all(len(set(column)) == TASKS for column in maps.T)
    words = tokenizer()
    model = train(maps, len(words))
    language = LanguageModel("tiny:icl", "icl", family_of(model.config), model, words)
    tasks = [
        Task(f"map{i}", tuple(Pair(NAMES[a], NAMES[b]) for a, b in enumerate(targets)))
        for i, targets in enumerate(maps)
    ]
    prompts = [prepare(language, task, RECIPE) for task in tasks]
    heads = select(language, prompts, "aie").top(3)
    screened = select(language, prompts, "screened", k=3).top(3)
    assert [(h.layer, h.head) for h in screened] == [(h.layer, h.head) for h in heads]
    vectors = [build(language, entry, heads) for entry in prompts]
    found: dict[str, list[float]] = {}
    for i, (task, vector) in enumerate(zip(tasks, vectors, strict=True)):
        tuning = tune(language, vector.deltas, task.split()["valid"], template=TEMPLATE)
        result = evaluate(language, task, draw(language, task, vector), tuning, wrong=vectors[i - 1], draws=100)
        for estimate in result.estimates:
            if estimate.metric == "top1" and estimate.items == "all":
                found.setdefault(estimate.condition, []).append(estimate.value)
    top1 = {condition: float(np.mean(values)) for condition, values in found.items()}
    assert top1["clean_icl"] > 0.9 and top1["zero_shot"] < 0.4 and top1["shuffled_icl"] < 0.4, top1
    for mode in ("aggregated", "distributed"):
        steered = top1[f"zero_shot+{mode}"]
        assert steered > top1["zero_shot"] + 0.12, top1
        for control in ("wrong_task", "random_vector", "random_heads", "shuffled_heads"):
            assert steered > top1[f"zero_shot+{mode}/{control}"] + 0.12, (control, top1)

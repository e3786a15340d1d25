"""Head selection: prompts a minute of processor time, against the published loop, which runs the model once a head.

The limit is the rate of plain forward passes over the same prompts: no selector can do with less than one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.family import family_of
from models.language import LanguageModel
from tests.benchmarks.case import Peak, row
from transfer.function_vectors.aie import answer_metric, indirect_effects
from transfer.function_vectors.gradients import attribution_patching, gradient_activation, integrated_gradients
from transfer.function_vectors.heads import heads_edited, mean_outputs, shape_of
from transfer.function_vectors.lrp import relevance
from transfer.function_vectors.prompts import Prompt
from transfer.function_vectors.select import Recipe, prepare
from transfer.function_vectors.tasks import read_tasks

TOKENS = 64


def naive_indirect_effects(language: LanguageModel, prompts: list[Prompt], mean: Tensor) -> np.ndarray:
    """The published procedure: one forward pass for every head of every prompt; float64 [prompts, layers, heads]."""
    n_layers, n_heads, width = shape_of(language)
    found = np.zeros((len(prompts), n_layers, n_heads))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        answer = torch.tensor(prompt.answer[:1])
        with torch.inference_mode():
            plain = answer_metric(
                language.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1], answer, "probability"
            )
            for layer in range(n_layers):
                for head in range(n_heads):

                    def change(at: int, x: Tensor, layer: int = layer, head: int = head) -> Tensor:
                        if at == layer:
                            x = x.clone()
                            x[:, -1, head * width : (head + 1) * width] = mean[layer, head].to(x.dtype)
                        return x

                    with heads_edited(language, change):
                        logits = language.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
                    found[i, layer, head] = float(answer_metric(logits, answer, "probability") - plain)
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of one call: a busy machine changes it less than wall time."""
    with Peak():
        start = time.process_time()
        work()
        return time.process_time() - start


def toy() -> LanguageModel:
    """A random model as deep and with as many heads as Llama-3.2-3B (28 × 24), narrow enough for one core."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).requires_grad_(False).eval()
    tokenizer = LanguageModel.load("zoo:llama").tokenizer
    return LanguageModel("toy:28x24", "toy", family_of(config), model, tokenizer)


def compare(name: str, language: LanguageModel, prompts: list[Prompt], mean: Tensor, n_naive: int) -> None:
    """One row a selector; the loop runs on ``n_naive`` of the prompts, at the same length."""
    n = len(prompts)

    def forwards() -> None:
        with torch.inference_mode():
            for prompt in prompts:
                language.model(torch.tensor([prompt.ids]), use_cache=False, logits_to_keep=1)

    works: dict[str, Callable[[], object]] = {
        "aie": lambda: indirect_effects(language, prompts, mean),
        "attribution": lambda: attribution_patching(language, prompts, mean),
        "gradient": lambda: gradient_activation(language, prompts),
        "integrated": lambda: integrated_gradients(language, prompts, mean),
        "lrp": lambda: relevance(language, prompts, max_rank=10**9),
    }
    forwards()
    plain = n / min(cpu_seconds(forwards) for _ in range(3))
    loop = n_naive / cpu_seconds(lambda: naive_indirect_effects(language, prompts[:n_naive], mean))
    for method, work in works.items():
        work()
        row(
            f"fv.{method}-{name}",
            60 * n / cpu_seconds(work),
            "one forward a head",
            60 * loop,
            "prompts/min",
            60 * plain,
        )


def main() -> None:
    """A model of 672 heads at 64 tokens, and a task of a zoo model."""
    language = toy()
    rng = np.random.default_rng(0)
    lines = rng.integers(10, 2048, size=(8, TOKENS)).tolist()
    prompts = [Prompt(line, [int(rng.integers(10, 2048))], {}, str(i)) for i, line in enumerate(lines)]
    compare("672-heads-64-tokens", language, prompts, mean_outputs(language, prompts), 1)
    member = LanguageModel.load("zoo:llama")
    task = prepare(member, read_tasks("rule", ["copy"])[0], Recipe(n_mean=50))
    compare("zoo-llama-copy", member, task.scoring.corrupted, task.mean, 3)

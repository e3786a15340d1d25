"""Head scores on tiny random models of the four families, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.language import LanguageModel
from tests.benchmarks.fv import naive_indirect_effects
from tests.conftest import SENTENCES
from transfer.core.errors import TransferError
from transfer.function_vectors.aie import indirect_effects
from transfer.function_vectors.heads import last_outputs, mean_outputs, residual_deltas, shape_of
from transfer.function_vectors.prompts import icl_prompts
from transfer.function_vectors.tasks import read_tasks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_language(name: str, folder: Path, seed: int = 0, window: int | None = None) -> LanguageModel:
    """A random model with a tokenizer of its style; heads of qwen3 and mistral do not fill the width."""
    import dataclasses

    from transformers import AutoModelForCausalLM, Qwen2Config

    from models.family import family_of
    from models.zoo.recipe import ZOO
    from models.zoo.tokenizer import train_tokenizer
    from tests.conftest import SHAPES

    style = "qwen" if name.startswith("qwen") else name
    shape: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 3, **SHAPES[style]}
    spec = dataclasses.replace(ZOO[style], vocab_size=512, hook_layer=2, shape=shape)
    tokenizer: Any = train_tokenizer(spec, SENTENCES * 4, folder)
    spec = dataclasses.replace(spec, vocab_size=len(tokenizer))
    config: Any = spec.config(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if window is not None:
        config.sliding_window = window
    if name == "qwen2":
        shape.pop("head_dim")
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
            else:
                parameter.data.mul_(6)
    model.requires_grad_(False).eval().double()
    return LanguageModel(f"tiny:{name}", f"{name}{seed}", family_of(config), model, tokenizer)


@pytest.fixture(scope="session")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    return {name: tiny_language(name, tmp_path_factory.mktemp("fv") / name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def language(request: pytest.FixtureRequest, languages: dict[str, LanguageModel]) -> LanguageModel:
    return languages[request.param]


def some_prompts(language: LanguageModel, task: str = "copy", n: int = 3, shots: int = 3):
    parts = read_tasks("rule", [task])[0].split()
    return icl_prompts(language, parts["train"], parts["valid"], shots=shots, n=n)


def test_a_batched_aie_is_the_naive_aie(language: LanguageModel) -> None:
    found = some_prompts(language)
    mean = mean_outputs(language, found.clean)
    slow = naive_indirect_effects(language, found.corrupted, mean)
    fast = indirect_effects(language, found.corrupted, mean)
    assert np.abs(slow).max() > 1e-6
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-12)
    chunked = indirect_effects(language, found.corrupted, mean, memory=1)
    np.testing.assert_allclose(chunked, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "attention"), [("llama", "eager"), ("mistral", "sdpa"), ("mistral", "eager")])
def test_a_holds_with_eager_attention_and_with_a_sliding_window(name: str, attention: str, tmp_path: Path) -> None:
    language = tiny_language(name, tmp_path / name, window=12 if name == "mistral" else None)
    language.model.set_attn_implementation(attention)
    found = some_prompts(language, n=2)
    assert len(found.corrupted[0].ids) > 24
    mean = mean_outputs(language, found.clean)
    slow = naive_indirect_effects(language, found.corrupted, mean)
    # Eager attention takes its softmax in float32.
    slack = 1e-12 if attention == "sdpa" else 5e-9
    np.testing.assert_allclose(indirect_effects(language, found.corrupted, mean), slow, rtol=0, atol=slack)


def test_some_heads_only(language: LanguageModel) -> None:
    found = some_prompts(language, n=2)
    mean = mean_outputs(language, found.clean)
    every = indirect_effects(language, found.corrupted, mean, metric="logit")
    some = indirect_effects(language, found.corrupted, mean, metric="logit", heads=[(2, 1), (0, 3)])
    assert np.isfinite(some).sum() == 4
    np.testing.assert_allclose(some[:, [2, 0], [1, 3]], every[:, [2, 0], [1, 3]], atol=1e-10)
    with pytest.raises(TransferError, match=r"Head \(7, 0\) does not exist"):
        indirect_effects(language, found.corrupted, mean, heads=[(7, 0)])
    with pytest.raises(TransferError, match="Mean head outputs are"):
        indirect_effects(language, found.corrupted, mean[:2])


def test_padding_does_not_reach_head_outputs(language: LanguageModel) -> None:
    found = some_prompts(language, "next_item", n=5)
    assert len({len(p.ids) for p in found.clean}) > 1
    rows = {int(i): z for block, zs in last_outputs(language, found.clean) for i, z in zip(block, zs, strict=True)}
    for i, prompt in enumerate(found.clean):
        alone = next(last_outputs(language, [prompt]))[1][0]
        torch.testing.assert_close(rows[i], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean_outputs(language, found.clean), torch.stack(list(rows.values())).mean(0))


def test_g_head_width_is_read_off_the_weights(languages: dict[str, LanguageModel]) -> None:
    assert shape_of(languages["qwen3"]) == (3, 4, 16) and languages["qwen3"].d_model == 48
    assert shape_of(languages["mistral"]) == (3, 4, 12) and languages["mistral"].d_model == 40
    assert shape_of(languages["qwen2"]) == (3, 4, 12)


def test_deltas_are_what_the_heads_add(language: LanguageModel) -> None:
    z = torch.randn(shape_of(language), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = [mixer.weight for mixer in language.family.head_mixers(language.model)]
    expected = torch.stack([w @ one.reshape(-1) for w, one in zip(weights, z, strict=True)])
    torch.testing.assert_close(residual_deltas(language, z), expected)

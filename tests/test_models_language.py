"""One language adapter for three families: load, capture, steer, generate, score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.family import FAMILIES, family_of
from models.hooks import output_at
from models.language import LanguageModel, batches
from transfer.core.errors import TransferError

TEXTS = ["How do I bake a cake?", "x", "Tell me a joke about computers, coffee and dogs 🙂", "two words"]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen"])
def language(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel.load(f"path:{request.getfixturevalue('tiny_' + request.param)}")


@pytest.fixture(scope="module")
def ids(language: LanguageModel) -> list[list[int]]:
    return [r.ids for r in language.render_many(TEXTS)]


def hooks_left(language: LanguageModel) -> int:
    return sum(len(m._forward_hooks) for m in language.model.modules())


def test_families(language: LanguageModel) -> None:
    config = language.model.config
    family = family_of(config)
    assert family.part(language.model, family.base) is language.model.base_model
    assert family.part(language.model, family.unembedding) is language.model.get_output_embeddings()
    assert family.part(language.model, family.embedding) is language.model.get_input_embeddings()
    heads = family.heads(config)
    attention = family.part(language.model, family.layers)[0].self_attn
    assert attention.o_proj.in_features == heads.n_heads * heads.head_dim
    assert attention.k_proj.out_features == heads.n_kv_heads * heads.head_dim
    assert len({f.name for f in FAMILIES}) == 3


def test_unknown_family_is_named() -> None:
    from transformers import GPT2Config

    with pytest.raises(TransferError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())


def test_capture_equals_hidden_states(language: LanguageModel, ids: list[list[int]]) -> None:
    before = hooks_left(language)
    found = {layer: language.capture(ids, layer, token_budget=100) for layer in range(language.n_layers + 1)}
    assert hooks_left(language) == before
    for i, line in enumerate(ids):
        with torch.no_grad():
            out = language.model(torch.tensor([line]), output_hidden_states=True)
        for layer in range(language.n_layers):
            assert found[layer][i].dtype == torch.float32
            torch.testing.assert_close(found[layer][i], out.hidden_states[layer][0], rtol=1e-4, atol=1e-4)
        # The last one comes before the final norm, which transformers' own last entry does not.
        norm = language.family.part(language.model, language.family.norm)
        with torch.no_grad():
            torch.testing.assert_close(
                norm(found[language.n_layers][i]), out.hidden_states[-1][0], rtol=1e-4, atol=1e-4
            )
        assert not torch.allclose(found[language.n_layers][i], out.hidden_states[-1][0], atol=1e-2)


def test_capture_stops_at_the_layer(language: LanguageModel, ids: list[list[int]]) -> None:
    ran = []
    layers = language.family.part(language.model, language.family.layers)
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(layers)]
    try:
        language.capture(ids[:1], 1)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


def test_capture_does_not_depend_on_batching(language: LanguageModel, ids: list[list[int]]) -> None:
    alone = [language.capture([line], 2)[0] for line in ids]
    for together in (language.capture(ids, 2), language.capture(ids[::-1], 2, token_budget=1)[::-1]):
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert language.capture([[], ids[0]], 1)[0].shape == (0, language.d_model)


def test_a_shared_beginning_runs_once(language: LanguageModel, ids: list[list[int]]) -> None:
    begin = [5, 9, 7]
    lines = [begin + line for line in ids] + [[]]
    whole = language.capture(lines, 2)
    tokens = []
    with language.family.site(language.model, 1).register_forward_hook(lambda _m, _a, out: tokens.append(len(out[0]))):
        for rows, hidden in language.stream(lines, 2, token_budget=64, shared=3):
            for i, states in zip(rows, hidden, strict=True):
                torch.testing.assert_close(states[: len(ids[i])], whole[i][3:], rtol=1e-4, atol=1e-5)
    assert tokens[0] == 3 and max(tokens[1:]) <= max(map(len, ids))
    assert not list(language.stream([[], []], 2, shared=2))


def test_capture_refuses_other_layers(language: LanguageModel, ids: list[list[int]]) -> None:
    for layer in (-1, 4):
        with pytest.raises(TransferError, match=r"layers 0 \(embeddings\) to 3"):
            language.capture(ids, layer)


def test_batches_fit_the_budget() -> None:
    lengths = np.array([5, 0, 9, 1, 5, 40])
    groups = batches(lengths, 20)
    assert sorted(np.concatenate(groups).tolist()) == [0, 2, 3, 4, 5]
    assert all(len(g) == 1 or lengths[g].max() * len(g) <= 20 for g in groups)


def test_steering_shifts_the_stream(language: LanguageModel, ids: list[list[int]]) -> None:
    line = torch.tensor([ids[0], ids[0]])
    vectors = torch.stack([torch.ones(language.d_model), torch.zeros(language.d_model)])
    clean = language.capture([ids[0]], 2)[0]
    with torch.no_grad():
        # transformers installs its own capture hooks on first use: steering must come before them.
        language.model(line, output_hidden_states=True)
        with language.steering(2, vectors, strength=3.0, start=torch.tensor([4, 0])):
            states = language.model(line, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(states[1], clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[0, :4], clean[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[0, 4:], clean[4:] + 3, rtol=1e-4, atol=1e-4)


def test_steering_follows_the_cache(language: LanguageModel, ids: list[list[int]]) -> None:
    line = torch.tensor([ids[0]])
    vector = torch.randn(1, language.d_model, generator=torch.Generator().manual_seed(0))
    for start in (None, torch.tensor([line.shape[1] - 2]), torch.tensor([line.shape[1] + 1])):
        with torch.no_grad(), language.steering(2, vector, strength=2.0, start=start):
            whole = language.model(line, use_cache=False).logits
        longer = torch.cat([line, line[:, :3]], dim=1)
        with torch.no_grad(), language.steering(2, vector, strength=2.0, start=start):
            whole = language.model(longer, use_cache=False).logits[:, -1]
        with torch.no_grad(), language.steering(2, vector, strength=2.0, start=start):
            out = language.model(line, use_cache=True)
            for i in range(3):
                out = language.model(line[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], whole, rtol=1e-3, atol=1e-3)


def test_a_hook_that_does_not_fire_is_an_error(language: LanguageModel) -> None:
    before = hooks_left(language)
    with pytest.raises(TransferError, match="never fired"), language.steering(1, torch.zeros(1, language.d_model)):
        pass
    with pytest.raises(TransferError, match="never reached"):
        output_at(torch.nn.Linear(1, 1), lambda: None)
    with pytest.raises(KeyError), language.steering(1, torch.zeros(1, language.d_model)):
        raise KeyError
    assert hooks_left(language) == before


def test_generation_is_decided_by_the_seed(language: LanguageModel) -> None:
    prompts = ["Requests:\n- How do", "- a", ""]
    state = torch.get_rng_state()
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=0.9, top_p=0.95, batch_size=2)
    first = language.generate(prompts, seed=3, **options)
    assert first == language.generate(prompts, seed=3, **options)
    assert first != language.generate(prompts, seed=4, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 3


def test_greedy_generation_matches_a_loop_without_cache_or_padding(language: LanguageModel) -> None:
    prompts = ["How do I bake a cake", "x"]
    steer = torch.randn(2, language.d_model, generator=torch.Generator().manual_seed(1)) * 3
    for vectors in (None, steer):
        made = language.generate(
            prompts, max_new_tokens=6, temperature=0.0, steer=None if vectors is None else (2, vectors)
        )
        for i, prompt in enumerate(prompts):
            line = language.renderer.plain([prompt])[0]
            start = len(line)
            for _ in range(6):
                with torch.no_grad():
                    if vectors is None:
                        logits = language.model(torch.tensor([line]), use_cache=False).logits
                    else:
                        with language.steering(2, vectors[i : i + 1]):
                            logits = language.model(torch.tensor([line]), use_cache=False).logits
                line.append(int(logits[0, -1].argmax()))
                if line[-1] in language.renderer.bytes.special:
                    line.pop()
                    break
            assert made[i] == language.renderer.bytes.join(line[start:]).decode("utf8", errors="replace")
    assert made != language.generate(prompts, max_new_tokens=6, temperature=0.0)


def test_generation_stops_rows_at_a_string(language: LanguageModel) -> None:
    prompts = [f"- {i}" for i in range(12)]
    free = language.generate(prompts, max_new_tokens=30, seed=0, temperature=1.5)
    target = next(c for text in free for c in text[1:6] if c.isascii() and c.isalpha())
    stopped = language.generate(prompts, max_new_tokens=30, seed=0, temperature=1.5, stop=target)
    assert all(target not in text for text in stopped)
    assert any(len(s) < len(f) for s, f in zip(stopped, free, strict=True))


def test_generation_refuses_what_does_not_fit(language: LanguageModel) -> None:
    with pytest.raises(TransferError, match="room for"):
        language.generate(["word " * 1100], max_new_tokens=4)
    with pytest.raises(TransferError, match="Steering vectors are"):
        language.generate(["a"], max_new_tokens=2, steer=(1, torch.zeros(2, language.d_model)))


def test_log_likelihood(language: LanguageModel) -> None:
    texts = ["How do I bake a cake?", "Tell me a joke 🙂", "a b " * 700]
    nats, n_bytes = language.log_likelihood(texts[:2], token_budget=64)
    expected = 0.0
    for text in texts[:2]:
        line = torch.tensor(language.renderer.plain([text]))
        with torch.no_grad():
            logits = language.model(line).logits[0, :-1].double()
        expected -= float(logits.log_softmax(-1).gather(-1, line[0, 1:, None]).sum())
    assert nats == pytest.approx(expected, rel=1e-5)
    whole = sum(len(t.encode()) for t in texts[:2])
    assert n_bytes == whole if language.tokenizer.bos_token else 0 < whole - n_bytes < 12
    # A text longer than the context is scored in windows, all of it.
    long_nats, _ = language.log_likelihood(texts[2:])
    assert np.isfinite(long_nats) and long_nats > 0


def test_unembedding_reads_the_residual_stream(language: LanguageModel, ids: list[list[int]]) -> None:
    last = language.capture(ids[:1], language.n_layers)[0]
    rms = (last.pow(2).mean(-1, keepdim=True) + language.model.config.rms_norm_eps).sqrt()
    with torch.no_grad():
        logits = language.model(torch.tensor(ids[:1])).logits[0]
    torch.testing.assert_close(last / rms @ torch.from_numpy(language.unembedding()).T, logits, rtol=1e-3, atol=1e-3)
    some = np.array([5, 2, 9])
    assert np.array_equal(language.unembedding(some), language.unembedding()[some])


def test_hash_follows_the_files(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    first = LanguageModel.load(f"path:{tiny_llama}")
    assert LanguageModel.load(f"path:{copy}").hash == first.hash
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert LanguageModel.load(f"path:{copy}").hash != first.hash


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("llama", "is not a model reference"),
        ("zoo:", "is not a model reference"),
        ("ftp:x", "is not a model reference"),
        ("zoo:nobody", "no model zoo:nobody"),
        ("zoo:../../tests", "leads out of the zoo"),
        ("path:nowhere", "no model at nowhere"),
        ("hub:org/name", "names no revision"),
        ("hub:org/name@main", "could not be loaded"),
    ],
)
def test_bad_references(ref: str, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        LanguageModel.load(ref)


def test_bad_folders(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="no config.json"):
        LanguageModel.load(f"path:{tmp_path}")
    with pytest.raises(TransferError, match="Unknown dtype"):
        LanguageModel.load(f"path:{tiny_llama}", dtype="float8")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(TransferError, match="could not be loaded"):
        LanguageModel.load(f"path:{copy}")
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(TransferError, match="lacks .* weights, first model.layers.3"):
        LanguageModel.load(f"path:{copy}")
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(TransferError, match="not supported"):
        LanguageModel.load(f"path:{copy}")
    (copy / "model.safetensors").unlink()
    with pytest.raises(TransferError, match="no weights"):
        LanguageModel.load(f"path:{copy}")

"""Gradient scores, integrated gradients and relevance on tiny random models of the four families, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.language import LanguageModel
from tests.test_fv_heads import FAMILIES, some_prompts, tiny_language
from transfer.core.errors import TransferError
from transfer.function_vectors.aie import answer_metric, indirect_effects
from transfer.function_vectors.attention import last_row, queries_read
from transfer.function_vectors.gradients import attribution_patching, gradient_activation, integrated_gradients, steps
from transfer.function_vectors.heads import heads_edited, last_outputs, mean_outputs
from transfer.function_vectors.lrp import lrp, relevance


@pytest.fixture(scope="session")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    return {name: tiny_language(name, tmp_path_factory.mktemp("fvg") / name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def language(request: pytest.FixtureRequest, languages: dict[str, LanguageModel]) -> LanguageModel:
    return languages[request.param]


def test_b_attribution_patching_is_the_aie_for_small_changes(language: LanguageModel) -> None:
    prompt = some_prompts(language, n=1).corrupted
    z = next(last_outputs(language, prompt))[1][0]
    noise = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1)) * z.std()

    def correlation(size: float, metric) -> float:
        mean = z + size * noise
        exact = indirect_effects(language, prompt, mean, metric=metric)
        quick = attribution_patching(language, prompt, mean, metric=metric)
        return float(np.corrcoef(exact.ravel(), quick.ravel())[0, 1])

    for metric in ("probability", "log_probability", "logit"):
        assert correlation(1e-3, metric) > 0.99
    assert correlation(3.0, "probability") < 0.999  # a first-order estimate: the check above can fail


def test_gradient_activation_by_hand(language: LanguageModel) -> None:
    prompts = some_prompts(language, "next_item", n=4).clean
    found = gradient_activation(language, prompts, metric="logit")
    prompt = prompts[1]
    ids, answer = torch.tensor([prompt.ids]), torch.tensor(prompt.answer[:1])
    leaves: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def edit(_layer: int, x: torch.Tensor) -> torch.Tensor:
        outputs.append(x[0, -1].detach())
        leaves.append(torch.zeros_like(x[:, -1], requires_grad=True))
        return torch.cat([x[:, :-1], x[:, -1:] + leaves[-1][:, None]], dim=1)

    with heads_edited(language, edit):
        value = answer_metric(language.model(ids, use_cache=False).logits[:, -1], answer, "logit")
    slow = torch.stack([z * g[0] for z, g in zip(outputs, torch.autograd.grad(value.sum(), leaves), strict=True)])
    width = slow.shape[1] // found.shape[2]
    np.testing.assert_allclose(found[1], slow.view(-1, found.shape[2], width).sum(-1).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("later", ["respond", "frozen"])
def test_integrated_gradients_are_complete(language: LanguageModel, later) -> None:
    found = some_prompts(language, n=2)
    mean = mean_outputs(language, found.clean)
    scores = integrated_gradients(language, found.corrupted, mean, n_steps=48, metric="logit", later_heads=later)
    for prompt, score in zip(found.corrupted, scores, strict=True):
        ids, answer = torch.tensor([prompt.ids]), torch.tensor(prompt.answer[:1])
        own = next(last_outputs(language, [prompt]))[1][0].flatten(1)

        def end(layer: int, x: torch.Tensor, own: torch.Tensor = own) -> torch.Tensor:
            x = x.clone()
            clean = mean[layer].flatten()
            x[0, -1] = clean if later == "frozen" else x[0, -1] + clean - own[layer]
            return x

        with torch.no_grad():
            start = answer_metric(language.model(ids).logits[:, -1], answer, "logit")
            with heads_edited(language, end):
                stop = answer_metric(language.model(ids).logits[:, -1], answer, "logit")
        gap = float(stop - start)
        assert abs(gap) > 1e-3
        assert score.sum() == pytest.approx(gap, abs=2e-3 * max(1.0, abs(gap)))
    with pytest.raises(TransferError, match="no integral"):
        integrated_gradients(language, found.corrupted, mean, n_steps=1)


def test_c_lrp_changes_gradients_of_this_model_only_and_is_undone(language: LanguageModel, tmp_path: Path) -> None:
    other = tiny_language("llama", tmp_path / "other", seed=1)
    prompts = some_prompts(language, n=2).clean
    theirs = some_prompts(other, n=2).clean
    ids = torch.tensor([prompts[0].ids])
    dropout, before = torch.nn.Dropout(0.5), torch.nn.Dropout.forward
    plain = language.model(ids).logits
    usual, usual_other = gradient_activation(language, prompts), gradient_activation(other, theirs)
    with pytest.raises(RuntimeError, match="stop"), lrp(language):
        assert torch.equal(language.model(ids).logits, plain)
        assert np.abs(gradient_activation(language, prompts) - usual).max() > 1e-6
        assert np.array_equal(gradient_activation(other, theirs), usual_other)
        assert torch.nn.Dropout.forward is before and (dropout.train()(torch.ones(1000)) == 0).any()
        raise RuntimeError("stop")
    assert np.array_equal(gradient_activation(language, prompts), usual)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in language.model.modules())


def test_d_attention_times_its_gradient_adds_up_to_the_head_output(language: LanguageModel) -> None:
    prompts = some_prompts(language, n=2).clean
    with lrp(language), queries_read(language) as queries:
        for _, ids, step in steps(language, prompts, "logit"):
            for layer, query in enumerate(queries.rows[-language.n_layers :]):
                weights, values = last_row(language, layer, query, step.cache, ids.shape[1])
                gradient = torch.einsum("bhtd,bhd->bht", values, step.gradient[:, layer])
                whole = (step.outputs * step.gradient).sum(-1)[:, layer]
                torch.testing.assert_close((weights * gradient).sum(-1), whole, rtol=1e-5, atol=1e-8)
            queries.rows.clear()


def test_last_rows_are_those_of_eager_attention(language: LanguageModel) -> None:
    prompts = some_prompts(language, n=1).clean
    with queries_read(language) as queries:
        _, ids, step = next(steps(language, prompts, "logit"))
    language.model.set_attn_implementation("eager")
    try:
        eager = language.model(ids, output_attentions=True).attentions
    finally:
        language.model.set_attn_implementation("sdpa")
    for layer, query in enumerate(queries.rows[-language.n_layers :]):
        row = last_row(language, layer, query, step.cache, ids.shape[1])[0]
        torch.testing.assert_close(row, eager[layer][:, :, -1].double(), rtol=0, atol=1e-5)


def test_relevance_is_conserved_below_the_logit(language: LanguageModel) -> None:
    """Norms, gated products and bias-free maps lose nothing: the stream into the last MLP holds the whole logit."""
    family, model = language.family, language.model
    layer = family.part(model, family.layers)[-1]
    streams: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        streams.append(args[0].detach().requires_grad_())
        return (streams[-1],)

    ids = torch.tensor([some_prompts(language, n=1).clean[0].ids])
    with lrp(language):
        handle = layer.post_attention_layernorm.register_forward_pre_hook(keep)
        model(ids)
        handle.remove()
        stream = streams[0]
        hidden = stream + layer.mlp(layer.post_attention_layernorm(stream))
        logit = family.part(model, family.unembedding)(family.part(model, family.norm)(hidden))[0, -1, 7]
        (gradient,) = torch.autograd.grad(logit, stream)
    assert ((stream * gradient).sum() / logit).item() == pytest.approx(1, rel=1e-5)
    hidden = stream + layer.mlp(layer.post_attention_layernorm(stream))
    logit = family.part(model, family.unembedding)(family.part(model, family.norm)(hidden))[0, -1, 7]
    (gradient,) = torch.autograd.grad(logit, stream)
    assert ((stream * gradient).sum() / logit).item() != pytest.approx(1, rel=1e-2)


def test_the_rules_by_hand(language: LanguageModel) -> None:
    """Gradients on either side of each rule: shares at products, input × gradient kept at norms and activations."""
    layer = language.family.part(language.model, language.family.layers)[1]
    inner: dict[str, torch.Tensor] = {}
    outer: dict[str, torch.Tensor] = {}

    def leaf(tensor: Any, name: str) -> torch.Tensor:
        inner[name] = tensor.detach().requires_grad_()
        return inner[name]

    def keep(name: str, tensor: Any) -> None:
        outer[name] = tensor

    ids = torch.tensor([some_prompts(language, n=1).clean[0].ids])
    projections = {name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")}
    kept = {"norm": layer.post_attention_layernorm, "activation": layer.mlp.act_fn}

    def relevances(names: dict[str, torch.nn.Module], at_input: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        for name, module in names.items():
            if at_input:
                first = module.register_forward_pre_hook(lambda _m, args, name=name: (leaf(args[0], name),))
            else:
                first = module.register_forward_hook(lambda _m, _a, out, name=name: leaf(out, name))
            with lrp(language):
                last = module.register_forward_hook(lambda _m, _a, out, name=name: keep(name, out))
                logit = language.model(ids, use_cache=False).logits[0, -1, 7]
                found[name] = torch.autograd.grad(logit, [inner[name], outer[name]])
                last.remove()
            first.remove()
        return found

    for name, (below, above) in relevances(projections, at_input=False).items():
        assert above.abs().max() > 0
        torch.testing.assert_close(below, above * {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.5}[name])
    for name, (below, above) in relevances(kept, at_input=True).items():
        assert above.abs().max() > 0
        torch.testing.assert_close(inner[name] * below, outer[name] * above, rtol=1e-5, atol=1e-9)


def test_relevance_of_token_sets(language: LanguageModel) -> None:
    prompts = some_prompts(language, n=4).clean
    every, skipped = relevance(language, prompts, max_rank=10_000)
    assert skipped == 0 and np.isfinite(every).all()
    labels, _ = relevance(language, prompts, keys="label", max_rank=10_000)
    most, _ = relevance(language, prompts, keys="all_but_bos", max_rank=10_000)
    assert (labels >= 0).all() and (most >= labels).all() and (most > labels).any()
    with pytest.raises(TransferError, match="have no token set 'instruction'"):
        relevance(language, prompts, keys="instruction")
    with pytest.raises(TransferError, match="ranks among the first 0"):
        relevance(language, prompts, max_rank=0)

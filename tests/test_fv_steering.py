"""The artefact, both ways of steering, selectors, and evaluation on tiny random models of the four families."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aligners.maps import fit_map
from models.language import LanguageModel
from models.rotation import rotated_model
from tests.conftest import SENTENCES
from tests.test_fv_heads import FAMILIES, tiny_language
from transfer.core.errors import TransferError
from transfer.function_vectors.answers import answers, steering_with
from transfer.function_vectors.evaluate import Drawn, draw, evaluate, seed_item_interval
from transfer.function_vectors.heads import heads_edited
from transfer.function_vectors.lrp import relevance
from transfer.function_vectors.scores import HeadScores
from transfer.function_vectors.select import METHODS, Recipe, induction_scores, prepare, random_like, select
from transfer.function_vectors.steering import Plan, steered
from transfer.function_vectors.tasks import Pair, Task, read_tasks
from transfer.function_vectors.tuning import grid, tune, zero_shot
from transfer.function_vectors.vectors import FunctionVector, build, random_deltas, shuffled_heads

RECIPE = Recipe(shots=3, n_mean=6, n_score=4)
AGGREGATED, DISTRIBUTED = Plan("aggregated", 1.5, 2), Plan("distributed", 1.5)


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    return {name: tiny_language(name, tmp_path_factory.mktemp("fvs") / name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def language(request: pytest.FixtureRequest, languages: dict[str, LanguageModel]) -> LanguageModel:
    return languages[request.param]


def built(language: LanguageModel, name: str = "copy", k: int = 4) -> FunctionVector:
    prompts = prepare(language, read_tasks("rule", [name])[0], RECIPE)
    return build(language, prompts, select(language, [prompts], "attribution").top(k), method="attribution")


def final(language: LanguageModel, ids: torch.Tensor, *blocks) -> torch.Tensor:
    with torch.inference_mode():
        if not blocks:
            return language.model(ids, use_cache=False).logits
        with blocks[0]:
            return language.model(ids, use_cache=False).logits


def test_e_deltas_do_what_the_outputs_do(language: LanguageModel) -> None:
    """Adding mean outputs to heads equals adding deltas behind attention; aggregated adds their sum at one layer."""
    vector = built(language)
    ids = torch.tensor(language.renderer.plain([SENTENCES[0]]))
    width = vector.outputs.shape[1]

    def add(layer: int, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for head, z in zip(vector.heads, vector.outputs, strict=True):
            if head.layer == layer:
                x[:, -1, head.head * width : (head.head + 1) * width] += 1.5 * torch.from_numpy(z)
        return x

    by_outputs = final(language, ids, heads_edited(language, add))
    by_deltas = final(language, ids, steered(language, vector.deltas, DISTRIBUTED))
    torch.testing.assert_close(by_deltas, by_outputs, rtol=0, atol=1e-5)
    whole = torch.zeros(1, language.d_model, dtype=torch.float64)
    whole += torch.from_numpy(1.5 * vector.total)
    last = torch.tensor([ids.shape[1] - 1])
    by_hand = final(language, ids, language.steering(2, whole, start=last))
    by_sum = final(language, ids, steered(language, vector.deltas, AGGREGATED))
    torch.testing.assert_close(by_sum, by_hand, rtol=0, atol=1e-6)
    np.testing.assert_allclose(vector.total, vector.deltas.sum(0))


@pytest.mark.parametrize("plan", [AGGREGATED, DISTRIBUTED], ids=["aggregated", "distributed"])
def test_f_steering_changes_the_logits_of_the_last_token_only(language: LanguageModel, plan: Plan) -> None:
    vector = built(language)
    ids = torch.tensor(language.renderer.plain([SENTENCES[0]]))
    plain, changed = final(language, ids), final(language, ids, steered(language, vector.deltas, plan))
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-3
    assert torch.equal(changed[:, :-1], plain[:, :-1])
    at = torch.tensor([3])
    early = final(language, ids, steered(language, vector.deltas, plan, at=at))
    assert torch.equal(early[:, :3], plain[:, :3]) and (early[:, 3] - plain[:, 3]).abs().max() > 1e-3


@pytest.mark.parametrize("every", [False, True], ids=["prompt", "every"])
@pytest.mark.parametrize("plan", [AGGREGATED, DISTRIBUTED], ids=["aggregated", "distributed"])
def test_generation_with_a_cache_is_generation_without(language: LanguageModel, plan: Plan, every: bool) -> None:
    vector = built(language)
    prompts = [SENTENCES[0], SENTENCES[8], "Q: chair\nA:"]
    with steered(language, vector.deltas, plan, every=every):
        quick = language.generate(prompts, max_new_tokens=6, temperature=0, batch_size=2)
    table, slow = language.renderer.bytes, []
    for line in language.renderer.plain(prompts):
        ids, end = list(line), torch.tensor([len(line) - 1])
        for _ in range(6):
            block = steered(language, vector.deltas, plan, at=end, every=every)
            token = int(final(language, torch.tensor([ids]), block)[0, -1].argmax())
            if token in table.special:
                break
            ids.append(token)
        slow.append(table.join(ids[len(line) :]).decode("utf8", errors="replace"))
    assert quick == slow
    assert quick != language.generate(prompts, max_new_tokens=6, temperature=0)


def test_steering_refuses_what_would_do_nothing(language: LanguageModel) -> None:
    vector = built(language)
    with pytest.raises(TransferError, match="never fired"), steered(language, vector.deltas, DISTRIBUTED):
        pass
    with pytest.raises(TransferError, match="nothing to steer"), steered(language, 0 * vector.deltas, DISTRIBUTED):
        pass
    with pytest.raises(TransferError, match="Residual deltas are"), steered(language, vector.deltas[:1], DISTRIBUTED):
        pass
    with pytest.raises(TransferError, match="Layer 9 does not exist"):
        final(language, torch.tensor([[1, 2]]), steered(language, vector.deltas, Plan("aggregated", 1, 9)))
    with pytest.raises(TransferError, match="1 prompt ends are given for 2 rows"):
        ids = torch.tensor([[1, 2], [3, 4]])
        final(language, ids, steered(language, vector.deltas, DISTRIBUTED, at=torch.tensor([1])))
    with pytest.raises(TransferError, match="aggregated with layer None"):
        Plan("aggregated")
    with pytest.raises(TransferError, match="distributed with layer 2"):
        Plan("distributed", 1.0, 2)
    with pytest.raises(TransferError, match="scale is nan"):
        Plan("distributed", float("nan"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in language.model.modules())


def test_the_artefact_comes_back_and_refuses_another_model(language: LanguageModel, tmp_path: Path) -> None:
    vector = built(language)
    vector.save(tmp_path / "v")
    again = FunctionVector.load(tmp_path / "v")
    for field in dataclasses.fields(vector):
        one, other = getattr(vector, field.name), getattr(again, field.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, field.name
    again.check(language)
    with pytest.raises(TransferError, match="mean nothing in another model"):
        again.check(dataclasses.replace(language, hash="other"))
    record = json.loads((tmp_path / "v" / "vector.json").read_text())
    (tmp_path / "v" / "vector.json").write_text(json.dumps({**record, "task_hash": "x"}))
    with pytest.raises(TransferError, match="do not belong together"):
        FunctionVector.load(tmp_path / "v")
    (tmp_path / "v" / "vector.json").write_text(json.dumps({**record, "kind": "head scores"}))
    with pytest.raises(TransferError, match="holds no function vector"):
        FunctionVector.load(tmp_path / "v")


@pytest.mark.parametrize("method", METHODS)
def test_every_selector_scores_every_head(languages: dict[str, LanguageModel], method, tmp_path: Path) -> None:
    language = languages["qwen3"]
    prompts = [prepare(language, task, RECIPE) for task in read_tasks("rule", ["copy", "next_item"])]
    if method == "lrp":
        with pytest.raises(TransferError, match="ranks among the first 5"):
            select(language, prompts, method)
        return
    scores = select(language, prompts, method, k=2, n_steps=4)
    measured = int(np.isfinite(scores.values).sum())
    assert measured == (6 if method == "screened" else 12)
    assert scores.each.shape == (2, 3, 4) and [h.score for h in scores.top(3)] == sorted(
        (h.score for h in scores.top(3)), reverse=True
    )
    scores.save(tmp_path)
    again = HeadScores.load(tmp_path)
    assert np.array_equal(again.each, scores.each, equal_nan=True) and again.top(4, "copy") == scores.top(4, "copy")
    assert dataclasses.asdict(again)["tasks"] == ("copy", "next_item")
    with pytest.raises(TransferError, match="40 heads are asked for"):
        scores.top(40)
    with pytest.raises(TransferError, match="no scores for task x"):
        scores.top(1, "x")


def test_screening_ranks_by_exact_effects(languages: dict[str, LanguageModel]) -> None:
    language = languages["llama"]
    prompts = [prepare(language, read_tasks("rule", ["plural"])[0], RECIPE)]
    screened, exact = select(language, prompts, "screened", k=2), select(language, prompts, "aie")
    known = np.isfinite(screened.each)
    np.testing.assert_allclose(screened.each[known], exact.each[known], atol=1e-12)
    assert select(language, prompts, "screened", k=4).top(4) == exact.top(4)


@pytest.mark.parametrize("method", ["aie", "screened", "attribution", "gradient", "integrated", "norm"])
def test_the_one_head_that_writes_is_found(method, tmp_path: Path) -> None:
    """All heads but one are cut off from the stream: nothing else may score."""
    language = tiny_language("qwen3", tmp_path / "planted")
    width = 16
    for layer, mixer in enumerate(language.family.head_mixers(language.model)):
        for head in range(4):
            if (layer, head) != (1, 2):
                mixer.weight.data[:, head * width : (head + 1) * width] = 0
    prompts = [prepare(language, read_tasks("rule", ["plural"])[0], RECIPE)]
    values = select(language, [prompts[0]], method, k=4, n_steps=4).values
    assert abs(values[1, 2]) > 1e-9
    values[1, 2] = 0
    assert np.nanmax(np.abs(values)) == 0


def test_half_precision_scores_stay_finite(tmp_path: Path) -> None:
    language = tiny_language("llama", tmp_path / "half")
    language.model.bfloat16()
    prompts = [prepare(language, read_tasks("rule", ["copy"])[0], RECIPE)]
    for method in ("aie", "attribution", "gradient", "integrated", "induction"):
        assert np.isfinite(select(language, prompts, method, n_steps=3).values).all()
    scores, _ = relevance(language, prompts[0].scoring.clean, keys="label", max_rank=10_000)
    assert np.isfinite(scores).all()
    vector = build(language, prompts[0], random_like(built(language).heads, 4, 0))
    queries, _ = zero_shot(language, prompts[0].task.pairs[:3], RECIPE.template)
    plain, changed = (
        answers(language, queries, s) for s in (None, steering_with(language, vector.deltas, DISTRIBUTED))
    )
    assert np.abs(plain.nll - changed.nll).max() > 0


def test_instruction_prompts_select_too(language: LanguageModel) -> None:
    recipe = dataclasses.replace(RECIPE, kind="instruction")
    prompts = prepare(language, read_tasks("rule", ["copy"])[0], recipe)
    assert len(prompts.scoring.pairs) == 4 and np.isfinite(select(language, [prompts], "aie").values).all()
    with pytest.raises(TransferError, match="has no instructions"):
        prepare(language, dataclasses.replace(prompts.task, instructions=()), recipe)


def test_induction_scores_are_attention_weights(languages: dict[str, LanguageModel]) -> None:
    scores = induction_scores(languages["llama"], n=4)
    assert scores.shape == (4, 3, 4) and (scores >= 0).all() and (scores <= 1).all()
    assert np.array_equal(scores, induction_scores(languages["llama"], n=4))


def test_controls_keep_what_they_should(language: LanguageModel) -> None:
    vector = built(language)
    noise = random_deltas(vector, 0)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=1), np.linalg.norm(vector.deltas, axis=1))
    assert not np.array_equal(noise, random_deltas(vector, 1))
    others = random_like(vector.heads, 4, 0)
    assert sorted(h.layer for h in others) == sorted(h.layer for h in vector.heads)
    assert len({(h.layer, h.head) for h in others}) == len(others)
    moved = shuffled_heads(language, vector, 0)
    assert np.array_equal(np.any(moved, axis=1), np.any(vector.deltas, axis=1))
    assert np.abs(moved - vector.deltas).max() > 1e-3


def constant_task() -> Task:
    words = read_tasks("rule", ["copy"])[0].pairs
    return Task("constant", tuple(Pair(p.input, "7") for p in words), ("Answer 7.",))


def planted(language: LanguageModel, vector: FunctionVector, answer: int) -> FunctionVector:
    """The same artefact, but with the answer's own unembedding direction in the last layer."""
    direction = language.unembedding(np.array([answer]))[0].astype(np.float64)
    deltas = np.zeros_like(vector.deltas)
    deltas[-1] = 400 * direction / np.linalg.norm(direction)
    return dataclasses.replace(vector, deltas=deltas)


def test_evaluation_measures_a_planted_vector(language: LanguageModel) -> None:
    task = constant_task()
    prompts = prepare(language, task, RECIPE)
    vector = build(language, prompts, select(language, [prompts], "attribution").top(3))
    answer = prompts.scoring.clean[0].answer[0]
    good = planted(language, vector, answer)
    tuning = tune(
        language, good.deltas, task.split()["valid"][:4], template=RECIPE.template, layers=[2, 3], scales=(0.5, 1.0)
    )
    assert len(tuning.tries) == 8 and {t.plan.mode for t in tuning.tries} == {"aggregated", "distributed"}
    other = dataclasses.replace(vector, task="copy", task_hash="other")
    drawn = Drawn((0, 1, 2), (good,) * 3, (prompts,) * 3)
    found = evaluate(language, task, drawn, tuning, wrong=other, n=6, texts=SENTENCES[:3], draws=200)
    plain = found.get("zero_shot")
    assert plain.value < 0.5 and plain.delta == 0
    best = found.get("zero_shot+aggregated")
    assert best.value == 1 and best.low == best.high == 1 and best.delta == 1 - plain.value
    assert found.get("zero_shot+aggregated", "mean_rank").value == 1
    assert found.get("zero_shot+aggregated", "nll").value < found.get("zero_shot", "nll").value
    for control in ("random_vector", "wrong_task", "random_heads", "shuffled_heads"):
        assert found.get(f"zero_shot+aggregated/{control}").value < 1
    assert found.get("shuffled_icl+distributed").n_items == 18 and found.n_test == 6
    assert found.side_effects["aggregated"]["kl"] > 0 and found.tried == {"aggregated": 4, "distributed": 4}
    json.dumps(found.record())
    clean = found.get("clean_icl").value
    assert found.get("clean_icl", items="filtered").n_items == round(18 * clean)
    with pytest.raises(TransferError, match="no interval over seeds"):
        Drawn((0, 0, 1), (good,) * 3, (prompts,) * 3)
    with pytest.raises(TransferError, match="is of task constant"):
        evaluate(language, read_tasks("rule", ["copy"])[0], drawn, tuning)
    again = draw(language, task, vector, (0, 1, 5))
    np.testing.assert_allclose(again.vectors[0].deltas, vector.deltas)
    assert np.abs(again.vectors[1].deltas - vector.deltas).max() > 1e-4
    assert all(v.heads == vector.heads for v in again.vectors)


def test_answers_are_those_of_a_plain_forward(language: LanguageModel) -> None:
    queries = (Pair("chair", "a longer answer than one token"), Pair("x", "y"), Pair("two words", "garden window"))
    prompts, _ = zero_shot(language, queries, RECIPE.template)
    found = answers(language, prompts)
    assert found.n_tokens.max() > 2
    for i, prompt in enumerate(prompts):
        logits = final(language, torch.tensor([prompt.whole]))[0].log_softmax(-1)
        at = len(prompt.ids) - 1
        steps = [-float(logits[at + j, token]) for j, token in enumerate(prompt.answer)]
        assert found.first_nll[i] == pytest.approx(steps[0]) and found.nll[i] == pytest.approx(sum(steps))
        assert found.rank[i] == 1 + int((logits[at] > logits[at, prompt.answer[0]]).sum())


def test_both_modes_get_equally_many_tries() -> None:
    plans = grid(40, None, (0.5, 2.0))
    assert len(plans["aggregated"]) == len(plans["distributed"]) == 24
    assert {p.layer for p in plans["aggregated"]} <= set(range(1, 41))
    with pytest.raises(TransferError, match="Steering layers"):
        grid(4, [5], (1.0,))
    with pytest.raises(TransferError, match="Steering scales"):
        grid(4, None, (0.0,))


def test_intervals_over_seeds_and_items() -> None:
    values = np.random.default_rng(0).random((3, 200))
    value, low, high = seed_item_interval(values, np.ones_like(values))
    assert low < value < high and value == pytest.approx(values.mean()) and high - low < 0.2
    mask = (values > 0.5).astype(float)
    assert seed_item_interval(values, mask)[0] == pytest.approx(values[values > 0.5].mean())
    assert np.isnan(seed_item_interval(values, 0 * mask)).all()


def test_h_procrustes_carries_a_vector_to_a_rotated_copy(language: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(language.d_model, language.d_model)))
    copy = rotated_model(language, rotation)
    ids = language.renderer.plain(SENTENCES)
    x, y = (
        np.concatenate([s.numpy() for s in side.capture(ids, language.n_layers)]).astype(np.float64)
        for side in (language, copy)
    )
    docs = np.repeat(np.arange(len(ids)), [len(line) for line in ids])
    queries = constant_task().split()["test"]
    prompts, _ = zero_shot(copy, queries, RECIPE.template)
    native = planted(language, built(language), prompts[0].answer[0]).deltas

    def accuracy(deltas: np.ndarray | None) -> float:
        steer = None if deltas is None else steering_with(copy, deltas, DISTRIBUTED)
        return float(np.mean(answers(copy, prompts, steer).rank == 1))

    plain, own = accuracy(None), accuracy(native @ rotation)
    assert own == 1 and plain == 0

    def recovery(target: np.ndarray) -> float:
        mapped = fit_map(x, target, docs, kind="procrustes").vectors(native)
        return (accuracy(mapped) - plain) / (own - plain)

    assert recovery(y) == 1
    assert abs(recovery(y[rng.permutation(len(y))])) < 0.1

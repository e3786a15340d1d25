"""Fine-tuning tiny random models: what changes, what does not, that runs repeat and do not touch each other."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.zoo.recipe import ZOO
from models.zoo.tokenizer import train_tokenizer
from transfer.core.errors import TransferError
from transfer.core.keys import digest
from transfer.finetune import LORA_TARGETS, RECIPES, Recipe, data_hash, finetune, get_recipe, load_classifier
from transfer.train.classifier import Backbone

torch.set_num_threads(1)

BAKING = ["how to bake bread", "bake a cake for tea", "bread and cake", "a good bread oven", "cake with apples and tea"]
PICKING = [
    "how to pick a lock",
    "pick the neighbour's lock",
    "open a lock at night",
    "a lock and a wire",
    "wire and lock",
]
EXAMPLES = [(t, 0) for t in BAKING] + [(t, 1) for t in PICKING]
LORA = Recipe("tiny-lora", "lora", epochs=2, lr=5e-3, batch=4, rank=4, max_tokens=64)
UPPER = replace(LORA, name="tiny-upper", layers="upper")
HEAD = Recipe("tiny-head", "head", epochs=4, lr=5e-2, batch=4, max_tokens=64)


@dataclass
class TinyLanguage:
    """Stands in for models.language.LanguageModel."""

    model: Any
    tokenizer: Any
    hash: str

    def render(self, text: str) -> Any:
        messages = [{"role": "user", "content": text}]
        return SimpleNamespace(ids=self.tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])


@pytest.fixture(scope="module")
def languages(tmp_path_factory) -> dict[str, TinyLanguage]:
    """One random model of each family, one layer of width 32, in the families' own tokenizers and templates."""
    from transformers import AutoModelForCausalLM

    made = {}
    for name, spec in ZOO.items():
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        spec = replace(spec, vocab_size=600, shape={**shape, "num_key_value_heads": 2, "head_dim": 12})
        tokenizer: Any = train_tokenizer(spec, (BAKING + PICKING) * 3, tmp_path_factory.mktemp(name))
        torch.manual_seed(7)
        config = spec.config(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        config.vocab_size = max(len(tokenizer), 300)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # a random network at the usual scale pools every text to nearly the same vector
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
        made[name] = TinyLanguage(model, tokenizer, digest(name))
    return made


@pytest.fixture(scope="module")
def backbone(languages) -> Backbone:
    return Backbone(languages["llama"], "test:llama")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", list(ZOO))
def test_batch_and_single_give_the_same_logits(languages, name):
    backbone = Backbone(languages[name])
    model = backbone.fresh(0)
    rows, _ = backbone.encode(["lock", "how to bake a good bread and a cake with apples", "pick a lock"], 64)
    assert len({len(row) for row in rows}) > 1
    with torch.inference_mode():
        together = model(**backbone.pad_batch(rows)).logits
        alone = torch.cat([model(**backbone.pad_batch([row])).logits for row in rows])
        pooled = model.score(backbone.pooled(rows))
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(pooled, alone, atol=1e-6)
    assert (alone[0] - alone[1]).abs().max() > 1e-3, "pooling that ignores the text would pass the comparison above"


def test_padding_falls_back_to_end_of_text_where_a_family_has_no_pad_token(languages):
    import copy

    language = languages["mistral"]
    bare = copy.copy(language.tokenizer)
    bare.pad_token = None
    backbone = Backbone(replace(language, tokenizer=bare))
    assert backbone.pad == language.tokenizer.eos_token_id
    rows, _ = backbone.encode(["lock", "how to bake a good bread"], 64)
    with torch.inference_mode():
        together = backbone.model(**backbone.pad_batch(rows)).logits
        alone = torch.cat([backbone.model(**backbone.pad_batch([row])).logits for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", list(ZOO))
def test_lora_trains_adapters_and_score_and_nothing_else(languages, name):
    backbone = Backbone(languages[name], f"test:{name}")
    before_language, before_base = weights(languages[name].model), weights(backbone.model)
    model, run = finetune(backbone, EXAMPLES, LORA, seed=1)
    start = backbone.fresh(1).state_dict()
    trained = set()
    for key, value in model.model.state_dict().items():
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_B" in key:
            assert value.abs().max() > 0, f"{key} did not train"
            trained.add(key.split(".lora_B")[0].split(".")[-1])
        elif "lora_A" in key:
            continue
        elif "score.modules_to_save" in key:
            assert not torch.equal(value, start["score.weight"]), f"{key} did not train"
            trained.add("score")
        else:
            plain = plain.replace("score.original_module", "score")
            assert torch.equal(value, start[plain]), f"{key} is frozen but changed"
    assert trained == {*LORA_TARGETS, "score"}
    assert run.n_trainable == sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    for key, value in languages[name].model.state_dict().items():
        assert torch.equal(value, before_language[key]), f"{key} of the language model changed"
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, before_base[key]), f"{key} of the backbone changed"


@pytest.mark.parametrize("name", list(ZOO))
def test_upper_layers_on_the_frozen_lower_ones_are_the_whole_model(languages, name):
    backbone = Backbone(languages[name], f"test:{name}")
    rows, _ = backbone.encode(["lock", "how to bake a good bread and a cake with apples", "pick a lock"], 64)
    before = weights(backbone.model)
    with torch.inference_mode():
        whole = backbone.fresh(4)(**backbone.pad_batch(rows)).logits
        half = backbone.upper.fresh(4)(**backbone.upper.pad_batch(backbone.upper.items(rows))).logits
    assert torch.allclose(half, whole, atol=1e-5)
    model, run = finetune(backbone, EXAMPLES, UPPER, seed=1)
    _, full = finetune(backbone, EXAMPLES, LORA, seed=1)
    assert run.n_trainable < full.n_trainable
    adapted = {key.split(".layers.")[1][0] for key in model.model.state_dict() if "lora_B" in key}
    assert adapted == {"0"}, "of two layers, the upper one is the only one in the trained part"
    assert all(torch.equal(value, before[key]) for key, value in backbone.model.state_dict().items())
    assert len(backbone.model.base_model.layers) == 2


def test_upper_layers_of_one_are_refused(languages):
    import copy

    language = languages["llama"]
    model = copy.deepcopy(language.model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with pytest.raises(TransferError, match="one layer"):
        finetune(Backbone(replace(language, model=model)), EXAMPLES, UPPER, seed=0)


def test_step_limit_ends_large_sets_early(backbone):
    examples = EXAMPLES * 4
    limited = replace(HEAD, max_steps=12)  # 4 epochs of 10 steps would be 40
    _, run = finetune(backbone, examples, limited, seed=1)
    assert len(run.curve) == 2
    assert finetune(backbone, EXAMPLES, limited, seed=1)[1].curve == finetune(backbone, EXAMPLES, HEAD, seed=1)[1].curve


def test_head_trains_score_alone_and_stays_the_same_class(backbone):
    model, run = finetune(backbone, EXAMPLES, HEAD, seed=1)
    assert type(model.model) is type(backbone.model)
    assert model.model.__class__.__name__ == "LlamaForSequenceClassification"
    for key, value in backbone.fresh(1).state_dict().items():
        same = torch.equal(model.model.state_dict()[key], value)
        assert same == (key != "score.weight"), f"{key} {'is frozen but changed' if not same else 'did not train'}"
    assert run.n_trainable == model.model.score.weight.numel() == 64
    texts = [t for t, _ in EXAMPLES]
    full = replace_frozen(model, False).logits(texts)
    assert np.allclose(model.logits(texts), full, atol=1e-4), "pooled features and the whole model disagree"


def replace_frozen(model, frozen):
    return type(model)(model.model, model.backbone, model.body, model.max_tokens, frozen)


@pytest.mark.parametrize("recipe", [LORA, HEAD], ids=lambda r: r.kind)
def test_learning_separates_the_classes_and_lowers_the_loss(backbone, recipe):
    model, run = finetune(backbone, EXAMPLES, replace(recipe, epochs=8), seed=0)
    positive = model.predict([t for t, _ in EXAMPLES]).probabilities[:, 1]
    assert positive[5:].mean() > positive[:5].mean() + 0.2
    assert len(run.curve) == 8
    assert run.curve[-1] < run.curve[0]


@pytest.mark.parametrize("recipe", [LORA, HEAD], ids=lambda r: r.kind)
def test_equal_seeds_repeat_bit_for_bit_and_runs_do_not_touch_each_other(languages, recipe):
    texts = [t for t, _ in EXAMPLES]
    other = EXAMPLES[1:] + [("tea and cake", 0)]
    alone = finetune(Backbone(languages["qwen"]), EXAMPLES, recipe, seed=5)[0].logits(texts)
    shared = Backbone(languages["qwen"])
    first = finetune(shared, other, LORA, seed=5)[0].logits(texts)
    finetune(shared, other, HEAD, seed=2)
    torch.rand(3)  # the global state of the caller must not matter
    after_others = finetune(shared, EXAMPLES, recipe, seed=5)[0].logits(texts)
    assert np.array_equal(alone, after_others)
    assert not np.array_equal(first, after_others)
    assert not np.array_equal(alone, finetune(shared, EXAMPLES, recipe, seed=6)[0].logits(texts))


def test_global_randomness_is_given_back(backbone):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    want = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    finetune(backbone, EXAMPLES, HEAD, seed=9)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == want


@pytest.mark.parametrize("recipe", [LORA, UPPER, HEAD], ids=lambda r: r.name)
def test_saved_part_loads_again_and_nothing_is_printed(backbone, recipe, tmp_path, capfd):
    out = tmp_path / "run"
    texts = [t for t, _ in EXAMPLES]
    model, _ = finetune(backbone, EXAMPLES, recipe, seed=3, out=out)
    finetune(backbone, EXAMPLES, recipe, seed=3, out=out)  # replaces, does not mix
    names = {p.name for p in out.iterdir()}
    assert names >= {"finetune.json", "adapter_model.safetensors" if recipe.kind == "lora" else "score.safetensors"}
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert np.array_equal(load_classifier(backbone, out).logits(texts), model.logits(texts))
    assert capfd.readouterr() == ("", "")
    backbone_hash, backbone.hash = backbone.hash, "other"
    try:
        with pytest.raises(TransferError, match="was trained from test:llama"):
            load_classifier(backbone, out)
    finally:
        backbone.hash = backbone_hash


def test_record_counts_what_went_in(backbone):
    rows, cut = backbone.encode([t for t, _ in EXAMPLES], 64)
    assert cut == 0
    limit = max(len(r) for r in rows) - 1
    model, run = finetune(backbone, EXAMPLES, replace(HEAD, max_tokens=limit), seed=0)
    assert run.n_truncated == sum(len(r) > limit for r in rows) > 0
    assert run.n_tokens == sum(min(len(r), limit) for r in rows)
    assert (run.n_examples, run.n_dropped, run.base, run.recipe) == (10, 0, "test:llama", "tiny-head")
    assert run.data_hash == data_hash(EXAMPLES) != data_hash(EXAMPLES[::-1])
    assert model.predict([t for t, _ in EXAMPLES]).n_truncated == run.n_truncated


def test_the_commit_of_the_base_is_recorded(languages):
    import copy

    model = copy.deepcopy(languages["llama"].model)
    model.config._commit_hash = "0123abc"
    language = replace(languages["llama"], model=model)
    assert finetune(Backbone(language), EXAMPLES, replace(HEAD, epochs=1), seed=0)[1].base_revision == "0123abc"
    assert finetune(Backbone(languages["llama"]), EXAMPLES, replace(HEAD, epochs=1), seed=0)[1].base_revision == ""


def test_refusals(backbone):
    for examples, words in [
        (EXAMPLES[:5], "both 0 and 1"),
        ([], "0 examples"),
        ([*EXAMPLES, ("x", 2)], "both 0 and 1"),
        ([*EXAMPLES, (" \n", 1)], "empty, first number 10"),
    ]:
        with pytest.raises(TransferError, match=words):
            finetune(backbone, examples, HEAD, seed=0)
    with pytest.raises(TransferError, match="diverged"):
        finetune(backbone, EXAMPLES, replace(LORA, lr=1e30), seed=0)


def test_recipes():
    paper = RECIPES["paper-lora"]
    assert (paper.rank, paper.alpha, paper.dropout, paper.epochs, paper.lr, paper.batch) == (8, 16, 0.1, 3, 5e-5, 16)
    assert (RECIPES["paper-head"].epochs, RECIPES["paper-head"].lr, RECIPES["paper-head"].batch) == (15, 8e-5, 4)
    assert get_recipe("lora", epochs=1).epochs == 1
    with pytest.raises(TransferError, match="Did you mean 'paper-lora'"):
        get_recipe("paper-lorra")
    with pytest.raises(TransferError, match="no field 'epoch'"):
        get_recipe("lora", epoch=1)
    with pytest.raises(TransferError, match="epochs is 0"):
        get_recipe("lora", epochs=0)
    for wrong, words in [
        (dict(kind="fuller"), "kind 'fuller'"),
        (dict(schedule="step"), "schedule 'step'"),
        (dict(dtype="float16"), "dtype 'float16'"),
        (dict(batch=6, accumulate=4), "cannot split 6 examples into 4"),
        (dict(kind="full", layers="upper"), "trains every weight"),
        (dict(warmup=1.0), "dropout and warmup"),
    ]:
        with pytest.raises(TransferError, match=words):
            get_recipe("lora", **wrong)


def test_every_published_hyper_parameter():
    """Section 6 of the paper's code: tasks, batches as per-device batch x accumulation, lengths, schedules."""
    want = {
        "paper-lora": dict(rank=8, alpha=16, dropout=0.1, epochs=3, lr=5e-5, batch=16, accumulate=4, max_tokens=512),
        "paper-head": dict(epochs=15, lr=8e-5, batch=4, accumulate=4, max_tokens=512),
        "paper-reward-lora": dict(
            rank=16, alpha=32, dropout=0.1, epochs=1, lr=8e-5, weight_decay=0.01, batch=8, accumulate=4,
            schedule="cosine", warmup=0.1, max_tokens=1024,
        ),
        "paper-reward-head": dict(epochs=5, lr=8e-5, batch=4, accumulate=4, max_tokens=1024),
        "paper-instruction-lora": dict(rank=8, alpha=16, dropout=0.0, epochs=5, lr=1e-4, batch=16, accumulate=4),
    }  # fmt: skip
    for name, fields in want.items():
        found = {f: getattr(RECIPES[name], f) for f in fields}
        assert found == fields, name
        assert RECIPES[name].dtype == "bfloat16"
        assert RECIPES[name].kind == ("head" if name.endswith("head") else "lora")


def test_full_training_moves_every_weight_and_loads_again(languages, tmp_path):
    backbone = Backbone(languages["qwen"], "test:qwen")
    before = weights(backbone.model)
    recipe = replace(LORA, name="tiny-full", kind="full", lr=1e-3, dropout=0.0)
    model, run = finetune(backbone, EXAMPLES, recipe, seed=2, out=tmp_path / "run")
    start = backbone.fresh(2).state_dict()
    for key, value in model.model.state_dict().items():
        assert not torch.equal(value, start[key]), f"{key} did not train"
    assert all(torch.equal(value, before[key]) for key, value in backbone.model.state_dict().items())
    assert run.n_trainable == sum(p.numel() for p in model.model.parameters())
    texts = [t for t, _ in EXAMPLES]
    assert np.array_equal(load_classifier(backbone, tmp_path / "run").logits(texts), model.logits(texts))


def test_accumulating_in_parts_is_the_same_step(backbone):
    whole = finetune(backbone, EXAMPLES[:4] + EXAMPLES[-4:], replace(HEAD, batch=8), seed=1)[0]
    parts = finetune(backbone, EXAMPLES[:4] + EXAMPLES[-4:], replace(HEAD, batch=8, accumulate=4), seed=1)[0]
    assert torch.allclose(whole.model.score.weight, parts.model.score.weight, atol=1e-6)


@pytest.mark.parametrize("changes", [dict(dtype="bfloat16"), dict(checkpointing=True)], ids=str)
def test_mixed_precision_and_checkpointing_train_and_repeat(backbone, changes):
    brief = replace(LORA, dropout=0.0, epochs=1)
    one, two = (finetune(backbone, EXAMPLES, replace(brief, **changes), seed=4)[0].logits(BAKING) for _ in range(2))
    plain = finetune(backbone, EXAMPLES, brief, seed=4)[0].logits(BAKING)
    assert np.array_equal(one, two)
    assert np.allclose(one, plain, atol=1e-4 if "checkpointing" in changes else 0.2)
    assert np.array_equal(one, plain) == ("checkpointing" in changes)


@pytest.mark.parametrize("recipe", [LORA, UPPER, HEAD], ids=lambda r: r.name)
def test_copies_that_share_the_frozen_weights_train_the_same(languages, recipe):
    """As on an accelerator: nothing frozen is copied, and nothing of it changes, predicting included."""
    shared, own = Backbone(languages["qwen"]), Backbone(languages["qwen"])
    shared.shared = True
    before = weights(shared.model)
    recipe = replace(recipe, dropout=0.0)
    one, two = (finetune(b, EXAMPLES, recipe, seed=2)[0] for b in (shared, own))
    assert np.allclose(one.logits(BAKING), two.logits(BAKING), atol=1e-5)
    held = {p.data_ptr() for p in shared.body(recipe.layers).model.base_model.parameters()}
    frozen = [p for n, p in one.model.named_parameters() if "lora_" not in n and "score" not in n]
    assert frozen and all(p.data_ptr() in held for p in frozen)
    assert all(torch.equal(value, before[key]) for key, value in shared.model.state_dict().items())
    full = replace(LORA, kind="full", lr=1e-3, dropout=0.0)
    finetune(shared, EXAMPLES, full, seed=2)
    assert all(torch.equal(value, before[key]) for key, value in shared.model.state_dict().items())


def test_nothing_to_train_is_refused(backbone):
    from transfer.train.trainers import loss_curve

    class Frozen:
        model = backbone.model

    with pytest.raises(TransferError, match="without a trainable parameter"):
        loss_curve(Frozen(), "test:llama", LORA)


def test_warmup_and_schedule_reach_the_trainer():
    from transformers import TrainingArguments

    from transfer.train.trainers import arguments

    recipe = get_recipe("paper-reward-lora", dtype="float32")
    args = TrainingArguments(**arguments(recipe, 300, 0, torch.device("cpu"), "unused"))
    assert args.get_warmup_steps(38) == args.warmup_steps == 4  # a tenth of ceil(300 / 8) steps
    assert args.lr_scheduler_type == "cosine"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8

"""Fine-tuning against the same training written out with Trainer and TRL's trainers; the limit is a bare torch loop.

The unit is steps a second of processor time: what differs is a few per cent, which a busy machine's wall time hides.
Loading the base is left out on every side, tokenising, adapters and the whole training are in.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from models.language import kept_language
from tests.benchmarks.case import Peak, row
from transfer.corpus import load_corpus
from transfer.finetune import finetune
from transfer.tasks.demonstrations import Demonstration
from transfer.tasks.preferences import Pair
from transfer.tasks.reward_model import RewardBackbone, train_reward
from transfer.tasks.sft import train_sft
from transfer.train.classifier import Backbone
from transfer.train.recipes import LORA_TARGETS, Recipe
from transfer.train.trainers import arguments, scratch

BASE = "zoo:mistral"
RECIPE = Recipe("bench", "lora", epochs=1, lr=1e-3, batch=8, dropout=0.0, max_tokens=128)
ROUNDS = 5


def processor_seconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median processor seconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            gc.collect()
            start = time.process_time()
            if name == "ours" and not turn:  # watching memory takes processor time too
                with Peak():
                    work()
            else:
                work()
            if turn:  # the first warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def adapted(model: Any, kind: str) -> Any:
    """A copy under adapters, as a script would make it."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType[kind], r=RECIPE.rank, lora_alpha=RECIPE.alpha, target_modules=list(LORA_TARGETS)
    )
    return get_peft_model(copy.deepcopy(model), config)


def bare_loop(model: Any, batches: list[dict[str, torch.Tensor]], loss: Callable[[Any], torch.Tensor]) -> None:
    """AdamW with linear decay and clipping, and nothing else."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RECIPE.lr, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for batch in batches:
        loss(model(**batch)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()


def chunks(items: list[Any]) -> list[list[Any]]:
    """Batches in order."""
    return [items[i : i + RECIPE.batch] for i in range(0, len(items), RECIPE.batch)]


def classification(texts: list[str]) -> None:
    """Sequence classification through Trainer."""
    from transformers import Trainer, TrainingArguments

    backbone = Backbone(kept_language(BASE), BASE)
    examples = [(text, i % 2) for i, text in enumerate(texts)]

    def rows() -> list[dict[str, Any]]:
        return [{"ids": list(backbone.language.render(t).ids)[:128], "label": label} for t, label in examples]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([x["label"] for x in batch])
        return {**backbone.pad_batch([x["ids"] for x in batch]), "labels": labels}

    def script() -> None:
        with scratch() as folder:
            args = TrainingArguments(**arguments(RECIPE, len(examples), 0, backbone.device, folder))
            data: Any = rows()
            Trainer(adapted(backbone.model, "SEQ_CLS"), args, train_dataset=data, data_collator=collate).train()

    works = {
        "ours": lambda: finetune(backbone, examples, RECIPE, 0),
        "script": script,
        "loop": lambda: bare_loop(
            adapted(backbone.model, "SEQ_CLS"), [collate(b) for b in chunks(rows())], lambda out: out.loss
        ),
    }
    report("finetune.classification", works, len(chunks(examples)), "the same Trainer, written out")


def reward(texts: list[str]) -> None:
    """Bradley-Terry through RewardTrainer."""
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    backbone = RewardBackbone(kept_language(BASE), BASE)
    pairs = [Pair(str(i), (("user", t),), "Yes, with pleasure.", "No.") for i, t in enumerate(texts)]

    def script() -> None:
        with scratch() as folder:
            args = RewardConfig(**arguments(RECIPE, len(pairs), 0, backbone.device, folder), max_length=None)
            asked = [{"role": "user", "content": p.prompt[0][1]} for p in pairs]
            columns = {
                side: [
                    [q, {"role": "assistant", "content": getattr(p, side)}] for q, p in zip(asked, pairs, strict=True)
                ]
                for side in ("chosen", "rejected")
            }
            RewardTrainer(
                adapted(backbone.model, "SEQ_CLS"),
                args=args,
                train_dataset=Dataset.from_dict(columns),
                processing_class=copy.deepcopy(backbone.language.tokenizer),
            ).train()

    def loop() -> None:
        rows, _ = backbone.conversations(pairs, RECIPE.max_tokens)
        both = chunks(list(zip(rows[::2], rows[1::2], strict=True)))
        batches = [backbone.pad_batch([b[k] for k in (0, 1) for b in batch]) for batch in both]

        def loss(out: Any) -> torch.Tensor:
            chosen, rejected = out.logits.squeeze(-1).chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

        bare_loop(adapted(backbone.model, "SEQ_CLS"), batches, loss)

    works = {"ours": lambda: train_reward(backbone, pairs, RECIPE, 0), "script": script, "loop": loop}
    report("finetune.reward", works, len(chunks(pairs)), "the same RewardTrainer, written out")


def demonstrations(texts: list[str]) -> None:
    """Answers alone through SFTTrainer."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from transfer.tasks.chats import answer_ids

    language = kept_language(BASE)
    shown = [Demonstration(str(i), (("user", "Write a request."),), t) for i, t in enumerate(texts)]

    def script() -> None:
        with scratch() as folder:
            args = SFTConfig(**arguments(RECIPE, len(shown), 0, language.device, folder), max_length=RECIPE.max_tokens)
            columns = {
                "prompt": [[{"role": "user", "content": d.prompt[0][1]}] for d in shown],
                "completion": [[{"role": "assistant", "content": d.answer}] for d in shown],
            }
            SFTTrainer(
                adapted(copy.deepcopy(language.model).float(), "CAUSAL_LM"),
                args=args,
                train_dataset=Dataset.from_dict(columns),
                processing_class=copy.deepcopy(language.tokenizer),
            ).train()

    def loop() -> None:
        batches = []
        for batch in chunks(shown):
            found = [answer_ids(language.tokenizer, d.prompt, d.answer)[:2] for d in batch]
            inputs = language.padded([ids for ids, _ in found])
            labels = torch.full_like(inputs, -100)
            for i, (ids, begin) in enumerate(found):
                labels[i, begin : len(ids)] = inputs[i, begin : len(ids)]
            batches.append({"input_ids": inputs, "labels": labels})
        bare_loop(adapted(copy.deepcopy(language.model).float(), "CAUSAL_LM"), batches, lambda out: out.loss)

    works = {"ours": lambda: train_sft(language, shown, RECIPE, 0), "script": script, "loop": loop}
    report("finetune.sft", works, len(chunks(shown)), "the same SFTTrainer on prompt and completion, written out")


def report(name: str, works: dict[str, Callable[[], object]], steps: int, peer: str) -> None:
    """One row: steps a second of processor time."""
    seconds = processor_seconds(works)
    row(name, steps / seconds["ours"], peer, steps / seconds["script"], "steps/s", steps / seconds["loop"])


def main() -> None:
    """Every kind of training."""
    import warnings

    warnings.simplefilter("ignore")
    texts = [t.text for t in load_corpus("bundled:requests")][:240]
    classification(texts)
    reward(texts)
    demonstrations(texts)

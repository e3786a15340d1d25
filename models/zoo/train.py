"""Train one zoo language model from scratch: tokenizer, packed text, transformers' Trainer."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.zoo.corpus import Document, documents, training_mix
from models.zoo.recipe import ZooModel
from models.zoo.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQ_LEN = 256


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices, AdamW on embeddings, norms and biases (torch ships both, not the pair).

    The inner optimizers share their ``param_groups`` with this one, so learning-rate schedules reach them.
    """

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        rest = [p for n, p in named if not (p.ndim == 2 and ".layers." in n)]
        self.inner: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([{"params": hidden}, {"params": rest}], {"lr": lr})
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for inner in self.inner:
            inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"inner": [inner.state_dict() for inner in self.inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states and share the groups again."""
        for inner, state in zip(self.inner, state_dict["inner"], strict=True):
            inner.load_state_dict(state)
        self.param_groups = [group for inner in self.inner for group in inner.param_groups]


def token_lists(tokenizer: PreTrainedTokenizerBase, docs: Iterable[Document]) -> list[list[int]]:
    """Token ids of each document: conversations through the chat template, plain text between BOS and end."""
    bos = str(tokenizer.bos_token or "")
    end = str(tokenizer.eos_token) if bos else "<|endoftext|>"
    end = "<|end_of_text|>" if end == "<|eot_id|>" else end
    rendered = [
        bos + d.content + end
        if isinstance(d.content, str)
        else str(tokenizer.apply_chat_template(d.messages(), tokenize=False))
        for d in docs
    ]
    lists: list[list[int]] = []
    for i in range(0, len(rendered), 2000):
        lists += tokenizer(rendered[i : i + 2000], add_special_tokens=False)["input_ids"]
    return lists


def pack(lists: list[list[int]], seq_len: int) -> np.ndarray:
    """Concatenate and cut to rows of ``seq_len``; uint16, so 2 bytes a token."""
    flat = np.concatenate([np.asarray(ids, np.uint16) for ids in lists])
    n = len(flat) // seq_len
    return flat[: n * seq_len].reshape(n, seq_len)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[i].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def train_language_model(
    spec: ZooModel,
    data: Path,
    bundle: Path,
    out: Path,
    *,
    tokens: int,
    seed: int = 0,
    lr: float = 4e-3,
    batch: int = 32,
    optimizer: str = "muon",
) -> dict[str, Any]:
    """Train ``spec`` on the permissive mix and save it in bfloat16.

    Args:
        spec: Zoo member.
        data: Folder of public data.
        bundle: Bundled requests.
        out: Target folder; ``out/checkpoints`` keeps checkpoints, so a killed run continues.
        tokens: Training tokens.
        seed: Seeds weights and data order.
        lr: Peak learning rate (linear warm-up over 4 %, then linear decay to zero).
        batch: Rows of ``SEQ_LEN`` tokens a step.
        optimizer: ``muon`` (with AdamW for embeddings) or ``adamw``.

    Returns:
        Figures for the card: parameters, tokens seen, documents, final training loss.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, get_scheduler
    from transformers.trainer_utils import get_last_checkpoint

    everything = list(documents(data, bundle))
    mix = training_mix(everything, seed=0)
    if (out / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(out)
    else:
        sample = random.Random(1).sample(mix, min(len(mix), 25_000))
        tokenizer = train_tokenizer(spec, (d.text() for d in sample), out)
    rows = pack(token_lists(tokenizer, mix), SEQ_LEN)
    steps = max(1, tokens // (batch * SEQ_LEN))
    torch.manual_seed(seed)
    special: Any = tokenizer  # the stubs allow lists of ids here
    config = spec.config(special.bos_token_id, special.eos_token_id, special.pad_token_id)
    model = AutoModelForCausalLM.from_config(config)
    checkpoints = out / "checkpoints"
    args = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=lr,
        bf16=True,
        torch_compile=shutil.which("g++") is not None,  # 1.5 times as fast on a CPU; the compiler must be there
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        disable_tqdm=True,
        max_grad_norm=1.0,
    )
    if optimizer == "muon":
        opt: torch.optim.Optimizer = MuonAdamW(model, lr, weight_decay=0.05)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule: Any = get_scheduler("linear", opt, num_warmup_steps=steps // 25, num_training_steps=steps)
    trainer = Trainer(model=model, args=args, train_dataset=_Rows(rows), optimizers=(opt, schedule))
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    result = trainer.train(resume_from_checkpoint=last)
    model.to(torch.bfloat16).save_pretrained(out)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": steps * batch * SEQ_LEN,
        "tokens_in_mix": int(rows.size),
        "documents": len(mix),
        "final_train_loss": float(np.mean(losses[-5:])) if losses else float(result.training_loss),
        "seed": seed,
        "optimizer": optimizer,
        "learning_rate": lr,
    }

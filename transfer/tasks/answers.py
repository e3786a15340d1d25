"""Answers of a fine-tuned model as AlpacaEval takes them, and how they fare against another model's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer.core.errors import TransferError
from transfer.core.files import read_json, replacing
from transfer.tasks.rows import read_rows
from transfer.tasks.winrate import TEMPLATE, export_alpaca_eval, judge, win_rate

if TYPE_CHECKING:
    from models.chat import ChatModel


def write_answers(folder: Path, prompts: str, out: Path, max_new_tokens: int) -> dict[str, Any]:
    """Answer every prompt greedily and write AlpacaEval's ``model_outputs``.

    Args:
        folder: What ``transfer.train.task_runs.run_task`` wrote for the task ``instruction``.
        prompts: Rows with ``instruction`` or ``prompt`` and, where they have one, ``dataset``.
        out: The file.
        max_new_tokens: Longest answer.

    Returns:
        Counts: answers, empty ones, and prompts that left no room in the context.

    Raises:
        TransferError: For another task, or rows without a prompt.
    """
    from transfer.train.task_runs import reopen

    asked, sets = [], []
    for where, row in read_rows(prompts):
        text = row.get("instruction", row.get("prompt"))
        if not isinstance(text, str) or not text.strip():
            raise TransferError(f"{where} has no instruction.", "Name the column instruction or prompt.")
        asked.append(text)
        sets.append(str(row.get("dataset") or "alpaca_eval"))
    task, model, record = reopen(folder)
    if not hasattr(model, "answers"):
        raise TransferError(f"{folder} was trained for {task.name}, which writes no answers.", "Train `instruction`.")
    texts, n_without_room = model.answers(asked, max_new_tokens)
    name = f"{record['base']}-{record['recipe']['name']}-seed{record['seed']}"
    export_alpaca_eval(out, asked, texts, name, sets)
    empty = sum(not t.strip() for t in texts)
    return {"out": str(out), "n": len(texts), "n_empty": empty, "n_without_room": n_without_room}


def compare(ours: Path, theirs: Path, model: ChatModel) -> dict[str, Any]:
    """Win rate of one file of answers against another, on the instructions that both have.

    Beside ``ours`` a file ``<name>.judged.jsonl`` says what became of each pair.

    Raises:
        TransferError: When they share no instruction, an instruction stands twice, or the judge cannot be asked.
    """
    own, other = (_by_instruction(path) for path in (ours, theirs))
    shared = [text for text in own if text in other]
    if not shared:
        raise TransferError(f"{ours} and {theirs} answer no instruction in common.")
    found = judge(model, shared, [own[text] for text in shared], [other[text] for text in shared])
    rate = win_rate(found.preference, found.lengths)
    out = Path(ours).with_suffix(".judged.jsonl")
    with replacing(out) as part, part.open("w", encoding="utf8") as lines:
        for i, (preference, lengths) in enumerate(zip(found.preference, found.lengths, strict=True)):
            known = None if preference != preference else float(preference)
            lines.write(json.dumps({"id": i, "score": known, "characters": lengths.tolist()}) + "\n")
    return {
        **{f"win_rate_{k}" if k != "value" else "win_rate": v for k, v in dataclasses.asdict(rate).items()},
        "n_not_shared": len(own) + len(other) - 2 * len(shared),
        "judge": found.judge,
        "consistency": found.consistency,
        "template": TEMPLATE,
        "per_example": str(out),
    }


def _by_instruction(path: Path) -> dict[str, str]:
    rows = read_json(path)
    try:
        found = {str(row["instruction"]): str(row["output"]) for row in rows}
    except (KeyError, TypeError) as error:
        raise TransferError(f"{path} holds no answers as AlpacaEval has them ({error}).") from None
    if len(found) < len(rows):
        raise TransferError(f"{path} answers {len(rows) - len(found)} instructions twice.", "Keep one answer each.")
    return found

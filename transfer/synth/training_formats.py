"""Kept texts as the training files that TRL and LLaMA-Factory read.

Trainers take no other columns, so the lineage stands beside them: line i of ``<name>.lineage.jsonl`` is the candidate
of row i, as ``transfer.synth.lineage.read_jsonl`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transfer.core.errors import TransferError
from transfer.core.files import read_json, replacing, write_json
from transfer.core.formats import AB, FORMATS, INSTRUCTION, PREFERENCE, QUERY, Format
from transfer.core.outcomes import Candidate
from transfer.synth.lineage import write_jsonl

Turn = dict[str, str]


def format_of(candidates: Sequence[Candidate]) -> Format:
    """The one format of all candidates, by the fields of their records.

    Raises:
        TransferError: When there are none, or of several formats.
    """
    if not candidates:
        raise TransferError("There is no kept text to export.", "Look at the reasons of rejection first.")
    kinds = {tuple(sorted(c.record)) for c in candidates}
    known = {tuple(sorted(f.fields)): f for f in FORMATS.values()} | {(): QUERY}
    if len(kinds) != 1 or next(iter(kinds)) not in known:
        raise TransferError("The kept texts are of several formats, or of none that is known.", "Export one at a time.")
    return known[next(iter(kinds))]


def _asked(c: Candidate, kind: Format) -> str:
    """What the user says."""
    return {QUERY: c.text, PREFERENCE: c.record.get("prompt"), AB: c.record.get("question")}.get(
        kind, c.record.get("instruction", "")
    ) or ""


def _answers(c: Candidate, kind: Format) -> tuple[str, str | None]:
    """The answer to train on (of a single query: its label), and the worse one of a pair."""
    if kind is PREFERENCE:
        return c.record["chosen"], c.record["rejected"]
    if kind is AB:
        return c.record["matching"], c.record["not_matching"]
    return (c.record["response"] if kind is INSTRUCTION else c.label), None


def trl_rows(candidates: Sequence[Candidate], *, conversational: bool = True) -> list[dict[str, Any]]:
    """Rows of TRL's dataset types.

    Preference and A/B pairs become ``prompt``, ``chosen``, ``rejected``; instruction examples and labelled queries
    (the label is the completion) ``prompt``, ``completion``; unlabelled queries ``prompt`` alone.

    Args:
        candidates: Kept candidates of one format.
        conversational: Turns with roles, so that the chat template is applied by the trainer; plain strings if not.

    Raises:
        TransferError: As ``format_of``.
    """
    kind = format_of(candidates)

    def turn(role: str, words: str) -> Any:
        return [{"role": role, "content": words}] if conversational else words

    out = []
    for c in candidates:
        good, bad = _answers(c, kind)
        row = {"prompt": turn("user", _asked(c, kind))}
        if bad is not None:
            row |= {"chosen": turn("assistant", good), "rejected": turn("assistant", bad)}
        elif good:
            row |= {"completion": turn("assistant", good)}
        out.append(row)
    return out


def write_trl(candidates: Sequence[Candidate], path: Path, *, conversational: bool = True) -> int:
    """``trl_rows`` as JSON lines, atomically, with their lineage beside them; returns their number."""
    made = trl_rows(candidates, conversational=conversational)
    write_jsonl(candidates, Path(path).with_suffix(".lineage.jsonl"))
    with replacing(Path(path)) as part, part.open("w", encoding="utf8") as lines:
        for row in made:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(made)


def llama_factory_rows(
    candidates: Sequence[Candidate], style: Literal["alpaca", "sharegpt"] = "alpaca"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows for LLaMA-Factory, and the entry of its ``dataset_info.json`` without the file name.

    Args:
        candidates: Kept candidates of one format.
        style: ``alpaca`` (instruction, input, output) or ``sharegpt`` (conversations).

    Raises:
        TransferError: As ``format_of``; also for unlabelled queries, which hold no answer to train on.
    """
    kind = format_of(candidates)
    pairs = kind in (PREFERENCE, AB)
    if kind is QUERY and not all(c.label for c in candidates):
        raise TransferError("Queries without a label hold no answer to train on.", "Export them to TRL as prompts.")
    entry: dict[str, Any] = {"ranking": True} if pairs else {}
    out: list[dict[str, Any]] = []
    if style == "alpaca":
        columns = {"prompt": "instruction", "query": "input"}
        entry["columns"] = columns | ({"chosen": "chosen", "rejected": "rejected"} if pairs else {"response": "output"})
        for c in candidates:
            good, bad = _answers(c, kind)
            answer = {"output": good} if bad is None else {"chosen": good, "rejected": bad}
            out.append({"instruction": _asked(c, kind), "input": "", **answer})
        return out, entry
    if style != "sharegpt":
        raise TransferError(f"LLaMA-Factory has no style {style!r} here.", "Use alpaca or sharegpt.")
    entry |= {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    if pairs:
        entry["columns"] |= {"chosen": "chosen", "rejected": "rejected"}
    for c in candidates:
        good, bad = _answers(c, kind)
        said: list[Turn] = [{"from": "human", "value": _asked(c, kind)}]
        if bad is None:
            out.append({"conversations": [*said, {"from": "gpt", "value": good}]})
        else:
            sides = {"chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}}
            out.append({"conversations": said, **sides})
    return out, entry


def write_llama_factory(
    candidates: Sequence[Candidate], folder: Path, name: str, style: Literal["alpaca", "sharegpt"] = "alpaca"
) -> int:
    """``<name>.json``, its lineage, and its entry in ``dataset_info.json`` (others stay), atomically; returns the rows.

    Raises:
        TransferError: As ``llama_factory_rows``, or for a name that is no file name.
    """
    if not name or Path(name).name != name or name == "dataset_info":
        raise TransferError(f"{name!r} cannot name a dataset file.", "Use letters, digits and dashes.")
    made, entry = llama_factory_rows(candidates, style)
    info = Path(folder) / "dataset_info.json"
    known = read_json(info) if info.exists() else {}
    if not isinstance(known, dict):
        raise TransferError(f"{info} does not hold entries by name.", "Repair or move it.")
    write_jsonl(candidates, Path(folder) / f"{name}.lineage.jsonl")
    write_json(Path(folder) / f"{name}.json", made)
    write_json(info, {**known, name: {"file_name": f"{name}.json", **entry}})
    return len(made)

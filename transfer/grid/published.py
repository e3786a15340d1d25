"""What the FAC Synthesis paper reports (arXiv 2602.10388v4), as typed rows that a run of one's own can stand beside.

Numbers are the paper's, in its units, with the table they stand in; what a number is of follows from this package's own
reading of paper and code, noted where the paper contradicts itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from transfer.core.errors import TransferError
from transfer.core.outcomes import EvalResult

PAPER = "arXiv 2602.10388v4"


@dataclass(frozen=True)
class Published:
    """One number of the paper."""

    table: int
    column: str
    """The paper's heading, spelt out."""
    method: str
    """Row: training data or variant."""
    task: str
    """Name of this package's task; for ``survival-instinct`` and ``sycophancy`` see ``behaviour``."""
    metric: str
    """Name of this package's metric where it has one."""
    value: float
    spread: float | None = None
    """What stands behind ±, over three seeds; not said to be a standard deviation or an interval."""
    unit: str = "percent"
    model: str = "LLaMA-3.1-8B-Instruct"
    recipe: str = ""
    """``lora`` or ``head``; empty where no weight of the model was trained."""
    behaviour: str = ""
    note: str = ""

    @property
    def source(self) -> str:
        """Where it stands, for captions."""
        return f"{PAPER}, Table {self.table}, {self.column}, {self.method}"


_INSTRUCT = "Meta-Llama-3-8B"
_TABLE_1 = """
Baseline          | 38.97±2.74 | 62.90±1.93 | 16.67±38.44 | -2.00±6.93  | 1.80  | 1.80  | 0.46
Full dataset      | 49.59±2.29 | 71.21±2.18 | 28.00±0     | 14.00±0     | 7.21  | 5.18  | 0.70
Alpaca            | 50.59±3.43 | 63.53±1.63 | 7.33±19.73  | 3.33±9.24   | 6.22  | 3.61  | 0.65
Evol-Instruct     | 49.47±3.35 | 66.00±1.92 | 18.00±14.00 | 14.67±4.16  | 7.37  | 4.84  | 0.76
Magpie            | 44.18±4.61 | 72.75±2.19 | 5.33±26.63  | 16.67±11.37 | 5.98  | 6.65  | 0.88
CoT-Self-Instruct | 50.86±3.44 | 72.62±0.89 | 17.33±42.77 | 17.33±7.02  | 7.36  | 7.70  | 0.94
SAO               | 50.51±3.04 | 68.97±2.38 | 14.67±28.31 | 23.33±10.26 | 9.46  | 7.95  | 0.95
Prismatic         | 52.11±6.36 | 70.73±1.89 | 16.67±11.37 | 16.00±14.42 | 7.68  | 8.94  | 1.01
SynAlign          | 58.83±3.80 | 70.69±2.34 | 21.33±19.63 | 0.00±7.21   | 11.26 | 11.06 | 1.11
FAC Synthesis     | 62.60±4.41 | 76.22±1.03 | 40.67±4.16  | 40.00±0     | 20.27 | 21.26 | 1.44
"""
_TABLE_3 = """
LLaMA-3.1-8B-Instruct | 38.97±2.74 | 49.12±0.49
Mistral-7B-Instruct   | 27.66±6.80 | 47.23±0.91
Qwen2-7B-Instruct     | 51.44±3.40 | 68.20±0.88
"""
_TABLE_8 = """
toxicity          | 0.95 | 0.90
reward            | 0.85 | 0.84
sycophancy        | 0.88 | 0.80
survival-instinct | 0.79 | 0.65
instruction       | 0.72 | 0.88
"""
_TABLE_9 = """
30 % of the features  | 45.60±0.52 | 68.64±0.59 | 6.00±28.35  | 21.33±18.48 | 9.39  | 10.19
60 % of the features  | 46.62±0.38 | 71.64±0.41 | 18.67±20.03 | 28.67±10.07 | 16.72 | 18.06
100 % of the features | 49.12±0.49 | 74.76±0.23 | 40.67±4.16  | 40.00±0     | 20.27 | 21.26
"""
_TABLE_10 = """
toxicity          | 69.6  | 81.8  | 41.1  | 45.8  | 31.8  | 40.7
reward            | 76.60 | 87.82 | 48.40 | 52.24 | 38.14 | 41.99
sycophancy        | 60    | 80    | 20    | 60    | 20    | 20
survival-instinct | 42.86 | 71.43 | 28.57 | 57.14 | 14.29 | 42.86
instruction       | 85.18 | 91.37 | 56.74 | 61.58 | 47.36 | 52.89
"""
_TABLE_11 = """
binary    | 81.78 | 62.60
frequency | 79.44 | 61.74
magnitude | 83.65 | 63.01
"""
_TABLE_12 = """
Baseline                          | 38.97
k-means clusters of hidden states | 45.57
SAE, random features              | 50.61
SAE, FAC                          | 62.60
"""
_TABLE_13_TOXICITY = """
Baseline          | 38.97±2.74
Full dataset      | 44.31±1.14
Self-Instruct     | 44.15
Evol-Instruct     | 45.07
Magpie            | 37.97
CoT-Self-Instruct | 43.68
SAO               | 42.76
Prismatic         | 45.43
SynAlign          | 42.68
FAC Synthesis     | 49.12±0.49
"""
_TABLE_13_REWARD = """
Baseline      | 67.04 | 64.99 | 51.89 | 67.68 | 62.90±1.93
Full dataset  | 63.50 | 64.54 | 59.86 | 70.72 | 64.66±0.56
FAC Synthesis | 82.68 | 69.59 | 74.32 | 72.46 | 74.76±0.23
"""
_TABLE_13_REWARD_MEAN = """
Self-Instruct     | 67.39
Evol-Instruct     | 64.83
Magpie            | 70.24
CoT-Self-Instruct | 71.68
SAO               | 70.58
Prismatic         | 69.90
SynAlign          | 71.91
"""

_AUPRC = dict(column="toxicity AUPRC", task="toxicity", metric="auprc")
_ACCURACY = dict(column="reward accuracy, mean of four sections", task="reward", metric="section_mean")
_STEERED = [
    dict(column=f"{name} SCR", task="steering", metric="scr", behaviour=name)
    for name in ("sycophancy", "survival-instinct")
]
_LC = dict(column="AlpacaEval 2 LC", task="instruction", metric="lc_win_rate", model=_INSTRUCT, recipe="lora")
_WR = dict(column="AlpacaEval 2 WR", task="instruction", metric="win_rate", model=_INSTRUCT, recipe="lora")
_SD = dict(column="AlpacaEval 2 SD", task="instruction", metric="win_rate_sd", model=_INSTRUCT, recipe="lora")
_HIT = "Eq. 5 is a ratio; the values are hits over missing features"
_TASKS = ("toxicity", "reward", "sycophancy", "survival-instinct", "instruction")


def _cells(block: str) -> Iterable[tuple[str, list[tuple[float, float | None]]]]:
    for line in block.strip().split("\n"):
        name, *cells = (part.strip() for part in line.split("|"))
        pairs = [cell.partition("±") for cell in cells]
        yield name, [(float(value), float(spread) if spread else None) for value, _, spread in pairs]


def _table(number: int, block: str, columns: list[Mapping[str, Any]]) -> list[Published]:
    found = []
    for method, cells in _cells(block):
        for column, (value, spread) in zip(columns, cells, strict=True):
            found.append(Published(**{"table": number, "method": method, **column, "value": value, "spread": spread}))
    return found


def _by_task(number: int, block: str, columns: list[Mapping[str, Any]]) -> list[Published]:
    """Tables whose rows are tasks and whose columns are methods."""
    found = []
    for name, cells in _cells(block):
        steered = name in ("sycophancy", "survival-instinct")
        about = dict(task="steering", behaviour=name) if steered else dict(task=name)
        for column, (value, _) in zip(columns, cells, strict=True):
            model = _INSTRUCT if name == "instruction" else "LLaMA-3.1-8B-Instruct"
            found.append(Published(**{"table": number, "value": value, "model": model, **about, **column}))
    return found


@cache
def published() -> tuple[Published, ...]:
    """Every number of Tables 1, 3 and 8 to 13."""
    lora, head = dict(recipe="lora"), dict(recipe="head")
    rows = _table(1, _TABLE_1, [{**_AUPRC, **lora}, {**_ACCURACY, **lora}, *_STEERED, _LC, _WR, _SD])
    for model, ((before, s), (after, t)) in _cells(_TABLE_3):  # type: ignore[misc]
        note = "equal to the head-only numbers of Table 13: linear probing, without a control arm"
        about = dict(table=3, model=model, note=note, **_AUPRC, **head)
        rows.append(Published(method="Baseline", value=before, spread=s, **about))  # type: ignore[arg-type]
        rows.append(Published(method="FAC Synthesis", value=after, spread=t, **about))  # type: ignore[arg-type]
    rows += _by_task(
        8,
        _TABLE_8,
        [
            dict(
                column=f"{kind} correlation of FAC and score", method="across methods", metric=kind, unit="correlation"
            )
            for kind in ("Pearson", "Spearman")
        ],
    )
    rows += _table(9, _TABLE_9, [{**_AUPRC, **head}, {**_ACCURACY, **head}, *_STEERED, _LC, _WR])
    rows += _by_task(
        10,
        _TABLE_10,
        [
            dict(column=f"FAC at threshold {delta}", method=f"{steps} step", metric="missing_hit_rate", note=_HIT)
            for delta in (0, 1, 2)
            for steps in ("one", "two")
        ],
    )
    fac = dict(column="FAC", task="toxicity", metric="missing_hit_rate", note=_HIT)
    rows += _table(11, _TABLE_11, [fac, {**_AUPRC, **lora}])
    rows += _table(12, _TABLE_12, [{**_AUPRC, **lora}])
    rows += _table(13, _TABLE_13_TOXICITY, [{**_AUPRC, **head}])
    sections = [
        dict(column=f"reward accuracy, {name}", task="reward", metric=f"accuracy@{name}", **head)
        for name in ("Chat", "Chat Hard", "Safety", "Reasoning")
    ]
    rows += _table(13, _TABLE_13_REWARD, [*sections, {**_ACCURACY, **head}])
    return tuple(rows + _table(13, _TABLE_13_REWARD_MEAN, [{**_ACCURACY, **head}]))


def select(**wanted: Any) -> list[Published]:
    """The rows whose fields have these values.

    Raises:
        TransferError: For an unknown field.
    """
    unknown = set(wanted) - set(Published.__dataclass_fields__)
    if unknown:
        raise TransferError(f"A published number has no field {sorted(unknown)[0]!r}.")
    return [row for row in published() if all(getattr(row, k) == v for k, v in wanted.items())]


def beside(results: Iterable[EvalResult], **wanted: Any) -> list[dict[str, Any]]:
    """Results of one's own run beside the paper's rows of the same task and metric.

    Args:
        results: Of this package's tasks; ``intent`` and ``toxicity`` both stand beside the paper's toxicity.
        wanted: Further fields that the rows must have, such as ``recipe`` or ``table``.

    Returns:
        One entry per pair of result and row: the row's fields, its ``source``, and ``own``, ``own_stderr`` (both in the
        row's unit) and ``own_n``. No difference is taken: models, data and seeds are not the paper's.
    """
    found = []
    for result in results:
        task = "toxicity" if result.task == "intent" else result.task
        for row in select(task=task, metric=result.metric, **wanted):
            scale = 100.0 if row.unit == "percent" else 1.0
            own = {"own": result.value * scale, "own_stderr": result.stderr * scale, "own_n": result.n}
            found.append({**asdict(row), "source": row.source, **own})
    return found


SYNTHESIZED = {"toxicity": 200, "reward": 300, "sycophancy": 3, "survival-instinct": 3, "instruction": 2000}
"""Samples that FAC Synthesis keeps for each task (Appendix K)."""


def data_efficiency(score: float, n_samples: int) -> float:
    """DES = score / log10(synthesized samples) (Sec. 7.6), in the score's unit.

    Raises:
        TransferError: For fewer than two samples, where it is infinite or negative.
    """
    if n_samples < 2:
        raise TransferError(f"The data-efficiency score needs at least 2 samples, got {n_samples}.")
    return score / math.log10(n_samples)


def parameter_efficiency(score: float, n_trainable: int) -> float:
    """PES = score / log10(trainable parameters) (Eq. 92), in the score's unit.

    Raises:
        TransferError: For fewer than two parameters.
    """
    if n_trainable < 2:
        raise TransferError(f"The parameter-efficiency score needs at least 2 parameters, got {n_trainable}.")
    return score / math.log10(n_trainable)

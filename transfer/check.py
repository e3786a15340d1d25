"""Look at an experiment before it runs: everything that is wrong with it, and what it will take; no weight is read."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligners.assignment import DENSE_LIMIT
from models.headers import ModelHeader, SaeHeader, misfits, model_header, sae_header
from models.rubric import load_rubric
from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus
from transfer.cover.delta import DeltaRule
from transfer.estimate import BYTES, GIB, GPU_RATE, Side, Sizes, Work, measured_rate, memory, sae_gib, work
from transfer.finetune import get_recipe
from transfer.hub import HUB, UnreachableError, parse_hub
from transfer.splits import SPLITS, check_corpora, load_corpora
from transfer.synth.safety import check_allowed
from transfer.tasks import get_task, grid_task

BYTES_PER_TOKEN = 4.0
"""Of English text, for tokenizers that are not at hand."""
USUAL_L0 = 100
"""Active features a token of an SAE that does not say."""
SAMPLE = 200
"""Texts that are tokenised to estimate the rest."""
USUAL_TOKENS = 178
"""Tokens a text of a set that is not here: the mean of the paper's corpus (arXiv 2602.10388, App. J)."""


@dataclass
class Check:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """What will stop the run; all at once."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or deserves a thought."""
    models: list[dict[str, Any]] = field(default_factory=list)
    """Per model: shapes, and GiB of weights, SAE and activation store."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Per stage: TFLOP and, at the given rate, hours; GiB of memory where a stage is known to need much."""
    memory: list[dict[str, Any]] = field(default_factory=list)
    """Per device: GiB of what stays loaded, and of the most expensive fine-tuning."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the totals."""
        hours = [s["hours"] for s in self.stages]
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "models": self.models,
            "memory": self.memory,
            "stages": self.stages,
            "disk_gib": sum((m["store_gib"] or 0) + m["download_gib"] for m in self.models),
            "hours": None if None in hours else sum(hours),
        }

    def try_(self, what: Callable[[], Any]) -> Any:
        """The result, or None with the error on the list."""
        try:
            return what()
        except TransferError as error:
            self.problems.append(str(error))
            return None


def check(experiment: Experiment, *, tflops: float | None = None) -> Check:
    """Check names, data, shapes, memory and time of an experiment.

    Parameters are counted on torch's meta device; SAEs are read by their configuration. What lies on the Hub and is
    neither cached nor reachable is described by ``models.registry``, and the notes say so.

    Args:
        experiment: Validated configuration.
        tflops: Arithmetic rate of the machine that will run it, in 10¹² FLOP/s; measured here when left out.

    Returns:
        Problems and estimates. FLOP counts are 2 a parameter and token (Kaplan et al. 2020), doubled for what LoRA
        needs of the backward pass; hours are those of the arithmetic alone, at full rate.
    """
    found = Check()
    tune = experiment.tune
    for recipe in tune.recipes:
        found.try_(lambda r=recipe: get_recipe(r))
    task = found.try_(lambda: get_task(tune.task, **tune.options))
    alone = bool(tune.train or tune.base or (task is not None and not hasattr(task, "positive")))
    if task is not None and not alone:
        found.try_(lambda: grid_task(tune, experiment.data.positive))
    if alone:
        found.notes.append(
            f"tune: {tune.task} is trained on its own, with `transfer tune task`; `transfer run` would refuse it."
        )
    found.try_(lambda: DeltaRule.parse(experiment.cover.delta))
    _judge(found, experiment)
    found.try_(lambda: check_allowed(experiment))
    corpora, sizes = _texts(found, experiment, alone)
    if len(experiment.models) < 2:
        found.notes.append("One model: nothing is aligned, and no features are mapped.")
    sides = []
    for name, section in experiment.models.items():
        model = found.try_(lambda s=section: model_header(s.model))
        sae = found.try_(lambda s=section: sae_header(s.sae))
        if model and sae:
            layer = _layer(found, name, section.layer, model, sae)
            sides.append(Side(name, model, sae, layer, section.dtype, section.device))
    if tune.base is not None and (model := found.try_(lambda: model_header(tune.base.model))):  # type: ignore[union-attr]
        sides.append(Side("base", model, None, None, tune.base.dtype, tune.base.device, writes=False))
    texts = {s.name: sizes | {k: _sizes(found, s, [t.text for t in c]) for k, c in corpora.items()} for s in sides}
    train, held = (
        _own(found, sides, task, ref, k) for ref, k in ((tune.train, "train"), (tune.evaluation, "evaluation"))
    )
    for side in sides:
        found.models.append(_model_row(found, side, texts[side.name], experiment))
    _alignment(found, [s for s in sides if s.sae], experiment)
    rate = tflops or _rate(found, sides)
    found.stages += work(sides, Work(texts, train, held, alone), experiment, rate)
    for row in found.stages:
        row["hours"] = row["tflop"] / rate / 3600
    for side in sides:
        if side.model.n_params is None:
            found.notes.append(f"models.{side.name}: its size is not known here, so no time is estimated.")
    found.memory = memory(sides, experiment, alone)
    _room(found)
    return found


def _judge(found: Check, experiment: Experiment) -> None:
    """The rubric, and what a language model that is asked over a network needs."""
    judge, synth = experiment.judge, experiment.synth
    if judge.kind != "statistical":
        found.try_(lambda: load_rubric(judge.rubric))
        if not judge.model:
            found.problems.append(f"The judge {judge.kind!r} needs a model. Name one in judge.model.")
    keys = {
        "judge.key_variable": judge.key_variable if judge.kind == "endpoint" else "",
        "synth.asking.key_variable": synth.asking.key_variable if synth.chat.startswith("http") else "",
    }
    for name, variable in keys.items():
        if variable and not os.environ.get(variable):
            found.notes.append(f"{name}: ${variable} is not set here.")
    if judge.kind == "endpoint" or synth.chat.startswith("http"):
        found.notes.append("What is asked of an endpoint is in none of the hours.")


def _texts(found: Check, experiment: Experiment, alone: bool) -> tuple[dict[str, Corpus], dict[str, Sizes]]:
    """Corpora that are here, and assumed sizes of those that are not."""
    data = experiment.data
    refs = {k: ref for k in ("source", *SPLITS) if (ref := getattr(data, k))}
    away = {k: size for k, ref in refs.items() if (size := _away(found, f"data.{k}", ref)) is not None}
    # What is not here can be neither compared nor checked; what is here still can.
    here = data.model_copy(update=dict.fromkeys(away))
    if set(refs) == set(away) or any(p.startswith("data.") for p in found.problems):
        return {}, away
    loaded = found.try_(lambda: load_corpora(here))
    corpora: dict[str, Corpus] = loaded[0] if loaded else {}
    if corpora and not away:
        labelled = experiment.judge.kind == "statistical"
        found.try_(lambda: check_corpora(corpora, data.positive, evaluate=not alone, labelled=labelled))
    return corpora, away


def _away(found: Check, where: str, ref: str) -> Sizes | None:
    """The assumed size of a set on the Hub that is not cached here; None for one that is here (or is none at all)."""
    from transfer.hub import load_hub

    if not ref.startswith(HUB):
        return None
    named = found.try_(lambda: parse_hub(ref))
    if named is None:
        return None
    try:
        load_hub(ref)
    except UnreachableError:
        if named.rows is None:
            found.notes.append(
                f"{where}: {ref} is not here; without `rows` its size is not known, so it counts as none."
            )
        else:
            found.notes.append(
                f"{where}: {ref} is not here; {named.rows:,} texts of {USUAL_TOKENS} tokens are assumed, and neither "
                "its columns nor its labels were looked at."
            )
        return Sizes(named.rows or 0, (named.rows or 0) * USUAL_TOKENS)
    except TransferError as error:
        found.problems.append(str(error))
        return Sizes(0, 0)
    return None


def _own(found: Check, sides: list[Side], task: Any, ref: str | None, key: str) -> dict[str, Sizes]:
    """Sizes of a set that the task reads itself."""
    if ref is None or task is None:
        return {}
    size = _away(found, f"tune.{key}", ref)
    if size is None:
        loaded = found.try_(lambda: task.load(ref))
        if loaded is None:
            return {}
        if getattr(loaded, "left_out", None):
            found.notes.append(f"tune.{key}: {ref} has rows that are left out: {dict(loaded.left_out)}.")
        words = [" ".join(_strings(list(row))) for row in task.examples(loaded)]
        return {side.name: _sizes(found, side, words) for side in sides}
    return {side.name: size for side in sides}


def _strings(value: Any) -> Iterable[str]:
    """Every text in nested lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def _rate(found: Check, sides: list[Side]) -> float:
    import torch

    device, dtype = next(((s.device, s.dtype) for s in sides if s.device != "cpu"), ("cpu", "float32"))
    if device != "cpu" and not torch.cuda.is_available():
        found.notes.append(
            f"No GPU is here: hours are for {GPU_RATE:g} TFLOP/s, about 30 % of an H100 (--tflops to change that)."
        )
        return GPU_RATE
    return measured_rate(device, dtype)


def _room(found: Check) -> None:
    """Whether memory and disk hold it, where the devices are those of this machine."""
    import torch

    for row in found.memory:
        device = row["device"]
        if device == "cpu":
            room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        elif torch.cuda.is_available():
            index = int(device.partition(":")[2] or 0)
            if index >= torch.cuda.device_count():
                found.problems.append(f"There is no {device} here, only {torch.cuda.device_count()} GPUs.")
                continue
            room = torch.cuda.get_device_properties(index).total_memory / GIB
        else:
            continue
        row["room_gib"] = room
        if row["gib"] > room:
            found.problems.append(
                f"{', '.join(row['models'])} on {device} need about {row['gib']:.0f} GiB ({row['loaded_gib']:.0f} "
                f"loaded, {row['tuning_gib']:.0f} while fine-tuning), it has {room:.0f}. Use another device, dtype "
                "bfloat16, or a recipe with checkpointing."
            )
    needed = sum((m["store_gib"] or 0) + m["download_gib"] for m in found.models)
    folder = Path(os.environ.get("TRANSFER_RUNS", "runs")).absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free / GIB
    if needed > free:
        text = f"Stores and downloads need about {needed:.0f} GiB of disk, {free:.0f} are free here."
        # Where its devices are not here, neither is its disk.
        absent = any(row["device"] != "cpu" and "room_gib" not in row for row in found.memory)
        (found.notes if absent else found.problems).append(text)


def _layer(found: Check, name: str, wanted: int | None, model: ModelHeader, sae: SaeHeader) -> int | None:
    found.problems += [f"models.{name}: {problem}" for problem in misfits(model, sae, wanted)]
    layer = sae.layer if wanted is None else wanted
    if layer is not None and not 0 <= layer <= model.n_layers:
        layer = None
    if sae.model and model.hub and sae.model != model.hub:
        found.notes.append(
            f"models.{name}: {sae.ref} was trained on {sae.model}, not on {model.hub}; the first harvest says how "
            "well it fits."
        )
    for what, header in (("weights", model), ("weights of the SAE", sae)):
        if not header.weights:
            place = "on the Hub" if header.ref.startswith(("hub:", "saelens:", "fac:")) else "missing"
            message = f"models.{name}: the {what} of {header.ref} are {place}"
            (found.notes if place == "on the Hub" else found.problems).append(message + ", they were not looked at.")
    return layer


def _sizes(found: Check, side: Side, texts: list[str]) -> Sizes:
    """Texts and tokens of a set, from a sample where the tokenizer is here."""
    size = sum(len(t.encode("utf8")) for t in texts)
    sample = texts[:: max(1, len(texts) // SAMPLE)]
    try:
        from transformers import AutoTokenizer

        from models.language import SCHEMES
        from models.refs import local, parse
        from models.registry import hub_id

        scheme, rest = parse(side.model.ref, SCHEMES, "model")
        repository, _, revision = rest.partition("@")
        tokenizer = (
            AutoTokenizer.from_pretrained(hub_id(repository), revision=revision)
            if scheme == "hub"
            else AutoTokenizer.from_pretrained(local(scheme, rest, side.model.ref, "model"), local_files_only=True)
        )
        n = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
        return Sizes(len(texts), round(n * size / max(1, sum(len(t.encode("utf8")) for t in sample))))
    except (OSError, ValueError, TransferError):
        note = f"models.{side.name}: no tokenizer at hand; {BYTES_PER_TOKEN:g} bytes a token are assumed."
        if note not in found.notes:
            found.notes.append(note)
        return Sizes(len(texts), round(size / BYTES_PER_TOKEN))


def _model_row(found: Check, side: Side, texts: dict[str, Sizes], experiment: Experiment) -> dict[str, Any]:
    model, sae, width = side.model, side.sae, side.width
    stored = sum(texts[k].tokens for k in ("anchor", "seed") if k in texts) if sae else 0
    if sae and sae.k is None:
        found.notes.append(f"models.{side.name}: {USUAL_L0} active features a token are assumed.")
    code = 8 * (sae and sae.k or USUAL_L0) + 16
    state = 2 * width if experiment.harvest.keep_residual and width else 0
    # Published checkpoints are in 16 bits; FAC's SAEs are tied, in 32.
    fetched = 0.0 if model.weights or model.n_params is None else 2 * model.n_params / GIB
    if sae and not sae.weights:
        fetched += sae_gib(side) / (2 if sae.ref.startswith("fac:") else 1)
    return {
        "name": side.name,
        "model": model.ref,
        "family": model.family,
        "sae": sae.ref if sae else None,
        "layer": side.layer,
        "n_layers": model.n_layers,
        "d_model": width,
        "features": sae.n_features if sae else None,
        "rule": sae.rule if sae else None,
        "dtype": side.dtype,
        "device": side.device,
        "parameters": model.n_params,
        "weights_gib": None if model.n_params is None else BYTES[side.dtype] * model.n_params / GIB,
        "sae_gib": sae_gib(side) or None,
        "tokens": stored,
        "store_gib": stored * (code + state) / GIB,
        "download_gib": fetched,
    }


def _alignment(found: Check, sides: list[Side], experiment: Experiment) -> None:
    """Methods that refuse this size, and memory that is not there."""
    settings = experiment.align
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    for one, other in itertools.combinations(sides, 2):
        assert one.sae and other.sae
        a, b, n, m = one.name, other.name, one.sae.n_features, other.sae.n_features
        d, e = one.width, other.width
        if n and m and max(n, m) > DENSE_LIMIT and "sinkhorn" in settings.methods:
            text = (
                f"align: `sinkhorn` takes at most {DENSE_LIMIT:,} testable features a side, {a} has {n:,} and {b} "
                f"{m:,} in all"
            )
            if settings.use == "sinkhorn":
                found.problems.append(f"{text}. Set align.methods and align.use to `fused`.")
            else:
                found.notes.append(f"{text}.")
        if n and m and d and e:
            sums = 3 * 8 * (d * d + d * e + e * e)
            needs = {
                # Sums of residuals, directions in the common space, candidate edges.
                "fused": sums + 4 * min(1024, max(d, e)) * 2 * (n + m) + 64 * 100 * (n + m),
                # Float64 directions of both sides before and after the map.
                "map": sums + 8 * (2 * n * (d + e) + 2 * m * e),
            }
            for method in sorted(set(settings.methods) & set(needs)):
                gib = needs[method] / GIB
                if gib > 0.1:
                    found.stages.append(
                        {"stage": f"align {a}-{b} {method}", "tflop": 2 * n * m * e / 1e12, "memory_gib": gib}
                    )
                if gib > free:
                    found.problems.append(
                        f"align: `{method}` of {a} and {b} needs about {gib:.0f} GiB, this machine has {free:.0f}."
                    )

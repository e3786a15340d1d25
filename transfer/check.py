"""Look at an experiment before it runs: everything that is wrong with it, and what it will take; no weight is read."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aligners.assignment import DENSE_LIMIT
from models.headers import ModelHeader, SaeHeader, misfits, model_header, sae_header
from transfer.core.config import Experiment
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus
from transfer.delta import DeltaRule
from transfer.finetune import RECIPES, get_recipe
from transfer.splits import check_corpora, load_corpora
from transfer.tasks import get_task

GIB = 2**30
BYTES_PER_TOKEN = 4.0
"""Of English text, for tokenizers that are not at hand."""
USUAL_L0 = 100
"""Active features a token of an SAE that does not say."""
SAMPLE = 200
"""Texts that are tokenised to estimate the rest."""


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

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the totals."""
        hours = [s["hours"] for s in self.stages]
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "models": self.models,
            "stages": self.stages,
            "disk_gib": sum(m["store_gib"] or 0 for m in self.models),
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
    for recipe in experiment.tune.recipes:
        found.try_(lambda r=recipe: get_recipe(r))
    found.try_(lambda: get_task(experiment.tune.task, positive=experiment.data.positive))
    found.try_(lambda: DeltaRule.parse(experiment.cover.delta))
    loaded = found.try_(lambda: load_corpora(experiment.data))
    corpora: dict[str, Corpus] = loaded[0] if loaded else {}
    if corpora:
        found.try_(lambda: check_corpora(corpora, experiment.data.positive, evaluate=True))
    if len(experiment.models) < 2:
        found.notes.append("One model: nothing is aligned, and no features are mapped.")
    sides = {}
    for name, section in experiment.models.items():
        model = found.try_(lambda s=section: model_header(s.model))
        sae = found.try_(lambda s=section: sae_header(s.sae))
        if model and sae:
            sides[name] = (model, sae, _layer(found, name, section.layer, model, sae))
    tokens = {n: {s: _tokens(found, n, m.ref, c) for s, c in corpora.items()} for n, (m, _, _) in sides.items()}
    for name, (model, sae, layer) in sides.items():
        found.models.append(_model_row(found, name, model, sae, layer, tokens[name], experiment))
    _alignment(found, sides, experiment)
    n_anchor = len(corpora["anchor"]) if "anchor" in corpora else 1
    _work(found, sides, tokens, n_anchor, experiment, tflops or _measured_rate())
    return found


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


def _tokens(found: Check, name: str, ref: str, corpus: Corpus) -> int:
    """Tokens of a corpus, from a sample where the tokenizer is here."""
    texts = [t.text for t in corpus]
    size = sum(len(t.encode("utf8")) for t in texts)
    sample = texts[:: max(1, len(texts) // SAMPLE)]
    try:
        from transformers import AutoTokenizer

        from models.language import SCHEMES
        from models.refs import local, parse
        from models.registry import hub_id

        scheme, rest = parse(ref, SCHEMES, "model")
        repository, _, revision = rest.partition("@")
        tokenizer = (
            AutoTokenizer.from_pretrained(hub_id(repository), revision=revision)
            if scheme == "hub"
            else AutoTokenizer.from_pretrained(local(scheme, rest, ref, "model"), local_files_only=True)
        )
        n = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False)["input_ids"])
        return round(n * size / max(1, sum(len(t.encode("utf8")) for t in sample)))
    except (OSError, ValueError, TransferError):
        note = f"models.{name}: no tokenizer at hand; {BYTES_PER_TOKEN:g} bytes a token are assumed."
        if note not in found.notes:
            found.notes.append(note)
        return round(size / BYTES_PER_TOKEN)


def _model_row(
    found: Check,
    name: str,
    model: ModelHeader,
    sae: SaeHeader,
    layer: int | None,
    tokens: dict[str, int],
    experiment: Experiment,
) -> dict[str, Any]:
    width, features = model.d_model or sae.d_model, sae.n_features
    stored = tokens.get("anchor", 0) + tokens.get("seed", 0)
    if sae.k is None:
        found.notes.append(f"models.{name}: {USUAL_L0} active features a token are assumed.")
    code = 8 * (sae.k or USUAL_L0) + 16
    state = 2 * width if experiment.harvest.keep_residual and width else 0
    return {
        "name": name,
        "model": model.ref,
        "family": model.family,
        "sae": sae.ref,
        "layer": layer,
        "n_layers": model.n_layers,
        "d_model": width,
        "features": features,
        "rule": sae.rule,
        "parameters": model.n_params,
        "weights_gib": None if model.n_params is None else 4 * model.n_params / GIB,
        "sae_gib": None if not (width and features) else 2 * 4 * width * features / GIB,
        "tokens": stored,
        "store_gib": stored * (code + state) / GIB,
    }


def _alignment(found: Check, sides: dict[str, Any], experiment: Experiment) -> None:
    """Methods that refuse this size, and memory that is not there."""
    settings = experiment.align
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    for (a, (model_a, sae_a, _)), (b, (model_b, sae_b, _)) in itertools.combinations(sides.items(), 2):
        n, m = sae_a.n_features, sae_b.n_features
        d, e = model_a.d_model or sae_a.d_model, model_b.d_model or sae_b.d_model
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


def _work(
    found: Check,
    sides: dict[str, Any],
    tokens: dict[str, dict[str, int]],
    n_anchor: int,
    experiment: Experiment,
    rate: float,
) -> None:
    """TFLOP of harvesting, writing and fine-tuning, and hours at ``rate``."""
    n_models = len(experiment.models)
    for name, (model, sae, layer) in sides.items():
        counted = tokens[name]
        reference = counted.get("anchor", 0) + counted.get("seed", 0)
        lower, width = (None if layer is None else model.lower(layer)), model.d_model
        if lower is not None and width and sae.n_features:
            flop = 2 * reference * (lower + width * sae.n_features)
            found.stages.append({"stage": f"harvest {name}", "tflop": flop / 1e12, "memory_gib": None})
        if model.n_params is None:
            found.notes.append(f"models.{name}: its size is not known here, so no time is estimated.")
            continue
        # Features that its own, the random, and every other model's mapped and shuffled arm ask this writer for.
        asked = experiment.synth.features * 2 * n_models
        texts = asked * 2 * (experiment.synth.explore + experiment.synth.contrast)
        length = (
            experiment.synth.examples * min(counted.get("anchor", 0) / n_anchor, 128) + experiment.synth.max_new_tokens
        )
        found.stages.append(
            {"stage": f"synth {name}", "tflop": 2 * model.n_params * texts * length / 1e12, "memory_gib": None}
        )
        found.stages.append(
            {
                "stage": f"tune {name}",
                "tflop": _tuning(model.n_params, counted, n_anchor, experiment),
                "memory_gib": None,
            }
        )
    for row in found.stages:
        row["hours"] = row["tflop"] / rate / 3600


def _tuning(n_params: int, tokens: dict[str, int], n_anchor: int, experiment: Experiment) -> float:
    """TFLOP of all cells of one target: every arm, recipe and seed."""
    sets, seeds = 3 * len(experiment.models) + 1, len(experiment.tune.seeds)
    each = tokens.get("anchor", 0) / n_anchor
    small = tokens.get("seed", 0) + experiment.synth.budget * each
    sizes = [small] * (sets - 1) + [tokens.get("anchor", 0) + tokens.get("seed", 0)]
    flop = 0.0
    for name in experiment.tune.recipes:
        if name not in RECIPES:
            continue
        recipe = RECIPES[name]
        upper = 1 / 3 if recipe.layers == "upper" else 1.0
        for size in sizes:
            seen = size * recipe.epochs
            if recipe.max_steps is not None:
                seen = min(seen, recipe.max_steps * recipe.batch * each)
            # A head reads what one pass gives; adapters need the backward pass too, but no gradient of the weights.
            trained = size if recipe.kind == "head" else size * (1 - upper) + 2 * seen * upper
            flop += 2 * n_params * seeds * (trained + upper * tokens.get("evaluation", 0))
    return flop / 1e12


def _measured_rate(size: int = 1024) -> float:
    """10¹² FLOP/s of a float32 product on this machine, the best of a few."""
    import torch

    x = torch.ones(size, size)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, x)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12

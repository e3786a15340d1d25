"""Published SAEs of the three families: which model and layer each reads, and which of them can be compared.

Names, hooks and expected figures come from SAELens' own registry; what that leaves out (canonical layers, hub ids
behind short names, depths of the models, widths) is added here. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transfer.core.errors import TransferError

NEURONPEDIA = "https://www.neuronpedia.org/"
DEPTH = 0.05
"""Difference of relative depth up to which layers of two models count as the same place."""


@dataclass(frozen=True)
class KnownModel:
    """What has to be known of a model before anything of it is loaded."""

    hub: str
    """``org/name`` on the Hub."""
    family: str
    n_layers: int
    chat: bool
    """Trained to answer; otherwise a base model."""
    short: tuple[str, ...] = ()
    """Other names in use."""


MODELS: tuple[KnownModel, ...] = (
    KnownModel("meta-llama/Llama-3.1-8B", "LLaMA", 32, False, ("llama3.1-8b", "Llama-3.1-8B")),
    KnownModel("meta-llama/Llama-3.1-8B-Instruct", "LLaMA", 32, True, ("llama3.1-8b-it", "Llama-3.1-8B-Instruct")),
    KnownModel("meta-llama/Meta-Llama-3-8B-Instruct", "LLaMA", 32, True, ("llama3-8b-it",)),
    KnownModel("meta-llama/Llama-3.3-70B-Instruct", "LLaMA", 80, True, ("llama3.3-70b-it",)),
    KnownModel("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "LLaMA", 32, True, ("deepseek-r1-distill-llama-8b",)),
    KnownModel("mistralai/Mistral-7B-v0.1", "Mistral", 32, False, ("mistral-7b",)),
    KnownModel("mistralai/Mistral-7B-Instruct-v0.1", "Mistral", 32, True, ("mistral-7b-instruct-v0.1",)),
    KnownModel("mistralai/Mistral-7B-Instruct-v0.2", "Mistral", 32, True),
    KnownModel("Qwen/Qwen2-7B-Instruct", "Qwen", 28, True, ("qwen2-7b-instruct",)),
    KnownModel("Qwen/Qwen2.5-7B-Instruct", "Qwen", 28, True, ("qwen2.5-7b-it", "qwen2.5-7b-instruct")),
    KnownModel("Qwen/Qwen3-0.6B", "Qwen", 28, True, ("qwen3-0.6b",)),
    KnownModel("Qwen/Qwen3-1.7B", "Qwen", 28, True, ("qwen3-1.7b",)),
    KnownModel("Qwen/Qwen3-4B", "Qwen", 36, True, ("qwen3-4b",)),
    KnownModel("Qwen/Qwen3-8B", "Qwen", 36, True, ("qwen3-8b",)),
    KnownModel("Qwen/Qwen3-14B", "Qwen", 40, True, ("qwen3-14b",)),
    KnownModel("Qwen/Qwen3-1.7B-Base", "Qwen", 28, False),
    KnownModel("Qwen/Qwen3-8B-Base", "Qwen", 36, False),
    KnownModel("Qwen/Qwen3-30B-A3B-Base", "Qwen", 48, False),
    KnownModel("Qwen/Qwen3.5-2B-Base", "Qwen", 24, False),
    KnownModel("Qwen/Qwen3.5-9B-Base", "Qwen", 32, False),
    KnownModel("Qwen/Qwen3.5-27B", "Qwen", 64, True),
    KnownModel("Qwen/Qwen3.5-35B-A3B-Base", "Qwen", 40, False),
)

# The checkpoints of FAC Synthesis (arXiv 2602.10388): no registry lists them, and their base models are not certain.
FAC: tuple[tuple[str, str, int], ...] = (
    ("Zhongzhi1228/sae_llama_l16_h65536", "meta-llama/Llama-3.1-8B-Instruct", 16),
    ("Zhongzhi1228/sae_mistral_l16_h65536", "mistralai/Mistral-7B-Instruct-v0.2", 16),
    ("Zhongzhi1228/sae_qwen_l14_h65536", "Qwen/Qwen2-7B-Instruct", 14),
)

_SITES = (
    # (pattern of the id, site, what to add to the number for the canonical layer)
    (r"blocks\.(\d+)\.hook_resid_pre", "residual", 0),
    (r"blocks\.(\d+)\.hook_resid_post", "residual", 1),
    (r"resid_post_layer_(\d+)_.*", "residual", 1),
    (r"l(\d+)r_.*", "residual", 1),
    (r"l(\d+)m_.*", "MLP output", 1),
    (r"l(\d+)a_.*", "attention output", 1),
    (r"layer_?(\d+)", "residual", 1),
)
_RECIPES = {
    "llama_scope": "jumprelu",
    "llama_scope_r1_distill": "jumprelu",
    "dictionary_learning_1": "batchtopk as jumprelu",
    "goodfire": "relu",
    "deepseek_r1": "relu",
    "temporal": "temporal",
    "qwen_scope": "topk",
    "mwhanna_transcoder": "transcoder",
}
_WIDTHS = (
    (r"_8x$|llama_scope_r1_distill", 2**15),
    (r"_32x$|andyrdt$", 2**17),
    (r"goodfire|res-jh$|qresearch$|-w64k-", 2**16),
    (r"-w32k-", 2**15),
    (r"-w80k-", 80 * 1024),
    (r"-w128k-", 2**17),
)


@dataclass(frozen=True)
class KnownSae:
    """One published SAE."""

    ref: str
    """As ``Dictionary.load`` and a configuration take it."""
    model: str
    """Hub id of the model it was trained on."""
    family: str
    layer: int
    """Canonical: the index into transformers' ``hidden_states``."""
    depth: float
    """Layer over the model's number of layers."""
    site: str
    """``residual``, ``MLP output``, ``attention output`` or ``transcoder``."""
    width: int | None
    """Features, where the release says so."""
    recipe: str
    chat: bool
    l0: float | None
    """Expected features active a token; None where the registry has a placeholder."""
    explained: float | None
    """Expected share of variance explained; None where the registry has a placeholder."""
    neuronpedia: str
    """Link, or empty."""
    refused: str
    """Why it cannot be a feature space here; empty when it can."""


def known_model(name: str) -> KnownModel | None:
    """The model behind a hub id or a short name, or None; case does not matter."""
    wanted = name.casefold()
    return next((m for m in MODELS if wanted in {m.hub.casefold(), *(s.casefold() for s in m.short)}), None)


def hub_id(name: str) -> str:
    """The hub id behind a short name such as ``mistral-7b``; anything else unchanged."""
    found = known_model(name)
    return found.hub if found else name


@lru_cache(maxsize=1)
def known_saes() -> tuple[KnownSae, ...]:
    """All SAEs of SAELens' registry on models of the three families, and FAC's own; takes two seconds, once."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    found = []
    for release, entry in get_pretrained_saes_directory().items():
        if model := known_model(entry.model):
            found += [_known(release, sae_id, entry, model) for sae_id in entry.saes_map]
    for repository, name, layer in FAC:
        model = known_model(name)
        assert model is not None
        found.append(
            KnownSae(
                ref=f"fac:{repository}",
                model=model.hub,
                family=model.family,
                layer=layer,
                depth=layer / model.n_layers,
                site="residual",
                width=2**16,
                recipe="topk",
                chat=model.chat,
                l0=20.0,
                explained=None,
                neuronpedia="",
                refused="",
            )
        )
    return tuple(sorted(found, key=lambda s: (s.family, s.model, s.layer, s.ref)))


def find_sae(ref: str) -> KnownSae | None:
    """What is known of an SAE reference, or None."""
    return next((s for s in known_saes() if s.ref == ref), None)


def select_saes(
    *, family: str = "", model: str = "", layer: int | None = None, usable: bool = True
) -> tuple[KnownSae, ...]:
    """Known SAEs, narrowed down.

    Args:
        family: ``LLaMA``, ``Mistral`` or ``Qwen``, in any case; empty for all.
        model: Hub id, short name, or a part of the hub id; empty for all.
        layer: Canonical layer.
        usable: Leave out those that cannot be a feature space.

    Raises:
        TransferError: For an unknown family, or a model that no SAE is known of.
    """
    families = sorted({m.family for m in MODELS})
    if family and family.casefold() not in {f.casefold() for f in families}:
        raise TransferError(f"There is no family {family!r}.", f"There is {', '.join(families)}.")
    wanted = hub_id(model).casefold()
    exact = known_model(model) is not None
    saes = known_saes()
    if model and not any(_named(s, wanted, exact) for s in saes):
        raise TransferError(f"No SAE is known of {model!r}.", "`transfer models ls` lists all models that have one.")
    return tuple(
        s
        for s in saes
        if (not family or s.family.casefold() == family.casefold())
        and (not model or _named(s, wanted, exact))
        and (layer is None or s.layer == layer)
        and not (usable and s.refused)
    )


def _named(sae: KnownSae, wanted: str, exact: bool) -> bool:
    return sae.model.casefold() == wanted if exact else wanted in sae.model.casefold()


@dataclass(frozen=True)
class ComparablePair:
    """Two SAEs of different families at like depth of models of one kind."""

    source: KnownSae
    target: KnownSae
    same_recipe: bool
    same_width: bool

    @property
    def apart(self) -> float:
        """Difference of relative depth."""
        return abs(self.source.depth - self.target.depth)


def comparable_pairs(saes: Sequence[KnownSae] | None = None) -> list[ComparablePair]:
    """Pairs across families that a comparison would not have to excuse, best first.

    Both on chat models or both on base models, at relative depths at most ``DEPTH`` apart; of each pair of releases
    only the nearest layers of each source layer. Same recipe goes first, then same width, then nearness.
    """
    usable = [s for s in (known_saes() if saes is None else saes) if not s.refused]
    best: dict[tuple[str, str], ComparablePair] = {}
    for a, b in itertools.combinations(usable, 2):
        if a.family == b.family or a.chat != b.chat or abs(a.depth - b.depth) > DEPTH:
            continue
        pair = ComparablePair(a, b, a.recipe == b.recipe, a.width is not None and a.width == b.width)
        key = (a.ref, _release(b.ref))
        if key not in best or pair.apart < best[key].apart:
            best[key] = pair
    return sorted(
        best.values(), key=lambda p: (not p.same_recipe, not p.same_width, p.apart, p.source.ref, p.target.ref)
    )


def _release(ref: str) -> str:
    return ref if ref.startswith("fac:") else ref.rpartition("/")[0]


def _known(release: str, sae_id: str, entry: Any, model: KnownModel) -> KnownSae:
    layer, site = _place(sae_id)
    recipe = _RECIPES.get(entry.conversion_func or "", "")
    if release == "llama-3-8b-it-res-jh":
        recipe = "gated"
    elif release == "mistral-7b-res-wg":
        recipe = "relu"
    if recipe == "topk":
        recipe = f"topk-{release.rpartition('-l')[2]}"
    if recipe == "transcoder":
        site = "transcoder"
    refused = {
        "MLP output": "it reads the output of an MLP, not the residual stream",
        "attention output": "it reads the output of attention, not the residual stream",
        "transcoder": "a transcoder maps one place to another and has no single space",
    }.get(site, "")
    if recipe == "temporal":
        refused = "a temporal SAE needs whole sequences: its codes depend on the tokens before"
    l0, explained = float((entry.expected_l0 or {}).get(sae_id) or 0), (entry.expected_var_explained or {}).get(sae_id)
    link = (entry.neuronpedia_id or {}).get(sae_id)
    return KnownSae(
        ref=f"saelens:{release}/{sae_id}",
        model=model.hub,
        family=model.family,
        layer=layer,
        depth=layer / model.n_layers,
        site=site,
        width=next((width for pattern, width in _WIDTHS if re.search(pattern, release)), None),
        recipe=recipe,
        chat=model.chat,
        l0=l0 or None,  # 0 stands for "not measured" there
        explained=None if explained in (None, 1.0) else float(explained),  # and so does 1
        neuronpedia=f"{NEURONPEDIA}{link}" if link else "",
        refused=refused,
    )


def _place(sae_id: str) -> tuple[int, str]:
    """Canonical layer and site.

    Raises:
        TransferError: For an id of a form not met before.
    """
    for pattern, site, after in _SITES:
        if match := re.fullmatch(pattern, sae_id):
            return int(match[1]) + after, site
    raise TransferError(f"The SAE id {sae_id!r} does not say which layer it reads.", "Give the layer.")


def summary(saes: Iterable[KnownSae]) -> list[dict[str, Any]]:
    """One row a (release, model): its layers, and what all of its SAEs have in common."""
    rows = []
    by_release = itertools.groupby(
        sorted(saes, key=lambda s: (s.family, s.model, _release(s.ref))), lambda s: _release(s.ref)
    )
    for release, group in by_release:
        members = sorted(group, key=lambda s: s.layer)
        first = members[0]
        rows.append(
            {
                "family": first.family,
                "model": first.model,
                "release": release,
                "example": first.ref,
                "layers": _ranges(sorted({s.layer for s in members})),
                "n": len(members),
                "site": first.site,
                "width": first.width,
                "recipe": first.recipe,
                "chat": first.chat,
                "neuronpedia": any(s.neuronpedia for s in members),
                "refused": first.refused,
            }
        )
    return rows


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as ``1-3, 7``."""
    out = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [n for _, n in group]
        out.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(out)

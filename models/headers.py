"""What a model and its SAE are, from configurations and headers alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.fac import fac_file
from models.family import family_of
from models.language import SCHEMES as MODEL_SCHEMES
from models.refs import local, parse
from models.registry import find_sae, hub_id, known_model
from models.sae import RULES, layer_of
from models.sae import SCHEMES as SAE_SCHEMES
from models.shapes import known_config
from transfer.core.errors import TransferError
from transfer.core.files import read_json


@dataclass(frozen=True)
class ModelHeader:
    """A language model before it is loaded; None where nothing at hand says so."""

    ref: str
    family: str
    n_layers: int
    d_model: int | None = None
    n_params: int | None = None
    """All of them."""
    n_lower: tuple[int, ...] = ()
    """Parameters that run before canonical layer i, embeddings left out (they are looked up, not multiplied)."""
    vocab: int | None = None
    hub: str = ""
    """Hub id, where the reference is one."""
    weights: bool = True
    """Whether the weights are at hand."""

    def lower(self, layer: int) -> int | None:
        """Parameters that a forward pass up to ``layer`` multiplies with."""
        return self.n_lower[layer] if self.n_lower else None


@dataclass(frozen=True)
class SaeHeader:
    """An SAE before it is loaded; None where nothing at hand says so."""

    ref: str
    layer: int | None = None
    d_model: int | None = None
    n_features: int | None = None
    k: int | None = None
    """Active features a token, where the number is fixed."""
    rule: str = ""
    model: str = ""
    """Hub id of the model it was trained on, where its release says so."""
    weights: bool = True


def model_header(ref: str) -> ModelHeader:
    """Read a configuration and count its parameters on torch's meta device, which holds none.

    A Hub model whose configuration is neither cached nor reachable is described by ``models.shapes``, or else by
    ``models.registry`` alone.

    Raises:
        TransferError: For a reference, folder or family that cannot be used, or a Hub model nothing is known of.
    """
    from transformers import AutoConfig

    scheme, rest = parse(ref, MODEL_SCHEMES, "model")
    weights = False
    try:
        if scheme == "hub":
            name, _, revision = rest.partition("@")
            if not revision:
                raise TransferError(f"{ref} names no revision.", f"Pin one, such as hub:{name}@main.")
            name = hub_id(name)
            config = AutoConfig.from_pretrained(name, revision=revision)
        else:
            name = ""
            folder = local(scheme, rest, ref, "model")
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            weights = any(folder.glob("*.safetensors"))
    except (OSError, ValueError) as error:
        hub = hub_id(rest.partition("@")[0]) if scheme == "hub" else ""
        known, config = known_model(hub), known_config(hub)
        if config is None:
            if known is None:
                first = str(error).strip().split("\n")[0]
                raise TransferError(f"The configuration of {ref} could not be read ({first}).") from error
            return ModelHeader(ref, known.family, known.n_layers, hub=known.hub, weights=False)
    family = family_of(config)
    model = _meta(config)
    layers = family.part(model, family.layers)
    lower = [0]
    for layer in layers:
        lower.append(lower[-1] + sum(p.numel() for p in layer.parameters()))
    return ModelHeader(
        ref=ref,
        family=family.name,
        n_layers=len(layers),
        d_model=config.hidden_size,
        n_params=sum(p.numel() for p in model.parameters()),
        n_lower=tuple(lower),
        hub=name,
        weights=weights,
        vocab=config.vocab_size,
    )


def misfits(model: ModelHeader, sae: SaeHeader, layer: int | None) -> list[str]:
    """Why a model and an SAE do not go together, a sentence each; what the headers do not say is not judged.

    Args:
        model: The model.
        sae: The SAE.
        layer: The layer asked for; the SAE's own where None.
    """
    found = []
    if None not in (layer, sae.layer) and layer != sae.layer:
        found.append(
            f"{sae.ref} was trained on layer {sae.layer}, the configuration says layer {layer}. "
            "Leave the layer out, or name the SAE of that layer."
        )
    read = sae.layer if layer is None else layer
    if read is None:
        found.append(f"{sae.ref} does not say which layer it reads. Give `layer`.")
    elif not 0 <= read <= model.n_layers:
        found.append(f"{model.ref} has layers 0 to {model.n_layers}, the SAE reads {read}.")
    if None not in (model.d_model, sae.d_model) and model.d_model != sae.d_model:
        found.append(
            f"{sae.ref} reads a residual stream of width {sae.d_model}, but that of {model.ref} is {model.d_model} "
            "wide. Pair each model with an SAE that was trained on it."
        )
    return found


def _meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sae_header(ref: str) -> SaeHeader:
    """Read an SAE's configuration; of a ``saelens:`` or ``fac:`` release that is not here, what is known of it.

    Raises:
        TransferError: For a reference or files that cannot be used, or an SAE that is no feature space here.
    """
    scheme, rest = parse(ref, SAE_SCHEMES, "SAE")
    known = find_sae(ref) if scheme in ("saelens", "fac") else None
    if known is not None:
        if known.refused:
            raise TransferError(f"{ref} cannot be used: {known.refused}.", "`transfer models ls` lists those that can.")
        k = int(known.l0) if known.recipe.startswith("topk") and known.l0 else None
        return SaeHeader(ref, known.layer, None, known.width, k, known.recipe, known.model, weights=False)
    if scheme == "saelens":
        raise TransferError(f"No release {ref} is known.", "`transfer models ls` lists those that are.")
    path = fac_file(rest) if scheme == "fac" else local(scheme, rest, ref, "SAE")
    return _fac_header(ref, path) if path.is_file() else _saelens_header(ref, path)


def _saelens_header(ref: str, folder: Path) -> SaeHeader:
    if not (folder / "cfg.json").is_file():
        raise TransferError(f"{folder} is no SAELens folder: it lacks cfg.json.")
    config = read_json(folder / "cfg.json")
    architecture = config.get("architecture", "")
    if architecture not in RULES:
        raise TransferError(f"{ref} is a {architecture or 'nameless'} SAE.", f"Of type {', '.join(RULES)} they work.")
    return SaeHeader(
        ref=ref,
        layer=layer_of(config.get("metadata") or {}, ref),
        d_model=config.get("d_in"),
        n_features=config.get("d_sae"),
        k=config.get("k") if architecture == "topk" else None,
        rule=RULES[architecture].format(k=config.get("k")),
        weights=(folder / "sae_weights.safetensors").is_file(),
    )


def _fac_header(ref: str, path: Path) -> SaeHeader:
    """Of a FAC checkpoint: shapes only, its tensors stay on the meta device."""
    from models.fac import fac_loader

    config, _ = fac_loader(path, device="meta")
    return SaeHeader(
        ref=ref,
        layer=config["metadata"].get("layer"),
        d_model=config["d_in"],
        n_features=config["d_sae"],
        k=config["k"],
        rule=f"topk-{config['k']}",
    )

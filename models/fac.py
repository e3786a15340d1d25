"""The checkpoint format of FAC Synthesis (arXiv 2602.10388), read as a SAELens TopK SAE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from transfer.core.errors import TransferError


def fac_file(rest: str) -> Path:
    """The checkpoint that ``fac:<file>`` or ``fac:<org/repository>[@revision]`` names.

    File names in the repositories are not fixed, so the one ``.pth`` there is found by listing.

    Raises:
        TransferError: For a file that does not exist, or a repository that cannot be read or holds several.
    """
    place = Path(rest).expanduser()
    if place.is_file():
        return place
    if place.suffix or rest.count("/") != 1 or place.is_absolute():
        raise TransferError(f"There is no FAC checkpoint {rest}.", "Give a .pth file or a Hub repository org/name.")
    from huggingface_hub import HfApi, hf_hub_download

    name, _, revision = rest.partition("@")
    try:
        listed = HfApi().list_repo_files(name, revision=revision or None)
        found = [file for file in listed if file.endswith(".pth")]
        if len(found) == 1:
            return Path(hf_hub_download(name, found[0], revision=revision or None))
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TransferError(
            f"The FAC checkpoint {rest} could not be fetched ({first}).",
            "Check the name and the network, or download the .pth and give its path.",
        ) from error
    raise TransferError(
        f"The repository {name} holds {len(found)} checkpoints ({', '.join(found) or 'no .pth file'}).",
        "Download the one you mean and give its path.",
    )


def fac_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """SAELens disk loader for ``{"weight": …, "config": {d_inp, d_hide, topK}}``.

    The decoder is the transposed encoder (tied, rows not of unit norm); ``mask`` is dropped (ones unless the authors
    edit with it). The ``_l<N>`` of the file name counts decoder layers from 1, which is the ``hidden_states`` index.

    Returns:
        SAELens configuration and state dict.

    Raises:
        TransferError: When the file is not such a checkpoint.
    """
    path = Path(path)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise TransferError(f"{path} could not be read as a checkpoint ({str(error).splitlines()[0]}).") from error
    if not isinstance(saved, dict) or not {"weight", "config"} <= set(saved):
        raise TransferError(f"{path} is not a FAC checkpoint: it lacks `weight` or `config`.")
    weight, config = saved["weight"], saved["config"]
    lacking = sorted({"W_enc", "b_enc", "b_dec"} - set(weight)) + sorted({"d_inp", "d_hide"} - set(config))
    if lacking:
        raise TransferError(f"{path} is not a FAC checkpoint: it lacks {', '.join(lacking)}.")
    shape = (int(config["d_inp"]), int(config["d_hide"]))
    if tuple(weight["W_enc"].shape) != shape:
        raise TransferError(f"{path}: W_enc is {tuple(weight['W_enc'].shape)}, its config says {shape}.")
    overrides = {k: v for k, v in (cfg_overrides or {}).items() if k not in ("dtype", "device", "neuronpedia_id")}
    metadata: dict[str, Any] = {"sae_lens_version": "6.0.0"}
    named = re.search(r"_l(\d+)", path.stem)
    if named and int(named[1]) > 0:
        layer = int(named[1])
        metadata |= {
            "layer": layer,
            "hook_name": f"blocks.{layer - 1}.hook_resid_post",
            "hf_hook_name": f"model.layers.{layer - 1}",
        }
    encoder = weight["W_enc"].float()
    state = {
        "W_enc": encoder.contiguous(),
        "W_dec": encoder.T.contiguous(),
        "b_enc": weight["b_enc"].float(),
        "b_dec": weight["b_dec"].float(),
    }
    return {
        "architecture": "topk",
        "d_in": shape[0],
        "d_sae": shape[1],
        "k": int(config.get("topK", 20)),
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "reshape_activations": "none",
        "dtype": "float32",
        "device": device,
        "metadata": metadata,
        **overrides,
    }, state

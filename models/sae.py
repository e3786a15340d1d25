"""Sparse autoencoders through SAELens: sparse at once, never dense beyond a chunk, and without state between calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from models.refs import local, parse
from models.registry import find_sae
from transfer.core.errors import TransferError
from transfer.core.files import file_hash, read_json
from transfer.core.keys import digest

SCHEMES = {
    "zoo": "zoo:<name>/<folder>",
    "path": "path:<folder or .pth>",
    "saelens": "saelens:<release>/<sae_id>",
    "fac": "fac:<org/repository or .pth>",
}
RULES = {"topk": "topk-{k}", "standard": "relu", "jumprelu": "jumprelu", "gated": "gated"}
"""Activation rule by SAELens architecture; others (transcoders, temporal, signed) do not fit a feature space."""
CHUNK_BYTES = 64 << 20
"""Largest dense block [tokens, n_features] that encoding holds: 64 MiB, or one token's row where that is larger."""
CHUNK_ROWS = 128
"""More rows at once do not make the matrix product faster, but push the block out of the processor's cache."""
GROUP = 8
"""Features whose maximum stands for all of them when the top k are looked for."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """One SAE."""

    ref: str
    hash: str
    sae: Any
    """The SAELens module, frozen."""
    card: dict[str, Any] = field(default_factory=dict)
    """``card.json`` of the SAE's folder, or the card in its metadata; empty when there is none."""

    @classmethod
    def load(cls, ref: str, device: str = "cpu") -> Self:
        """Load an SAE in float32.

        Args:
            ref: ``zoo:<name>/<folder>``, ``path:<folder or FAC .pth>``, ``saelens:<release>/<sae_id>`` or
                ``fac:<org/repository or .pth>``.
            device: A torch device.

        Raises:
            TransferError: When the reference, the files or the architecture cannot be used.
        """
        from sae_lens import SAE

        from models.fac import fac_file, fac_loader

        scheme, rest = parse(ref, SCHEMES, "SAE")
        card: dict[str, Any] = {}
        content = ""
        try:
            if scheme == "saelens":
                sae = SAE.from_pretrained(*_release(rest, ref), device=device, dtype="float32")
            else:
                path = fac_file(rest) if scheme == "fac" else local(scheme, rest, ref, "SAE")
                if path.is_file():
                    sae = SAE.load_from_disk(path, device=device, dtype="float32", converter=fac_loader)
                    content = file_hash(path)
                else:
                    files = [path / "cfg.json", path / "sae_weights.safetensors"]
                    absent = [f.name for f in files if not f.is_file()]
                    if absent:
                        raise TransferError(f"{path} is no SAELens folder: it lacks {', '.join(absent)}.")
                    sae = SAE.load_from_disk(path, device=device, dtype="float32")
                    content = file_hash(*files)
                    if (path / "card.json").is_file():
                        card = read_json(path / "card.json")
        except TransferError:
            raise
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).split("\n")[0]
            hint = "Check the release and the network." if scheme == "saelens" else ""
            raise TransferError(f"{ref} could not be loaded ({first}).", hint) from error
        architecture = sae.cfg.architecture()
        if architecture not in RULES or sae.cfg.reshape_activations != "none":
            raise TransferError(
                f"{ref} is a {architecture} SAE.", f"Residual-stream SAEs of type {', '.join(RULES)} work."
            )
        sae.requires_grad_(False).eval()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            sae.fold_W_dec_norm()  # same codes, and nothing is left to rescale
        return cls(ref, content or _state_hash(sae), sae, card or dict(sae.cfg.metadata.get("card") or {}))

    @property
    def n_features(self) -> int:
        """Width."""
        return self.sae.cfg.d_sae

    @property
    def d_model(self) -> int:
        """Width of the residual stream it reads."""
        return self.sae.cfg.d_in

    @property
    def k(self) -> int | None:
        """Features that stay active per token; ``None`` where the number varies."""
        return self.sae.cfg.k if self.sae.cfg.architecture() == "topk" else None

    @property
    def rule(self) -> str:
        """Activation rule, such as ``topk-16``."""
        return RULES[self.sae.cfg.architecture()].format(k=self.k)

    @cached_property
    def layer(self) -> int | None:
        """Canonical layer from the metadata (``layer_of``) or the registry; ``None`` when neither says.

        Raises:
            TransferError: When the SAE was trained somewhere else than the residual stream.
        """
        stated = layer_of(self.sae.cfg.metadata, self.ref)
        if stated is None and self.ref.startswith("saelens:"):
            known = find_sae(self.ref)
            return known.layer if known else None
        return stated

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Input as the SAE wants it, with the factor and shift that undo it (SAELens keeps those on the module)."""
        mode = self.sae.cfg.normalize_activations
        if mode == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_model**0.5
            return x * (1 / scale), scale, 0.0
        if mode == "layer_norm":
            shift = x.mean(dim=-1, keepdim=True)
            scale = (x - shift).std(dim=-1, keepdim=True)
            return (x - shift) / (scale + 1e-5), scale, shift
        return x, x.new_ones(1), 0.0

    @torch.inference_mode()
    def encode(self, x: Tensor, chunk_bytes: int = CHUNK_BYTES) -> sp.csr_matrix:
        """Codes of residual-stream vectors, equal to SAELens' ``encode``.

        Args:
            x: [tokens, d_model].
            chunk_bytes: Largest dense block [tokens of a chunk, n_features] held at once, in bytes (at least one row).

        Returns:
            float32 CSR [tokens, n_features], columns ascending in each row, explicit zeros dropped.

        Raises:
            TransferError: When the width differs or ``x`` is not finite.
        """
        return self._chunked(x, self._topk if self.k is not None else self._any, chunk_bytes)

    @torch.inference_mode()
    def encode_dense(self, x: Tensor, floor: float = 0.0, chunk_bytes: int = CHUNK_BYTES) -> sp.csr_matrix:
        """ReLU of every pre-activation, whatever the SAE's own rule keeps: the rule of FAC Synthesis' released code.

        About half of the features may be positive, so each token can take 4 bytes a feature; a floor keeps that down.

        Args:
            x: [tokens, d_model].
            floor: Only codes above it are kept.
            chunk_bytes: See ``encode``.

        Returns:
            float32 CSR [tokens, n_features], as ``encode``.

        Raises:
            TransferError: As ``encode``, and for an architecture whose codes are not its pre-activations (gated).
        """
        if self.sae.cfg.architecture() == "gated":
            raise TransferError(f"{self.ref} is gated: it has no dense codes.", "Use the SAE's own codes.")

        def above(part: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            pre = self._pre(part)
            return _kept(pre, pre > max(floor, 0.0))

        return self._chunked(x, above, chunk_bytes)

    def _pre(self, x: Tensor) -> Tensor:
        """Pre-activations, float32 [tokens, n_features]."""
        sae = self.sae
        return torch.addmm(sae.b_enc, self._normalised(x)[0] - sae.b_dec * sae.cfg.apply_b_dec_to_input, sae.W_enc)

    def _chunked(
        self, x: Tensor, encode: Callable[[Tensor], tuple[np.ndarray, np.ndarray, np.ndarray]], chunk_bytes: int
    ) -> sp.csr_matrix:
        """Codes chunk by chunk; ``encode`` gives the number of codes of each row, their columns and values."""
        if x.shape[-1] != self.d_model:
            raise TransferError(f"{self.ref} reads width {self.d_model}, got {x.shape[-1]}.")
        # Comparisons drop NaN silently, so it is looked for before encoding.
        if not bool(torch.isfinite(x).all()):
            raise TransferError(f"The residual stream for {self.ref} is not finite.", "Load the model in float32.")
        step = max(1, min(CHUNK_ROWS, chunk_bytes // (4 * self.n_features)))
        parts = [encode(x[i : i + step].to(self.sae.device, torch.float32)) for i in range(0, len(x), step)]
        counts = np.concatenate([np.zeros(1, np.int64), *(p[0] for p in parts)])
        columns = np.concatenate([np.zeros(0, np.int32), *(p[1] for p in parts)])
        values = np.concatenate([np.zeros(0, np.float32), *(p[2] for p in parts)])
        codes = sp.csr_matrix((values, columns, np.cumsum(counts)), shape=(len(x), self.n_features))
        codes.has_sorted_indices = True
        return codes

    def _topk(self, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, columns = largest(self._pre(x), self.sae.cfg.k)
        columns, order = columns.sort(dim=-1)
        values = values.gather(-1, order)
        live = values > 0
        return (
            live.sum(-1).cpu().numpy(),
            columns[live].to(torch.int32).cpu().numpy(),
            values[live].cpu().numpy(),
        )

    def _any(self, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dense = self.sae.encode(x)
        return _kept(dense, dense != 0)

    @torch.inference_mode()
    def decode(self, codes: sp.csr_matrix, x: Tensor | None = None) -> Tensor:
        """Reconstructions, equal to SAELens' ``decode`` but reading the active decoder rows only.

        Args:
            codes: CSR [tokens, n_features].
            x: The encoded vectors [tokens, d_model]; needed by SAEs that normalise each input.

        Returns:
            float32 [tokens, d_model].

        Raises:
            TransferError: When ``x`` is needed and missing.
        """
        if x is None and self.sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise TransferError(f"{self.ref} normalises each input, so decoding needs the inputs too.")
        device = self.sae.device
        columns = torch.from_numpy(codes.indices.astype(np.int64)).to(device)
        values = torch.from_numpy(codes.data.astype(np.float32)).to(device)
        starts = torch.from_numpy(codes.indptr[:-1].astype(np.int64)).to(device)
        out = torch.nn.functional.embedding_bag(columns, self.sae.W_dec, starts, mode="sum", per_sample_weights=values)
        out = out + self.sae.b_dec
        if x is None:
            return out
        _, scale, shift = self._normalised(x.to(device, torch.float32))
        return out * scale + shift

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the SAE makes of residual-stream vectors [tokens, d_model]."""
        return self.decode(self.encode(x), x)

    def directions(self) -> np.ndarray:
        """What one unit of each feature adds to the reconstruction, float32 [n_features, d_model]."""
        return self.sae.W_dec.float().cpu().numpy()


def _kept(dense: Tensor, live: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a block [rows, n_features], how many entries of each row are live, their columns and values."""
    columns = live.nonzero()[:, 1].to(torch.int32)
    return live.sum(-1).cpu().numpy(), columns.cpu().numpy(), dense[live].cpu().numpy()


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [rows, k] of the ``k`` largest entries of each row, in no order, as ``torch.topk`` finds them.

    The k largest lie in the k groups with the largest maxima, so only those groups are searched: a maximum over the
    whole row is four times as fast as a selection.
    """
    rows, width = x.shape
    if width % GROUP or width < 4 * GROUP * k:
        whole = torch.topk(x, k, dim=-1, sorted=False)
        return whole.values, whole.indices
    # Column c belongs to group c mod (width / GROUP): maxima of whole stretches of a row use vector instructions.
    grouped = x.view(rows, GROUP, -1)
    groups = torch.topk(grouped.amax(1), k, dim=-1, sorted=False).indices
    found = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1)).view(rows, -1)
    values, at = torch.topk(found, k, dim=-1, sorted=False)
    return values, groups.gather(1, at % k) + at.div(k, rounding_mode="floor") * (width // GROUP)


def decoder_rows(ref: str) -> tuple[np.ndarray, str]:
    """What ``Dictionary.load(ref)`` has as ``directions()`` and ``hash``; of a folder, only the decoder is read.

    Raises:
        TransferError: When the files cannot be read or do not fit each other; of the architecture nothing is checked.
    """
    from safetensors import SafetensorError, safe_open

    scheme, rest = parse(ref, SCHEMES, "SAE")
    folder = None if scheme == "saelens" else local(scheme, rest, ref, "SAE")
    files = [] if folder is None else [folder / "cfg.json", folder / "sae_weights.safetensors"]
    if not files or not all(file.is_file() for file in files):
        dictionary = Dictionary.load(ref)
        return dictionary.directions(), dictionary.hash
    config = read_json(files[0])
    try:
        with safe_open(files[1], "pt") as weights:
            rows = weights.get_tensor("W_dec").float()
        shape = (config["d_sae"], config["d_in"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise TransferError(f"{ref} could not be loaded ({error}).") from error
    if tuple(rows.shape) != shape:
        raise TransferError(f"{ref} could not be loaded (its decoder is {tuple(rows.shape)}, cfg.json says {shape}).")
    if config.get("rescale_acts_by_decoder_norm"):
        length = rows.norm(dim=-1, keepdim=True)
        rows /= torch.where(length > 0, length, 1)
    return rows.numpy(), file_hash(*files)


def _release(rest: str, ref: str) -> tuple[str, str]:
    """Release (or hub repository) and SAE id."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, slash, name = rest.partition("/")
    if release not in get_pretrained_saes_directory():
        owner, slash, more = rest.partition("/")
        repository, slash, name = more.partition("/")
        release = f"{owner}/{repository}"
    if not slash or not name:
        raise TransferError(f"{ref!r} names no SAE.", f"Write {SCHEMES['saelens']}.")
    return release, name


def _state_hash(sae: Any) -> str:
    parts = [(k, digest(v.detach().cpu().float().numpy().tobytes())) for k, v in sorted(sae.state_dict().items())]
    return digest([sae.cfg.architecture(), getattr(sae.cfg, "k", None), parts])


def layer_of(metadata: Any, ref: str) -> int | None:
    """Canonical layer that an SAE's metadata names: ``layer``, or read off the hook name; ``None`` when neither says.

    Raises:
        TransferError: When the SAE was trained somewhere else than the residual stream.
    """
    if isinstance(metadata.get("layer"), int):
        return metadata.get("layer")
    names = [n for n in (metadata.get("hook_name"), metadata.get("hf_hook_name")) if n]
    for name in names:
        if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", name):
            return int(match[1]) + (match[2] == "post")
        if match := re.fullmatch(r"(?:model\.)?(?:model\.)?layers\.(\d+)", name):
            return int(match[1]) + 1
    if names:
        raise TransferError(f"{ref} reads {names[0]}, which is not the residual stream after a layer.")
    return None

"""Alignment methods by name: an aligner from its name and ``key=value`` settings."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from aligners.base import Aligner
from transfer.core.errors import TransferError

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("aligners.fused:FusedAligner", {}),
    "activation": ("aligners.activation:ActivationAligner", {}),
    "map": ("aligners.decoder:DecoderAligner", {"via": "map"}),
    "unembedding": ("aligners.decoder:DecoderAligner", {"via": "unembedding"}),
    "same": ("aligners.decoder:DecoderAligner", {"via": "same"}),
    "sinkhorn": ("aligners.sinkhorn:SinkhornAligner", {}),
    "relative": ("aligners.relative:RelativeAligner", {}),
    "gromov": ("aligners.gromov:GromovAligner", {}),
    "gromov-cold": ("aligners.gromov:GromovAligner", {"start": "cold"}),
    "crosscoder": ("aligners.crosscoder:CrosscoderAligner", {}),
    "random": ("aligners.chance:RandomAligner", {}),
}
"""Name → class, and the parameters that the name stands for. ``random`` and ``gromov-cold`` are controls."""


def parameters(method: str) -> list[str]:
    """Names that may be set for a method.

    Raises:
        TransferError: For an unknown method; with the nearest known name.
    """
    kind, fixed = _class(method)
    return [name for name in inspect.signature(kind).parameters if name not in fixed]


def make_aligner(method: str, settings: list[str], seed: int = 0) -> Aligner:
    """An unfitted aligner.

    Args:
        method: One of ``METHODS``.
        settings: Constructor parameters such as ``reg=0.02``; values are YAML.
        seed: Of the aligner, where it draws anything; a ``seed=`` among the settings goes before it.

    Raises:
        TransferError: For an unknown method or parameter, or a value of the wrong type; with the nearest known name.
    """
    kind, fixed = _class(method)
    open_names = parameters(method)
    hints = get_type_hints(kind.__init__)
    params: dict[str, Any] = {"seed": seed} if "seed" in open_names else {}
    for setting in settings:
        key, eq, text = setting.partition("=")
        if not eq:
            raise TransferError(f"--set {setting!r} is not of the form key=value.")
        if key not in open_names:
            raise TransferError(f"The method {method} has no parameter {key!r}.", _near(key, open_names))
        try:
            params[key] = TypeAdapter(hints[key]).validate_python(yaml.safe_load(text))
        except yaml.YAMLError:
            raise TransferError(f"--set {setting!r}: {text!r} is not valid YAML.", "Quote it.") from None
        except ValidationError as error:
            raise TransferError(f"--set {setting}: {error.errors()[0]['msg']}.") from None
    return kind(**fixed, **params)


def _class(method: str) -> tuple[type[Aligner], dict[str, Any]]:
    if method not in METHODS:
        raise TransferError(f"Unknown method {method!r}.", _near(method, list(METHODS)))
    place, fixed = METHODS[method]
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name), fixed


def _near(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, 1, 0.5)
    return f"Did you mean {close[0]!r}?" if close else f"There is: {', '.join(known) or 'none'}."

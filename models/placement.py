"""Where the models of an experiment run and in which dtype, for whatever loads them again by name."""

from __future__ import annotations

import json
import os

PLAIN = ("float32", "cpu")
_VARIABLE = "TRANSFER_PLACES"
"""Environment variable, because worker processes are started anew and inherit nothing else."""


def place(ref: str, *, dtype: str, device: str) -> None:
    """From now on ``kept_language(ref)`` loads the model so, in this process and in those it starts later."""
    os.environ[_VARIABLE] = json.dumps({**json.loads(os.environ.get(_VARIABLE, "{}")), ref: [dtype, device]})


def placed(ref: str) -> tuple[str, str]:
    """The dtype and device of a model: float32 on the processor unless ``place`` said otherwise."""
    dtype, device = json.loads(os.environ.get(_VARIABLE, "{}")).get(ref, PLAIN)
    return dtype, device

"""What machine and which versions a run used, and whether our packages are the ones imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from transfer.core.errors import TransferError

PACKAGES = (
    "torch",
    "transformers",
    "sae-lens",
    "scikit-learn",
    "pot",
    "networkx",
    "matplotlib",
    "peft",
    "numpy",
    "scipy",
)


def check_imports() -> None:
    """Stop when a folder of the user's hides one of our packages.

    Raises:
        TransferError: Naming the foreign folder.
    """
    root = Path(__file__).resolve().parents[2]
    for name in ("aligners", "models", "reports"):
        spec = importlib.util.find_spec(name)
        places = [Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
        if root / name not in places[:1]:
            found = places[0] if places else "nothing"
            raise TransferError(
                f"The package `{name}` resolves to {found}, not to {root / name}.",
                "Run `transfer` from another folder, in its own virtual environment.",
            )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that do the work."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"system": platform.platform(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}

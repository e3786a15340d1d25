"""Typed references to models and SAEs: ``zoo:``, ``path:``, ``hub:`` and ``saelens:``."""

from __future__ import annotations

from pathlib import Path

from transfer.core.errors import TransferError

ZOO = Path(__file__).parent / "zoo"


def parse(ref: str, schemes: dict[str, str], what: str) -> tuple[str, str]:
    """Split a reference into scheme and rest.

    Args:
        ref: Such as ``zoo:llama``.
        schemes: Scheme → the form to show in the message.
        what: ``model`` or ``SAE``, for the message.

    Raises:
        TransferError: For an unknown scheme or an empty rest.
    """
    scheme, colon, rest = ref.partition(":")
    if not colon or scheme not in schemes or not rest:
        raise TransferError(f"{ref!r} is not a {what} reference.", f"Write {', '.join(schemes.values())}.")
    return scheme, rest


def local(scheme: str, rest: str, ref: str, what: str) -> Path:
    """The file or folder that a ``zoo:`` or ``path:`` reference names.

    Raises:
        TransferError: When it does not exist.
    """
    path = ZOO / rest if scheme == "zoo" else Path(rest).expanduser()
    if scheme == "zoo" and not path.resolve().is_relative_to(ZOO):
        raise TransferError(f"{ref} leads out of the zoo.", "Use path:<folder>.")
    if not path.exists():
        if scheme == "zoo":
            pattern = "*/sae*/cfg.json" if what == "SAE" else "*/config.json"
            members = sorted(p.parent.relative_to(ZOO).as_posix() for p in ZOO.glob(pattern))
            known = f"The zoo has {', '.join(members)}." if members else "Run `transfer zoo train` first."
            raise TransferError(f"There is no {what} {ref}.", known)
        raise TransferError(f"There is no {what} at {path} ({ref}).")
    return path

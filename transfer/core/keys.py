"""Schema version and content keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

SCHEMA = 3
"""Version of everything written here; part of every content key."""


def digest(value: Any, length: int = 16) -> str:
    """Short sha256 of a JSON-able value, or of the bytes given."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:length]


def text_key(text: str) -> int:
    """First eight bytes of a text's sha256, as an integer: it tells whether a text was seen, without keeping it."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)

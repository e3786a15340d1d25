"""Write last, rename, then done: no reader ever sees half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from transfer.core.errors import NoSpaceError, TransferError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; on success fsync it and rename it to ``path``.

    Raises:
        TransferError: When the disk is full; nothing half-written stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        yield part
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"No space left to write {path}.", "Free some and run the same command again.") from None
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left under ``folder``."""
    for part in Path(folder).rglob(".*.part*"):
        owner = part.name.rpartition(".part")[2]
        try:
            if owner.isdigit():
                os.kill(int(owner), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except PermissionError:
            pass  # another user's live process


def plain(value: Any) -> Any:
    """JSON-able, deterministic: numpy scalars unwrapped, NaN as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON (sorted keys, NaN as null), atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(plain(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        TransferError: When it is missing or broken.
    """
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except FileNotFoundError:
        raise TransferError(f"{path} does not exist.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise TransferError(f"{path} is not valid JSON ({place}: {error.msg}).") from None
    except UnicodeDecodeError:
        raise TransferError(f"{path} is not UTF-8.") from None


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Arrays as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as part:
        try:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, metadata=metadata)
        except SafetensorError as error:
            # The library wraps the system's error in a text of its own.
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
            raise


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise TransferError(f"{path} does not exist.") from None
    except SafetensorError as error:
        raise TransferError(f"{path} is damaged ({error}).", "Delete it and run the same command again.") from None


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of one safetensors file.

    Raises:
        TransferError: When it is missing or damaged.
    """
    from safetensors.numpy import load_file

    with _readable(path):
        return load_file(path)


def load_rows(path: Path, name: str, first: int, stop: int) -> np.ndarray:
    """Rows ``first`` to ``stop`` of one array of a safetensors file; nothing else is read.

    Raises:
        TransferError: When it is missing or damaged.
    """
    from safetensors import safe_open

    with _readable(path), safe_open(path, "np") as file:
        return file.get_slice(name)[first:stop]


def array_shape(path: Path, name: str) -> tuple[int, ...]:
    """Shape of one array of a safetensors file.

    Raises:
        TransferError: When it is missing or damaged.
    """
    from safetensors import safe_open

    with _readable(path), safe_open(path, "np") as file:
        return tuple(file.get_slice(name).get_shape())


_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U16": "<u2", "U8": "|u1"}


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of one safetensors file as read-only maps: a page is read when it is used and is the system's to drop.

    Raises:
        TransferError: When it is missing or damaged, or holds a type that numpy lacks.
    """
    from safetensors import safe_open

    # The library checks header and sizes; it maps the file too, but hands out copies.
    with _readable(path), safe_open(path, "np"):
        pass
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if other := {entry["dtype"] for entry in header.values()} - set(_TYPES):
        raise TransferError(f"{path} holds arrays of type {', '.join(sorted(other))}, which cannot be mapped.")
    found = {}
    for name, entry in header.items():
        kind, shape, (first, stop) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        found[name] = (
            np.asarray(np.memmap(path, kind, "r", 8 + length + first, shape)) if stop > first else np.zeros(shape, kind)
        )
    return found


def save_csr(path: Path, matrix: sp.csr_matrix) -> None:
    """A sparse matrix as safetensors, atomically."""
    matrix = sp.csr_matrix(matrix)
    arrays = {"indptr": matrix.indptr, "indices": matrix.indices, "values": matrix.data}
    save_arrays(path, {**arrays, "shape": np.array(matrix.shape, dtype=np.int64)})


def load_csr(path: Path) -> sp.csr_matrix:
    """Inverse of ``save_csr``."""
    a = load_arrays(path)
    return sp.csr_matrix((a["values"], a["indices"], a["indptr"]), shape=tuple(int(n) for n in a["shape"]))


def file_hash(*paths: Path) -> str:
    """Short sha256 over the contents of files, in the order given."""
    sha = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as handle:
            while block := handle.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()[:16]

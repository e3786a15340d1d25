"""Forward hooks on one module: read its output and stop there, or change it. A hook never outlives its block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transfer.core.errors import TransferError


class _Reached(Exception):
    """Ends a forward pass at the module it was wanted for; never leaves this file."""


def _tensor(output: Any) -> Tensor:
    # transformers before version 5 returned a tuple from decoder layers.
    return output[0] if isinstance(output, tuple) else output


def output_at(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Run ``forward`` up to ``module`` and return that module's output; nothing behind it is computed.

    Raises:
        TransferError: When the forward pass never reached the module.
    """
    caught: list[Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(_tensor(output))
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            forward()
    finally:
        handle.remove()
    if not caught:
        raise TransferError(f"The forward pass never reached {type(module).__name__}.")
    return caught[0]


@contextlib.contextmanager
def editing(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass the output of ``module`` through ``edit`` inside the block.

    The hook goes before others, so that what transformers itself captures (``output_hidden_states``) shows the
    edited stream.

    Raises:
        TransferError: When the block ends without the hook having fired.
    """
    fired = False

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal fired
        fired = True
        changed = edit(_tensor(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise TransferError(f"The hook on {type(module).__name__} never fired.")


@contextlib.contextmanager
def editing_input(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass the first input of ``module`` through ``edit`` inside the block.

    ``edit`` must return a new tensor where it changes anything: writing into its argument would reach caches and
    whatever else shares the memory.

    Raises:
        TransferError: When the block ends without the hook having fired.
    """
    fired = False

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal fired
        fired = True
        return (edit(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise TransferError(f"The hook on {type(module).__name__} never fired.")


def steering(module: nn.Module, vectors: Tensor, strength: float, start: Tensor | None):
    """Add ``strength × vectors`` to the output of ``module`` inside the block.

    Works with a key-value cache: the first pass of a generation shows [B, T, D], every later one [B, 1, D].

    Args:
        module: Where to add.
        vectors: One vector a row [B, d_model], or one for all [d_model].
        strength: Factor.
        start: First position to steer per row [B], counted in the padded sequence; all positions when left out.
    """
    delta = (vectors * strength).reshape(-1, 1, vectors.shape[-1])
    seen = 0

    def edit(hidden: Tensor) -> Tensor:
        nonlocal seen
        if delta.shape[0] not in (1, hidden.shape[0]):
            raise TransferError(f"{delta.shape[0]} steering vectors for {hidden.shape[0]} rows.")
        if delta.shape[-1] != hidden.shape[-1]:
            raise TransferError(f"Steering vectors are {delta.shape[-1]} wide, the layer is {hidden.shape[-1]}.")
        length = hidden.shape[1]
        # More than one position means a fresh sequence; single ones follow what the cache holds.
        first = seen if length == 1 else 0
        seen = first + length
        added = delta.to(hidden.device, hidden.dtype)
        if start is not None:
            position = torch.arange(first, seen, device=hidden.device)
            added = added * (position[None, :] >= start.to(hidden.device)[:, None]).unsqueeze(-1)
        return hidden + added

    return editing(module, edit)

"""The best partners of every feature while blocks of scores go by: compiled scans that touch few entries twice.

A scan compares a block, in vector registers, with a value that ``keep`` entries of each list are known to reach, and
opens only what exceeds it. Of n entries in any order that is a few times ``keep``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 64
"""Scores that are compared at once."""
LAST = 2**32 - 1
NO_NUMBERS = np.empty((0, 0), np.int32), np.empty((0, 0))


class Leaders:
    """The ``keep`` best **positive** scores of every owner and whose they are; equal ones go to the lower id.

    Scores come as the bits of floats: non-negative floats order like the integers of their bits, and negative ones are
    negative integers. Partners come in ascending order. Lists grow to twice ``keep`` before they are cut. Scans run on
    as many threads as torch uses, each with owners of its own.

    Memory: ``16·keep`` bytes an owner, and ``32·keep`` more with numbers.

    Args:
        owners: Features whose best partners are wanted.
        keep: Partners of each.
        bits: int16 for bfloat16 scores, int32 for float32.
        numbers: Whether two numbers travel with every pair.
    """

    def __init__(self, owners: int, keep: int, bits: type[np.signedinteger], numbers: bool = False) -> None:
        self.keep = keep
        self.known = np.zeros(owners, bits)
        self.counts = np.zeros(owners, np.int64)
        self.pairs = np.empty((owners, 2 * keep), np.int64)
        """Bits of the score above, 32 bits of the reversed partner below: larger is better."""
        self.numbers = np.empty((owners if numbers else 0, 2 * keep, 2))

    def offer_rows(self, block: Int[np.ndarray, "rows cols"], partner: int) -> None:
        """Offer a block whose rows are all the owners and whose columns are partners from ``partner`` on."""
        group = block.shape[1] // (4 * self.keep) if partner == 0 else 0

        def scan(start: int, stop: int) -> None:
            if group > 1:
                _reach_rows(block, start, stop, group, self.keep, self.known)
            _scan_rows(block, start, stop, partner, self.keep, self.known, self.counts, self.pairs, self.numbers)

        _spread(scan, len(block))

    def offer_columns(
        self,
        block: Int[np.ndarray, "rows cols"],
        owner: int,
        partner: int,
        numbers: tuple[Int[np.ndarray, "rows cols"], Float[np.ndarray, "rows cols"]] = NO_NUMBERS,
    ) -> None:
        """Offer a block whose columns are owners from ``owner`` on and whose rows are partners from ``partner`` on."""
        own = slice(owner, owner + block.shape[1])
        lists = self.known[own], self.counts[own], self.pairs[own], self.numbers[own]
        group = len(block) // (4 * self.keep) if partner == 0 else 0

        def scan(start: int, stop: int) -> None:
            if group > 1:
                _reach_columns(block, start, stop, group, self.keep, self.known[own])
            _scan_columns(block, start, stop, partner, self.keep, *numbers, *lists)

        _spread(scan, block.shape[1])

    def table(
        self,
    ) -> tuple[
        Int[np.ndarray, "owners keep"],
        Float[np.ndarray, "owners keep"],
        Float[np.ndarray, " owners"],
        Float[np.ndarray, "owners keep 2"],
    ]:
        """The lists, best first: ids (−1 where there are fewer), scores as offered (−inf), floors, and the numbers.

        What is in no list is at most the floor of its owner: the last score, or 0 where the list is not full.
        """
        keep = self.keep
        _finish(keep, self.counts, self.pairs, self.numbers)
        order = np.argsort(~self.pairs[:, :keep], axis=1)
        best = np.take_along_axis(self.pairs, order, axis=1)
        numbers = np.take_along_axis(self.numbers, order[: len(self.numbers), :, None], axis=1)
        bits = (best >> 32).astype(np.int32)
        scores = (bits << 16 if self.known.dtype == np.int16 else bits).view(np.float32)
        ids = LAST - (best & LAST)
        missing = best == 0
        ids[missing], scores[missing] = -1, -np.inf
        return ids, scores, np.maximum(scores[:, -1], 0), numbers


def _spread(work: Callable[[int, int], None], total: int) -> None:
    """Do ``work(start, stop)`` on ranges that cover ``total``, one for each of torch's threads."""
    import torch

    threads = min(torch.get_num_threads(), max(1, total // LANES))
    if threads == 1:
        work(0, total)
        return
    edges = [total * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _compiled(function: Callable) -> Callable:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep the compiled code: neither beside the source nor in the user's cache
        return njit(nogil=True)(function)


def _instruction(function: Callable[..., tuple]) -> Callable[..., Any]:
    """An intrinsic of numba, typed as it is called: without the typing context."""
    return intrinsic(function)


# Inner loops have lengths that are not known when they are compiled, since LLVM unrolls short known ones into scalar
# code before it comes to vectors.


@_compiled
def _reached(bits: np.ndarray, k: int) -> int:
    """Largest value that ``k`` entries reach, at least 0; by bisection, since counting is a vector operation."""
    low, high = 0, bits[0] + 1
    for i in range(len(bits)):
        high = max(high, bits[i] + 1)
    while high - low > 1:
        middle = (low + high) >> 1
        value = bits.dtype.type(middle)
        count = 0
        for i in range(len(bits)):
            count += bits[i] >= value
        if count >= k:
            low = middle
        else:
            high = middle
    return low


@_compiled
def _cut(pairs: np.ndarray, numbers: np.ndarray, keep: int) -> int:
    """Move the ``keep`` best of a list to its front, of equal ones the earlier; the least of them is returned."""
    least = _reached(pairs >> 32, keep)
    equal = keep
    for i in range(len(pairs)):
        equal -= pairs[i] >> 32 > least
    end = 0
    for i in range(len(pairs)):
        value = pairs[i] >> 32
        pairs[end] = pairs[i]
        if len(numbers):
            numbers[end] = numbers[i]
        same = value == least
        end += value > least or (same and equal > 0)
        equal -= same
    return least


@_compiled
def _finish(keep: int, counts: np.ndarray, pairs: np.ndarray, numbers: np.ndarray) -> None:
    """Cut all lists to ``keep``; 0 stands where there are fewer, which no pair is."""
    none = numbers[:0, 0]
    for i in range(len(counts)):
        if counts[i] > keep:
            mine = pairs[i, : counts[i]]
            _cut(mine, numbers[i, : counts[i]] if len(numbers) else none, keep)
            counts[i] = keep
        pairs[i, counts[i] : keep] = 0


@_compiled
def _reach_rows(block: np.ndarray, start: int, stop: int, group: int, keep: int, known: np.ndarray) -> None:
    """Where nothing is known yet: ``keep`` maxima of groups of columns reach this, so as many entries do."""
    width = block.shape[1] // group
    best = np.empty(width, block.dtype)
    for r in range(start, stop):
        best[:] = block[r, :width]
        for g in range(1, group):
            part = block[r, g * width : (g + 1) * width]
            for i in range(width):
                best[i] = max(best[i], part[i])
        known[r] = max(_reached(best, keep) - 1, 0)


@_compiled
def _reach_columns(block: np.ndarray, start: int, stop: int, group: int, keep: int, known: np.ndarray) -> None:
    """The same with groups of rows."""
    groups = len(block) // group
    best = np.empty((groups, stop - start), block.dtype)
    for g in range(groups):
        upper = best[g]
        upper[:] = block[g * group, start:stop]
        for r in range(g * group + 1, (g + 1) * group):
            part = block[r, start:stop]
            for i in range(len(upper)):
                upper[i] = max(upper[i], part[i])
    for i in range(stop - start):
        known[start + i] = max(_reached(best[:, i].copy(), keep) - 1, 0)


@_instruction
def _exceeding(_: object, scores: types.Array, i: types.Integer, least: types.Type, j: types.Integer) -> tuple:
    """Bit b of the result: ``scores[i + b]`` exceeds ``least``, or ``least[j + b]`` if that is an array.

    One vector comparison, which no loop over the entries is compiled to.
    """

    def generate(context, builder, signature, arguments):
        item = context.get_data_type(scores.dtype)
        lanes, place = ir.VectorType(item, LANES), ir.VectorType(ir.IntType(32), LANES)

        def loaded(at: int) -> ir.Value:
            data = context.make_array(signature.args[at])(context, builder, arguments[at]).data
            pointer = builder.bitcast(builder.gep(data, [arguments[at + 1]]), lanes.as_pointer())
            return builder.load(pointer, align=item.width // 8)

        if isinstance(least, types.Array):
            bound = loaded(2)
        else:
            one = builder.insert_element(ir.Constant(lanes, ir.Undefined), arguments[2], ir.Constant(place.element, 0))
            bound = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), ir.Constant(place, None))
        return builder.bitcast(builder.icmp_signed(">", loaded(0), bound), ir.IntType(LANES))

    bound = least if isinstance(least, types.Array) else scores.dtype
    return types.uint64(scores, types.intp, bound, types.intp), generate


@_instruction
def _lowest(_: object, bits: types.Integer) -> tuple:
    """Position of the lowest bit that is set."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@_compiled
def _scan_rows(
    block: np.ndarray,
    start: int,
    stop: int,
    partner: int,
    keep: int,
    known: np.ndarray,
    counts: np.ndarray,
    pairs: np.ndarray,
    numbers: np.ndarray,
) -> None:
    """Add what exceeds the known values of rows ``start`` to ``stop`` to their lists."""
    columns, none = block.shape[1], numbers[:0, 0]
    for r in range(start, stop):
        row, mine, top, count = block[r], pairs[r], known[r], counts[r]
        for c in range(0, columns, LANES):
            if columns - c >= LANES:
                bits = _exceeding(row, c, top, 0)
            else:
                bits = np.uint64(0)
                for b in range(columns - c):
                    bits |= np.uint64(row[c + b] > top) << np.uint64(b)
            while bits:
                i = c + np.int64(_lowest(bits))
                bits &= bits - np.uint64(1)
                if row[i] > top:
                    mine[count] = (np.int64(row[i]) << 32) + (LAST - partner - i)
                    count += 1
                    if count == len(mine):
                        top, count = block.dtype.type(_cut(mine, none, keep)), keep
        known[r], counts[r] = top, count


@_compiled
def _scan_columns(
    block: np.ndarray,
    start: int,
    stop: int,
    partner: int,
    keep: int,
    first: np.ndarray,
    second: np.ndarray,
    known: np.ndarray,
    counts: np.ndarray,
    pairs: np.ndarray,
    numbers: np.ndarray,
) -> None:
    """The same for columns; ``first`` and ``second`` are their numbers, if any travel."""
    none = numbers[:0, 0]
    for r in range(len(block)):
        row = block[r]
        for c in range(start, stop, LANES):
            if stop - c >= LANES:
                bits = _exceeding(row, c, known, c)
            else:
                bits = np.uint64(0)
                for b in range(stop - c):
                    bits |= np.uint64(row[c + b] > known[c + b]) << np.uint64(b)
            while bits:
                i = c + np.int64(_lowest(bits))
                bits &= bits - np.uint64(1)
                count = counts[i]
                pairs[i, count] = (np.int64(row[i]) << 32) + (LAST - partner - r)
                if len(numbers):
                    numbers[i, count, 0], numbers[i, count, 1] = first[r, i], second[r, i]
                counts[i] = count + 1
                if count + 1 == pairs.shape[1]:
                    known[i] = _cut(pairs[i], numbers[i] if len(numbers) else none, keep)
                    counts[i] = keep

"""Attention of one token for each of several caches to what they hold, compiled: torch's threads
share the heads (see team), and of a cache that holds much their parts."""

# mypy: disable-error-code="attr-defined,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from dynamickv.fast.kernels import (
    LOWEST,
    NUMBERS,
    TABLE,
    Array,
    bits_of,
    compiled,
    exp_of,
    float_of,
    greater,
    inlined,
    kept_on_disk,
    wide,
)
from dynamickv.fast.team import bits_at, floats_at, numbers_at, run, runtime, take

MADE_OF = "ab26002bf517"
"""Digest of the files that this is made of, see kernels.py."""
BLOCK = 256
"""Positions whose weights are computed before their values are summed."""
AHEAD = 64
"""Positions by which keys and values are asked for before they are read: the processor's own
guesses leave a third of the memory's speed unused."""
SHARED = 512
"""Positions of a cache from which on a head has parts, and of all from which on threads share."""
TOLD = 9
"""Numbers that say what the threads share; the first is the next part to take."""
COLUMNS = 9
"""Numbers for each cache: addresses of keys and values, heads, room, positions, parts of a head,
items up to its last, its first slot, whether it holds bfloat16."""
PARTS = 3
"""Least parts of all heads for each thread: one that a neighbour disturbs takes fewer."""
ROWS = "float32[:, ::1]"
KEPT = "{0}[:, ::1], {0}[:, ::1]"
"""Keys and values of one head."""


def _fetching(context: Any, rows: Any, row: Any, column: Any) -> Any:
    """Ask memory for what will be read; past the end nothing is read."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        array = make_array(kind)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(
            context, builder, kind, array, list(arguments[1:]), wraparound=False
        )
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], shape)
        # To read, and to keep in all caches but the smallest.
        how = [ir.Constant(word, number) for number in (0, 2, 1)]
        builder.call(prefetch, [builder.bitcast(place, byte), *how])
        return context.get_dummy_value()

    return types.void(rows, row, column), code


_fetch: Any = intrinsic(_fetching)


@compiled(
    *(
        f"void({ROWS}, {KEPT.format(number)}, int64, int64, float32, {ROWS}, {ROWS}, {ROWS})"
        for number in NUMBERS
    )
)
def _attend_part(
    query: Array,
    keys: Array,
    values: Array,
    first: int,
    last: int,
    scaling: Any,
    room: Array,
    total: Array,
    weights: Array,
) -> None:
    """Attention of one head's queries to positions from `first` to before `last`.

    Args:
        query: (group, head_dim).
        keys: (at least last, head_dim), float32 or bfloat16; values likewise.
        room: (group, BLOCK), written over.
        total: (group, head_dim), written: values times exp(logit - greatest logit), summed.
        weights: (group, 2), written: the greatest logit, and the sum of those exponentials.
    """
    group, dim = query.shape
    for member in range(group):
        weights[member, 0] = LOWEST
        weights[member, 1] = np.float32(0)
        for j in range(dim):
            total[member, j] = np.float32(0)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        for i in range(count):
            for j in range(0, dim, 16):
                _fetch(keys, start + i + AHEAD, j)
            for member in range(group):
                product = np.float32(0)
                for j in range(dim):
                    product += query[member, j] * wide(keys[start + i, j])
                room[member, i] = product * scaling
        for member in range(group):
            before = weights[member, 0]
            most = before
            for i in range(count):
                most = greater(most, room[member, i])
            added = np.float32(0)
            for i in range(count):
                share = exp_of(room[member, i] - most)
                room[member, i] = share
                added += share
            if most > before:
                factor = exp_of(before - most)
                weights[member, 0] = most
                weights[member, 1] *= factor
                for j in range(dim):
                    total[member, j] *= factor
            weights[member, 1] += added
        # Eight at a time, so that the sums stay in registers for longer than one addition.
        whole = count // 8 * 8
        for i in range(0, whole, 8):
            at = start + i
            for ahead in range(8):
                for j in range(0, dim, 16):
                    _fetch(values, at + ahead + AHEAD, j)
            for member in range(group):
                for j in range(dim):
                    total[member, j] += (
                        (
                            room[member, i] * wide(values[at, j])
                            + room[member, i + 1] * wide(values[at + 1, j])
                        )
                        + (
                            room[member, i + 2] * wide(values[at + 2, j])
                            + room[member, i + 3] * wide(values[at + 3, j])
                        )
                    ) + (
                        (
                            room[member, i + 4] * wide(values[at + 4, j])
                            + room[member, i + 5] * wide(values[at + 5, j])
                        )
                        + (
                            room[member, i + 6] * wide(values[at + 6, j])
                            + room[member, i + 7] * wide(values[at + 7, j])
                        )
                    )
        for i in range(whole, count):
            for member in range(group):
                for j in range(dim):
                    total[member, j] += room[member, i] * wide(values[start + i, j])


@inlined
def _laid_out(address: Any) -> Any:
    """Of what `attend` wrote at an address: a row of numbers for each cache, and behind them what
    the threads write: values summed, weights and a room, for every part of every query head."""
    told = carray(address, (TOLD,))
    rows, dim, slots = told[1], told[3], told[5]
    table = carray(numbers_at(told[8]), (rows, COLUMNS))
    start = told[8] + 8 * rows * COLUMNS
    totals = carray(floats_at(start), (slots, dim))
    weights = carray(floats_at(start + 4 * slots * dim), (slots, 2))
    rooms = carray(floats_at(start + 4 * slots * (dim + 2)), (slots, BLOCK))
    return table, totals, weights, rooms


@compiled("void(CPointer(int64))")
def _take_parts(address: Any) -> None:
    """Compute parts of what `attend` wrote there, as long as there are any."""
    told = carray(address, (TOLD,))
    rows, query_heads, dim, items = told[1], told[2], told[3], told[4]
    scaling = float_of(np.uint32(told[6]))
    queries = carray(floats_at(told[7]), (rows, query_heads, dim))
    table, totals, weights, rooms = _laid_out(address)
    item = take(address)
    row = 0
    while item < items:
        while item >= table[row, 6]:
            row += 1
        heads, size, length, parts = table[row, 2], table[row, 3], table[row, 4], table[row, 5]
        group = query_heads // heads
        own_item = item - table[row, 6] + heads * parts
        head, part = own_item // parts, own_item % parts
        each = (length + parts - 1) // parts
        first = part * each
        last = min(first + each, length)
        slot = table[row, 7] + part * query_heads + head * group
        own = slice(slot, slot + group)
        query = queries[row, head * group : (head + 1) * group]
        if table[row, 8]:
            _attend_part(
                query,
                carray(bits_at(table[row, 0]), (heads, size, dim))[head],
                carray(bits_at(table[row, 1]), (heads, size, dim))[head],
                first, last, scaling, rooms[own], totals[own], weights[own],
            )  # fmt: skip
        else:
            _attend_part(
                query,
                carray(floats_at(table[row, 0]), (heads, size, dim))[head],
                carray(floats_at(table[row, 1]), (heads, size, dim))[head],
                first, last, scaling, rooms[own], totals[own], weights[own],
            )  # fmt: skip
        item = take(address)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share."""
    _take_parts(address)


@compiled("void(CPointer(int64), float32[:, :, ::1])")
def _finish(address: Any, out: Array) -> None:
    """Write attention from its parts."""
    table, totals, weights, _ = _laid_out(address)
    rows, query_heads, dim = out.shape
    for row in range(rows):
        parts, start = table[row, 5], table[row, 7]
        for head in range(query_heads):
            most = LOWEST
            for part in range(parts):
                most = max(most, weights[start + part * query_heads + head, 0])
            whole = np.float32(0)
            for part in range(parts):
                slot = start + part * query_heads + head
                # Now what the part counts for.
                weights[slot, 0] = exp_of(weights[slot, 0] - most)
                whole += weights[slot, 0] * weights[slot, 1]
            for j in range(dim):
                attended = np.float32(0)
                for part in range(parts):
                    slot = start + part * query_heads + head
                    attended += weights[slot, 0] * totals[slot, j]
                out[row, head, j] = attended / whole


WORK: int = _share.address
"""Of the function that threads share."""


@compiled(f"void({TABLE}, float32[:, :, ::1], float32, float32[:, :, ::1], int64, int64, int64)")
def attend_all(
    held: Array, query: Array, scaling: Any, out: Array, work: Any, runtime: Any, threads: Any
) -> None:
    """Attention of a token for each cache.

    Args:
        held: (rows, 6) int64, as `kernels.place` takes it: positions up to the slot count.
        query: (rows, query_heads, head_dim).
        out: in the shape of the queries, written.
        work: `WORK`; runtime and threads as for `team.run`.
    """
    rows, query_heads, dim = query.shape
    positions = items = slots = 0
    for row in range(rows):
        heads, length = held[row, 2], held[row, 4] + 1
        parts = threads * -(-PARTS // heads) if length >= SHARED else 1
        positions += length
        items += heads * parts
        slots += query_heads * parts
    # In one piece: what is told, and behind it what the threads write.
    room = TOLD + rows * COLUMNS + slots * (dim + 2 + BLOCK) // 2 + 1
    told = np.empty(room, np.int64)
    address = np.int64(told.ctypes.data)
    told[0], told[1], told[2], told[3], told[4] = 0, rows, query_heads, dim, items
    told[5], told[6] = slots, bits_of(scaling)
    told[7], told[8] = np.int64(query.ctypes.data), address + 8 * TOLD
    items = slots = 0
    for row in range(rows):
        heads, length = held[row, 2], held[row, 4] + 1
        parts = threads * -(-PARTS // heads) if length >= SHARED else 1
        items += heads * parts
        own = told[TOLD + row * COLUMNS : TOLD + (row + 1) * COLUMNS]
        own[0], own[1], own[2], own[3] = held[row, 0], held[row, 1], heads, held[row, 3]
        own[4], own[5], own[6], own[7], own[8] = length, parts, items, slots, held[row, 5]
        slots += query_heads * parts
    pointer = numbers_at(address)
    if runtime != 0 and positions >= SHARED:
        run(runtime, work, address, threads)
    else:
        _take_parts(pointer)
    _finish(pointer, out)


def place_of(keys: Tensor, values: Tensor, length: int) -> tuple[int, ...]:
    """What compiled functions are told of a cache: addresses of keys and values, heads, room, the
    last slot that counts, and whether it holds bfloat16.

    Args:
        keys: (1, heads, room, head_dim), float32 or bfloat16; values likewise.
        length: positions that count.

    Raises:
        TypeError: other numbers, or keys or values that are not contiguous.
        ValueError: shapes that do not fit each other.
    """
    narrowed = keys.dtype == torch.bfloat16
    if not (narrowed or keys.dtype == torch.float32) or values.dtype != keys.dtype:
        raise TypeError(f"keys and values must be float32 or bfloat16, got {keys.dtype}")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise TypeError("keys and values must be contiguous")
    _, heads, room, _ = keys.shape
    if keys.shape != values.shape or not 0 < length <= room:
        raise ValueError(
            f"a token cannot attend to {length} positions of keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)}"
        )
    return keys.data_ptr(), values.data_ptr(), heads, room, length - 1, narrowed


def attend(
    query: Tensor, held: Sequence[tuple[Tensor, Tensor, int]], scaling: float, out: Tensor
) -> None:
    """Attention of a token for each cache.

    Args:
        query: (rows, query_heads, head_dim) float32.
        held: for every row keys, values and how many positions count, as `place_of` takes them;
            query head h reads head h // group.
        out: (rows, query_heads, head_dim) float32, contiguous, written.

    Raises:
        TypeError: other numbers, or keys or values that are not contiguous.
        ValueError: shapes that do not fit each other.
    """
    rows, query_heads, dim = query.shape
    if len(held) != rows:
        raise ValueError(f"{rows} queries cannot attend to {len(held)} caches")
    # The threads are told addresses alone.
    if query.dtype != torch.float32:
        raise TypeError(f"queries must be float32, got {query.dtype}")
    for keys, _, _ in held:
        if keys.shape[3] != dim or query_heads % keys.shape[1]:
            raise ValueError(
                f"{query_heads} queries of {dim} cannot attend to keys {tuple(keys.shape)}"
            )
    places = np.array([place_of(*one) for one in held], np.int64)
    asked = query.contiguous().numpy()
    attend_all(places, asked, np.float32(scaling), out.numpy(), WORK, *runtime())

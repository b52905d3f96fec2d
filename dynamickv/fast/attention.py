"""Attention of one token for each of several caches to what they hold, compiled: torch's threads
share the heads (see team), and of a cache that holds much their parts."""

# mypy: disable-error-code="attr-defined,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.few_queries import MOST, dots, sums
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
from dynamickv.fast.microkernel import LANES
from dynamickv.fast.team import bits_at, floats_at, numbers_at, run, runtime, take

MADE_OF = "144dd2e3109b"
"""Digest of the files that this is made of, see kernels.py."""
BLOCK = 256
"""Positions whose weights are computed before their values are summed."""
WIDE = 4
"""Registers of values that are summed at a time."""
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


_dots_1, _dots_2, _dots_3, _dots_4 = (dots(queries) for queries in range(1, MOST + 1))
_sums_1, _sums_2, _sums_3, _sums_4 = (sums(queries, WIDE) for queries in range(1, MOST + 1))
_sum = sums(1, 1)


@inlined
def _multiply(
    queries: Any, query: Any, apart: Any, keys: Any, keys_apart: Any,
    out: Any, out_apart: Any, registers: Any, scaling: Any, like: Any,
) -> None:  # fmt: skip
    """As `dots` of so many queries."""
    if queries == 1:
        _dots_1(query, apart, keys, keys_apart, out, out_apart, registers, scaling, like)
    elif queries == 2:
        _dots_2(query, apart, keys, keys_apart, out, out_apart, registers, scaling, like)
    elif queries == 3:
        _dots_3(query, apart, keys, keys_apart, out, out_apart, registers, scaling, like)
    else:
        _dots_4(query, apart, keys, keys_apart, out, out_apart, registers, scaling, like)


@inlined
def _add(
    queries: Any, weights: Any, apart: Any, values: Any, values_apart: Any,
    count: Any, out: Any, out_apart: Any, like: Any,
) -> None:  # fmt: skip
    """As `sums` of so many queries."""
    if queries == 1:
        _sums_1(weights, apart, values, values_apart, count, out, out_apart, like)
    elif queries == 2:
        _sums_2(weights, apart, values, values_apart, count, out, out_apart, like)
    elif queries == 3:
        _sums_3(weights, apart, values, values_apart, count, out, out_apart, like)
    else:
        _sums_4(weights, apart, values, values_apart, count, out, out_apart, like)


@compiled(f"void({ROWS}, {ROWS}, {ROWS}, int64)")
def _weigh(room: Array, total: Array, weights: Array, count: Any) -> None:
    """Make weights of logits, (group, at least count): exponentials of what is left of them when
    the greatest so far is taken off, which what was summed before is brought to."""
    group, dim = total.shape
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
    size = keys.itemsize
    registers = dim // LANES if dim % LANES == 0 else 0
    query_at, room_at = np.int64(query.ctypes.data), np.int64(room.ctypes.data)
    keys_at, values_at = np.int64(keys.ctypes.data), np.int64(values.ctypes.data)
    total_at = np.int64(total.ctypes.data)
    for member in range(group):
        weights[member, 0] = LOWEST
        weights[member, 1] = np.float32(0)
        for j in range(dim):
            total[member, j] = np.float32(0)
    for start in range(first, last, BLOCK):
        count = min(BLOCK, last - start)
        whole = count // LANES * LANES if registers else 0
        for i in range(0, whole, LANES):
            for member in range(0, group, MOST):
                _multiply(
                    min(MOST, group - member), query_at + 4 * dim * member, 4 * dim,
                    keys_at + size * dim * (start + i), size * dim,
                    room_at + 4 * (BLOCK * member + i), 4 * BLOCK, registers, scaling, keys[0, 0],
                )  # fmt: skip
        for i in range(whole, count):
            for member in range(group):
                product = np.float32(0)
                for j in range(dim):
                    product += query[member, j] * wide(keys[start + i, j])
                room[member, i] = product * scaling
        _weigh(room, total, weights, count)
        together = registers // WIDE * WIDE
        for member in range(0, group, MOST):
            for register in range(0, together, WIDE):
                _add(
                    min(MOST, group - member), room_at + 4 * BLOCK * member, 4 * BLOCK,
                    values_at + size * (dim * start + LANES * register), size * dim,
                    count, total_at + 4 * (dim * member + LANES * register), 4 * dim, values[0, 0],
                )  # fmt: skip
        for member in range(group):
            for register in range(together, registers):
                _sum(
                    room_at + 4 * BLOCK * member, 0,
                    values_at + size * (dim * start + LANES * register), size * dim,
                    count, total_at + 4 * (dim * member + LANES * register), 0, values[0, 0],
                )  # fmt: skip
        if registers == 0:
            for i in range(count):
                for member in range(group):
                    for j in range(dim):
                        total[member, j] += room[member, i] * wide(values[start + i, j])


@inlined
def _laid_out(address: Any) -> Any:
    """Of what `attend_all` wrote there: a row of numbers for each cache, and behind them what the
    threads write: values summed, weights and a room, for every part of every query head."""
    told = carray(address, (TOLD,))
    rows, dim, slots = told[1], told[3], told[5]
    table = carray(numbers_at(told[8]), (rows, COLUMNS))
    start = told[8] + 8 * rows * COLUMNS
    totals = carray(floats_at(start), (slots, dim))
    weights = carray(floats_at(start + 4 * slots * dim), (slots, 2))
    rooms = carray(floats_at(start + 4 * slots * (dim + 2)), (slots, BLOCK))
    return table, totals, weights, rooms


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share: parts of what `attend_all` wrote there, as long as there are any."""
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


@inlined
def _parts_of(heads: Any, length: Any, threads: Any) -> Any:
    """In how many parts each head of a cache is attended to."""
    return threads * -(-PARTS // heads) if length >= SHARED else 1


@compiled(
    f"void({TABLE}, float32[:, :, ::1], float32, float32[:, :, ::1], int64[::1], "
    "int64, int64, int64)"
)
def attend_all(
    held: Array, query: Array, scaling: Any, out: Array, room: Array,
    work: Any, runtime: Any, threads: Any,
) -> None:  # fmt: skip
    """Attention of a token for each cache.

    Args:
        held: (rows, 6) int64, as `kernels.place` takes it: positions up to the slot count.
        query: (rows, query_heads, head_dim).
        out: in the shape of the queries, written.
        room: as many numbers as `room_for` says, written over. It is the caller's: numba gives an
            array back after its last mention, and the threads know its address alone.
        work: `WORK`; runtime and threads as for `team.run`.
    """
    rows, query_heads, dim = query.shape
    address = np.int64(room.ctypes.data)
    positions = items = slots = 0
    for row in range(rows):
        heads, length = held[row, 2], held[row, 4] + 1
        parts = _parts_of(heads, length, threads)
        positions += length
        items += heads * parts
        own = room[TOLD + row * COLUMNS : TOLD + (row + 1) * COLUMNS]
        own[0], own[1], own[2], own[3] = held[row, 0], held[row, 1], heads, held[row, 3]
        own[4], own[5], own[6], own[7], own[8] = length, parts, items, slots, held[row, 5]
        slots += query_heads * parts
    room[0], room[1], room[2], room[3], room[4] = 0, rows, query_heads, dim, items
    room[5], room[6] = slots, bits_of(scaling)
    room[7], room[8] = np.int64(query.ctypes.data), address + 8 * TOLD
    run(runtime if positions >= SHARED else 0, work, address, threads)
    _finish(numbers_at(address), out)


@compiled("int64(int64[:, :, ::1], int64, int64, int64)")
def room_for(tables: Array, query_heads: Any, dim: Any, threads: Any) -> Any:
    """Numbers that `attend_all` writes over, for the greatest of several tables, (tables, rows,
    6)."""
    most = 0
    for table in tables:
        slots = 0
        for row in range(len(table)):
            slots += query_heads * _parts_of(table[row, 2], table[row, 4] + 1, threads)
        most = max(most, slots)
    return TOLD + tables.shape[1] * COLUMNS + most * (dim + 2 + BLOCK) // 2 + 1


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
    if out.shape != query.shape:
        raise ValueError(f"{tuple(query.shape)} queries do not attend into {tuple(out.shape)}")
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise TypeError(f"attention must be contiguous float32, got {out.dtype}")
    places = np.array([place_of(*one) for one in held], np.int64)
    start, threads = runtime()
    room = np.empty(room_for(places[None], query_heads, dim, threads), np.int64)
    asked = query.contiguous().numpy()
    attend_all(places, asked, np.float32(scaling), out.numpy(), room, WORK, start, threads)

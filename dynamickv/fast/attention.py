"""A token's attention to what a cache holds, compiled: in parts that torch's threads share (see
team) where it holds much."""

# mypy: disable-error-code="attr-defined,no-untyped-call,untyped-decorator"

from __future__ import annotations

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
    HELD,
    LOWEST,
    NUMBERS,
    Array,
    bits,
    compiled,
    exp_of,
    float_of,
    greater,
    inlined,
    kept_on_disk,
    narrow,
    wide,
)
from dynamickv.fast.team import bits_at, floats_at, take
from dynamickv.neighbours import openmp

BLOCK = 256
"""Positions whose weights are computed before their values are summed."""
AHEAD = 64
"""Positions by which keys and values are asked for before they are read: the processor's own
guesses leave a third of the memory's speed unused."""
SHARED = 512
"""Positions from which on the threads share."""
TOLD = 13
"""Numbers that say what the threads share; the first is the next part to take."""
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
def _join(totals: Any, weights: Any, head: int, parts: int, out: Any) -> None:
    """Write a head's attention from that to its parts."""
    group, dim = totals.shape[1:]
    first = head * parts
    for member in range(group):
        most = LOWEST
        for part in range(first, first + parts):
            most = max(most, weights[part, member, 0])
        whole = np.float32(0)
        for part in range(first, first + parts):
            # Now what the part counts for.
            weights[part, member, 0] = exp_of(weights[part, member, 0] - most)
            whole += weights[part, member, 0] * weights[part, member, 1]
        for j in range(dim):
            attended = np.float32(0)
            for part in range(first, first + parts):
                attended += weights[part, member, 0] * totals[part, member, j]
            out[(head * group + member) * dim + j] = narrow(attended / whole)


@compiled(*(f"void({ROWS}, {held}, int64, float32, uint16[::1])" for held in HELD))
def attend_alone(
    query: Array, keys: Array, values: Array, length: int, scaling: float, out: Array
) -> None:
    """As `attend` does, with one thread."""
    query_heads, dim = query.shape
    heads = keys.shape[1]
    group = query_heads // heads
    room = np.empty((group, BLOCK), np.float32)
    totals = np.empty((heads, group, dim), np.float32)
    weights = np.empty((heads, group, 2), np.float32)
    for head in range(heads):
        own = query[head * group : (head + 1) * group]
        held = keys[0, head], values[0, head]
        _attend_part(own, held[0], held[1], 0, length, scaling, room, totals[head], weights[head])
        _join(totals, weights, head, 1, out)


@inlined
def _laid_out(told: Any) -> Any:
    """Of what `attend` wrote at an address: totals and weights of all parts, and a room for each of
    them, which lie behind the numbers."""
    heads, group, dim, parts = told[1], told[2], told[3], told[6]
    items = heads * parts
    totals = carray(floats_at(told[11]), (items, group, dim))
    weights = carray(floats_at(told[11] + 4 * items * group * dim), (items, group, 2))
    rooms = carray(floats_at(told[11] + 4 * items * group * (dim + 2)), (items, group, BLOCK))
    return totals, weights, rooms


@compiled("void(int64[::1], uint16[::1])")
def _join_all(told: Array, out: Array) -> None:
    totals, weights, _ = _laid_out(told)
    for head in range(told[1]):
        _join(totals, weights, head, told[6], out)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share of what `attend` wrote there: parts, as long as there are any."""
    told = carray(address, (TOLD,))
    heads, group, dim, size = told[1], told[2], told[3], told[4]
    length, parts, scaling = told[5], told[6], float_of(np.uint32(told[7]))
    query = carray(floats_at(told[8]), (heads, group, dim))
    totals, weights, rooms = _laid_out(told)
    each = (length + parts - 1) // parts
    part = take(address)
    while part < heads * parts:
        head, first = part // parts, part % parts * each
        last = min(first + each, length)
        if told[12]:
            _attend_part(
                query[head],
                carray(bits_at(told[9]), (heads, size, dim))[head],
                carray(bits_at(told[10]), (heads, size, dim))[head],
                first, last, scaling, rooms[part], totals[part], weights[part],
            )  # fmt: skip
        else:
            _attend_part(
                query[head],
                carray(floats_at(told[9]), (heads, size, dim))[head],
                carray(floats_at(told[10]), (heads, size, dim))[head],
                first, last, scaling, rooms[part], totals[part], weights[part],
            )  # fmt: skip
        part = take(address)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, length: int, scaling: float, out: Tensor
) -> None:
    """A token's attention to the first `length` positions held.

    Args:
        query: (query_heads, head_dim) float32.
        keys: (1, heads, at least length, head_dim), float32 or bfloat16; query head h reads head
            h // group.
        values: as keys, in the same format.
        out: (query_heads * head_dim,) bfloat16, written.
    """
    threads = torch.get_num_threads()
    # The threads are told addresses alone; what they cannot read the compiled function refuses.
    plain = query.dtype == torch.float32 and keys.dtype in (torch.float32, torch.bfloat16)
    plain = plain and keys.dtype == values.dtype
    plain = plain and all(held.is_contiguous() for held in (query, keys, values))
    runtime = openmp() if threads > 1 and length >= SHARED and plain else None
    if runtime is None:
        attend_alone(query.numpy(), bits(keys), bits(values), length, scaling, bits(out))
        return
    _, heads, size, dim = keys.shape
    group = len(query) // heads
    parts = threads * -(-PARTS // heads)
    # In one piece: what is told, and behind it what the threads write.
    told = np.empty(TOLD + heads * parts * group * (dim + 2 + BLOCK) // 2 + 1, np.int64)
    address = told.ctypes.data
    told[:TOLD] = (
        0, heads, group, dim, size, length, parts, np.float32(scaling).view(np.uint32),
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), address + 8 * TOLD,
        keys.dtype == torch.bfloat16,
    )  # fmt: skip
    runtime.GOMP_parallel(_share.address, address, threads, 0)
    _join_all(told, bits(out))

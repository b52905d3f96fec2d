"""A token's attention to what a cache holds, compiled: in parts that torch's threads share where it
holds much.

The threads are those of the OpenMP runtime that torch itself runs on, so that no others wait beside
them and torch's count of threads holds here too. It is called by its GNU name; where torch has
another runtime, such as on Windows, one thread does it all.
"""

# mypy: disable-error-code="attr-defined,no-untyped-call,untyped-decorator"

from __future__ import annotations

import ctypes
from functools import cache
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
    Array,
    bits,
    compiled,
    exp_of,
    float_of,
    inlined,
    kept_on_disk,
    narrow,
)

BLOCK = 128
"""Positions whose weights are computed before their values are summed."""
AHEAD = 64
"""Positions by which keys and values are asked for before they are read: the processor's own
guesses leave a third of the memory's speed unused."""
SHARED = 512
"""Positions from which on the threads share."""
PARTS = 4
"""Parts for each thread; who is disturbed by a neighbour takes fewer."""
SIGNATURE = "float32[:, ::1], float32[:, ::1], float32[:, ::1]"


def _pointer(context: Any, address: Any) -> Any:
    """The float32 numbers at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), code


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


def _taking(context: Any, counter: Any) -> Any:
    """The number at an address; the next one to ask gets the next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return types.int64(counter), code


_floats_at: Any = intrinsic(_pointer)
_fetch: Any = intrinsic(_fetching)
_take: Any = intrinsic(_taking)


@compiled(f"void({SIGNATURE}, int64, int64, float32, {SIGNATURE})")
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
        keys: (at least last, head_dim); values likewise.
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
                    product += query[member, j] * keys[start + i, j]
                room[member, i] = product * scaling
        for member in range(group):
            before = weights[member, 0]
            most = before
            for i in range(count):
                most = max(most, room[member, i])
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
                        (room[member, i] * values[at, j] + room[member, i + 1] * values[at + 1, j])
                        + (
                            room[member, i + 2] * values[at + 2, j]
                            + room[member, i + 3] * values[at + 3, j]
                        )
                    ) + (
                        (
                            room[member, i + 4] * values[at + 4, j]
                            + room[member, i + 5] * values[at + 5, j]
                        )
                        + (
                            room[member, i + 6] * values[at + 6, j]
                            + room[member, i + 7] * values[at + 7, j]
                        )
                    )
        for i in range(whole, count):
            for member in range(group):
                for j in range(dim):
                    total[member, j] += room[member, i] * values[start + i, j]


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


@compiled(f"void(float32[:, ::1], {HELD}, int64, float32, uint16[::1])")
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


@compiled("void(float32[:, :, ::1], float32[:, :, ::1], int64, uint16[::1])")
def _join_all(totals: Array, weights: Array, parts: int, out: Array) -> None:
    for head in range(len(totals) // parts):
        _join(totals, weights, head, parts, out)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(told: Any) -> None:
    """One thread's share of what `attend` describes: parts, as long as there are any."""
    numbers = carray(told, (14,))
    heads, group, dim, size = numbers[1], numbers[2], numbers[3], numbers[4]
    length, parts, scaling = numbers[5], numbers[6], float_of(np.uint32(numbers[7]))
    query = carray(_floats_at(numbers[8]), (heads, group, dim))
    keys = carray(_floats_at(numbers[9]), (heads, size, dim))
    values = carray(_floats_at(numbers[10]), (heads, size, dim))
    rooms = carray(_floats_at(numbers[11]), (heads * parts, group, BLOCK))
    totals = carray(_floats_at(numbers[12]), (heads * parts, group, dim))
    weights = carray(_floats_at(numbers[13]), (heads * parts, group, 2))
    each = (length + parts - 1) // parts
    part = _take(told)
    while part < heads * parts:
        head, first = part // parts, part % parts * each
        last = min(first + each, length)
        _attend_part(
            query[head], keys[head], values[head], first, last, scaling,
            rooms[part], totals[part], weights[part],
        )  # fmt: skip
        part = _take(told)


@cache
def team() -> Any:
    """Runs a function on several threads: the GNU OpenMP function of that name in torch's own
    runtime, or None."""
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


def attend(query: Tensor, keys: Tensor, values: Tensor, length: int, scaling: float) -> Tensor:
    """A token's attention to the first `length` positions held.

    Args:
        query: (query_heads, head_dim) float32.
        keys: (1, heads, at least length, head_dim) float32; query head h reads head h // group.
        values: as keys.

    Returns:
        (query_heads * head_dim,) bfloat16.
    """
    out = torch.empty(query.numel(), dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    run = team() if threads > 1 and length >= SHARED else None
    if run is None:
        attend_alone(query.numpy(), keys.numpy(), values.numpy(), length, scaling, bits(out))
        return out
    heads, size, dim = keys.shape[1:]
    group = len(query) // heads
    parts = -(-PARTS * threads // heads)
    rooms = np.empty((heads * parts, group, BLOCK), np.float32)
    totals = np.empty((heads * parts, group, dim), np.float32)
    weights = np.empty((heads * parts, group, 2), np.float32)
    told = np.array(
        [
            0, heads, group, dim, size, length, parts, np.float32(scaling).view(np.uint32),
            query.data_ptr(), keys.data_ptr(), values.data_ptr(),
            rooms.ctypes.data, totals.ctypes.data, weights.ctypes.data,
        ],
        np.int64,
    )  # fmt: skip
    run(_share.address, told.ctypes.data, threads, 0)
    _join_all(totals, weights, parts, bits(out))
    return out

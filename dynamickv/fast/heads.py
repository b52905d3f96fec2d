"""A prompt's queries, keys and values head by head, compiled: rotated, and as attention in blocks
takes them. Torch's threads share the positions (see team)."""

# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.kernels import NUMBERS, Array, compiled, kept_on_disk, narrow, turn_one, wide
from dynamickv.fast.microkernel import COLUMNS
from dynamickv.fast.team import bits_at, floats_at, numbers_at, share, take, words_at

MADE_OF = "1c2013665107"
"""Digest of the files that this is made of, see kernels.py."""
ROWS = 256
"""Positions that a thread takes at a time."""
TURNS = "float32[:, ::1], float32[:, ::1]"
"""Cosines and sines."""
STORED = "uint16[:, :, ::1]"


@compiled(
    *(
        f"void({number}[:, ::1], {TURNS}, float32[:, :, ::1], {STORED}, {STORED}, int64, int64)"
        for number in NUMBERS
    )
)
def _turn_rows(
    qkv: Array,
    cos: Array,
    sin: Array,
    query: Array,
    keys: Array,
    values: Array,
    start: int,
    end: int,
) -> None:
    query_heads, dim = query.shape[0], query.shape[2]
    kv_heads = keys.shape[0]
    for row in range(start, end):
        for head in range(query_heads):
            first = head * dim
            turn_one(qkv[row, first : first + dim], cos[row], sin[row], query[head, row])
        for head in range(kv_heads):
            first = (query_heads + head) * dim
            turn_one(qkv[row, first : first + dim], cos[row], sin[row], keys[head, row])
            first += kv_heads * dim
            given, out = qkv[row, first : first + dim], values[head, row]
            for i in range(dim):
                out[i] = narrow(wide(given[i]))


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _turn_share(address: Any) -> None:
    """One thread's share of what `turn` wrote there."""
    told = carray(address, (12,))
    length, query_heads, kv_heads, dim, narrowed = told[1], told[2], told[3], told[4], told[5]
    size = (query_heads + 2 * kv_heads) * dim
    cos = carray(floats_at(told[7]), (length, dim))
    sin = carray(floats_at(told[8]), (length, dim))
    query = carray(floats_at(told[9]), (query_heads, length, dim))
    keys = carray(bits_at(told[10]), (kv_heads, length, dim))
    values = carray(bits_at(told[11]), (kv_heads, length, dim))
    start = take(address) * ROWS
    while start < length:
        end = min(start + ROWS, length)
        if narrowed:
            qkv = carray(bits_at(told[6]), (length, size))
            _turn_rows(qkv, cos, sin, query, keys, values, start, end)
        else:
            wide_qkv = carray(floats_at(told[6]), (length, size))
            _turn_rows(wide_qkv, cos, sin, query, keys, values, start, end)
        start = take(address) * ROWS


def turn(qkv: Tensor, cos: Tensor, sin: Tensor, query_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put every head's positions together; rotate queries and keys.

    Args:
        qkv: (n, all heads * head_dim), queries, keys and values, bfloat16 or float32.
        cos: (n, head_dim) float32; sin likewise.

    Returns:
        queries, (query_heads, n, head_dim) float32, and keys and values, (kv_heads, n, head_dim)
        bfloat16.

    Raises:
        TypeError: other numbers.
        ValueError: as many heads or rotations as do not fit.
    """
    length, dim = cos.shape
    kv_heads = (qkv.shape[1] // dim - query_heads) // 2
    # The threads are told addresses alone.
    if qkv.dtype not in (torch.float32, torch.bfloat16) or cos.dtype != torch.float32:
        raise TypeError(f"cannot rotate {qkv.dtype} by {cos.dtype}")
    if qkv.shape != (length, (query_heads + 2 * kv_heads) * dim) or sin.shape != cos.shape:
        raise ValueError(f"{tuple(qkv.shape)} are not {query_heads} query heads of {length} rows")
    query = torch.empty(query_heads, length, dim)
    keys = torch.empty(kv_heads, length, dim, dtype=torch.bfloat16)
    values = torch.empty_like(keys)
    given = qkv.contiguous(), cos.contiguous(), sin.to(torch.float32).contiguous()
    arrays = *given, query, keys, values
    narrowed = qkv.dtype == torch.bfloat16
    places = (array.data_ptr() for array in arrays)
    share(_turn_share, length, query_heads, kv_heads, dim, narrowed, *places)
    return query, keys, values


@compiled("void(float32[::1], float32, uint16[:, :, :, ::1], float32[:, :, ::1], int64, int64)")
def _ask(query: Array, scaling: Any, asked: Array, sizes: Array, head: int, row: int) -> None:
    group = asked.shape[2]
    squares = np.float32(0)
    for i in range(len(query)):
        scaled = query[i] * scaling
        squares += scaled * scaled
        asked[head // group, row, head % group, i] = narrow(scaled)
    sizes[head // group, row, head % group] = np.sqrt(squares)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _ask_share(address: Any) -> None:
    """One thread's share of what `asked_in_groups` wrote there."""
    told = carray(address, (11,))
    heads, length, dim, group = told[1], told[2], told[3], told[4]
    per_head, per_row = told[5], told[6]
    scaling = carray(floats_at(told[7]), (1,))[0]
    asked = carray(bits_at(told[9]), (heads // group, length, group, dim))
    sizes = carray(floats_at(told[10]), (heads // group, length, group))
    start = take(address) * ROWS
    while start < length:
        for row in range(start, min(start + ROWS, length)):
            for head in range(heads):
                query = carray(floats_at(told[8] + 4 * (head * per_head + row * per_row)), (dim,))
                _ask(query, scaling, asked, sizes, head, row)
        start = take(address) * ROWS


def asked_in_groups(queries: Tensor, scaling: float, group: int) -> tuple[Tensor, Tensor]:
    """Scaled queries so that those which read one head stand together at every position, and a
    block of positions is one piece of memory.

    Args:
        queries: (num_query_heads, n, head_dim) float32.
        group: query heads for each KV head.

    Returns:
        (num_kv_heads, n, group, head_dim) bfloat16, and their lengths as vectors, (num_kv_heads, n,
        group) float32.

    Raises:
        TypeError: other numbers.
        ValueError: heads that do not fall into such groups.
    """
    heads, length, dim = queries.shape
    if queries.dtype != torch.float32:
        raise TypeError(f"queries must be float32, got {queries.dtype}")
    if heads % group:
        raise ValueError(f"{heads} query heads do not fall into groups of {group}")
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    asked = queries.new_empty(heads // group, length, group, dim, dtype=torch.bfloat16)
    sizes = queries.new_empty(heads // group, length, group)
    factor = np.array([scaling], np.float32)
    per_head, per_row, _ = queries.stride()
    places = factor.ctypes.data, queries.data_ptr(), asked.data_ptr(), sizes.data_ptr()
    share(_ask_share, heads, length, dim, group, per_head, per_row, *places)
    return asked, sizes


@compiled(
    *(
        f"void({number}[:, ::1], float32[::1], uint16[:, ::1], uint32[:, ::1], float32[::1])"
        for number in NUMBERS
    )
)
def _lay_keys(keys: Array, middle: Array, room: Array, columns: Array, squares: Array) -> None:
    """At most 64 keys as columns, see `Laid`, and each one's square; `room` is written over."""
    count, dim = keys.shape
    for row in range(count):
        key, own = keys[row], room[row]
        square = np.float32(0)
        for i in range(dim):
            own[i] = narrow(wide(key[i]) - middle[i])
            square += wide(own[i]) * wide(own[i])
        squares[row] = square
    words = carray(words_at(room.ctypes.data), (COLUMNS, dim // 2))
    for pair in range(dim // 2):
        for row in range(count):
            columns[pair, row] = words[row, pair]


@compiled(*(f"void({number}[:, ::1], uint32[:, ::1])" for number in NUMBERS))
def _lay_values(values: Array, pairs: Array) -> None:
    """At most 64 values, two and two beside each other."""
    count, dim = values.shape
    for row in range(0, count, 2):
        first, out = values[row], pairs[row // 2]
        if row + 1 < count:
            second = values[row + 1]
            for i in range(dim):
                low, high = narrow(wide(first[i])), narrow(wide(second[i]))
                out[i] = np.uint32(low) | np.uint32(high) << np.uint32(16)
        else:
            for i in range(dim):
                out[i] = np.uint32(narrow(wide(first[i])))


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _lay_share(address: Any) -> None:
    """One thread's share of what `laid_out` wrote there."""
    told = carray(address, (14,))
    heads, length, dim, across, narrowed = told[2], told[3], told[4], told[5], told[6]
    tiles = (length + COLUMNS - 1) // COLUMNS
    thread = take(numbers_at(np.int64(told.ctypes.data) + 8))
    room = carray(bits_at(told[13] + 2 * thread * COLUMNS * dim), (COLUMNS, dim))
    item = take(address)
    while item < heads * tiles:
        head, first = item // tiles, item % tiles * COLUMNS
        count, at = min(COLUMNS, length - first), (head * length + first) * dim
        middle = carray(floats_at(told[9] + 4 * head * dim), (dim,))
        columns = carray(words_at(told[10] + 2 * item * COLUMNS * dim), (dim // 2, COLUMNS))
        pairs = carray(words_at(told[11] + 2 * item * COLUMNS * across), (COLUMNS // 2, across))
        squares = carray(floats_at(told[12] + 4 * (head * length + first)), (count,))
        if narrowed:
            keys, values = bits_at(told[7] + 2 * at), bits_at(told[8] + 2 * at)
            _lay_keys(carray(keys, (count, dim)), middle, room, columns, squares)
            _lay_values(carray(values, (count, dim)), pairs)
        else:
            wide_keys, wide_values = floats_at(told[7] + 4 * at), floats_at(told[8] + 4 * at)
            _lay_keys(carray(wide_keys, (count, dim)), middle, room, columns, squares)
            _lay_values(carray(wide_values, (count, dim)), pairs)
        item = take(address)


class Laid(NamedTuple):
    """Keys and values in the order that products of many queries read them in."""

    columns: Tensor
    """Keys less a middle, (num_kv_heads, tiles, head_dim // 2, 64, 2) bfloat16: 64 positions are
    the columns of a tile, 0 behind the last."""
    pairs: Tensor
    """Values, (num_kv_heads, 32 * tiles, head_dim rounded up to 64s, 2) bfloat16: two positions'
    beside each other, 0 where there are none."""
    sizes: Tensor
    """Lengths of the keys less the middle as vectors, (num_kv_heads, n) float32."""

    @property
    def length(self) -> int:
        """Positions."""
        return self.sizes.shape[1]

    @property
    def room(self) -> int:
        """Positions with those behind the last, which are 0."""
        return self.columns.shape[1] * COLUMNS

    def of_heads(self, heads: slice) -> Laid:
        """Of some KV heads."""
        return Laid(*(one[heads] for one in self))


def laid_out(keys: Tensor, values: Tensor, middle: Tensor) -> Laid:
    """Put a prompt's keys and values in that order.

    Args:
        keys: (num_kv_heads, n, head_dim) float32 or bfloat16, head_dim even.
        values: as keys.
        middle: what is taken off every key of a head, (num_kv_heads, head_dim) float32.

    Raises:
        TypeError: other numbers.
        ValueError: unlike shapes, or a head_dim that is odd.
    """
    heads, length, dim = keys.shape
    # The threads are told addresses alone.
    if keys.dtype not in (torch.float32, torch.bfloat16) or middle.dtype != torch.float32:
        raise TypeError(f"cannot lay out {keys.dtype} less {middle.dtype}")
    if values.dtype != keys.dtype:
        raise TypeError(f"cannot lay out {keys.dtype} and {values.dtype}")
    if keys.shape != values.shape or middle.shape != (heads, dim) or dim % 2:
        shapes = (tuple(one.shape) for one in (keys, middle, values))
        raise ValueError("cannot attend to {} less {} and {}".format(*shapes))
    tiles, across = -(-length // COLUMNS), -(-dim // COLUMNS) * COLUMNS
    columns = torch.empty(heads, tiles, dim // 2, COLUMNS, 2, dtype=torch.bfloat16)
    pairs = torch.empty(heads, tiles * COLUMNS // 2, across, 2, dtype=torch.bfloat16)
    if length % COLUMNS:
        columns[:, -1] = 0
        pairs[:, -COLUMNS // 2 :] = 0
    if across > dim:
        pairs[:, :, dim:] = 0
    sizes = torch.empty(heads, length)
    threads = torch.get_num_threads()
    room = torch.empty(threads, COLUMNS, dim, dtype=torch.bfloat16)
    arrays = keys.contiguous(), values.contiguous(), middle.contiguous(), columns, pairs, sizes
    places = [array.data_ptr() for array in (*arrays, room)]
    narrowed = keys.dtype == torch.bfloat16
    share(_lay_share, 0, heads, length, dim, across, narrowed, *places, threads=threads)
    return Laid(columns, pairs, sizes.sqrt_())

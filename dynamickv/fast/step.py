"""A token's way through all of a decoder's layers for each of a few caches, compiled as one: no
Python lies between two operations. Weights are codes (see codes.py), keys and values what the
caches hold, and all that is computed is float32."""

# mypy: disable-error-code="attr-defined,no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from dynamickv.fast.attention import attend_all
from dynamickv.fast.codes import GROUP, LANES
from dynamickv.fast.few_rows import ADDED, GATED, PLAIN, TOLD, carry_out
from dynamickv.fast.kernels import Array, compiled, inlined, norm, place
from dynamickv.fast.team import floats_at

MADE_OF = "639b1a96ef77"
"""Digest of the files that this is made of, see kernels.py."""
COLUMNS = 14
"""Numbers for each layer: of every matrix, queries, keys and values as one, the address of its
codes, their bits and the address of its bias or 0; that of a norm's weights before each input."""


@inlined
def _product(
    told: Any, works: Any, kind: Any, rows: Any, size: Any, outputs: Any,
    x: Any, sums: Any, data: Any, bits: Any, bias: Any, products: Any, out: Any,
) -> None:  # fmt: skip
    told[0], told[1], told[2], told[3], told[4] = 0, kind, rows, size, outputs // LANES
    told[5], told[6], told[7], told[8], told[9] = x, sums, data, bits, bias
    told[10], told[11] = products, out
    carry_out(told, works[0], works[2], works[3])


def room_for(rows: int, size: int, width: int, attended: int, inner: int) -> int:
    """Numbers that `through` writes over: normalised hidden states, queries, keys and values, what
    was attended to, what the gate lets through, products, and sums of inputs. Compiled functions
    are told addresses of them, so that they are the caller's: numba gives an array back after its
    last mention.

    Args:
        attended: of all query heads.
        size, width, inner: as for `through`.
    """
    sums = max(size, inner, attended) // GROUP
    return rows * (size + width + attended + inner + max(2 * inner, size) + sums)


@compiled(
    "void(int64[:, ::1], int64[:, :, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], "
    "float32[:, :, :, ::1], float32[::1], int64[::1], int64, int64, float64, float32, int64[::1])"
)
def through(
    layers: Array, held: Array, x: Array, cos: Array, sin: Array, asked: Array,
    room: Array, attending: Array, width: Any, inner: Any, eps: Any, scaling: Any, works: Array,
) -> None:  # fmt: skip
    """Hidden states through every layer.

    Args:
        layers: (layers, 14), see COLUMNS.
        held: (layers, rows, 6), as `attention.place_of` gives it, for the token's own slot.
        x: (rows, size), written.
        cos: (rows, head_dim); sin likewise.
        asked: (layers or 1, rows, query_heads, head_dim), written: the queries of each layer, or of
            the last one.
        room: as many numbers as `room_for` says, written over; `attending` likewise for
            `attention.room_for`.
        width: of queries, keys and values as one.
        inner: what the gate lets through, a multiple of 16.
        eps: of every norm.
        works: `few_rows.WORK`, `attention.WORK`, and what `team.runtime` gives.
    """
    rows, size = x.shape
    query_heads, dim = asked.shape[2:]
    attended = query_heads * dim
    # See `room_for`.
    at = rows * size
    normal = room[:at].reshape((rows, size))
    qkv = room[at : at + rows * width].reshape((rows, width))
    at += rows * width
    context = room[at : at + rows * attended].reshape((rows, query_heads, dim))
    at += rows * attended
    room_at, normal_at = np.int64(room.ctypes.data), np.int64(normal.ctypes.data)
    qkv_at, context_at = np.int64(qkv.ctypes.data), np.int64(context.ctypes.data)
    opened_at = room_at + 4 * at
    products_at = opened_at + 4 * rows * inner
    sums_at = products_at + 4 * rows * max(2 * inner, size)
    x_at = np.int64(x.ctypes.data)
    told = np.empty(TOLD, np.int64)
    for number in range(len(layers)):
        own = layers[number]
        norm(x, carray(floats_at(own[0]), (size,)), eps, normal)
        _product(
            told, works, PLAIN, rows, size, width,
            normal_at, sums_at, own[1], own[2], own[3], qkv_at, qkv_at,
        )  # fmt: skip
        if own[4] != 0:
            turned = width - attended
            kv_heads = turned // 2 // dim
            for row in range(rows):
                queries = qkv[row, :attended].reshape((query_heads, dim))
                keys = qkv[row, attended : attended + kv_heads * dim].reshape((kv_heads, dim))
                norm(queries, carray(floats_at(own[4]), (dim,)), eps, queries)
                norm(keys, carray(floats_at(own[5]), (dim,)), eps, keys)
        query = asked[number % len(asked)]
        place(qkv, cos, sin, query, held[number])
        attend_all(held[number], query, scaling, context, attending, works[1], works[2], works[3])
        _product(
            told, works, ADDED, rows, attended, size,
            context_at, sums_at, own[6], own[7], own[8], products_at, x_at,
        )  # fmt: skip
        norm(x, carray(floats_at(own[9]), (size,)), eps, normal)
        _product(
            told, works, GATED, rows, size, inner,
            normal_at, sums_at, own[10], own[11], 0, products_at, opened_at,
        )  # fmt: skip
        _product(
            told, works, ADDED, rows, inner, size,
            opened_at, sums_at, own[12], own[13], 0, products_at, x_at,
        )  # fmt: skip

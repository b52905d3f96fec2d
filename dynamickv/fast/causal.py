"""Causal attention of many queries, compiled: the products of a few rows become weights, and these
sums of values, while they are in the nearest cache. Torch's threads share the rows (see team)."""

# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.heads import Laid
from dynamickv.fast.kernels import LOWEST, REACH, Array, compiled, greater, kept_on_disk, narrow
from dynamickv.fast.microkernel import (
    COLUMNS,
    LANES,
    lanes_sum,
    products,
    shared,
    weighed,
    weighed_tiles,
)
from dynamickv.fast.team import bits_at, floats_at, numbers_at, share, take

MADE_OF = "ce74ccd79837"
"""Digest of the files that this is made of, see kernels.py."""
ROWS = 4
"""Rows of a tile: their sums take 16 of 32 registers, which leaves some to make weights in."""
PART = 24 * ROWS
"""Rows that a thread takes at a time."""
KEYS = 8 * COLUMNS
"""Keys whose weights are computed before their values are summed."""
TOLD = 19
"""Numbers that say what the threads share; the first two are the next part and the next
thread."""
BYTES = 2
"""Of a bfloat16."""
NEXT_TO_NOTHING = np.float32(1e-30)
"""A greatest logit that is 0."""
LINE = 4 * COLUMNS
"""Bytes of a row of sums."""

# For as many rows as a tile has, and for those that are left over one by one.
_multiply_tile, _multiply_row = products(ROWS, fresh=True), products(1, fresh=True)
_add_tile, _add_row = products(ROWS, fresh=False), products(1, fresh=False)
_weigh_tile, _weigh_row = weighed(ROWS), weighed(1)
_weigh_tiles = weighed_tiles(ROWS)
_share_out = shared()


def _room(across: int) -> int:
    """Numbers that a thread writes over: every row's sums of values, and of weights, a tile's
    weights, its products, every row's greatest, and a tile's limits."""
    return PART * (across + LANES) + ROWS * (KEYS // 2 + COLUMNS) + PART + 2 * ROWS


@compiled("void(int64[::1], int64, int64, int64, float32[::1], float32[::1])")
def _find_greatest(
    told: Array, head: int, first: int, last: int, mosts: Array, logits: Array
) -> None:
    """Each row's greatest logit, or 0, which stands for nothing else, throughout a tile whose
    bounds say that nothing need be taken off.

    Args:
        mosts: (at least last - first,), written.
        logits: (ROWS * COLUMNS,), written over.
    """
    heads, rows, length, dim = told[2], told[3], told[4], told[5]
    group, before = told[7], told[8]
    size, step = dim * BYTES, COLUMNS * 2 * BYTES
    bounds = carray(floats_at(told[12]), (heads, rows))[head]
    out = logits.ctypes.data
    row = first
    while row < last:
        count = ROWS if row + ROWS <= last else 1
        query = told[9] + (head * rows + row) * size
        calm = True
        for r in range(row, row + count):
            calm = calm and bounds[r] <= REACH
            mosts[r - first] = np.float32(0)
        if not calm:
            mosts[row - first : row - first + count] = LOWEST
            for key in range(0, before + (row + count - 1) // group + 1, COLUMNS):
                column = told[10] + (head * length + key) * size
                if count == ROWS:
                    _multiply_tile(query, size, column, step, dim // 2, out, LINE)
                else:
                    _multiply_row(query, size, column, step, dim // 2, out, LINE)
                for r in range(count):
                    most = mosts[row - first + r]
                    for i in range(min(COLUMNS, before + (row + r) // group + 1 - key)):
                        most = greater(most, logits[r * COLUMNS + i])
                    mosts[row - first + r] = most
            for r in range(row - first, row - first + count):
                if mosts[r] == 0:
                    mosts[r] = NEXT_TO_NOTHING
        row += count


@compiled("void(int64[::1], int64, int64, int64, int64, int64)")
def _hand_over(told: Array, head: int, first: int, last: int, sums: Any, lanes: Any) -> None:
    """Write rows' attention and the sums of their weights, from those at two addresses."""
    heads, rows, dim, group = told[2], told[3], told[5], told[7]
    totals = carray(floats_at(told[13]), (heads, rows))[head]
    whole = dim // COLUMNS * COLUMNS
    for row in range(first, last):
        own = row - first
        totals[row] = lanes_sum(lanes + own * LANES * 4)
        factor = np.float32(1) / totals[row]
        place = row // group * heads * group + head * group + row % group
        out = told[14] + place * dim * BYTES
        for column in range(0, whole, COLUMNS):
            _share_out(sums + (column * PART + own * COLUMNS) * 4, factor, out + column * BYTES)
        if whole < dim:
            left = carray(floats_at(sums + (whole * PART + own * COLUMNS) * 4), (dim - whole,))
            goal = carray(bits_at(out + whole * BYTES), (dim - whole,))
            for i in range(dim - whole):
                goal[i] = narrow(left[i] * factor)


@compiled("void(int64[::1], int64, int64, int64, float32[::1])")
def _attend_part(told: Array, head: int, first: int, last: int, room: Array) -> None:
    """Of rows `first` to before `last` of a head, at most PART."""
    rows, length, dim, across = told[3], told[4], told[5], told[6]
    group, before, kept, keeps = told[7], told[8], told[16], told[17]
    size, step, pair = dim * BYTES, COLUMNS * 2 * BYTES, across * 2 * BYTES
    values = told[11] + head * length * across * BYTES
    # What a thread writes over, see `_room`.
    at = PART * across
    sums, lanes = room[:at], room[at : at + PART * LANES]
    at += PART * LANES
    weights, apart = np.int64(room[at:].ctypes.data), KEYS * BYTES
    at += ROWS * KEYS // 2
    logits = room[at : at + ROWS * COLUMNS]
    at += ROWS * COLUMNS
    mosts, limits = room[at : at + PART], room[at + PART :]
    limit = limits.ctypes.data
    sums[:] = np.float32(0)
    lanes[:] = np.float32(0)
    _find_greatest(told, head, first, last, mosts, logits)
    for start in range(0, before + (last - 1) // group + 1, KEYS):
        row = first
        while row < last:
            own = row - first
            count = ROWS if row + ROWS <= last else 1
            end = min(start + KEYS, before + (row + count - 1) // group + 1)
            query = told[9] + (head * rows + row) * size
            lane = lanes[own * LANES :].ctypes.data
            whole = count == ROWS
            for r in range(own, own + count):
                whole = whole and mosts[r] == 0
            if kept:
                weights = kept + ((head * rows + row) * keeps + start) * BYTES
                apart = keeps * BYTES
            limited = start
            # The tiles that every row sees all of.
            tiles = (min(end, before + row // group + 1) - start) // COLUMNS
            if whole and tiles > 0:
                column, run = told[10] + (head * length + start) * size, (tiles, COLUMNS * size)
                _weigh_tiles(query, size, column, step, dim // 2, weights, apart, lane, *run)
                limited += tiles * COLUMNS
            for key in range(limited, end, COLUMNS):
                column = told[10] + (head * length + key) * size
                here = weights + (key - start) * BYTES
                for r in range(count):
                    limits[2 * r] = np.float32(before + (row + r) // group + 1 - key)
                    limits[2 * r + 1] = mosts[own + r]
                if count == ROWS:
                    _weigh_tile(query, size, column, step, dim // 2, here, apart, lane, limit)
                else:
                    _weigh_row(query, size, column, step, dim // 2, here, apart, lane, limit)
            steps = (end - start + 1) // 2
            for column in range(0, across, COLUMNS):
                value = values + (start * across + 2 * column) * BYTES
                place = sums[column * PART + own * COLUMNS :].ctypes.data
                if count == ROWS:
                    _add_tile(weights, apart, value, pair, steps, place, LINE)
                else:
                    _add_row(weights, apart, value, pair, steps, place, LINE)
            row += count
    _hand_over(told, head, first, last, sums.ctypes.data, lanes.ctypes.data)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share: parts of what `attend` wrote there, as long as there are any."""
    told = carray(address, (TOLD,))
    heads, rows, size = told[2], told[3], told[18]
    thread = take(numbers_at(np.int64(told.ctypes.data) + 8))
    room = carray(floats_at(told[15] + 4 * thread * size), (size,))
    parts = (rows + PART - 1) // PART
    item = take(address)
    while item < parts * heads:
        # The last rows, which see most, come first.
        first = (parts - 1 - item // heads) * PART
        _attend_part(told, item % heads, first, min(first + PART, rows), room)
        item = take(address)


def attend(
    asked: Tensor, laid: Laid, bounds: Tensor, group: int, before: int, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries to their own positions and those before.

    Args:
        asked: (num_kv_heads, queries * group, head_dim) bfloat16, contiguous, scaled so that
            products with keys are logits to base 2: row r belongs to the query at position before
            + r // group.
        bounds: what no logit of a row exceeds, whatever its sign, (num_kv_heads, queries * group)
            float32, contiguous: rows of great logits take a pass more.
        group: query heads for each KV head.
        before: position of the first query.
        kept: written where a row sees something, and up to the next multiple of 64 with 0: its
            weights up to a factor, (num_kv_heads, queries * group, keys) bfloat16, contiguous, keys
            a multiple of 64.

    Returns:
        (queries, num_kv_heads * group, head_dim) bfloat16, and every row's factor, the sum of its
        weights, (num_kv_heads, queries * group) float32.

    Raises:
        TypeError: other numbers, or not contiguous.
        ValueError: shapes that do not fit each other.
    """
    heads, rows, dim = asked.shape
    # The threads are told addresses alone.
    for given, dtype in ((asked, torch.bfloat16), (bounds, torch.float32), (kept, torch.bfloat16)):
        if given is not None and (given.dtype != dtype or not given.is_contiguous()):
            raise TypeError(f"queries and weights must be contiguous {dtype}, got {given.dtype}")
    end = before + rows // group
    columns, pairs = laid.columns, laid.pairs
    fits = (heads, dim) == (len(columns), 2 * columns.shape[2]) and bounds.shape == (heads, rows)
    if not fits or rows % group or before < 0 or end > laid.length:
        raise ValueError(
            f"queries {tuple(asked.shape)} of {group} heads from position {before} with bounds "
            f"{tuple(bounds.shape)} cannot attend to {len(columns)} heads of {laid.length} "
            "positions"
        )
    keeps = 0 if kept is None else kept.shape[-1]
    if kept is not None and (kept.shape != (heads, rows, keeps) or keeps % COLUMNS or keeps < end):
        raise ValueError(f"weights {tuple(kept.shape)} have no room for {end} keys")
    across = pairs.shape[2]
    size = _room(across)
    out = asked.new_empty(rows // group, heads * group, dim)
    totals = torch.empty(heads, rows)
    threads = torch.get_num_threads()
    room = torch.empty(threads, size)
    arrays = asked, columns, pairs, bounds, totals, out, room
    places = [array.data_ptr() for array in arrays]
    place = 0 if kept is None else kept.data_ptr()
    told = heads, rows, laid.room, dim, across, group, before, *places, place, keeps, size
    share(_share, 0, *told, threads=threads)
    return out, totals

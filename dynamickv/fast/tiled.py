"""Products of many rows with a matrix in bfloat16, compiled, tile by tile: what becomes of them is
done while they are in the nearest cache. Torch's threads share the rows, and where these are few
the outputs (see team)."""

# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.kernels import compiled, kept_on_disk, narrow
from dynamickv.fast.microkernel import COLUMNS, ask, gating, in_columns, products, shared
from dynamickv.fast.team import bits_at, floats_at, numbers_at, share, take

MADE_OF = "1c2013665107"
"""Digest of the files that this is made of, see kernels.py."""
ROWS = 6
"""Rows of a tile: their sums take 24 of 32 registers."""
PARTS = 8 * ROWS, 32 * ROWS
"""Rows that a thread takes at a time of a matrix that stays in the cache, or that is read from
memory for each part."""
STAYS = 2**22
"""Bytes of a matrix up to which it does."""
STEPS = 512
"""Pairs of inputs whose weights stay in the second cache while a part's rows are multiplied."""
PLENTY = 16
"""Parts for each thread that keep all of them busy to the end."""
PLAIN, ADDED, GATED = range(3)
"""What becomes of the products: they are the result; are added to it; or the sigmoid linear unit of
one matrix's is multiplied with those of a second."""
WRITE, ADD, ROUND = range(3)
"""What `_multiply_part` does with them."""
TOLD = 14
"""Numbers that say what the threads share; the first two are the next part and the next thread."""
BYTES = 2
"""Of a bfloat16."""
LINE = 4 * COLUMNS
"""Bytes of a row of sums."""
NEAR = 64
"""Bytes that come into a cache together."""

_begin_tile, _begin_row = products(ROWS, fresh=True), products(1, fresh=True)
_add_tile, _add_row = products(ROWS, fresh=False), products(1, fresh=False)
_gate, _share_out = gating(), shared()
_round_tile, _round_row = (products(rows, fresh=True, narrow=True) for rows in (ROWS, 1))


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def _multiply_part(
    how: Any, rows: Any, size: Any, x: Any, data: Any, goal: Any, goal_apart: Any
) -> None:
    """Rows times 64 columns.

    Args:
        how: write the products, add them to what is there, or write them as bfloat16.
        x: address of the rows; data: of the columns, see `microkernel.in_columns`; goal: of (rows,
            64) numbers, whose rows are so many bytes apart.
    """
    steps, apart, step = size // 2, size * BYTES, COLUMNS * 2 * BYTES
    for start in range(0, steps, STEPS):
        some = min(STEPS, steps - start)
        row = 0
        while row < rows:
            first, place = x + row * apart + start * 2 * BYTES, goal + row * goal_apart
            column = data + start * step
            if row + ROWS <= rows:
                if how == ROUND:
                    _round_tile(first, apart, column, step, some, place, goal_apart)
                elif how == WRITE and start == 0:
                    _begin_tile(first, apart, column, step, some, place, goal_apart)
                else:
                    _add_tile(first, apart, column, step, some, place, goal_apart)
                row += ROWS
            else:
                if how == ROUND:
                    _round_row(first, apart, column, step, some, place, goal_apart)
                elif how == WRITE and start == 0:
                    _begin_row(first, apart, column, step, some, place, goal_apart)
                else:
                    _add_row(first, apart, column, step, some, place, goal_apart)
                row += 1


@compiled("void(int64, int64, int64, int64, int64, int64, int64)")
def _finish_part(
    kind: Any, rows: Any, count: Any, sums: Any, others: Any, goal: Any, apart: Any
) -> None:
    """What becomes of rows' products with `count` columns that there are; `others` the second
    matrix's, and a goal's rows are `apart` numbers apart."""
    for row in range(rows):
        own = carray(floats_at(sums + row * LINE), (COLUMNS,))
        if kind == ADDED:
            added = carray(floats_at(goal + row * apart * 4), (count,))
            for i in range(count):
                added[i] += own[i]
            continue
        if kind == GATED:
            _gate(sums + row * LINE, others + row * LINE)
        place = goal + row * apart * BYTES
        if count == COLUMNS:
            _share_out(sums + row * LINE, np.float32(1), place)
        else:
            out = carray(bits_at(place), (count,))
            for i in range(count):
                out[i] = narrow(own[i])


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share: parts of what `Tiled` wrote there, as long as there are any."""
    told = carray(address, (TOLD,))
    kind, rows, size, outputs, part, each = told[2], told[3], told[4], told[5], told[6], told[7]
    x, data, second, goal = told[8], told[9], told[10], told[11]
    thread = take(numbers_at(np.int64(told.ctypes.data) + 8))
    sums = told[12] + thread * told[13]
    others = sums + part * LINE
    panels = (outputs + COLUMNS - 1) // COLUMNS
    groups = (panels + each - 1) // each
    parts = (rows + part - 1) // part
    item = take(address)
    while item < parts * groups:
        first = item // groups * part
        here, some = x + first * size * BYTES, min(part, rows - first)
        start = item % groups * each
        for panel in range(start, min(start + each, panels)):
            offset, column = panel * size * COLUMNS * BYTES, panel * COLUMNS
            width = 4 if kind == ADDED else BYTES
            place, line = goal + (first * outputs + column) * width, outputs * width
            count = min(COLUMNS, outputs - column)
            for row in range(some):
                for near in range(0, count * width, NEAR):
                    ask(place + row * line + near)
            if count == COLUMNS and kind == ADDED:
                _multiply_part(ADD, some, size, here, data + offset, place, line)
                continue
            if count == COLUMNS and kind == PLAIN and size <= 2 * STEPS:
                _multiply_part(ROUND, some, size, here, data + offset, place, line)
                continue
            _multiply_part(WRITE, some, size, here, data + offset, sums, LINE)
            if kind == GATED:
                _multiply_part(WRITE, some, size, here, second + offset, others, LINE)
            _finish_part(kind, some, count, sums, others, place, outputs)
        item = take(address)


class Tiled:
    """A matrix in the order that tiles are multiplied in, a panel for every 64 outputs."""

    def __init__(self, weight: Tensor) -> None:
        """From (outputs, inputs) bfloat16, inputs even.

        Raises:
            TypeError: other numbers.
        """
        if weight.dtype != torch.bfloat16:
            raise TypeError(f"a matrix must be bfloat16, got {weight.dtype}")
        self._outputs, self._inputs = weight.shape
        self._panels = in_columns(weight)
        self.nbytes = self._panels.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """Rows times the matrix, summed in float32, (rows, outputs) bfloat16.

        Args:
            x: (rows, inputs) bfloat16.

        Raises:
            TypeError: other numbers.
            ValueError: a shape that does not fit.
        """
        out = x.new_empty(len(x), self._outputs)
        self._carry_out(PLAIN, x, self, out)
        return out

    def add_product(self, total: Tensor, x: Tensor) -> None:
        """total += rows times the matrix, as `multiply`, but unrounded.

        Args:
            total: (rows, outputs) float32, contiguous.
        """
        if total.dtype != torch.float32 or not total.is_contiguous():
            raise TypeError(f"cannot add to {total.dtype} that may not be contiguous")
        if total.shape != (len(x), self._outputs):
            raise ValueError(f"cannot add {len(x)} rows to {tuple(total.shape)}")
        self._carry_out(ADDED, x, self, total)

    def gated(self, x: Tensor, up: Tiled) -> Tensor:
        """silu of the products times those with another matrix, as `multiply`, rounded once."""
        if (up._outputs, up._inputs) != (self._outputs, self._inputs):
            shapes = (up._outputs, up._inputs), (self._outputs, self._inputs)
            raise ValueError("{} cannot be gated by {}".format(*shapes))
        out = x.new_empty(len(x), self._outputs)
        self._carry_out(GATED, x, up, out)
        return out

    def _carry_out(self, kind: int, x: Tensor, second: Tiled, out: Tensor) -> None:
        # The threads are told addresses alone.
        if x.dtype != torch.bfloat16 or {x.device.type, out.device.type} != {"cpu"}:
            raise TypeError(f"rows must be bfloat16 on the CPU, got {x.dtype} on {x.device}")
        rows, size = x.shape
        if size != self._inputs:
            raise ValueError(f"rows of {size} do not fit {self._inputs} inputs")
        x = x.contiguous()
        threads, panels = torch.get_num_threads(), len(self._panels)
        part = PARTS[self.nbytes > STAYS]
        # Rows alone where there are many, so that their weights are read once.
        groups = min(panels, max(1, PLENTY * threads // max(1, -(-rows // part))))
        each = -(-panels // groups)
        room = torch.empty(threads, 2 * part * COLUMNS)
        arrays = x, self._panels, second._panels, out, room
        places = (array.data_ptr() for array in arrays)
        told = kind, rows, size, self._outputs, part, each, *places, 4 * room.shape[1]
        share(_share, 0, *told, threads=threads)

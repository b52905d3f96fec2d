"""Softmax of a prompt's attention between torch's products, compiled: in place, over what each
query sees, by torch's threads (see team). Torch's own takes four times as long, and a mask besides.
"""

# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.kernels import (
    LEAST_POWER,
    LOWEST,
    REACH,
    Array,
    compiled,
    greater,
    kept_on_disk,
    narrow,
    power_of_two,
    wide,
)
from dynamickv.fast.team import bits_at, floats_at, share, take

MADE_OF = "4d48d9d7e305"
"""Digest of the files that this is made of, see kernels.py."""
PARTS = 4
"""Parts for each thread: one that a neighbour disturbs takes fewer."""


@compiled("void(uint16[:, ::1], float32[::1], float32[::1], int64, int64, int64, int64)")
def _exponentials_of(
    logits: Array, bounds: Array, totals: Array, first: int, last: int, start: int, group: int
) -> None:
    """Of rows `first` to before `last`."""
    keys = logits.shape[1]
    for row in range(first, last):
        seen = start + row // group + 1
        total = np.float32(0)
        if bounds[row] <= REACH:
            for i in range(seen):
                power = power_of_two(wide(logits[row, i]))
                total += power
                logits[row, i] = narrow(power)
        else:
            most = LOWEST
            for i in range(seen):
                most = greater(most, wide(logits[row, i]))
            for i in range(seen):
                power = power_of_two(greater(wide(logits[row, i]) - most, np.float32(LEAST_POWER)))
                total += power
                logits[row, i] = narrow(power)
        totals[row] = total
        for i in range(seen, keys):
            logits[row, i] = np.uint16(0)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share of what `causal_exponentials` wrote there."""
    told = carray(address, (9,))
    rows, keys, start, group, each = told[1], told[2], told[3], told[4], told[5]
    logits = carray(bits_at(told[6]), (rows, keys))
    bounds = carray(floats_at(told[7]), (rows,))
    totals = carray(floats_at(told[8]), (rows,))
    first = take(address) * each
    while first < rows:
        _exponentials_of(logits, bounds, totals, first, min(first + each, rows), start, group)
        first = take(address) * each


def causal_exponentials(
    logits: Tensor, bounds: Tensor, totals: Tensor, start: int, group: int
) -> None:
    """Attention weights of consecutive queries of several heads in place of their logits, up to a
    factor for each row.

    Args:
        logits: to base 2, (queries * group, keys) bfloat16, contiguous, written over: row r belongs
            to the query at position start + r // group, which sees the keys up to its own position;
            what lies behind becomes 0.
        bounds: what no logit of a row exceeds, whatever its sign, (queries * group,) float32,
            contiguous: rows of great logits take one pass more.
        totals: in the same shape, written: the sum of every row's weights.
        start: position of the first query; start + queries <= keys.
        group: heads for each query.

    Raises:
        TypeError: other numbers, or not contiguous.
        ValueError: a query would see more keys than there are, or there are not as many bounds or
            totals.
    """
    # The threads are told addresses alone.
    if logits.dtype != torch.bfloat16 or not logits.is_contiguous():
        raise TypeError(f"logits must be contiguous bfloat16, got {logits.dtype}")
    for numbers in (bounds, totals):
        if numbers.dtype != torch.float32 or not numbers.is_contiguous():
            raise TypeError(f"bounds and totals must be contiguous float32, got {numbers.dtype}")
    rows, keys = logits.shape
    if start < 0 or start + -(-rows // group) > keys:
        raise ValueError(f"{rows // group} queries from position {start} see more than {keys} keys")
    if bounds.numel() != rows or totals.numel() != rows:
        raise ValueError(f"{rows} rows have {bounds.numel()} bounds and {totals.numel()} totals")
    each = -(-rows // (PARTS * torch.get_num_threads()))
    places = logits.data_ptr(), bounds.data_ptr(), totals.data_ptr()
    share(_share, rows, keys, start, group, each, *places)


@compiled("void(uint16[:, :, ::1], float32[:, ::1], uint16[:, :, ::1], int64, int64, int64)")
def _shares_of(
    attended: Array, totals: Array, out: Array, first: int, last: int, group: int
) -> None:
    """Of rows `first` to before `last`."""
    heads, _, dim = attended.shape
    for row in range(first, last):
        for head in range(heads):
            factor = np.float32(1) / totals[head, row]
            place = head * group + row % group
            for i in range(dim):
                out[row // group, place, i] = narrow(wide(attended[head, row, i]) * factor)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _divide_share(address: Any) -> None:
    """One thread's share of what `divided` wrote there."""
    told = carray(address, (9,))
    heads, rows, dim, group, each = told[1], told[2], told[3], told[4], told[5]
    attended = carray(bits_at(told[6]), (heads, rows, dim))
    totals = carray(floats_at(told[7]), (heads, rows))
    out = carray(bits_at(told[8]), (rows // group, heads * group, dim))
    first = take(address) * each
    while first < rows:
        _shares_of(attended, totals, out, first, min(first + each, rows), group)
        first = take(address) * each


def divided(attended: Tensor, totals: Tensor, group: int) -> Tensor:
    """Attention from values summed by the weights of `causal_exponentials`.

    Args:
        attended: (num_kv_heads, queries * group, head_dim) bfloat16, contiguous.
        totals: the sum of every row's weights, (num_kv_heads, queries * group) float32.

    Returns:
        (queries, num_kv_heads * group, head_dim) bfloat16.

    Raises:
        TypeError: other numbers, or not contiguous.
    """
    for given, dtype in ((attended, torch.bfloat16), (totals, torch.float32)):
        if given.dtype != dtype or not given.is_contiguous():
            raise TypeError(f"what is divided must be contiguous {dtype}, got {given.dtype}")
    heads, rows, dim = attended.shape
    out = attended.new_empty(rows // group, heads * group, dim)
    each = -(-rows // (PARTS * torch.get_num_threads()))
    places = attended.data_ptr(), totals.data_ptr(), out.data_ptr()
    share(_divide_share, heads, rows, dim, group, each, *places)
    return out

"""Softmax of a prompt's attention, compiled: in place, over what each query sees, by torch's
threads (see team). Torch's own takes more than twice as long, and a mask besides."""

# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.kernels import (
    LOWEST,
    Array,
    bits,
    compiled,
    exp_of,
    greater,
    kept_on_disk,
    narrow,
    wide,
)
from dynamickv.fast.team import bits_at, take
from dynamickv.neighbours import openmp

TOLD = 7
"""Numbers that say what the threads share; the first is the next part to take."""
PARTS = 4
"""Parts for each thread: one that a neighbour disturbs takes fewer."""


@compiled("void(uint16[:, ::1], int64, int64, int64, int64)")
def softmax_rows(logits: Array, first: int, last: int, start: int, group: int) -> None:
    """Softmax of rows `first` to before `last`, as `causal_softmax` does it."""
    keys = logits.shape[1]
    room = np.empty(keys, np.float32)
    for row in range(first, last):
        seen = start + row // group + 1
        most = LOWEST
        for i in range(seen):
            most = greater(most, wide(logits[row, i]))
        total = np.float32(0)
        for i in range(seen):
            share = exp_of(wide(logits[row, i]) - most)
            total += share
            room[i] = share
        factor = np.float32(1) / total
        for i in range(seen):
            logits[row, i] = narrow(room[i] * factor)
        for i in range(seen, keys):
            logits[row, i] = np.uint16(0)


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share of what `causal_softmax` wrote there: parts, as long as there are any."""
    told = carray(address, (TOLD,))
    rows, keys, start, group, each = told[1], told[2], told[3], told[4], told[5]
    logits = carray(bits_at(told[6]), (rows, keys))
    first = take(address) * each
    while first < rows:
        softmax_rows(logits, first, min(first + each, rows), start, group)
        first = take(address) * each


def causal_softmax(logits: Tensor, start: int, group: int) -> None:
    """Attention weights of consecutive queries of several heads, in place of their logits.

    Args:
        logits: (queries * group, keys) bfloat16, contiguous, written over: row r belongs to the
            query at position start + r // group, which sees the keys up to its own position; what
            lies behind becomes 0.
        start: position of the first query; start + queries <= keys.
        group: heads for each query.

    Raises:
        TypeError: other numbers, or not contiguous.
        ValueError: a query would see more keys than there are.
    """
    # The threads are told addresses alone.
    if logits.dtype != torch.bfloat16 or not logits.is_contiguous():
        raise TypeError(f"logits must be contiguous bfloat16, got {logits.dtype}")
    threads = torch.get_num_threads()
    runtime = openmp() if threads > 1 else None
    array = bits(logits)
    rows, keys = array.shape
    if start < 0 or start + -(-rows // group) > keys:
        raise ValueError(f"{rows // group} queries from position {start} see more than {keys} keys")
    if runtime is None:
        softmax_rows(array, 0, rows, start, group)
        return
    each = -(-rows // (PARTS * threads))
    told = np.array([0, rows, keys, start, group, each, array.ctypes.data], np.int64)
    runtime.GOMP_parallel(_share.address, told.ctypes.data, threads, 0)

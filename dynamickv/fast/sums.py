"""The sum that runs through the layers for many positions, compiled: added to and normalised, by
torch's threads (see team)."""

# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
from numba import carray, cfunc
from torch import Tensor

from dynamickv.fast.kernels import add, kept_on_disk, norm
from dynamickv.fast.team import bits_at, floats_at, share, take

MADE_OF = "4d48d9d7e305"
"""Digest of the files that this is made of, see kernels.py."""
ROWS = 128
"""Positions that a thread takes at a time."""


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _add_share(address: Any) -> None:
    """One thread's share of what `add_rows` wrote there."""
    told = carray(address, (5,))
    rows, size = told[1], told[2]
    x = carray(floats_at(told[3]), (rows, size))
    more = carray(bits_at(told[4]), (rows, size))
    first = take(address) * ROWS
    while first < rows:
        last = min(first + ROWS, rows)
        add(x[first:last], more[first:last])
        first = take(address) * ROWS


def add_rows(x: Tensor, more: Tensor) -> None:
    """x += more.

    Args:
        x: (rows, size) float32, contiguous.
        more: (rows, size) bfloat16, contiguous.

    Raises:
        TypeError: other numbers, or not contiguous.
        ValueError: another shape.
    """
    # The threads are told addresses alone.
    if x.dtype != torch.float32 or more.dtype != torch.bfloat16:
        raise TypeError(f"cannot add {more.dtype} to {x.dtype}")
    if not (x.is_contiguous() and more.is_contiguous()):
        raise TypeError("both must be contiguous")
    if x.shape != more.shape:
        raise ValueError(f"cannot add {tuple(more.shape)} to {tuple(x.shape)}")
    share(_add_share, *x.shape, x.data_ptr(), more.data_ptr())


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _norm_share(address: Any) -> None:
    """One thread's share of what `normed_rows` wrote there."""
    told = carray(address, (7,))
    rows, size = told[1], told[2]
    x = carray(floats_at(told[3]), (rows, size))
    weight = carray(floats_at(told[4]), (size,))
    eps = carray(floats_at(told[5]), (1,))[0]
    out = carray(bits_at(told[6]), (rows, size))
    first = take(address) * ROWS
    while first < rows:
        last = min(first + ROWS, rows)
        norm(x[first:last], weight, eps, out[first:last])
        first = take(address) * ROWS


def normed_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, (rows, size) bfloat16.

    Args:
        x: (rows, size) float32.
        weight: (size,) float32.

    Raises:
        TypeError: other numbers.
        ValueError: another shape.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise TypeError(f"cannot normalise {x.dtype} by {weight.dtype}")
    if weight.shape != x.shape[1:]:
        raise ValueError(f"rows of {x.shape[1]} have {len(weight)} weights")
    x, weight = x.contiguous(), weight.detach().contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    least = torch.tensor([eps])
    places = x.data_ptr(), weight.data_ptr(), least.data_ptr(), out.data_ptr()
    share(_norm_share, *x.shape, *places)
    return out

"""What functions that torch's threads share are made of, compiled by numba.

The threads are those of the OpenMP runtime that torch itself runs on, so that no others wait beside
them and torch's count of threads holds here too. It is called by its GNU name; where torch has
another runtime, such as on Windows, one thread does it all. The threads are told one address, where
they find what they work on and a counter of the parts already taken.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dynamickv.neighbours import openmp


def _pointer_to(number: Any) -> Any:
    """What finds numbers of a kind at an address."""

    def typed(context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), code

    return intrinsic(typed)


def _taking(context: Any, counter: Any) -> Any:
    """The number at an address; the next one to ask gets the next."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return types.int64(counter), code


floats_at: Any = _pointer_to(types.float32)
numbers_at: Any = _pointer_to(types.int64)
bits_at: Any = _pointer_to(types.uint16)
words_at: Any = _pointer_to(types.uint32)
take: Any = intrinsic(_taking)


def _running(context: Any, runtime: Any, work: Any, address: Any, threads: Any) -> Any:
    """OpenMP's call of a function of one address by many threads, or one call of it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        runtime, work, address, threads = arguments
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        many = ir.FunctionType(ir.VoidType(), [byte, byte, word, word])
        one = ir.FunctionType(ir.VoidType(), [byte])
        told = builder.inttoptr(address, byte)
        alone = builder.icmp_signed("==", runtime, ir.Constant(runtime.type, 0))
        with builder.if_else(alone) as (itself, others):
            with itself:
                builder.call(builder.inttoptr(work, one.as_pointer()), [told])
            with others:
                start = builder.inttoptr(runtime, many.as_pointer())
                count = builder.trunc(threads, word)
                function = builder.inttoptr(work, byte)
                builder.call(start, [function, told, count, ir.Constant(word, 0)])
        return context.get_dummy_value()

    return types.void(runtime, work, address, threads), code


run: Any = intrinsic(_running)
"""`share` for compiled functions: called with the two numbers of `runtime` around those of what the
threads do, the function's and what it is told. Called by its address, a function is not compiled
once more into each that calls it."""


def runtime() -> tuple[int, int]:
    """The address of what starts torch's threads, 0 where one thread does it all, and how many
    there are."""
    threads = torch.get_num_threads()
    found = openmp() if threads > 1 else None
    start = None if found is None else ctypes.cast(found.GOMP_parallel, ctypes.c_void_p).value
    return start or 0, threads


def share(function: Any, *told: int, threads: int | None = None) -> None:
    """Let torch's threads do what a compiled `function` of one address does.

    Args:
        told: numbers that stand there behind a counter, which is 0.
        threads: as many of them; None for all.
    """
    numbers = np.array([0, *told], np.int64)
    address = numbers.ctypes.data
    threads = threads or torch.get_num_threads()
    runtime = openmp() if threads > 1 else None
    if runtime is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)(address)
    else:
        runtime.GOMP_parallel(function.address, address, threads, 0)

"""The small work of a decoding step on a CPU, compiled by numba: what lies between a layer's
products takes torch some forty operations, and each of them longer to start than to compute.

bfloat16 comes and goes as its bits, uint16 (numba has no such number); all that is computed is
float32. Compiled when a machine first imports this, in some seconds, and kept in Python's cache
beside this file, or in the user's. One thread each, as every caller may be in a thread of its own;
attention.py, causal.py, few_rows.py, heads.py, softmax.py, step.py, sums.py and tiled.py have what
takes several. Their functions are made of these and of other files', but numba looks for changes in
a function's own file alone: each of those files names the digest of what it is made of, so that it
changes with it (a test says which).
"""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from dynamickv.fast.team import bits_at, floats_at

Function = TypeVar("Function", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)
LEAST = np.float32(-87)
"""Below it exp is 0 in float32, near enough."""
LOWEST = np.float32(-1e30)
SERIES = 0.05500895, 0.24221101, 0.6932829, 1.0
"""Of polynomials for 2^x on -1/2 to 1/2 the one whose relative error is least."""
REACH = 100
"""Logits up to which 2^logit can be summed as it is, of 127 in float32: what is left are thousands
of positions and values."""
LEAST_POWER = -126.0
"""Below it 2^x is 0 in float32, near enough."""
NUMBERS = "float32", "uint16"
"""What keys and values may be held in: float32, or bfloat16 as its bits."""
HELD = tuple(f"{number}[:, :, ::1], {number}[:, :, ::1]" for number in NUMBERS)
"""Keys and values."""
TABLE = "int64[:, ::1]"
TURN = "float32[::1], float32[::1]"
"""A position's cosines and sines."""


def compiled(*signatures: str) -> Callable[[Function], Function]:
    """A function in machine code for these arguments, kept on disk where Python may write."""
    options = {"fastmath": True, "nogil": True, "error_model": "numpy"}
    apply: Callable[[Function], Function] = kept_on_disk(numba.njit, list(signatures), **options)
    return apply


def kept_on_disk(make: Any, signature: Any, **options: Any) -> Any:
    """A decorator of numba's that keeps what it makes where Python may write."""

    def apply(function: Any) -> Any:
        try:
            return make(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in
            return make(signature, **options)(function)

    return apply


def inlined(function: Function) -> Function:
    """A part of compiled functions, by whose fastmath it goes: so in a cfunc, which has none, no
    loop that computes may stand."""
    done: Any = numba.njit(inline="always")(function)
    return done  # type: ignore[no-any-return]


def _recast(source: Any, target: Any, bits: Any) -> Any:
    """The same 32 bits as another kind of number."""

    def typed(context: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], bits)

        return target(source), code

    return intrinsic(typed)


float_of = _recast(types.uint32, types.float32, ir.FloatType())
bits_of = _recast(types.float32, types.uint32, ir.IntType(32))


def _widening(context: Any, value: Any) -> Any:
    """float32 of what an array holds, float32 or bfloat16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), code


wide: Any = intrinsic(_widening)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat16, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOAT = _BFloat()


def narrowed(builder: Any, number: Any, instruction: bool) -> Any:
    """The code for the nearest bfloat16 of a float32, or of a register full of them, as such or as
    its bits; `instruction` as in `rounding`."""
    count = getattr(number.type, "count", None)

    def kind(one: Any) -> Any:
        return one if count is None else ir.VectorType(one, count)

    def word(value: int) -> Any:
        return ir.Constant(kind(ir.IntType(32)), value if count is None else [value] * count)

    if instruction:
        return builder.fptrunc(number, kind(BFLOAT))
    bits = builder.bitcast(number, kind(ir.IntType(32)))
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    nearest = builder.add(builder.add(bits, word(0x7FFF)), odd)
    return builder.trunc(builder.lshr(nearest, word(16)), kind(ir.IntType(16)))


def rounding(instruction: bool) -> Any:
    """What gives a float32 in the format of another number, float32 or the nearest bfloat16's bits.

    Args:
        instruction: round as CPUs with AVX512-BF16 do it, many numbers at once; numbers below
            2^-126 become 0.
    """

    def fitting(context: Any, value: Any, like: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if like == types.float32:
                return arguments[0]
            return builder.bitcast(narrowed(builder, arguments[0], instruction), ir.IntType(16))

        return like(types.float32, like), code

    return intrinsic(fitting)


def rounds_by_instruction() -> bool:
    """Whether numba compiles for a CPU that rounds to bfloat16 itself: for others LLVM calls a
    function that need not be there."""
    chosen = numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None
    return not chosen and bool(get_host_cpu_features().get("avx512bf16"))


fit = rounding(instruction=rounds_by_instruction())
"""As this CPU does it."""


def _operation(name: str) -> Any:
    """An operation of LLVM's on float32 that numba has no fast way to."""

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number] * len(arguments))
        return builder.call(builder.module.declare_intrinsic(name, [number], kind), arguments)

    return call


def _choosing(context: Any, one: Any, other: Any) -> Any:
    """The greater of two float32."""
    return types.float32(one, other), _operation("llvm.maxnum")


greater: Any = intrinsic(_choosing)
"""Numba's own `max` takes one number at a time where it runs over an array, this one as many as a
register holds."""


def _levelling(context: Any, value: Any) -> Any:
    """The nearest whole number of a float32."""
    return types.float32(value), _operation("llvm.nearbyint")


_nearest: Any = intrinsic(_levelling)


@inlined
def narrow(value: Any) -> Any:
    """The nearest bfloat16's bits, of two equally near the even ones."""
    return fit(value, np.uint16(0))


@inlined
def exp_of(x: Any) -> Any:
    """exp of a float32 up to 88: 2^n times the series of what is left. numpy's runs one number at
    a time here, this one as many as a register holds."""
    x = max(x, LEAST)
    n = np.floor(x * LOG2_E + np.float32(0.5))
    r = x - n * LN_2
    series = np.float32(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(factor)
    return series * float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@inlined
def power_of_two(x: Any) -> Any:
    """2^x of a float32 from -126 to 127, to a part in 9,800, a twentieth of what rounding to
    bfloat16 changes, and exact where x is whole. Of such polynomials on -1/2 to 1/2 it is the one
    whose relative error is least."""
    n = _nearest(x)
    r = x - n
    series = np.float32(SERIES[0])
    for factor in SERIES[1:]:
        series = series * r + np.float32(factor)
    return series * float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@compiled(
    *(f"void(float32[:, ::1], float32[::1], float64, {number}[:, ::1])" for number in NUMBERS)
)
def norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """RMS norm of rows.

    Args:
        x: (rows, size) float32.
        weight: (size,) float32.
        out: (rows, size) float32 or bfloat16, written.
    """
    rows, size = x.shape
    for row in range(rows):
        squares = np.float32(0)
        for i in range(size):
            squares += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + np.float32(eps))
        for i in range(size):
            out[row, i] = fit(x[row, i] * scale * weight[i], out[row, i])


@compiled("void(float32[:, ::1], uint16[:, ::1])", "void(float32[:, ::1], float32[:, ::1])")
def add(x: Array, more: Array) -> None:
    """x += more, (rows, size), float32 and bfloat16 or float32."""
    rows, size = x.shape
    for row in range(rows):
        for i in range(size):
            x[row, i] += wide(more[row, i])


@compiled(*(f"void({number}[::1], {TURN}, {goal}[::1])" for number in NUMBERS for goal in NUMBERS))
def turn_one(given: Array, cos: Array, sin: Array, out: Array) -> None:
    """Rotate a head's numbers at a position, (head_dim,), in the format of `out`, written."""
    half = len(out) // 2
    for i in range(half):
        a, b = wide(given[i]), wide(given[half + i])
        out[i] = fit(a * cos[i] - b * sin[i], out[i])
        out[half + i] = fit(b * cos[half + i] + a * sin[half + i], out[half + i])


@compiled(
    *(
        f"void({number}[::1], {TURN}, float32[:, ::1], {held}, int64)"
        for number in NUMBERS
        for held in HELD
    )
)
def _place_one(
    qkv: Array, cos: Array, sin: Array, query: Array, keys: Array, values: Array, slot: int
) -> None:
    query_heads, dim = query.shape
    held = keys.shape[0]
    kv_heads = (qkv.shape[0] // dim - query_heads) // 2
    for head in range(query_heads):
        turn_one(qkv[head * dim : (head + 1) * dim], cos, sin, query[head])
    for head in range(held):
        first = (query_heads + head * kv_heads // held) * dim
        turn_one(qkv[first : first + dim], cos, sin, keys[head, slot])
        first += kv_heads * dim
        for i in range(dim):
            values[head, slot, i] = fit(wide(qkv[first + i]), values[head, slot, i])


@compiled(
    *(
        f"void({number}[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, :, ::1], {TABLE})"
        for number in NUMBERS
    )
)
def place(qkv: Array, cos: Array, sin: Array, query: Array, table: Array) -> None:
    """Rotate a token's queries and keys for each cache; write key and value where they are held.

    Args:
        qkv: (rows, all heads * head_dim), queries, keys and values, bfloat16 or float32.
        cos: (rows, head_dim) float32; sin likewise.
        query: (rows, query_heads, head_dim) float32, written.
        table: (rows, 6) int64: addresses of keys and values, (held heads, room, head_dim), heads
            held, room, the slot that is written, and whether they are bfloat16 or float32. Each of
            several heads for one of the token's has a copy.
    """
    dim = query.shape[2]
    for row in range(len(qkv)):
        shape = table[row, 2], table[row, 3], dim
        slot = table[row, 4]
        if table[row, 5]:
            keys, values = bits_at(table[row, 0]), bits_at(table[row, 1])
            held = carray(keys, shape), carray(values, shape)
            _place_one(qkv[row], cos[row], sin[row], query[row], held[0], held[1], slot)
        else:
            wide_keys, wide_values = floats_at(table[row, 0]), floats_at(table[row, 1])
            kept = carray(wide_keys, shape), carray(wide_values, shape)
            _place_one(qkv[row], cos[row], sin[row], query[row], kept[0], kept[1], slot)


def bits(states: Tensor) -> Array:
    """The same memory as these functions take it: bfloat16 as its bits."""
    narrow = states.dtype == torch.bfloat16
    array: Array = (states.view(torch.uint16) if narrow else states).numpy()
    return array


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of float32 rows, (rows, size)."""
    out = torch.empty_like(x)
    norm(x.numpy(), weight.detach().numpy(), eps, out.numpy())
    return out

"""The microkernel of compiled functions that multiply on a CPU: products of a few rows with 64
columns of bfloat16, a micro-tile, whose sums stay in registers.

Torch's products reach nine tenths of what AVX512-BF16 can do and leave what they compute in memory;
between these products a compiled function goes on with it while it is near.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from dynamickv.fast.kernels import BFLOAT, LEAST_POWER, SERIES, narrowed, rounds_by_instruction

ROWS = 6
"""Rows of a tile: their sums take 24 of 32 registers."""
COLUMNS = 64
"""Columns of a tile."""
LANES = 16
"""Numbers in a register."""
FLOAT, WORD, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)
PAIRS = ir.VectorType(BFLOAT, 2 * LANES)


def place_at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The code for a pointer to a kind of number so many bytes behind an address."""
    place = builder.add(address, ir.Constant(LONG, offset))
    return builder.inttoptr(place, kind.as_pointer())


def load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The code for a number, or a register of them, from there."""
    loaded = builder.load(place_at(builder, address, offset, kind))
    loaded.align = 4
    return loaded


def store(builder: Any, number: Any, address: Any, offset: int) -> None:
    """The code that writes it there."""
    stored = builder.store(number, place_at(builder, address, offset, number.type))
    stored.align = 2


def ask_for(builder: Any, address: Any, offset: int) -> None:
    """The code that asks memory for what will be read; past the end nothing is read."""
    byte = ir.IntType(8)
    shape = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), WORD, WORD, WORD])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], shape)
    # To read, and to keep in all caches but the smallest.
    how = [ir.Constant(WORD, number) for number in (0, 2, 1)]
    builder.call(prefetch, [place_at(builder, address, offset, byte), *how])


def every(number: Any, kind: Any) -> Any:
    """A constant in every lane."""
    return ir.Constant(kind, [number] * LANES)


def repeated(builder: Any, number: Any) -> Any:
    """A number in every lane."""
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(WORD, 0))
    return builder.shuffle_vector(one, nothing, every(0, WORDS))


def _greater(builder: Any, x: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, other), x, other)


def _halves(builder: Any, words: Any) -> tuple[Any, Any]:
    """Both bfloat16 of every word, as float32."""
    low = builder.shl(words, every(16, WORDS))
    high = builder.and_(words, every(0xFFFF0000, WORDS))
    return builder.bitcast(low, FLOATS), builder.bitcast(high, FLOATS)


def function_of(builder: Any, name: str, *takes: Any) -> Any:
    """One of LLVM's own, that gives a register of floats."""
    kind = ir.FunctionType(FLOATS, list(takes))
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _adding(builder: Any, instruction: bool) -> Any:
    """What adds the products of two words' numbers to a float32, in every lane."""
    if instruction:
        function = function_of(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, PAIRS, PAIRS)

        def dot(total: Any, one: Any, other: Any) -> Any:
            pairs = builder.bitcast(one, PAIRS), builder.bitcast(other, PAIRS)
            return builder.call(function, [total, *pairs])

        return dot
    fma = function_of(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS)

    def sums(total: Any, one: Any, other: Any) -> Any:
        for a, b in zip(_halves(builder, one), _halves(builder, other), strict=True):
            total = builder.call(fma, [a, b, total])
        return total

    return sums


def _before(rows: int) -> range:
    """How many numbers of a tile lie before each of the registers that it takes."""
    return range(0, rows * COLUMNS, LANES)


def _multiplied(
    builder: Any, rows: int, arguments: Any, begin: Any, instruction: bool
) -> list[Any]:
    """A tile's sums, in the order of `_before`, that were `begin` before."""
    first, apart, columns, step, steps = arguments
    dot = _adding(builder, instruction)
    # In registers: LLVM keeps nothing of it in memory.
    sums = [cgutils.alloca_once(builder, FLOATS) for _ in begin]
    for room, number in zip(sums, begin, strict=True):
        builder.store(number, room)
    starts = [first]
    for _ in range(1, rows):
        starts.append(builder.add(starts[-1], apart))
    with cgutils.for_range(builder, steps) as loop:
        here = builder.add(columns, builder.mul(loop.index, step))
        words = [load(builder, here, 4 * column, WORDS) for column in range(0, COLUMNS, LANES)]
        offset = builder.mul(loop.index, ir.Constant(LONG, 4))
        for row, start in enumerate(starts):
            number = repeated(builder, load(builder, builder.add(start, offset), 0, WORD))
            for column, other in enumerate(words):
                room = sums[row * len(words) + column]
                builder.store(dot(builder.load(room), other, number), room)
    return [builder.load(room) for room in sums]


def products(rows: int, fresh: bool, instruction: bool | None = None) -> Any:
    """What multiplies `rows` rows with 64 columns, for compiled functions.

    Called with addresses of bfloat16, which a row has one behind the other: of the rows and how
    many bytes they are apart, of the columns as `in_columns` lays them out and how many bytes a
    step is apart, how many steps of two numbers there are; and the address of (rows, 64) float32,
    which are added to, or written if `fresh`.

    Args:
        instruction: multiply as CPUs with AVX512-BF16 do it; None where the CPU is one.
    """
    native = rounds_by_instruction() if instruction is None else instruction

    def typed(
        context: Any, a: Any, a_apart: Any, b: Any, b_apart: Any, steps: Any, out: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *told, out = arguments
            begin = [
                every(0.0, FLOATS) if fresh else load(builder, out, 4 * before, FLOATS)
                for before in _before(rows)
            ]
            sums = _multiplied(builder, rows, told, begin, native)
            for number, before in zip(sums, _before(rows), strict=True):
                store(builder, number, out, 4 * before)
            return context.get_dummy_value()

        return types.void(a, a_apart, b, b_apart, steps, out), code

    return intrinsic(typed)


def _power_of_two(builder: Any, x: Any) -> Any:
    """As `kernels.power_of_two`, of a register."""
    nearest = builder.call(function_of(builder, "llvm.nearbyint.v16f32", FLOATS), [x])
    left = builder.fsub(x, nearest)
    fma = function_of(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS)
    series = every(SERIES[0], FLOATS)
    for factor in SERIES[1:]:
        series = builder.call(fma, [series, left, every(factor, FLOATS)])
    exponent = builder.add(builder.fptosi(nearest, WORDS), every(127, WORDS))
    power = builder.bitcast(builder.shl(exponent, every(23, WORDS)), FLOATS)
    return builder.fmul(series, power)


def weighed(rows: int, limited: bool, instruction: bool | None = None) -> Any:
    """What makes weights of `rows` rows' products with 64 columns, 2^(product - most), for compiled
    functions.

    Called as `products`, but with these addresses at the end: of the weights, bfloat16, and how
    many bytes their rows are apart; of (rows, 16) float32, to which every sixteenth weight is
    added; and of (rows, 2) float32: how many columns of a row count, where all others get 0, and
    its most. Unless `limited` all columns count, and most is 0.

    Args:
        instruction: as for `products`.
    """
    native = rounds_by_instruction() if instruction is None else instruction
    registers = COLUMNS // LANES

    def typed(
        context: Any, a: Any, a_apart: Any, b: Any, b_apart: Any, steps: Any,
        out: Any, out_apart: Any, totals: Any, limits: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *told, out, out_apart, totals, limits = arguments
            none = every(0.0, FLOATS)
            sums = _multiplied(builder, rows, told, [none] * rows * registers, native)
            for row in range(rows):
                total = load(builder, totals, 4 * row * LANES, FLOATS)
                count, most = (
                    repeated(builder, load(builder, limits, 8 * row + place, FLOAT))
                    for place in (0, 4)
                )
                for register in range(registers):
                    x = sums[row * registers + register]
                    if limited:
                        x = _greater(builder, builder.fsub(x, most), every(LEAST_POWER, FLOATS))
                    weight = _power_of_two(builder, x)
                    if limited:
                        column = [float(register * LANES + lane) for lane in range(LANES)]
                        counts = builder.fcmp_ordered("<", ir.Constant(FLOATS, column), count)
                        weight = builder.select(counts, weight, none)
                    total = builder.fadd(total, weight)
                    store(builder, narrowed(builder, weight, native), out, 2 * register * LANES)
                store(builder, total, totals, 4 * row * LANES)
                out = builder.add(out, out_apart)
            return context.get_dummy_value()

        return types.void(a, a_apart, b, b_apart, steps, out, out_apart, totals, limits), code

    return intrinsic(typed)


def in_columns(rows: Tensor) -> Tensor:
    """What `products` multiplies with, for products with each of many rows: every 64 rows are the
    columns of a tile.

    Args:
        rows: (..., n, size) bfloat16, size even.

    Returns:
        (..., ceil(n / 64), size // 2, 64, 2) bfloat16, with rows of zeros behind the last.
    """
    *outer, count, size = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -count % COLUMNS)).contiguous()
    words = padded.view(torch.int32).view(*outer, -1, COLUMNS, size // 2)
    pairs = words.transpose(-1, -2).contiguous().view(torch.bfloat16)
    return pairs.view(*pairs.shape[:-1], COLUMNS, 2)


def in_pairs(rows: Tensor, count: int) -> Tensor:
    """What `products` multiplies with, for sums of rows by weights.

    Args:
        rows: (..., n, size) bfloat16.
        count: rows to be had, at least n, even.

    Returns:
        (..., count // 2, size rounded up to 64s, 2) bfloat16, zeros where there were no numbers.
    """
    *outer, length, size = rows.shape
    padded = torch.nn.functional.pad(rows, (0, -size % COLUMNS, 0, count - length))
    return padded.view(*outer, count // 2, 2, -1).transpose(-1, -2).contiguous()

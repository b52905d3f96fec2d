"""The microkernel of compiled functions that multiply on a CPU: products of a few rows with 64
columns of bfloat16, a micro-tile, whose sums stay in registers.

Torch's products leave what they compute in memory; between these a compiled function goes on with
it while it is near.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from dynamickv.fast.kernels import BFLOAT, LEAST_POWER, SERIES, narrowed, rounds_by_instruction

COLUMNS = 64
"""Columns of a tile."""
LANES = 16
"""Numbers in a register."""
REGISTERS = COLUMNS // LANES
"""That a row of a tile takes."""
FLOAT, WORD, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)
FLAT = -87.0
"""Below it a sigmoid is 0, near enough."""
PAIRS, HALVES = (ir.VectorType(kind, 2 * LANES) for kind in (BFLOAT, ir.IntType(16)))
BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
POWERS = [float(np.float32(2 ** (place / LANES))) for place in range(LANES)]
"""2^x of every sixteenth."""


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


def _asking(context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, arguments[0], 0)
        return context.get_dummy_value()

    return types.void(address), code


ask: Any = intrinsic(_asking)
"""`ask_for` in compiled functions."""


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


def _apart(builder: Any, first: Any, apart: Any, rows: int) -> list[Any]:
    """The addresses of a tile's rows."""
    starts = [first]
    for _ in range(1, rows):
        starts.append(builder.add(starts[-1], apart))
    return starts


def _begun(builder: Any, rows: int) -> list[Any]:
    """A tile's sums, row by row, 0. In registers: LLVM keeps nothing of it in memory."""
    sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(rows * REGISTERS)]
    for room in sums:
        builder.store(every(0.0, FLOATS), room)
    return sums


def _multiply(
    builder: Any, starts: list[Any], columns: Any, step: Any, some: tuple[Any, Any],
    sums: list[Any], instruction: bool,
) -> None:  # fmt: skip
    """Add some steps' products, from the first to before the last, to a tile's sums."""
    dot = _adding(builder, instruction)
    with cgutils.for_range(builder, some[1], start=some[0]) as loop:
        here = builder.add(columns, builder.mul(loop.index, step))
        words = [load(builder, here, 4 * column, WORDS) for column in range(0, COLUMNS, LANES)]
        offset = builder.mul(loop.index, ir.Constant(LONG, 4))
        for row, start in enumerate(starts):
            number = repeated(builder, load(builder, builder.add(start, offset), 0, WORD))
            for column, other in enumerate(words):
                room = sums[row * len(words) + column]
                builder.store(dot(builder.load(room), other, number), room)


def _multiplied(builder: Any, rows: int, arguments: Any, instruction: bool) -> list[Any]:
    """A tile's sums, row by row."""
    first, apart, columns, step, steps = arguments
    sums = _begun(builder, rows)
    starts = _apart(builder, first, apart, rows)
    _multiply(builder, starts, columns, step, (ir.Constant(LONG, 0), steps), sums, instruction)
    return [builder.load(room) for room in sums]


def products(
    rows: int, fresh: bool, instruction: bool | None = None, *, narrow: bool = False
) -> Any:
    """What multiplies `rows` rows with 64 columns, for compiled functions.

    Called with addresses of bfloat16, which a row has one behind the other: of the rows and how
    many bytes they are apart, of the columns as `in_columns` lays them out and how many bytes a
    step is apart, how many steps of two numbers there are; and the address of (rows, 64) float32
    and how many bytes these rows are apart, which are added to, or written if `fresh`.

    Args:
        instruction: multiply as CPUs with AVX512-BF16 do it; None where the CPU is one.
        narrow: write bfloat16; only if `fresh`.
    """
    native = rounds_by_instruction() if instruction is None else instruction

    def typed(
        context: Any, a: Any, a_apart: Any, b: Any, b_apart: Any, steps: Any,
        out: Any, out_apart: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *told, out, out_apart = arguments
            goals = [
                (row, 4 * register * LANES)
                for row in _apart(builder, out, out_apart, rows)
                for register in range(REGISTERS)
            ]
            sums = _multiplied(builder, rows, told, native)
            for number, (row, offset) in zip(sums, goals, strict=True):
                if not fresh:
                    number = builder.fadd(number, load(builder, row, offset, FLOATS))
                if narrow:
                    store(builder, narrowed(builder, number, native), row, offset // 2)
                else:
                    store(builder, number, row, offset)
            return context.get_dummy_value()

        return types.void(a, a_apart, b, b_apart, steps, out, out_apart), code

    return intrinsic(typed)


def _power_of_two(builder: Any, x: Any, instruction: bool) -> Any:
    """2^x in every lane, to a part in 4,000, a tenth of what rounding to bfloat16 changes.

    With the CPU's instructions: the nearest sixteenth's power is looked up, what is left is next to
    linear. It asks less than a series of the units that multiply, which are what products wait for.
    """
    fma = function_of(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS)
    if instruction:
        mask = ir.IntType(16)
        # In every lane, and rounding as the CPU is set to.
        as_ever = ir.Constant(mask, 0xFFFF), ir.Constant(WORD, 4)
        # Adding a great number and taking it off again would not round: what numba compiles may be
        # reordered.
        level = "llvm.x86.avx512.mask.rndscale.ps.512"
        level = function_of(builder, level, FLOATS, WORD, FLOATS, mask, WORD)
        scale = "llvm.x86.avx512.mask.scalef.ps.512"
        scale = function_of(builder, scale, FLOATS, FLOATS, FLOATS, mask, WORD)
        look_up = function_of(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, WORDS)
        to_sixteenths = ir.Constant(WORD, 4 << 4)
        nearest = builder.call(level, [x, to_sixteenths, x, *as_ever])
        left = builder.fsub(x, nearest)
        # A float32 of this size ends in its sixteenths, where the look-up finds them.
        place = builder.bitcast(builder.fadd(nearest, every(1.5 * 2.0**19, FLOATS)), WORDS)
        power, slope = (
            builder.call(look_up, [ir.Constant(FLOATS, [factor * one for one in POWERS]), place])
            for factor in (1.0, math.log(2))
        )
        power = builder.call(fma, [slope, left, power])
        return builder.call(scale, [power, nearest, power, *as_ever])
    nearest = builder.call(function_of(builder, "llvm.nearbyint.v16f32", FLOATS), [x])
    left = builder.fsub(x, nearest)
    series = every(SERIES[0], FLOATS)
    for factor in SERIES[1:]:
        series = builder.call(fma, [series, left, every(factor, FLOATS)])
    exponent = builder.add(builder.fptosi(nearest, WORDS), every(127, WORDS))
    power = builder.bitcast(builder.shl(exponent, every(23, WORDS)), FLOATS)
    return builder.fmul(series, power)


def _write_weights(
    builder: Any, weights: list[Any], out: Any, totals: Any, instruction: bool
) -> None:
    """A row's weights as bfloat16, added to its totals."""
    total = load(builder, totals, 0, FLOATS)
    for weight in weights:
        total = builder.fadd(total, weight)
    store(builder, total, totals, 0)
    for register, weight in enumerate(weights):
        number = narrowed(builder, weight, instruction)
        store(builder, number, out, 2 * register * LANES)


def looks_up_bytes() -> bool:
    """Whether this CPU, besides rounding itself, finds 64 bytes at once in a table of 128."""
    return rounds_by_instruction() and bool(get_host_cpu_features().get("avx512vbmi"))


def _look_up_weights(builder: Any, logits: list[Any], out: Any, totals: Any) -> None:
    """As `_write_weights`, of logits between -100 and 100, by integers alone, which no product
    waits for: a bfloat16's bits are 128 times its logarithm to base 2, less what a table has for
    the seven bits behind the point. Logits are rounded to these, a quarter of a per cent at most.
    """
    table = [place - round((2 ** (place / 128) - 1) * 128) for place in range(128)]
    low, high = (ir.Constant(BYTES, half) for half in (table[:64], table[64:]))
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    kind = ir.FunctionType(BYTES, [BYTES, BYTES, BYTES])
    look_up = cgutils.get_or_insert_function(builder.module, kind, name)
    # A float32 of this size ends in its 128ths; 127 is the exponent's zero.
    shift = every(1.5 * 2.0**16 + 127, FLOATS)
    ends = ir.Constant(ir.VectorType(WORD, 2 * LANES), [2 * lane for lane in range(2 * LANES)])
    total = load(builder, totals, 0, FLOATS)
    for register in range(0, len(logits), 2):
        pair = [
            builder.bitcast(builder.fadd(x, shift), HALVES) for x in logits[register : register + 2]
        ]
        bits = builder.shuffle_vector(*pair, ends)
        less = builder.call(look_up, [low, builder.bitcast(bits, BYTES), high])
        less = builder.and_(builder.bitcast(less, HALVES), ir.Constant(HALVES, [255] * 2 * LANES))
        words = builder.bitcast(builder.sub(bits, less), WORDS)
        store(builder, words, out, 2 * register * LANES)
        for weight in _halves(builder, words):
            total = builder.fadd(total, weight)
    store(builder, total, totals, 0)


def weighed(rows: int, instruction: bool | None = None) -> Any:
    """What makes weights of `rows` rows' products with 64 columns, 2^(product - most), for compiled
    functions.

    Called as `products`, but with these addresses at the end: of the weights, bfloat16, and how
    many bytes their rows are apart; of (rows, 16) float32, to which every sixteenth weight is
    added; and of (rows, 2) float32: how many columns of a row count, where all others get 0, and
    its most.

    Args:
        instruction: as for `products`.
    """
    native = rounds_by_instruction() if instruction is None else instruction

    def typed(
        context: Any, a: Any, a_apart: Any, b: Any, b_apart: Any, steps: Any,
        out: Any, out_apart: Any, totals: Any, limits: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *told, out, out_apart, totals, limits = arguments
            none = every(0.0, FLOATS)
            sums = _multiplied(builder, rows, told, native)
            for row, to in enumerate(_apart(builder, out, out_apart, rows)):
                count, most = (
                    repeated(builder, load(builder, limits, 8 * row + place, FLOAT))
                    for place in (0, 4)
                )
                weights = []
                for register in range(REGISTERS):
                    x = builder.fsub(sums[row * REGISTERS + register], most)
                    x = _greater(builder, x, every(LEAST_POWER, FLOATS))
                    weight = _power_of_two(builder, x, native)
                    column = [float(register * LANES + lane) for lane in range(LANES)]
                    counts = builder.fcmp_ordered("<", ir.Constant(FLOATS, column), count)
                    weights.append(builder.select(counts, weight, none))
                total = builder.add(totals, ir.Constant(LONG, 4 * row * LANES))
                _write_weights(builder, weights, to, total, native)
            return context.get_dummy_value()

        return types.void(a, a_apart, b, b_apart, steps, out, out_apart, totals, limits), code

    return intrinsic(typed)


def weighed_tiles(
    rows: int, instruction: bool | None = None, by_look_up: bool | None = None
) -> Any:
    """As `weighed`, of several tiles, all of whose columns count, and no most; no product may be
    beyond 100.

    A tile's weights are made between the products of the next: they are computed by units that
    products leave idle, but no CPU looks so far ahead by itself.

    Called as `weighed`, but at the end with how many tiles there are, at least 1, and how many
    bytes their columns are apart; their weights are one behind the other. A total's lanes add up
    other columns than those of `weighed`.

    Args:
        instruction: as for `products`.
        by_look_up: make weights as CPUs with AVX512-VBMI can; None where the CPU is one.
    """
    native = rounds_by_instruction() if instruction is None else instruction
    looked_up = looks_up_bytes() if by_look_up is None else by_look_up

    def typed(
        context: Any, a: Any, a_apart: Any, b: Any, b_apart: Any, steps: Any,
        out: Any, out_apart: Any, totals: Any, tiles: Any, tiles_apart: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_apart, columns, step, steps, out, out_apart, totals, tiles, apart = arguments
            zero, one = ir.Constant(LONG, 0), ir.Constant(LONG, 1)
            starts = _apart(builder, a, a_apart, rows)
            waiting = cgutils.alloca_once(builder, FLOATS, size=rows * REGISTERS)
            waiting = builder.ptrtoint(waiting, LONG)
            sums = _begun(builder, rows)

            def multiply(tile: Any, first: Any, last: Any) -> None:
                here = builder.add(columns, builder.mul(tile, apart))
                _multiply(builder, starts, here, step, (first, last), sums, native)

            def wait() -> None:
                for place, room in enumerate(sums):
                    store(builder, builder.load(room), waiting, 4 * place * LANES)
                    builder.store(every(0.0, FLOATS), room)

            def weigh(row: int, tile: Any) -> None:
                to = builder.add(out, builder.mul(out_apart, ir.Constant(LONG, row)))
                to = builder.add(to, builder.mul(tile, ir.Constant(LONG, 2 * COLUMNS)))
                total = builder.add(totals, ir.Constant(LONG, 4 * row * LANES))
                logits = [
                    load(builder, waiting, 4 * (row * REGISTERS + register) * LANES, FLOATS)
                    for register in range(REGISTERS)
                ]
                if looked_up:
                    _look_up_weights(builder, logits, to, total)
                else:
                    weights = [_power_of_two(builder, x, native) for x in logits]
                    _write_weights(builder, weights, to, total, native)

            multiply(zero, zero, steps)
            wait()
            with cgutils.for_range(builder, tiles, start=one) as loop:
                last = zero
                for row in range(rows):
                    first, last = last, builder.mul(steps, ir.Constant(LONG, row + 1))
                    last = builder.sdiv(last, ir.Constant(LONG, rows))
                    multiply(loop.index, first, last)
                    weigh(row, builder.sub(loop.index, one))
                wait()
            for row in range(rows):
                weigh(row, builder.sub(tiles, one))
            return context.get_dummy_value()

        takes = a, a_apart, b, b_apart, steps, out, out_apart, totals, tiles, tiles_apart
        return types.void(*takes), code

    return intrinsic(typed)


def _summing(context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        name = "llvm.vector.reduce.fadd.v16f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        start = ir.Constant(FLOAT, -0.0)
        return builder.call(
            function, [start, load(builder, arguments[0], 0, FLOATS)], fastmath=("reassoc",)
        )

    return types.float32(address), code


lanes_sum: Any = intrinsic(_summing)
"""The sum of the 16 float32 at an address."""


def shared(instruction: bool | None = None) -> Any:
    """What gives 64 float32 times a factor as bfloat16, for compiled functions: called with the
    address of the numbers, the factor, and the address that is written.

    Args:
        instruction: as for `products`.
    """
    native = rounds_by_instruction() if instruction is None else instruction

    def typed(context: Any, numbers: Any, factor: Any, out: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, factor, out = arguments
            factors = repeated(builder, factor)
            for before in range(0, COLUMNS, LANES):
                number = builder.fmul(load(builder, numbers, 4 * before, FLOATS), factors)
                store(builder, narrowed(builder, number, native), out, 2 * before)
            return context.get_dummy_value()

        return types.void(numbers, types.float32, out), code

    return intrinsic(typed)


def gating(instruction: bool | None = None) -> Any:
    """What multiplies 64 float32 with the sigmoid linear unit of 64 others, for compiled functions:
    called with the address of these, where the results are written, and of the first.

    Args:
        instruction: as for `products`.
    """
    native = rounds_by_instruction() if instruction is None else instruction

    def typed(context: Any, opened: Any, raised: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            one, flat = every(1.0, FLOATS), every(FLAT, FLOATS)
            for offset in range(0, 4 * COLUMNS, 4 * LANES):
                x, factor = (load(builder, place, offset, FLOATS) for place in arguments)
                # What is no number stays none, and nothing overflows that need not: operations with
                # a flag of their own numba lets nobody reorder.
                below = builder.fcmp_ordered("<", x, flat, flags=("contract",))
                x = builder.select(below, flat, x)
                power = builder.fmul(x, every(-1 / math.log(2), FLOATS))
                power = _greater(builder, power, every(LEAST_POWER, FLOATS))
                power = builder.fadd(one, _power_of_two(builder, power, native))
                x = builder.fdiv(x, power, flags=("contract",))
                x = builder.fmul(x, factor, flags=("contract",))
                store(builder, x, arguments[0], offset)
            return context.get_dummy_value()

        return types.void(opened, raised), code

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

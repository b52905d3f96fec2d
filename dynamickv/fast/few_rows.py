"""Products of a few rows with weights that are codes of four or eight bits, compiled: torch's
threads share the outputs (see team). What is computed is float32, so that it differs from products
with the file's own weights by little more than float32 rounds (see codes.py)."""

# mypy: disable-error-code="attr-defined,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from dynamickv.fast.codes import FOUR, GROUP, Coded
from dynamickv.fast.kernels import (
    Array,
    compiled,
    exp_of,
    kept_on_disk,
    rounds_by_instruction,
)
from dynamickv.fast.microkernel import (
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    WORDS,
    ask_for,
    every,
    function_of,
    load,
    repeated,
    store,
)
from dynamickv.fast.team import floats_at, run, runtime, take

MADE_OF = "5222188d72c2"
"""Digest of the files that this is made of, see kernels.py."""
FOUR_BYTES, EIGHT_BYTES = LANES * (GROUP // 2 + 2 * 2), LANES * (GROUP + 3 * 2)
"""Of a group of 32 inputs to a block of 16 outputs: codes, and two or three float16."""
AHEAD = 2048
"""Bytes by which weights are asked for before they are read."""
EACH = 4
"""Blocks of outputs that a thread takes at a time."""
PLAIN, ADDED, GATED = 0, 1, 2
"""What becomes of products: they are written, added, or silu of the first half times the second."""
TOLD = 12
"""Numbers that say what the threads share, see `carry_out`."""


def block_products(rows: int, instruction: bool | None = None) -> Any:
    """What multiplies `rows` rows with a block of 16 outputs, for compiled functions.

    Called with addresses: of float32 rows and how many bytes they are apart; of the sums of their
    groups of 32, and how many bytes these rows are apart; of the block, as `Coded` lays it out, of
    how many bits, and how many groups it has; of where 16 float32 of every row are written, and how
    many bytes the rows there are apart.

    Args:
        instruction: look codes up as CPUs with AVX512 do it; None where the CPU is one.
    """
    native = rounds_by_instruction() if instruction is None else instruction

    def typed(
        context: Any, x: Any, x_apart: Any, sums: Any, sums_apart: Any,
        block: Any, bits: Any, groups: Any, out: Any, out_apart: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *told, bits, groups, out, out_apart = arguments
            totals = [cgutils.alloca_once(builder, FLOATS) for _ in range(rows)]
            for total in totals:
                builder.store(every(0.0, FLOATS), total)
            is_four = builder.icmp_signed("==", bits, ir.Constant(LONG, FOUR))
            with builder.if_else(is_four) as (four, eight):
                with four, cgutils.for_range(builder, groups) as loop:
                    _add_group(builder, told, loop.index, totals, True, native)
                with eight, cgutils.for_range(builder, groups) as loop:
                    _add_group(builder, told, loop.index, totals, False, native)
            for total in totals:
                store(builder, builder.load(total), out, 0)
                out = builder.add(out, out_apart)
            return context.get_dummy_value()

        taken = x, x_apart, sums, sums_apart, block, bits, groups, out, out_apart
        return types.void(*taken), code

    return intrinsic(typed)


def _add_group(
    builder: Any, told: Any, number: Any, totals: list[Any], four: bool, native: bool
) -> None:
    """Add to every row's total what a group of inputs gives."""
    x, x_apart, sums, sums_apart, block = told
    size = FOUR_BYTES if four else EIGHT_BYTES
    here = builder.add(block, builder.mul(number, ir.Constant(LONG, size)))
    for line in range(0, size, 64):
        ask_for(builder, here, AHEAD + line)
    fma = function_of(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS)
    x = builder.add(x, builder.mul(number, ir.Constant(LONG, 4 * GROUP)))
    sums = builder.add(sums, builder.mul(number, ir.Constant(LONG, 4)))
    starts = [x]
    for _ in totals[1:]:
        starts.append(builder.add(starts[-1], x_apart))
    # More than one sum of a single row: each waits for the one before. Halves have their own.
    chains = max(2, 4 // len(totals))
    added = [[every(0.0, FLOATS)] * chains for _ in totals]
    for place, codes in enumerate((_four_bits if four else _eight_bits)(builder, here, native)):
        half = place * 2 // GROUP
        for row, start in enumerate(starts):
            factor = repeated(builder, load(builder, start, 4 * place, FLOAT))
            chain = half + place * 2 % chains
            added[row][chain] = builder.call(fma, [codes, factor, added[row][chain]])
    numbers = 2 if four else 3
    *scales, least = (
        _halves(builder, here, size - 2 * LANES * (numbers - number), native)
        for number in range(numbers)
    )
    for total, parts in zip(totals, added, strict=True):
        inputs = repeated(builder, load(builder, sums, 0, FLOAT))
        sums = builder.add(sums, sums_apart)
        number = builder.call(fma, [least, inputs, builder.load(total)])
        first, second = (_sum(builder, parts[half::2]) for half in (0, 1))
        if four:
            first = builder.fadd(first, second)
        for scale, part in zip(scales, (first, second), strict=False):
            number = builder.call(fma, [scale, part, number])
        builder.store(number, total)


def _sum(builder: Any, numbers: Sequence[Any]) -> Any:
    """The code for a sum of registers."""
    total, *more = numbers
    for number in more:
        total = builder.fadd(total, number)
    return total


def _four_bits(builder: Any, here: Any, native: bool) -> Any:
    """The codes of each of a group's inputs, as floats."""
    look_up = function_of(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, WORDS)
    levels = ir.Constant(FLOATS, [float(level) for level in range(LANES)])
    for word in range(GROUP // 8):
        words = load(builder, here, 4 * LANES * word, WORDS)
        for place in range(8):
            shifted = builder.lshr(words, every(FOUR * place, WORDS)) if place else words
            if native:
                # It looks at the lowest four bits alone.
                yield builder.call(look_up, [levels, shifted])
            else:
                yield builder.sitofp(builder.and_(shifted, every(15, WORDS)), FLOATS)


def _eight_bits(builder: Any, here: Any, native: bool) -> Any:
    """As `_four_bits`."""
    kind = ir.VectorType(ir.IntType(8), LANES)
    for place in range(GROUP):
        codes = load(builder, here, LANES * place, kind)
        yield builder.sitofp(builder.sext(codes, WORDS), FLOATS)


def _halves(builder: Any, here: Any, offset: int, native: bool) -> Any:
    """16 float16 as float32."""
    if native:
        kind = ir.VectorType(ir.HalfType(), LANES)
        return builder.fpext(load(builder, here, offset, kind), FLOATS)
    # Of other CPUs LLVM would call a function that need not be there.
    bits = builder.zext(load(builder, here, offset, ir.VectorType(ir.IntType(16), LANES)), WORDS)
    number = builder.shl(builder.and_(bits, every(0x7FFF, WORDS)), every(13, WORDS))
    sign = builder.shl(builder.and_(bits, every(0x8000, WORDS)), every(16, WORDS))
    # The exponent of float32 is 112 more.
    grown = builder.fmul(builder.bitcast(number, FLOATS), every(2.0**112, FLOATS))
    return builder.bitcast(builder.or_(builder.bitcast(grown, WORDS), sign), FLOATS)


_one, _two, _four = (block_products(rows) for rows in (1, 2, 4))


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def _multiply_block(
    rows: Any, size: Any, x: Any, sums: Any, block: Any, bits: Any, out: Any, apart: Any
) -> None:
    """A block of outputs of all rows, four at a time."""
    groups = size // GROUP
    wide, narrow = 4 * size, 4 * groups
    left = rows
    while left >= 4:
        _four(x, wide, sums, narrow, block, bits, groups, out, apart)
        x, sums, out, left = x + 4 * wide, sums + 4 * narrow, out + 4 * apart, left - 4
    if left >= 2:
        _two(x, wide, sums, narrow, block, bits, groups, out, apart)
        x, sums, out, left = x + 2 * wide, sums + 2 * narrow, out + 2 * apart, left - 2
    if left == 1:
        _one(x, wide, sums, narrow, block, bits, groups, out, apart)


@compiled("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def _finish_block(
    kind: Any, rows: Any, own_at: Any, own_apart: Any, other_at: Any, bias: Any, goal_at: Any,
    goal_apart: Any,
) -> None:  # fmt: skip
    """What becomes of a block's products, `other_at` the second half's."""
    for row in range(rows):
        own = carray(floats_at(own_at + own_apart * row), (LANES,))
        goal = carray(floats_at(goal_at + goal_apart * row), (LANES,))
        if bias != 0:
            more = carray(floats_at(bias), (LANES,))
            for i in range(LANES):
                own[i] += more[i]
        if kind == ADDED:
            for i in range(LANES):
                goal[i] += own[i]
        if kind == GATED:
            raised = carray(floats_at(other_at + own_apart * row), (LANES,))
            for i in range(LANES):
                silu = own[i] / (np.float32(1) + exp_of(min(-own[i], np.float32(80))))
                goal[i] = silu * raised[i]


@kept_on_disk(cfunc, "void(CPointer(int64))")
def _share(address: Any) -> None:
    """One thread's share: blocks of what `carry_out` is told, as long as there are any."""
    told = carray(address, (TOLD,))
    kind, rows, size, items = told[1], told[2], told[3], told[4]
    x, sums, data, bits, bias = told[5], told[6], told[7], told[8], told[9]
    products, out = told[10], told[11]
    step = (FOUR_BYTES if bits == FOUR else EIGHT_BYTES) * (size // GROUP)
    goal_apart = 4 * LANES * items
    apart = goal_apart * 2 if kind == GATED else goal_apart
    first = take(address) * EACH
    while first < items:
        for item in range(first, min(first + EACH, items)):
            at = 4 * LANES * item
            own, other = products + at, products + goal_apart + at
            _multiply_block(rows, size, x, sums, data + step * item, bits, own, apart)
            if kind == GATED:
                second = data + step * (items + item)
                _multiply_block(rows, size, x, sums, second, bits, other, apart)
            if kind != PLAIN or bias != 0:
                more = bias + at if bias != 0 else 0
                _finish_block(kind, rows, own, apart, other, more, out + at, goal_apart)
        first = take(address) * EACH


WORK: int = _share.address
"""Of the function that threads share."""


@compiled("void(int64[::1], int64, int64, int64)")
def carry_out(told: Array, work: Any, runtime: Any, threads: Any) -> None:
    """Multiply.

    Args:
        told: what the threads share: a counter that is 0, what becomes of the products, rows,
            inputs, blocks of outputs that are written, and addresses: of the rows, (rows, inputs)
            float32; of room for the sums of their groups; of the weights, followed by their bits;
            of the bias, or 0; of room for (rows, outputs) products; of what is written, (rows, 16 *
            blocks). The last two are one where products are only written.
        work: `WORK`; runtime and threads as for `team.run`.
    """
    rows, size = told[2], told[3]
    x = carray(floats_at(told[5]), (rows, size // GROUP, GROUP))
    sums = carray(floats_at(told[6]), (rows, size // GROUP))
    for row in range(rows):
        for group in range(size // GROUP):
            total = np.float32(0)
            for i in range(GROUP):
                total += x[row, group, i]
            sums[row, group] = total
    run(runtime, work, np.int64(told.ctypes.data), threads)


def multiply(x: Tensor, weight: Coded, bias: Tensor | None = None) -> Tensor:
    """Rows times a matrix, (rows, outputs) float32.

    Args:
        x: (rows, inputs) float32.
        bias: (outputs,) float32.

    Raises:
        TypeError: other numbers.
        ValueError: a shape that does not fit.
    """
    return _carried_out(x, weight, PLAIN, bias)


def gated(x: Tensor, weight: Coded) -> Tensor:
    """silu of the first half of the outputs times the second half, (rows, outputs // 2) float32, as
    `multiply`; the outputs must be a multiple of 32."""
    return _carried_out(x, weight, GATED, None)


def _carried_out(x: Tensor, weight: Coded, kind: int, bias: Tensor | None) -> Tensor:
    rows, size = x.shape
    outputs = weight.outputs // 2 if kind == GATED else weight.outputs
    # The threads are told addresses alone.
    for one in (x,) if bias is None else (x, bias):
        if one.dtype != torch.float32:
            raise TypeError(f"rows and bias must be float32, got {one.dtype}")
    if size != weight.inputs or outputs % LANES:
        raise ValueError(
            f"{tuple(x.shape)} does not fit ({weight.outputs}, {weight.inputs}), or its halves"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"a bias {tuple(bias.shape)} does not fit {outputs} outputs")
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    out, sums = torch.empty(rows, outputs), torch.empty(rows, size // GROUP)
    products = out if kind == PLAIN else torch.empty(rows, weight.outputs)
    told = [
        0, kind, rows, size, outputs // LANES, x.data_ptr(), sums.data_ptr(),
        weight.data.data_ptr(), weight.bits, 0 if bias is None else bias.data_ptr(),
        products.data_ptr(), out.data_ptr(),
    ]  # fmt: skip
    carry_out(np.array(told, np.int64), WORK, *runtime())
    return out

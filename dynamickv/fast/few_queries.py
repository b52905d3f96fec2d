"""The microkernel of a token's attention: what a few queries that read one head make of its keys
and values, in registers. Keys and values are float32 or bfloat16, everything else is float32."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dynamickv.fast.microkernel import (
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    WORD,
    WORDS,
    ask_for,
    every,
    function_of,
    load,
    repeated,
    store,
)

MOST = 4
"""Queries at a time."""
QUAD = 4
"""Keys whose products are in registers at a time, of 16."""
AHEAD = 64
"""Positions by which keys and values are asked for before they are read: the processor's own
guesses leave a third of the memory's speed unused."""


def _wide(builder: Any, address: Any, narrow: bool) -> Any:
    """16 float32 from an address of as many numbers."""
    if not narrow:
        return load(builder, address, 0, FLOATS)
    bits = load(builder, address, 0, ir.VectorType(ir.IntType(16), LANES))
    words = builder.shl(builder.zext(bits, WORDS), every(16, WORDS))
    return builder.bitcast(words, FLOATS)


def _apart(builder: Any, start: Any, apart: Any, count: int) -> list[Any]:
    """Addresses as many bytes apart."""
    places = [start]
    for _ in range(1, count):
        places.append(builder.add(places[-1], apart))
    return places


def _folded(builder: Any, four: Sequence[Any], unit: int) -> Any:
    """Of four registers, in which every `4 * unit` lanes are four units, the sums of these units,
    side by side."""
    a, b, c, d = four
    one, other = (_halved(builder, *pair, unit, ((0, 1), (2, 3))) for pair in ((a, b), (c, d)))
    return _halved(builder, one, other, unit, ((0, 2), (1, 3)))


def _halved(
    builder: Any, one: Any, other: Any, unit: int, sides: tuple[tuple[int, int], tuple[int, int]]
) -> Any:
    """The sum of what two registers have of either side, each one's two units side by side: in
    every four places one instruction picks a side."""
    picked = []
    for side in sides:
        lanes = [
            register + first + place * unit + lane
            for first in range(0, LANES, 4 * unit)
            for register in (0, LANES)
            for place in side
            for lane in range(unit)
        ]
        mask = ir.Constant(ir.VectorType(WORD, LANES), lanes)
        picked.append(builder.shuffle_vector(one, other, mask))
    return builder.fadd(*picked)


def dots(queries: int) -> Any:
    """What multiplies queries with 16 keys, for compiled functions.

    Called with addresses: of the queries, float32, and how many bytes they are apart; of the keys
    and how many bytes they are apart; of where each query's 16 logits are written and how many
    bytes these are apart; how many registers a query fills; the factor on every product; and one of
    the keys' numbers, for its format, uint16 for bfloat16.
    """

    def typed(
        context: Any, query: Any, query_apart: Any, keys: Any, keys_apart: Any,
        out: Any, out_apart: Any, registers: Any, scaling: Any, like: Any,
    ) -> Any:  # fmt: skip
        narrow = like != types.float32

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, query_apart, keys, keys_apart, out, out_apart, registers, scaling, _ = arguments
            fma = function_of(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS)
            asking = _apart(builder, query, query_apart, queries)
            ahead = builder.mul(keys_apart, ir.Constant(LONG, AHEAD))
            quads = LANES // QUAD
            # Folded once, four by four: one register for every query and quad.
            halfway = cgutils.alloca_once(builder, FLOATS, queries * quads)
            with cgutils.for_range(builder, ir.Constant(LONG, quads)) as quad:
                first = builder.mul(keys_apart, ir.Constant(LONG, QUAD))
                first = builder.add(keys, builder.mul(first, quad.index))
                asked = _apart(builder, first, keys_apart, QUAD)
                sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(queries * QUAD)]
                for room in sums:
                    builder.store(every(0.0, FLOATS), room)
                with cgutils.for_range(builder, registers) as loop:
                    size = 2 if narrow else 4
                    offset = builder.mul(loop.index, ir.Constant(LONG, size * LANES))
                    held = [builder.add(one, offset) for one in asked]
                    for one in held:
                        ask_for(builder, builder.add(one, ahead), 0)
                    numbers = [_wide(builder, one, narrow) for one in held]
                    offset = builder.mul(loop.index, ir.Constant(LONG, 4 * LANES))
                    for number, start in enumerate(asking):
                        own = load(builder, builder.add(start, offset), 0, FLOATS)
                        for key, other in enumerate(numbers):
                            room = sums[number * QUAD + key]
                            builder.store(builder.call(fma, [own, other, builder.load(room)]), room)
                for number in range(queries):
                    four = [builder.load(sums[number * QUAD + key]) for key in range(QUAD)]
                    place = builder.add(quad.index, ir.Constant(LONG, number * quads))
                    builder.store(_folded(builder, four, 1), builder.gep(halfway, [place]))
            factor = repeated(builder, scaling)
            for number in range(queries):
                places = [ir.Constant(LONG, number * quads + quad) for quad in range(quads)]
                four = [builder.load(builder.gep(halfway, [place])) for place in places]
                store(builder, builder.fmul(_folded(builder, four, QUAD), factor), out, 0)
                out = builder.add(out, out_apart)
            return context.get_dummy_value()

        taken = query, query_apart, keys, keys_apart, out, out_apart, registers, scaling, like
        return types.void(*taken), code

    return intrinsic(typed)


def sums(queries: int, registers: int) -> Any:
    """What adds values by weights, for compiled functions.

    Called with addresses: of the weights, float32, and how many bytes those of the queries are
    apart; of the values, how many bytes they are apart and how many there are; of what is added to,
    16 * `registers` float32 for each query, and how many bytes these are apart; and one of the
    values' numbers, for its format.
    """

    def typed(
        context: Any, weights: Any, weights_apart: Any, values: Any, values_apart: Any,
        count: Any, out: Any, out_apart: Any, like: Any,
    ) -> Any:  # fmt: skip
        narrow = like != types.float32

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, weights_apart, values, values_apart, count, out, out_apart, _ = arguments
            fma = function_of(builder, "llvm.fma.v16f32", FLOATS, FLOATS, FLOATS)
            weighing = _apart(builder, weights, weights_apart, queries)
            goals = _apart(builder, out, out_apart, queries)
            offsets = [4 * LANES * register for register in range(registers)]
            rooms = [cgutils.alloca_once(builder, FLOATS) for _ in goals for _ in offsets]
            places = [(goal, offset) for goal in goals for offset in offsets]
            for room, (goal, offset) in zip(rooms, places, strict=True):
                builder.store(load(builder, goal, offset, FLOATS), room)
            ahead = builder.mul(values_apart, ir.Constant(LONG, AHEAD))
            with cgutils.for_range(builder, count) as loop:
                here = builder.add(values, builder.mul(loop.index, values_apart))
                size = (2 if narrow else 4) * LANES
                for line in range(0, size * registers, 64):
                    ask_for(builder, builder.add(here, ahead), line)
                numbers = [
                    _wide(builder, builder.add(here, ir.Constant(LONG, size * register)), narrow)
                    for register in range(registers)
                ]
                offset = builder.mul(loop.index, ir.Constant(LONG, 4))
                for query, start in enumerate(weighing):
                    weight = load(builder, builder.add(start, offset), 0, FLOAT)
                    factor = repeated(builder, weight)
                    for register, number in enumerate(numbers):
                        room = rooms[query * registers + register]
                        builder.store(builder.call(fma, [factor, number, builder.load(room)]), room)
            for room, (goal, offset) in zip(rooms, places, strict=True):
                store(builder, builder.load(room), goal, offset)
            return context.get_dummy_value()

        taken = weights, weights_apart, values, values_apart, count, out, out_apart, like
        return types.void(*taken), code

    return intrinsic(typed)

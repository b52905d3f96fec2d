"""The Triton kernels of one decode step, for vectors of a single token.

A decode step reads every weight once and does little else, so each kernel does all it can on the
way: a projection adds its residual, gate and up projections meet in registers, rotation writes
straight into the cache. Intermediate results are rounded where the plain model rounds them, so
that only the order of sums tells them apart. triton_ops.py launches them.
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(x, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """RMS normalization of a vector of SIZE; one program."""
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    normal = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (normal * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dot_rows(x, start, valid, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of SIZE weights, at (ROWS,) pointers, times a vector: (ROWS,) float32."""
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < SIZE
        part = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        rows = tl.load(
            start[:, None] + at[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += rows.to(tl.float32) * part[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def project_kernel(
    x,
    out,
    residual,
    weight0,
    weight1,
    weight2,
    bias0,
    bias1,
    bias2,
    end0,
    end1,
    end2,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Up to three matrices, one below the other, times a vector; a program per ROWS rows."""
    first = tl.program_id(0) * ROWS
    weight, bias, offset = weight0, bias0, 0
    if first >= end0:
        weight, bias, offset = weight1, bias1, end0
    if first >= end1:
        weight, bias, offset = weight2, bias2, end1
    at = first + tl.arange(0, ROWS)
    valid = at < end2
    row = at - offset
    total = _dot_rows(x, weight + row.to(tl.int64) * SIZE, valid, SIZE, ROWS, BLOCK)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=valid, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    if HAS_RESIDUAL:
        before = tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        total = (before + total.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + at, total, mask=valid)


@triton.jit
def gate_kernel(
    x, out, gate, up, rows, SIZE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """SiLU of one matrix's product, times another's; a program per PAIRS rows of both."""
    # A gate's row and its up projection's, by turns.
    place = tl.arange(0, 2 * PAIRS)
    row = tl.program_id(0) * PAIRS + place // 2
    offset = row.to(tl.int64) * SIZE
    start = tl.where(place % 2 == 0, gate + offset, up + offset)
    total = _dot_rows(x, start, row < rows, SIZE, 2 * PAIRS, BLOCK)
    number = out.dtype.element_ty
    opened, raised = tl.split(tl.reshape(total.to(number).to(tl.float32), (PAIRS, 2)))
    opened = (opened / (1.0 + tl.exp(-opened))).to(number).to(tl.float32)
    row = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    tl.store(out + row, (opened * raised).to(number), mask=row < rows)


@triton.jit
def place_kernel(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    query,
    keys,
    values,
    slot,
    stride,
    eps,
    HAS_NORM: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize and rotate a query, or write a key or a value to its slot; a program per head."""
    head = tl.program_id(0)
    number = query.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    mine = qkv + head * DIM
    slot_at = tl.load(slot).to(tl.int64) * DIM
    if head >= QUERY_HEADS + KV_HEADS:
        value = tl.load(mine + at, mask=inside)
        for copy in range(REPEAT):
            stored = (head - QUERY_HEADS - KV_HEADS) * REPEAT + copy
            tl.store(values + stored.to(tl.int64) * stride + slot_at + at, value, mask=inside)
    else:
        partner = tl.where(at < DIM // 2, at + DIM // 2, at - DIM // 2)
        near = tl.load(mine + at, mask=inside, other=0.0).to(tl.float32)
        far = tl.load(mine + partner, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            factors = query_norm
            if head >= QUERY_HEADS:
                factors = key_norm
            scale = tl.rsqrt(tl.sum(near * near, axis=0) / DIM + eps)
            near = (near * scale).to(number).to(tl.float32)
            far = (far * scale).to(number).to(tl.float32)
            near *= tl.load(factors + at, mask=inside, other=0.0).to(tl.float32)
            far *= tl.load(factors + partner, mask=inside, other=0.0).to(tl.float32)
            near = near.to(number).to(tl.float32)
            far = far.to(number).to(tl.float32)
        far = tl.where(at < DIM // 2, -far, far)
        straight = near * tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        across = far * tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        turned = straight.to(number).to(tl.float32) + across.to(number).to(tl.float32)
        if head < QUERY_HEADS:
            tl.store(query + head * DIM + at, turned.to(number), mask=inside)
        else:
            for copy in range(REPEAT):
                stored = (head - QUERY_HEADS) * REPEAT + copy
                row = keys + stored.to(tl.int64) * stride + slot_at
                tl.store(row + at, turned.to(number), mask=inside)


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    slot,
    sums,
    tops,
    weights,
    stride,
    factor,
    chunk,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A share of one stored head's keys, for its GROUP queries: weighted values, the highest logit
    and the weights' sum."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    length = tl.load(slot).to(tl.int32) + 1
    first = split * chunk
    end = tl.minimum(first + chunk, length)
    row = tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    wide = at < DIM
    own = row < GROUP
    mine = tl.load(
        query + (head * GROUP + row)[:, None] * DIM + at[None, :],
        mask=own[:, None] & wide[None, :],
        other=0.0,
    )
    base = head.to(tl.int64) * stride
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(first, end, KEYS):
        position = start + tl.arange(0, KEYS)
        held = position < end
        place = base + position[:, None] * DIM + at[None, :]
        mask = held[:, None] & wide[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0)
        value = tl.load(values + place, mask=mask, other=0.0)
        logits = tl.dot(mine, tl.trans(key), input_precision="ieee") * factor
        logits = tl.where(held[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        fade = tl.exp2(top - higher)
        share = tl.exp2(logits - higher[:, None])
        weight = weight * fade + tl.sum(share, axis=1)
        total = total * fade[:, None]
        total += tl.dot(share.to(value.dtype), value, input_precision="ieee")
        top = higher
    place = (head * GROUP + row) * splits + split
    tl.store(tops + place, top, mask=own)
    tl.store(weights + place, weight, mask=own)
    tl.store(sums + place[:, None] * DIM + at[None, :], total, mask=own[:, None] & wide[None, :])


@triton.jit
def join_kernel(
    sums, tops, weights, out, splits, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):
    """The shares of one query head become its output."""
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    at = tl.arange(0, BLOCK)
    exists = split < splits
    wide = at < DIM
    place = head * splits + split
    top = tl.load(tops + place, mask=exists, other=float("-inf"))
    fade = tl.exp2(top - tl.max(top, axis=0))
    weight = tl.sum(tl.load(weights + place, mask=exists, other=0.0) * fade, axis=0)
    parts = tl.load(
        sums + place[:, None] * DIM + at[None, :],
        mask=exists[:, None] & wide[None, :],
        other=0.0,
    )
    total = tl.sum(parts * fade[:, None], axis=0) / weight
    tl.store(out + head * DIM + at, total.to(out.dtype.element_ty), mask=wide)

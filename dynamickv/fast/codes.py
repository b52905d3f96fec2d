"""Weights as the numbers of few bits that a GGUF file gave them, found again in what was read from
it, and laid out for products with a few rows (see few_rows). Knows no models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16
"""Outputs of a block: numbers in a register."""
GROUP = 32
"""Neighbouring weights of a row that share a scale and a least weight: GGUF's blocks."""
HALF = GROUP // 2
"""Of them, those that share a scale in Q6_K."""
FOUR, EIGHT = 4, 8
"""Bits that a weight takes here."""
SAMPLE, TOGETHER = 64, 2**16
"""Groups that tell most formats apart, and those that are looked at while they are in the cache."""
OFF_LEVEL = 1 / 64
"""How far from a level, in steps, a weight that had a code can lie: float32 rounds little."""
OFF_SCALE = 2.0**-11
"""How far, as a part of itself, a float16 lies from a number that it can hold."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix as codes: weight = code * scale + least."""

    data: Tensor
    """(outputs // 16, inputs // 32, bytes) uint8: of a group of 16 outputs the codes, then as
    float16 the scales and the least weights. Four bits lie as (4, 16) words of eight inputs, the
    first lowest; eight, with a sign, as (32, 16) bytes, and there the scales of the group's first
    half come before those of its second."""
    bits: int
    outputs: int
    inputs: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.nbytes


def coded(*weights: Tensor) -> Coded | None:
    """Float32 matrices of one input, (outputs, inputs) each, as one in the codes that they were
    computed from, where they were; each on its own, so that formats may be mixed.

    GGUF's formats of four and five bits give every block of 32 weights in a row 16 or 32 levels at
    most, equally far from each other, Q8_0 127 on each side of 0, Q6_K 32 for every 16 weights; so
    they can be found again.

    Returns:
        None where weights have other levels, or a shape is no multiple of a block.
    """
    parts = []
    for weight in weights:
        outputs, inputs = weight.shape
        whole = outputs % LANES == 0 and inputs % GROUP == 0 and weight.dtype == torch.float32
        found = _found(weight.reshape(-1, GROUP)) if whole else None
        if found is None:
            return None
        parts.append(found)
    bits = max(part.bits for part in parts)
    outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
    data = [_laid_out(part, bits, len(own)) for part, own in zip(parts, weights, strict=True)]
    return Coded(data[0] if len(data) == 1 else torch.cat(data), bits, outputs, inputs)


class _Levels(NamedTuple):
    """Codes, (groups, size) int32, and scales and least weights, (groups, 1), of groups."""

    codes: Tensor
    scale: Tensor
    least: Tensor


class _Found(NamedTuple):
    """Codes, (groups, 32) int8, scales of both halves, (groups, 2), least weights, (groups, 1), and
    bits of a code."""

    codes: Tensor
    scales: Tensor
    least: Tensor
    bits: int


def _found(groups: Tensor) -> _Found | None:
    """The codes of (groups, 32) weights."""
    for bits, size, find in (
        (FOUR, GROUP, partial(_between, steps=15)),  # Q4_0, Q4_1, Q4_K
        (EIGHT, GROUP, partial(_around, most=127, fewest=127)),  # Q8_0
        (EIGHT, GROUP, partial(_around, most=16, fewest=16)),  # Q5_0
        (EIGHT, HALF, partial(_around, most=32, fewest=1)),  # Q6_K
        (EIGHT, GROUP, partial(_between, steps=31)),  # Q5_1, Q5_K
    ):
        if find(groups[:SAMPLE].reshape(-1, size)) is None:
            continue
        parts = []
        for some in torch.split(groups, TOGETHER):
            levels = find(some.reshape(-1, size))
            if levels is None or not _fit(levels):
                break
            scales = levels.scale.view(-1, GROUP // size).expand(-1, 2)
            least = levels.least.view(-1, GROUP // size)[:, :1]
            parts.append((levels.codes.view(-1, GROUP).to(torch.int8), scales, least))
        else:
            codes, scales, least = (torch.cat(part) for part in zip(*parts, strict=True))
            return _Found(codes, scales, least, bits)
    return None


def _between(groups: Tensor, steps: int) -> _Levels | None:
    """Codes from 0 to `steps`; None where a group has no such levels."""
    least, most = torch.aminmax(groups, dim=-1, keepdim=True)
    # Nearly every group uses the first or the last level, and most of them both.
    found = _first_fit(groups, least, most - least, range(steps, 0, -1))
    if found is None:
        return None
    codes, scale = found
    # Q4_0 has a float16 at one end alone, from which it counts.
    turn = _rounded(most) < _rounded(least)
    reach = ((most - least) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    codes = torch.where(turn, reach.to(torch.int32) - codes, codes)
    return _Levels(codes, torch.where(turn, -scale, scale), torch.where(turn, most, least))


def _around(groups: Tensor, most: int, fewest: int) -> _Levels | None:
    """Codes around 0; the farthest of every group is from `fewest` to `most` steps away."""
    reach = groups.abs().amax(dim=-1, keepdim=True)
    zero = torch.zeros_like(reach)
    found = _first_fit(groups, zero, reach, range(most, fewest - 1, -1))
    return None if found is None else _Levels(*found, zero)


def _first_fit(
    groups: Tensor, start: Tensor, reach: Tensor, counts: range
) -> tuple[Tensor, Tensor] | None:
    """Codes and scales for the first of these numbers of steps across a group's reach that puts all
    its weights on a level."""
    scale = reach / counts[0]
    codes, on = _nearest(groups, start, scale)
    left = (~on).nonzero()[:, 0]
    for count in counts[1:]:
        if len(left) == 0:
            break
        size = reach[left] / count
        near, on = _nearest(groups[left], start[left], size)
        codes[left[on]], scale[left[on]] = near[on], size[on]
        left = left[~on]
    return None if len(left) else (codes, scale)


def _nearest(groups: Tensor, start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Each weight's nearest level, int32, and for each group whether all weights lie on theirs."""
    places = (groups - start).div_(size.clamp_min(torch.finfo(torch.float32).tiny))
    near = places.round()
    off = places.sub_(near).abs_().amax(dim=-1)
    return near.to(torch.int32), off <= OFF_LEVEL


def _rounded(numbers: Tensor) -> Tensor:
    """How far the nearest float16 are."""
    return (numbers.half().float() - numbers).abs()


def _fit(levels: _Levels) -> bool:
    """Whether float16 holds scales and least weights, as it does in the file: least weights to
    within what it rounds of a scale."""
    scale, least = levels.scale.abs(), levels.least.abs()
    on = _rounded(scale) <= OFF_SCALE * scale
    on &= _rounded(least) <= OFF_SCALE * torch.maximum(scale, least)
    return bool(on.all())


def _laid_out(found: _Found, bits: int, outputs: int) -> Tensor:
    """`Coded.data` of as many bits."""
    blocks = outputs // LANES
    codes = found.codes.view(blocks, LANES, -1, GROUP)
    if bits == FOUR:
        # Two in a byte, the first lowest, and so eight in a word.
        pairs = codes.view(torch.uint8).view(blocks, LANES, -1, GROUP // 2, 2)
        words = (pairs[..., 0] | pairs[..., 1] << FOUR).view(torch.int32)
        packed = words.permute(0, 2, 3, 1).contiguous()
        scales = found.scales[:, :1]
    else:
        packed = codes.permute(0, 2, 3, 1).contiguous()
        scales = found.scales
    # (blocks, lanes, groups, 2 or 3) as (blocks, groups, 2 or 3, lanes).
    numbers = (
        torch.cat([scales, found.least], dim=-1).half().view(blocks, LANES, -1, 1 + scales.shape[1])
    )
    numbers = numbers.permute(0, 2, 3, 1).contiguous()
    parts = [
        part.view(torch.uint8).view(blocks, numbers.shape[1], -1) for part in (packed, numbers)
    ]
    return torch.cat(parts, dim=-1)

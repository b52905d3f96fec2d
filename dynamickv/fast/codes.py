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
FOUR, EIGHT = 4, 8
"""Bits that a weight takes here."""
BETWEEN = {FOUR: 15, EIGHT: 31}
"""Steps between the least and the greatest code of Q4_0, Q4_1 and Q4_K, and of Q5_1 and Q5_K."""
AROUND = 127, 16
"""Steps from 0 to the weight of a block that is farthest from it, of Q8_0 and of Q5_0."""
SAMPLE = 64
"""Groups that tell most other formats apart."""
OFF_LEVEL = 1 / 64
"""How far from a level, in steps, a weight that had a code can lie: float32 rounds little."""
OFF_SCALE = 2.0**-11
"""How far, as a part of itself, a float16 lies from a number that it can hold."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix as codes: weight = code * scale + least."""

    data: Tensor
    """(outputs // 16, inputs // 32, bytes) uint8: of a group of 16 outputs the codes, then the
    scales and the least weights as float16. Four bits lie as (4, 16) words of eight inputs, the
    first lowest; eight, with a sign, as (32, 16) bytes."""
    bits: int
    outputs: int
    inputs: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.nbytes


def coded(*weights: Tensor) -> Coded | None:
    """Float32 matrices of one input, (outputs, inputs) each, as one in the codes that they were
    computed from, where they were.

    Q4_0, Q4_1 and Q4_K give every block of 32 weights in a row sixteen levels at most, equally far
    from each other, the formats of five bits thirty-two, Q8_0 127 on each side of 0; so they can be
    found again. Of Q6_K, whose blocks have sixteen weights, they are not.

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


class _Found(NamedTuple):
    """Codes, (groups, 32) int32, scales and least weights, (groups, 1), and bits of a code."""

    codes: Tensor
    scale: Tensor
    least: Tensor
    bits: int


def _found(groups: Tensor) -> _Found | None:
    """The codes of (groups, 32) weights."""
    around = [(EIGHT, partial(_around, steps=steps)) for steps in AROUND]
    four, eight = ((bits, partial(_between, steps=steps)) for bits, steps in BETWEEN.items())
    for bits, find in (four, *around, eight):
        if find(groups[:SAMPLE]) is None:
            continue
        found = find(groups)
        if found is not None and all(_fits(part) for part in found[1:]):
            return _Found(*found, bits)
    return None


def _between(groups: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes from 0 to `steps`, (groups, 32) int32, scale and least weight of every group, (groups,
    1); None where a group has no such levels."""
    least, most = torch.aminmax(groups, dim=-1, keepdim=True)
    scale = (most - least) / steps
    codes, on = _nearest(groups, least, scale)
    left = (~on).nonzero()[:, 0]
    # Nearly every group uses the first or the last level, and most of them both.
    for fewer in range(steps - 1, 0, -1):
        if len(left) == 0:
            break
        size = (most[left] - least[left]) / fewer
        near, on = _nearest(groups[left], least[left], size)
        codes[left[on]], scale[left[on]] = near[on], size[on]
        left = left[~on]
    return None if len(left) else (codes, scale, least)


def _around(groups: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `_between`, for codes from -steps to steps."""
    scale = groups.abs().amax(dim=-1, keepdim=True) / steps
    codes, on = _nearest(groups, torch.zeros_like(scale), scale)
    return (codes, scale, torch.zeros_like(scale)) if bool(on.all()) else None


def _nearest(groups: Tensor, least: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Each weight's nearest level, int32, and for each group whether all weights lie on theirs."""
    places = (groups - least).div_(size.clamp_min(torch.finfo(torch.float32).tiny))
    near = places.round()
    off = places.sub_(near).abs_().amax(dim=-1)
    return near.to(torch.int32), off <= OFF_LEVEL


def _fits(numbers: Tensor) -> bool:
    """Whether float16 holds them, as it does in the file."""
    off = (numbers.half().float() - numbers).abs() > OFF_SCALE * numbers.abs()
    return not bool(off.any())


def _laid_out(found: _Found, bits: int, outputs: int) -> Tensor:
    """`Coded.data` of as many bits."""
    codes, scale, least, _ = found
    blocks = outputs // LANES
    scales = torch.stack([scale.view(outputs, -1), least.view(outputs, -1)])
    # (2, blocks, lanes, groups) as (blocks, groups, 2, lanes).
    scales = scales.half().view(2, blocks, LANES, -1).permute(1, 3, 0, 2).contiguous()
    if bits == FOUR:
        words = codes.view(blocks, LANES, -1, GROUP // 8, 8)
        shifts = torch.arange(0, 32, FOUR, dtype=torch.int32)
        packed = (words << shifts).sum(-1, dtype=torch.int32)
    else:
        packed = codes.view(blocks, LANES, -1, GROUP).to(torch.int8)
    packed = packed.permute(0, 2, 3, 1).contiguous()
    parts = [part.view(torch.uint8).view(blocks, scales.shape[1], -1) for part in (packed, scales)]
    return torch.cat(parts, dim=-1)

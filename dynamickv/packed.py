"""Weights of linear layers in the forms that a CPU multiplies fastest: bfloat16 in oneDNN's own
order for many rows, and for a few rows the four bits that a GGUF file gave each weight, where it
did. Products round as bfloat16 products do, with sums in float32. Knows no models and no tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynamickv.blockwise import causal_attention

GROUP = 32
"""Neighbouring weights that share a scale and a zero: GGUF's blocks, and the least torch takes."""
FEW_ROWS = 4
"""Rows up to which four-bit weights take less time than bfloat16 ones."""
LEVELS = 15
"""Steps between the least and the greatest four-bit number."""
OFF_LEVEL = 1 / 64
"""How far from a level, in steps, a weight that had four bits can lie: float32 rounds little."""


def has_fast_products() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, and torch's oneDNN makes use of
    it."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpu: Any = torch.cpu
    instructions = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    usable = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(known and instructions and usable)


class PackedWeights:
    """A model's linear layers, packed as they are needed; the copies last as long as this does."""

    def __init__(self, model: nn.Module) -> None:
        self._linears = {
            module.weight: module for module in model.modules() if type(module) is nn.Linear
        }
        self._wide: dict[tuple[nn.Linear, ...], Tensor] = {}
        self._narrow: dict[tuple[nn.Linear, ...], tuple[Tensor, Tensor] | None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all copies made so far."""
        wide = sum(2 * sum(one.weight.numel() for one in linears) for linears in self._wide)
        return wide + sum(
            codes.nbytes + scales.nbytes for codes, scales in filter(None, self._narrow.values())
        )

    def named(self, weight: Tensor) -> nn.Linear | None:
        """The layer that a weight belongs to."""
        return self._linears.get(weight)

    def product(self, x: Tensor, *linears: nn.Linear) -> Tensor:
        """Projections of one input, (rows, size), in one product, (rows, all outputs): bfloat16, or
        float32 with a bias, which is added unrounded."""
        x = x.to(torch.bfloat16)
        narrow = self._four_bits(linears) if len(x) <= FEW_ROWS else None
        if narrow is None:
            out = multiply(x, self.wide(*linears))
        else:
            codes, scales = narrow
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scales)
        if all(one.bias is None for one in linears):
            return out
        biases = [
            out.new_zeros(len(one.weight)) if one.bias is None else one.bias for one in linears
        ]
        return out + torch.cat(biases).float()

    @torch.no_grad()
    def wide(self, *linears: nn.Linear) -> Tensor:
        """Their weights in bfloat16, as `multiply` takes them."""
        if linears not in self._wide:
            joined = torch.cat([one.weight for one in linears]).to(torch.bfloat16)
            self._wide[linears] = torch.ops.mkldnn._reorder_linear_weight(joined)
        return self._wide[linears]

    @torch.no_grad()
    def _four_bits(self, linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor] | None:
        if linears not in self._narrow:
            # Packed anew in every process: the order of the bytes differs between CPUs.
            found = four_bits(torch.cat([one.weight.detach() for one in linears]))
            if found is None:
                self._narrow[linears] = None
            else:
                codes, scale, zero = found
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
                scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
                self._narrow[linears] = packed, scales.to(torch.bfloat16)
        return self._narrow[linears]


def multiply(
    x: Tensor, weight: Tensor, *, activation: str = "none", factor: Tensor | None = None
) -> Tensor:
    """(rows, size) times packed weights, both in bfloat16, summed in float32 and rounded once.

    Args:
        activation: "none", or "swish" for SiLU.
        factor: what the products are multiplied with, in the shape of the result.
    """
    ops = torch.ops.mkldnn._linear_pointwise
    if factor is not None:
        out: Tensor = ops.binary(x, factor, weight, None, "mul")
        return out
    out = ops(x, weight, None, activation, [], "")
    return out


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The four-bit numbers that a float32 matrix was computed from, where it was.

    Q4_0, Q4_1 and Q4_K give every block of 32 weights in a row sixteen levels at most, equally far
    from each other; so the levels can be found again.

    Args:
        weight: (outputs, inputs).

    Returns:
        codes, (outputs, inputs) int32 from 0 to 15, scales and zeros, (outputs, inputs // 32), with
        weight = (code - 8) * scale + zero; None where the weights have other levels or torch has no
        kernel for the shape.
    """
    outputs, inputs = weight.shape
    if outputs % 16 or inputs % GROUP or weight.dtype != torch.float32:
        return None
    groups = weight.reshape(-1, GROUP)
    # A few groups tell other formats apart before all are searched.
    for sample in (groups[:64], groups):
        found = _levels(sample)
        if found is None:
            return None
    codes, scale, least = found
    return (
        codes.view(outputs, inputs),
        scale.view(outputs, -1),
        (least + 8 * scale).view(outputs, -1),
    )


def _levels(groups: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scale and least value of every group; None where a group has no such levels."""
    least = groups.amin(dim=-1, keepdim=True)
    above = groups - least
    reach = above.amax(dim=-1, keepdim=True)
    codes = torch.zeros(groups.shape, dtype=torch.int32)
    scale = torch.zeros_like(least)
    left = (reach[:, 0] > 0).nonzero()[:, 0]
    # Nearly every group uses the first or the last level, and most of them both.
    for steps in range(LEVELS, 0, -1):
        if len(left) == 0:
            break
        size = reach[left] / steps
        places = above[left] / size
        near = places.round()
        on = ((places - near).abs() <= OFF_LEVEL).all(dim=-1)
        codes[left[on]] = near[on].to(torch.int32)
        scale[left[on]] = size[on]
        left = left[~on]
    return None if len(left) else (codes, scale, least)


class FastProducts(TorchFunctionMode):
    """Inside this block this thread multiplies with packed weights, and attends to a prompt with
    bfloat16 products; what goes in and comes out stays float32, and nothing in the model changes.
    """

    def __init__(self, packed: PackedWeights, mass: bool = False) -> None:
        super().__init__()
        self._packed, self._mass = packed, mass
        self.received: Tensor | None = None
        """What every position received from all queries of the last attention, (num_query_heads,
        prompt length), where that is recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace linear layers and causal attention; everything else is done as it is."""
        kwargs = kwargs or {}
        if func is F.linear and args[0].dtype == torch.float32:
            linear = self._packed.named(args[1])
            if linear is not None:
                out = self._packed.product(args[0].flatten(0, -2), linear)
                return out.float().view(*args[0].shape[:-1], -1)
        elif func is F.scaled_dot_product_attention:
            self.received = None
            if _reads_one_prompt(*args, **kwargs):
                query, key, value = args[:3]
                scaling = kwargs.get("scale")
                out, self.received = causal_attention(
                    query[0],
                    key[0],
                    value[0],
                    query.shape[-1] ** -0.5 if scaling is None else scaling,
                    mass=self._mass,
                )
                return out.float().transpose(0, 1)[None]
        return func(*args, **kwargs)


def _reads_one_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **other: Any,
) -> bool:
    """Whether an attention is a whole prompt's, each token seeing all before it."""
    return (
        is_causal
        and attn_mask is None
        and dropout_p == 0
        and query.dtype == torch.float32
        and len(query) == 1
        and query.shape[2] == key.shape[2] > 1
        and key.shape == value.shape
    )

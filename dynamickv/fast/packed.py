"""Weights of linear layers in the forms that a CPU multiplies fastest: bfloat16 in oneDNN's own
order for many rows, and for a few rows the four bits that a GGUF file gave each weight, where it
did. Products round as bfloat16 products do, with sums in float32. Knows no models and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynamickv.fast.blockwise import causal_attention

GROUP = 32
"""Neighbouring weights that share a scale and a zero: GGUF's blocks, and the least torch takes."""
FEW_ROWS = 8
"""Rows up to which four-bit weights take less time than bfloat16 ones."""
LEVELS = 15
"""Steps between the least and the greatest four-bit number."""
SAMPLE = 64
"""Groups that tell most other formats apart."""
REFINED = 64
"""Of a row's logits, how many of the greatest are computed again in float32."""
OFF_LEVEL = 1 / 64
"""How far from a level, in steps, a weight that had four bits can lie: float32 rounds little."""


def has_fast_products() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, torch's oneDNN makes use of it, and
    numba is installed, which compiles what lies between the products."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpu: Any = torch.cpu
    instructions = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    usable = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(known and instructions and usable and find_spec("numba") is not None)


class PackedWeights:
    """A model's linear layers, packed as they are needed; the copies last as long as this does."""

    def __init__(self, model: nn.Module) -> None:
        self._linears = {
            module.weight: module for module in model.modules() if type(module) is nn.Linear
        }
        self._packed: dict[tuple[nn.Linear, ...], Packed] = {}
        self._head: Any = getattr(model, "get_output_embeddings", lambda: None)()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies made so far."""
        return sum(packed.nbytes for packed in list(self._packed.values()))

    def named(self, weight: Tensor) -> nn.Linear | None:
        """The layer that a weight belongs to."""
        return self._linears.get(weight)

    def is_head(self, linear: nn.Linear) -> bool:
        """Whether a layer's outputs are the model's logits."""
        return linear is self._head

    def of(self, *linears: nn.Linear) -> Packed:
        """The weights of layers that read one input, as one matrix."""
        packed = self._packed.get(linears)
        if packed is None:
            packed = self._packed.setdefault(linears, Packed(linears))
        return packed

    def prepare(self, groups: Iterable[tuple[nn.Linear, ...]], few: bool) -> None:
        """Pack now what will be multiplied with few rows or many, so that no step waits for it."""
        for linears in groups:
            if few and self.of(*linears).narrow is not None:
                continue
            # Gate and up projections of many rows are multiplied one after the other.
            for one in linears if len(linears) == 2 else [linears]:
                _ = self.of(*(one if isinstance(one, tuple) else (one,))).wide

    def product(self, x: Tensor, *linears: nn.Linear) -> Tensor:
        """Projections of one input, (rows, size), in one product, (rows, all outputs): bfloat16, or
        float32 with a bias, which is added unrounded."""
        packed = self.of(*linears)
        x = x.to(torch.bfloat16)
        narrow = packed.narrow if x.shape[0] <= FEW_ROWS else None
        out = multiply(x, packed.wide) if narrow is None else multiply_few(x, *narrow)
        return out if packed.bias is None else out + packed.bias

    def logits(self, x: Tensor, head: nn.Linear) -> Tensor:
        """Next-token logits of (rows, size) float32, (rows, vocabulary) float32.

        bfloat16 has an eighth between neighbouring logits from 16 on, so that the likeliest tokens
        would tie: these are computed again from the head's own weights.
        """
        rough = self.product(x, head).float()
        best = rough.topk(min(REFINED, rough.shape[-1]), dim=-1).indices
        exact = torch.bmm(head.weight[best], x.unsqueeze(-1))[..., 0]
        if head.bias is not None:
            exact = exact + head.bias[best]
        return rough.scatter_(-1, best, exact)

    def gated(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x), of projections without bias."""
        x = x.to(torch.bfloat16)
        narrow = self.of(gate, up).narrow if x.shape[0] <= FEW_ROWS else None
        if narrow is None:
            opened = multiply(x, self.of(gate).wide, activation="swish")
            return multiply(x, self.of(up).wide, factor=opened)
        opened, raised = multiply_few(x, *narrow).float().chunk(2, dim=-1)
        return F.silu(opened) * raised


class Packed:
    """One matrix in the forms it was asked for."""

    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        self._weights = [one.weight.detach() for one in linears]
        self.bias: Tensor | None = None
        """(outputs,) float32."""
        if any(one.bias is not None for one in linears):
            self.bias = torch.cat(
                [
                    one.weight.new_zeros(one.weight.shape[0]) if one.bias is None else one.bias
                    for one in linears
                ]
            ).detach()

    @property
    def nbytes(self) -> int:
        """Bytes of the forms made so far."""
        made = vars(self)
        wide = sum(2 * one.numel() for one in self._weights) if "wide" in made else 0
        narrow: tuple[Tensor, ...] = made.get("narrow") or ()
        return wide + sum(part.nbytes for part in narrow)

    @cached_property
    def wide(self) -> Tensor:
        """In bfloat16, as `multiply` takes it."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._joined().bfloat16())
        return packed

    @cached_property
    def narrow(self) -> tuple[Tensor, Tensor] | None:
        """In four bits, as `multiply_few` takes it; None where it never had four."""
        found = four_bits(self._joined())
        if found is None:
            return None
        codes, scale, zero = found
        # Made anew in every process: the order of the bytes differs between CPUs.
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        return packed, scales.to(torch.bfloat16)

    def _joined(self) -> Tensor:
        return self._weights[0] if len(self._weights) == 1 else torch.cat(self._weights)


def multiply_few(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(rows, size) times four-bit weights, in bfloat16."""
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scales)
    return out


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
    found = _levels(groups) if _levels(groups[:SAMPLE]) is not None else None
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
    least, most = torch.aminmax(groups, dim=-1, keepdim=True)
    scale = (most - least) / LEVELS
    codes, on = _nearest(groups, least, scale)
    left = (~on).nonzero()[:, 0]
    # Nearly every group uses the first or the last level, and most of them both.
    for steps in range(LEVELS - 1, 0, -1):
        if len(left) == 0:
            break
        size = (most[left] - least[left]) / steps
        near, on = _nearest(groups[left], least[left], size)
        codes[left[on]], scale[left[on]] = near[on], size[on]
        left = left[~on]
    return None if len(left) else (codes, scale, least)


def _nearest(groups: Tensor, least: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Each weight's nearest level, int32, and for each group whether all weights lie on theirs."""
    places = (groups - least).div_(size.clamp_min(torch.finfo(torch.float32).tiny))
    near = places.round()
    off = places.sub_(near).abs_().amax(dim=-1)
    return near.to(torch.int32), off <= OFF_LEVEL


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
                rows = args[0].flatten(0, -2)
                head = self._packed.is_head(linear)
                multiplied = self._packed.logits if head else self._packed.product
                return multiplied(rows, linear).float().view(*args[0].shape[:-1], -1)
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
        and key.shape[3] % 2 == 0
    )

"""Weights of linear layers in the forms that a CPU multiplies fastest: bfloat16 in the order that
products of many rows read it in, and for a few rows the codes that a GGUF file gave them, where it
did. Products of the first round as bfloat16 products do, with sums in float32, those of the second
as float32 does. Knows no models and no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynamickv.fast.blockwise import causal_attention, has_tiles
from dynamickv.fast.codes import Coded, coded

if TYPE_CHECKING:
    from dynamickv.fast.tiled import Tiled

FEW_ROWS = 8
"""Rows up to which codes take less time than bfloat16."""
REFINED = 64
"""Of a row's logits, how many of the greatest are computed again in float32."""


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
            # Of a prompt's logits, too, only the last are asked for.
            if (few or linears == (self._head,)) and self.of(*linears).narrow is not None:
                continue
            # Gate and up projections of many rows are multiplied one after the other.
            for one in linears if len(linears) == 2 else [linears]:
                _ = self.of(*(one if isinstance(one, tuple) else (one,))).wide

    def product(self, x: Tensor, *linears: nn.Linear) -> Tensor:
        """Projections of one input, (rows, size), in one product, (rows, all outputs): float32
        from codes or with a bias, which is added unrounded, else bfloat16."""
        packed = self.of(*linears)
        if len(x) <= FEW_ROWS and packed.narrow is not None:
            # As in prefill.py: numba takes a second to load.
            from dynamickv.fast.few_rows import multiply as multiply_few

            return multiply_few(x.float(), packed.narrow, packed.bias)
        out = packed.wide.multiply(x.to(torch.bfloat16))
        return out if packed.bias is None else out + packed.bias

    def add_product(self, total: Tensor, x: Tensor, *linears: nn.Linear) -> None:
        """total += their product, (rows, all outputs) float32, contiguous."""
        packed = self.of(*linears)
        few = len(x) <= FEW_ROWS and packed.narrow is not None
        if few or packed.bias is not None:
            total += self.product(x, *linears)
        else:
            packed.wide.add_product(total, x.to(torch.bfloat16))

    def logits(self, x: Tensor, head: nn.Linear) -> Tensor:
        """Next-token logits of (rows, size) float32, (rows, vocabulary) float32.

        Products of codes are what they are. bfloat16 has an eighth between neighbouring logits from
        16 on, so that the likeliest tokens would tie: these are computed again from the head's own
        weights.
        """
        product = self.product(x, head)
        if len(x) <= FEW_ROWS and self.of(head).narrow is not None:
            return product
        rough = product.float()
        best = rough.topk(min(REFINED, rough.shape[-1]), dim=-1).indices
        exact = torch.bmm(head.weight[best], x.unsqueeze(-1))[..., 0]
        if head.bias is not None:
            exact = exact + head.bias[best]
        return rough.scatter_(-1, best, exact)

    def gated(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """silu(gate(x)) * up(x), of projections without bias."""
        narrow = self.of(gate, up).narrow if len(x) <= FEW_ROWS else None
        if narrow is not None:
            from dynamickv.fast.few_rows import gated as gated_few

            return gated_few(x.float(), narrow)
        opened: Any = self.of(gate).wide
        product: Tensor = opened.gated(x.to(torch.bfloat16), self.of(up).wide)
        return product


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
        wide: Tiled | OneDNN | None = made.get("wide")
        narrow: Coded | None = made.get("narrow")
        return sum(0 if form is None else form.nbytes for form in (wide, narrow))

    @cached_property
    def wide(self) -> Tiled | OneDNN:
        """In bfloat16."""
        weight = torch.cat(self._weights).bfloat16()
        # Matrix tiles make oneDNN's products faster than the microkernel's.
        if has_tiles() or weight.shape[1] % 2:
            return OneDNN(weight)
        # As in prefill.py: numba takes a second to load.
        from dynamickv.fast.tiled import Tiled

        return Tiled(weight)

    @cached_property
    def narrow(self) -> Coded | None:
        """As codes; None where the weights never were."""
        return coded(*self._weights)


class OneDNN:
    """A matrix in oneDNN's order, with what `tiled.Tiled` does."""

    def __init__(self, weight: Tensor) -> None:
        """From (outputs, inputs) bfloat16."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.nbytes = weight.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """Rows times the matrix, (rows, outputs) bfloat16."""
        return self._product(x, "none")

    def add_product(self, total: Tensor, x: Tensor) -> None:
        """total += rows times the matrix, rounded before."""
        # As in prefill.py: numba takes a second to load.
        from dynamickv.fast.sums import add_rows

        add_rows(total, self._product(x, "none"))

    def gated(self, x: Tensor, up: OneDNN) -> Tensor:
        """silu of the products, rounded, times those with another matrix."""
        opened = self._product(x, "swish")
        ops = torch.ops.mkldnn._linear_pointwise
        out: Tensor = ops.binary(x, opened, up._weight, None, "mul")
        return out

    def _product(self, x: Tensor, activation: str) -> Tensor:
        ops = torch.ops.mkldnn._linear_pointwise
        out: Tensor = ops(x, self._weight, None, activation, [], "")
        return out


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

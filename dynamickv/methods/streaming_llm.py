"""StreamingLLM: attention sinks and the most recent tokens, whatever they say
(arXiv:2309.17453)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dynamickv.methods.base import EvictingMethod
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.edits import edited_positions
from dynamickv.methods.parameters import require_integer
from dynamickv.methods.selection import FixedSelection, Selection
from dynamickv.records import Heads, HeldLayer, LayerObservation


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictingMethod):
    """Keep the first `sinks` tokens and the most recent capacity - sinks, alike in every layer.

    Departure from the reference (KVCache-Factory): there the number of sinks is capacity minus a
    window; here it is a parameter, 4 as in the paper. A prompt with n <= capacity is kept whole.
    """

    name: ClassVar[str] = "StreamingLLM"
    capabilities: ClassVar[Capabilities] = replace(EvictingMethod.capabilities, decoding=True)
    sinks: int = 4
    """Tokens kept at the start of the prompt."""

    def __post_init__(self) -> None:
        EvictingMethod.__post_init__(self)
        require_integer("sinks", self.sinks, 0, "token")
        if self.capacity <= self.sinks:
            raise ValueError(f"capacity must exceed sinks={self.sinks} tokens, got {self.capacity}")

    def start(self, num_layers: int) -> Selection:
        """The same positions in every layer."""
        return FixedSelection(self._positions)

    def choose_again(self, layers: Sequence[HeldLayer]) -> list[Tensor]:
        """The sinks, and what is most recent now."""
        return [self._recent(layer) for layer in layers]

    def _positions(self, layer: LayerObservation) -> Heads:
        if not self.edited:
            return self._recent(layer)
        heads = layer.num_kv_heads if self.granularity == "kv_head" else layer.num_query_heads
        positions = torch.arange(layer.prompt_length, device=layer.keys.device)
        order = positions.float().expand(heads, -1).clone()
        order[:, : self.sinks] += layer.prompt_length
        return edited_positions(order, self.capacity, self.pinned, self.evicted)

    def _recent(self, layer: LayerObservation) -> Tensor:
        heads = layer.num_kv_heads if self.granularity == "kv_head" else layer.num_query_heads
        positions = torch.arange(layer.prompt_length, device=layer.keys.device)
        recent = positions[layer.prompt_length - (self.capacity - self.sinks) :]
        return torch.cat([positions[: self.sinks], recent]).expand(heads, -1)

"""DynamicKV and ShiftKV as kvpress presses, so that kvpress's pipeline and evaluation can run them.

    from dynamickv.integrations.kvpress import DynamicKVPress
    with DynamicKVPress(compression_ratio=0.9)(model):
        model(input_ids, past_key_values=cache)

Needs kvpress, which pins transformers < 5.3. kvpress compresses the context before it sees the
question, one KV head at a time, and speaks of a ratio; capacity = prompt tokens x (1 - ratio).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress.presses.base_press import BasePress, is_prefilling
from kvpress.utils import extract_keys_and_values, get_prerope_query_states
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from dynamickv.methods.base import CompressionMethod
from dynamickv.methods.dynamickv import DynamicKV
from dynamickv.methods.selection import Selection
from dynamickv.methods.shiftkv import ShiftKV
from dynamickv.records import LayerObservation


@dataclass
class LayersPress(BasePress, ABC):  # type: ignore[misc]
    """Layers compete for one budget: what the presses of this file share."""

    compression_ratio: float = 0.0
    """Share of the prompt's key-value pairs to remove."""
    window_size: int = 8
    kernel_size: int = 7
    pooling: str = "max"
    r_max: float = 10.0
    _layers: int = field(default=0, init=False, repr=False)
    _tail: int = field(default=0, init=False, repr=False)
    _selection: Selection | None = field(default=None, init=False, repr=False)
    _held: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(
                f"compression_ratio must be at least 0 and below 1, got {self.compression_ratio}"
            )

    @abstractmethod
    def method(self, capacity: int) -> CompressionMethod:
        """The engine's method for a prompt of which `capacity` tokens are kept in the mean."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Learn how many layers there are."""
        self._layers = model.config.get_text_config().num_hidden_layers

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """Take in a layer as it is computed and cut the layers whose budget has changed."""
        hidden_states = kwargs["hidden_states"]
        cache, layer = kwargs["past_key_values"], int(module.layer_idx)  # type: ignore[arg-type]
        length = hidden_states.shape[1]
        if self.compression_ratio == 0 or not is_prefilling(kwargs["cache_position"], length):
            return output
        if hidden_states.shape[0] != 1:
            raise ValueError(
                f"the batch has {hidden_states.shape[0]} sequences and {type(self).__name__} "
                "serves one; compress them one by one"
            )
        if layer == 0:
            method = self.method(int(length * (1 - self.compression_ratio)))
            self._selection, self._held = method.start(self._layers), []
            self._tail = min(method.tail, length)
        if self._selection is None:
            raise ValueError("the first layer was not seen; use the press as a context manager")
        keys, _ = extract_keys_and_values(cache, layer)
        changed = self._selection.observe(
            LayerObservation(
                queries=self._last_queries(module, hidden_states, kwargs["position_embeddings"]),
                keys=keys[0],
                scaling=float(module.scaling),  # type: ignore[arg-type]
            )
        )
        for index in changed:
            positions = self._selection.positions(index)
            assert isinstance(positions, Tensor)
            self._cut(cache, index, positions)
        return output

    def _last_queries(
        self, module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Post-RoPE queries that the method looks at, (num_query_heads, tail, head_dim)."""
        window = hidden_states[:, -self._tail :]
        queries: Tensor = get_prerope_query_states(module, window)
        cos, sin = (part[:, -self._tail :].unsqueeze(1) for part in position_embeddings)
        turned: Tensor = rotate_half(queries)  # type: ignore[no-untyped-call]
        return queries[0] * cos[0] + turned[0] * sin[0]

    def _cut(self, cache: Any, index: int, positions: Tensor) -> None:
        keys, values = extract_keys_and_values(cache, index)
        if index == len(self._held):
            self._held.append(positions)
            places = positions
        else:
            places = torch.searchsorted(self._held[index], positions)
            self._held[index] = positions
        rows = places[None, :, :, None].expand(-1, -1, -1, keys.shape[-1])
        cache.layers[index].keys = keys.gather(2, rows)
        cache.layers[index].values = values.gather(2, rows)


@dataclass
class DynamicKVPress(LayersPress):
    """See `dynamickv.DynamicKV` for the parameters."""

    update_interval: int = 4

    def method(self, capacity: int) -> CompressionMethod:
        """As the paper has it."""
        return DynamicKV(
            capacity=capacity,
            window_size=self.window_size,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            r_max=self.r_max,
            update_interval=self.update_interval,
        )


@dataclass
class ShiftKVPress(LayersPress):
    """See `dynamickv.ShiftKV` for the parameters."""

    context_size: int = 64

    def method(self, capacity: int) -> CompressionMethod:
        """More for the layers whose attention the end of the context moves."""
        return ShiftKV(
            capacity=capacity,
            window_size=self.window_size,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            r_max=self.r_max,
            context_size=self.context_size,
        )

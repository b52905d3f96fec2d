"""KeyDiff: keep the keys that are least like the others (Park et al., arXiv:2504.15364)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.base import EvictingMethod
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.selection import RankedSelection, Selection
from dynamickv.records import HeldLayer, LayerObservation
from dynamickv.scoring import reduce_group, top_positions


@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictingMethod):
    """Keep the `capacity` positions whose keys point farthest from the mean direction of all keys;
    neither queries nor the question are looked at, and the end of the prompt has no privilege.

    As in the reference (kvpress) without its block form for prompts. While answering it evicts
    block by block, as the paper does: the mean is that of the keys held. Departures: positions are
    stored in order, scores stay float32.
    """

    name: ClassVar[str] = "KeyDiff"
    capabilities: ClassVar[Capabilities] = replace(EvictingMethod.capabilities, decoding=True)

    def start(self, num_layers: int) -> Selection:
        """Every layer by itself."""
        return RankedSelection(self.score, self.capacity, self.pinned, self.evicted)

    def score(self, layer: LayerObservation) -> Tensor:
        """Negative cosine between each key and the mean of all normalised keys, (heads,
        prompt_length) float32."""
        scores = layer.unlikeness()
        if self.granularity == "kv_head":
            return reduce_group(scores, layer.num_kv_heads, "mean")
        return scores.repeat_interleave(layer.num_query_heads // len(scores), dim=0)

    def choose_again(self, layers: Sequence[HeldLayer]) -> list[Tensor]:
        """The same among what is held."""
        return [
            top_positions(self.score(layer), min(self.capacity, layer.prompt_length))
            for layer in layers
        ]

"""H2O: heavy hitters, the positions that gathered most attention over the whole prompt
(arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dynamickv.methods.base import ScoredMethod
from dynamickv.methods.capabilities import Capabilities
from dynamickv.records import LayerObservation
from dynamickv.scoring import reduce_group


@dataclass(frozen=True, kw_only=True)
class H2O(ScoredMethod):
    """Keep the positions with the largest sum of attention from all queries, plus the window; every
    layer keeps `capacity`.

    As in the reference (KVCache-Factory) the sum is not normalised, which favours early positions,
    nothing is evicted while decoding (unless `Decoding` asks for it: then attention that answer
    tokens pay counts too), and kernel_size and pooling are ignored. Departures: a prompt
    with n <= capacity is kept whole, scores stay float32, kept positions are stored in position
    order, the default granularity is the KV head.
    """

    name: ClassVar[str] = "H2O"
    capabilities: ClassVar[Capabilities] = replace(
        ScoredMethod.capabilities, mass=True, window=False, vllm=False
    )
    ignored: ClassVar[tuple[str, ...]] = ("kernel_size", "pooling")
    kernel_size: int = 1
    """Ignored: H2O does not pool."""

    def score(self, layer: LayerObservation) -> Tensor:
        """Attention mass per head and prefix position, (heads, prompt_length - window_size)."""
        if layer.mass is None:
            raise ValueError(
                "H2O needs the attention of all queries, which was not recorded; "
                "prefill with mass=True or give the queries of the whole prompt"
            )
        scores = layer.mass[:, : layer.prompt_length - self.window_size]
        if self.granularity == "query_head":
            return scores
        return reduce_group(scores, layer.num_kv_heads, self.group_reduction)

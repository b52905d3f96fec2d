"""FullKV: no compression, the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dynamickv.methods.base import CompressionMethod
from dynamickv.methods.selection import FixedSelection, Selection


@dataclass(frozen=True, kw_only=True)
class FullKV(CompressionMethod):
    """Keep every prompt token in every layer."""

    name: ClassVar[str] = "FullKV"

    def fits(self, prompt_length: int) -> bool:
        """Every prompt does."""
        return True

    def start(self, num_layers: int) -> Selection:
        """Keep all positions, per KV head."""
        return FixedSelection(
            lambda layer: torch.arange(layer.prompt_length, device=layer.keys.device).expand(
                layer.num_kv_heads, -1
            )
        )

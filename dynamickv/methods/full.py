"""FullKV: no compression, the yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dynamickv.methods.base import CompressionMethod
from dynamickv.records import LayerObservation, Retention


@dataclass(frozen=True, kw_only=True)
class FullKV(CompressionMethod):
    """Keep every prompt token in every layer."""

    name: ClassVar[str] = "FullKV"

    def select(self, observations: Sequence[LayerObservation]) -> Retention:
        """Everything."""
        return Retention.everything(observations)

"""The registry: every method by name. A new method is one file and one line here."""

from __future__ import annotations

from dynamickv.methods.base import CompressionMethod, ScoredMethod
from dynamickv.methods.dynamickv import DynamicKV
from dynamickv.methods.full import FullKV
from dynamickv.methods.snapkv import SnapKV

METHODS: dict[str, type[CompressionMethod]] = {
    FullKV.name: FullKV,
    SnapKV.name: SnapKV,
    DynamicKV.name: DynamicKV,
}

__all__ = ["METHODS", "CompressionMethod", "DynamicKV", "FullKV", "ScoredMethod", "SnapKV"]

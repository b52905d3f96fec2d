"""Layers beside the compressed ones that keep a sliding window: what they hold is saved and put
back with a preempted request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Sliding:
    """The sliding layers of a model; there may be none."""

    def __init__(self, layers: Mapping[str, Any], block_size: int) -> None:
        self._layers = layers
        self._block_size = block_size
        self.tables: dict[str, Tensor] = {}
        """By layer, the block table of this step."""

    def rows(self, number: int) -> dict[str, Tensor]:
        """By layer, one row of this step's block table."""
        return {name: table[number] for name, table in self.tables.items()}

    def save(self, rows: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        """By layer, the contents of the blocks of the window before token `length`."""
        return {
            name: self._layers[name].kv_cache[row[self._columns(name, length)].long()]
            for name, row in rows.items()
        }

    def restore(
        self, saved: Mapping[str, Tensor], rows: Mapping[str, list[int]], length: int
    ) -> None:
        """Put back what was saved, into the blocks of new rows."""
        for name, contents in saved.items():
            cache = self._layers[name].kv_cache
            blocks = torch.tensor(rows[name][self._columns(name, length)], device=cache.device)
            cache[blocks] = contents

    def _columns(self, name: str, length: int) -> slice:
        """Columns of a row that a query at `length` sees, itself not counted."""
        first = max(length + 1 - self._layers[name].sliding_window, 0) // self._block_size
        return slice(first, -(-length // self._block_size))

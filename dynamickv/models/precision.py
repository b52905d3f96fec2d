"""How a loaded model's products are computed: as the model does, or from packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dynamickv.memory import free_host_memory
from dynamickv.packed import PackedWeights, has_fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRECISIONS = ("auto", "exact", "fast")
HALF = 16
"""Bits of the number formats that lose nothing a quantized file has lost already."""


def require_precision(precision: str) -> None:
    """Refuse an unknown one before anything is loaded."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")


def packed_for(precision: str, model: PreTrainedModel, gguf: Path | None) -> PackedWeights | None:
    """The packed weights that a precision asks for; None computes as the model does.

    "fast" needs float32 weights on a CPU with bfloat16 instructions, and memory for a copy of half
    their size; where one is missing it computes exactly.

    Args:
        gguf: the file that the weights come from: "auto" is "fast" for those of less than 16 bits.
    """
    if precision == "auto":
        numbers = model.num_parameters()
        quantized = gguf is not None and gguf.stat().st_size * 8 < HALF * numbers
        precision = "fast" if quantized else "exact"
    if precision == "exact" or not has_fast_products():
        return None
    if any(
        parameter.device.type != "cpu" or parameter.dtype != torch.float32
        for parameter in model.parameters()
    ):
        return None
    size: int = model.get_memory_footprint()  # type: ignore[no-untyped-call]
    return PackedWeights(model) if free_host_memory() > size else None

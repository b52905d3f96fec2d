"""How a loaded model's products are computed: as the model does, or from packed weights."""

from __future__ import annotations

from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING

import torch

from dynamickv.fast.blockwise import has_tiles
from dynamickv.fast.packed import PackedWeights, has_fast_products
from dynamickv.memory import free_host_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRECISIONS = ("auto", "exact", "fast")
HALF = 16
"""Bits of a half-precision number."""


def require_precision(precision: str) -> None:
    """Refuse an unknown one before anything is loaded."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")


def packed_for(
    precision: str, model: PreTrainedModel, bits: float | None = None
) -> PackedWeights | None:
    """The packed weights that a precision asks for; None computes as the model does.

    "fast" needs float32 weights on a CPU with bfloat16 instructions, and memory for as much again,
    of which copies take up to four fifths; where one is missing it computes exactly. "auto" is
    "fast" for weights that were rounded further before than bfloat16 rounds: those of a GGUF file
    below 16 bits.

    Args:
        bits: per weight in the GGUF file that the model was read from.
    """
    if precision == "auto":
        precision = "exact" if bits is None or bits >= HALF else "fast"
    if precision != "fast" or not has_fast_products():
        return None
    if any(
        parameter.device.type != "cpu" or parameter.dtype != torch.float32
        for parameter in model.parameters()
    ):
        return None
    size: int = model.get_memory_footprint()  # type: ignore[no-untyped-call]
    if free_host_memory() <= size:
        return None
    # Loaded meanwhile, on a machine's first time compiled, so that hardly a prompt waits for it.
    Thread(target=_import_compiled).start()
    return PackedWeights(model)


def _import_compiled() -> None:
    # In the order in which they are needed.
    for name in ("softmax" if has_tiles() else "causal", "many_rows", "causal", "step"):
        import_module(f"dynamickv.fast.{name}")

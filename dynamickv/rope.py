"""Rotary frequencies that depend on the present sequence alone.

With dynamic NTK scaling the frequencies follow the sequence's length. transformers keeps those of
the longest sequence since the last short one, so an answer could depend on prompts read earlier.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def forget_longer_sequences(model: nn.Module) -> None:
    """Make every dynamic rotary embedding start each forward pass as if it were its first."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.register_forward_pre_hook(_start_afresh)


def stretch(config: Any) -> float:
    """By how much dynamic scaling extends `max_position_embeddings`; 1 without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope["factor"]) if rope.get("rope_type") == "dynamic" else 1.0


def _start_afresh(module: Any, _: Any) -> None:
    module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
    module.max_seq_len_cached = module.original_max_seq_len

"""Rotary frequencies that depend on the present sequence alone.

With dynamic NTK scaling the frequencies follow the sequence's length. transformers keeps those of
the longest sequence since the last short one, so an answer could depend on prompts read earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def forget_longer_sequences(model: nn.Module) -> list[RemovableHandle]:
    """Make every dynamic rotary embedding start each forward pass as if it were its first.

    Returns:
        What takes this back, one handle per embedding.
    """
    return _started_afresh(_dynamic_embeddings(model))


@contextmanager
def longer_sequences_forgotten(model: nn.Module) -> Iterator[None]:
    """`forget_longer_sequences` inside the block; afterwards the model is as it was."""
    embeddings = _dynamic_embeddings(model)
    before = [(module, module.inv_freq, module.max_seq_len_cached) for module in embeddings]
    handles = _started_afresh(embeddings)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, frequencies, longest in before:
            module.inv_freq, module.max_seq_len_cached = frequencies, longest


def stretch(config: Any) -> Fraction:
    """By how much scaling extends `max_position_embeddings`; 1 without it.

    YaRN reads `original_max_position_embeddings` times its factor; so do linear and dynamic
    scaling where a config names the original, and else `max_position_embeddings` times the factor.
    A config that holds the product already is not extended again. Where layers differ (Gemma 3),
    configs hold the product.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("yarn", "linear", "dynamic") or not rope.get("factor"):
        return Fraction(1)
    positions = int(config.max_position_embeddings)
    original = rope.get("original_max_position_embeddings") or positions
    return max(Fraction(1), Fraction(rope["factor"]) * original / positions)


def _dynamic_embeddings(model: nn.Module) -> list[Any]:
    # A module's `getattr` takes its time over what is not there: two microseconds for each module.
    return [module for module in model.modules() if vars(module).get("rope_type") == "dynamic"]


def _started_afresh(embeddings: list[Any]) -> list[RemovableHandle]:
    return [module.register_forward_pre_hook(_start_afresh) for module in embeddings]


def _start_afresh(module: Any, _: Any) -> None:
    module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
    module.max_seq_len_cached = module.original_max_seq_len

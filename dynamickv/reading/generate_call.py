"""What transformers' `generate` was asked for, while it calls a model.

A model's forward pass is not told where the prompt ends (drafts may follow it, chunks may be
missing), whether beams share it, or that a cache was meant for it. `generate` knows; its frames are
read, nothing is changed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

_FILE = "transformers/generation/utils.py"
_DEPTH = 60
"""Frames between a model's forward pass and `generate` that are looked through at most."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One `generate` under way."""

    options: Any
    """Its GenerationConfig."""
    token_ids: Tensor
    """(rows, tokens) so far, the prompt included, drafts not."""
    cache: Any
    """The cache it was given or made."""


def generate_call() -> GenerateCall | None:
    """The innermost `generate` that the caller serves, None outside of one."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if frame.f_code.co_filename.replace("\\", "/").endswith(_FILE):
            names = frame.f_locals
            if {"generation_config", "input_ids", "model_kwargs"} <= names.keys():
                given = names["model_kwargs"]
                cache = given.get("cache", given.get("past_key_values"))
                if cache is None and "outputs" in names:
                    cache = getattr(names["outputs"], "cache", None)
                return GenerateCall(names["generation_config"], names["input_ids"], cache)
        frame = frame.f_back
    return None

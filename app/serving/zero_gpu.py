"""ZeroGPU Spaces: a GPU only while a decorated function runs, in a forked process.

Everywhere else the functions run as they are; the `spaces` package is needed on such Spaces only,
which bring it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])
LONGEST = 120
"""Seconds of GPU that a visitor without account has in a day."""
SHORTEST = 15
"""The fork and moving the model there take some of it."""
PREFILL_TOKENS = 4_000
"""Tokens read per second: a cautious guess for a small model until a run was measured."""
DECODE_SECONDS = 0.05
"""Seconds per answer token, likewise; the methods take turns."""


def is_zero_gpu() -> bool:
    """Whether this is a ZeroGPU Space."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def estimate(tokens: int, methods: int, max_new_tokens: int) -> int:
    """GPU seconds to ask for; shorter requests are let in sooner, longer ones use up the quota."""
    work = tokens / PREFILL_TOKENS + methods * max_new_tokens * DECODE_SECONDS
    return max(SHORTEST, min(LONGEST, round(10 + 1.5 * work)))


def on_gpu(function: Function, seconds: Callable[..., int]) -> Function:
    """The function with a GPU for as long as `seconds`, called with the same arguments, says."""
    try:
        import spaces
    except ImportError:
        return function
    decorated: Function = spaces.GPU(duration=seconds)(function)
    return decorated

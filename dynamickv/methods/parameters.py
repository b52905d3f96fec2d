"""What parameters may be: one sentence that names the parameter, its value and what is wanted."""

from __future__ import annotations

import math
from typing import Any


def require_integer(name: str, value: Any, least: int, unit: str) -> None:
    """Raise ValueError unless `value` is an int (not bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number of {unit}s, got {value!r}")
    if value < least:
        plural = "" if least == 1 else "s"
        raise ValueError(f"{name} must be at least {least} {unit}{plural}, got {value}")


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be {' or '.join(repr(choice) for choice in choices)}, got {value!r}"
        )

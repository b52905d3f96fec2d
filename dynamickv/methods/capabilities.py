"""The table of capabilities: what a method reads of a prompt, which settings it takes, and where it
works.

A method class holds its row as `capabilities`; engine, command line, page and plugin ask the row,
never a method's name. tests/engine/methods/test_capabilities.py holds every row against what the
method does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """One method's row."""

    mass: bool = False
    """Reads the attention that all queries pay, `prefill(..., mass=True)`; it about doubles the
    prefill's work."""
    window: bool = False
    """Reads the queries of the observation window."""
    values: bool = False
    """Reads the values."""
    capacity: bool = False
    """Keeps to a capacity; without one everything is kept."""
    layer_budgets: bool = False
    """Takes a budget for every layer from its user."""
    query_heads: bool = False
    """Takes granularity="query_head"."""
    adaptive_heads: bool = False
    """Takes head_budgets="adaptive"."""
    serve: bool = True
    """Compresses while a model's own `generate` reads the prompt, `compress`."""
    vllm: bool = True
    """Runs in the vLLM plugin."""
    decoding: bool = False
    """Chooses again while the answer grows."""

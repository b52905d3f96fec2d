"""Frozen tensor records that pass between the stages: a prompt's tokens, what a layer saw, what is
kept, what a prefill left behind.

Tensors here have no batch dimension: the engine reads one prompt at a time.
"""

from dynamickv.records.observation import (
    RECALLED,
    Attended,
    HeldLayer,
    LayerObservation,
    RecallingLayer,
)
from dynamickv.records.prefill import OtherLayer, Prefill
from dynamickv.records.prompt import EncodedPrompt
from dynamickv.records.retention import Heads, Retention

__all__ = [
    "RECALLED",
    "Attended",
    "EncodedPrompt",
    "Heads",
    "HeldLayer",
    "LayerObservation",
    "OtherLayer",
    "Prefill",
    "RecallingLayer",
    "Retention",
]

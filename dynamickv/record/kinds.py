"""The kinds of layers that a model may have, and what each allows.

Data only: the engine, the page, the command line and the refusals read this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one kind of layer is called, and what it allows."""

    words: str
    """As people read it."""
    compressed: bool = False
    """Whether methods choose what it keeps; else it serves as transformers caches it."""
    drafts: bool = True
    """Whether tokens can be taken back, as prompt lookup and assisted decoding do."""


KINDS: dict[str, LayerKind] = {
    "full": LayerKind("attends to the whole prompt", compressed=True),
    "hybrid": LayerKind(
        "attends to the whole prompt beside a state", compressed=True, drafts=False
    ),
    "sliding": LayerKind("sliding window"),
    "chunked": LayerKind("chunked attention"),
    "linear": LayerKind("linear attention", drafts=False),
    "conv": LayerKind("convolution"),
    "hybrid_sliding": LayerKind("sliding window beside a state", drafts=False),
    "shared": LayerKind("shares an earlier layer's keys and values"),
    "moe": LayerKind("experts without attention"),
    "mlp": LayerKind("without attention"),
}
"""Every kind of layer that is served; a model with a layer of another kind is refused."""

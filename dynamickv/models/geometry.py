"""The sizes of a decoder and the kinds of its layers, read from its transformers config.

Knows configs alone: no weights, no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamickv.models.rope import stretch


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes that decide what a KV cache costs."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence the model reads, in tokens."""
    windows: Mapping[int, int] = field(default_factory=dict)
    """Sliding-window layers by their place, with their window in tokens; no method compresses
    them."""

    @property
    def compressed_layers(self) -> list[int]:
        """Places of the layers that attend to the whole prompt, which methods compress."""
        return [place for place in range(self.num_layers) if place not in self.windows]

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read the sizes from a transformers config.

        Raises:
            ValueError: if the model is not a decoder with attention layers that can be compressed.
        """
        require_compressible(config)
        config = config.get_text_config()
        heads = config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or []
        return cls(
            num_layers=config.num_hidden_layers,
            num_query_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_positions=int(config.max_position_embeddings * stretch(config)),
            windows={
                place: config.sliding_window
                for place, kind in enumerate(kinds)
                if kind == "sliding_attention"
            },
        )


def require_compressible(config: Any) -> None:
    """Raise ValueError unless every layer is causal self-attention, over the whole prompt or, in
    some of them, over a sliding window."""
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; choose a decoder-only language model")
    config = config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"{name} has no attention heads; choose a causal language model")
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    alike = "sliding_attention" if slides else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [alike])
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(
            f"{name} has {', '.join(others)} layers, which cannot be told apart from compressed "
            "ones; choose a model whose layers attend to the whole prompt or a sliding window"
        )
    if "full_attention" not in kinds:
        raise ValueError(
            f"{name} has sliding_attention in all layers, so nothing is left to compress; "
            "choose a model with layers that attend to the whole prompt"
        )
    if config.model_type == "gpt_oss":
        raise ValueError(
            f"{name} adds learned sinks to its softmax, which the scores do not know; "
            "choose a model without them"
        )
    for option, meaning in (
        ("attn_logit_softcapping", "caps its attention logits"),
        ("num_kv_shared_layers", "shares keys and values between layers"),
        ("use_bidirectional_attention", "looks ahead"),
    ):
        if getattr(config, option, None):
            raise ValueError(
                f"{name} {meaning} ({option}), which the scores do not know; "
                "choose a model without it"
            )

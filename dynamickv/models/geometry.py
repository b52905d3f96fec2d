"""The sizes of a decoder and the kinds of its layers, read from its transformers config.

Knows configs alone: no weights, no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dynamickv.cache import kinds_of
from dynamickv.models.rope import stretch
from dynamickv.record.kinds import KINDS

JOINT = ("diffllama", "jetmoe")
"""Model types whose attention does not read KV head by KV head: the one pairs the values of one
head with the keys of another, the other repeats its heads for every expert."""
STEPWISE = ("jamba", "zamba")
"""Model types whose state starts anew when several tokens follow on a filled cache (transformers
5.24): they must come one at a time."""
UNSERVED: dict[str, str] = {
    "dory": "lets the last token alone ask in some layers",
    "doge": "masks positions by their values at every step",
    "minimax": "keeps a cache class of its own",
    "mllama_text_model": "attends to images in some layers",
    "git": "computes its text's attention in code of its own",
}
"""Model types whose attention depends on more than a head's queries and keys, or whose caches
are not made of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGeometry:
    """The sizes of one layer."""

    kind: str
    """A key of `record.kinds.KINDS`."""
    num_kv_heads: int
    """Heads that its cache stores: 1 where it stores a latent."""
    head_dim: int
    """Numbers per stored head and position in what it stores of keys."""
    value_dim: int
    """The same of values."""
    window: int = 0
    """Positions that a query sees, its own included; 0 for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes that decide what a KV cache costs."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    """Of the layers that methods compress, as is `head_dim`."""
    head_dim: int
    max_positions: int
    """Longest sequence the model reads, in tokens."""
    layers: tuple[LayerGeometry, ...] = ()
    """Every layer's own; by default all attend to the whole prompt and are of the sizes above."""
    joint: bool = False
    """Whether all heads of a layer share one choice: where the cache stores one latent for them
    (MLA), and where heads are mixed behind it."""
    stepwise: bool = False
    """Whether tokens that follow the first pass must be fed one at a time."""
    switch: int | None = None
    """Prompt length beyond which the model turns all keys by other frequencies (longrope): an
    answer must not cross it."""

    def __post_init__(self) -> None:
        if not self.layers:
            layer = LayerGeometry(
                kind="full",
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                value_dim=self.head_dim,
            )
            object.__setattr__(self, "layers", (layer,) * self.num_layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every layer's kind."""
        return tuple(layer.kind for layer in self.layers)

    @property
    def stateful(self) -> bool:
        """Whether layers that are compressed hold a state besides."""
        return "hybrid" in self.kinds

    @property
    def windows(self) -> Mapping[int, int]:
        """Sliding-window and chunked layers by their place, with their window in tokens."""
        return {place: layer.window for place, layer in enumerate(self.layers) if layer.window}

    @property
    def uncompressed(self) -> dict[int, str]:
        """Layers that no method compresses, by their place, and their kind."""
        return {place: kind for place, kind in enumerate(self.kinds) if not KINDS[kind].compressed}

    @property
    def compressed_layers(self) -> list[int]:
        """Places of the layers that attend to the whole prompt, which methods compress."""
        return [place for place, kind in enumerate(self.kinds) if KINDS[kind].compressed]

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read the sizes from a transformers config.

        Raises:
            ValueError: if the model is not a decoder with attention layers that can be compressed.
        """
        kinds = require_compressible(config)
        config = config.get_text_config(decoder=True)
        own = list(getattr(config, "per_layer_config", None) or [config] * len(kinds))
        # Reading a config takes its time, and most layers share one.
        sizes: dict[tuple[str, int], LayerGeometry] = {}
        for kind, part in zip(kinds, own, strict=False):
            if (kind, id(part)) not in sizes:
                sizes[kind, id(part)] = _layer(kind, config if part is None else part)
        layers = tuple(sizes[kind, id(part)] for kind, part in zip(kinds, own, strict=False))
        place = next(place for place, kind in enumerate(kinds) if KINDS[kind].compressed)
        first, part = layers[place], own[place]
        return cls(
            num_layers=len(layers),
            num_query_heads=(config if part is None else part).num_attention_heads,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            max_positions=int(config.max_position_embeddings * stretch(config)),
            layers=layers,
            joint=_latent(config) or config.model_type in JOINT,
            stepwise=config.model_type in STEPWISE,
            switch=_switch(config),
        )


def _layer(kind: str, config: Any) -> LayerGeometry:
    heads = config.num_attention_heads
    window = 0
    if kind in ("sliding", "hybrid_sliding"):
        window = config.sliding_window
    elif kind == "chunked":
        window = config.attention_chunk_size
    if _latent(config):
        rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        return LayerGeometry(
            kind=kind, num_kv_heads=1, head_dim=rank, value_dim=rotary, window=window
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerGeometry(
        kind=kind,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        value_dim=getattr(config, "v_head_dim", None) or head_dim,
        window=window,
    )


def _latent(config: Any) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None


def _switch(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )


def require_compressible(config: Any) -> tuple[str, ...]:
    """Raise ValueError unless the model is a decoder whose layers are all of known kinds, some of
    them attending to the whole prompt; the kinds."""
    # transformers is imported where it is used: that takes seconds.
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; choose a decoder-only language model")
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_decoder", True) is False and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"{name} is an encoder, whose tokens see later ones (is_decoder=False); "
            "choose a causal language model"
        )
    if config.model_type in UNSERVED:
        raise ValueError(
            f"{name} {UNSERVED[config.model_type]}, which compressed caches do not know; "
            "choose another model"
        )
    try:
        kinds = kinds_of(config)
    except Exception as error:  # transformers' own cache cannot be made of it either
        raise ValueError(
            f"{name} has no cache of transformers' layers ({error}); choose another model"
        ) from error
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(
            f"{name} has layers that cache by {', '.join(unknown)}, which cannot be compressed; "
            "choose a model whose layers attend to the whole prompt"
        )
    if not any(KINDS[kind].compressed for kind in kinds):
        attention = ("sliding", "chunked", "linear")
        names = sorted({f"{kind}_attention" if kind in attention else kind for kind in kinds})
        raise ValueError(
            f"{name} has {', '.join(names)} in all layers, so nothing is left to compress; "
            "choose a model with layers that attend to the whole prompt"
        )
    # Sizes that differ by layer cannot be asked of the whole.
    parts = [part for part in getattr(config, "per_layer_config", None) or [] if part is not None]
    if getattr(parts[0] if parts else config, "num_attention_heads", None) is None:
        raise ValueError(f"{name} has no attention heads; choose a causal language model")
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError(
            f"{name} looks ahead (use_bidirectional_attention), which no cache of past tokens "
            "serves; choose a model without it"
        )
    if getattr(config, "max_position_embeddings", None) is None:
        raise ValueError(
            f"{name} names no longest sequence (max_position_embeddings); "
            "choose a model with rotary positions"
        )
    return kinds


class Choosable(Protocol):
    """A model's geometry or a prefill: what says which choices its cache can hold."""

    @property
    def joint(self) -> bool:
        """As `Geometry.joint`."""

    @property
    def stateful(self) -> bool:
        """As `Geometry.stateful`."""


def require_choosable(model: Choosable, parameters: Mapping[str, Any]) -> None:
    """Raise ValueError where a method's parameters ask for a choice that a model's cache cannot
    hold."""
    if model.joint and parameters.get("granularity") == "query_head":
        raise ValueError(
            "granularity='query_head' needs keys of its own for every query head, and in this "
            "model all heads of a layer share one choice; use granularity='kv_head'"
        )
    if model.stateful and parameters.get("head_budgets") == "adaptive":
        raise ValueError(
            "head_budgets='adaptive' splits a layer's heads, and in this model layers hold a state "
            "besides, which cannot be split; use head_budgets='uniform'"
        )

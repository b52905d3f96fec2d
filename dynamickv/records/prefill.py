"""What one pass of the model over a prompt left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from dynamickv.records.observation import RECALLED, LayerObservation, RecallingLayer
from dynamickv.records.prompt import EncodedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherLayer:
    """A layer that no method compresses, as a prompt left it."""

    kind: str
    """As in `record.kinds.KINDS`."""
    state: Any
    """transformers' cache layer; not to be changed, caches take copies."""
    nbytes: int
    """Bytes of all it holds."""
    held: int
    """How many of the last positions it holds keys and values of; 0 where it has none."""

    @property
    def window(self) -> int:
        """Positions that a query of it sees, its own included; 0 where it has no window."""
        return int(getattr(self.state, "sliding_window", 0))

    @property
    def keys(self) -> Tensor | None:
        """(1, num_kv_heads, held, head_dim), the last positions."""
        keys: Tensor | None = getattr(self.state, "keys", None)
        return keys

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        values: Tensor | None = getattr(self.state, "values", None)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One pass of the model over a prompt: enough to run any method without the model's prefill
    again."""

    prompt: EncodedPrompt
    layers: tuple[LayerObservation, ...]
    """Of the layers that attend to the whole prompt, in the order in which the model read them;
    only these are compressed."""
    keys: tuple[Tensor, ...] = ()
    """What the cache stores of the same layers, (num_kv_heads, prompt_length, head_dim): the keys
    that their attention read, unless it makes them of something else."""
    values: tuple[Tensor, ...]
    """The same of values, (num_kv_heads, prompt_length, value_dim)."""
    places: tuple[int, ...] = ()
    """Where these layers stand in the model; ascending but in models that loop."""
    others: Mapping[int, OtherLayer] = field(default_factory=dict)
    """The other layers, by their place in the model."""
    states: Mapping[int, Any] = field(default_factory=dict)
    """Cache layers whose linear-attention state goes with compressed keys and values, by place."""
    joint: bool = False
    """Whether all heads of a layer share one choice."""
    logits: Tensor
    """Next-token logits after the prompt, (vocabulary,)."""
    took: Callable[[], float] = field(compare=False, repr=False)
    """What `seconds` asks."""
    mass_seconds: float = 0.0
    """Time spent on the attention of all queries, when it was recorded."""
    recalling: tuple[RecallingLayer, ...] = field(init=False, compare=False, repr=False)
    """The same layers, for choosing again and again."""

    def __post_init__(self) -> None:
        layers = (
            RecallingLayer(
                **{name.name: getattr(layer, name.name) for name in fields(LayerObservation)}
            )
            for layer in self.layers
        )
        if not self.keys:
            object.__setattr__(self, "keys", tuple(layer.keys for layer in self.layers))
        if not self.places:
            every = range(len(self.layers) + len(self.others))
            free = tuple(place for place in every if place not in self.others)
            object.__setattr__(self, "places", free)
        object.__setattr__(self, "recalling", tuple(layers))

    @property
    def seconds(self) -> float:
        """What reading took, without `mass_seconds`; waits for a device that still reads."""
        return self.took()

    @property
    def question_aware(self) -> bool:
        """Whether the question was read along, so that scores could see it."""
        return self.prompt.question_span[1] > 0

    @property
    def length(self) -> int:
        """Tokens that were read: the prompt, or the part of it up to the end of the document."""
        return self.layers[0].prompt_length

    @property
    def stateful(self) -> bool:
        """Whether layers that are compressed hold a state besides."""
        return bool(self.states)

    @property
    def compressed_layers(self) -> list[int]:
        """Places in the model of the layers that methods choose for."""
        return list(self.places)

    @property
    def held(self) -> dict[int, int]:
        """How many of the last positions each of the other layers holds, by place."""
        return {place: other.held for place, other in sorted(self.others.items())}

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values, summed from the tensors."""
        return self.whole_bytes + self.other_bytes

    @property
    def other_bytes(self) -> int:
        """Bytes of what no method compresses."""
        return sum(other.nbytes for other in self.others.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes in the layers that hold the whole prompt."""
        return sum(
            tensor.numel() * tensor.element_size()
            for pair in zip(self.keys, self.values, strict=True)
            for tensor in pair
        )

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this record holds, and of all that its layers may recall."""
        recalled = sum(
            (RECALLED + len(layer.whole_pieces)) * layer.num_query_heads * layer.prompt_length * 4
            for layer in self.recalling
        )
        observed = sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (layer.queries, layer.mass)
            if tensor is not None
        )
        # Keys and values that were made from a latent lie beside it.
        observed += sum(
            tensor.numel() * tensor.element_size()
            for layer, *stored in zip(self.layers, self.keys, self.values, strict=True)
            for tensor, held in zip((layer.keys, layer.values), stored, strict=True)
            if tensor is not None and tensor.data_ptr() != held.data_ptr()
        )
        logits = self.logits.numel() * self.logits.element_size()
        return self.kv_bytes + observed + recalled + logits

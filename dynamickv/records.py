"""Frozen tensor records that pass between the stages: what a layer saw, what is kept, what a
prefill left behind.

Tensors here have no batch dimension: the engine reads one prompt at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dynamickv.scoring import window_attention

RECALLED = 4
"""Attentions that a `RecallingLayer` keeps: one takes a few per cent of the layer's keys and
values."""
Heads = Tensor | tuple[Tensor, ...]
"""Positions per head: (heads, kept), or one (kept,) per head where heads keep different numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A tokenized prompt and the spans of its parts."""

    token_ids: list[int]
    text: str
    offsets: list[tuple[int, int]]
    """[start, end) of every token in `text`, in characters; tokens that share a character
    overlap."""
    document_span: tuple[int, int]
    """[first, last) token that touches the document."""
    document_characters: tuple[int, int]
    question_span: tuple[int, int]
    question: str
    original_length: int
    """Tokens before the middle of the document was cut out."""
    chat_template: bool = True

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        """Whether the middle of the document was cut out."""
        return self.original_length != self.length

    def document_part(self, question: str) -> EncodedPrompt:
        """The prompt up to the end of the document, for a question that is fed later."""
        end = self.document_characters[1]
        count = next(
            (index for index, (_, right) in enumerate(self.offsets) if right > end), self.length
        )
        cut = self.original_length - self.length
        return EncodedPrompt(
            token_ids=self.token_ids[:count],
            text=self.text[:end],
            offsets=self.offsets[:count],
            document_span=(self.document_span[0], count),
            document_characters=self.document_characters,
            question_span=(0, 0),
            question=question,
            original_length=count + cut,
            chat_template=self.chat_template,
        )

    def utf16_offsets(self) -> list[list[int]]:
        """`offsets` in UTF-16 units, which is how browsers count."""
        units = _utf16_positions(self.text)
        return [[units[start], units[end]] for start, end in self.offsets]

    def document_utf16_span(self) -> list[int]:
        """`document_characters` in UTF-16 units."""
        units = _utf16_positions(self.text)
        start, end = self.document_characters
        return [units[start], units[end]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What one layer's attention read in one pass, with the batch dimension models have."""

    queries: Tensor
    """Post-RoPE, (rows, num_query_heads, new tokens, head_dim)."""
    keys: Tensor
    """As the attention read them, (rows, heads, positions, head_dim)."""
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    """(num_query_heads,), or of every query, (rows, num_query_heads, new tokens, 1)."""
    bias: Tensor | None = None
    """Added to the logits, (rows, num_query_heads, new tokens, positions)."""

    def row(
        self,
        row: int,
        stored_heads: int,
        *,
        tail: int,
        first: int = 0,
        last: int | None = None,
        earlier: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> LayerObservation:
        """One row's observation.

        Args:
            stored_heads: heads that the cache stores.
            tail: how many of the last queries it needs.
            first: where its prompt begins, after padding.
            last: where its prompt ends; by default with the positions.
            earlier: queries of earlier passes over the same prompt, (num_query_heads, any number,
                head_dim).
            mass: the attention its positions received from all queries.
        """
        positions, new = self.keys.shape[2], self.queries.shape[2]
        end = positions if last is None else last
        queries = self.queries[row, :, : new - (positions - end)]
        queries = queries[:, -tail:] if end - first > tail else queries[:, -(end - first) :]
        if earlier is not None and queries.shape[1] < tail:
            queries = torch.cat([earlier, queries], dim=1)[:, -tail:]
        keys = self.keys[row, :, first:end]
        return LayerObservation(
            queries=queries,
            keys=keys,
            scaling=self.scaling,
            mass=mass,
            softcap=self.softcap,
            sinks=self._sinks(row, end, queries.shape[1]),
            bias=self._bias(row, end, first, queries.shape[1]),
            stored_heads=None if stored_heads == keys.shape[0] else stored_heads,
        )

    def sinks_of(self, row: int) -> Tensor | None:
        """The sinks of one row's queries."""
        return self.sinks if self.sinks is None or self.sinks.dim() == 1 else self.sinks[row]

    def _sinks(self, row: int, end: int, tail: int) -> Tensor | None:
        """The sinks of a row's last `tail` queries before `end`."""
        if self.sinks is None or self.sinks.dim() == 1:
            return self.sinks
        behind = self.keys.shape[2] - end
        return self.sinks[row, :, : self.sinks.shape[2] - behind][:, -tail:].clone()

    def _bias(self, row: int, end: int, first: int, tail: int) -> Tensor | None:
        """The bias of a row's last `tail` queries before `end`."""
        if self.bias is None:
            return None
        behind = self.keys.shape[2] - end
        asked = self.bias[row, :, : self.bias.shape[2] - behind, first:end]
        if asked.shape[1] < tail:
            raise ValueError(
                "this model adds a bias by distance to its attention logits, and a prompt read in "
                "chunks does not keep it; leave out prefill_chunk_size"
            )
        return asked[:, -tail:].clone()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerObservation:
    """What one attention layer saw of the prompt; all a method may look at."""

    queries: Tensor
    """Post-RoPE queries of the last positions, (num_query_heads, tail, head_dim); tail <= prompt
    length."""
    keys: Tensor
    """Post-RoPE keys of the whole prompt, (num_kv_heads, prompt_length, head_dim)."""
    scaling: float
    """Factor on query-key products, usually head_dim ** -0.5."""
    mass: Tensor | None = None
    """Attention each position received from all queries, (num_query_heads, prompt_length), float32,
    when recorded."""
    softcap: float | None = None
    """Bound that the layer puts on its logits: softcap * tanh(logits / softcap)."""
    sinks: Tensor | None = None
    """Learned logits that take part in the softmax and lead nowhere, (num_query_heads,), or one for
    each of `queries`, (num_query_heads, tail, 1)."""
    bias: Tensor | None = None
    """Added to the logits of `queries`, (num_query_heads, tail, prompt_length)."""
    stored_heads: int | None = None
    """Heads that the cache stores, where keys are made anew from it: 1 for a latent."""

    @property
    def prompt_length(self) -> int:
        """Tokens in the prompt."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads that the cache stores, for which positions are chosen; query heads are a multiple
        of them."""
        return self.keys.shape[0] if self.stored_heads is None else self.stored_heads

    @property
    def num_query_heads(self) -> int:
        """Query heads."""
        return self.queries.shape[0]

    def attention(self, first: int, last: int = 0) -> Tensor:
        """Attention mass that the queries from `first` to `last` tokens before the prompt's end pay
        to each position before them, (num_query_heads, prompt_length - first) float32.

        `attention(window_size)` is what the observation window pays to the prefix.
        """
        end = self.queries.shape[1] - last
        queries = self.queries[:, end - (first - last) : end]
        keys = self.keys[:, : self.prompt_length - last]
        bias = self.bias
        if bias is not None:
            bias = bias[:, end - (first - last) : end, : keys.shape[1]]
        sinks = self.sinks
        if sinks is not None and sinks.dim() > 1:
            sinks = sinks[:, end - (first - last) : end]
        return window_attention(queries, keys, self.scaling, self.softcap, sinks, bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallingLayer(LayerObservation):
    """A layer that keeps the attentions it was asked for last, so that choosing again is quick.

    They depend on the window alone: any capacity, kernel or allocation follows from them.
    """

    recalled: OrderedDict[tuple[int, int], Tensor] = field(
        default_factory=OrderedDict, compare=False, repr=False
    )

    def attention(self, first: int, last: int = 0) -> Tensor:
        """The same tensor as `LayerObservation.attention`, computed once; not to be changed."""
        # Taken out and put back, so that threads which ask at once never find it half done.
        found = self.recalled.pop((first, last), None)
        if found is None:
            found = LayerObservation.attention(self, first, last)
        self.recalled[first, last] = found
        while len(self.recalled) > RECALLED:
            self.recalled.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The prompt positions a method keeps in every layer and head."""

    indices: tuple[Heads, ...]
    """Per compressed layer, LongTensor (heads, kept): ascending positions, observation window
    included. With adaptive head budgets a tuple of one LongTensor (kept,) per head."""
    prompt_length: int
    budget_history: tuple[tuple[int, ...], ...] = ()
    """DynamicKV: prefix budgets (window excluded) of the layers seen so far, after each update."""

    @property
    def budgets(self) -> list[int]:
        """Kept prompt tokens per layer and head, observation window included; the mean over heads
        where they differ, which is whole."""
        return [sum(head.shape[0] for head in kept) // len(kept) for kept in self.indices]

    @property
    def kept_fraction(self) -> float:
        """Kept positions over all positions, across layers and heads."""
        heads = [head for kept in self.indices for head in kept]
        return sum(head.shape[0] for head in heads) / (len(heads) * self.prompt_length)

    @classmethod
    def everything(
        cls, observations: Sequence[LayerObservation], granularity: str = "kv_head"
    ) -> Retention:
        """Keep the whole prompt, per KV head or per query head."""
        return cls(
            indices=tuple(
                torch.arange(layer.prompt_length, device=layer.keys.device).expand(
                    layer.num_kv_heads if granularity == "kv_head" else layer.num_query_heads, -1
                )
                for layer in observations
            ),
            prompt_length=observations[0].prompt_length,
        )


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
    seconds: float
    """Without `mass_seconds`."""
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
            RECALLED * layer.num_query_heads * layer.prompt_length * 4 for layer in self.layers
        )
        observed = sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (layer.queries, layer.mass)
            if tensor is not None
        )
        # Keys that were made from a latent lie beside it.
        observed += sum(
            layer.keys.numel() * layer.keys.element_size()
            for layer, stored in zip(self.layers, self.keys, strict=True)
            if layer.keys.data_ptr() != stored.data_ptr()
        )
        logits = self.logits.numel() * self.logits.element_size()
        return self.kv_bytes + observed + recalled + logits


def _utf16_positions(text: str) -> list[int]:
    """UTF-16 position of every character boundary of `text`, len(text) + 1 numbers."""
    positions = [0]
    for character in text:
        positions.append(positions[-1] + (2 if ord(character) > 0xFFFF else 1))
    return positions

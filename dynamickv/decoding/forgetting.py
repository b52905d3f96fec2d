"""Compression that goes on while answering: one cache whose method chooses again as it grows.

What is held never exceeds budget + buffer (the mean per layer and head): room is made before a pass
that would, so that drafts which were taken back cause no choice. A choice reads the last queries,
which are kept as they come, and what the layers hold; between two choices nothing is dropped, so
that what H2O adds up over all queries is computed once for each choice. Knows no model and no text.

Source: the papers compress a prompt. Choosing again every so many tokens is kvpress's
DecodingPress and, for DynamicKV, a reallocation between layers that its paper leaves open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.cache import KVCache
from dynamickv.layers.kv import BLOCK, KVLayer
from dynamickv.methods import CompressionMethod
from dynamickv.methods.decoding import Decoding
from dynamickv.records import Attended, HeldLayer, LayerObservation, Prefill
from dynamickv.scoring import attention_mass


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice while answering."""

    seen: int
    """Positions fed before it, prompt included."""
    rows: tuple[int, ...]
    """The rows that it was about; the others keep what they held."""
    seconds: float


OnChoice = Callable[[Choice], None]


def forgetting_of(
    method: CompressionMethod,
    decoding: Decoding | None,
    prefill: Prefill,
    cache: KVCache,
    on_choice: OnChoice | None = None,
) -> Forgetting | None:
    """What goes on choosing in a cache that `decoding.of_prompt(method)` pruned, which is observed
    from now on; None without `decoding`, and for a method that keeps everything anyway.

    Raises:
        ValueError: the method cannot choose again, or the prefill did not record what it reads.
    """
    if decoding is None or not method.capabilities.capacity:
        return None
    forgetting = Forgetting(method, decoding, on_choice)
    forgetting.read(zip(prefill.places, prefill.layers, strict=True))
    layers = [cache.layers[place] for place in prefill.places]
    masses = {
        place: [layer.mass]
        for place, layer in zip(prefill.places, prefill.layers, strict=True)
        if layer.mass is not None
    }
    if forgetting.needs_mass and not masses:
        raise ValueError(
            f"{method.name} needs the attention of all tokens, and none was recorded; "
            "prefill with mass=True"
        )
    forgetting.begin(layers, masses=masses)
    for layer in layers:
        layer.after_attention = forgetting.saw
    return forgetting


@dataclass(frozen=True, slots=True)
class _Traits:
    """How a layer computes attention."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None


def _traits_of(layer: Attended | LayerObservation) -> _Traits:
    sinks = layer.sinks
    if layer.bias is not None or (sinks is not None and sinks.dim() > 1):
        raise ValueError(
            "this model's attention logits depend on each query's position or sinks, which are not "
            "kept while answering; leave decoding out"
        )
    return _Traits(layer.scaling, layer.softcap, sinks)


class Forgetting:
    """The choices of one cache, from the end of the prompt on."""

    def __init__(
        self, method: CompressionMethod, decoding: Decoding, on_choice: OnChoice | None = None
    ) -> None:
        """Nothing is chosen yet.

        Args:
            on_choice: called after each choice.

        Raises:
            ValueError: the method cannot choose again.
        """
        self._method = decoding.of_answer(method)
        self._decoding, self._on_choice = decoding, on_choice
        self.needs_mass = self._method.needs_mass
        self.choices: list[Choice] = []
        self.before_choice: Callable[[], None] | None = None
        """Asked for queries that were kept elsewhere, see `took`."""
        self._layers: list[KVLayer] = []
        self._padding: list[int] = []
        self._rooms: list[int] = []
        """Positions that each row may still take in."""
        self._since = 0
        """Positions fed since the last choice, or the prompt."""
        self._queries: dict[int, list[Tensor]] = {}
        """By layer, the last queries, (rows, num_query_heads, any number, head_dim) each."""
        self._traits: dict[int, _Traits] = {}
        self._masses: dict[int, list[Tensor]] = {}
        """By layer and row, attention that what is held has received up to the last choice,
        (num_query_heads, held)."""

    def saw(self, layer: KVLayer, attended: Attended) -> None:
        """After a layer's attention, of the prompt or of the answer.

        Raises:
            ValueError: attention that depends on more than queries, keys and sinks.
        """
        if self.before_choice is not None:
            self.before_choice()  # these come after what was kept elsewhere
        self._traits[layer.index] = _traits_of(attended)
        queries = attended.queries
        if not self._layers:
            queries = queries[:, :, -self._method.tail :].clone()
        recent = self._queries.setdefault(layer.index, [])
        recent.append(queries)
        # The newest pass may be taken back, so it does not count.
        spare = sum(part.shape[2] for part in recent[:-1]) - self._method.tail
        if self.needs_mass and self._layers:
            spare = min(spare, sum(part.shape[2] for part in recent) - self._since)
        while recent[0].shape[2] <= spare:
            spare -= recent.pop(0).shape[2]

    def read(self, observations: Iterable[tuple[int, LayerObservation]]) -> None:
        """The same as `saw`, from a finished prefill: layers by their place in the model."""
        for place, layer in observations:
            self._traits[place] = _traits_of(layer)
            self._queries[place] = [layer.queries[None, :, -self._method.tail :]]

    def queries_read(self, room: int) -> int:
        """How many of the queries of the next `room` tokens the next choice reads."""
        return room if self.needs_mass else min(room, self._method.tail)

    def took(self, place: int, queries: Tensor) -> None:
        """The queries of the last tokens of a layer, (rows, num_query_heads, any number, head_dim),
        which nobody saw as they came: all since the last choice, or as many as a choice reads."""
        whole = torch.cat([*self._queries[place], queries], dim=2)
        read = max(self._method.tail, self._since if self.needs_mass else 0)
        self._queries[place] = [whole[:, :, -read:]]

    def begin(
        self,
        layers: Sequence[KVLayer],
        padding: Sequence[int] = (0,),
        masses: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> None:
        """The prompt is compressed; what follows counts.

        Args:
            layers: those to choose for, in the order in which they are read.
            padding: slots before each row's first token.
            masses: for a method that needs it, by layer and row the attention that every position
                of the prompt received, (num_query_heads, prompt_length).
        """
        self._layers, self._padding = list(layers), list(padding)
        for layer in self._layers if self.needs_mass else ():
            assert masses is not None
            rows = zip(layer.rows_held(), masses[layer.index], strict=True)
            self._masses[layer.index] = [
                mass.gather(1, _by_query_head(positions, len(mass)))
                for (_, positions), mass in rows
            ]
        self._since = 0
        self._measure([[p.numel() for _, p in layer.rows_held()] for layer in self._layers])
        for layer in self._layers:
            layer.limit = layer.length + max(self.room, 0)
        self.make_room(0)

    @property
    def buffer(self) -> int:
        """Positions between two choices."""
        return self._decoding.buffer

    @property
    def room(self) -> int:
        """Positions that may be fed before the next choice."""
        return min(self._rooms)

    def make_room(self, count: int) -> bool:
        """Before a pass of `count` tokens in each row: choose again, in the rows where they would
        not fit. Whether it did.

        Raises:
            ValueError: more tokens than a choice makes room for.
        """
        if count <= self.room:
            self._count(count)
            return False
        if count > self._decoding.buffer:
            raise ValueError(
                f"{count} tokens are fed at once and decoding keeps a buffer of "
                f"{self._decoding.buffer}; raise buffer to {count}, or feed fewer"
            )
        self._choose([row for row, room in enumerate(self._rooms) if room < count])
        self._count(count)
        return True

    def _count(self, fed: int) -> None:
        self._rooms = [room - fed for room in self._rooms]
        self._since += fed

    def end(self) -> None:
        """No more tokens come."""
        # Else the layers and this hold each other until the garbage collector comes by.
        self._layers, self.before_choice = [], None

    def crop(self, count: int) -> None:
        """The last `count` positions were taken back."""
        if not self._layers or not count:
            return
        self._count(-count)
        for recent in self._queries.values():
            whole = torch.cat(recent, dim=2)
            recent[:] = [whole[:, :, : whole.shape[2] - count]]

    @torch.no_grad()
    def _choose(self, rows: Sequence[int]) -> None:
        """Choose again in these rows; the others keep what they hold."""
        start = time.perf_counter()
        if self.before_choice is not None:
            self.before_choice()
        observed = [self._observations(layer) for layer in self._layers]
        kept = [[_every_place(one) for one in layer] for layer in observed]
        for row in rows:
            chosen = self._method.choose_again([layer[row] for layer in observed])
            for places_of, places in zip(kept, chosen, strict=True):
                places_of[row] = places
        self._measure([[places.numel() for places in places_of] for places_of in kept])
        # Memory is taken for a block at a time, and never for more than will be held.
        room = min(self.room, BLOCK)
        for layer, places_of, seen in zip(self._layers, kept, observed, strict=True):
            layer.keep_places(places_of, room)
            if self.needs_mass:
                self._masses[layer.index] = [
                    _mass_of(one).gather(1, _by_query_head(places, one.num_query_heads))
                    for places, one in zip(places_of, seen, strict=True)
                ]
            layer.limit = layer.length + self.room
        self._since = 0
        seconds = time.perf_counter() - start
        self.choices.append(Choice(seen=self._layers[0].seen, rows=tuple(rows), seconds=seconds))
        if self._on_choice is not None:
            self._on_choice(self.choices[-1])

    def _observations(self, layer: KVLayer) -> list[HeldLayer]:
        """What one layer holds, row by row."""
        traits = self._traits[layer.index]
        queries = torch.cat(self._queries[layer.index], dim=2)
        rows = []
        for row, (keys, positions) in enumerate(layer.rows_held()):
            asked = queries[row]
            mass = None
            if self.needs_mass:
                recent = asked[:, asked.shape[1] - self._since :]
                mass = F.pad(self._masses[layer.index][row], (0, self._since))
                if self._since:
                    mass += attention_mass(
                        recent, keys, traits.scaling, traits.softcap, traits.sinks
                    )
            tail = min(self._method.tail, layer.seen - self._padding[row])
            rows.append(
                HeldLayer(
                    queries=asked[:, asked.shape[1] - tail :],
                    keys=keys,
                    positions=positions,
                    scaling=traits.scaling,
                    softcap=traits.softcap,
                    sinks=traits.sinks,
                    mass=mass,
                )
            )
        return rows

    def _measure(self, held: Sequence[Sequence[int]]) -> None:
        """How much each row may take in, given what it holds in every layer, all heads together."""
        heads = sum(layer.held()[0].shape[1] for layer in self._layers)
        most = self._decoding.most * heads
        self._rooms = [(most - sum(row)) // heads for row in zip(*held, strict=True)]


def _every_place(layer: HeldLayer) -> Tensor:
    """All that a layer holds, (heads, places)."""
    every = torch.arange(layer.prompt_length, device=layer.keys.device)
    return every.expand(layer.num_kv_heads, -1)


def _mass_of(layer: HeldLayer) -> Tensor:
    assert layer.mass is not None
    return layer.mass


def _by_query_head(positions: Tensor, num_query_heads: int) -> Tensor:
    """Positions of stored heads, (heads, held), as the query heads that read them do."""
    return positions.repeat_interleave(num_query_heads // len(positions), dim=0)

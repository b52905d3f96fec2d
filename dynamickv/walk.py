"""What every method holds while a prompt is read: chosen as layers finish, told as it changes.

The choices are those that would be made afterwards, by the same code in the same order, so that
nothing is computed twice. What is told costs time of its own, and that is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dynamickv.methods import CompressionMethod
from dynamickv.record.events import LayerKept
from dynamickv.record.packed import Retained
from dynamickv.records import EncodedPrompt, Heads, LayerObservation, Retention

if TYPE_CHECKING:
    from dynamickv.models import LoadedModel

SHARE = 0.015
"""Part of the reading time that telling may take. What there is no time for is told later, as it is
then."""
AGAIN = 0.8
"""Part of that for telling earlier layers again, shared evenly by the methods that change them: one
that changes all of them at every layer leaves the others their time."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A method's choice, and the seconds it took."""

    retention: Retention
    seconds: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """Of a layer that was read: its place in the model, heads and bytes."""

    place: int
    heads: int
    head_bytes: int
    """Bytes of one position in one head's keys and values."""

    def bytes_of(self, kept: Heads, later: int) -> int:
        """Bytes that a choice takes with `later` positions after it; stored heads may share one."""
        each = max(1, self.heads // len(kept)) * self.head_bytes
        return (sum(len(head) for head in kept) + later * len(kept)) * each


class Walks:
    """Every method's walk through the layers of one prompt."""

    def __init__(
        self,
        methods: Sequence[CompressionMethod],
        llm: LoadedModel,
        read: EncodedPrompt,
        prompt: EncodedPrompt,
    ) -> None:
        """`read` is what is read before compressing, of the whole `prompt`."""
        self._llm, self._read, self._length = llm, read.length, prompt.length
        self._methods = methods
        self._total = len(llm.geometry.compressed_layers)
        self._walks = [method.begin(self._total, read.length) for method in methods]
        self._seconds = [0.0] * len(methods)
        self._retentions: list[Retention] = []
        self._layers: list[_Layer] = []
        self._changed: list[set[int]] = [set() for _ in methods]
        """Layers of which each walk has something to tell."""
        self._again: dict[int, float] = {}
        """Seconds that telling earlier layers again took, by the walks that ever changed some."""
        self._start = time.perf_counter()
        self._told = 0.0
        """Seconds that telling took."""

    def telling(
        self, tell: Callable[[LayerKept], None]
    ) -> Callable[[int, LayerObservation, tuple[Tensor, Tensor]], None]:
        """What a prefill calls for every layer."""

        def watch(place: int, seen: LayerObservation, stored: tuple[Tensor, Tensor]) -> None:
            keys, values = stored
            each = sum(tensor.shape[2] * tensor.element_size() for tensor in (keys, values))
            self._layers.append(_Layer(place, keys.shape[0], each))
            for index, walk in enumerate(self._walks):
                start = time.perf_counter()
                self._changed[index].update(walk.observe(seen))
                if len(self._layers) == self._total:
                    self._retentions.append(walk.retention())
                self._llm.synchronize()
                self._seconds[index] += time.perf_counter() - start
            self._tell(tell)

        return watch

    def chosen(self) -> list[Chosen]:
        """Every method's choice once all layers are read; each is handed out once."""
        chosen = [Chosen(*pair) for pair in zip(self._retentions, self._seconds, strict=True)]
        self._walks, self._retentions = [], []
        return chosen

    def _tell(self, tell: Callable[[LayerKept], None]) -> None:
        """The newest layer of every method, then, while there is time, what was cut again."""
        newest = len(self._layers) - 1
        ends = bool(self._retentions)
        for index, changed in enumerate(self._changed):
            if ends or newest == 0 or self._told < SHARE * self._elapsed():
                self._tell_layers(index, [newest], tell)
                changed.discard(newest)
        for index, changed in enumerate(self._changed):
            if changed:
                self._again.setdefault(index, 0.0)
        for index, changed in enumerate(self._changed):
            share = AGAIN * SHARE * self._elapsed() / max(1, len(self._again))
            if changed and (ends or self._again[index] < share):
                start = time.perf_counter()
                self._tell_layers(index, sorted(changed), tell)
                self._again[index] += time.perf_counter() - start
                changed.clear()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    def _tell_layers(
        self, index: int, layers: Sequence[int], tell: Callable[[LayerKept], None]
    ) -> None:
        start = time.perf_counter()
        if self._retentions:
            held = [self._retentions[index].indices[layer] for layer in layers]
        else:
            held = self._walks[index].positions_of(layers)
        for layer, kept in zip(layers, held, strict=True):
            tell(self._kept(index, self._layers[layer], kept))
        self._told += time.perf_counter() - start

    def _kept(self, index: int, layer: _Layer, kept: Heads) -> LayerKept:
        later = self._length - self._read
        heads = max(self._llm.geometry.num_kv_heads, len(kept))
        mask = np.zeros((1, heads, self._length), bool)
        mask[..., self._read :] = True
        for head in range(heads):
            mask[0, head, kept[head * len(kept) // heads].cpu().numpy()] = True
        return LayerKept(
            run=index,
            method=self._methods[index].name,
            layer=layer.place,
            budget=sum(len(head) for head in kept) // len(kept),
            retained=Retained.pack(mask),
            kv_bytes=layer.bytes_of(kept, later),
            kv_bytes_full=self._length * layer.heads * layer.head_bytes,
        )

"""One prompt's walk through the layers while it is read: what is observed, what is to be held.

Knows one row of a batch; no cache, no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamickv.methods import CompressionMethod
from dynamickv.methods.selection import Selection
from dynamickv.records import Attended, Heads, Retention
from dynamickv.scoring import attention_mass


class PromptRow:
    """One method's choice for one prompt, layer by layer."""

    def __init__(
        self, method: CompressionMethod, num_layers: int, keeps_masses: bool = False
    ) -> None:
        self._method, self._num_layers = method, num_layers
        self._selection: Selection | None = None
        """Scores so far, until all layers were observed."""
        self._chosen: dict[int, Heads] = {}
        """What layers hold, as it was chosen last."""
        self._retention: Retention | None = None
        self._length = 0
        self.observed = 0
        """Layers that have been observed."""
        self._tails: dict[int, Tensor] = {}
        self._masses: dict[int, Tensor] = {}
        self._keeps_masses = keeps_masses
        self.masses: dict[int, Tensor] = {}
        """Where they are asked to be kept, by layer the attention that the prompt's positions
        received, (num_query_heads, prompt_length)."""

    @property
    def done(self) -> bool:
        """Whether the prompt has gone through all layers."""
        return self.observed == self._num_layers

    @property
    def settled(self) -> bool:
        """Whether all layers hold what they are to hold."""
        return self._retention is not None

    def read_on(self, layer: int, attended: Attended, row: int, length: int) -> None:
        """Remember of a chunk of the prompt, which has `length` tokens, what the choice needs
        later."""
        queries = attended.queries[row]
        earlier = self._tails.get(layer)
        joined = queries if earlier is None else torch.cat([earlier, queries], dim=1)
        self._tails[layer] = joined[:, -self._method.tail :].clone()
        if self._needs_mass(length):
            self._masses[layer] = self._mass(layer, attended, row, queries, 0, None)

    def observe(
        self,
        layer: int,
        attended: Attended,
        row: int,
        stored: int,
        first: int,
        last: int,
        ahead: bool = False,
    ) -> range:
        """Take in a layer once its whole prompt, positions `first` to `last`, was read; the layers
        whose holdings changed.

        Args:
            stored: heads that the cache stores.
            ahead: leave what the device has to be waited for to `catch_up`.
        """
        behind = attended.keys.shape[2] - last
        queries = attended.queries[row, :, : attended.queries.shape[2] - behind]
        self._length = last - first
        mass = None
        if self._needs_mass(self._length):
            mass = self._mass(layer, attended, row, queries[:, -self._length :], first, last)
            if self._keeps_masses:
                self.masses[layer] = mass
        observation = attended.row(
            row,
            stored,
            tail=self._method.tail,
            first=first,
            last=last,
            earlier=self._tails.pop(layer, None),
            mass=mass,
        )
        self.observed += 1
        if self._method.fits(self._length):
            self._chosen[self.observed - 1] = self._method.whole(observation)
            return range(self.observed - 1, self.observed)
        if self._selection is None:
            self._selection = self._method.start(self._num_layers)
        if ahead:
            return self._selection.observe_ahead(observation)
        changed = self._selection.observe(observation)
        return self._selection.tighten() or changed

    def catch_up(self) -> range:
        """What `observe` left undone; the layers whose holdings changed."""
        return range(0) if self._selection is None else self._selection.catch_up()

    def _needs_mass(self, length: int) -> bool:
        return self._method.needs_mass and (self._keeps_masses or not self._method.fits(length))

    def _mass(
        self,
        layer: int,
        attended: Attended,
        row: int,
        queries: Tensor,
        first: int,
        last: int | None,
    ) -> Tensor:
        """Attention received so far from all queries of the prompt."""
        keys = attended.keys[row, :, first:last]
        behind = 0 if last is None else attended.keys.shape[2] - last
        end = attended.queries.shape[2] - behind
        asked = slice(end - queries.shape[1], end)
        sinks, bias = attended.sinks_of(row), None
        if sinks is not None and sinks.dim() > 1:
            sinks = sinks[:, asked]
        if attended.bias is not None:
            bias = attended.bias[row, :, asked, first:last]
        mass = attention_mass(queries, keys, attended.scaling, attended.softcap, sinks, bias)
        earlier = self._masses.pop(layer, None)
        if earlier is not None:
            mass[:, : earlier.shape[1]] += earlier
        return mass

    def positions_of(self, layers: Sequence[int]) -> list[Heads]:
        """What layers are to hold now, counted from the prompt's first token."""
        if self._selection is not None:
            held = self._selection.positions_of(layers)
            self._chosen.update(zip(layers, held, strict=True))
        held = [self._chosen[layer] for layer in layers]
        # One stored head alone needs no cache of its own.
        return [
            kept[0][None] if isinstance(kept, tuple) and len(kept) == 1 else kept for kept in held
        ]

    def settle(self) -> None:
        """Once all layers hold what they are to hold: forget the scores."""
        self._retention = Retention(
            indices=tuple(self._chosen[layer] for layer in range(self._num_layers)),
            prompt_length=self._length,
            budget_history=() if self._selection is None else tuple(self._selection.history),
        )
        self._selection, self._chosen = None, {}

    def retention(self) -> Retention:
        """What all layers hold in the end.

        Raises:
            RuntimeError: before `settle`.
        """
        if self._retention is None:
            raise RuntimeError("the prompt is not through all layers yet; read it to its end")
        return self._retention

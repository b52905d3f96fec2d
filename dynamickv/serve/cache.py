"""The cache that `compress` gives: cut layer by layer while the prompt is read.

Each layer is cut as soon as its attention is computed, and DynamicKV's layers again one layer after
every update of the budgets, so the full cache never exists. On an accelerator the update itself is
read that much later, when the device has the next layer to work on while the host waits. Uses the
same selection code as a finished prefill; knows nothing about prompts' text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynamickv.cache import KVCache, fresh_layers
from dynamickv.decoding.forgetting import Choice, Forgetting
from dynamickv.layers.kv import KVLayer
from dynamickv.layers.parts import HeadwiseLayer
from dynamickv.layers.rows import RowsLayer, in_rows
from dynamickv.methods import CompressionMethod
from dynamickv.methods.decoding import Decoding, require_decodable
from dynamickv.models import Geometry
from dynamickv.models.geometry import require_choosable
from dynamickv.reading.generate_call import GenerateCall
from dynamickv.reading.prompt_row import PromptRow
from dynamickv.records import Attended, Retention
from dynamickv.serve.checks import (
    padding_of,
    require_continuation,
    require_readable,
    require_same_rows,
    require_servable,
)


class CompressedCache(KVCache):
    """A KV cache that keeps what a method chooses of the first prompts fed through it, one prompt
    per row."""

    def __init__(
        self, method: CompressionMethod, config: Any, decoding: Decoding | None = None
    ) -> None:
        self._config = config
        self._geometry = Geometry.of(config)
        require_choosable(self._geometry, method.parameters)
        require_decodable(decoding, method, self._geometry.joint)
        super().__init__(fresh_layers(config, self._after_attention))
        self.method, self.decoding = method, decoding
        self._of_prompt = method if decoding is None else decoding.of_prompt(method)
        self._forgetting = self._fresh_forgetting()
        self.peak_bytes = 0
        """Most bytes of keys, values and states held at once so far. Scores, which a method needs
        until the prompt is through all layers, are not among them."""
        self._rows: list[PromptRow] = []
        self.prompt_end = 0
        """Positions, padding included, with which the prompts end."""
        self._seen = 0
        self._fed: list[Tensor] = []
        """Token ids of every pass, (rows, tokens)."""
        self._call: Any = None
        """Options of the `generate` that feeds this cache now."""
        self._order: list[int] = []
        """Places of the layers to compress, as they were read."""
        self._waiting: Sequence[int] = range(0)
        """Layers that an update changed and that are not cut yet."""
        self.reads_ahead: bool | None = None
        """Whether updates are read one layer later. None: on accelerators; what is kept is the
        same either way."""
        self._reading = False
        """Whether the model is in the middle of a pass, as it is after one that broke off."""
        self._ended = False

    def retention(self, row: int = 0) -> Retention:
        """What was kept of a row's prompt, counted from its first token after padding.

        Raises:
            ValueError: before a prompt has gone through all layers, or a row that is not there.
        """
        if not self._rows or not self._rows[0].settled:
            raise ValueError("no prompt has gone through this cache yet; call generate first")
        if not 0 <= row < len(self._rows):
            raise ValueError(f"row must be from 0 to {len(self._rows) - 1}, got {row!r}")
        kept = self._rows[row].retention()
        by_place = sorted(zip(self._order, kept.indices, strict=True), key=lambda pair: pair[0])
        return replace(kept, indices=tuple(positions for _, positions in by_place))

    @property
    def choices(self) -> list[Choice]:
        """With decoding, the choices since the prompt, in order."""
        return [] if self._forgetting is None else self._forgetting.choices

    def held_positions(self, row: int = 0) -> list[Tensor]:
        """What is held of a row's prompt and answer, counted from its first token after padding:
        per compressed layer, (heads, held) ascending. Not with head_budgets="adaptive"."""
        return [layer.rows_held()[row][1] for layer in self.whole_layers()]

    def _fresh_forgetting(self) -> Forgetting | None:
        return None if self.decoding is None else Forgetting(self.method, self.decoding)

    def reset(self) -> None:
        """Forget the prompt; the next one is compressed anew."""
        self._forgetting = self._fresh_forgetting()
        self.layers = fresh_layers(self._config, self._after_attention)
        self._rows, self.prompt_end, self._seen = [], 0, 0
        self._fed, self._call, self._order, self._waiting = [], None, [], range(0)
        self._reading = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer.

        Raises:
            ValueError: outside of the `compress` block, where nothing observes the model, or by
                another model.
        """
        if self._ended:
            raise ValueError(
                "the compress block of this cache has ended; generate, and ask on, inside it"
            )
        if not self._reading:
            raise ValueError(
                "this cache serves the model that was given to compress, and another one feeds it; "
                "give compress the very model that you call"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many of the last tokens, as drafts that were not confirmed are."""
        super().crop(tokens_to_remove)
        count = abs(int(tokens_to_remove))
        self._seen -= count
        if self._forgetting is not None:
            self._forgetting.crop(count)
        if self._fed:
            whole = torch.cat(self._fed, dim=1)
            self._fed = [whole[:, : max(whole.shape[1] - count, 0)]]

    def end(self) -> None:
        """Serve no more."""
        self._ended = True
        for layer in self.whole_layers():
            # Else cache and layers hold each other until the garbage collector comes by.
            layer.after_attention = None

    # ---- one pass ----

    def begin_pass(
        self,
        call: GenerateCall | None,
        token_ids: Tensor | None,
        rows: int,
        width: int,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        """Before the model's forward pass of `width` tokens in each row, which are to stand at
        `positions`, (rows, width).

        Raises:
            ValueError: what this cache cannot serve, before any work.
        """
        if self._reading:
            raise ValueError(
                "the last pass through this cache broke off, so its layers hold unlike numbers of "
                "tokens; call cache.reset() before the prompt is read again"
            )
        if call is not None and call.cache is not self:
            call = None
        fresh = call is not None and call.options is not self._call
        if call is not None and fresh:
            require_servable(call, self._geometry)
            if self._seen:
                require_continuation(call, self._seen, self._fed, token_ids, width)
            self._call = call.options
        if self._seen == 0:
            self._start(call, token_ids, rows, width, padding_of(mask))
        elif fresh or width > 1 or rows != len(self._rows):
            require_same_rows(self._seen, self._padding, rows, width, mask, positions)
        if self._seen and width > 1 and self._geometry.stepwise:
            raise ValueError(
                f"this model's state starts anew when {width} tokens follow on a filled cache; "
                "leave out prefill_chunk_size, or feed them one at a time"
            )
        if self._forgetting is not None and self._rows[0].done:
            self._forgetting.make_room(width)
        self._reading = True
        self._seen += width
        self._fed = [*self._fed, token_ids] if token_ids is not None else []

    def end_pass(self) -> None:
        """After the model's forward pass.

        Raises:
            ValueError: the prompt went through and a layer that should be compressed was not
                observed.
        """
        self._reading = False
        if self._seen >= self.prompt_end and self._rows and not self._rows[0].done:
            raise ValueError(
                f"of {len(self._geometry.compressed_layers)} layers to compress "
                f"{self._rows[0].observed} were observed, so nothing is sure to be compressed; "
                "choose another model"
            )
        if self._rows and self._rows[0].done and not self._rows[0].settled:
            # Now the device has the rest of the last layer to work on.
            self._settle()
        # Later passes only add, and counting after each of their layers took as long as the layers.
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    @torch.no_grad()
    def _settle(self) -> None:
        """All layers were read: cut those that still hold more than they are to."""
        self._cut(self._late())
        for row in self._rows:
            row.settle()
        if self._forgetting is not None:
            masses = {
                place: [row.masses[place] for row in self._rows]
                for place in (self._order if self._forgetting.needs_mass else ())
            }
            layers = [self.layers[place] for place in self._order]
            self._forgetting.begin(layers, self._padding.tolist(), masses)
            for row in self._rows:
                row.masses.clear()

    def _start(
        self,
        call: GenerateCall | None,
        token_ids: Tensor | None,
        rows: int,
        width: int,
        padding: Tensor | None,
    ) -> None:
        """Get ready for fresh prompts."""
        known = call is not None and token_ids is not None and call.token_ids.shape[1] > 0
        self.prompt_end = call.token_ids.shape[1] if known and call is not None else width
        if padding is None:
            padding = torch.zeros(rows, dtype=torch.long)
        adaptive = getattr(self.method, "head_budgets", "uniform") == "adaptive"
        require_readable(padding, width, self.prompt_end, adaptive)
        self._padding = padding
        layers = len(self._geometry.compressed_layers)
        mass = self._forgetting is not None and self._forgetting.needs_mass
        self._rows = [PromptRow(self._of_prompt, layers, mass) for _ in range(rows)]
        if rows > 1 or bool(padding.any()):
            self.layers = [in_rows(layer, padding) for layer in self.layers]

    @torch.no_grad()
    def _after_attention(self, layer: KVLayer, attended: Attended) -> None:
        if self._forgetting is not None:
            self._forgetting.saw(layer, attended)
        if not self._rows or self._rows[0].done:
            return
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        stored = 1 if self._geometry.joint else layer.held()[0].shape[1]
        if layer.seen < self.prompt_end:
            for number, row in enumerate(self._rows):
                row.read_on(layer.index, attended, number, self.prompt_end)
            return
        self._order.append(layer.index)
        older, ahead = self._late(), self.reads_ahead
        if ahead is None:
            ahead = attended.keys.device.type != "cpu"
        changed = range(0)
        for number, row in enumerate(self._rows):
            first = int(self._padding[number])
            seen = row.observe(layer.index, attended, number, stored, first, self.prompt_end, ahead)
            changed = max(changed, seen, key=len)
        # Where this makes the host wait for the device, the layers before it are cut with
        # the next, so that the host can prepare it while the device works.
        self._waiting = changed[:-1]
        self._cut(changed[-1:])
        self._cut(older)
        if self._rows[0].done and not ahead:
            self._settle()

    def _late(self) -> Sequence[int]:
        """The layers that an earlier one's update changed and that are not cut yet."""
        read = [row.catch_up() for row in self._rows]
        return max([self._waiting, *read], key=len)

    def _cut(self, layers: Sequence[int]) -> None:
        """Let layers hold no more than they are to hold now."""
        if not layers:
            return
        chosen = [row.positions_of(layers) for row in self._rows]
        for index, kept in zip(layers, zip(*chosen, strict=True), strict=True):
            place = self._order[index]
            held = self.layers[place]
            if isinstance(held, RowsLayer):
                held.keep_rows([row for row in kept if isinstance(row, Tensor)])
                continue
            positions = kept[0]
            if isinstance(positions, tuple) and not isinstance(held, HeadwiseLayer):
                held = self.layers[place] = HeadwiseLayer.split(held, len(positions))
            held.keep(positions)

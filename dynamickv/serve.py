"""Prune while prefilling: a cache for any transformers model's own `generate`.

Each layer is cut as soon as its attention is computed, and DynamicKV's layers again one layer after
every update of the budgets, so the full cache never exists. Uses the same selection code as a
finished prefill; knows nothing about prompts' text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynamickv.cache import HeadwiseLayer, KVCache, KVLayer
from dynamickv.methods import CompressionMethod
from dynamickv.methods.base import Selection
from dynamickv.models import Geometry
from dynamickv.models.rope import longer_sequences_forgotten
from dynamickv.reading.observe import observed
from dynamickv.records import LayerObservation, Retention
from dynamickv.scoring import attention_mass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressedCache(KVCache):
    """A KV cache that keeps what a method chooses of the first prompt fed through it."""

    def __init__(self, method: CompressionMethod, geometry: Geometry) -> None:
        super().__init__(geometry.num_layers, self._after_attention, geometry.windows)
        self.method = method
        self._geometry = geometry
        self.peak_bytes = 0
        """Most bytes of keys and values held at once so far."""
        self._selection: Selection | None = None
        self._observed = 0
        self._kept: list[Tensor] = []
        self._waiting: list[int] = []
        """Layers that an update changed and that are not cut yet."""

    def retention(self) -> Retention:
        """What was kept of the prompt.

        Raises:
            ValueError: before a prompt has gone through all layers.
        """
        if self._observed < len(self._geometry.compressed_layers):
            raise ValueError("no prompt has gone through this cache yet; call generate first")
        if self._selection is not None:
            return self._selection.retention()
        return Retention(indices=tuple(self._kept), prompt_length=self._kept[0].shape[1])

    def reset(self) -> None:
        """Forget the prompt; the next one is compressed anew."""
        fresh = KVCache(self._geometry.num_layers, self._after_attention, self._geometry.windows)
        self.layers = fresh.layers
        self._selection, self._observed, self._kept, self._waiting = None, 0, [], []

    @torch.no_grad()
    def _after_attention(self, layer: KVLayer, queries: Tensor, scaling: float) -> None:
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        places = self._geometry.compressed_layers
        if self._observed == len(places):
            return
        self._observed += 1
        keys = layer.held()[0][0]
        prompt_length = keys.shape[1]
        if self.method.fits(prompt_length):
            observation = LayerObservation(queries=queries[0], keys=keys, scaling=scaling)
            whole = self.method.whole(observation)
            self._kept.append(whole)
            if whole.shape[1] < prompt_length:
                layer.keep(whole)
            return
        if self._selection is None:
            self._selection = self.method.start(len(places))
        mass = attention_mass(queries[0], keys, scaling) if self.method.needs_mass else None
        changed = self._selection.observe(
            LayerObservation(
                queries=queries[0, :, -self.method.tail :], keys=keys, scaling=scaling, mass=mass
            )
        )
        # An update makes the host wait for the device. The layers before this one are cut with the
        # next, so that the host can prepare it while the device works.
        older, self._waiting = self._waiting, list(changed[:-1])
        self._cut(changed[-1:])
        self._cut(older)
        if self._observed == len(places):
            self._cut(self._waiting)

    def _cut(self, layers: Sequence[int]) -> None:
        """Let layers hold no more than they are to hold now."""
        if not layers or self._selection is None:
            return
        places = self._geometry.compressed_layers
        for index, kept in zip(layers, self._selection.positions_of(layers), strict=True):
            held = self.layers[places[index]]
            assert isinstance(held, KVLayer)
            if isinstance(kept, tuple) and not isinstance(held, HeadwiseLayer):
                held = self.layers[places[index]] = HeadwiseLayer.split(held, len(kept))
            held.keep(kept)


@contextmanager
def compress(model: PreTrainedModel, method: CompressionMethod) -> Iterator[CompressedCache]:
    """A cache to pass to `generate(..., past_key_values=cache)`, one prompt at a time.

        with compress(model, DynamicKV(capacity=512)) as cache:
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

    The prompt is what the first forward pass feeds; later tokens, of the answer or of a follow-up
    question, are kept. `cache.reset()` makes it ready for another prompt. When the block ends the
    model is as it was.

    Raises:
        ValueError: before any work, for a model or a batch that cannot be compressed.
    """
    if not isinstance(method, CompressionMethod):
        raise ValueError(f"{method!r} is not a method; give one such as DynamicKV(capacity=512)")
    cache = CompressedCache(method, Geometry.of(model.config))
    other = getattr(model.generation_config, "cache_implementation", None)
    if other is not None:
        raise ValueError(
            f"generation_config.json of {model.name_or_path or 'this model'} asks for a {other} "
            "cache (cache_implementation), and generate takes none beside it; "
            "set model.generation_config.cache_implementation = None"
        )

    def check(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if named.get("past_key_values") is cache:
            _require_single_prompt(arguments, named)

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        with longer_sequences_forgotten(model), observed(model):
            yield cache
    finally:
        handle.remove()


def _require_single_prompt(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse batches, beams and padding, which a cache with one choice per prompt cannot serve."""
    ids = named.get("input_ids", arguments[0] if arguments else None)
    ids = named.get("inputs_embeds") if ids is None else ids
    if ids is not None and ids.shape[0] != 1:
        raise ValueError(
            f"the batch has {ids.shape[0]} sequences and a compressed cache serves one; "
            "generate them one by one, without beam search"
        )
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
        raise ValueError(
            "the attention mask hides padding, which a compressed cache cannot tell from text; "
            "pass the prompt without padding"
        )

"""Prune while prefilling: a cache for any transformers model's own `generate`.

Each layer is cut as soon as its attention is computed, and DynamicKV's layers again one layer after
every update of the budgets, so the full cache never exists. Uses the same selection code as a
finished prefill; knows nothing about prompts' text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynamickv.cache import KVCache, fresh_layers
from dynamickv.layers.kv import HeadwiseLayer, KVLayer
from dynamickv.layers.rows import RowsLayer, in_rows
from dynamickv.methods import CompressionMethod
from dynamickv.models import Geometry
from dynamickv.models.geometry import require_choosable
from dynamickv.models.rope import longer_sequences_forgotten
from dynamickv.reading.generate_call import GenerateCall, generate_call
from dynamickv.reading.observe import cache_argument, observed
from dynamickv.reading.prompt_row import PromptRow
from dynamickv.records import Attended, Retention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")
"""What models call their cache, transformers' newer versions and older ones."""


class CompressedCache(KVCache):
    """A KV cache that keeps what a method chooses of the first prompts fed through it, one prompt
    per row."""

    def __init__(self, method: CompressionMethod, config: Any) -> None:
        self._config = config
        self._geometry = Geometry.of(config)
        super().__init__(fresh_layers(config, self._after_attention))
        self.method = method
        self.peak_bytes = 0
        """Most bytes of keys, values and states held at once so far."""
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
        self._waiting: list[int] = []
        """Layers that an update changed and that are not cut yet."""
        self._reading = False
        """Whether the model is in the middle of a pass, as it is after one that broke off."""
        self._ended = False

    def retention(self, row: int = 0) -> Retention:
        """What was kept of a row's prompt, counted from its first token after padding.

        Raises:
            ValueError: before a prompt has gone through all layers, or a row that is not there.
        """
        if not self._rows or not self._rows[0].done:
            raise ValueError("no prompt has gone through this cache yet; call generate first")
        if not 0 <= row < len(self._rows):
            raise ValueError(f"row must be from 0 to {len(self._rows) - 1}, got {row!r}")
        kept = self._rows[row].retention()
        by_place = sorted(zip(self._order, kept.indices, strict=True), key=lambda pair: pair[0])
        return replace(kept, indices=tuple(positions for _, positions in by_place))

    def reset(self) -> None:
        """Forget the prompt; the next one is compressed anew."""
        self.layers = fresh_layers(self._config, self._after_attention)
        self._rows, self.prompt_end, self._seen = [], 0, 0
        self._fed, self._call, self._order, self._waiting = [], None, [], []
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
        left = self._seen = self._seen - abs(tokens_to_remove)
        whole = torch.cat(self._fed, dim=1)[:, :left] if self._fed else None
        self._fed = [] if whole is None else [whole]

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
            self._check(call, token_ids, width)
            self._call = call.options
        if self._seen == 0:
            self._start(call, token_ids, rows, width, _padding(mask))
        elif fresh or width > 1 or rows != len(self._rows):
            self._check_rows(rows, width, mask, positions)
        if self._seen and width > 1 and self._geometry.stepwise:
            raise ValueError(
                f"this model's state starts anew when {width} tokens follow on a filled cache; "
                "leave out prefill_chunk_size, or feed them one at a time"
            )
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

    def _check(self, call: GenerateCall, token_ids: Tensor | None, width: int) -> None:
        """Refuse what a `generate` asks for and this cache cannot serve."""
        if (getattr(call.options, "num_beams", None) or 1) > 1:
            raise ValueError(
                f"num_beams={call.options.num_beams} exchanges rows of the cache, which a "
                "compressed one cannot; generate without beam search (num_beams=1, or sampling)"
            )
        switch, length = self._geometry.switch, call.token_ids.shape[1]
        most = getattr(call.options, "max_length", None)
        if switch and length <= switch and most and most > switch:
            raise ValueError(
                f"the answer would cross {switch:,} tokens, where this model turns all keys by "
                f"other frequencies; lower max_new_tokens to {switch - length} or read a prompt "
                "that is longer already"
            )
        if self._seen == 0 or token_ids is None or not self._fed:
            return
        new = length - self._seen
        fed = torch.cat(self._fed, dim=1)
        known = call.token_ids.to(fed.device)
        goes_on = new > 0 and width >= new and torch.equal(known[:, : self._seen], fed)
        if not goes_on and length != width:
            raise ValueError(
                f"this cache holds {self._seen} tokens that are not the beginning of the "
                f"{length} given; call cache.reset() before another prompt"
            )
        if not goes_on and torch.equal(known[:, : fed.shape[1]], fed[:, :length]):
            raise ValueError(
                f"this cache holds all {length} tokens of the prompt already; give what follows "
                "them too, or call cache.reset()"
            )

    def _check_rows(
        self, rows: int, width: int, mask: Tensor | None, positions: Tensor | None
    ) -> None:
        """Refuse other rows than those held, and tokens that do not follow what is held."""
        if rows != len(self._rows):
            raise ValueError(
                f"the batch has {rows} sequences and this cache holds {len(self._rows)}; "
                "call cache.reset() before other prompts"
            )
        first = self._seen - int(self._padding[0])
        if positions is not None and positions.dim() == 2 and int(positions[0, 0]) != first:
            raise ValueError(
                f"{width} tokens are fed at position {int(positions[0, 0])} to a cache that holds "
                f"{first}; call cache.reset() before another prompt"
            )
        padding = _padding(mask)
        if padding is None or mask is None:
            return
        if mask.shape[1] != self._seen + width:
            raise ValueError(
                f"{width} tokens are fed to a cache that holds {self._seen}, and the attention "
                f"mask has {mask.shape[1]}; call cache.reset() before another prompt"
            )
        if self._padding.tolist() != padding.tolist():
            raise ValueError(
                "the attention mask hides padding other than the prompts'; "
                "pad the prompts alone, on the left"
            )

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
        if self.prompt_end > width and bool(padding.any()):
            raise ValueError(
                "prompts of unlike length cannot be read in chunks; leave out prefill_chunk_size, "
                "or generate the prompts one by one"
            )
        if bool((padding >= width).any()):
            raise ValueError("a row of the batch is padding alone; leave out empty prompts")
        if rows > 1 and getattr(self.method, "head_budgets", "uniform") == "adaptive":
            raise ValueError(
                f"head_budgets='adaptive' serves one prompt at a time, and the batch has {rows}; "
                "generate them one by one, or use head_budgets='uniform'"
            )
        self._padding = padding
        layers = len(self._geometry.compressed_layers)
        self._rows = [PromptRow(self.method, layers) for _ in range(rows)]
        if rows > 1 or bool(padding.any()):
            self.layers = [in_rows(layer, padding) for layer in self.layers]

    @torch.no_grad()
    def _after_attention(self, layer: KVLayer, attended: Attended) -> None:
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        if not self._rows or self._rows[0].done:
            return
        stored = 1 if self._geometry.joint else layer.held()[0].shape[1]
        if layer.seen < self.prompt_end:
            for number, row in enumerate(self._rows):
                row.read_on(layer.index, attended, number)
            return
        self._order.append(layer.index)
        changed = range(0)
        for number, row in enumerate(self._rows):
            first = int(self._padding[number])
            seen = row.observe(layer.index, attended, number, stored, first, self.prompt_end)
            changed = max(changed, seen, key=len)
        # An update makes the host wait for the device. The layers before this one are cut with the
        # next, so that the host can prepare it while the device works.
        older, self._waiting = self._waiting, list(changed[:-1])
        self._cut(changed[-1:])
        self._cut(older)
        if self._rows[0].done:
            self._cut(self._waiting)

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


def _padding(mask: Tensor | None) -> Tensor | None:
    """Hidden tokens before each row's first, (rows,), None without a mask of tokens.

    Raises:
        ValueError: tokens are hidden elsewhere.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    shown = mask.bool()
    padding = shown.shape[1] - shown.sum(dim=1)
    places = torch.arange(shown.shape[1], device=mask.device)
    if not torch.equal(shown, places >= padding[:, None]):
        raise ValueError(
            "the attention mask hides padding between or behind tokens, which a compressed cache "
            "cannot tell from text; pad prompts on the left"
        )
    return padding.cpu()


@contextmanager
def compress(model: PreTrainedModel, method: CompressionMethod) -> Iterator[CompressedCache]:
    """A cache to pass to `generate(..., past_key_values=cache)`.

        with compress(model, DynamicKV(capacity=512)) as cache:
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

    The prompt is what `generate` is given, or what the first forward pass feeds; several prompts
    are the rows of a batch, padded on the left, each compressed by itself. Later tokens, of the
    answer or of a follow-up question, are kept. `cache.reset()` makes it ready for other prompts.
    When the block ends the model is as it was, and the cache serves no more.

    Raises:
        ValueError: before any work, for a model or a request that cannot be served.
    """
    if not isinstance(method, CompressionMethod):
        raise ValueError(f"{method!r} is not a method; give one such as DynamicKV(capacity=512)")
    cache = CompressedCache(method, model.config)
    require_choosable(cache._geometry, method.parameters)
    other = getattr(model.generation_config, "cache_implementation", None)
    if other is not None:
        raise ValueError(
            f"generation_config.json of {model.name_or_path or 'this model'} asks for a {other} "
            "cache (cache_implementation), and generate takes none beside it; "
            "set model.generation_config.cache_implementation = None"
        )

    prompt_logits: Tensor | None = None

    def before(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal prompt_logits
        call = generate_call()
        given = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
        if given is None and call is not None and call.cache is cache:
            # Longrope models drop an empty cache when a prompt is longer than the switch.
            if cache.get_seq_length() > 0:
                if getattr(call.options, "guidance_scale", None) not in (None, 1):
                    return None  # what guidance is measured from, which has a cache of its own
                raise ValueError(
                    "this model drops its cache here and would read all tokens again; "
                    "lower max_new_tokens, or read a prompt that is longer already"
                )
            given = cache
            named |= cache_argument(model, cache)
        if given is not cache:
            return None
        prompt_logits = None
        if named.get("use_cache") is False:
            raise ValueError(
                "use_cache=False feeds all tokens again at every step, and a compressed cache "
                "would keep them all; leave it out, or set model.generation_config.use_cache=True"
            )
        ids = named.get("input_ids", arguments[0] if arguments else None)
        embeds = named.get("inputs_embeds")
        prompt = call.token_ids.shape[1] if call is not None and call.cache is cache else 0
        if cache.get_seq_length() == 0 and ids is not None and 0 < prompt < ids.shape[1]:
            # Drafts follow the prompt in one pass. They are to see the compressed cache, so the
            # prompt is read apart.
            read = {**named, "input_ids": ids[:, :prompt], "logits_to_keep": 1}
            named = {**named, "input_ids": ids[:, prompt:]}
            for name, last in (("attention_mask", prompt), ("position_ids", prompt)):
                if isinstance(named.get(name), Tensor):
                    read[name] = named[name][..., :last]
            if isinstance(named.get("position_ids"), Tensor):
                named["position_ids"] = named["position_ids"][..., prompt:]
            prompt_logits = module(**read).logits[:, -1:]
            ids = named["input_ids"]
        rows, width = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        cache.begin_pass(call, ids, rows, width, mask, positions)
        return arguments if "input_ids" not in named else (), named

    def after(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        nonlocal prompt_logits
        if not any(named.get(name) is cache for name in CACHE_NAMES):
            return None
        cache.end_pass()
        if prompt_logits is not None:
            output.logits = torch.cat([prompt_logits, output.logits], dim=1)
            prompt_logits = None
        return output

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with longer_sequences_forgotten(model), observed(model):
            yield cache
    finally:
        cache.end()
        for handle in handles:
            handle.remove()

"""The registered attention function: the backend's own attention, seen from one step away.

A layer of `KVCache` tags the keys it returns. For tagged keys this function builds the mask that
layer needs (layers differ in length, so the model's shared mask cannot fit them all), calls the
backend, and then hands the layer its post-RoPE queries. For other keys it is the backend,
untouched. Nothing is patched: the function is registered with transformers under
"dynamickv_<backend>" and selected like any other; in the names of flash kinds some letters are
exchanged, see LOADED.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import transformers  # its parts load when named, which takes seconds: the page is up before
from torch import Tensor, nn

from dynamickv.layers.kv import KVLayer, attended_layer
from dynamickv.layers.parts import BatchedLayer, HeadwiseLayer
from dynamickv.layers.rows import RowsLayer
from dynamickv.records import Attended

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "dynamickv_"
LOADED = {"flash": "FLASH", "/": "|"}
"""What makes transformers look for a kernel of that very name, and what stands for it in ours."""
MASKED_BACKENDS = ("eager", "sdpa")
"""Backends that take a mask tensor; the flash kinds align causality to the end by themselves."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One attention of one pass, as a watcher is told."""

    place: int
    """The layer, by its place in the model."""
    source: int | None
    """The layer of ours whose keys were read, by its place; None where no method compresses
    them."""
    attended: Attended
    visible: Tensor | None
    """Which positions each new token sees, boolean (1 or query heads, new, positions); None: all
    up to its own."""


Watcher = Callable[[Seen], None]
_watching: ContextVar[Watcher | None] = ContextVar("watching", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell of every attention that is computed inside the block, in this thread."""
    token = _watching.set(watcher)
    try:
        yield
    finally:
        _watching.reset(token)


def backend_of(model: PreTrainedModel) -> str:
    """The attention backend a model computes with, whether observed or not."""
    name = str(model.config._attn_implementation)
    if not name.startswith(PREFIX):
        return name
    backend = name.removeprefix(PREFIX)
    for theirs, ours in LOADED.items():
        backend = backend.replace(ours, theirs)
    return backend


def _observing(backend: str) -> str:
    """The name under which a backend's observing form is registered."""
    for theirs, ours in LOADED.items():
        backend = backend.replace(theirs, ours)
    return PREFIX + backend


def uses_registry(model: PreTrainedModel) -> bool:
    """Whether a model's code takes its attention from transformers' registry, be it announced by
    the class or not."""
    code = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    return any(
        hasattr(part, "ALL_ATTENTION_FUNCTIONS") and hasattr(part, "eager_attention_forward")
        for part in code
    )


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The cache under the name by which the model's forward pass takes it: "cache" since
    transformers 5.24, "past_key_values" before."""
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@contextmanager
def observed(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention be observed inside the block; afterwards it is as it was."""
    before = str(model.config._attn_implementation)
    if before.startswith(PREFIX):
        yield
        return
    set_observed(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def set_observed(model: PreTrainedModel) -> None:
    """Select the observing form of the model's backend.

    Raises:
        ValueError: if the model does not compute attention through transformers' registry, or its
            backend leaves out what the model's attention needs.
    """
    backend = backend_of(model)
    if "flex" in backend or "paged" in backend:
        raise ValueError(
            f"attention {backend!r} cannot be observed; load {type(model).__name__} with "
            'attention="sdpa"'
        )
    bound = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if backend == "sdpa" and bound is not None:  # transformers before 5.21 computes without it
        raise ValueError(
            f"attention 'sdpa' leaves out the bound of {bound:g} that {type(model).__name__} puts "
            'on its attention logits; load it with attention="eager"'
        )
    if not uses_registry(model):
        raise ValueError(
            f"{type(model).__name__} computes attention in its own code instead of through "
            "transformers' AttentionInterface, so it cannot be observed; choose another model"
        )
    name = _observing(backend)
    masks = transformers.AttentionMaskInterface()  # type: ignore[no-untyped-call]
    functions = transformers.AttentionInterface()  # type: ignore[no-untyped-call]
    attention = None if backend == "eager" else functions[backend]
    transformers.AttentionInterface.register(name, partial(_observed_attention, backend, attention))
    transformers.AttentionMaskInterface.register(name, masks[backend])
    model.set_attn_implementation(name)


def _observed_attention(
    backend: str,
    attention: Attention | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # Each model file defines its own eager attention, which is not in the registry.
    attention = attention or sys.modules[type(module).__module__].eager_attention_forward
    layer, grown = attended_layer(key, getattr(module, "layer_idx", None))
    watcher = _watching.get()
    if watcher is not None:
        seen = _seen(
            module, layer, grown, _attended(query, key, value, kwargs), attention_mask, kwargs
        )
        if seen is not None:
            watcher(seen)
    if layer is None:
        return attention(
            _stand_in(backend, module, query, key), query, key, value, attention_mask, **kwargs
        )
    output: tuple[Tensor, Tensor | None]
    if isinstance(layer, (BatchedLayer, HeadwiseLayer)):
        output = _of_parts(backend, attention, layer, (module, kwargs), query), None
    elif query.shape[2] < key.shape[2]:
        output = _continue(backend, attention, layer, (module, kwargs), query, key, value)
    else:
        output = attention(
            _stand_in(backend, module, query, key), query, key, value, attention_mask, **kwargs
        )
    if layer.after_attention is not None and grown:
        layer.after_attention(layer, _attended(query, key, value, kwargs))
    return output


def _attended(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Attended:
    scaling = kwargs.get("scaling")
    return Attended(
        queries=query,
        keys=key,
        values=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux", kwargs.get("sinks")),
        bias=kwargs.get("position_bias"),
    )


def _seen(
    module: nn.Module,
    layer: KVLayer | None,
    grown: bool,
    attended: Attended,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Seen | None:
    """What a watcher is told; nothing of a layer that does not know its place."""
    place = layer.index if layer is not None and grown else getattr(module, "layer_idx", None)
    if place is None:
        return None
    new, held = attended.queries.shape[2], attended.keys.shape[2]
    visible = None
    if layer is None and mask is not None:
        given = mask[0, :, -new:, -held:]
        visible = given if given.dtype == torch.bool else given == 0
    elif layer is None and kwargs.get("sliding_window"):
        ones = torch.ones(new, held, dtype=torch.bool, device=attended.queries.device)
        visible = ones.tril(held - new).triu(held - new - kwargs["sliding_window"] + 1)
    return Seen(place, None if layer is None else layer.index, attended, visible)


def _of_parts(
    backend: str,
    attention: Attention,
    layer: KVLayer,
    given: tuple[Any, dict[str, Any]],
    query: Tensor,
) -> Tensor:
    """The backend's attention of new tokens over what a layer holds, part by part where it is made
    of several."""
    module, kwargs = given
    if isinstance(layer, HeadwiseLayer):
        heads, queries = layer.heads, query.chunk(len(layer.heads), dim=1)
        own = [_of_head(module, kwargs, head, len(heads)) for head in range(len(heads))]
        each = zip(heads, own, queries, strict=True)
        return torch.cat([_of_parts(backend, attention, *head) for head in each], dim=2)
    if not isinstance(layer, BatchedLayer):
        held = (states.to(query.dtype) for states in layer.held())
        return _continue(backend, attention, layer, given, query, *held)[0]
    outputs = []
    # Learned sinks and biases have rows where they depend on the query.
    split = {
        name: torch.split(value, layer.rows)
        for name in ("position_bias", "s_aux", "sinks")
        if isinstance(value := kwargs.get(name), Tensor) and value.dim() > 1
    }
    for number, (part, asked) in enumerate(
        zip(layer.parts, torch.split(query, layer.rows), strict=True)
    ):
        of_part = kwargs | {name: values[number] for name, values in split.items()}
        outputs.append(_of_parts(backend, attention, part, (module, of_part), asked))
        if part.after_attention is not None:
            part.after_attention(part, _attended(asked, *part.held(), of_part))
    return torch.cat(outputs)


def _of_head(
    module: Any, kwargs: dict[str, Any], head: int, heads: int
) -> tuple[Any, dict[str, Any]]:
    """Module and arguments for one stored head alone: of learned sinks and biases, only its query
    heads'."""
    sinks, bias = kwargs.get("s_aux"), kwargs.get("position_bias")
    if bias is not None:
        kwargs = kwargs | {"position_bias": bias.chunk(heads, dim=1)[head]}
    if sinks is None:
        return module, kwargs
    own = sinks.chunk(heads)[head]
    return _Changed(module, sinks=own), kwargs | {"s_aux": own}


def _continue(
    backend: str,
    attention: Attention,
    layer: KVLayer,
    given: tuple[Any, dict[str, Any]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The backend's attention of new tokens over what a cache holds."""
    module, kwargs = given
    mask = _continuation_mask(backend, layer, query, key)
    if kwargs.get("position_bias") is not None:
        kwargs = kwargs | {"position_bias": _bias_of_held(kwargs["position_bias"], layer, query)}
    rows, heads, new, _ = query.shape
    group = heads // key.shape[1]
    # transformers' "sdpa" copies keys and values for every query head once there is a mask; the
    # queries of a group as those of one head need no copy.
    packed = backend == "sdpa" and mask is not None and kwargs.get("position_bias") is None
    if packed and mask is not None:
        query = query.reshape(rows, key.shape[1], group * new, -1)
        if new > 1:
            mask = mask.repeat(1, 1, group, 1)
    with _kernels(query):
        module = _stand_in(backend, module, query, key)
        output, shares = attention(module, query, key, value, mask, **kwargs)
    if packed:
        output = output.transpose(1, 2).reshape(rows, heads, new, -1).transpose(1, 2).contiguous()
    return output, shares


def _bias_of_held(bias: Tensor, layer: KVLayer, query: Tensor) -> Tensor:
    """Of a learned bias over all positions, (rows, query heads, new, positions), what is for those
    that a layer holds."""
    positions = layer.held_positions()
    if positions is None:
        return bias
    heads = positions.repeat_interleave(bias.shape[1] // positions.shape[1], dim=1)
    return bias.gather(3, heads[:, :, None].expand(-1, -1, query.shape[2], -1))


def _kernels(query: Tensor) -> AbstractContextManager[None]:
    """Keep cuDNN's attention away from decoding: it builds a plan for every new shape, and every
    length of every layer is one (measured on an H200: 1 s per token; 30 ms without)."""
    return without_cudnn() if query.is_cuda else nullcontext()


@dataclass(slots=True)
class _KeptAway:
    """The blocks that are open in all threads: torch has one switch for them."""

    lock: Lock = field(default_factory=Lock)
    blocks: int = 0
    before: bool = True


@cache
def _kept_away() -> _KeptAway:
    return _KeptAway()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """No attention by cuDNN inside the block; what torch's `sdpa_kernel` does, in a twentieth of
    its time, which every layer of every step takes."""
    kept_away = _kept_away()
    with kept_away.lock:
        if kept_away.blocks == 0:
            kept_away.before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
        kept_away.blocks += 1
    try:
        yield
    finally:
        with kept_away.lock:
            kept_away.blocks -= 1
            if kept_away.blocks == 0:
                torch.backends.cuda.enable_cudnn_sdp(kept_away.before)


def _continuation_mask(backend: str, layer: KVLayer, query: Tensor, key: Tensor) -> Tensor | None:
    """New tokens see everything the layer holds, and each other causally; a row of several sees
    nothing where it holds less than the others."""
    new, held = query.shape[2], key.shape[2]
    unused = None
    if isinstance(layer, RowsLayer):
        unused = getattr(key, "kv_unused", layer.unused)
    if backend not in MASKED_BACKENDS or (new == 1 and unused is None):
        if unused is not None:
            raise ValueError(
                f"attention {backend!r} cannot tell rows of unlike length apart; "
                'load the model with attention="sdpa", or generate the prompts one by one'
            )
        return None
    if new == 1 and isinstance(layer, RowsLayer) and unused is layer.unused:
        return layer.added(held, query.dtype)
    visible = torch.ones(new, held, dtype=torch.bool, device=query.device).tril_(held - new)[
        None, None
    ]
    if unused is not None:
        slots = torch.arange(held, device=query.device)
        visible = visible & (slots >= unused[:, None])[:, None, None]
    if backend == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill_(
        ~visible, torch.finfo(query.dtype).min
    )


def _stand_in(backend: str, module: Any, query: Tensor, key: Tensor) -> Any:
    """The module, or one that says what is so here: how many query heads share a stored head, and
    to the flash kinds, which read it from the model's configuration, their own name."""
    group = query.shape[1] // key.shape[1]
    changes: dict[str, Any] = {}
    if getattr(module, "num_key_value_groups", group) != group:
        changes["num_key_value_groups"] = group
    if backend not in MASKED_BACKENDS and hasattr(module, "config"):
        changes["config"] = _Changed(module.config, _attn_implementation=backend)
    return _Changed(module, **changes) if changes else module


class _Changed:
    """An object's attributes, some of them replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self._original = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

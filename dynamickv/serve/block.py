"""The `compress` block: while it is open, a model feeds the cache that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynamickv.methods import CompressionMethod
from dynamickv.methods.decoding import Decoding
from dynamickv.models.rope import longer_sequences_forgotten
from dynamickv.reading.generate_call import generate_call
from dynamickv.reading.observe import cache_argument, observed
from dynamickv.serve.cache import CompressedCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")
"""What models call their cache, transformers' newer versions and older ones."""

_open: WeakKeyDictionary[PreTrainedModel, tuple[int, ExitStack]] = WeakKeyDictionary()
"""How many blocks are open on a model, and what is to be undone when the last one ends."""
_opening = Lock()


@contextmanager
def compress(
    model: PreTrainedModel, method: CompressionMethod, decoding: Decoding | None = None
) -> Iterator[CompressedCache]:
    """A cache to pass to `generate(..., past_key_values=cache)`.

        with compress(model, DynamicKV(capacity=512)) as cache:
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

    The prompt is what `generate` is given, or what the first forward pass feeds; several prompts
    are the rows of a batch, padded on the left, each compressed by itself. Later tokens, of the
    answer or of a follow-up question, are kept; with `decoding` the method chooses again among all
    that is held whenever its budget and buffer are full. `cache.reset()` makes it ready for other
    prompts. When the block ends the model is as it was, and the cache serves no more.

    Raises:
        ValueError: before any work, for a model or a request that cannot be served.
    """
    if not isinstance(method, CompressionMethod):
        raise ValueError(f"{method!r} is not a method; give one such as DynamicKV(capacity=512)")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"compress takes a transformers model, got {type(model).__name__}; "
            "of what load_model gives, that is its .model"
        )
    cache = CompressedCache(method, model.config, decoding)
    other = getattr(model.generation_config, "cache_implementation", None)
    if other is not None:
        raise ValueError(
            f"generation_config.json of {model.name_or_path or 'this model'} asks for a {other} "
            "cache (cache_implementation), and generate takes none beside it; "
            "set model.generation_config.cache_implementation = None"
        )

    prompt_logits: Tensor | None = None

    # Torch tells a hook nothing by name before it has registered it whole: what comes in that
    # moment, or while it is removed, is another thread's pass with another cache.
    def before(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal prompt_logits
        if named is None:
            return None
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
            named = {**named, **cache_argument(model, cache)}
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

    def after(module: nn.Module, arguments: tuple[Any, ...], named: Any, output: Any = None) -> Any:
        nonlocal prompt_logits
        if output is None or not any(named.get(name) is cache for name in CACHE_NAMES):
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
        with _watched(model):
            yield cache
    finally:
        cache.end()
        for handle in handles:
            handle.remove()


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention be observed until the last block that is open on it ends, in
    whatever order and thread; then it is as it was before the first."""
    with _opening:
        blocks, undo = _open.get(model, (0, None))
        if undo is None:
            with ExitStack() as entered:
                entered.enter_context(longer_sequences_forgotten(model))
                entered.enter_context(observed(model))
                undo = entered.pop_all()
        _open[model] = blocks + 1, undo
    try:
        yield
    finally:
        with _opening:
            blocks, undo = _open.pop(model)
            if blocks > 1:
                _open[model] = blocks - 1, undo
            else:
                undo.close()

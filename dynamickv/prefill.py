"""prompt -> Prefill: one plain forward pass, with each layer's keys, values and last queries kept.

The logits are those of the plain model, bit for bit: observing copies a few queries and changes no
computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dynamickv.cache import KVCache, KVLayer
from dynamickv.models import LoadedModel
from dynamickv.observe import observed
from dynamickv.prompt import EncodedPrompt, encode_prompt
from dynamickv.records import LayerObservation, Prefill

TAIL = 64
"""Queries kept per layer: the widest observation window that can be chosen afterwards."""


def prefill(
    llm: LoadedModel,
    document: str,
    question: str,
    *,
    truncate: bool = False,
    chat_template: bool = True,
    tail: int = TAIL,
    on_layer: Callable[[int], None] | None = None,
) -> Prefill:
    """Read a document and a question once; any number of methods can follow.

    Args:
        truncate: cut the middle out of a document that is too long instead of refusing it.
        chat_template: False feeds plain text.
        tail: last queries to keep per layer, the widest `window_size` allowed later.
        on_layer: called with the number of layers done; an exception it raises stops the pass.

    Raises:
        ValueError: empty text, or a prompt longer than the model reads.
    """
    prompt = encode_prompt(
        llm.tokenizer,
        document,
        question,
        limit=llm.geometry.max_positions,
        truncate=truncate,
        chat_template=chat_template,
    )
    return prefill_prompt(llm, prompt, tail=tail, on_layer=on_layer)


@torch.inference_mode()
def prefill_prompt(
    llm: LoadedModel,
    prompt: EncodedPrompt,
    *,
    tail: int = TAIL,
    on_layer: Callable[[int], None] | None = None,
) -> Prefill:
    """`prefill` for a prompt that is already encoded."""
    queries: list[Tensor] = []
    scalings: list[float] = []

    def record(layer: KVLayer, query: Tensor, scaling: float) -> None:
        queries.append(query[0, :, -tail:].clone())
        scalings.append(scaling)
        if on_layer is not None:
            on_layer(len(queries))

    cache = KVCache(llm.geometry.num_layers, record)
    token_ids = torch.tensor([prompt.token_ids], device=llm.device)
    start = time.perf_counter()
    with observed(llm.model):
        output = llm.model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[0, -1]
    llm.synchronize()
    seconds = time.perf_counter() - start
    held = [layer.held() for layer in cache.layers]
    return Prefill(
        prompt=prompt,
        layers=tuple(
            LayerObservation(queries=query, keys=keys[0], scaling=scaling)
            for query, scaling, (keys, _) in zip(queries, scalings, held, strict=True)
        ),
        values=tuple(values[0] for _, values in held),
        logits=logits,
        seconds=seconds,
    )

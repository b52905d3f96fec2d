"""prompt -> Prefill: one plain forward pass, with each layer's keys, values and last queries kept.

The logits are those of the plain model, bit for bit: observing copies a few queries and changes no
computation. A model of precision "fast" is read from its packed weights instead, see `fast`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynamickv.cache import KVCache
from dynamickv.layers.kv import KVLayer
from dynamickv.neighbours import Neighbours
from dynamickv.reading.observe import cache_argument, observed
from dynamickv.reading.prompt import encode_prompt, encode_text
from dynamickv.records import Attended, EncodedPrompt, LayerObservation, Prefill
from dynamickv.scoring import attention_mass
from dynamickv.transfer import Stopwatch

if TYPE_CHECKING:
    from dynamickv.models import LoadedModel

Stored = tuple[Tensor, Tensor]
"""Keys and values of a layer as the cache stores them, (num_kv_heads, prompt_length, dim) each."""
TAIL = 64
"""Queries kept per layer: the widest observation window that can be chosen afterwards."""


def prefill(
    llm: LoadedModel,
    document: str,
    question: str | None = None,
    *,
    question_aware: bool | None = None,
    truncate: bool = False,
    answer_tokens: int = 0,
    chat_template: bool = True,
    tail: int = TAIL,
    mass: bool = False,
    on_layer: Callable[[int], None] | None = None,
) -> Prefill:
    """Read a document and a question once; any number of methods can follow.

    Args:
        question: None reads the document alone, so that several questions can follow.
        question_aware: False stops after the document, so that compression does not see the
            question, which is fed to the compressed caches later. By default True with a question.
        truncate: cut the middle out of a document that is too long instead of refusing it.
        answer_tokens: how long answers may become, for which a cut leaves room.
        chat_template: False feeds plain text.
        tail: last queries to keep per layer, the widest `window_size` allowed later.
        mass: also record the attention every position receives from all queries, which H2O needs
            and which about doubles the work.
        on_layer: called with the number of layers done; an exception it raises stops the pass.

    Raises:
        ValueError: empty text, or a prompt longer than the model reads.
    """
    prompt = prompt_to_read(
        llm,
        document,
        question,
        question_aware=question_aware,
        truncate=truncate,
        answer_tokens=answer_tokens,
        chat_template=chat_template,
    )
    return prefill_prompt(llm, prompt, tail=tail, mass=mass, on_layer=on_layer)


def prompt_to_read(
    llm: LoadedModel,
    document: str,
    question: str | None = None,
    *,
    question_aware: bool | None = None,
    truncate: bool = False,
    answer_tokens: int = 0,
    chat_template: bool = True,
) -> EncodedPrompt:
    """The tokens that `prefill` reads; arguments and errors are its."""
    prompt = encode_prompt(
        llm.tokenizer,
        document,
        "?" if question is None else question,
        limit=llm.geometry.max_positions,
        answer_tokens=answer_tokens,
        truncate=truncate,
        chat_template=chat_template,
    )
    if question is None or question_aware is False:
        prompt = prompt.document_part(question or "")
    return prompt


def whole_prompt(
    llm: LoadedModel, read: EncodedPrompt, question: str | None = None
) -> EncodedPrompt:
    """The prompt that is answered, its question included: what was read, or where that is a
    document alone, with the question it was read for or the one given here.

    Raises:
        ValueError: the question changes how the document is tokenized.
    """
    if read.question_span[1] > 0:
        return read
    start, end = read.document_characters
    prompt = encode_prompt(
        llm.tokenizer,
        read.text[start:end],
        question or read.question,
        limit=llm.geometry.max_positions,
        chat_template=read.chat_template,
    )
    if prompt.token_ids[: read.length] != read.token_ids:
        raise ValueError(
            "this question changes how the document is tokenized; prefill them together"
        )
    return replace(prompt, original_length=prompt.length + read.original_length - read.length)


def prefill_text(
    llm: LoadedModel,
    text: str,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    tail: int = TAIL,
    mass: bool = False,
    on_layer: Callable[[int], None] | None = None,
) -> Prefill:
    """`prefill` of a prompt that is laid out already, question included, such as a benchmark's.

    Args:
        limit: a text of more tokens keeps its first and last limit // 2, as LongBench does.
        chat_template: True makes the text the user's message.

    Raises:
        ValueError: empty text, or a prompt longer than the model reads.
    """
    prompt = encode_text(llm.tokenizer, text, limit=limit, chat_template=chat_template)
    most = llm.geometry.max_positions
    if prompt.length > most:
        raise ValueError(
            f"the prompt has {prompt.length:,} tokens and this model reads {most:,}; "
            "shorten it or set a lower limit"
        )
    return prefill_prompt(llm, prompt, tail=tail, mass=mass, on_layer=on_layer)


@torch.inference_mode()
def prefill_prompt(
    llm: LoadedModel,
    prompt: EncodedPrompt,
    *,
    tail: int = TAIL,
    mass: bool = False,
    on_layer: Callable[[int], None] | None = None,
    watch: Callable[[int, LayerObservation, Stored], None] | None = None,
) -> Prefill:
    """`prefill` for a prompt that is already encoded.

    Args:
        watch: called before `on_layer` with a layer's place in the model, what it saw and what the
            cache stores of it; its time is not the prefill's.
    """
    layers: list[LayerObservation] = []
    places = llm.geometry.compressed_layers
    read: list[int] = []
    mass_seconds = watched = 0.0

    neighbours = Neighbours(llm.device)

    def record(layer: KVLayer, attended: Attended) -> None:
        nonlocal mass_seconds, watched
        neighbours.look()
        received = None if fast is None else fast.take_received()
        if mass and received is None:
            llm.synchronize()
            started = time.perf_counter()
            received = attention_mass(
                attended.queries[0],
                attended.keys[0],
                attended.scaling,
                attended.softcap,
                attended.sinks_of(0),
                None if attended.bias is None else attended.bias[0],
            )
            llm.synchronize()
            mass_seconds += time.perf_counter() - started
        stored = 1 if llm.geometry.joint else layer.held()[0].shape[1]
        observation = attended.row(0, stored, tail=tail, mass=received)
        read.append(layer.index)
        layers.append(replace(observation, queries=observation.queries.clone()))
        if watch is not None:
            llm.synchronize()
            started = time.perf_counter()
            keys, values = layer.held()
            watch(layer.index, layers[-1], (keys[0], values[0]))
            watched += time.perf_counter() - started
        if on_layer is not None:
            with neighbours.apart():
                on_layer(len(layers))

    cache = KVCache.of(llm.model.config, record)
    token_ids = torch.from_numpy(np.array(prompt.token_ids, np.int64)[None]).to(llm.device)
    fast = None
    if llm.packed is not None:
        # Numba takes a second to load, which only this precision should wait for.
        from dynamickv.reading.fast_pass import FastReading

        fast = FastReading(llm, llm.packed, mass)
    reading = Stopwatch(llm.device)
    with observed(llm.model), neighbours:
        if fast is not None:
            logits = fast(token_ids, cache)
        else:
            output = llm.model(
                token_ids, use_cache=True, logits_to_keep=1, **cache_argument(llm.model, cache)
            )
            logits = output.logits[0, -1]
    reading.stop()
    if sorted(read) != places:
        raise ValueError(
            f"{len(layers)} of {llm.name}'s {len(places)} layers to compress were observed, so "
            "nothing is sure to be compressed; choose another model"
        )
    held = [cache.layers[place].held() for place in read]
    return Prefill(
        prompt=prompt,
        layers=tuple(layers),
        keys=tuple(keys[0] for keys, _ in held),
        values=tuple(values[0] for _, values in held),
        places=tuple(read),
        others=cache.others(llm.geometry.kinds),
        states=cache.states(),
        joint=llm.geometry.joint,
        logits=logits,
        took=lambda: reading.seconds() - mass_seconds - watched,
        mass_seconds=mass_seconds,
    )

"""Greedy decoding from a cache, one step at a time. The generator is the primitive; a whole answer
is a fold over it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dynamickv.cache import BatchedCache, KVCache
from dynamickv.decoding.cuda_graph import (
    LEAST_STEPS,
    DecodeGraph,
    ForgettingGraphs,
    graphable,
)
from dynamickv.decoding.decode_step import RowSteps
from dynamickv.decoding.forgetting import Forgetting
from dynamickv.fast.decoder import steppable
from dynamickv.fast.packed import FastProducts
from dynamickv.models import LoadedModel
from dynamickv.neighbours import Neighbours
from dynamickv.reading.observe import cache_argument, observed

Feed = Callable[[Sequence[KVCache], Sequence[int], Sequence[int]], Tensor]
"""(caches, one token for each, their true positions) -> next-token logits, (caches, vocabulary)."""
Advance = Callable[[int], tuple[int, float, float]]
"""Feeds a token; (the most likely token after it, its log probability, seconds it took)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One decoded token."""

    token_id: int
    logprob: float
    seconds: float
    last: str | None
    """Why decoding ends here ("stop" or "length"), or None."""


def decode(
    llm: LoadedModel,
    cache: KVCache,
    logits: Tensor,
    position: int,
    max_new_tokens: int,
    advance: Advance | None = None,
    forgetting: Forgetting | None = None,
    ahead: bool = False,
) -> Iterator[Step]:
    """Yield greedy tokens until the end of the answer, `max_new_tokens` or the model's last
    position.

    On CUDA, answers of some length come from a captured graph; the time to capture it is in no
    step's seconds.

    Args:
        cache: what the prompt left behind; grows by one position per step.
        logits: next-token logits after the prompt, (vocabulary,).
        position: true position of the next token, whatever the cache dropped.
        advance: feeds tokens in another way, such as together with other runs.
        forgetting: of a cache whose method chooses again; the caller asks it for room after every
            step but the last.
        ahead: let a captured graph begin a step before the token that it feeds is asked for. The
            device then works while the caller does, and a step's seconds are those that were
            waited for it; not for runs that take turns, which would wait for each other's.
    """
    count = 0
    most = min(max_new_tokens, llm.geometry.max_positions - position + 1)
    start = time.perf_counter()
    token_id, logprob = choose(logits)
    seconds = time.perf_counter() - start
    while True:
        count += 1
        last = None
        if token_id in llm.stop_ids:
            last = "stop"
        elif count >= most:
            last = "length"
        yield Step(token_id, logprob, seconds, last)
        if last is not None:
            return
        advance = advance or _stepper(llm, cache, position, most - 1, forgetting, ahead)
        token_id, logprob, seconds = advance(token_id)


def _stepper(
    llm: LoadedModel,
    cache: KVCache,
    position: int,
    steps: int,
    forgetting: Forgetting | None,
    ahead: bool,
) -> Advance:
    """Feed tokens one after another from `position` on."""
    captured = steps >= LEAST_STEPS and cache.plain and graphable(llm)
    if captured and forgetting is not None and forgetting.buffer >= LEAST_STEPS:
        step = ForgettingGraphs(llm, cache, position, steps, forgetting, ahead=ahead).advance
    # A graph's launches are fixed, and it shows no queries to whoever observes a layer.
    elif captured and all(layer.after_attention is None for layer in cache.whole_layers()):
        step = DecodeGraph(llm, cache, position, steps, ahead=ahead).advance
    else:
        feed = feeder(llm, cache.plain)
        positions = itertools.count(position)

        def step(token_id: int) -> tuple[int, float]:
            return choose(feed([cache], [token_id], [next(positions)])[0])

    neighbours = Neighbours(llm.device)

    def advance(token_id: int) -> tuple[int, float, float]:
        with neighbours.step():
            start = time.perf_counter()
            return *step(token_id), time.perf_counter() - start

    return advance


@torch.inference_mode()
def choose(logits: Tensor) -> tuple[int, float]:
    """The most likely token and its natural-log probability."""
    return choose_rows(logits[None])[0]


@torch.inference_mode()
def choose_rows(logits: Tensor) -> list[tuple[int, float]]:
    """`choose` for every row of (rows, vocabulary), with one wait for the device."""
    wide = logits.float()
    chosen = logits.argmax(dim=-1, keepdim=True)
    logprobs = wide.gather(1, chosen)[:, 0] - wide.logsumexp(dim=-1)
    # Both in one transfer; float32 holds every token id.
    both = torch.stack([chosen[:, 0].float(), logprobs], dim=1).tolist()
    return [(int(token_id), logprob) for token_id, logprob in both]


@torch.inference_mode()
def extend(
    llm: LoadedModel,
    cache: KVCache,
    token_ids: Sequence[int],
    position: int,
    forgetting: Forgetting | None = None,
) -> Tensor:
    """Feed tokens from their true position on; next-token logits, (vocabulary,).

    Layers may hold different numbers of positions: each attends to what it holds and, causally, to
    the new tokens.

    Args:
        forgetting: of a cache whose method chooses again while it grows.
    """
    for start, part in _parts(llm, token_ids, len(token_ids), forgetting):
        logits = _forward(llm, cache, [part], [position + start])[0, -1]
    return logits


def _parts(
    llm: LoadedModel, token_ids: Sequence[int], block: int, forgetting: Forgetting | None
) -> Iterator[tuple[int, list[int]]]:
    """Tokens in parts that can be fed at once, and where each begins; room is made for them."""
    start = 0
    while start < len(token_ids):
        count = 1 if llm.geometry.stepwise else min(block, len(token_ids) - start)
        if forgetting is not None:
            forgetting.make_room(1)
            # What the one token does not take of the room.
            count = min(count, 1 + forgetting.room)
            forgetting.make_room(count - 1)
        yield start, list(token_ids[start : start + count])
        start += count


@torch.inference_mode()
def follow(
    llm: LoadedModel,
    cache: KVCache,
    token_ids: Sequence[int],
    position: int,
    block: int = 64,
    forgetting: Forgetting | None = None,
) -> Iterator[Tensor]:
    """Feed given tokens as `extend` does, at most `block` at a time, and yield each block's
    next-token logits, (tokens, vocabulary)."""
    for start, part in _parts(llm, token_ids, block, forgetting):
        yield _forward(llm, cache, [part], [position + start], last=len(part))[0]


def has_mkl() -> bool:
    """Whether torch multiplies matrices with MKL here."""
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def feeder(llm: LoadedModel, plain: bool) -> Feed:
    """The fastest way to feed single tokens without a graph: to several caches where it is
    `RowSteps`, else to one.

    Args:
        plain: whether all caches will be.
    """
    # Other formats gain little there, and their own pass rounds as `generate` does.
    reads_faster = llm.device.type == "cpu" and llm.model.dtype == torch.float32 and has_mkl()
    if plain and reads_faster and llm.attention == "sdpa" and steppable(llm):
        return RowSteps(llm)
    return partial(_feed, llm)


@torch.inference_mode()
def _feed(
    llm: LoadedModel, caches: Sequence[KVCache], token_ids: Sequence[int], positions: Sequence[int]
) -> Tensor:
    (cache,) = caches
    return feed_rows(llm, cache, token_ids, positions)


@torch.inference_mode()
def feed_rows(
    llm: LoadedModel,
    cache: KVCache | BatchedCache,
    token_ids: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """One token for every row of a cache, at its true position; next-token logits, (rows,
    vocabulary)."""
    return _forward(llm, cache, [[token_id] for token_id in token_ids], positions)[:, -1]


def _forward(
    llm: LoadedModel,
    cache: KVCache | BatchedCache,
    token_ids: list[list[int]],
    positions: Sequence[int],
    last: int = 1,
) -> Tensor:
    """The model's own forward pass of as many tokens in each row; logits after the `last` ones,
    (rows, last, vocabulary)."""
    device = llm.device
    first = torch.tensor(positions, device=device)[:, None]
    fast = nullcontext() if llm.packed is None else FastProducts(llm.packed)
    with observed(llm.model), fast:
        output = llm.model(
            torch.tensor(token_ids, device=device),
            # The pruned cache is shorter than the text it stands for: its length is not the
            # next position.
            position_ids=first + torch.arange(len(token_ids[0]), device=device),
            **cache_argument(llm.model, cache),
            use_cache=True,
            logits_to_keep=last,
        )
    logits: Tensor = output.logits[:, -last:]
    return logits


class TextStream:
    """Turns token ids into text piece by piece; the pieces concatenate to the whole answer's text.

    A character that spans several tokens appears with its last one.
    """

    def __init__(self, llm: LoadedModel) -> None:
        self._tokenizer = llm.tokenizer
        self._token_ids: list[int] = []
        self.text = ""
        self.pieces: list[str] = []

    def push(self, token_id: int, final: bool) -> str:
        """Add a token; the text it completes."""
        self._token_ids.append(token_id)
        text = str(
            self._tokenizer.decode(
                self._token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        if not final and text.endswith("\ufffd"):
            text = text.rstrip("\ufffd")
        piece = text[len(self.text) :] if text.startswith(self.text) else ""
        self.text += piece
        self.pieces.append(piece)
        return piece

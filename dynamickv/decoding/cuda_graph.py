"""The decode step as one CUDA graph: what a pruned cache makes possible.

A pruned cache's buffers have a fixed, preallocated size, so one token's whole way through the model
is the same sequence of launches on the same memory every time; only numbers on the device change
(the token, its position, the slot it fills in each layer). The sequence is captured once and
replayed per token, which frees it from the host. Layers may differ in length: each is fixed. A
cache whose method chooses again while it grows is one graph from choice to choice. A model that
lies on several devices is one graph on each, and a short message from one to the next.

For the models that `decode_step` takes (Llama, Mistral, Qwen2 and Qwen3 with full attention), with
Triton kernels where they run and plain torch operations elsewhere. Every other model decodes
without a graph.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

from dynamickv.cache import KVCache
from dynamickv.decoding.decode_step import DecodeStep, PlainOps
from dynamickv.decoding.forgetting import Forgetting
from dynamickv.fast.decoder import Stage as Part
from dynamickv.fast.decoder import stages, written_out
from dynamickv.models import LoadedModel
from dynamickv.transfer import sent

log = logging.getLogger(__name__)

LEAST_STEPS = 16
"""Fewer steps than this are not worth a capture."""


class Stage(Protocol):
    """A step that can be replayed."""

    step: DecodeStep
    output: Tensor
    """What the stage sends on, or the logits; the next step overwrites it."""

    def replay(self) -> None:
        """Enqueue the stage's work."""


Capture = Callable[[DecodeStep], Stage]


class DecodeGraph:
    """A captured `DecodeStep` on every device, and the cache that they grow."""

    @torch.inference_mode()
    def __init__(
        self,
        llm: LoadedModel,
        cache: KVCache,
        position: int,
        room: int,
        ops: PlainOps | None = None,
        remember: int = 0,
        capture: Capture | None = None,
        parts: Sequence[Part] | None = None,
        ahead: bool = False,
    ) -> None:
        """Capture a step; nothing is decoded yet.

        Args:
            cache: of a model that is `graphable`, and `plain`.
            position: true position of the next token, whatever the cache dropped.
            room: steps to make room for.
            ops: what the step is made of; by default the fastest that run here.
            remember: how many of the last queries of every layer stay, see `asked`.
            capture: what makes a step one that is replayed; by default a CUDA graph.
            parts: what of the decoder is one stage each; by default what lies on one device.
            ahead: begin every step before the token that it feeds is read, so that the device need
                not wait for the host: one that is fed another token, or no more, began in vain.
                `logits` are then not to be read. Nothing changes for a decoder in parts.
        """
        self._cache = cache
        self._steps = 0
        self._room = room
        self._remember = remember
        self._coming: deque[Callable[[], list[float]]] = deque()
        """What steps chose that were begun and not asked for yet, in order."""
        self._fed: int | None = None
        """The token that the next step feeds, where the last one left it there."""
        make = capture or CapturedStage
        self._stages = [
            make(
                DecodeStep(
                    llm,
                    cache,
                    position,
                    room,
                    ops or fastest_ops(part.device),
                    part,
                    # A step begun in vain takes the place of one query.
                    remember + 1 if ahead and remember else remember,
                )
            )
            for part in (parts or stages(llm))
        ]
        self._whole = self._stages[0].step.whole
        self._ahead = ahead and self._whole

    def asked(self) -> dict[int, Tensor]:
        """By layer the last queries that are remembered, (query_heads, any number, head_dim)."""
        return {
            layer: queries[:, -self._remember :]
            for stage in self._stages
            for layer, queries in zip(
                stage.step.stage.layers, stage.step.asked(self._steps), strict=True
            )
        }

    @property
    def logits(self) -> Tensor:
        """Next-token logits of the last step, (vocabulary,); the next one overwrites them."""
        return self._stages[-1].output

    @torch.inference_mode()
    def replay(self) -> None:
        """Enqueue a step; the host waits for nothing."""
        self._fed = None
        message = None
        for stage in self._stages:
            if message is not None:
                # Between devices this waits for both of their streams.
                stage.step.message.copy_(message, non_blocking=True)
            stage.replay()
            message = stage.output

    @torch.inference_mode()
    def advance(self, token_id: int) -> tuple[int, float]:
        """Feed a token; the most likely next one and its natural-log probability."""
        if token_id != self._fed:
            self._feed(token_id)
        if not self._coming:
            self._begin()
        if self._ahead and self._steps + 1 < self._room:
            self._begin()
        self._steps += 1
        for layer in self._cache.whole_layers():
            layer.grow_in_place()
        chosen, logprob = self._coming.popleft()()
        next_id = int(chosen)
        self._fed = next_id if self._whole else None
        return next_id, logprob

    def _feed(self, token_id: int) -> None:
        """Let the next step feed this token."""
        first = self._stages[0].step
        if self._coming:
            # What was begun fed another one.
            self._coming.clear()
            first.rewind(self._steps)
        first.token.fill_(token_id)

    def _begin(self) -> None:
        """Enqueue a step, and what it chooses on its way to the host."""
        self.replay()
        self._coming.append(sent(self._stages[-1].step.chosen))


class ForgettingGraphs:
    """One graph after another for a cache whose method chooses again while it grows: each has the
    room that is left until the next choice, and is dropped before it. What is held never takes more
    than budget + buffer; the graph remembers the queries that the choice reads.
    """

    def __init__(
        self,
        llm: LoadedModel,
        cache: KVCache,
        position: int,
        steps: int,
        forgetting: Forgetting,
        ops: PlainOps | None = None,
        capture: Capture | None = None,
        ahead: bool = False,
    ) -> None:
        """Nothing is captured yet.

        Args:
            cache: as for `DecodeGraph`.
            forgetting: of that cache; it is asked to make room before every step.
            steps: most steps that will come.
            ahead: as for `DecodeGraph`.
        """
        self._make = partial(DecodeGraph, llm, cache, ops=ops, capture=capture, ahead=ahead)
        self._forgetting = forgetting
        self._position, self._left = position, steps
        self._graph: DecodeGraph | None = None
        if forgetting.before_choice is not None:
            forgetting.before_choice()  # an earlier answer's
        forgetting.before_choice = self._bring

    def advance(self, token_id: int) -> tuple[int, float]:
        """Feed a token for which room was made; the most likely next one and its natural-log
        probability."""
        if self._graph is None:
            # The room made for this token counts no more.
            room = min(self._left, self._forgetting.room + 1)
            remember = self._forgetting.queries_read(room)
            self._graph = self._make(self._position, room, remember=remember)
        self._position += 1
        self._left -= 1
        return self._graph.advance(token_id)

    def _bring(self) -> None:
        """Hand over the queries since the last choice; the memory of the graph is the cache's."""
        if self._graph is not None:
            for layer, queries in self._graph.asked().items():
                self._forgetting.took(layer, queries[None])
            self._graph = None


class CapturedStage:
    """One device's graph."""

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        with torch.cuda.device(step.stage.device):
            # Compilation, handles and workspaces come before the capture, on a stream of its own.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
                step.rewind()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # torch would capture on a stream of the device on which this process captured first,
            # and launch the whole stage there.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.output = step()
                """What the stage sends on, or the logits; the next step overwrites it."""

    def replay(self) -> None:
        """Enqueue the stage's work."""
        with torch.cuda.device(self.step.stage.device):
            self._graph.replay()


def graphable(llm: LoadedModel) -> bool:
    """Whether this model's decode step is captured: written out, and every part of it on a GPU,
    the same one or another."""
    parts = stages(llm) if llm.device.type == "cuda" and written_out(llm) else []
    return bool(parts) and all(part.device.type == "cuda" for part in parts)


@lru_cache
def fastest_ops(device: torch.device) -> PlainOps:
    """Triton kernels where they compile, plain operations elsewhere."""
    try:
        from dynamickv.decoding.triton_ops import TritonOps

        ops = TritonOps()
        probe = torch.ones(64, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            ops.norm(probe, probe, 1e-6)
    except Exception as error:  # no Triton, no C compiler, an old card: it raises many kinds
        log.info("Decoding without Triton kernels (%s).", error)
        return PlainOps()
    return ops

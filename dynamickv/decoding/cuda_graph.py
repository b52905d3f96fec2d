"""The decode step as one CUDA graph: what a pruned cache makes possible.

A pruned cache's buffers have a fixed, preallocated size, so one token's whole way through the model
is the same sequence of launches on the same memory every time; only numbers on the device change
(the token, its position, the slot it fills in each layer). The sequence is captured once and
replayed per token, which frees it from the host. Layers may differ in length: each is fixed.

For the models that `decode_step` takes (Llama, Mistral, Qwen2 and Qwen3 with full attention), with
Triton kernels where they run and plain torch operations elsewhere. Every other model decodes
without a graph.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from dynamickv.cache import KVCache
from dynamickv.decoding.decode_step import DecodeStep, PlainOps
from dynamickv.fast.decoder import steppable
from dynamickv.models import LoadedModel

log = logging.getLogger(__name__)

LEAST_STEPS = 16
"""Fewer steps than this are not worth a capture."""


class DecodeGraph:
    """A captured `DecodeStep` and the cache it grows."""

    @torch.inference_mode()
    def __init__(
        self,
        llm: LoadedModel,
        cache: KVCache,
        position: int,
        room: int,
        ops: PlainOps | None = None,
    ) -> None:
        """Capture a step; nothing is decoded yet.

        Args:
            cache: of a model that is `graphable`, and `plain`.
            position: true position of the next token, whatever the cache dropped.
            room: steps to make room for.
            ops: what the step is made of; by default the fastest that run here.
        """
        self._cache = cache
        self._device = llm.device
        with torch.cuda.device(self._device):
            ops = ops or fastest_ops(self._device)
            self._step = DecodeStep(llm, cache, position, room, ops)
            # Compilation, handles and workspaces come before the capture, on a stream of its own.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
                self._step.rewind()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = self._step()

    @property
    def logits(self) -> Tensor:
        """Next-token logits of the last step, (vocabulary,); the next one overwrites them."""
        return self._logits

    @torch.inference_mode()
    def advance(self, token_id: int) -> tuple[int, float]:
        """Feed a token; the most likely next one and its natural-log probability."""
        with torch.cuda.device(self._device):
            self._step.token.fill_(token_id)
            self._graph.replay()
        for layer in self._cache.whole_layers():
            layer.grow_in_place()
        next_id, logprob = self._step.chosen.tolist()
        return int(next_id), logprob


def graphable(llm: LoadedModel) -> bool:
    """Whether this model's decode step can be captured."""
    return llm.device.type == "cuda" and steppable(llm)


@lru_cache
def fastest_ops(device: torch.device) -> PlainOps:
    """Triton kernels where they compile, plain operations elsewhere."""
    try:
        from dynamickv.decoding.triton_ops import TritonOps

        ops = TritonOps()
        probe = torch.ones(64, device=device)
        ops.norm(probe, probe, 1e-6)
    except Exception as error:  # no Triton, no C compiler, an old card: it raises many kinds
        log.info("Decoding without Triton kernels (%s).", error)
        return PlainOps()
    return ops

"""Answers on the plain path and with the captured step, and how long a step takes on either."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

import dynamickv as dkv
from benchmarks.gpu.timing import Mark
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import DecodeGraph
from dynamickv.decoding.decode import choose, extend
from dynamickv.decoding.decode_step import DecodeStep


class Computed:
    """A stage that computes its step anew: what a dry run without CUDA has for a captured one."""

    def __init__(self, step: DecodeStep) -> None:
        step()
        step.rewind()  # as before a capture
        self.step = step
        self.output = step.message

    def replay(self) -> None:
        """Compute the stage's work."""
        self.output = self.step()


def plain_answer(
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    retention: dkv.Retention,
    count: int,
    fed: Sequence[int] = (),
) -> tuple[list[int], list[Tensor]]:
    """Tokens fed, greedy ones if none are given, and the plain path's logits after each."""
    cache = prune(prefill, retention, count)
    tokens, logits = [], []
    token = choose(prefill.logits)[0]
    for step in range(count):
        tokens.append(fed[step] if fed else token)
        logits.append(extend(llm, cache, [tokens[-1]], prefill.length + step))
        token = choose(logits[-1])[0]
    return tokens, logits


def graph_answer(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, fed: Sequence[int]
) -> list[Tensor]:
    """The captured step's logits after each token."""
    graph = DecodeGraph(llm, prune(prefill, retention, len(fed)), prefill.length, len(fed))
    return graph_logits(graph, fed)


def graph_logits(graph: DecodeGraph, fed: Sequence[int]) -> list[Tensor]:
    """A graph's logits after each token."""
    logits = []
    for token in fed:
        graph.advance(token)
        logits.append(graph.logits.clone())
    return logits


def plain_seconds(
    llm: dkv.LoadedModel, prefill: dkv.Prefill, retention: dkv.Retention, fed: Sequence[int]
) -> list[float]:
    """Seconds of each step on the plain path, but for the first four."""
    cache = prune(prefill, retention, len(fed))
    seconds = []
    for step, token in enumerate(fed):
        start = time.perf_counter()
        choose(extend(llm, cache, [token], prefill.length + step))
        seconds.append(time.perf_counter() - start)
    return seconds[4:]


def advance_seconds(graph: DecodeGraph, token: int, warm: int, steps: int) -> list[float]:
    """Seconds of each of so many steps, after those that warm up."""
    seconds = []
    for _ in range(warm + steps):
        start = time.perf_counter()
        token = graph.advance(token)[0]
        seconds.append(time.perf_counter() - start)
    return seconds[warm:]


def graph_seconds(graph: DecodeGraph, token: int) -> tuple[list[float], float]:
    """Seconds of each step but for the first 16, and mean seconds of a step on the device alone;
    takes 144 steps."""
    seconds = advance_seconds(graph, token, 16, 64)
    begin = Mark()
    for _ in range(64):
        graph.replay()
    return seconds, Mark().since(begin) / 64

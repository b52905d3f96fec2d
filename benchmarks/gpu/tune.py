"""Decode time for several shapes of the projection kernels."""

from __future__ import annotations

import torch

from benchmarks.gpu.answers import graph_seconds
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import prompt
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import DecodeGraph
from dynamickv.reading.prefill import prefill_prompt

SHAPES = [(4, 1024, 4), (2, 2048, 4), (2, 1024, 2), (2, 2048, 8), (2, 4096, 8), (4, 2048, 8)]
"""(rows, block, warps)."""


@torch.inference_mode()
def tune(bench: Bench) -> None:
    """Device time of a step, per shape."""
    if bench.device.type != "cuda":
        return
    from dynamickv.decoding.triton_ops import TritonOps

    llm = bench.build("Llama-3-8B")
    prefill = prefill_prompt(llm, prompt(llm, 4096))
    retention = bench.method.select(prefill.layers)
    for shape in SHAPES:
        graph = DecodeGraph(llm, prune(prefill, retention, 160), 4096, 160, TritonOps(*shape))
        seconds = graph_seconds(graph, 5)[1]
        bench.add(f"tune rows, block, warps = {shape}", seconds * 1e3, "ms/token")
        del graph

"""Time per token: generate, ours with and without the graph, and the bytes limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dynamickv as dkv
from benchmarks.gpu.agreement import alike, logits_of, wide_twin
from benchmarks.gpu.answers import (
    advance_seconds,
    graph_answer,
    graph_logits,
    graph_seconds,
    plain_answer,
    plain_seconds,
)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.generate import generate_seconds
from benchmarks.gpu.models import attention_set_to, bytes_read, ids_of, prompt
from benchmarks.gpu.timing import free, synchronize
from benchmarks.report import scaled
from dynamickv.cache import prune
from dynamickv.decoding.cuda_graph import DecodeGraph, graphable
from dynamickv.decoding.decode_step import PlainOps
from dynamickv.reading.prefill import prefill_prompt

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
STEPS = 160
"""Room of a graph's cache: what timing it takes, and more."""


@torch.inference_mode()
def decoding(
    bench: Bench,
    name: str,
    llm: dkv.LoadedModel,
    length: int,
    target: str,
    bound_target: str = "<= 1.3",
) -> None:
    """Time per token: generate, ours with and without the graph, and the bytes limit."""
    encoded = prompt(llm, length)
    label = f"{name}, {length} tokens"
    count = 16 if bench.dry else 40
    default = generate_seconds(llm, ids_of(llm, encoded), count)
    free()
    with sdpa_kernel(WITHOUT_CUDNN):
        theirs = generate_seconds(llm, ids_of(llm, encoded), count)
    free()
    for way, seconds, note in (
        (
            "as it comes",
            default,
            "cuDNN attention builds a plan for every length new to the process",
        ),
        ("cuDNN attention off", theirs, ""),
    ):
        measure = f"{label}: transformers' generate with DynamicCache, {way}"
        bench.add(measure, scaled(seconds, 1e3), "ms/token", note=note)
    as_it_comes = statistics.median(default)
    fastest = min(as_it_comes, statistics.median(theirs))
    prefill = prefill_prompt(llm, encoded)
    ours = bench.method
    for method in (ours, dkv.FullKV()):
        retention = method.select(prefill.layers)
        fed, plain = plain_answer(llm, prefill, retention, 64)
        seconds = plain_seconds(llm, prefill, retention, fed[:20])
        bench.add(f"{label}: {method.name}, plain path", scaled(seconds, 1e3), "ms/token")
        if not graphable(llm):
            continue
        waiting = DecodeGraph(llm, prune(prefill, retention, STEPS), length, STEPS)
        in_turns = advance_seconds(waiting, fed[0], 16, 64)
        del waiting
        cache = prune(prefill, retention, STEPS)
        start = time.perf_counter()
        graph = DecodeGraph(llm, cache, length, STEPS, ahead=True)
        synchronize()
        note = f"capture {time.perf_counter() - start:.2f} s"
        steps, device = graph_seconds(graph, fed[0])
        bench.add(f"{label}: {method.name}, graph", scaled(steps, 1e3), "ms/token", note=note)
        bench.add(
            f"{label}: {method.name}, graph, every token waited for",
            scaled(in_turns, 1e3),
            "ms/token",
            note="as where runs take turns",
        )
        mine = statistics.median(steps)
        bench.add(
            f"{label}: generate / {method.name}",
            fastest / mine,
            "x",
            target if method is ours else "",
            f"the faster generate; {as_it_comes / mine:.1f} x as it comes",
        )
        read = bytes_read(llm) + cache.nbytes
        bound = read / bench.facts["bandwidth"]
        bench.add(
            f"{label}: {method.name} / bytes limit",
            scaled(steps, 1 / bound),
            "x",
            bound_target if method is ours else "",
            f"limit {bound * 1e3:.2f} ms for {read / 1e9:.2f} GB; "
            f"{device / bound:.3f} x counting device time alone ({device * 1e3:.2f} ms), "
            f"{statistics.median(in_turns) / bound:.3f} x where every token is waited for",
        )
        same = f"{label}: {method.name}, same next token as the plain path fed alike"
        stepped = graph_answer(llm, prefill, retention, fed)
        alike(bench, f"{same}, graph", stepped, plain)
        if method is ours and length == bench.long and name == "Llama-3-8B":
            yardsticks(bench, same, llm, prefill, retention, fed, plain, stepped)
            bench.profile("decode", graph.replay, 3)
        del graph, cache, retention
        free()


def yardsticks(
    bench: Bench,
    label: str,
    llm: dkv.LoadedModel,
    prefill: dkv.Prefill,
    retention: dkv.Retention,
    fed: Sequence[int],
    plain: Sequence[Tensor],
    stepped: Sequence[Tensor],
) -> None:
    """What else parts from the plain path in bfloat16: another attention kernel, torch's own
    operations captured, exact arithmetic."""
    with attention_set_to(llm, "eager"):
        other = plain_answer(llm, prefill, retention, len(fed), fed)[1]
    alike(bench, f"{label}, plain path with eager attention", other, plain)
    room = len(fed) + 150
    graph = DecodeGraph(llm, prune(prefill, retention, room), prefill.length, room, PlainOps())
    logits = graph_logits(graph, fed)
    alike(bench, f"{label}, graph of torch's operations (cuBLAS)", logits, plain)
    bench.add(
        f"{label.split(': ')[0]}: DynamicKV, graph of torch's operations (cuBLAS)",
        scaled(graph_seconds(graph, fed[0])[0], 1e3),
        "ms/token",
    )
    del graph
    exact = list(logits_of(wide_twin(llm), prefill, retention, fed))
    free()
    for name, found in (("graph", stepped), ("plain path", plain)):
        alike(bench, f"{label.split(', same')[0]}, float32's next token, {name}", found, exact)

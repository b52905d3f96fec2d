"""A real model: what it keeps and says on the device against the CPU in float32."""

from __future__ import annotations

import torch

import dynamickv as dkv
from benchmarks.gpu.agreement import alike, overlap
from benchmarks.gpu.answers import graph_answer, plain_answer
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import attention_set_to
from benchmarks.prompts import SIX, prompt_of
from dynamickv.decoding.cuda_graph import graphable
from dynamickv.reading.prefill import prefill_prompt


@torch.inference_mode()
def smollm2(bench: Bench) -> None:
    """Kept sets in float32 and bfloat16, and next tokens by the ways of decoding."""
    if bench.gguf is None:
        print("no --gguf: SmolLM2 is left out")
        return
    cpu = dkv.load_model(bench.gguf, device="cpu", dtype="float32")
    encoded = prompt_of(cpu, 300 if bench.dry else 4000)
    reference = prefill_prompt(cpu, encoded, mass=True)
    methods = dkv.build_methods(SIX[1:], capacity=64 if bench.dry else 128)
    expected = [method.select(reference.layers) for method in methods]
    for dtype in ("float32", "bfloat16"):
        llm = dkv.load_model(bench.gguf, device=str(bench.device), dtype=dtype)
        prefill = prefill_prompt(llm, encoded, mass=True)
        for method, kept in zip(methods, expected, strict=True):
            bench.add(
                f"SmolLM2, {encoded.length} tokens: {method.name}'s kept sets, "
                f"{bench.device.type} {dtype} and CPU float32 overlap",
                overlap(method.select(prefill.layers), kept),
            )
        if not graphable(llm):
            continue
        for method in (dkv.FullKV(), dkv.DynamicKV(capacity=128)):
            retention = method.select(prefill.layers)
            label = f"SmolLM2 {dtype}, {method.name}: same next token as the plain path fed alike"
            fed, plain = plain_answer(llm, prefill, retention, 64)
            alike(bench, f"{label}, graph", graph_answer(llm, prefill, retention, fed), plain)
            with attention_set_to(llm, "eager"):
                other = plain_answer(llm, prefill, retention, 64, fed)[1]
            alike(bench, f"{label}, plain path with eager attention", other, plain)

"""What-if: choosing again from one prefill."""

from __future__ import annotations

import torch

import dynamickv as dkv
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import prompt
from benchmarks.gpu.timing import timed
from benchmarks.prompts import SIX
from dynamickv.reading.prefill import prefill_prompt


@torch.inference_mode()
def reselect(bench: Bench, llm: dkv.LoadedModel) -> None:
    """Each method's choice alone, and all six."""
    prefill = prefill_prompt(llm, prompt(llm, bench.long), mass=True)
    methods = dkv.build_methods(SIX, capacity=bench.method.capacity)
    length = f"{bench.long} tokens"
    bench.add(f"recording H2O's attention mass, {length}", prefill.mass_seconds, "s")
    for method in methods:
        seconds = timed(lambda m=method: m.select(prefill.layers), 5, 2)
        bench.add(f"re-select {method.name}, {length}", seconds, "s")
    together = timed(lambda: [m.select(prefill.layers) for m in methods], 5)
    bench.add(f"re-select six methods from one prefill, {length}", together, "s", "<= 0.1")
    bench.profile("select", lambda: [m.select(prefill.layers) for m in methods], 1)

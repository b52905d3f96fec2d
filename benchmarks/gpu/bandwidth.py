"""What the device moves at best."""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import timed


def bandwidth(bench: Bench) -> None:
    """A large copy: bytes read plus bytes written."""
    size = 2**20 if bench.dry else 2**32
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rates = [2 * size / seconds for seconds in timed(lambda: target.copy_(source), 20, 3)]
    bench.facts["bandwidth"] = statistics.median(rates)
    bench.add("device copy bandwidth", [rate / 1e12 for rate in rates], "TB/s")

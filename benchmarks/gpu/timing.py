"""Time and memory on the device's own clock and counters."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Mark:
    """A moment on the device's own clock."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event is not None:
            self.event.record()
        self.host = time.perf_counter()

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark."""
        if self.event is None or earlier.event is None:
            return self.host - earlier.host
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def timed(action: Callable[[], object], runs: int, warm: int = 1) -> list[float]:
    """Seconds of each run, by device events."""
    for _ in range(warm):
        action()
    seconds = []
    for _ in range(runs):
        synchronize()
        start = Mark()
        action()
        seconds.append(Mark().since(start))
    return seconds


def peak_of(action: Callable[[], object]) -> int:
    """Most bytes allocated during an action."""
    free()
    torch.cuda.reset_peak_memory_stats()
    action()
    synchronize()
    return torch.cuda.max_memory_allocated()


def profile(path: Path, action: Callable[[], object], runs: int) -> None:
    """Where the time goes, by kernel, into a text file; nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as recorded:
        for _ in range(runs):
            action()
        synchronize()
    table = recorded.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60
    )
    path.write_text(table, "utf-8")

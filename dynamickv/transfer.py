"""What the host learns from a device: numbers on their way, and how long work took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sent(numbers: Tensor) -> Callable[[], list[Any]]:
    """Send a small tensor, as it is now, to the host; what is given waits for it to arrive, and for
    none of the work that the device was given since."""
    if not numbers.is_cuda:
        there = numbers.tolist()
        return lambda: there
    # Into other memory the copy would wait for all that the device was given by then.
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[Any]:
        arrived.synchronize()
        found: list[Any] = pinned.tolist()
        return found

    return read


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished, so that clocks tell the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Runs from when it is made until `stop`. On CUDA by the device's own clock, for which the host
    waits when it asks for the time: until then it prepares what comes next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._end = self._now()

    def stop(self) -> None:
        """The work that it measures was given to the device."""
        self._end = self._now()

    def seconds(self) -> float:
        """Between the two moments."""
        if isinstance(self._end, float):
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3

    def _now(self) -> Any:
        if self._device.type != "cuda":
            synchronize(self._device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

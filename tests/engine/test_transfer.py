"""What is sent to the host is what it was then, and time is that of the device's work."""

from __future__ import annotations

import time

import pytest
import torch

from dynamickv.transfer import Stopwatch, sent

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.long, torch.float64])
def test_numbers_arrive_as_they_were_sent(device: str, dtype: torch.dtype) -> None:
    numbers = torch.zeros(2, 3, dtype=dtype, device=device)
    reads = []
    for value in range(5):
        numbers.fill_(value)
        reads.append(sent(numbers))
    numbers.fill_(9)
    assert [read() for read in reads] == [[[value] * 3] * 2 for value in range(5)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_stopwatch_tells_what_lies_between_its_two_moments(device: str) -> None:
    def work() -> None:
        # A device counts in a second to about 2e9.
        torch.cuda._sleep(10**8) if device == "cuda" else time.sleep(0.05)

    work()
    watch = Stopwatch(torch.device(device))
    work()
    watch.stop()
    work()
    assert 0.04 < watch.seconds() < 0.12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stopwatch_does_not_wait_for_the_device() -> None:
    watch = Stopwatch(torch.device("cuda"))
    torch.cuda._sleep(10**9)
    begun = time.perf_counter()
    watch.stop()
    assert time.perf_counter() - begun < 0.1 < watch.seconds()

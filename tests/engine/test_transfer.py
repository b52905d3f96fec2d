"""What is sent to the host is what it was then."""

from __future__ import annotations

import pytest
import torch

from dynamickv.transfer import sent

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

"""What the form says of itself."""

from __future__ import annotations

import pytest

from app.examples import load_examples
from app.explore.view_model import bytes_per_value, capacity_line, tokens_of


def test_capacity_is_given_in_percent_and_mebibytes() -> None:
    model = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "bytes_per_value": 4}
    assert capacity_line(model, 128, 3412) == "3.8 % of the prompt · about 5.6 of 150 MiB"


@pytest.mark.parametrize("value", [None, "", "[]", '{"tokens": -1}', '{"tokens": "x"}', "<script>"])
def test_a_readout_sent_back_by_a_browser_is_checked(value: str | None) -> None:
    assert tokens_of(value) is None


def test_the_recorded_examples_hold_float32() -> None:
    traces = [example.trace for example in load_examples().values()]
    assert {bytes_per_value(trace) for trace in traces if trace is not None} == {4}

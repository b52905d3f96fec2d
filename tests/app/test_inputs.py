"""Bad input: one clear sentence each, whatever a browser or a script sends."""

from __future__ import annotations

from typing import Any

import pytest

from app import inputs

TEXT = "A long document about a harbour. " * 40
SETTINGS = {"capacity": 128, "window_size": 8, "kernel_size": 7, "pooling": "max", "r_max": 10}


def request(**changes: Any) -> inputs.Request:
    values: dict[str, Any] = {"document": TEXT, "question": "Who?", "methods": ["DynamicKV"]}
    values |= {"max_new_tokens": 64, "settings": SETTINGS} | changes
    return inputs.build_request(**values)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"document": ""}, "document is empty"),
        ({"document": " \n\t "}, "document is empty"),
        ({"question": "  "}, "question is empty"),
        ({"document": None}, "must be text"),
        ({"document": "a" * 5_000_000}, "5,000,000 characters and this page reads 1,000,000"),
        (
            {"document": "Short.", "question": "A question that is longer?"},
            "longer than the document",
        ),
        ({"methods": ["Magic"]}, "Unknown method 'Magic'; choose from FullKV"),
        ({"methods": "DynamicKV"}, "list of names"),
        ({"settings": SETTINGS | {"capacity": 4}}, "capacity must exceed window_size=8"),
        ({"settings": SETTINGS | {"capacity": "x"}}, "whole number"),
        ({"settings": SETTINGS | {"capacity": float("nan")}}, "whole number"),
        ({"settings": SETTINGS | {"kernel_size": 4}}, "kernel_size must be odd"),
        ({"settings": SETTINGS | {"pooling": "median"}}, "pooling must be"),
        ({"max_new_tokens": 0}, "between 1 and 512"),
        ({"max_new_tokens": 10**9}, "between 1 and 512"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        request(**changes)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_fullkv_always_runs_and_the_order_is_the_registry_s() -> None:
    names = [method.name for method in request(methods=["DynamicKV", "SnapKV"]).methods]
    assert names == ["FullKV", "SnapKV", "DynamicKV"]


def test_methods_take_the_settings_they_know() -> None:
    dynamic = request(settings=SETTINGS | {"r_max": 5, "update_interval": 2}).methods[-1]
    assert dynamic.parameters["r_max"] == 5
    assert dynamic.parameters["update_interval"] == 2

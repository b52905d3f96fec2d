"""The form by names: what is typed reaches the method, and comes back into its field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.form import FIELDS, Form, form_of
from app.settings import SETTINGS
from dynamickv.record.trace import Expected
from tests.app.pages import filled
from tests.app.synthetic import synthetic_trace

TYPED = {
    "capacity": 56, "window_size": 4, "kernel_size": 5, "pooling": "avg",
    "granularity": "query_head", "r_max": 3, "update_interval": 2,
}  # fmt: skip


def test_every_setting_reaches_the_method_under_its_name() -> None:
    assert set(TYPED) == set(SETTINGS)
    job = Form.of(filled(methods=["DynamicKV"], **TYPED)).request()
    assert TYPED.items() <= job.methods[-1].parameters.items()


def test_a_record_puts_every_setting_back_into_its_field() -> None:
    trace = synthetic_trace(tokens=300)
    trace.runs[1].parameters.update(TYPED)
    back = form_of(trace, [trace.model.name])
    assert TYPED.items() <= back.items()
    assert back["model"] == trace.model.name
    assert set(back) == set(FIELDS) - {"max_new_tokens"}


def test_what_is_expected_reaches_the_request_and_comes_back() -> None:
    assert Form.of(filled(expected=" the light ")).request().expected == "the light"
    sought = Expected(text="the river", document_utf16_span=None)
    trace = replace(synthetic_trace(tokens=300), expected=sought)
    assert form_of(trace, [])["expected"] == "the river"
    assert form_of(synthetic_trace(tokens=300), [])["expected"] == ""


@pytest.mark.parametrize("value", [None, 5, "a" * 20_001])
def test_what_is_expected_must_be_a_text_of_some_length(value: object) -> None:
    with pytest.raises(ValueError, match="What you expect"):
        Form.of(filled(expected=value)).request()


def test_a_value_too_many_or_too_few_is_refused() -> None:
    for values in (filled()[:-1], [*filled(), 1]):
        with pytest.raises(ValueError, match="argument 2 is"):
            Form.of(values)

"""Runs & API: code for the form's values."""

from __future__ import annotations

import gradio as gr

from app.form import FIELDS
from app.runs.handlers import WITHOUT_TEXT
from app.serving.model_host import ModelHost
from tests.app.pages import Page, filled


def test_the_form_s_values_reach_the_snippets(host: ModelHost) -> None:
    def code(**changes: object) -> list[str]:
        values = filled(
            **{"question": "Who?", "max_new_tokens": 33, "model": host.default} | changes
        )
        named = dict(zip(FIELDS, values, strict=True))
        return Page(host).runs.snippets(gr.Request(), *(named[name] for name in WITHOUT_TEXT))

    python, client, curl, _ = code(capacity=200)
    assert "dkv.SnapKV(capacity=200)" in python
    assert "max_new_tokens=33" in client
    assert "http://page:1/gradio_api" in curl
    again, *_ = code(capacity=200, decode_budget=64, truncate=True)
    assert "decoding=dkv.Decoding(budget=64, buffer=16)" in again
    assert "truncate=True" in again
    # What cannot be run still gives code that can.
    broken = code(question=" ", capacity=4)
    compile(broken[0], "python", "exec")
    for text in broken[:3]:
        first, second = text.splitlines()[:2]
        assert first.startswith("# The form cannot be run as it is")
        assert "Capacity must exceed window_size=8 tokens, got 4." in first
        assert second
    assert not python.startswith("#")

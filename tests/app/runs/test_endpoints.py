"""The named endpoints: which there are, and what they refuse."""

from __future__ import annotations

import gradio as gr
import pytest

from app.page import build_app
from app.serving.model_host import ModelHost
from tests.app.pages import Page

PUBLIC = {"compare", "tokenize", "methods", "models"}


def test_only_the_documented_endpoints_are_public(host: ModelHost) -> None:
    config = build_app(host, {}).get_config_file()
    public = {
        d["api_name"]
        for d in config["dependencies"]
        if d["api_visibility"] == "public" and d["api_name"]
    }
    assert public == PUBLIC


def test_compare_has_defaults_for_all_but_the_texts(host: ModelHost) -> None:
    info = build_app(host, {}).get_api_info()["named_endpoints"]["/compare"]
    parameters = {p["parameter_name"]: p for p in info["parameters"]}
    assert list(parameters) == [
        "document",
        "question",
        "methods",
        "capacity",
        "max_new_tokens",
        "model",
    ]
    assert [n for n, p in parameters.items() if not p["parameter_has_default"]] == [
        "document",
        "question",
    ]
    assert parameters["methods"]["parameter_default"] == ["FullKV", "DynamicKV"]


def test_a_failed_model_is_said_and_the_page_lives(host: ModelHost) -> None:
    host.start()
    assert host.wait(5)
    state = host.state()
    assert state.state == "failed"
    assert "no network" in state.message
    with pytest.raises(gr.Error, match="no network"):
        Page(host).endpoint("compare")("A document", "A?", ["FullKV"], 128, 4, host.default)


def test_unknown_models_are_refused_before_anything_is_fetched(host: ModelHost) -> None:
    with pytest.raises(gr.Error, match="Unknown model 'evil/repo'"):
        Page(host).endpoint("compare")("A document", "A?", ["FullKV"], 128, 4, "evil/repo")

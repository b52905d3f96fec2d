"""The page as Gradio sees it: privacy, static templates, what is there from the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.components import AnswerCards, Component, TraceStore, head
from app.components.base import STATIC
from app.examples import Example
from app.page import build_app, launch_options
from app.serving.model_host import ModelHost
from app.views import VIEWS
from dynamickv.record.trace import Trace
from tests.app.views.test_views import TOY


def test_the_page_keeps_no_session_and_no_history(host: ModelHost) -> None:
    config = build_app(host, {}).get_config_file()
    assert "state" not in {c["type"] for c in config["components"]}
    assert config["connect_heartbeat"] is False
    assert config["analytics_enabled"] is False
    options = launch_options()
    assert options["run_history"] is False
    assert options["strict_cors"] is True
    assert options["state_session_capacity"] <= 64  # Gradio keeps the last outputs of so many


def test_head_asks_nothing_of_other_machines() -> None:
    text = head()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "@import" not in text
    assert "innerHTML" not in text
    theme = launch_options()["theme"]
    assert theme._stylesheets == []


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.html")), ids=lambda path: path.stem)
def test_templates_are_static(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not set("`{}$\\") & set(text)


def test_component_values_are_json_strings(trace: Trace) -> None:
    hostile = {"text": "${x} `y` <script>alert(1)</script> {{z}}"}
    component: Component = AnswerCards(hostile)
    assert json.loads(component.value) == hostile
    assert hostile["text"] not in component.html_template
    assert TraceStore(None).value is None


def test_first_paint_holds_the_recorded_run(host: ModelHost, example: Example) -> None:
    config = build_app(host, {"one": example}).get_config_file()
    values = [c["props"].get("value") for c in config["components"]]
    payloads = [json.loads(v) for v in values if isinstance(v, str) and v.startswith("{")]
    cards = next(p for p in payloads if "cards" in p)
    assert cards["source"] == "recorded on 23 November 2026"
    assert [c["method"] for c in cards["cards"]] == ["FullKV", "DynamicKV"]


def test_a_registered_view_becomes_a_tab(host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIEWS, TOY.key, TOY)
    config = build_app(host, {}).get_config_file()
    figures = next(c for c in config["components"] if c["props"].get("elem_id") == "dkv-figures")
    titles = json.loads(figures["props"]["props"]["titles"])
    assert {"key": "toy", "title": "Toy"} in titles

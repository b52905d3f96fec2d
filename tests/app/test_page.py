"""The page as Gradio sees it: endpoints, privacy, static templates, handlers without a model."""

from __future__ import annotations

import ast
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

import dynamickv as dkv
from app.components import AnswerCards, Component, TraceStore, head
from app.components.base import STATIC
from app.examples import Example, load_examples
from app.explore import view_model as vm
from app.explore.handlers import FORM_LENGTH, OWN_TEXT, Handlers, seen_at, sentence_of, tokens_of
from app.page import build_app, launch_options
from app.runs.method_cards import method_cards
from app.serving.model_host import ModelHost, PromptSize
from app.snippets import snippets
from app.views import VIEWS, View
from app.views.base import Figure, blank_figure
from dynamickv.record.trace import Trace
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

PUBLIC = {"compare", "tokenize", "methods", "models"}


def make_example(trace: Trace, folder: Path) -> Example:
    trace.save(folder / "one.json.gz")
    return Example(
        id="one", title="One", kind="report", question=trace.prompt.question, capacity=96,
        max_new_tokens=16, document="The river rose again.", run_file=folder / "one.json.gz",
    )  # fmt: skip


@pytest.fixture
def example(trace: Trace, tmp_path: Path) -> Example:
    return make_example(trace, tmp_path)


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
    toy = View(key="toy", title="Toy", render=lambda t: Figure(plot=blank_figure(200), height=200))
    monkeypatch.setitem(VIEWS, "toy", toy)
    config = build_app(host, {}).get_config_file()
    figures = next(c for c in config["components"] if c["props"].get("elem_id") == "dkv-figures")
    titles = json.loads(figures["props"]["props"]["titles"])
    assert {"key": "toy", "title": "Toy"} in titles


def test_a_failed_model_is_said_and_the_page_lives(host: ModelHost) -> None:
    host.start()
    assert host.wait(5)
    state = host.state()
    assert state.state == "failed"
    assert "no network" in state.message
    with pytest.raises(gr.Error, match="no network"):
        Handlers(host, {}).compare("A document", "A?", ["FullKV"], 128, 4, host.default)


def test_unknown_models_are_refused_before_anything_is_fetched(host: ModelHost) -> None:
    with pytest.raises(gr.Error, match="Unknown model 'evil/repo'"):
        Handlers(host, {}).compare("A document", "A?", ["FullKV"], 128, 4, "evil/repo")


def test_handlers_validate_like_the_endpoint(host: ModelHost) -> None:
    handlers = Handlers(host, {})
    settings = (128, 8, 7, "max", "kv_head", 10, 4, 64, False, True, host.default)
    events = handlers.begin(gr.Request(session_hash="a"), " ", "Who?", ["DynamicKV"], *settings)
    status, *_ = next(events)
    assert status["state"] == "error"
    with pytest.raises(gr.Error, match="document is empty"):
        next(events)


def test_errors_are_escaped_for_the_toast(host: ModelHost) -> None:
    settings = (128, 8, 7, "max", "kv_head", 10, 4, 64, False, True, host.default)
    events = Handlers(host, {}).begin(
        gr.Request(session_hash="a"), "text " * 9, "Who?", ["<img onerror=x>"], *settings
    )
    next(events)
    with pytest.raises(gr.Error) as caught:
        next(events)
    assert "<img" not in str(caught.value.message)


def test_counts_are_honest_before_the_model_is_there(host: ModelHost) -> None:
    counted = Handlers(host, {}).count("word " * 420, "Who?", host.default)
    assert counted["value"] == "about 500 tokens"
    assert counted["tokens"] == 500


@pytest.mark.parametrize(
    ("prompt", "end"),
    [(8100, "the model reads 8,192, so answers end after 93"), (4000, "the model reads 8,192")],
)
def test_the_count_says_when_little_room_is_left_for_answers(
    host: ModelHost, monkeypatch: pytest.MonkeyPatch, prompt: int, end: str
) -> None:
    size = PromptSize(prompt=prompt, document=prompt - 40, question=9, limit=8192)
    monkeypatch.setattr(host, "measure", lambda *_: size)
    counted = Handlers(host, {}).count("A long text", "Who?", host.default)
    assert counted["note"].endswith(end)


@pytest.mark.parametrize("value", [None, "", "[]", '{"tokens": -1}', '{"tokens": "x"}', "<script>"])
def test_a_readout_sent_back_by_a_browser_is_checked(value: str | None) -> None:
    assert tokens_of(value) is None


def test_picking_an_example_shows_its_record(host: ModelHost, example: Example) -> None:
    cards, store, _, *form = Handlers(host, {"one": example}).pick("one")
    document, question, methods, capacity, window, *_ = form
    assert example.trace is not None
    assert document == vm.document_of(example.trace.prompt)
    assert (question, capacity, window) == (example.question, 96, 16)
    # The form says what is on screen: pressing Run runs the same again.
    assert methods == ["FullKV", "DynamicKV"]
    assert len(form) == FORM_LENGTH
    assert cards["final"]
    assert store["example"] == "one"
    assert store["record"]["runs"][1]["method"] == "DynamicKV"


def test_the_expected_answer_is_looked_for_in_the_example_s_own_record_only(
    host: ModelHost, example: Example
) -> None:
    trace = example.trace
    assert trace is not None
    expecting = replace(example, expected=("the OLD bridge",))
    handlers = Handlers(host, {"one": expecting})
    cards, _ = handlers.shown_example(expecting)
    assert [card["verdict"] for card in cards["cards"]] == [
        ["misses the expected answer"],
        ["contains the expected answer"],
    ]
    asked = replace(trace, prompt=replace(trace.prompt, question="And who?"))
    read = replace(
        trace, prompt=replace(trace.prompt, text=trace.prompt.text.replace("river", "ocean"))
    )
    for other in (asked, read):
        cards, _ = handlers._shown(other, "file", "key")
        assert [card["verdict"] for card in cards["cards"]] == [[], []]
    cards, _ = Handlers(host, {"one": example}).shown_example(example)
    assert [card["verdict"] for card in cards["cards"]] == [[], []]


def test_a_changed_text_lets_go_of_the_example(host: ModelHost, example: Example) -> None:
    handlers = Handlers(host, {"one": example})
    assert handlers.own_text("The river rose again!", "one") == OWN_TEXT
    for same in (example.document, example.document + "\n"):
        assert handlers.own_text(same, "one") == gr.skip()
    assert handlers.own_text("anything", None) == gr.skip()


def test_broken_examples_are_left_out(tmp_path: Path, trace: Trace) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "runs").mkdir()
    good: dict[str, Any] = {
        "id": "a", "title": "A", "kind": "report", "question": "Q?", "capacity": 64,
        "max_new_tokens": 8, "document": "a.txt",
    }  # fmt: skip
    (tmp_path / "examples" / "a.json").write_text(json.dumps(good))
    (tmp_path / "examples" / "a.txt").write_text("text")
    (tmp_path / "examples" / "b.json").write_text("{")
    (tmp_path / "runs" / "a.json.gz").write_bytes(b"not gzip")
    examples = load_examples(tmp_path)
    assert list(examples) == ["a"]
    assert examples["a"].trace is None


def test_shipped_examples_have_records_and_readable_documents() -> None:
    for example in load_examples().values():
        assert example.document.strip()
        assert example.trace is not None, f"{example.id} has no readable recorded run"
        assert example.document in example.trace.prompt.text


def test_facts_are_whole_words_and_shipped_ones_are_in_their_documents(example: Example) -> None:
    expecting = replace(example, expected=("60", "Heron Seven", "港"))
    assert expecting.facts_in("It is 60.") == [True, False, False]
    assert expecting.facts_in("160 or 601, heron seven; 海港口") == [False, True, True]
    for shipped in load_examples().values():
        assert shipped.expected, shipped.id
        held = shipped.facts_in(shipped.document)
        assert all(held), (shipped.id, held)


def test_sentences_end_like_sentences() -> None:
    assert sentence_of(ValueError("capacity must exceed 8")) == "Capacity must exceed 8."
    assert sentence_of(KeyError()) == "KeyError."


HARD = "A \"question\" with \\ and \n and 'quotes' $HOME `id` {braces} END \u202e 港?"


def test_snippets_hold_the_form_s_values_whatever_the_text() -> None:
    methods = [dkv.FullKV(), dkv.DynamicKV(capacity=96, window_size=16, pooling="avg")]
    code = snippets("http://127.0.0.1:7860/", "smollm2-135m", HARD, methods, 96, 12, False)
    calls = {}
    for name in ("python", "client"):
        tree = ast.parse(code[name])
        calls[name] = {
            keyword.arg: keyword.value for node in ast.walk(tree) if isinstance(node, ast.Call)
            for keyword in node.keywords
        }  # fmt: skip
        assert ast.literal_eval(calls[name]["question"]) == HARD
        assert ast.literal_eval(calls[name]["max_new_tokens"]) == 12
    assert ast.literal_eval(calls["python"]["question_aware"]) is False
    assert "dkv.DynamicKV(capacity=96, window_size=16, pooling='avg')" in code["python"]
    assert "http://127.0.0.1:7860/gradio_api" in code["curl"]
    server = json.loads(code["mcp"])["mcpServers"]["dynamickv"]
    assert server["url"] == "http://127.0.0.1:7860/gradio_api/mcp/"


def test_the_curl_snippet_sends_the_form_s_values(tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text("Grüße ${HOME}\n", encoding="utf-8")
    code = snippets("http://127.0.0.1:1/", "tiny", HARD, [dkv.FullKV()], 96, 12)["curl"]
    request = code.split("EVENT=", 1)[0]
    subprocess.run(["bash", "-c", request], cwd=tmp_path, check=True, timeout=60)
    data = json.loads((tmp_path / "request.json").read_text())["data"]
    assert data == ["Grüße ${HOME}\n", HARD, ["FullKV"], 96, 12, "tiny"]


def test_the_python_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    llm = tiny_llm()
    monkeypatch.setattr(dkv, "load_model", lambda name: llm)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=40)]
    exec(snippets("http://x", "tiny", QUESTION, methods, 40, 4)["python"], {})
    assert [run.method for run in Trace.load("run.json.gz").runs] == ["FullKV", "SnapKV"]
    assert "MiB" in capsys.readouterr().out


def test_the_form_s_values_reach_the_snippets(host: ModelHost) -> None:
    handlers = Handlers(host, {}, url="http://page:1")
    settings = (200, 8, 7, "max", "kv_head", 10, 4, 33, False, True, host.default)
    python, client, curl, _ = handlers.snippets(gr.Request(), "Who?", ["SnapKV"], *settings)
    assert "dkv.SnapKV(capacity=200)" in python
    assert "max_new_tokens=33" in client
    assert "http://page:1/gradio_api" in curl
    # What cannot be run still gives code that can.
    broken = handlers.snippets(gr.Request(), " ", ["SnapKV"], *(4, *settings[1:]))
    compile(broken[0], "python", "exec")
    for code in broken[:3]:
        first, second = code.splitlines()[:2]
        assert first.startswith("# The form cannot be run as it is")
        assert "Capacity must exceed window_size=8 tokens, got 4." in first
        assert second
    assert not python.startswith("#")


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "<img>"}, {"kernel_size": "7"}, {"window_size": 0}, {"r_max": None}, {"x": 1}],
)
def test_a_record_with_strange_parameters_leaves_the_form_its_own(
    host: ModelHost, trace: Trace, changes: dict[str, Any]
) -> None:
    run = trace.run("DynamicKV")
    strange = replace(trace, runs=[replace(run, parameters={**run.parameters, **changes})])
    values = Handlers(host, {}).form_values(strange)
    assert values[4:9] == [8, 7, "max", "kv_head", 10]
    assert values[0] == vm.document_of(trace.prompt)


class Seen:
    """A request as a browser sends it."""

    def __init__(self, origin: str) -> None:
        self.request = True
        self.headers = {"origin": origin}


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://someone-explorer.hf.space", "https://someone-explorer.hf.space"),
        ("http://127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("null", ""),
        ("http://a.b/'; rm -rf ~; '", ""),
        ("http://a.b\n", ""),
        ("", ""),
    ],
)
def test_snippets_name_the_address_the_visitor_sees(origin: str, expected: str) -> None:
    assert seen_at(Seen(origin)) == expected  # type: ignore[arg-type]


def test_every_method_has_its_card_with_source_and_departures() -> None:
    cards = method_cards()
    for name in dkv.METHODS:
        assert f"#### {name}" in cards
    assert "https://arxiv.org/abs/2412.14838" in cards
    assert "Departures from the authors' code" in cards
    assert "`update_interval`" in cards


@pytest.mark.parametrize(
    ("asked", "capacity", "said"),
    [
        ("512", 512, "The link asks for capacity 512; the run shown was recorded at 96."),
        ("96", 96, ""),
        *((text, None, "") for text in ("", "7", "2049", "-8", "1e2", "٦٤", "99999", "<b>")),
    ],
)
def test_a_link_sets_the_capacity_and_says_of_which_the_run_is(
    host: ModelHost, example: Example, asked: str, capacity: int | None, said: str
) -> None:
    handlers = Handlers(host, {"zero": replace(example, id="zero"), "one": example})
    for name, place in (("zero", 0), ("one", 96)):
        shown = handlers.link(gr.Request(query_params={"ex": name, "b": asked}))
        assert len(shown) == 4 + FORM_LENGTH
        there = gr.skip() if place == 0 else place
        assert shown[7] == (there if capacity is None else capacity)
        status = shown[3]
        assert status.get("message", "") == said

"""Hostile input over every endpoint: refused with one sentence, nothing executed, nothing leaked,
and the server goes on.

One server stands for the whole file; at the end it still answers as the engine does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import dynamickv as dkv
from tests.engine.tiny import DOCUMENT, QUESTION
from tests.server.conftest import Server
from tests.server.hostile import (
    GOOD,
    REQUESTS,
    WHAT_IF,
    WRONG,
    compare_cases,
    harmless_cases,
    hostile_but_valid_run,
    run_files,
)

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_secretsecretsecret"
LEAKS = re.compile(
    r"Traceback|File \\?\"|site-packages|/usr/lib|root:x:0|"
    + "|".join(map(re.escape, (str(ROOT), str(Path.home()) + "/", SECRET)))
)
DETAILED = 700
"""Longest answer to something refused, in characters: a sentence and what carries it."""


@pytest.fixture(autouse=True)
def unharmed(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every case the server says that it is well, and nothing was executed."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = {*ROOT.iterdir(), *Path.cwd().iterdir()}
    yield
    health = server.http.get("health").json()
    assert health["ready"]
    assert health["queue"] == {"running": 0, "waiting": 0}
    made = {*ROOT.iterdir(), *Path.cwd().iterdir()} - before
    assert not any("pwned" in path.name for path in made)


def assert_one_sentence(text: str) -> None:
    assert not LEAKS.search(text), text
    assert len(text) < DETAILED, text
    assert "\n" not in text.strip()


def assert_refused(response: httpx.Response) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:300])
    assert_one_sentence(response.text)


def error_of(messages: list[dict[str, Any]]) -> str:
    """What an event was refused with, wherever it says so."""
    done = messages[-1]
    assert done["msg"] == "process_completed", done
    return str(done["output"].get("error"))


def post(server: Server, path: str, data: list[Any]) -> httpx.Response:
    # httpx itself refuses to write NaN and infinity.
    body = json.dumps({"data": data}).encode("utf-8", "surrogatepass")
    kind = {"content-type": "application/json"}
    return server.http.post(f"gradio_api/run/{path}", content=body, headers=kind)


@pytest.mark.parametrize("data", compare_cases().values(), ids=compare_cases())
def test_compare_refuses(server: Server, data: list[Any]) -> None:
    assert_refused(post(server, "compare", data))


@pytest.mark.parametrize("data", harmless_cases().values(), ids=harmless_cases())
def test_compare_reads_any_text_as_text(server: Server, data: list[Any]) -> None:
    document, question, *_ = data
    answered = post(server, "compare", data)
    assert answered.status_code == 200, answered.text[:300]
    record = answered.json()["data"][0]
    trace = dkv.compare(server.llm, document, question, methods=[dkv.FullKV()], max_new_tokens=4)
    assert record["runs"][0]["token_ids"] == trace.runs[0].token_ids
    assert document in record["prompt"]["text"]


TOKENIZE = {
    **{f"document {name}": [value, "", "tiny"] for name, value in WRONG.items() if name != "text"},
    **{
        f"question {name}": [DOCUMENT, value, "tiny"]
        for name, value in WRONG.items()
        if not isinstance(value, str)
    },
    **{f"model {name}": [DOCUMENT, "", value] for name, value in WRONG.items()},
}


@pytest.mark.parametrize("data", TOKENIZE.values(), ids=TOKENIZE)
def test_tokenize_refuses(server: Server, data: list[Any]) -> None:
    assert_refused(post(server, "tokenize", data))


def filled(server: Server, value: Any) -> Any:
    """A request's body with the server's own numbers in it."""
    numbers = {
        "COMPARE": server.function("compare"),
        "WHAT_IF": server.component("dkv-what-if"),
    }
    if isinstance(value, dict):
        return {key: filled(server, item) for key, item in value.items()}
    return numbers.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize(("method", "path", "sent"), REQUESTS.values(), ids=REQUESTS)
def test_a_broken_request_is_refused(
    server: Server, method: str, path: str, sent: dict[str, Any]
) -> None:
    if "json" in sent:
        sent = {**sent, "json": filled(server, sent["json"])}
    assert_refused(server.http.request(method, path, **sent))


EVENTS = [
    "begin",
    "run",
    "snippets",
    "count",
    "capacity_line",
    "lock_reference",
    "own_text",
    "pick",
]


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("event", EVENTS)
def test_the_page_s_own_events_leak_nothing(server: Server, event: str, value: Any) -> None:
    number = server.function(event)
    takes = len(server.demo.fns[number].inputs)
    status, messages = server.call({"fn_index": number, "data": [value] * takes})
    if status != 200:
        assert 400 <= status < 500
        return
    text = str(messages[-1])
    assert not LEAKS.search(text), text
    # Either it is refused in a sentence, or the page shows something harmless.
    if messages[-1]["output"].get("error") is not None or not messages[-1]["success"]:
        assert_one_sentence(error_of(messages))
        assert error_of(messages) != "None"


@pytest.mark.parametrize("asked", WHAT_IF.values(), ids=WHAT_IF)
@pytest.mark.parametrize("name", ["predict", "scores"])
def test_the_browser_s_functions_refuse(server: Server, name: str, asked: Any) -> None:
    element = "dkv-what-if" if name == "predict" else "dkv-evidence"
    body = {"component_id": server.component(element), "fn_name": name, "data": asked}
    answered = server.http.post("gradio_api/component_server", json={**body, "session_hash": "h"})
    assert answered.status_code == 200
    assert_one_sentence(answered.text)
    assert set(answered.json()) == {"error"}


@pytest.mark.parametrize("event", ["answer", "read"])
@pytest.mark.parametrize("asked", WHAT_IF.values(), ids=WHAT_IF)
def test_going_on_from_a_forged_run_is_refused(server: Server, event: str, asked: Any) -> None:
    number = server.function(event)
    status, messages = server.call({"fn_index": number, "data": [], "event_data": asked})
    if status != 200:
        assert 400 <= status < 500
        return
    text = str(messages[-1]["output"])
    assert not LEAKS.search(text)
    assert '"state":"error"' in text or messages[-1]["output"].get("error")


def uploaded(server: Server, name: str, content: bytes) -> str:
    answered = server.http.post("gradio_api/upload", files={"files": (name, content)})
    assert answered.status_code == 200
    return str(answered.json()[0])


def open_file(server: Server, event: str, path: str) -> dict[str, Any]:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    status, messages = server.call({"fn_index": server.function(event), "data": [file]})
    assert status == 200
    return messages[-1]


@pytest.mark.parametrize(("name", "content"), run_files().values(), ids=run_files())
def test_a_hostile_run_file_is_refused_and_deleted(
    server: Server, name: str, content: bytes
) -> None:
    path = uploaded(server, name, content)
    done = open_file(server, "open_run", path)
    assert "Not opened." in str(done["output"]), done["output"]
    assert_one_sentence(str(done["output"]["data"][3]))
    assert not os.path.exists(path)


def test_a_well_formed_run_file_is_data_whatever_its_text(server: Server, tmp_path: Path) -> None:
    trace = hostile_but_valid_run()
    trace.save(tmp_path / "run.json.gz")
    path = uploaded(server, "run.json.gz", (tmp_path / "run.json.gz").read_bytes())
    done = open_file(server, "open_run", path)
    assert "Opened." in str(done["output"])
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "app.py", "/proc/self/environ"]
)
@pytest.mark.parametrize("event", ["open_run", "upload"])
def test_a_forged_path_opens_nothing(server: Server, event: str, path: str) -> None:
    done = open_file(server, event, path)
    assert not done["success"]
    assert_one_sentence(error_of([done]))
    assert os.path.exists("/etc/passwd")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", b"\x89PNG\r\n\x1a\n\0\0" * 40),
        ("x.txt", bytes(range(128, 256)) * 20),
        ("x.exe", b"MZ"),
        ("x.txt", b""),
        ("x.md", b"a" * (2 * 2**20 + 1)),
        ("<img src=x onerror=alert(1)>.exe", b"x"),
    ],
    ids=["picture", "noise", "program", "empty", "3 MiB", "markup as a name"],
)
def test_a_hostile_upload_is_refused_and_deleted(server: Server, name: str, content: bytes) -> None:
    path = uploaded(server, name, content)
    done = open_file(server, "upload", path)
    assert not done["success"]
    assert_one_sentence(error_of([done]))
    assert "<img" not in error_of([done])
    assert not os.path.exists(path) or name.endswith(".exe")


def test_events_that_do_not_queue_come_by_number(server: Server) -> None:
    """As the page sends Stop."""
    body = {"fn_index": server.function("stop"), "data": [], "session_hash": "x"}
    assert server.http.post("gradio_api/run/predict", json=body).status_code == 200
    assert_refused(server.http.post("gradio_api/run/predict", json={**body, "fn_index": 10**6}))
    assert_refused(server.http.post("gradio_api/run/predict", json={**body, "fn_index": "stop"}))


def test_every_public_endpoint_is_among_these(server: Server) -> None:
    public = {
        function.api_name
        for function in server.demo.fns.values()
        if function.api_visibility == "public"
    }
    assert public == {"compare", "tokenize", "methods", "models"}
    for name in ("methods", "models"):  # they take no values
        assert_refused(post(server, name, [1]))


def test_afterwards_it_still_answers_as_the_engine_does(server: Server) -> None:
    record = post(server, "compare", GOOD).json()["data"][0]
    trace = dkv.compare(server.llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=4)
    assert record["runs"][0]["token_ids"] == trace.runs[0].token_ids

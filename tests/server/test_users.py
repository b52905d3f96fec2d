"""Many at once: everyone gets the own answer, nobody waits for small things, nobody is lost."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import dynamickv as dkv
from dynamickv.decoding.decode_step import RowSteps
from tests.app.pages import filled
from tests.engine.tiny import DOCUMENT, QUESTION
from tests.server.conftest import Server

USERS = 20
SLACK = 2.0
"""Seconds a small request may take here; the target of 0.25 is for a machine with nothing else to
do, and `make soak` reports it."""


def text_of(user: int) -> str:
    return f"{DOCUMENT} Visitor {user} came on day {user * 37 % 91} with {user + 3} boats."


def ask(server: Server, user: int) -> dict[str, Any]:
    client = Client(server.url, verbose=False)
    record: dict[str, Any] = client.predict(
        text_of(user), QUESTION, ["FullKV", "SnapKV"], 40, 12, "tiny", api_name="/compare"
    )
    client.close()
    return record


def test_twenty_users_at_once_each_get_their_own_right_answer(server: Server) -> None:
    small: list[float] = []
    done = threading.Event()

    def look_around() -> None:
        while not done.is_set():
            start = time.perf_counter()
            body = {"data": [text_of(99), QUESTION, "tiny"]}
            assert server.http.post("gradio_api/run/tokenize", json=body).status_code == 200
            small.append(time.perf_counter() - start)

    with ThreadPoolExecutor(USERS + 1) as pool:
        looking = pool.submit(look_around)
        records = list(pool.map(lambda user: ask(server, user), range(USERS)))
        done.set()
        looking.result(30)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=40)]
    for user, record in enumerate(records):
        trace = dkv.compare(server.llm, text_of(user), QUESTION, methods=methods, max_new_tokens=12)
        assert text_of(user) in record["prompt"]["text"]
        for got, own in zip(record["runs"], trace.runs, strict=True):
            assert got["token_ids"] == own.token_ids
            assert got["retained"]["bits"] == own.retained.bits
            assert got["answer"] == own.answer
    assert len({str(record["runs"][0]["token_ids"]) for record in records}) > USERS // 2
    assert statistics.median(small) < SLACK, small
    print(f"small requests meanwhile: median {1000 * statistics.median(small):.0f} ms")


def test_a_key_of_another_session_is_worth_nothing_unless_known(server: Server) -> None:
    """Keys are random; a session's own record is never offered to another."""
    number = server.function("run")
    values = filled(max_new_tokens=4)
    done = server.call({"fn_index": number, "data": values}, "one")[1][-1]
    store = json.loads(done["output"]["data"][2])
    assert len(store["key"]) >= 32
    again = server.call({"fn_index": number, "data": values}, "two")[1][-1]
    assert json.loads(again["output"]["data"][2])["key"] != store["key"]


def begin_slow(server: Server, session: str) -> httpx.Response:
    """A long run, as the page starts it."""
    body = {
        "fn_index": server.function("run"),
        "data": filled(max_new_tokens=512),
        "session_hash": session,
    }
    return server.http.post("gradio_api/queue/join", json=body)


def comparing(server: Server, session: str) -> AbstractContextManager[httpx.Response]:
    """A long comparison as a client makes it, and the stream of what it is told."""
    body = {
        "fn_index": server.function("compare"),
        "data": [DOCUMENT, QUESTION, ["SnapKV"], 40, 512, "tiny"],
        "session_hash": session,
    }
    server.http.post("gradio_api/queue/join", json=body)
    parameters = {"session_hash": session}
    return server.http.stream("GET", "gradio_api/queue/data", params=parameters)


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def free(server: Server) -> bool:
    return server.turns.counts() == {"running": 0, "waiting": 0}


@pytest.fixture
def slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every pass takes so long that a run of 512 tokens would outlast this test; one entry each."""
    passes: list[int] = []

    def slowed(work: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*args: Any, **kwargs: Any) -> Any:
            passes.append(len(passes))
            time.sleep(0.1)
            return work(*args, **kwargs)

        return slowly

    # The model's own pass, and the step that stands for it on the CPU.
    model = type(server.llm.model)
    monkeypatch.setattr(model, "forward", slowed(model.forward))
    monkeypatch.setattr(RowSteps, "__call__", slowed(RowSteps.__call__))
    return passes


@pytest.mark.usefixtures("slow")
def test_a_closed_tab_stops_its_run(server: Server) -> None:
    begin_slow(server, "closed")
    parameters = {"session_hash": "closed"}
    with server.http.stream("GET", "gradio_api/queue/data", params=parameters) as stream:
        for line in stream.iter_lines():
            if "Answering" in line:
                break
    wait_for(lambda: free(server))  # Gradio looks every 10 s, or at the next event


def test_a_client_that_goes_away_stops_its_comparison(server: Server, slow: list[int]) -> None:
    with comparing(server, "gone") as stream:
        lines = stream.iter_lines()  # held on to: what reads a stream closes it when it is dropped
        next(lines)
        wait_for(lambda: len(slow) > 2)
    wait_for(lambda: free(server))
    assert len(slow) < 256


def test_a_client_that_leaves_before_its_comparison_joins_the_queue_is_stopped_too(
    server: Server, slow: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, entered, gone = server.host.check, threading.Event(), threading.Event()

    def waits(model: str) -> str:
        entered.set()
        assert gone.wait(20)
        return check(model)

    monkeypatch.setattr(server.host, "check", waits)
    monkeypatch.setattr(server.turns, "stop", lambda session: (stop(session), gone.set()))
    stop = type(server.turns).stop.__get__(server.turns)
    with comparing(server, "early") as stream:
        lines = stream.iter_lines()
        next(lines)
        assert entered.wait(20)
    assert gone.wait(20)
    wait_for(lambda: free(server))
    time.sleep(0.5)
    assert free(server)
    assert len(slow) < 5


def test_stop_ends_a_run_long_before_its_last_token(server: Server, slow: list[int]) -> None:
    begin_slow(server, "stopped")
    asked = False
    with server.http.stream(
        "GET", "gradio_api/queue/data", params={"session_hash": "stopped"}
    ) as stream:
        for line in stream.iter_lines():
            if "Answering" in line and not asked:
                asked = True
                body = {"fn_index": server.function("stop"), "data": [], "session_hash": "stopped"}
                httpx.post(f"{server.url}gradio_api/queue/join", json=body)
            if "Stopped: the answers are partial" in line:
                break
    assert 0 < len(slow) < 256
    wait_for(lambda: free(server))


@pytest.mark.usefixtures("slow")
def test_those_who_wait_are_told_their_place_and_may_leave(server: Server) -> None:
    begin_slow(server, "first")
    wait_for(lambda: server.turns.counts()["running"] == 1)
    begin_slow(server, "second")
    place = ""
    with server.http.stream(
        "GET", "gradio_api/queue/data", params={"session_hash": "second"}
    ) as stream:
        for line in stream.iter_lines():
            if "Waiting for your turn" in line:
                place = line
                break
    assert "1 run before yours" in place
    wait_for(lambda: server.turns.counts()["waiting"] == 0)
    server.turns.stop("first")
    with server.http.stream("GET", "gradio_api/queue/data", params={"session_hash": "first"}) as s:
        for _ in s.iter_lines():
            pass
    wait_for(lambda: free(server))


@pytest.mark.usefixtures("slow")
def test_a_full_queue_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.turns, "most", 0)
    with pytest.raises(AppError, match="runs are waiting already"):
        ask(server, 1)

"""What stands before every request, around an application that misbehaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from app.serving.guard import HEADERS, MAX_BODY, Buckets, Guard


class Inside(Exception):
    """Says too much."""


def answer(request: Request) -> Response:
    kind = request.query_params.get("kind", "")
    if kind == "bug":
        raise Inside("secret at /srv/secret.py")
    if kind == "malformed":
        raise KeyError("secret")
    if kind == "traceback":
        return PlainTextResponse("Traceback: /srv/secret.py", 500)
    if kind == "handler":
        return JSONResponse({"error": "The document is empty."}, 500)
    if kind == "hidden":
        return JSONResponse({"error": None}, 500)
    if kind == "full":
        return JSONResponse({"detail": "secret"}, 503)
    if kind == "fields":
        return JSONResponse({"detail": [{"input": "secret", "url": "x"}]}, 422)
    return PlainTextResponse("fine")


async def read(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


def guarded(**options: Any) -> TestClient:
    routes = [
        Route("/", answer, methods=["GET", "POST"]),
        Route("/read", read, methods=["POST"]),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, **options)])
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("kind", "status", "sentence"),
    [
        ("bug", 500, "This request cannot be read"),
        ("malformed", 400, "This request cannot be read"),
        ("traceback", 500, "This request cannot be read"),
        ("handler", 400, "The document is empty."),
        ("hidden", 400, "This request cannot be read"),
        ("full", 429, "The queue is full"),
        ("fields", 422, "This request cannot be read"),
    ],
)
def test_an_error_is_one_sentence(kind: str, status: int, sentence: str) -> None:
    answered = guarded().post(f"/?kind={kind}")
    assert answered.status_code == status
    assert answered.json()["detail"].startswith(sentence)
    assert "secret" not in answered.text


def test_what_is_fine_passes_with_headers() -> None:
    answered = guarded().get("/")
    assert (answered.status_code, answered.text) == (200, "fine")
    for name, value in HEADERS:
        assert answered.headers[name.decode()] == value.decode()
    policy = answered.headers["content-security-policy"]
    assert "http" not in policy
    assert "default-src 'self'" in policy
    assert set(HEADERS) <= {
        (name.encode(), value.encode()) for name, value in guarded().get("/none").headers.items()
    }


def test_a_page_that_is_not_ready_may_say_so() -> None:
    assert guarded().get("/?kind=full").status_code == 503


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused(chunked: bool) -> None:
    size = MAX_BODY + 1
    body: Any = (b"x" * 2**20 for _ in range(MAX_BODY // 2**20 + 1)) if chunked else b"x" * size
    answered = guarded().post("/read", content=body)
    assert answered.status_code == 413
    assert "16 MiB" in answered.text
    assert guarded().post("/read", content=b"x" * 1000).text == "1000"


def test_too_many_requests_are_refused_and_reading_is_not() -> None:
    client = guarded(buckets=Buckets(burst=3, per_second=0))
    assert [client.post("/").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    assert client.post("/").headers["retry-after"]
    assert client.get("/").status_code == 200


def test_a_bucket_refills_and_addresses_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("app.serving.guard.time.monotonic", lambda: now[0])
    buckets = Buckets(burst=2, per_second=1)
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
    assert buckets.take("b")
    now[0] = 1.5
    assert [buckets.take("a") for _ in range(2)] == [True, False]


def test_unused_routes_of_gradio_are_closed() -> None:
    for path in ("/gradio_api/dev/reload", "/gradio_api/vibe-edit", "/gradio_api/proxy=http://x"):
        assert guarded().get(path).json()["detail"] == "There is no such page here."


@pytest.mark.parametrize(
    ("chunk", "gone", "finished", "left"),
    [
        (b'data: {"msg":"estimation"}\n\n', False, False, ["me"]),
        (b'data: {"msg":"estimation"}\n\n', True, True, ["me"]),
        (b'data: {"msg":"close_stream"}\n\n', False, False, []),
        (b'data: {"msg":"close_stream"}\n\n', True, True, []),
        (b"data: {}\n\n", False, True, []),
    ],
    ids=["cut off", "ended for a client gone", "told to close", "told and gone", "finished"],
)
def test_a_client_that_leaves_is_told_of(
    chunk: bytes, gone: bool, finished: bool, left: list[str]
) -> None:
    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if gone:
            await receive()
        if finished:
            await send({"type": "http.response.body", "body": b""})

    told: list[str] = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/gradio_api/queue/data",
        "query_string": b"session_hash=me",
        "headers": [],
        "client": ("127.0.0.1", 1),
    }

    async def nothing(*_: Any) -> Any:
        return {"type": "http.disconnect"}

    asyncio.run(Guard(stream, on_leave=told.append)(scope, nothing, nothing))
    assert told == left

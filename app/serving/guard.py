"""What stands before every request: limits of size and rate, headers, and answers for broken
requests that tell nothing about the inside.

Knows HTTP and, of the page, how many values each of its functions takes. Written as plain ASGI so
that event streams pass through unbuffered.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_BODY = 16 * 2**20
"""Bytes of a request's body; a document of a million characters fits, however it is escaped."""
BURST, PER_SECOND = 3000, 100
"""Requests that change something, per address: at once, and in the long run. A classroom behind one
address stays far below."""
ADDRESSES = 4096
"""Addresses remembered."""
# Gradio's page needs inline scripts and `new Function`; nothing comes from another host.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), payment=()"),
    (b"content-security-policy", POLICY.encode()),
]
BROKEN = "This request cannot be read: check the endpoint, its parameters and their types."
# What reading a malformed request raises inside Gradio, besides its own errors; anything else is a
# fault of ours.
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
STREAM = "/queue/data"
CALL = "/call/"
WITH_VALUES = ("/queue/join", CALL, "/run/", "/api/")
"""Requests that call a function; Gradio logs the values of those it cannot match, so they are
matched here first."""
UNUSED = re.compile(
    r"/(dev/reload|vibe-|proxy=|process_recording|deep_link|run-history|stream/|monitoring|"
    r"undo-vibe|custom_component/)"
)
"""Gradio's routes that this page has no use for; some of them hold a connection for ever."""
# An error that Gradio was told not to show, in an event stream.
CLOSED = b'"msg":"close_stream"'
HIDDEN, SHOWN = b'{"error":null}', json.dumps({"error": BROKEN}).encode()


class Refused(Exception):
    """A request is not let through; the status, and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def too_large() -> Refused:
    """The body is larger than `MAX_BODY`."""
    return Refused(413, f"The request is larger than {MAX_BODY // 2**20} MiB: shorten it.")


class Buckets:
    """Requests per address: a bucket of `burst` that refills with `per_second`."""

    def __init__(self, burst: float = BURST, per_second: float = PER_SECOND) -> None:
        self.burst, self.per_second = burst, per_second
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, address: str) -> bool:
        """Whether one more request is within the limit."""
        now = time.monotonic()
        with self._lock:
            left, then = self._held.pop(address, (self.burst, now))
            left = min(self.burst, left + (now - then) * self.per_second)
            self._held[address] = (max(left - 1, 0), now)
            while len(self._held) > ADDRESSES:
                self._held.popitem(last=False)
            return left >= 1


class Guard:
    """The middleware; `on_leave` is called with the session of a client that went away while it
    waited for something, `on_ask` with that of one who sends work.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_leave: Callable[[str], None] | None = None,
        on_ask: Callable[[str], None] | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.app = app
        self.on_leave, self.on_ask = on_leave, on_ask
        self.buckets = buckets or Buckets()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, scope["method"])
        address = scope["client"][0] if scope.get("client") else ""
        try:
            if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self.buckets.take(address):
                raise Refused(429, "Too many requests: wait a moment and try again.")
            if UNUSED.search(scope["path"]):
                raise Refused(404, "There is no such page here.")
            told = dict(scope["headers"]).get(b"content-length", b"0")
            if told.isdigit() and int(told) > MAX_BODY:
                raise too_large()
            receive = answer.heard(_limited(receive))
            if scope["method"] == "POST" and any(part in scope["path"] for part in WITH_VALUES):
                receive, session = await _matched(scope, receive)
                if self.on_ask and session:
                    self.on_ask(session)
            await self.app(scope, receive, answer.send)
        except Refused as refusal:
            await answer.refuse(refusal.status, str(refusal))
        except Exception as error:
            refused = isinstance(error, MALFORMED) or type(error).__module__.startswith("gradio")
            fault = not refused and not answer.started
            log.log(
                logging.ERROR if fault else logging.WARNING,
                "a request failed",
                exc_info=error,
                extra={"method": scope["method"], "status": 500 if fault else 400},
            )
            await answer.refuse(500 if fault else 400, BROKEN)
        finally:
            session = _session(scope)
            if self.on_leave and session and answer.started and not answer.complete:
                self.on_leave(session)


class _Answer:
    """Sends an answer on, with headers; an error's body is replaced."""

    def __init__(self, send: Send, method: str) -> None:
        self._send = send
        # A 503 that is read, as of /health, says how things stand.
        self._replaced = (422, 500) if method == "GET" else (422, 500, 503)
        self._held: Message | None = None
        self._body = b""
        self._streams = False
        self._gone = False
        self.started = False
        self.complete = False

    def heard(self, receive: Receive) -> Receive:
        """The same messages, watched for the client's leaving."""

        async def watched() -> Message:
            message = await receive()
            self._gone = self._gone or message["type"] == "http.disconnect"
            return message

        return watched

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] in self._replaced:
                self._held = message
                return
            self.started = True
            kind = dict(message.get("headers", [])).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            names = {name.lower() for name, _ in message.get("headers", [])}
            message["headers"] = [
                *message.get("headers", []),
                *((name, value) for name, value in HEADERS if name not in names),
            ]
        elif self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                status = self._held["status"]
                self._held = None
                await self.refuse(*_said(status, self._body))
            return
        else:
            if self._streams and HIDDEN in message.get("body", b""):
                message["body"] = message["body"].replace(HIDDEN, SHOWN)
            # A client that was told so closes the connection at once, often before its last byte.
            # Gradio also ends a stream whose client is gone as if all had been said.
            ended = not message.get("more_body") and not self._gone
            self.complete = self.complete or CLOSED in message.get("body", b"") or ended
        await self._send(message)

    async def refuse(self, status: int, sentence: str) -> None:
        """One sentence as JSON; a stream that has begun just ends."""
        if self.started:
            if not self.complete:
                self.complete = True
                await self._send({"type": "http.response.body", "body": b""})
            return
        self.started = self.complete = True
        self._held = None
        # Clients of different routes read one or the other.
        body = json.dumps({"detail": sentence, "error": sentence}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *HEADERS,
        ]
        if status == 429:
            headers.append((b"retry-after", b"5"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _said(status: int, body: bytes) -> tuple[int, str]:
    """The status and the sentence for an error of Gradio's: its direct calls answer 500 to whatever
    a handler refused, and its full queue 503.
    """
    if status == 503:
        return 429, "The queue is full: try again in a minute."
    try:
        told: Any = json.loads(body)
    except ValueError:
        return status, BROKEN
    sentence = told.get("error") if isinstance(told, dict) else None
    if status == 500 and isinstance(told, dict) and "error" in told:
        return 400, sentence if isinstance(sentence, str) and "\n" not in sentence else BROKEN
    return status, BROKEN


def _session(scope: Scope) -> str | None:
    """Whose events a request listens to, if it does."""
    path = str(scope["path"])
    if scope["method"] != "GET":
        return None
    if path.endswith(STREAM):
        found = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash")
        return found[0] if found else None
    # A call without session has its event's id for one.
    return path.rpartition("/")[2] if CALL in path else None


async def _matched(scope: Scope, receive: Receive) -> tuple[Receive, str | None]:
    """The same body again, read and found to fit a function of the page, and its session.

    Raises:
        Refused: it does not.
    """
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return receive, None  # the client is gone
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "The request is not JSON: check what is sent.") from None
    if not isinstance(sent, dict):
        raise Refused(400, BROKEN)
    _check_values(scope, sent)
    replayed = False

    async def again() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    session = sent.get("session_hash")
    return again, session if isinstance(session, str) else None


def _check_values(scope: Scope, sent: dict[str, Any]) -> None:
    """Raise Refused unless there is such a function and it takes so many values."""
    path = str(scope["path"]).rstrip("/")
    functions = scope["app"].get_blocks().fns
    number, name = sent.get("fn_index"), path.rpartition("/")[2]
    if name == "join" or number is not None:
        # Events that do not queue come by number too, under a name that means nothing.
        function = functions.get(number) if type(number) is int else None
        name = "This event"
    else:
        function = next((f for f in functions.values() if f.api_name == name), None)
    if function is None or function.fn is None:
        raise Refused(404, "There is no such endpoint here: see /?view=api for those there are.")
    if "/call/v2/" in path:
        return  # values by name, which Gradio checks
    values, takes = sent.get("data"), len(function.inputs)
    if not isinstance(values, list) or len(values) != takes:
        got = len(values) if isinstance(values, list) else "none"
        raise Refused(400, f"{name} takes {takes} values in a list called data, got {got}.")


def _limited(receive: Receive) -> Receive:
    """The same body, which is refused when it grows beyond `MAX_BODY`."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise too_large()
        return message

    return limited

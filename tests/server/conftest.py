"""The page as strangers reach it: one real server on a tiny model, and what speaks HTTP to it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

import dynamickv as dkv
from app.page import MAX_EVENTS, build_app, launch_options
from app.serving.model_host import ModelHost
from app.serving.turns import Turns
from tests.engine.tiny import tiny_llm


@dataclass(frozen=True)
class Server:
    """A page that is being served."""

    url: str
    demo: gr.Blocks
    host: ModelHost
    turns: Turns
    llm: dkv.LoadedModel
    uploads: Path
    http: httpx.Client

    def function(self, handler: str) -> int:
        """The number of the page's event that calls Explore's handler of that name."""
        for number, function in self.demo.fns.items():
            lab = getattr(function.fn, "__qualname__", "").startswith("LabHandlers.")
            if function.name == handler and not lab:
                return int(number)
        raise LookupError(handler)

    def component(self, elem_id: str) -> int:
        """The number of a component."""
        for number, block in self.demo.blocks.items():
            if getattr(block, "elem_id", None) == elem_id:
                return int(number)
        raise LookupError(elem_id)

    def call(
        self, body: dict[str, Any], session: str = "s", wait: float = 30
    ) -> tuple[int, list[dict[str, Any]]]:
        """Join the queue and read what comes back: the status, and the messages."""
        joined = self.http.post(
            "gradio_api/queue/join", json={"session_hash": session, **body}, timeout=wait
        )
        if joined.status_code != 200:
            return joined.status_code, [joined.json()]
        messages = []
        listening = self.http.stream(
            "GET", "gradio_api/queue/data", params={"session_hash": session}, timeout=wait
        )
        with listening as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
        return 200, [m for m in messages if m["msg"] != "close_stream"]


def serve(llm: dkv.LoadedModel, uploads: Path, turns: Turns | None = None) -> Iterator[Server]:
    """A server with that model on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    host, turns = ModelHost("tiny", loader=lambda _: llm), turns or Turns()
    demo = build_app(host, {}, url=f"http://127.0.0.1:{port}", turns=turns)
    demo.queue(max_size=MAX_EVENTS)
    demo.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        **launch_options(host, turns),
    )
    assert host.wait(30)
    url = f"http://127.0.0.1:{port}/"
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        yield Server(url, demo, host, turns, llm, uploads, http)
    demo.close(verbose=False)
    if before is None:
        del os.environ["GRADIO_TEMP_DIR"]
    else:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests here."""
    yield from serve(tiny_llm(), tmp_path_factory.mktemp("uploads"))

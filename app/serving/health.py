"""/health: whether the page can answer, for whoever watches over it. Says nothing of visitors."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import dynamickv as dkv

from .model_host import ModelHost
from .turns import Turns


def health(host: ModelHost, turns: Turns) -> dict[str, Any]:
    """Ready or not, which model, and how long the queue is."""
    state = host.state().state
    return {
        "ready": state == "ready",
        "model": {"name": host.label(host.default), "state": state, "loaded": host.loaded()},
        "queue": turns.counts(),
        "version": dkv.__version__,
    }


def health_routes(host: ModelHost, turns: Turns) -> list[Route]:
    """/health, and the same where Gradio's Node server hands it on; 200 when ready, 503 while
    loading or after a failure, as probes expect.
    """

    def answer(_: Request) -> JSONResponse:
        report = health(host, turns)
        return JSONResponse(
            report, 200 if report["ready"] else 503, headers={"Cache-Control": "no-store"}
        )

    return [Route(path, answer, methods=["GET"]) for path in ("/health", "/gradio_api/health")]

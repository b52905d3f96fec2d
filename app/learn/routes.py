"""Where the Learn tab fetches its lessons: only when somebody opens the tab, so that the first
paint of the page pays nothing for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.components import dumps

from .geometry import describe_models
from .lessons import Lesson, load_lessons
from .view_model import lesson_payload, pair_payload


def lesson_routes() -> list[Route]:
    """The index of lessons, each lesson, and the document that is asked twice."""
    return [
        Route("/gradio_api/explorer/learn/index.json", index),
        Route("/gradio_api/explorer/learn/{name}.json", lesson),
    ]


def index(_: Request) -> Response:
    """Which lessons there are, and the calculator's models."""
    return as_json(dumps(index_payload()))


async def lesson(request: Request) -> Response:
    """One lesson by its name; 404 for a name that is none."""
    text = await run_in_threadpool(lesson_text, request.path_params["name"])
    if text is None:
        return Response("There is no such lesson.", status_code=404, media_type="text/plain")
    return as_json(text)


def index_payload() -> dict[str, Any]:
    """The lessons in their order, and the models."""
    return {
        "lessons": [{"id": item.id, "title": item.title} for item in lessons().values()],
        "models": describe_models(),
    }


@lru_cache(maxsize=1)
def lessons() -> dict[str, Lesson]:
    """The lessons of this installation, read once."""
    return load_lessons()


@lru_cache(maxsize=8)
def lesson_text(name: str) -> str | None:
    """A lesson's JSON, built once; None if there is no such lesson."""
    if name == "pair":
        payload = pair_payload()
    else:
        payload = lesson_payload(lessons()[name]) if name in lessons() else None
    return None if payload is None else dumps(payload)


def as_json(text: str) -> Response:
    """Files of an installation do not change while it runs."""
    return Response(
        text, media_type="application/json", headers={"Cache-Control": "public, max-age=600"}
    )

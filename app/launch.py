"""How the page is served: looks, limits, privacy, and what it serves besides."""

from __future__ import annotations

import importlib.util
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from .components import head, offline_page
from .components.look import build_theme
from .learn import lesson_routes
from .preview import PICTURE_PATH, LinkPreview, picture
from .serving.guard import Guard
from .serving.health import health_routes
from .serving.model_host import ModelHost
from .serving.turns import Turns
from .views import VIEWS, plotly_source

MAX_EVENTS = 256
"""Events that Gradio's queue holds, the many small ones included."""
MAX_THREADS = 128
"""More than serving/turns.py lets wait, so that small events always find a thread."""
MAX_SESSIONS = 32
"""Visitors whose last outputs Gradio keeps, some MB each. The page needs none of them: a visitor
beyond these is served alike."""
MAX_UPLOAD = "8mb"


def launch_options(host: ModelHost | None = None, turns: Turns | None = None) -> dict[str, Any]:
    """Arguments of `launch` that belong to the page: looks, limits, privacy, and what it serves
    besides. With the host and the turns of the page there is /health, and a client that goes away
    gives up its place.
    """
    watched = health_routes(host, turns) if host is not None and turns is not None else []
    return {
        "theme": build_theme(),
        "head": head(),
        "footer_links": ["api", "settings"],
        "run_history": False,
        "strict_cors": True,
        "enable_monitoring": False,
        "show_error": False,
        "max_file_size": MAX_UPLOAD,
        "max_threads": MAX_THREADS,
        "state_session_capacity": MAX_SESSIONS,
        # Needs gradio's extra: pip install "gradio[mcp]". Without it the page runs as ever.
        "mcp_server": importlib.util.find_spec("mcp") is not None,
        "app_kwargs": {
            "middleware": [
                Middleware(
                    Guard,
                    on_leave=turns.left if turns else None,
                    on_ask=turns.back if turns else None,
                ),
                Middleware(LinkPreview),
            ],
            "routes": [
                *watched,
                # Under a prefix that Gradio's Node server hands on when it renders the page (SSR).
                Route("/gradio_api/explorer/plotly.js", plotly_script),
                Route("/gradio_api/explorer/offline.html", offline_skeleton),
                Route(PICTURE_PATH, picture),
                *lesson_routes(),
            ],
        },
    }


def plotly_script(_: HTTPRequest) -> Response:
    """The chart library, from the installed package."""
    return Response(
        plotly_source(),
        media_type="text/javascript",
        headers={"Cache-Control": "public, max-age=86400"},
    )


def offline_skeleton(_: HTTPRequest) -> Response:
    """The page of one run without the run, which the browser puts in; sent as text, so that it is
    never shown from here.
    """
    titles = tuple((view.key, view.title) for view in VIEWS.values())
    return Response(
        offline_page(plotly_source(), titles),
        media_type="text/plain; charset=utf-8",
        headers={"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"},
    )

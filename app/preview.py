"""What a pasted link to the page looks like: the product's own title, words and picture.

Gradio's page says "Gradio" first and leaves its own tags without words (templates/frontend/
index.html of 6.31), so the head is rewritten on its way out. Knows HTTP alone.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PICTURE = Path(__file__).parent.parent / "assets" / "screenshot.png"
PICTURE_PATH = "/gradio_api/explorer/preview.png"
TITLE = "DynamicKV Explorer"
WORDS = (
    "See what KV-cache compression keeps of your text, layer by layer, and how far the answer "
    "still follows the full cache's."
)
TAGS = re.compile(rb'<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*')
BASE = re.compile(rb"<base [^>]*>")
HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:\d{1,5})?|\[[0-9a-fA-F:]+\](:\d{1,5})?")


class LinkPreview:
    """ASGI: puts `tags` into the page in place of Gradio's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Only the page itself is held back until it is whole; everything else passes through."""
        if scope["type"] != "http" or scope["method"] != "GET" or not is_page(scope):
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        parts: list[bytes] = []

        async def rewritten(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is None or message["type"] != "http.response.body":
                await send(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = b"".join(parts)
            headers = MutableHeaders(raw=list(start["headers"]))
            if headers.get("content-type", "").startswith("text/html"):
                body = with_tags(body, address_of(scope))
                headers["content-length"] = str(len(body))
            await send({**start, "headers": headers.raw})
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, rewritten)


def is_page(scope: Scope) -> bool:
    """Whether a request asks for the page: its root, wherever that is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root).strip("/") == ""


def address_of(scope: Scope) -> str:
    """Where the page is reached, or nothing where a request does not say it soundly."""
    host = Headers(scope=scope).get("host", "")
    root = str(scope.get("root_path", "")).rstrip("/")
    return f"{scope['scheme']}://{host}{root}" if HOST.fullmatch(host) else ""


def with_tags(page: bytes, address: str) -> bytes:
    """The page with the product's tags right after its base, and without Gradio's.

    What is not an HTML page with a base is left as it is.
    """
    if not BASE.search(page):
        return page
    tags = preview_tags(address).encode()
    return BASE.sub(lambda found: found.group() + tags, TAGS.sub(b"", page), count=1)


def preview_tags(address: str) -> str:
    """Open Graph's and Twitter's tags; with a picture where the address is known."""
    named = {"og:title": TITLE, "og:type": "website", "og:description": WORDS}
    card = {"twitter:title": TITLE, "twitter:description": WORDS, "description": WORDS}
    if address:
        picture = f"{address}{PICTURE_PATH}"
        named |= {"og:url": f"{address}/", "og:image": picture}
        card |= {"twitter:card": "summary_large_image", "twitter:image": picture}
    rows = [f'<meta property="{name}" content="{html.escape(v)}">' for name, v in named.items()]
    rows += [f'<meta name="{name}" content="{html.escape(v)}">' for name, v in card.items()]
    return "".join(rows)


def picture(_: Request) -> Response:
    """The picture of a link's preview."""
    return FileResponse(PICTURE, headers={"Cache-Control": "public, max-age=86400"})

"""The Gallery tab: recorded losses over several models, each with an address."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from app.components import Gallery
from app.examples import Example

from .view_model import gallery_payload


def build_gallery(examples: Iterable[Example], offered: Collection[str]) -> None:
    """The tab's content; `offered` are the models of this page."""
    Gallery(gallery_payload(examples, offered), elem_id="dkv-gallery")

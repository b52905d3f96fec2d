"""The Gallery tab: recorded losses over several models, each with an address."""

from __future__ import annotations

from collections.abc import Iterable

from app.components import Gallery
from app.examples import Example

from .view_model import gallery_payload


def build_gallery(examples: Iterable[Example]) -> None:
    """The tab's content."""
    Gallery(gallery_payload(examples), elem_id="dkv-gallery")

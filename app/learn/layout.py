"""The Learn tab: one component, whose static text fetches its lessons itself (routes.py)."""

from __future__ import annotations

from app.components import Learn


def build_learn() -> None:
    """The tab's content."""
    Learn(elem_id="dkv-learn")

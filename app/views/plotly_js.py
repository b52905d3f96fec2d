"""Plotly's own script, as the plotly package ships it: the version its figures are written for, and
no CDN.
"""

from __future__ import annotations

from functools import lru_cache

from plotly.offline import get_plotlyjs


@lru_cache(maxsize=1)
def plotly_source() -> str:
    """The script's text, read from the installed package once."""
    return str(get_plotlyjs())

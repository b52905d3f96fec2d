"""The growth plot in README, from benchmarks/results/engine.json: python -m benchmarks.plot.

Plotly draws it and Chromium takes the picture, as both are here for the page and its tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.subplots import make_subplots

from benchmarks.report import RESULTS

TARGET = Path(__file__).parent.parent / "assets" / "growth.png"
PANELS = {
    "Decoding, ms per token": (
        "decode, transformers' generate",
        "decode, FullKV",
        "decode, DynamicKV(128)",
    ),
    "Overhead, share of the prefill": ("prefill, observing, scoring, pruning / plain prefill",),
    "Peak KV bytes in serve mode / full": ("serve-mode peak KV bytes, DynamicKV(128) / full",),
}
LABELS = {
    "decode, transformers' generate": "transformers",
    "decode, FullKV": "FullKV",
    "decode, DynamicKV(128)": "DynamicKV(128)",
}
COLOURS = ("#8a8a8a", "#0072b2", "#d55e00")


def growth() -> None:
    """Write assets/growth.png."""
    rows = json.loads((RESULTS / "engine.json").read_text("utf-8"))["rows"]
    figure = make_subplots(1, len(PANELS), subplot_titles=list(PANELS))
    for column, (title, measures) in enumerate(PANELS.items(), 1):
        for colour, measure in zip(COLOURS, measures, strict=False):
            found = [row for row in rows if row["measure"].rpartition(", ")[0] == measure]
            less = 1 if title.startswith("Overhead") else 0
            figure.add_scatter(
                x=[row["measure"].rpartition(", ")[2] for row in found],
                y=[row["value"] - less for row in found],
                name=LABELS.get(measure, measure),
                showlegend=measure in LABELS,
                line_color=colour if measure in LABELS else COLOURS[2],
                row=1,
                col=column,
            )
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(
        template="plotly_white",
        width=1100,
        height=340,
        margin={"l": 50, "r": 20, "t": 40, "b": 70},
        legend={"orientation": "h", "y": -0.18},
    )
    picture(figure)


def picture(figure: go.Figure) -> None:
    """Draw a figure in Chromium and save what it shows."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("the plot needs Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 360}, device_scale_factor=1.5)
        page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
        page.wait_for_selector(".main-svg")
        page.locator(".plotly-graph-div").screenshot(path=str(TARGET))
        browser.close()


if __name__ == "__main__":
    growth()
